"""Merging: which experts become one, the order of their neurons, and the row of their router."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.data.corpus import CalibrationSet, round_robin
from expertcut.edits.calibrate import CALIBRATION_QUESTIONS, Moments, collect_routing
from expertcut.edits.edit_settings import MergeSettings, RouterRow
from expertcut.edits.plan import BlockEdit, EditPlan, expert_ids, validate_edits
from expertcut.errors import ContractError, ProfileError
from expertcut.models.hooks import Routing, own_expert, own_forward, registered, replaced_forward
from expertcut.models.kernels import Own
from expertcut.models.modeling_routed import SCORES
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import Pass
from expertcut.stats import Array

Groups = list[list[int]]  # the dominant expert first: most tokens, then the lower id
_RIDGE = 1e-6  # of the mean eigenvalue of E[hhᵀ]; more lost what lies in small ones (docs/log.md)
_TIE = 1e-5  # logits that are this close are equal but for rounding


class Neurons(NamedTuple):
    """The axis of a tensor along which an expert's I neurons lie; None if it has none."""

    axis: int | None
    n_parts: int = 1  # 2 if gate and up lie in one tensor
    is_interleaved: bool = False  # the parts alternate; else one follows the other

    def rows(self, tensor: Tensor) -> Tensor:
        """All weights of each neuron, (I, ·); (0, 0) for a tensor without neurons."""
        if self.axis is None:
            return tensor.new_empty(0, 0)
        first = tensor.movedim(self.axis, 0)
        if self.is_interleaved:
            parts: Tensor = first.unflatten(0, (-1, self.n_parts))
        else:
            parts = first.unflatten(0, (self.n_parts, -1)).movedim(1, 0)
        return parts.flatten(1)

    def reordered(self, tensor: Tensor, order_I: Tensor) -> Tensor:
        """The tensor with its neurons in another order; gate and up of each stay together."""
        if self.axis is None:
            return tensor
        steps = torch.arange(self.n_parts)
        if self.is_interleaved:
            index = (order_I[:, None] * self.n_parts + steps).flatten()
        else:
            index = (order_I + len(order_I) * steps[:, None]).flatten()
        return tensor.index_select(self.axis, index)


