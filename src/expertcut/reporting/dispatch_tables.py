"""Tables and sentences of `dispatch.json`, and `routes.csv`."""

from collections.abc import Sequence
from pathlib import Path

from expertcut.evaluation.dispatch_results import DispatchResult, DispatchScore
from expertcut.reporting.edit_tables import CHANGE, change_text, listed, percent, unit
from expertcut.reporting.tables import Cell, Table, columns
from expertcut.stats import Comparison

_ROUTES = columns("category; model; weight")


def routes_table(result: DispatchResult) -> Table:
    """One row per category and model that votes there; other categories have no name."""
    rows: list[list[Cell]] = [
        [name, path, weight]
        for name, category in result.categories.items()
        for path, weight in category.models.items()
    ]
    return Table("routes", _ROUTES, [*rows, [None, result.otherwise, 1]])


def are_routes(file: Path) -> bool:
    """Whether a file begins as `routes.csv` does."""
    head = ",".join(column.name for column in _ROUTES) + "\n"
    with file.open("rb") as stream:
        return stream.read(len(head)) == head.encode()


def dispatch_tables(result: DispatchResult) -> list[Table]:
    """What choosing gains; the categories by model; subjects that routing takes for others."""
    return [_outcome_table(result), _models_table(result), *_confusion_tables(result)]


def dispatch_csv(result: DispatchResult) -> Table:
    """One row per procedure, as shares."""
    routing = result.by_routing
    compared: dict[str, DispatchScore | None] = {
        "cross_fitted": result.cross_fitted,
        "routing": routing.score if routing else None,
        "true_subjects": routing.true_subjects if routing else None,
        "votes": result.votes,
    }
    rows: list[list[Cell]] = [["best_single", result.best_single, *[None] * 7]]
    for name, score in compared.items():
        if score is not None:
            c = score.change
            own: list[Cell] = [name, score.accuracy, c.delta, *c.ci95, c.gained, c.lost]
            rows.append([*own, c.mcnemar_p, c.smallest_effect])
    rows.append(["oracle", result.oracle, *[None] * 7])
    heads = "procedure; accuracy; delta; low; high; gained; lost; mcnemar_p; smallest_effect"
    return Table("dispatch", columns(heads), rows)


def dispatch_facts(result: DispatchResult) -> list[tuple[str, str]]:
    """The verdict, bytes, the oracle and dropped questions, with labels."""
    low, high = map(percent, result.null95)
    held = [model for model in result.models if model.is_held]
    size = f"{len(held)} of {len(result.models)} models, {unit(result.held_bytes, 'B')}"
    if result.union_bytes is not None and result.union_bytes < result.held_bytes:
        size += f"; {unit(result.union_bytes, 'B')} with the experts that they share held once"
    facts = [("verdict", verdict_sentence(result)), ("holds", size)]
    for model in result.models:
        if model.answered < result.questions:
            text = f"{model.path} answered {model.answered:,} of {result.questions:,} questions; "
            facts.append(("coverage", f"{text}elsewhere the next best model was judged"))
    if result.by_routing:
        text = f"the subject of {percent(result.by_routing.right)} of questions is predicted right"
        facts.append(("routing", text))
    if len(result.models) > 1:
        facts.append(
            (
                "oracle",
                f"the best model of each question is right in {percent(result.oracle)}; luck "
                f"alone would give {low} to {high}",
            )
        )
    if result.dropped:
        text = f"{result.dropped:,} questions that a model was chosen or healed on"
        facts.append(("dropped", text))
    return facts


def verdict_sentence(result: DispatchResult) -> str:
    """Whether choosing helps, in words."""
    c, routing = result.cross_fitted.change, result.by_routing
    if len(result.models) == 1:
        return "One model: there is nothing to choose. Name results of several."
    how = " by routing" if routing and routing.true_subjects else ""
    if result.verdict == "no evidence":
        shown = f"{100 * c.smallest_effect:.1f} points could have been shown"
        return f"No evidence that choosing{how} helps here: {change_text(c)}; {shown}."
    return f"Choosing{how} {result.verdict} here: {change_text(c)}."


def _outcome_table(result: DispatchResult) -> Table:
    by = Path(result.asked.by).name
    kind = "subject" if by == "routing" else by
    name = short_names([model.path for model in result.models])[result.single]
    rows: list[list[Cell]] = [[f"best single ({name})", result.best_single, None, None]]
    routing = result.by_routing
    of_kind = (routing.true_subjects if routing else None) or result.cross_fitted
    rows.append([f"by {kind}", *_cells(of_kind)])
    if routing:
        rows.append(["by routing", *_cells(routing.score)])
    rows.append(["equal votes", *_cells(result.votes)])
    rows.append(["best per question (oracle)", result.oracle, None, None])
    note = f"Chosen on four fifths of {result.questions:,} questions, scored on the other."
    heads = columns(f"procedure; accuracy::.2%; {CHANGE}; McNemar p::.2g")
    return Table(f"Dispatch by {by}", heads, rows, note)


def _cells(score: DispatchScore) -> Sequence[Cell]:
    change: Comparison = score.change
    p = change.mcnemar_p if change.gained + change.lost else None
    return [score.accuracy, change_text(change, ""), p]


def _models_table(result: DispatchResult) -> Table:
    names = short_names([model.path for model in result.models])
    rows: list[list[Cell]] = []
    for model in result.models:
        first = [n for n, c in result.categories.items() if next(iter(c.models)) == model.path]
        n = sum(result.categories[name].questions for name in first)
        parts = [listed(first)] if first else []
        parts += ["any other"] if model.path == result.otherwise else []
        size = unit(model.bytes, "B")
        rows.append([names[model.path], size, model.accuracy, n, "; ".join(parts) or None])
    heads = columns("model; size; accuracy::.1%; questions::,d; first in")
    return Table("Models", heads, rows, "Chosen on all questions, as in routes.csv.")


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or the whole path where that is ambiguous."""
    last = [Path(path).name for path in paths]
    return {
        path: name if last.count(name) == 1 else path
        for path, name in zip(paths, last, strict=True)
    }


def _confusion_tables(result: DispatchResult) -> list[Table]:
    """The subjects, how often they are predicted from routing, and what they are taken for most."""
    if result.by_routing is None:
        return []
    rows: list[list[Cell]] = []
    for name, predicted in result.by_routing.confusion.items():
        n = sum(predicted.values())
        others = sorted(((c, o) for o, c in predicted.items() if o != name), reverse=True)
        taken = ", ".join(f"{other} {count:,}" for count, other in others[:3])
        rows.append([name, n, predicted.get(name, 0) / n if n else None, taken or None])
    heads = columns("subject; questions::,d; predicted right::.1%; taken for")
    return [Table("Subjects as predicted from routing", heads, rows)]
