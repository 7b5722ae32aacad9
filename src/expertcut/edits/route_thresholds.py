"""Thresholds of routing rules that keep a mean number of experts, layer by layer.

One pass over at most 512 tuning questions keeps, of at most 65,536 tokens, the score by which each
further expert stays. A threshold is then a quantile of these scores: no other pass is needed.
T are tokens, X the places behind those that always stay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertcut.data.corpus import CalibrationSet, round_robin
from expertcut.edits.calibrate import CALIBRATION_QUESTIONS, Reservoir, collect_routing
from expertcut.errors import SettingsError
from expertcut.models.hooks import Routing
from expertcut.models.modeling_routed import Tokens, best_first, log_shares
from expertcut.models.moe_block import MoeBlock
from expertcut.models.routing_rule import RULE_KINDS, ErrorCoefficients, RoutingRule
from expertcut.scoring.engine import Engine
from expertcut.scoring.rerouting import tokens_of

MOST_TOKENS = 1 << 16
Scores = Callable[[Tokens, int], Tensor]
"""Scores (T, X) by which further experts stay, of the best `most` of each token."""


def _skip(tokens: Tokens, most: int) -> Tensor:
    """g_i / g_1 of all but the largest gate weight."""
    weights_TK = _of_best(tokens, tokens.weights_TK, most)
    return weights_TK[:, 1:] / weights_TK[:, :1]


def _of_best(tokens: Tokens, values_TK: Tensor, most: int) -> Tensor:
    """The values of the best `most` routed experts, the largest first; best by selection score."""
    order_TM = tokens.rank_TK.argsort(dim=1)[:, :most]
    return values_TK.float().gather(1, order_TM).sort(dim=1, descending=True).values


def _top_p(tokens: Tokens, most: int) -> Tensor:
    """What the experts before a place leave of the probability: it stays while ≥ 1 − p."""
    probability_TM = tokens.probability_TE.gather(1, best_first(tokens, most))
    return 1 - probability_TM.cumsum(dim=1)[:, :-1]


def _entropy(tokens: Tokens, most: int) -> Tensor:
    """exp(H) over the number of experts before a place: it stays while above 1 / c."""
    entropy_T1 = torch.special.entr(tokens.probability_TE.double()).sum(dim=1, keepdim=True)
    score_TX: Tensor = entropy_T1.exp() / torch.arange(1, most)
    return score_TX.float()


def _null(tokens: Tokens, most: int) -> Tensor:
    """Logits of the chosen experts, each of which stays while above b."""
    return _of_best(tokens, tokens.logits_TE.gather(1, tokens.experts_TK), most)


def _fitted(tokens: Tokens, most: int) -> Tensor:
    """The least fitted error of fewer experts than a place: it stays while above ε."""
    assert tokens.fit_KK is not None, "rule fitted was fitted"
    error_TX = log_shares(tokens.weights_TK) @ tokens.fit_KK.T
    return error_TX.cummin(dim=1).values[:, : most - 1].float()


@dataclass(frozen=True)
class _Calibrated:
    """Scores (T, X): a place stays where its score is at least a level; `at` is that level's form.

    `n_fixed` experts stay whatever the level, and a share `whole` of the tokens keeps all.
    """

    scores: Scores
    at: Callable[[float], float]
    n_fixed: int = 1
    whole: float = 0.0


_RULES: dict[str, _Calibrated] = {
    "skip": _Calibrated(_skip, lambda level: level),
    "top-p": _Calibrated(_top_p, lambda level: 1 - level),
    "entropy": _Calibrated(_entropy, lambda level: 1 / level),
    "null": _Calibrated(_null, lambda level: level, n_fixed=0),
    "fitted": _Calibrated(_fitted, lambda level: level),
    "odp": _Calibrated(_skip, lambda level: level, whole=RoutingRule(rule="odp").share),
}


@dataclass(frozen=True)
class GateSample:
    """Scores of one rule on a sample of tokens, by layer, sorted from the largest."""

    rule: str
    scores_by_layer: dict[int, Tensor]  # (T · X,)
    n_places: int

    @property
    def n_most(self) -> int:
        """The most experts that a token may use."""
        return _RULES[self.rule].n_fixed + self.n_places

    def thresholds(self, experts: float, *, is_shared: bool = False) -> dict[int, float]:
        """By layer the `at` with which these tokens use so many experts in the mean.

        A few more where scores are tied at the end of what the rule takes, as of two equal weights.
        With `is_shared` one for all layers, and the mean is over them.
        """
        own, kind = _RULES[self.rule], RULE_KINDS[self.rule]
        n_all = self.n_most
        of_others = (experts - own.whole * n_all) / (1 - own.whole)
        share = (of_others - own.n_fixed) / max(self.n_places, 1)
        if not 0 <= share <= 1:
            least = own.n_fixed + own.whole * (n_all - own.n_fixed)
            raise SettingsError(
                f"--experts {experts:g} must lie between {least:g} and {n_all} for "
                f"--rule {self.rule}, the most that a token may use: change it or --most"
            )
        by_layer = self.scores_by_layer
        if is_shared:
            together = torch.cat([*by_layer.values()]).sort(descending=True).values
            by_layer = dict.fromkeys(by_layer, together)
        return {
            layer: min(max(own.at(_level(scores, share)), kind.low), kind.high)
            for layer, scores in by_layer.items()
        }


def _level(scores: Tensor, share: float) -> float:
    """The level that this share of descending scores reaches, midway between two of them."""
    n = round(share * len(scores))
    if n == 0:
        return float(scores[0]) + abs(float(scores[0])) * 1e-6 + 1e-9
    if n == len(scores):
        return float(scores[-1]) - abs(float(scores[-1])) * 1e-6 - 1e-9
    return (float(scores[n - 1]) + float(scores[n])) / 2


def sample_gates(
    engine: Engine,
    tuning: CalibrationSet,
    rules: Sequence[str],
    n_most: int | None,
    fits: Mapping[int, ErrorCoefficients] | None = None,
) -> dict[str, GateSample]:
    """The samples of several rules, from one pass; `fits` are those of rule fitted."""
    blocks = engine.moe.blocks
    few, layers = round_robin(tuning, CALIBRATION_QUESTIONS), {block.layer for block in blocks}
    reservoir, widths = Reservoir(MOST_TOKENS), dict[str, int]()
    fit_by_layer = {i: torch.tensor(fit, dtype=torch.float64) for i, fit in (fits or {}).items()}

    def see(routing: Routing, _is_answer_T: Tensor) -> None:
        block, parts = blocks[routing.layer], []
        tokens = tokens_of(block, routing, fit_by_layer.get(routing.layer))
        for rule in rules:
            parts.append(_RULES[rule].scores(tokens, most_experts(block, rule, n_most)))
            widths[rule] = parts[-1].shape[1]
        reservoir.add(routing.layer, torch.cat(parts, dim=1))

    collect_routing(engine, few, layers, see)
    found, start = dict[str, GateSample](), 0
    for rule in rules:
        own = slice(start, start := start + widths[rule])
        by_layer = {
            layer: rows_TX[:, own].flatten().sort(descending=True).values
            for layer, rows_TX in reservoir.kept.items()
        }
        found[rule] = GateSample(rule, by_layer, widths[rule])
    return found


def most_experts(block: MoeBlock, rule: str, n_most: int | None) -> int:
    """The most experts of a block that a token may use by a rule: K unless `--most` says more.

    0 is all; rules that only leave out never go beyond K.
    """
    wanted = block.top_k if n_most is None else n_most or block.n_experts
    return min(wanted, block.n_experts if RULE_KINDS[rule].may_widen else block.top_k)