def matching(dominant: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The order (I,) of the other's neurons that is most similar to the dominant's.

    Averaged in another order, experts cancel out. Each sequence holds `Neurons.rows` of the same
    tensors. The order maximises the sum of inner products of the weights over all tensors (weight
    matching, arXiv:2310.01334, §3, after arXiv:2209.04836).
    """
    like_II = sum(
        a.float() @ b.float().T for a, b in zip(dominant, other, strict=True) if a.numel()
    )
    assert isinstance(like_II, Tensor), "an expert without neurons"
    from scipy.optimize import linear_sum_assignment  # slow import

    _, order = linear_sum_assignment(like_II.numpy(), maximize=True)
    return torch.from_numpy(order)


class Evidence(NamedTuple):
    """Tokens of the experts of one block, and what a method measures of them."""

    tokens_E: Array
    measured_EX: Array  # m_smoe: `logit_products` (E, E), hc_smoe: `mean_outputs_of_all` (E, D)

    def by_tokens(self, experts: Iterable[int]) -> list[int]:
        """Experts with most tokens first."""
        return sorted(experts, key=lambda expert: (-self.tokens_E[expert], expert))


def m_smoe(evidence: Evidence, experts: range, n_groups: int) -> Groups:
    """Experts with most tokens dominate; each other joins the one with the most similar logits.

    Similarity is the cosine of two experts' logits over tokens. arXiv:2310.01334, §3; there one
    count for all layers together is spread by frequency, here every layer gets the same.
    """
    products_EE, order = evidence.measured_EX, evidence.by_tokens(experts)
    dominant = order[:n_groups]
    length_E = np.sqrt(np.diagonal(products_EE))
    scale_EE = np.outer(length_E, length_E)
    cosine_EE = np.zeros_like(products_EE)
    np.divide(products_EE, scale_EE, out=cosine_EE, where=scale_EE > 0)
    groups = {expert: [expert] for expert in dominant}
    for expert in order[n_groups:]:
        groups[dominant[int(cosine_EE[expert, dominant].argmax())]].append(expert)
    return list(groups.values())


def hc_smoe(evidence: Evidence, experts: range, n_groups: int) -> Groups:
    """Clusters of mean outputs by Euclidean distance, average linkage. arXiv:2410.08589, §3."""
    clusters = {number: [expert] for number, expert in enumerate(experts)}
    if n_groups < len(experts):
        from scipy.cluster.hierarchy import linkage  # slow import

        joined = linkage(evidence.measured_EX[list(experts)], method="average")
        for step, (first, second, *_) in enumerate(joined[: len(experts) - n_groups]):
            clusters[len(experts) + step] = clusters.pop(int(first)) + clusters.pop(int(second))
    return [evidence.by_tokens(cluster) for cluster in clusters.values()]


METHODS = {f.__name__: f for f in (m_smoe, hc_smoe)}


def merge_edits(
    blocks: Sequence[BlockInfo], evidence: Sequence[Evidence], n_keep: int, method: str
) -> dict[str, BlockEdit]:
    """The groups of every block; a merged expert has the id of its dominant member."""
    edits = {}
    for block, measured in zip(blocks, evidence, strict=True):
        size = block.experts // block.groups
        groups: Groups = []
        # Experts of routing groups merge within them only, to the same number in each.
        for first in range(0, block.experts, size):
            groups += METHODS[method](measured, range(first, first + size), n_keep // block.groups)
        keep = tuple(sorted(group[0] for group in groups))
        merged = {g[0]: _shares(g, measured.tokens_E) for g in sorted(groups) if len(g) > 1}
        edits[block.name] = BlockEdit(keep=keep, merged=merged or None)
    validate_edits(edits, blocks, "stock")
    return edits


def _shares(group: list[int], tokens_E: Array) -> dict[int, float]:
    """Each member's share of the group's tokens; equal shares without tokens."""
    tokens = tokens_E[group].astype(np.float64)
    shares = tokens / tokens.sum() if tokens.sum() else np.full(len(group), 1 / len(group))
    return dict(zip(group, shares.tolist(), strict=True))


def members_of(edit: BlockEdit) -> Mapping[int, Mapping[int, float]]:
    """The shares of members for every kept expert, merged or not."""
    return {expert: (edit.merged or {}).get(expert, {expert: 1.0}) for expert in edit.keep}


def gather_evidence(
    profile: Profile, engine: Engine, tuning: CalibrationSet, method: str
) -> list[Evidence]:
    """The measurements that a method needs, over the distinct tokens of at most 512 questions."""
    tokens_LE = token_counts(profile)
    measure = logit_products if method == "m_smoe" else mean_outputs_of_all
    measured = measure(engine, round_robin(tuning, CALIBRATION_QUESTIONS))
    return [
        Evidence(tokens_LE[b.layer, : b.n_experts], measured[b.layer].numpy())
        for b in engine.moe.blocks
    ]


def token_counts(profile: Profile) -> Array:
    """Tokens routed to each expert, shots included, (L, E); ProfileError with --stats answer."""
    tokens_LE = profile.token_sum("tokens")
    if tokens_LE is None:
        raise ProfileError(
            f"{profile.path} holds no all-token statistics (--stats answer), and weights are "
            "averaged by them: profile with --stats all"
        )
    return tokens_LE


def logit_products(engine: Engine, quiz: CalibrationSet) -> dict[int, Tensor]:
    """Σ over tokens of l·lᵀ (E, E) float64 per layer, l being a token's router logits."""
    sums = {b.layer: torch.zeros(b.n_experts, b.n_experts).double() for b in engine.moe.blocks}

    def add(routing: Routing, _is_answer_T: Tensor) -> None:
        logits_TE = routing.logits_TE.double()
        sums[routing.layer] += logits_TE.T @ logits_TE

    collect_routing(engine, quiz, sums, add)
    return sums


def mean_outputs_of_all(engine: Engine, quiz: CalibrationSet) -> dict[int, Tensor]:
    """Mean output (E, D) float64 of every expert over all tokens, routed or not, by layer."""
    totals: dict[int, Tensor] = {}
    n_tokens = Counter[int]()
    current = deque[Pass](maxlen=1)

    def run(block: MoeBlock, own: Own, forward: Any, x_TD: Tensor, *args: Tensor) -> Any:
        flat_TD, valid_T = x_TD.reshape(-1, x_TD.shape[-1]), current[0].valid_T
        if valid_T is not None:
            flat_TD = flat_TD[valid_T.to(x_TD.device)]
        outputs = [own(e, flat_TD).double().sum(dim=0) for e in range(block.n_experts)]
        totals[block.layer] = totals.get(block.layer, torch.zeros(())) + torch.stack(outputs).cpu()
        n_tokens[block.layer] += len(flat_TD)
        return forward(x_TD, *args)

    changes = (
        replaced_forward(b.experts, partial(run, b, own_expert(b), own_forward(b.experts)))
        for b in engine.moe.blocks
    )
    with registered(changes):
        ask(engine, quiz, current.append)
    return {layer: total_ED / n_tokens[layer] for layer, total_ED in totals.items()}


def merge_draft(
    settings: MergeSettings, profile: Profile, edits: Mapping[str, BlockEdit]
) -> EditPlan:
    """The groups as a draft of layout stock, frequencies being over all tokens."""
    words, numbers = (settings.slug, settings.action, settings.by), expert_ids(profile)
    return EditPlan(*words, "all", edits, is_cut=True, is_calibrated=True, numbers=numbers)


@dataclass(frozen=True)
class Rows:
    """One layer's rows of merged experts, by the id of the dominant member.

    In a softmax gate a group's mass is Σ exp(logit) over its members, so its row should give the
    logarithm of that, which no linear row does. The fitted row is the members' mean row, by their
    shares, plus what a ridge regression on router inputs finds of the difference.
    """

    shares: Mapping[int, Mapping[int, float]]  # of members: the row is Σ share · row
    added: Mapping[int, Tensor] = field(default_factory=dict)  # (D,) to that sum
    offsets: Mapping[int, float] = field(default_factory=dict)  # to the router's own logit bias
    selection: Mapping[int, float] = field(default_factory=dict)  # biases, if the family has them

    def logits(self, routing: Routing) -> Tensor:
        """Their logits on router inputs, (T, groups) float64."""
        logits_TE, input_TD = routing.logits_TE.double(), routing.input_TD.double()
        logits = []
        for expert, shares in self.shares.items():
            logit_T = _mean_logit(logits_TE, shares) + self.offsets.get(expert, 0.0)
            if expert in self.added:
                logit_T = logit_T + input_TD @ self.added[expert]
            logits.append(logit_T)
        return torch.stack(logits, dim=1)


@dataclass(frozen=True)
class Quality:
    """1 − Σ(error²) / Σ(distance from its mean²) of rows' logits, over tokens and groups."""

    layer: int
    groups: int
    quality: float


def merged_rows(
    engine: Engine, tuning: CalibrationSet, edits: Mapping[str, BlockEdit], kind: RouterRow
) -> dict[int, Rows]:
    """The rows of each layer with merged experts, fitted on at most 512 questions.

    Raises ContractError: logits are not linear, and the row is not the dominant member's.
    """
    blocks = {b.layer: b for b in engine.moe.blocks if edits[b.name].merged}
    merged = {layer: edits[block.name].merged or {} for layer, block in blocks.items()}
    if kind == "dominant":
        return {layer: Rows({e: {e: 1.0} for e in groups}) for layer, groups in merged.items()}
    for block in blocks.values():
        if not block.is_linear:
            raise ContractError(
                f"{block.name}: its router caps or scales its logits, so no mean or fitted row of "
                "its gate matrix stands for several: take --router dominant"
            )
    if kind == "mean":
        return {layer: Rows(groups) for layer, groups in merged.items()}
    sums = {layer: _RowSums(block, merged[layer]) for layer, block in blocks.items()}
    few = round_robin(tuning, CALIBRATION_QUESTIONS)
    collect_routing(engine, few, sums, lambda routing, _: sums[routing.layer].add(routing))
    return {layer: own.rows() for layer, own in sums.items()}


def judge_rows(
    engine: Engine,
    held_out: CalibrationSet,
    edits: Mapping[str, BlockEdit],
    rows: Mapping[int, Rows],
) -> list[Quality]:
    """Fit of the rows on held-out questions."""
    blocks = {b.layer: b for b in engine.moe.blocks}
    logits: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in rows}

    def add(routing: Routing, _is_answer_T: Tensor) -> None:
        block = blocks[routing.layer]
        target_TG = targets(block, routing, edits[block.name].merged or {})
        logits[routing.layer].append((target_TG, rows[routing.layer].logits(routing)))

    if rows:
        collect_routing(engine, held_out, rows, add)
    qualities = []
    for layer, pairs in logits.items():
        target_TG, fitted_TG = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        error = ((target_TG - fitted_TG) ** 2).sum()
        spread = ((target_TG - target_TG.mean(dim=0)) ** 2).sum()
        qualities.append(Quality(layer, target_TG.shape[1], float(1 - error / spread)))
    return qualities


