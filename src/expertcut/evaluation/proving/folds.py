"""Folds of questions: the same question never stands in two of them, and each subject in all."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
FOLDS = 5


def deal(subjects: Sequence[str], hashes: Sequence[str], seed: int, folds: int = FOLDS) -> Array:
    """The fold (N,) of each question: subject by subject, repeats together, in random order.

    A question that stands in several subjects is dealt with the first of them.
    """
    first: dict[str, str] = {}
    for name, content in zip(subjects, hashes, strict=True):
        first.setdefault(content, name)
    by_subject: dict[str, list[str]] = {}
    for content, name in first.items():
        by_subject.setdefault(name, []).append(content)
    rng = np.random.default_rng(seed)
    # One after another over all subjects, so that small ones do not all fill the first folds.
    order = [content for own in by_subject.values() for content in rng.permutation(own).tolist()]
    fold = {content: i % folds for i, content in enumerate(order)}
    return np.array([fold[content] for content in hashes])
