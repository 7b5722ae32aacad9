"""Which experts merge: similarity, groups, and the correspondence of neurons.

An expert's intermediate neurons have no order. Averaged neuron by neuron, two experts cancel out
unless the second's neurons are first put in the order most similar to the first's (weight matching,
arXiv:2310.01334, §3, after arXiv:2209.04836).

Each group names its dominant expert first: the one with most tokens (ties: the lower id).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from expertcut.data import Quiz, round_robin
from expertcut.edits.calibrate import CALIBRATION_QUESTIONS, collect_routing
from expertcut.edits.edit_settings import MergeSettings
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, EditPlan, expert_ids, validate_edits
from expertcut.errors import PlanError, ProfileError
from expertcut.models.hooks import Routing, own_expert, own_forward, replaced_forward
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import Pass

Array = np.ndarray[Any, Any]
Groups = list[list[int]]


@dataclass(frozen=True)
class Neurons:
    """The axis of a tensor along which an expert's I neurons lie; None for a tensor without them.

    With `n_parts` 2 gate and up lie in one tensor, one after the other, or alternating.
    """

    axis: int | None
    n_parts: int = 1
    is_interleaved: bool = False

    def rows(self, tensor: Tensor) -> Tensor:
        """All weights of each neuron, (I, ·); (0, 0) for a tensor without neurons."""
        if self.axis is None:
            return tensor.new_empty(0, 0)
        first = tensor.movedim(self.axis, 0)
        if self.n_parts == 1:
            return first.reshape(len(first), -1)
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

    Each sequence holds `Neurons.rows` of the same tensors. Maximises the sum of inner products of
    the weights over all tensors, which minimises the squared distance.
    """
    like_II = sum(
        a.float() @ b.float().T for a, b in zip(dominant, other, strict=True) if a.numel()
    )
    assert isinstance(like_II, Tensor), "an expert without neurons"
    _, order = linear_sum_assignment(like_II.numpy(), maximize=True)
    return torch.from_numpy(order)


@dataclass(frozen=True)
class Evidence:
    """Measurements of the experts of one block.

    `tokens_E` counts the tokens routed to each. `products_EE` are sums over tokens of products of
    two experts' router logits; `outputs_ED` are mean outputs over all tokens, routed or not. A
    method needs one of the two.
    """

    tokens_E: Array
    products_EE: Array | None = None
    outputs_ED: Array | None = None

    def part(self, experts: slice) -> "Evidence":
        """The same of some of the experts."""
        return Evidence(
            self.tokens_E[experts],
            None if self.products_EE is None else self.products_EE[experts, experts],
            None if self.outputs_ED is None else self.outputs_ED[experts],
        )


def m_smoe(evidence: Evidence, n_groups: int) -> Groups:
    """Experts with most tokens dominate; each other joins the one with the most similar logits.

    Similarity is the cosine of two experts' logits over tokens. arXiv:2310.01334, §3; there one
    count for all layers together is spread by frequency, here every layer gets the same.
    """
    assert evidence.products_EE is not None
    order = _most_chosen(range(len(evidence.tokens_E)), evidence.tokens_E)
    dominant = order[:n_groups]
    cosine_EE = _cosine(evidence.products_EE)
    groups = {expert: [expert] for expert in dominant}
    for expert in order[n_groups:]:
        groups[dominant[int(cosine_EE[expert, dominant].argmax())]].append(expert)
    return list(groups.values())


def hc_smoe(evidence: Evidence, n_groups: int) -> Groups:
    """Agglomerative clusters of mean outputs by Euclidean distance, average linkage.

    arXiv:2410.08589, §3.
    """
    assert evidence.outputs_ED is not None
    n_experts = len(evidence.outputs_ED)
    clusters = {expert: [expert] for expert in range(n_experts)}
    if n_groups < n_experts:
        joined = linkage(evidence.outputs_ED, method="average")[: n_experts - n_groups]
        for step, (first, second, *_) in enumerate(joined):
            clusters[n_experts + step] = clusters.pop(int(first)) + clusters.pop(int(second))
    return [_most_chosen(cluster, evidence.tokens_E) for cluster in clusters.values()]


METHODS: dict[str, Callable[[Evidence, int], Groups]] = {f.__name__: f for f in (m_smoe, hc_smoe)}


