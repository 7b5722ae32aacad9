"""Which experts become one: a pure function per method, from a block's evidence to groups.

Each group names its dominant expert first, the one that most tokens chose (ties: the lower id).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import linkage

from expertcut.errors import PlanError
from expertcut.interventions.allowed import check_edits, least_of
from expertcut.interventions.plan import Edit
from expertcut.profiling.schema import BlockInfo

Array = np.ndarray[Any, Any]
Groups = list[list[int]]


@dataclass(frozen=True)
class Evidence:
    """What the experts of one block did.

    `tokens_E` counts the tokens that chose each. `products_EE` are sums over tokens of products of
    two experts' router logits; `outputs_ED` are mean outputs over all tokens, whichever experts
    these chose. A method needs one of the two.
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
    """The most chosen experts dominate; each other joins the one whose router logits are most like.

    Likeness is the cosine of two experts' logits over tokens. arXiv:2310.01334, §3; there one
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
    """Clusters of mean outputs: the closest two join, by the mean Euclidean distance between them.

    Agglomerative, average linkage. arXiv:2410.08589, §3.
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
) -> dict[str, Edit]:
    """The groups of every block: an expert that stays has the id of its dominant member.

    Experts that route in groups merge within them only, to equally many in each.

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
    check_edits(edits, blocks, "stock")
    return edits


def check_count(blocks: Sequence[BlockInfo], n_keep: int) -> None:
    """That so many experts may stay in each block.

    Raises:
        PlanError: fewer than top-k, more than there are, or not equally many per routing group.
    """
    for block in blocks:
        least = least_of(block, "stock")
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


def _edit(groups: Groups, tokens_E: Array) -> Edit:
    several = sorted(group for group in groups if len(group) > 1)
    return Edit(
        keep=tuple(sorted(group[0] for group in groups)),
        merged={group[0]: _shares(group, tokens_E) for group in several} or None,
    )


def _shares(group: Sequence[int], tokens_E: Array) -> dict[int, float]:
    """How much of the group's tokens each member had; all the same where there were none."""
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


def members_of(edit: Edit) -> Mapping[int, Mapping[int, float]]:
    """The shares of every expert that stays, also of those that stay as they are."""
    merged = edit.merged or {}
    return {expert: merged.get(expert, {expert: 1.0}) for expert in edit.keep}
