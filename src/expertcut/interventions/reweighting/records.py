"""What a model did on some questions, of which any part can be looked at by itself.

X counts the experts of all MoE blocks, in order.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, Self

import numpy as np

from expertcut.data import Quiz
from expertcut.errors import ProfileError
from expertcut.interventions.reweighting.admission import (
    SelectionOf,
    no_selection,
    stored_selection,
)
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.significance import SubjectCounts, count_by_subject
from expertcut.profiling.statistics import LayerStatistics, layers_of
from expertcut.profiling.storage import Profile

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Records:
    """N questions and what the unedited model did at their answer positions.

    `hash_N` are overlap hashes, by which repeats are found, `line_N` both hashes of each.
    `selection_of` a layer is the bias that is added to α where experts are chosen.
    """

    blocks: tuple[BlockInfo, ...]
    subject_N: Array
    hash_N: Array
    answer_N: Array
    logprob_NC: Array
    alpha_NLE: Array
    chosen_NLK: Array
    selection_of: SelectionOf = no_selection
    line_N: Array | None = None

    @classmethod
    def of(cls, profile: Profile, quiz: Quiz) -> Self:
        """A profile's records of those of its questions that a quiz holds.

        Raises:
            ProfileError: the profile did not ask one of them.
        """
        asked = zip(profile.subjects(), profile.array("row_N").tolist(), strict=True)
        place = {name: n for n, name in enumerate(asked)}
        try:
            rows_N = np.array([place[q.subject, q.row] for q in quiz])
        except KeyError as error:
            raise ProfileError(f"{profile.path} did not ask question {error}") from None
        return cls(
            blocks=profile.info.model.blocks,
            subject_N=np.array([q.subject for q in quiz]),
            hash_N=np.array([q.overlap_hash for q in quiz]),
            answer_N=np.array([q.answer for q in quiz]),
            logprob_NC=profile.array("choice_logprob_NC")[rows_N],
            alpha_NLE=profile.array("alpha_NLE")[rows_N],
            chosen_NLK=profile.array("chosen_NLK")[rows_N],
            selection_of=partial(stored_selection, profile.info.model),
            line_N=np.array([q.hash_line for q in quiz]),
        )

    def __len__(self) -> int:
        return len(self.answer_N)

    def part(self, which_N: Array) -> Self:
        """Some of the questions, by index or by truth."""
        names = [f.name for f in fields(self) if f.name.endswith(("_N", "_NC", "_NLE", "_NLK"))]
        arrays = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v[which_N] for k, v in arrays.items() if v is not None})

    def less(self, hashes: Collection[str]) -> Self:
        """Without the questions of these overlap hashes."""
        return self.part(~np.isin(self.hash_N, list(hashes))) if hashes else self

    @cached_property
    def is_correct_N(self) -> Array:
        """Whether the best choice is the right one; ties go to the first."""
        return right(self.logprob_NC, self.answer_N)

    @cached_property
    def layers(self) -> list[LayerStatistics]:
        """The paper's statistics over these questions."""
        return layers_of(self.blocks, self.alpha_NLE, self.chosen_NLK, self.is_correct_N)

    @cached_property
    def counts(self) -> SubjectCounts:
        """By subject and expert."""
        is_activated_NX = np.concatenate([x.is_activated_NE for x in self.layers], axis=1)
        return count_by_subject(self.subject_N.tolist(), self.is_correct_N, is_activated_NX)


def right(logprob_NC: Array, answer_N: Array) -> Array:
    """Right answers (N,) bool; ties go to the first choice."""
    is_right_N: Array = logprob_NC.argmax(axis=1) == answer_N
    return is_right_N


def places(blocks: Sequence[BlockInfo]) -> list[tuple[int, int]]:
    """(layer, expert) of each of X."""
    return [(layer, e) for layer, block in enumerate(blocks) for e in range(block.experts)]


def joined(per_layer: Sequence[Array]) -> Array:
    """One value per expert of X, of one array (E,) per layer."""
    return np.concatenate([values_E.astype(np.float64) for values_E in per_layer])


def spans(blocks: Sequence[BlockInfo]) -> list[slice]:
    """Where each layer's experts stand in X."""
    ends = list(accumulate(block.experts for block in blocks))
    return [slice(end - block.experts, end) for end, block in zip(ends, blocks, strict=True)]
