"""Tables and sentences of the tasks of `eval --tasks` and `--samples`."""

from collections.abc import Iterator, Sequence

from expertcut.evaluation.results import Results, TaskComparison, TaskResult
from expertcut.reporting import edit_tables as edits
from expertcut.reporting.tables import Cell, Table, columns, signed

FLAT = (
    "path; part; name; metric; value; stderr; n; delta; delta_low; delta_high; gained; lost; "
    "mcnemar_p; smallest_effect; verdict; unpaired_z; unpaired_p"
)


def _judged(
    results: Results,
) -> Iterator[tuple[int, str, TaskResult, TaskComparison | None]]:
    """Task by task, every model by index with its comparison, None of the base."""
    compared = {c.other: c.tasks or {} for c in results.comparisons}
    for task in results.models[0].tasks or {}:
        for index, model in enumerate(results.models):
            if found := (model.tasks or {}).get(task):
                yield index, task, found, compared.get(index, {}).get(task)


def tasks_tables(results: Results, names: Sequence[str]) -> list[Table]:
    """One row per task and model, compared with the first; no table without tasks."""
    rows: list[list[Cell]] = []
    for index, task, found, c in _judged(results):
        row: list[Cell] = [task, names[index], found.metric, found.documents, found.value]
        row += [c.delta, _interval(c.ci95), c.verdict] if c else [None] * 3
        row += [found.stderr]
        row += [c.gained, c.lost, c.mcnemar_p, c.smallest_effect] if c else [None] * 4
        rows.append([*row, *([c.unpaired_z, c.unpaired_p] if c else [None] * 2)])
    heads = columns(
        "task; model; metric; documents::,d; value::.4f; Δ::+.4f; 95 % interval of Δ; verdict | "
        "± standard error::.4f; gained; lost; McNemar p::.3g; smallest effect::.4f; "
        "unpaired z::+.2f; unpaired p::.3g"
    )
    note = (
        "Δ is other minus base on the same documents, of a perplexity that of its logarithm. Its "
        "interval is the score interval where outcomes are 0 or 1, else a bootstrap over the "
        "documents. The unpaired z is the harness's own test."
    )
    return [Table("Tasks", heads, rows, note)] if rows else []


def tasks_rows(results: Results) -> list[list[Cell]]:
    """One row per task and model, in the columns of `FLAT`."""
    rows: list[list[Cell]] = []
    for index, task, found, c in _judged(results):
        row: list[Cell] = [results.models[index].path, "tasks", task, found.metric]
        row += [found.value, found.stderr, found.documents]
        row += [c.delta, *c.ci95, c.gained, c.lost, c.mcnemar_p] if c else [None] * 6
        row += [c.smallest_effect, c.verdict, c.unpaired_z, c.unpaired_p] if c else [None] * 4
        rows.append(row)
    return rows


def tasks_facts(results: Results, names: Sequence[str]) -> list[tuple[str, str]]:
    """What each model lost or kept, task by task."""
    judged = list(_judged(results))
    if len(results.models) == 1:
        return [("task", f"{t}: {r.metric} {r.value:.4f}") for _, t, r, _ in judged]
    return [
        ("task", f"{task}: {names[index]} {_sentence(found, c)}")
        for index, task, found, c in judged
        if c is not None
    ]


def _sentence(found: TaskResult, c: TaskComparison) -> str:
    """The change with its interval and test, and the verdict within the margin it was made at."""
    if c.gained is None or c.lost is None:
        of = f"ln {found.metric}" if "perplexity" in found.metric else found.metric
        text = f"{signed(c.delta, '+.4f')} ({_interval(c.ci95)}) of {of}"
    else:
        text = f"{edits.points(c.delta)} points ({edits.span(c.ci95)}) of {found.metric}"
        text += f", {c.gained:,} gained, {c.lost:,} lost (McNemar p = {c.mcnemar_p:.2g})"
    within = "" if c.margin is None else edits.margin_text(c.margin)
    words = {
        "better": "better than the base",
        "worse": "worse than the base",
        "holds": f"holds within {within} of the base",
        "undecided": f"undecided at a margin of {within}" if within else "undecided",
    }
    n = found.documents
    judged = words[c.verdict] if c.verdict else "no verdict from one document"
    return f"{text} on {n:,} document{'s' if n != 1 else ''}: {judged}"


def _interval(ends: Sequence[float]) -> str:
    return " … ".join(signed(end, "+.4f") for end in ends)
