"""Sweeps: accuracy against size, in tables, words and a figure."""

from expertcut.evaluation.search_results import Sweep, SweepCell, SweptModel
from expertcut.evaluation.stats import shows_change
from expertcut.reporting.figures import Point, Series, curves
from expertcut.reporting.tables import Cell, Column, Table


def sweep_table(found: Sweep) -> Table:
    """The unedited model and every cell that is finished."""
    rows: list[list[Cell]] = []
    if found.base is not None:
        b = found.base
        its: list[Cell] = [b.accuracy, _interval(b.ci95), *[None] * 5, b.parameters, b.bytes / 1e6]
        rows.append(["unedited", None, None, *its])
    rows += [_row(cell) for cell in found.cells]
    columns = (
        Column("by"),
        Column("share", "g"),
        Column("kept a layer"),
        Column("accuracy", ".2%"),
        Column("95 % interval"),
        Column("Δ", "+.2%"),
        Column("95 % interval of Δ"),
        Column("gained"),
        Column("lost"),
        Column("McNemar p", ".3g"),
        Column("parameters", ",d"),
        Column("MB", ".2f"),
    )
    asked, quiz = found.asked, found.asked.scored.quiz
    n_questions = sum(subject.questions for subject in quiz.subjects.values())
    n_cells = len(asked.by) * len(asked.fractions)
    note = (
        f"{n_questions:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots, layout "
        f"{asked.layout}. MB are those of the weights that a checkpoint would have."
    )
    if found.base is not None and found.base.cut is not None:
        note += f" {found.base.cut:,} prompts are cut from the left to fit the context."
    if not found.is_complete:
        note += f" {len(found.cells)} of {n_cells} cells: the same command does the rest."
    return Table(f"Sweep of {asked.scored.model.label}", columns, rows, note)


def _row(cell: SweepCell) -> list[Cell]:
    c = cell.change
    change: list[Cell] = [c.delta, _interval(c.ci95, "+"), c.gained, c.lost, c.mcnemar_p]
    scored: list[Cell] = [cell.accuracy, _interval(cell.ci95), *change]
    return [cell.by, cell.fraction, cell.kept, *scored, cell.parameters, cell.bytes / 1e6]


def sweep_csv(found: Sweep) -> Table:
    """One row per form of the model, in full precision; the unedited one has no criterion."""
    names = (
        *("by", "fraction", "kept", "questions", "accuracy", "ci95_low", "ci95_high"),
        *("right_logprob", "delta", "delta_low", "delta_high", "gained", "lost", "mcnemar_p"),
        *("smallest_effect", "max_abs_logprob_diff", "median_abs_logprob_diff"),
        *("parameters", "active_parameters", "bytes"),
    )
    rows: list[list[Cell]] = []
    if found.base is not None:
        b = found.base
        its: list[Cell] = [b.questions, b.accuracy, *b.ci95, b.right_logprob, *[None] * 9]
        rows.append([None, None, None, *its, b.parameters, b.active_parameters, b.bytes])
    for cell in found.cells:
        c = cell.change
        its = [cell.questions, cell.accuracy, *cell.ci95, cell.right_logprob, c.delta, *c.ci95]
        its += [c.gained, c.lost, c.mcnemar_p, c.smallest_effect]
        its += [cell.max_abs_logprob_diff, cell.median_abs_logprob_diff]
        its += [cell.parameters, cell.active_parameters, cell.bytes]
        rows.append([cell.by, cell.fraction, cell.kept, *its])
    return Table("sweep", tuple(map(Column, names)), rows)


def sweep_sentences(found: Sweep) -> list[str]:
    """What the grid was chosen on, and which cells show a loss or a gain."""
    quiz, chosen = found.asked.scored.quiz, found.chosen_on
    n_questions = sum(subject.questions for subject in quiz.subjects.values())
    leak = (
        f"The experts were chosen on {chosen.split}, none of the questions scored here."
        if chosen.overlap == 0
        else f"{chosen.overlap:,} of the {n_questions:,} {quiz.split} questions scored here were "
        "used to choose the experts, so this flatters the cuts."
    )
    return [leak, *(_verdict(fraction, found) for fraction in found.asked.fractions)]


def _verdict(fraction: float, found: Sweep) -> str:
    cells = [cell for cell in found.cells if cell.fraction == fraction]
    if not cells:
        return f"At {fraction:g} no cell is finished."
    best = max(cells, key=lambda cell: cell.accuracy)
    clear = [c.by for c in cells if shows_change(c.change.ci95, c.change.mcnemar_p)]
    change = best.change
    text = (
        f"At {fraction:g} of the experts {best.by} keeps most: {best.accuracy:.2%}, "
        f"{change.delta * 100:+.2f} points (95 % interval {change.ci95[0] * 100:+.2f} to "
        f"{change.ci95[1] * 100:+.2f}, McNemar p = {change.mcnemar_p:.2g})"
    )
    if clear:
        return f"{text}; accuracy changes beyond chance with {', '.join(clear)}."
    return f"{text}; no evidence of a change with any criterion."


def sweep_figure(found: Sweep) -> dict[str, bytes]:
    """`sweep.png` and `sweep.svg`: accuracy against the size of the weights, with intervals."""
    series = []
    for by in found.asked.by:
        cells = sorted((c for c in found.cells if c.by == by), key=lambda c: c.bytes)
        series.append(Series(by, [_point(cell.bytes, cell) for cell in cells]))
    base = None if found.base is None else _point(found.base.bytes, found.base)
    quiz = found.asked.scored.quiz
    labels = ("size of the weights (MB)", f"accuracy on {quiz.split} (%)")
    return curves("sweep", series, base, labels)


def _point(size_bytes: int, its: SweptModel) -> Point:
    low, high = its.ci95
    return Point(size_bytes / 1e6, 100 * its.accuracy, 100 * low, 100 * high)


def _interval(ci95: tuple[float, float], sign: str = "") -> str:
    return f"{ci95[0]:{sign}.2%} … {ci95[1]:{sign}.2%}"