def merge_edits(
    blocks: Sequence[BlockInfo], evidence: Sequence[Evidence], n_keep: int, method: str
) -> dict[str, BlockEdit]:
    """The groups of every block; a merged expert has the id of its dominant member.

    Experts of routing groups merge within them only, to the same number in each.

    Raises:
        PlanError: a count that does not fit the model.
    """
    check_count(blocks, n_keep)
    edits = {}
    for block, its in zip(blocks, evidence, strict=True):
        size = block.experts // block.groups
        found = []
        for first in range(0, block.experts, size):
            groups = METHODS[method](its.part(slice(first, first + size)), n_keep // block.groups)
            found += [[first + expert for expert in group] for group in groups]
        edits[block.name] = _edit(found, its.tokens_E)
    validate_edits(edits, blocks, "stock")
    return edits


def check_count(blocks: Sequence[BlockInfo], n_keep: int) -> None:
    """Checks the number of experts that stay in each block.

    Raises:
        PlanError: fewer than top-k, too many, or different numbers in routing groups.
    """
    for block in blocks:
        least = LAYOUTS["stock"].least_experts(block)
        if not least <= n_keep <= block.experts:
            raise PlanError(
                f"--keep {n_keep} does not fit {block.name}, which routes each token to "
                f"{block.top_k} of {block.experts} experts: keep {least} to {block.experts}"
            )
        if n_keep % block.groups:
            raise PlanError(
                f"{block.name} routes in {block.groups} groups: keep a multiple of "
                f"{block.groups}, not {n_keep}"
            )


def _edit(groups: Groups, tokens_E: Array) -> BlockEdit:
    several = sorted(group for group in groups if len(group) > 1)
    return BlockEdit(
        keep=tuple(sorted(group[0] for group in groups)),
        merged={group[0]: _shares(group, tokens_E) for group in several} or None,
    )


def _shares(group: Sequence[int], tokens_E: Array) -> dict[int, float]:
    """Each member's share of the group's tokens; equal shares without tokens."""
    tokens = tokens_E[list(group)].astype(np.float64)
    total = tokens.sum()
    shares = tokens / total if total else np.full(len(group), 1 / len(group))
    return dict(zip(group, shares.tolist(), strict=True))


def _most_chosen(experts: Sequence[int], tokens_E: Array) -> list[int]:
    return sorted(experts, key=lambda expert: (-tokens_E[expert], expert))


def _cosine(products_EE: Array) -> Array:
    length_E = np.sqrt(np.diagonal(products_EE))
    scale_EE = np.outer(length_E, length_E)
    cosine: Array = np.divide(
        products_EE, scale_EE, out=np.zeros_like(products_EE), where=scale_EE > 0
    )
    return cosine


def members_of(edit: BlockEdit) -> Mapping[int, Mapping[int, float]]:
    """The shares of members for every kept expert, merged or not."""
    merged = edit.merged or {}
    return {expert: merged.get(expert, {expert: 1.0}) for expert in edit.keep}


def gather_evidence(profile: Profile, engine: Engine, tuning: Quiz, method: str) -> list[Evidence]:
    """The measurements that a method needs, over the distinct tokens of at most 512 questions.

    Raises:
        ProfileError: a profile without all-token counts, by which weights are averaged.
    """
    tokens_LE = token_counts(profile)
    few = round_robin(tuning, CALIBRATION_QUESTIONS)
    sums = {"m_smoe": logit_products, "hc_smoe": mean_outputs_of_all}[method](engine, few)
    name = {"m_smoe": "products_EE", "hc_smoe": "outputs_ED"}[method]
    return [
        Evidence(tokens_LE[b.layer, : b.n_experts], **{name: sums[b.layer].numpy()})
        for b in engine.moe.blocks
    ]


def token_counts(profile: Profile) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Tokens routed to each expert, shots included, (L, E).

    Raises:
        ProfileError: the profile was made with --stats answer.
    """
    tokens_LE = profile.token_sum("tokens")
    if tokens_LE is None:
        raise ProfileError(
            f"{profile.path} holds no all-token statistics (--stats answer), and weights are "
            "averaged by them: profile with --stats all"
        )
    return tokens_LE


def logit_products(engine: Engine, quiz: Quiz) -> dict[int, Tensor]:
    """Σ over tokens of l·lᵀ (E, E) float64 per layer, l being a token's router logits."""
    sums = {b.layer: torch.zeros(b.n_experts, b.n_experts).double() for b in engine.moe.blocks}

    def hear(routing: Routing, _is_answer_T: Tensor) -> None:
        logits_TE = routing.logits_TE.double()
        sums[routing.layer] += logits_TE.T @ logits_TE

    collect_routing(engine, quiz, sums, hear)
    return sums


def mean_outputs_of_all(engine: Engine, quiz: Quiz) -> dict[int, Tensor]:
    """Mean output (E, D) float64 of every expert over all tokens, routed or not, by layer.

    Every expert runs on every token: E / K times the experts' work of a forward pass, and once
    more that for the pass itself.
    """
    sums = _OutputSums()
    with ExitStack() as stack:
        for block in engine.moe.blocks:
            stack.enter_context(replaced_forward(block.experts, sums.watched(block)))
        ask(engine, quiz, sums.begin)
    return {layer: total_ED / sums.n_tokens[layer] for layer, total_ED in sums.total.items()}


class _OutputSums:
    """Sums of all experts' outputs, and counts of tokens without padding."""

    def __init__(self) -> None:
        self.total: dict[int, Tensor] = {}
        self.n_tokens: dict[int, int] = {}
        self.valid_T: Tensor | None = None

    def begin(self, step: Pass) -> None:
        """Before each forward pass."""
        self.valid_T = step.valid_T

    def watched(self, block: MoeBlock) -> Callable[..., Tensor]:
        """The experts' forward, which also runs all experts on all tokens."""
        forward, own = own_forward(block.experts), own_expert(block)

        def run(x_TD: Tensor, *args: Tensor) -> Tensor:
            flat_TD = x_TD.reshape(-1, x_TD.shape[-1])
            if self.valid_T is not None:
                flat_TD = flat_TD[self.valid_T.to(x_TD.device)]
            outputs = [own(e, flat_TD).double().sum(dim=0) for e in range(block.n_experts)]
            total_ED = torch.stack(outputs).cpu()
            self.total[block.layer] = self.total.get(block.layer, torch.zeros(())) + total_ED
            self.n_tokens[block.layer] = self.n_tokens.get(block.layer, 0) + len(flat_TD)
            y_TD: Tensor = forward(x_TD, *args)
            return y_TD

        return run


def merge_draft(
    settings: MergeSettings, profile: Profile, edits: Mapping[str, BlockEdit]
) -> EditPlan:
    """The groups as a draft of layout stock, frequencies being over all tokens."""
    return EditPlan(
        slug=settings.slug,
        action=settings.action,
        criterion=settings.by,
        positions="all",
        edits=edits,
        is_cut=True,
        is_calibrated=True,
        numbers=expert_ids(profile),
    )
