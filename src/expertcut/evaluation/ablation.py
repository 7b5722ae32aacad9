"""The stage behind `audit`: experts are ablated one at a time, and criteria scored against it."""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.checkpoints.export import check_layout
from expertcut.checkpoints.held_out_check import NOT_REACHED
from expertcut.checkpoints.simulate import apply_at_runtime
from expertcut.edits.budget import as_numbers, normalised
from expertcut.edits.calibrate import zero_outputs
from expertcut.edits.criteria import CRITERIA
from expertcut.edits.edit_settings import AuditSettings, CutSettings
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, expert_ids, plan_model
from expertcut.edits.ranking import empty_draft, rank
from expertcut.edits.reweight_select import QuestionOutcomes, right
from expertcut.edits.splits import hashes, judges_or_fifth, n_used, questions_for
from expertcut.errors import ContractError, PlanError, ProfileError
from expertcut.evaluation.results import begun, check_same, profile_hash
from expertcut.evaluation.reweight_search import CachedScorer
from expertcut.evaluation.search_results import (
    ALL,
    AUDIT_FILE,
    AblationEffect,
    Audit,
    AuditAsked,
    Correlation,
    CriterionRank,
    Regret,
    Sampled,
    Verdict,
    read_criteria,
    read_fractions,
    save_audit,
)
from expertcut.evaluation.stats import mcnemar
from expertcut.models.load import LoadOptions
from expertcut.profiling.locks import alone
from expertcut.profiling.significance import Z95
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Pass
from expertcut.scoring.passes import OnPass

logger = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]
DRAWS = 2_000
_FEWEST = 3  # experts, of which a rank correlation says anything
Ranks = Callable[[Array, Array], Array]  # values (B, X) and layers (X,) → ranks (B, X)


def sample_experts(n_experts: Sequence[int], sample: int, seed: int) -> list[tuple[int, int]]:
    """`sample` (layer, expert) pairs, at most all there are, sorted.

    Equally many of each layer, what is left over of layers drawn at random, and in each drawn at
    random among all of its experts, used or not: nothing is kept away.
    """
    rng = np.random.default_rng(seed)
    quota = [0] * len(n_experts)
    left = min(sample, sum(n_experts))
    while left:
        open_layers = [layer for layer, n in enumerate(n_experts) if quota[layer] < n]
        turn = rng.permutation(open_layers)[:left]
        for layer in turn.tolist():
            quota[layer] += 1
        left -= len(turn)
    drawn = [rng.choice(n, k, replace=False) for n, k in zip(n_experts, quota, strict=True)]
    return [(layer, int(e)) for layer, own in enumerate(drawn) for e in sorted(own.tolist())]


def sampled_experts(profile: Profile, sample: int, seed: int) -> tuple[Sampled, ...]:
    """The same of a profiled model, with the numbers that its experts are called by."""
    blocks, numbers = profile.info.model.blocks, expert_ids(profile)
    # Experts that a table chooses cannot be removed.
    n_experts = [0 if block.is_hashed else block.experts for block in blocks]
    pairs = sample_experts(n_experts, sample, seed)
    return tuple(
        Sampled(layer=layer, row=row, expert=numbers.number(blocks[layer].name, row))
        for layer, row in pairs
    )


def standings(
    profile: Profile,
    by: Sequence[str],
    settings: AuditSettings,
    engine: Engine,
    sampled: Sequence[Sampled],
    *,
    is_all: bool,
) -> dict[str, CriterionRank]:
    """What each criterion says of the sampled experts.

    Where all criteria are asked for, one that the profile is too small for is left out, and said.

    Raises:
        ProfileError: the profile is too small for a criterion that was named.
    """
    found = {}
    for name in by:
        try:
            found[name] = _standing(profile, settings.cut_by(name), engine, sampled)
        except ProfileError as error:
            if not is_all:
                raise
            logger.warning("%s is left out: %s", name, error)
    return found


def _standing(
    profile: Profile, cut: CutSettings, engine: Engine, sampled: Sequence[Sampled]
) -> CriterionRank:
    ranking = rank(profile, cut, engine if CRITERIA[cut.by].needs_model else None)
    numbers = [as_numbers(score_E) for score_E in ranking.scores]
    shares = [normalised(score_E) for score_E in ranking.scores]
    return CriterionRank(
        score=tuple(float(numbers[s.layer][s.row]) for s in sampled),
        share=tuple(float(shares[s.layer][s.row]) for s in sampled),
        place=tuple(ranking.orders[s.layer].index(s.row) for s in sampled),
    )