def targets(block: MoeBlock, routing: Routing, merged: Mapping[int, Mapping[int, float]]) -> Tensor:
    """The logit (T, groups) float64 that keeps each group's mass.

    gate weight         members that count
    α of all experts    all: the softmax keeps its denominator
    renormalised        those that the token chose, for the others' mass was never used; where it
                        chose none, the largest
    sigmoid, √softplus  the one that would be chosen first: there is no mass to add up
    """
    logits_TE = routing.logits_TE.double()
    known_TX = F.pad(logits_TE, (0, 1), value=torch.inf)  # the id E is nobody
    last_T1 = known_TX.gather(1, routing.experts_TK).amin(dim=1, keepdim=True)
    selection_E, logits = block.selection_bias(), []
    for ids in map(list, merged.values()):
        own_TM = logits_TE[:, ids]
        if block.scoring == "softmax":
            if not block.inflates:
                least_T1 = last_T1.minimum(own_TM.amax(dim=1, keepdim=True)) - _TIE
                own_TM = own_TM.masked_fill(own_TM < least_T1, -torch.inf)
            logits.append(own_TM.logsumexp(dim=1))
            continue
        score_TM = own_TM if block.selection == "logits" else SCORES[block.scoring](own_TM)
        if selection_E is not None:
            score_TM = score_TM + selection_E.cpu()[ids]
        logits.append(own_TM.gather(1, score_TM.argmax(dim=1, keepdim=True))[:, 0])
    return torch.stack(logits, dim=1)


