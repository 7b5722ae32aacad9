"""`dispatch.json`: which models answer which categories, and what that gained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from expertcut.documents import Format1, Record
from expertcut.errors import OutputError, QuizError
from expertcut.evaluation.cross_fit import FOLDS, Verdict
from expertcut.evaluation.dispatching import (
    Answered,
    DispatchMethod,
    SelectionOptions,
    cross_fit_routes,
    fit,
    most_right,
    oracle_null,
)
from expertcut.evaluation.predictions import Predictions
from expertcut.stats import Array, Comparison, Count, Share, compare

DISPATCH_FILE = "dispatch.json"


class DispatchRequest(Record):
    """The settings that the outcome depends on."""

    results: tuple[str, ...]
    by: str
    way: DispatchMethod
    most: Count | None
    max_bytes: Count | None
    profile: str | None  # the short hash of the profile whose routing tells the subject
    seed: Count


class DispatchModel(Record):
    """One model; `answered` counts its questions, `is_held` tells whether a category is its own."""

    path: str
    fingerprint: str | None
    bytes: Count
    answered: Count
    accuracy: Share
    is_held: bool


class DispatchScore(Record):
    """A procedure on the questions that it was not chosen on, against the best single model."""

    accuracy: Share
    change: Comparison


class SubjectClassifier(Record):
    """Subjects as predicted from routing: `confusion` counts questions by true and predicted one.

    `score` is that of the choice by predicted subjects, `true_subjects` by the true ones (null in
    older files, whose `cross_fitted` it is).
    """

    right: Share
    score: DispatchScore
    true_subjects: DispatchScore | None = None
    confusion: dict[str, dict[str, Count]]


class DispatchCategory(Record):
    """A category: the vote of each model by its path, the largest first."""

    questions: Count
    models: dict[str, Share] = Field(min_length=1)


class DispatchResult(Record):
    """`dispatch.json`.

    `cross_fitted` and `verdict` are of the categories that were asked for: with `--by routing` of
    predicted subjects. `best_single` is chosen in the same folds, `single` on all questions;
    `otherwise` answers other categories. `null95` is the range of `oracle` if models differed by
    chance alone. `kappa` is null (infinite) where models do not differ between categories beyond
    chance. `union_bytes` holds experts that cuts share once; null where the checkpoint of a held
    model is not there.
    """

    format: Format1 = 1
    asked: DispatchRequest
    questions: Count
    dropped: Count
    models: tuple[DispatchModel, ...] = Field(min_length=1)
    single: str
    categories: dict[str, DispatchCategory] = Field(min_length=1)
    otherwise: str
    kappa: float | None
    best_single: Share
    cross_fitted: DispatchScore
    by_routing: SubjectClassifier | None
    votes: DispatchScore
    oracle: Share
    null95: tuple[Share, Share]
    held_bytes: Count
    union_bytes: Count | None
    verdict: Verdict

    @model_validator(mode="after")
    def _routes_to_its_models(self) -> Self:
        paths = {model.path for model in self.models}
        if len(paths) < len(self.models):
            raise ValueError("two models have one path")
        for category in self.categories.values():
            if unknown := {*category.models} - paths:
                raise ValueError(f"a category names {min(unknown)!a}, which is not a model")
        for key, path in (("single", self.single), ("otherwise", self.otherwise)):
            if path not in paths:
                raise ValueError(f"{key} names {path!a}, which is not a model")
        return self


def dispatch(
    predictions: Predictions,
    categories: Mapping[str, Array],
    asked: DispatchRequest,
    predicted_subject_N: Array | None = None,
) -> DispatchResult:
    """Chooses by category (masks (N,) of questions) and says what that gains, cross-fitted.

    `predicted_subject_N` are places among the categories: these are judged instead of the true
    ones.
    """
    answered = predictions.answered
    options = SelectionOptions(asked.way, asked.most, asked.max_bytes)
    names = [*categories]
    category_NS = np.column_stack([categories[name] for name in names]).astype(float)
    check_budget(predictions, options)
    check_repeats(answered, categories)
    predicted_NS = None
    if predicted_subject_N is not None:
        predicted_NS = 1.0 * (predicted_subject_N[:, None] == np.arange(len(names)))
    crossed = cross_fit_routes(answered, category_NS, options, asked.seed, predicted_NS)
    routes = fit(answered.right_MN, category_NS, answered.size_M, options, answered.chance)
    everywhere_MS = np.ones((len(answered.size_M), len(names)), dtype=bool)
    weight_MS = routes.weights(np.eye(len(names)), everywhere_MS)
    otherwise_M = routes.weights(np.zeros((1, len(names))), everywhere_MS[:, :1])[:, 0]
    is_held_M = weight_MS.sum(axis=1) + otherwise_M > 0
    paths = [model.path for model in predictions.models]
    chosen_N = crossed.chosen_N if crossed.predicted_N is None else crossed.predicted_N
    chosen, routing = _score(crossed.single_N, chosen_N), None
    if predicted_subject_N is not None:
        routing = SubjectClassifier(
            right=(category_NS.argmax(axis=1) == predicted_subject_N).mean(),
            score=chosen,
            true_subjects=_score(crossed.single_N, crossed.chosen_N),
            confusion=_confusion(category_NS.argmax(axis=1), predicted_subject_N, names),
        )
    return DispatchResult(
        asked=asked,
        questions=len(answered.answer_N),
        dropped=len(predictions.dropped),
        models=tuple(_models(predictions, is_held_M)),
        single=paths[routes.single],
        categories={
            name: DispatchCategory(
                questions=int(category_NS[:, s].sum()), models=_votes(paths, weight_MS[:, s])
            )
            for s, name in enumerate(names)
        },
        otherwise=paths[int(otherwise_M.argmax())],
        kappa=routes.kappa if np.isfinite(routes.kappa) else None,
        best_single=crossed.single_N.mean(),
        cross_fitted=chosen,
        by_routing=routing,
        votes=_score(crossed.single_N, crossed.votes_N),
        oracle=np.nan_to_num(answered.right_MN[routes.fits_M]).any(axis=0).mean(),
        null95=oracle_null(answered, routes, asked.seed),
        held_bytes=int(answered.size_M[is_held_M].sum()),
        union_bytes=None,
        verdict=verdict(chosen.change, int(chosen_N.sum()), most_right(answered, routes)),
    )


def verdict(change: Comparison, n_right: float, most_right: float) -> Verdict:
    """Helps or hurts where the paired interval and McNemar's exact test say so.

    Helps also asks for more right answers than any single model has in all (where it did not
    answer, the best single one does): the best one of four folds owes some of its lead to chance,
    which it lacks on the fifth.
    """
    if not change.is_significant:
        return "no evidence"
    if change.delta < 0:
        return "hurts"
    return "helps" if n_right > most_right else "no evidence"


def check_budget(predictions: Predictions, options: SelectionOptions) -> None:
    """Refuses a budget that holds no model."""
    smallest = min(predictions.models, key=lambda model: model.bytes)
    if options.max_bytes is not None and smallest.bytes > options.max_bytes:
        raise OutputError(
            f"--max-bytes {options.max_bytes:,} holds no model: the smallest, {smallest.path}, has "
            f"{smallest.bytes:,} bytes"
        )


def check_repeats(answered: Answered, categories: Mapping[str, Array]) -> None:
    """Refuses categories too small to choose in: folds need different questions."""
    is_compared_N = answered.is_answered_MN.sum(axis=0) > 1
    most = max(len({*answered.group_N[own_N & is_compared_N]}) for own_N in categories.values())
    if most < FOLDS and len(answered.size_M) > 1:
        raise QuizError(
            f"no category has {FOLDS} different questions that more than one model answered (the "
            f"largest has {most}): evaluate on more, or choose --by fewer categories"
        )


def _confusion(
    subject_N: Array, predicted_subject_N: Array, names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Questions by true and predicted subject."""
    return {
        name: {
            names[other]: int(n)
            for other, n in zip(
                *np.unique(predicted_subject_N[subject_N == s], return_counts=True), strict=True
            )
        }
        for s, name in enumerate(names)
    }


def _score(single_N: Array, right_N: Array) -> DispatchScore:
    return DispatchScore(accuracy=right_N.mean(), change=compare(single_N, right_N))


def _models(predictions: Predictions, is_held_M: Array) -> list[DispatchModel]:
    right_MN = predictions.answered.right_MN
    return [
        DispatchModel(
            path=model.path,
            fingerprint=model.fingerprint,
            bytes=model.bytes,
            answered=int(np.isfinite(right_N).sum()),
            accuracy=np.nanmean(right_N),
            is_held=bool(is_held),
        )
        for model, right_N, is_held in zip(predictions.models, right_MN, is_held_M, strict=True)
    ]


def _votes(paths: Sequence[str], weight_M: Array) -> dict[str, float]:
    order = np.argsort(-weight_M, kind="stable")
    return {paths[m]: min(1.0, float(weight_M[m])) for m in order if weight_M[m] > 0}


def load_dispatch(path: Path) -> DispatchResult:
    """`dispatch.json` from its file or folder, an OutputError where it is missing or not valid."""
    file = path / DISPATCH_FILE if path.is_dir() else path
    return DispatchResult.load(file, OutputError, "is not a valid dispatch")