def verdict(
    by: str,
    standing: CriterionRank,
    harms: Sequence[AblationEffect],
    fractions: Sequence[float],
    seed: int,
) -> Verdict:
    """How well one criterion foretold the harms; X are the sampled experts."""
    layer_X = np.array([harm.layer for harm in harms])
    logprob_X = np.array([harm.logprob for harm in harms])
    accuracy_X = np.array([harm.accuracy for harm in harms])
    score_X, share_X = np.array(standing.score), np.array(standing.share)
    return Verdict(
        by=by,
        within=correlation(score_X, logprob_X, layer_X, ranks_within, seed),
        overall=correlation(share_X, logprob_X, layer_X, ranks_overall, seed),
        within_accuracy=correlation(score_X, accuracy_X, layer_X, ranks_within, seed),
        regrets=tuple(
            regret(np.array(standing.place), logprob_X, layer_X, fraction) for fraction in fractions
        ),
    )


def correlation(
    score_X: Array, harm_X: Array, layer_X: Array, ranks: Ranks, seed: int
) -> Correlation:
    """Spearman's with its interval; p is by shuffling harms within layers, or over all."""
    if len(score_X) < _FEWEST:
        return Correlation(rho=None, ci95=None)
    score_1X, harm_1X = ranks(score_X[None], layer_X), ranks(harm_X[None], layer_X)
    rho = float(_pearson(score_1X, harm_1X)[0])
    if not np.isfinite(rho):
        return Correlation(rho=None, ci95=None)
    apart_X = layer_X if ranks is ranks_within else np.zeros_like(layer_X)
    shuffled_B = _pearson(score_1X, harm_1X[0, _shuffles(apart_X, seed)])
    return Correlation(
        rho=rho,
        ci95=interval(rho, _degrees_of_freedom(score_1X[0], harm_1X[0], apart_X)),
        # Sums in another order differ in their last bits.
        p=float((1 + (shuffled_B >= rho - 1e-9).sum()) / (1 + DRAWS)),
    )


def interval(rho: float, freedom: int) -> tuple[float, float]:
    """95 % interval of a rank correlation, by Fisher's z.

    The variance (1 + ρ²/2)/(n − 3) is Bonett and Wright's (2000), Psychometrika 65:23. One mean of
    ranks is taken off there, here one of each layer, so n − 1 becomes the degrees of freedom.
    ρ = ±1 counts as 1 − 1/freedom, for a few pairs that all agree do not show a perfect order.
    """
    most = 1 - 1 / freedom
    shrunk = min(max(rho, -most), most)
    half = Z95 * math.sqrt((1 + shrunk**2 / 2) / max(freedom - 2, 1))
    low, high = math.tanh(math.atanh(shrunk) - half), math.tanh(math.atanh(shrunk) + half)
    return min(low, rho), max(high, rho)


def ranks_overall(values_BX: Array, _layer_X: Array) -> Array:
    """Ranks among all, ties shared."""
    ranks_BX = rankdata(values_BX, axis=1)
    distances_BX: Array = ranks_BX - ranks_BX.mean(axis=1, keepdims=True)
    return distances_BX


def ranks_within(values_BX: Array, layer_X: Array) -> Array:
    """Ranks among those of the same layer, ties shared, as distances from the layer's mean."""
    ranks_BX = np.empty(values_BX.shape)
    for layer in np.unique(layer_X):
        is_own_X = layer_X == layer
        ranks_BX[:, is_own_X] = ranks_overall(values_BX[:, is_own_X], layer_X)
    return ranks_BX


def regret(place_X: Array, harm_X: Array, layer_X: Array, fraction: float) -> Regret:
    """Of each layer's sampled experts so large a share stays, as with --keep-fraction."""
    removed, chosen, least, random = 0, 0.0, 0.0, 0.0
    for layer in np.unique(layer_X):
        of_layer = np.flatnonzero(layer_X == layer)
        n_removed = len(of_layer) - round(fraction * len(of_layer))
        by_place = harm_X[of_layer][np.argsort(-place_X[of_layer], kind="stable")]
        removed += n_removed
        chosen += float(by_place[:n_removed].sum())
        least += float(np.sort(by_place)[:n_removed].sum())
        random += n_removed * float(by_place.mean())
    return Regret(fraction=fraction, removed=removed, chosen=chosen, least=least, random=random)


