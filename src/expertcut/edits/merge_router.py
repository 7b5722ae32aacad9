"""The router row of a merged expert: one linear row in place of its members' rows.

In a softmax gate a group's mass is Σ exp(logit) over its members, so its row should give the
logarithm of that, which no linear row does. The fitted row is the members' mean row, by their
shares, plus what a ridge regression on router inputs finds of the difference.

    gate weight       members that count
    α of all experts  all: the softmax keeps its denominator
    renormalised      those that the token chose, for the others' mass was never used; where it
                      chose none, the largest
    sigmoid, √softplus  the one that would be chosen first: there is no mass to add up
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertcut.data import Quiz, round_robin
from expertcut.edits.calibrate import CALIBRATION_QUESTIONS, collect_routing
from expertcut.edits.edit_settings import RouterRow
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ContractError
from expertcut.models.hooks import Routing
from expertcut.models.moe_block import SCORES, MoeBlock
from expertcut.scoring.engine import Engine

Shares = Mapping[int, float]
_RIDGE = 1e-6  # of the mean eigenvalue of E[hhᵀ]; more lost what lies in small ones (docs/log.md)
_TIE = 1e-5  # logits that are this close are equal but for rounding


@dataclass(frozen=True)
class Rows:
    """One layer's rows of merged experts, by the id of the dominant member.

    Each is Σ share · row over `shares`, plus `added` (D,). `offsets` go to the router's own logit
    bias, `selection` are selection biases, if the family has them.
    """

    shares: Mapping[int, Shares]
    added: Mapping[int, Tensor] = field(default_factory=dict)
    offsets: Mapping[int, float] = field(default_factory=dict)
    selection: Mapping[int, float] = field(default_factory=dict)

    def logits(self, routing: Routing) -> Tensor:
        """Their logits on router inputs, (T, groups) float64."""
        logits_TE, input_TD = routing.logits_TE.double(), routing.input_TD.double()
        found = []
        for expert, shares in self.shares.items():
            logit_T = _mean_logit(logits_TE, shares) + self.offsets.get(expert, 0.0)
            if expert in self.added:
                logit_T = logit_T + input_TD @ self.added[expert]
            found.append(logit_T)
        return torch.stack(found, dim=1)


@dataclass(frozen=True)
class Quality:
    """Fit of a layer's merged rows to the mass of their members on held-out questions.

    1 − Σ(error²) / Σ(distance from its mean²), over tokens and groups: 1 is exact.
    """

    layer: int
    groups: int
    quality: float


def merged_rows(
    engine: Engine, tuning: Quiz, edits: Mapping[str, BlockEdit], kind: RouterRow
) -> dict[int, Rows]:
    """The rows of each layer with merged experts, fitted on at most 512 questions.

    Raises:
        ContractError: logits are not linear, and the row is not the dominant member's.
    """
    blocks = [b for b in engine.moe.blocks if edits[b.name].merged]
    bent = next((b for b in blocks if not b.is_linear), None)
    if bent is not None and kind != "dominant":
        raise ContractError(
            f"{bent.name}: its router caps or scales its logits, so no mean or fitted row of its "
            "gate matrix stands for several: take --router dominant"
        )
    if kind != "fitted":
        return {b.layer: _unfitted(edits[b.name], kind) for b in blocks}
    sums = {b.layer: _Sums(b, edits[b.name].merged or {}) for b in blocks}
    few = round_robin(tuning, CALIBRATION_QUESTIONS)
    collect_routing(engine, few, sums, lambda routing, _: sums[routing.layer].add(routing))
    return {layer: its.rows() for layer, its in sums.items()}


def judge_rows(
    engine: Engine, held_out: Quiz, edits: Mapping[str, BlockEdit], rows: Mapping[int, Rows]
) -> list[Quality]:
    """Fit of the rows on held-out questions."""
    blocks = {b.layer: b for b in engine.moe.blocks if b.layer in rows}
    found: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in rows}

    def hear(routing: Routing, _is_answer_T: Tensor) -> None:
        block = blocks[routing.layer]
        target_TG = targets(block, routing, edits[block.name].merged or {})
        found[routing.layer].append((target_TG, rows[routing.layer].logits(routing)))

    if rows:
        collect_routing(engine, held_out, rows, hear)
    return [_quality(layer, pairs) for layer, pairs in found.items()]


def targets(block: MoeBlock, routing: Routing, merged: Mapping[int, Shares]) -> Tensor:
    """The logit (T, groups) float64 that keeps each group's mass."""
    logits_TE = routing.logits_TE.double()
    groups = [list(shares) for shares in merged.values()]
    if block.scoring != "softmax":
        return torch.stack([_first(block, logits_TE, ids) for ids in groups], dim=1)
    if block.inflates:
        return torch.stack([logits_TE[:, ids].logsumexp(dim=1) for ids in groups], dim=1)
    last_T1 = logits_TE.gather(1, routing.experts_TK).amin(dim=1, keepdim=True)
    found = []
    for ids in groups:
        own_TM = logits_TE[:, ids]
        least_T1 = last_T1.minimum(own_TM.amax(dim=1, keepdim=True)) - _TIE
        found.append(own_TM.masked_fill(own_TM < least_T1, -torch.inf).logsumexp(dim=1))
    return torch.stack(found, dim=1)