def _mean_logit(logits_TE: Tensor, shares: Mapping[int, float]) -> Tensor:
    weights = torch.tensor(list(shares.values()), dtype=torch.float64)
    return logits_TE[:, list(shares)] @ weights


class _RowSums:
    """Sums of one layer for the regression of rows, and of selection scores."""

    def __init__(self, block: MoeBlock, merged: Mapping[int, Mapping[int, float]]) -> None:
        self.block, self.merged = block, merged
        self.has_bias = isinstance(getattr(block.router, "bias", None), Tensor)
        selection_E = block.selection_bias()
        self.selection_E = None if selection_E is None else selection_E.double().cpu()
        self.inputs = Moments()
        self.rest_G = self.cross_DG = torch.zeros(()).double()
        self.score_G = self.n_chosen_G = torch.zeros(()).double()

    def add(self, routing: Routing) -> None:
        h_TD, logits_TE = routing.input_TD.double(), routing.logits_TE.double()
        target_TG = targets(self.block, routing, self.merged)
        mean = [_mean_logit(logits_TE, shares) for shares in self.merged.values()]
        rest_TG = target_TG - torch.stack(mean, dim=1)
        self.inputs.add(h_TD)
        self.rest_G = self.rest_G + rest_TG.sum(dim=0)
        self.cross_DG = self.cross_DG + h_TD.T @ rest_TG
        if self.selection_E is None:
            return
        # The best member's score minus the group's α, for tokens routed to a member.
        block, alpha_TE = self.block, self.block.alpha(routing.logits_TE).double()
        if block.selection == "logits":
            alpha_TE, mass_TG = logits_TE, target_TG
        elif block.scoring != "softmax":
            mass_TG = SCORES[block.scoring](target_TG)
        else:
            mass_TG = (target_TG - logits_TE.logsumexp(dim=1, keepdim=True)).exp()
        score_TE = alpha_TE + self.selection_E
        chosen_TX = F.pad(torch.zeros_like(alpha_TE), (0, 1)).scatter(1, routing.experts_TK, 1.0)
        chosen_TE = chosen_TX[:, :-1]
        members = [list(shares) for shares in self.merged.values()]
        chosen_TG = torch.stack([chosen_TE[:, ids].amax(dim=1) for ids in members], dim=1)
        best_TG = torch.stack([score_TE[:, ids].amax(dim=1) for ids in members], dim=1)
        self.score_G = self.score_G + ((best_TG - mass_TG) * chosen_TG).sum(dim=0)
        self.n_chosen_G = self.n_chosen_G + chosen_TG.sum(dim=0)

    def rows(self) -> Rows:
        """By ridge regression, with an intercept if the router has a bias."""
        n = self.inputs.n_tokens
        outer_DD, cross_DG = self.inputs.outer_DD / n, self.cross_DG / n
        mean_D, rest_G = self.inputs.total_D / n, self.rest_G / n
        if self.has_bias:
            outer_DD = outer_DD - torch.outer(mean_D, mean_D)
            cross_DG = cross_DG - torch.outer(mean_D, rest_G)
        ridge = _RIDGE * outer_DD.diagonal().mean()
        added_DG = torch.linalg.solve(outer_DD + ridge * torch.eye(len(mean_D)), cross_DG)
        offset_G = (rest_G - mean_D @ added_DG).tolist()
        offsets = dict(zip(self.merged, offset_G, strict=True)) if self.has_bias else {}
        selection = {}
        for group, (expert, shares) in enumerate(self.merged.items()):
            if self.selection_E is not None:
                n_chosen, score = float(self.n_chosen_G[group]), float(self.score_G[group])
                largest = float(self.selection_E[list(shares)].amax())
                selection[expert] = score / n_chosen if n_chosen else largest
        added = {expert: added_DG[:, group] for group, expert in enumerate(self.merged)}
        return Rows(self.merged, added, offsets, selection)