def _pearson(a_BX: Array, b_BX: Array) -> Array:
    """Of values that are distances from their means; NaN where one does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        both_B = (a_BX * b_BX).sum(axis=1)
        rho_B: Array = both_B / np.sqrt((a_BX**2).sum(axis=1) * (b_BX**2).sum(axis=1))
    return rho_B


def _degrees_of_freedom(score_X: Array, harm_X: Array, apart_X: Array) -> int:
    """Σ (experts − 1) over the groups in which ranks are taken and both of them vary."""
    own = [apart_X == group for group in np.unique(apart_X)]
    return sum(
        int(is_own.sum()) - 1 for is_own in own if score_X[is_own].any() and harm_X[is_own].any()
    )


def _shuffles(layer_X: Array, seed: int) -> Array:
    """Experts of each layer in random order, (B, X)."""
    rng = np.random.default_rng(seed)
    drawn_BX = np.empty((DRAWS, len(layer_X)), dtype=np.int64)
    for layer in np.unique(layer_X):
        own = np.flatnonzero(layer_X == layer)
        drawn_BX[:, own] = rng.permuted(np.tile(own, (DRAWS, 1)), axis=1)
    return drawn_BX


@dataclass(frozen=True)
class AuditProgress:
    """How far an audit is, in questions asked; `left_s` is None while that is unknown."""

    done: int
    total: int
    tokens: int
    left_s: float | None


class Auditing:
    """One loaded model and its sampled experts; `found` is what is known so far.

    Raises:
        ContractError: the layout does not know the model's family.
        PlanError: no expert can go without leaving fewer than top-k.
        ProfileError: the model or the quiz is not the one that was profiled.
    """

    def __init__(self, profile: Profile, settings: AuditSettings, load_as: LoadOptions) -> None:
        self.profile, self.settings = profile, settings
        self.by = read_criteria(settings.by)
        self.fractions = read_fractions(settings.fractions, "--fractions")
        self.blocks, layout = profile.info.model.blocks, settings.layout
        for block in self.blocks:
            if block.experts <= block.top_k and not LAYOUTS[layout].keeps_rows:
                raise PlanError(
                    f"{block.name} routes each token to all of its {block.experts} experts: "
                    "none can be removed"
                )
        source = profiled_source(profile)
        check_layout(source, layout, is_cutting=True)
        is_fitting = any(CRITERIA[by].is_calibrated for by in self.by)
        asked = questions_for(profile, is_fitting=is_fitting, n_held_out=settings.questions)
        self.quiz = judges_or_fifth(asked, settings.questions)
        looked_at = hashes(asked.profiled) | (hashes(asked.tuning) if is_fitting else frozenset())
        self.overlap = n_used(self.quiz, looked_at | asked.inherited)
        self.engine = engine_as_profiled(profile, source, load_as)

    @property
    def n_questions(self) -> int:
        """That will be asked in all, but for those of the first run."""
        n_experts = sum(block.experts for block in self.blocks)
        return len(self.quiz) * min(self.settings.sample, n_experts)

    def run(self, folder: Path, on_pass: OnPass) -> Iterator[AuditProgress]:
        """Removes every expert that the folder lacks; each is kept when it is done.

        Raises:
            OutputError: the folder holds something else, or another audit, or another run is at
                work there.
        """
        asked = self._asked()
        earlier = _earlier(folder, asked)
        if earlier is not None and earlier.verdicts:
            self.found = earlier
            return
        with alone(folder, "audit"):
            yield from self._run(folder, asked, on_pass)

    def _run(self, folder: Path, asked: AuditAsked, on_pass: OnPass) -> Iterator[AuditProgress]:
        earlier = _earlier(folder, asked)  # another run may have ended since
        rescorer = CachedScorer(self.engine, self.quiz)
        self.found = earlier or self._begin(asked, rescorer)
        save_audit(folder, self.found)
        yield from self._remove(rescorer, folder, on_pass)
        found = self.found
        verdicts = (
            verdict(by, standing, found.harms, self.fractions, self.settings.seed)
            for by, standing in found.standings.items()
        )
        self.found = found.model_copy(update={"verdicts": tuple(verdicts)})
        save_audit(folder, self.found)

    def _asked(self) -> AuditAsked:
        settings, info = self.settings, self.profile.info
        content = "\n".join(f"{q.content_hash} {q.answer}" for q in self.quiz)
        return AuditAsked(
            model=plan_model(info.model),
            settings=info.settings,
            profile=profile_hash(info),
            quiz=self.quiz.id,
            split=self.quiz.split,
            shots=self.quiz.shots,
            questions=len(self.quiz),
            asked=hashlib.sha256(content.encode()).hexdigest(),
            by=self.by,
            positions=settings.positions,
            layout=settings.layout,
            fractions=self.fractions,
            sample=settings.sample,
            seed=settings.seed,
            truncate=self.quiz.truncate,
        )

    def _begin(self, asked: AuditAsked, rescorer: CachedScorer) -> Audit:
        settings, records = self.settings, rescorer.records
        sampled = sampled_experts(self.profile, settings.sample, settings.seed)
        common = (self.profile, self.by, settings, self.engine, sampled)
        found = standings(*common, is_all=settings.by == ALL)
        if not found:
            raise ProfileError(f"{self.profile.path} can serve none of {', '.join(self.by)}")
        return Audit(
            asked=asked,
            overlap=self.overlap,
            cut=rescorer.n_cut,
            accuracy=float(records.is_correct_N.mean()),
            right_logprob=float(_right(records.logprob_NC, records.answer_N).mean()),
            sampled=sampled,
            standings=found,
        )

    def _remove(
        self, rescorer: CachedScorer, folder: Path, on_pass: OnPass
    ) -> Iterator[AuditProgress]:
        n_each, n_before, started = len(self.quiz), len(self.found.harms), time.monotonic()
        total = len(self.found.sampled)
        for done, expert in enumerate(self.found.sampled[n_before:], start=n_before + 1):
            change = _told(self._without(expert), on_pass)
            found = rescorer.changed(expert.layer, change)
            self._check_reached(expert, rescorer.records, found)
            harm = _harm(expert, rescorer.records, found)
            self.found = self.found.model_copy(update={"harms": (*self.found.harms, harm)})
            save_audit(folder, self.found)
            left_s = (time.monotonic() - started) * (total - done) / (done - n_before)
            yield AuditProgress(done * n_each, total * n_each, 0, left_s)

    def _check_reached(self, expert: Sampled, base: QuestionOutcomes, logprob_NC: Array) -> None:
        """That answers changed, where the expert had a share in one that counts."""
        is_chosen_N = (base.chosen_NLK[:, expert.layer] == expert.row).any(axis=1)
        is_masked = not LAYOUTS[self.settings.layout].keeps_rows
        if is_masked and is_chosen_N.any() and np.array_equal(base.logprob_NC, logprob_NC):
            alpha_NE = base.alpha_NLE[is_chosen_N, expert.layer]
            if (alpha_NE[:, expert.row] > 0.01 * alpha_NE.sum(axis=1)).any():
                name = f"without expert {expert.layer}:{expert.expert}"
                raise ContractError(NOT_REACHED.format(name))

    def _without(self, expert: Sampled) -> AbstractContextManager[OnPass]:
        """The unedited model without one expert, as the layout means it."""
        settings, model = self.settings, self.engine.moe.model
        ids = {block.name: tuple(range(block.experts)) for block in self.blocks}
        name = self.blocks[expert.layer].name
        ids[name] = tuple(row for row in ids[name] if row != expert.row)
        edits = {block: BlockEdit(keep=keep) for block, keep in ids.items()}
        draft = replace(empty_draft(settings.cut_by(self.by[0]), "", "", ""), edits=edits)
        width = int(model.config.get_text_config().hidden_size)
        is_exact = LAYOUTS[settings.layout].keeps_rows
        constants = zero_outputs({name: (expert.row,)}, width) if is_exact else {}
        return apply_at_runtime(self.engine.moe, draft, constants)


def _earlier(folder: Path, asked: AuditAsked) -> Audit | None:
    earlier = begun(folder / AUDIT_FILE, Audit)
    if earlier is not None:
        check_same(folder, earlier.asked, asked, "audit")
    return earlier


@contextmanager
def _told(change: AbstractContextManager[OnPass], on_pass: OnPass) -> Iterator[OnPass]:
    """The change, and another that is told of each pass."""
    with change as begin:

        def both(step: Pass) -> None:
            begin(step)
            on_pass(step)

        yield both


def _harm(expert: Sampled, base: QuestionOutcomes, logprob_NC: Array) -> AblationEffect:
    lost_N = _right(base.logprob_NC, base.answer_N) - _right(logprob_NC, base.answer_N)
    was_N, is_N = base.is_correct_N, right(logprob_NC, base.answer_N)
    gained, lost = int((~was_N & is_N).sum()), int((was_N & ~is_N).sum())
    both_NC = np.isfinite(base.logprob_NC)
    n = len(lost_N)
    return AblationEffect(
        layer=expert.layer,
        expert=expert.expert,
        logprob=float(lost_N.mean()),
        stderr=float(lost_N.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
        accuracy=(lost - gained) / n,
        gained=gained,
        lost=lost,
        mcnemar_p=mcnemar(gained, lost),
        largest=float(np.abs(base.logprob_NC - logprob_NC)[both_NC].max()),
    )


def _right(logprob_NC: Array, answer_N: Array) -> Array:
    """Log p of the right answers (N,)."""
    found_N: Array = logprob_NC[np.arange(len(answer_N)), answer_N].astype(np.float64)
    return found_N
