"""Tables and sentences of what models write: `eval --generate`."""

from collections.abc import Sequence

from expertcut.evaluation.generation import (
    SHORTEST_LOOP,
    GenerationChange,
    GenerationInfo,
    MeanResult,
    ShareResult,
)
from expertcut.evaluation.results import Results
from expertcut.reporting import edit_tables as edits
from expertcut.reporting.tables import Cell, Table, columns
from expertcut.stats import Comparison, questions_to_hold, verdict

# The field of both records, its label, and what is said of an output.
_FAULTS = (
    ("loops", "loops", "loop"),
    ("length_cap", "cap", "hit the length cap"),
    ("empty", "empty", "are empty"),
)


def generation_tables(results: Results, names: Sequence[str], margin: float) -> list[Table]:
    """One row per model, compared with the first; no table without outputs."""
    if (info := results.generation) is None:
        return []
    compared = {c.other: c.generation for c in results.comparisons}
    rows: list[list[Cell]] = []
    for index, (name, model) in enumerate(zip(names, results.models, strict=True)):
        if (own := model.generation) is None:
            continue
        change = compared.get(index)
        loops = change.loops if change else None
        row: list[Cell] = [name, own.loops.share if own.loops else None]
        row += [_verdict(loops, own.prompts, margin), own.length_cap.share, own.empty.share]
        row += [change.differs.share if change else None]
        row += [own.distinct_4.mean if own.distinct_4 else None]
        row += [change.first_divergence_median if change else None, own.mean_tokens.mean]
        row += [edits.interval_text(own.loops.ci95, 1) if own.loops else None]
        row += [loops.gained, loops.lost, loops.mcnemar_p] if loops else [None] * 3
        for share in (own.length_cap, own.empty, change.differs if change else None):
            row.append(edits.interval_text(share.ci95, 1) if share else None)
        rows.append(row)
    heads = columns(
        "model; loops::.1%; verdict; cap::.1%; empty::.1%; differ::.1% | distinct-4::.3f; "
        "diverge at::.0f; tokens::.1f; loops, 95 %; gained; lost; McNemar p::.3g; "
        "cap, 95 %; empty, 95 %; differ, 95 %"
    )
    return [Table("Generation", heads, rows, _note(results, info))]


def _note(results: Results, info: GenerationInfo) -> str:
    n = next(model.generation.prompts for model in results.models if model.generation)
    how = "greedy" if info.seed is None else f"sampled at {info.temperature:g}, seed {info.seed}"
    text = f"{n:,} prompts of {info.prompts}, at most {info.max_new_tokens:,} new tokens, {how}"
    if info.max_new_tokens < SHORTEST_LOOP:
        return f"{text}; a loop takes {SHORTEST_LOOP} tokens, so none can be seen"
    return text


def generation_facts(
    results: Results, names: Sequence[str], margin: float
) -> list[tuple[str, str]]:
    """The prompts, then of each model how often it fails, and the verdicts against the base."""
    if (info := results.generation) is None:
        return []
    facts = [("prompts", _note(results, info))]
    base = results.models[0].generation
    if base is not None and not results.comparisons:
        for key, label, what in _FAULTS:
            if share := getattr(base, key):
                facts.append((label, f"{names[0]}: {_share_text(share)} of its outputs {what}"))
    for c in results.comparisons:
        own = results.models[c.other].generation
        if own is None or base is None or c.generation is None:
            continue
        for key, label, what in _FAULTS:
            change: Comparison | None = getattr(c.generation, key)
            if change is not None and (key == "loops" or change.gained + change.lost):
                text = f"{names[c.other]}: {_share_text(getattr(own, key))} of its outputs {what}, "
                text += f"{edits.percent(getattr(base, key).share)} of the base's"
                facts.append((label, text + _change_text(change, own.prompts, margin)))
        facts.append(("differ", f"{names[c.other]}: {_differing(c.generation)}"))
    return [*facts, ("outputs", info.outputs)]


def generation_findings(
    results: Results, names: Sequence[str], margin: float
) -> list[tuple[str, str]]:
    """How often outputs loop, a few words on each model compared, and the figures behind."""
    base, info = results.models[0].generation, results.generation
    if base is None or info is None or base.loops is None:
        return []
    share, prompts = edits.percent(base.loops.share), f"{base.prompts:,} prompts"
    if not results.comparisons:
        return [(f"{share} of its outputs loop", f"{names[0]}, {prompts}")]
    findings = []
    for c in results.comparisons:
        own = results.models[c.other].generation
        if own and own.loops and c.generation and c.generation.loops:
            change = c.generation.loops
            words = f"{edits.percent(own.loops.share)} of its outputs loop, {share} of the base's"
            figures = f"{names[c.other]} against {names[0]}, {prompts}"
            findings.append((words, figures + _change_text(change, own.prompts, margin)))
    return findings


def _share_text(found: ShareResult) -> str:
    low, high = map(edits.percent, found.ci95)
    return f"{edits.percent(found.share)} ({low} … {high})"


def _change_text(change: Comparison, n: int, margin: float) -> str:
    """How many came and went, and whether the fault became more frequent."""
    if not change.gained + change.lost:
        text = ", the same ones"
    else:
        text = f"; {change.gained:,} only here, {change.lost:,} only there (McNemar p = "
        text += f"{change.mcnemar_p:.2g})"
    word, within = _verdict(change, n, margin), edits.margin_text(margin)
    if word == "holds":
        return f"{text}: holds within {within} of the base"
    if word != "undecided":
        return f"{text}: {word} than the base"
    # A fault that comes is an answer that is lost.
    needed = questions_to_hold(change.lost, change.gained, n, margin)
    most = edits.points(change.ci95[1])[1:]
    return (
        f"{text}: undecided at a margin of {within}, could be {most} points more; about {needed:,} "
        "prompts would decide"
    )


def _differing(change: GenerationChange) -> str:
    if not change.differs.outputs:
        most = edits.percent(change.differs.ci95[1])
        return f"every output is the base's; of others at most {most} would differ"
    text = f"{_share_text(change.differs)} of its outputs differ from the base's"
    if (at := change.first_divergence_median) is not None:
        text += f", half of them after {at:,.0f} equal tokens or fewer"
    return text


def _verdict(change: Comparison | None, n: int, margin: float) -> str | None:
    return None if change is None else verdict(change.lost, change.gained, n, margin)


def generation_rows(results: Results, margin: float) -> list[list[Cell]]:
    """One row per model and figure, in the columns of `task_tables.FLAT`."""
    rows: list[list[Cell]] = []
    changes = {c.other: c.generation for c in results.comparisons}
    for index, model in enumerate(results.models):
        if (own := model.generation) is None:
            continue
        means: dict[str, MeanResult | None] = {"distinct_4": own.distinct_4}
        means["mean_tokens"] = own.mean_tokens
        found: dict[str, tuple[str, float]] = {
            key: ("share", share.share) for key, *_ in _FAULTS if (share := getattr(own, key))
        }
        found |= {key: ("mean", mean.mean) for key, mean in means.items() if mean is not None}
        change = changes.get(index)
        if change is not None:
            found["differs"] = ("share", change.differs.share)
        for key, (metric, value) in found.items():
            row: list[Cell] = [model.path, "generation", key, metric, value, None, own.prompts]
            c = getattr(change, key, None)
            if isinstance(c, Comparison):
                row += [c.delta, *c.ci95, c.gained, c.lost, c.mcnemar_p, c.smallest_effect]
                rows.append([*row, _verdict(c, own.prompts, margin), None, None])
            else:
                rows.append([*row, *[None] * 10])
    return rows
