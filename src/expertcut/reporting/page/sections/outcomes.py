"""Was it worth it: every evaluation, its variants side by side, and subject by subject."""

from pathlib import Path

import numpy as np

from expertcut.evaluation.results import ModelResult, Results
from expertcut.profiling.significance import wilson
from expertcut.reporting.outcomes import result_sentences, results_table
from expertcut.reporting.page.figures import Curves, Series
from expertcut.reporting.page.gathering import Run
from expertcut.reporting.page.parts import Folded, Part, Section, Text, key_of
from expertcut.reporting.tables import Cell, Column, Table


def outcome_sections(run: Run) -> list[Section]:
    """One for each evaluation."""
    sections: list[Section] = []
    for found in run.results:
        key = key_of(f"{found.name}", [section.key for section in sections])
        title = "Results" if len(run.results) == 1 else f"Results: {found.name}"
        sections.append(Section(key, title, _parts(found.its, key)))
    return sections


def names_of(results: Results) -> list[str]:
    """The last part of each model's path, or all of it where two would be called the same."""
    short = [Path(model.path).name for model in results.models]
    pairs = zip(short, results.models, strict=True)
    return [name if short.count(name) == 1 else model.path for name, model in pairs]


def change(base: ModelResult, model: ModelResult, subject: str) -> float | None:
    """What a model's accuracy in a subject is above the base's; None where it was not asked."""
    its = model.subjects.get(subject)
    return None if its is None else its.accuracy - base.subjects[subject].accuracy


def _parts(results: Results, key: str) -> list[Part]:
    parts: list[Part] = [results_table(results), *map(Text, result_sentences(results))]
    parts.append(_accuracies(results, key))
    if len(results.models) > 1:
        parts.append(_differences(results, key))
    return [*parts, Folded("Accuracy of every subject", [_subjects(results)])]


def _accuracies(results: Results, key: str) -> Curves:
    models = results.models
    its = Series(
        "accuracy",
        tuple(model.accuracy for model in models),
        tuple(model.ci95[0] for model in models),
        tuple(model.ci95[1] for model in models),
    )
    return Curves(
        key=f"{key}-accuracy",
        title="Accuracy of every variant",
        note="Bars are 95 % intervals (Wilson), the line is the base. The interval of a "
        "difference, in the table, is narrower: the questions are the same.",
        across="model",
        categories=tuple(names_of(results)),
        series=(its,),
        column=Column("accuracy", ".1%"),
        is_flat=True,
        zero=models[0].accuracy,
    )


def _differences(results: Results, key: str) -> Curves:
    base, subjects = results.models[0], tuple(results.models[0].subjects)
    others = list(zip(names_of(results), results.models, strict=True))[1:]
    return Curves(
        key=f"{key}-subjects",
        title="Difference to the base, subject by subject",
        note="On the same questions. Single subjects are not tested: with so few questions each, "
        "chance alone moves them.",
        across="subject",
        categories=subjects,
        series=tuple(
            Series(name, tuple(change(base, model, subject) for subject in subjects))
            for name, model in others
        ),
        column=Column("Δ accuracy", "+.1%"),
        is_flat=True,
        zero=0.0,
    )


def _subjects(results: Results) -> Table:
    base, names = results.models[0], names_of(results)
    rows: list[list[Cell]] = []
    for subject, asked in base.subjects.items():
        row: list[Cell] = [subject, asked.questions]
        for model in results.models:
            its = model.subjects.get(subject)
            row += [its.accuracy, _interval(its.accuracy, its.questions)] if its else [None, None]
        rows.append([*row, *(change(base, model, subject) for model in results.models[1:])])
    columns = [Column("subject"), Column("questions", ",d")]
    for name in names:
        columns += [Column(name, ".1%"), Column("95 % interval")]
    columns += [Column(f"Δ {name}", "+.1%") for name in names[1:]]
    return Table("Subjects", tuple(columns), rows, "Intervals are Wilson's, of each model alone.")


def _interval(share: float, n: int) -> str:
    low, high = wilson(np.array(share), np.array(n))
    return f"{float(low):.1%} … {float(high):.1%}"
