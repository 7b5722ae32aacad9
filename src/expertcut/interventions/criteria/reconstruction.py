"""The criterion that tries: which expert's going changes its block's output least, again and again.

"Not All Experts Are Equal" (arXiv:2402.14800) tries every set of experts to keep, which 8 experts
allow and 64 do not; greedy backward elimination is the tractable form.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Change = Callable[[tuple[int, ...]], float]  # of the block's output, these experts removed


def reconstruction(
    change: Change, groups: Sequence[range], least: int, before: Sequence[int]
) -> Array:
    """The order in which experts go, 0 first, each the one whose going then changes least.

    Ends where every group of experts has `least` left, which the router needs. Those that are left
    rank above all others, by the change that their going would make next. Of equal changes, as of
    experts that no stored token chose, the later one in the order `before` goes first.
    """
    later = {expert: -rank for rank, expert in enumerate(before)}
    score_E = np.full(sum(map(len, groups)), np.nan)
    removed: tuple[int, ...] = ()
    while candidates := _candidates(groups, removed, least):
        changes = [change((*removed, e)) for e in candidates]
        pairs = zip(changes, candidates, strict=True)
        goes = min(pairs, key=lambda pair: (pair[0], later[pair[1]]))[1]
        score_E[goes] = len(removed)
        removed = (*removed, goes)
    left = [e for group in groups for e in group if e not in removed]

    def next_change(expert: int) -> float:
        # In the place of the last one of its group: a group that lacks one more cannot be routed.
        (own,) = (group for group in groups if expert in group)
        last = next(e for e in reversed(removed) if e in own)
        return change((*(e for e in removed if e != last), expert))

    order = sorted(left, key=lambda e: (next_change(e), later[e])) if removed else left
    for rank, expert in enumerate(order):
        score_E[expert] = len(removed) + rank
    return score_E


def _candidates(groups: Sequence[range], removed: tuple[int, ...], least: int) -> list[int]:
    """The experts of groups that can spare one."""
    left = [[e for e in group if e not in removed] for group in groups]
    return [e for group in left if len(group) > least for e in group]