def _first(block: MoeBlock, logits_TE: Tensor, experts: list[int]) -> Tensor:
    """The logit (T,) of the member with the best score, selection bias included."""
    own_TM, selection_E = logits_TE[:, experts], block.selection_bias()
    score_TM = own_TM if block.selection == "logits" else SCORES[block.scoring](own_TM)
    if selection_E is not None:
        score_TM = score_TM + selection_E.cpu()[experts]
    return own_TM.gather(1, score_TM.argmax(dim=1, keepdim=True))[:, 0]


def _unfitted(edit: BlockEdit, kind: RouterRow) -> Rows:
    merged = edit.merged or {}
    if kind == "dominant":
        return Rows({expert: {expert: 1.0} for expert in merged})
    return Rows(merged)


def _quality(layer: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> Quality:
    target_TG, found_TG = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    error = ((target_TG - found_TG) ** 2).sum()
    spread = ((target_TG - target_TG.mean(dim=0)) ** 2).sum()
    return Quality(layer, target_TG.shape[1], float(1 - error / spread))


def _mean_logit(logits_TE: Tensor, shares: Shares) -> Tensor:
    weights = torch.tensor(list(shares.values()), dtype=torch.float64)
    return logits_TE[:, list(shares)] @ weights


class _Sums:
    """Sums for the regression of one layer, and of selection scores."""

    def __init__(self, block: MoeBlock, merged: Mapping[int, Shares]) -> None:
        self.block, self.merged = block, merged
        self.has_bias = isinstance(getattr(block.router, "bias", None), Tensor)
        selection_E = block.selection_bias()
        self.selection_E = None if selection_E is None else selection_E.double().cpu()
        self.n_tokens = 0
        self.input_D = self.outer_DD = self.rest_G = self.cross_DG = torch.zeros(()).double()
        self.score_G = self.n_chosen_G = torch.zeros(()).double()

    def add(self, routing: Routing) -> None:
        h_TD, logits_TE = routing.input_TD.double(), routing.logits_TE.double()
        target_TG = targets(self.block, routing, self.merged)
        mean = [_mean_logit(logits_TE, shares) for shares in self.merged.values()]
        rest_TG = target_TG - torch.stack(mean, dim=1)
        self.n_tokens += len(h_TD)
        self.input_D = self.input_D + h_TD.sum(dim=0)
        self.outer_DD = self.outer_DD + h_TD.T @ h_TD
        self.rest_G = self.rest_G + rest_TG.sum(dim=0)
        self.cross_DG = self.cross_DG + h_TD.T @ rest_TG
        if self.selection_E is not None:
            self._add_scores(routing, target_TG)

    def _add_scores(self, routing: Routing, target_TG: Tensor) -> None:
        """Adds the best member's score minus the group's α, for tokens routed to a member."""
        alpha_TE = self.block.alpha(routing.logits_TE).double()
        if self.block.selection == "logits":
            alpha_TE, mass_TG = routing.logits_TE.double(), target_TG
        elif self.block.scoring != "softmax":
            mass_TG = SCORES[self.block.scoring](target_TG)
        else:
            mass_TG = (target_TG - routing.logits_TE.double().logsumexp(dim=1, keepdim=True)).exp()
        score_TE = alpha_TE if self.selection_E is None else alpha_TE + self.selection_E
        chosen_TE = torch.zeros_like(alpha_TE).scatter(1, routing.experts_TK, 1.0)
        members = [list(shares) for shares in self.merged.values()]
        chosen_TG = torch.stack([chosen_TE[:, ids].amax(dim=1) for ids in members], dim=1)
        best_TG = torch.stack([score_TE[:, ids].amax(dim=1) for ids in members], dim=1)
        self.score_G = self.score_G + ((best_TG - mass_TG) * chosen_TG).sum(dim=0)
        self.n_chosen_G = self.n_chosen_G + chosen_TG.sum(dim=0)

    def rows(self) -> Rows:
        added_DG, offset_G = self._regression()
        names = list(self.merged)
        return Rows(
            shares=self.merged,
            added={expert: added_DG[:, group] for group, expert in enumerate(names)},
            offsets=dict(zip(names, offset_G.tolist(), strict=True)) if self.has_bias else {},
            selection=self._selection(),
        )

    def _regression(self) -> tuple[Tensor, Tensor]:
        """Ridge regression, with an intercept if the router has a bias."""
        n = self.n_tokens
        outer_DD, cross_DG = self.outer_DD / n, self.cross_DG / n
        mean_D, rest_G = self.input_D / n, self.rest_G / n
        if self.has_bias:
            outer_DD = outer_DD - torch.outer(mean_D, mean_D)
            cross_DG = cross_DG - torch.outer(mean_D, rest_G)
        ridge = _RIDGE * outer_DD.diagonal().mean()
        added_DG = torch.linalg.solve(outer_DD + ridge * torch.eye(len(mean_D)), cross_DG)
        return added_DG, rest_G - mean_D @ added_DG

    def _selection(self) -> dict[int, float]:
        if self.selection_E is None:
            return {}
        found = {}
        for group, (expert, shares) in enumerate(self.merged.items()):
            n_chosen = float(self.n_chosen_G[group])
            largest = float(self.selection_E[list(shares)].amax())
            found[expert] = float(self.score_G[group]) / n_chosen if n_chosen else largest
        return found
