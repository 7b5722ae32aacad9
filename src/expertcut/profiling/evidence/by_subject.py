"""Subjects one by one: how often each expert served them, and how well."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from expertcut.profiling.statistics import LayerStatistics, or_none, routing_json, share

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SubjectCounts:
    """Questions and right answers of each subject: all, and of those that activated each expert.

    `rows` are each subject's questions, as indices into N.
    """

    names: tuple[str, ...]
    rows: tuple[Array, ...]
    questions_S: Array
    right_S: Array
    activated_SX: Array
    activated_right_SX: Array


def count_by_subject(
    subjects: Sequence[str], is_correct_N: Array, is_activated_NX: Array
) -> SubjectCounts:
    """The counts; subjects in the order of their first questions."""
    names = tuple(dict.fromkeys(subjects))
    name_N = np.asarray(subjects)
    rows = tuple(np.flatnonzero(name_N == name) for name in names)
    return SubjectCounts(
        names=names,
        rows=rows,
        questions_S=np.array([len(row) for row in rows]),
        right_S=np.array([is_correct_N[row].sum() for row in rows]),
        activated_SX=np.array([is_activated_NX[row].sum(0) for row in rows]),
        activated_right_SX=np.array(
            [is_activated_NX[row[is_correct_N[row]]].sum(0) for row in rows]
        ),
    )


def subjects_json(counts: SubjectCounts, layers: Sequence[LayerStatistics]) -> list[dict[str, Any]]:
    """One object per subject; `appearances` and `expert_accuracy` list a layer's experts."""
    ends = list(accumulate(layer.n_experts for layer in layers))
    spans = [slice(end - layer.n_experts, end) for end, layer in zip(ends, layers, strict=True)]
    return [
        {
            "subject": name,
            "questions": int(counts.questions_S[s]),
            "accuracy": float(counts.right_S[s] / counts.questions_S[s]),
            "layers": [
                {
                    "layer": layer.layer,
                    **routing_json(layer, counts.rows[s]),
                    **_experts_json(counts, s, span),
                }
                for layer, span in zip(layers, spans, strict=True)
            ],
        }
        for s, name in enumerate(counts.names)
    ]


def _experts_json(counts: SubjectCounts, s: int, span: slice) -> dict[str, Any]:
    activated_E = counts.activated_SX[s, span]
    accuracy_E = share(counts.activated_right_SX[s, span], activated_E)
    return {
        "appearances": (activated_E / counts.questions_S[s]).tolist(),
        "expert_accuracy": [or_none(value) for value in accuracy_E],
    }
