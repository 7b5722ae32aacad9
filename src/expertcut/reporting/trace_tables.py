"""A routing trace as tables: what it is of."""

from typing import Any

from expertcut.profiling.trace import QuizTraceInfo, TextTraceInfo, Trace
from expertcut.reporting.edit_tables import unit
from expertcut.reporting.tables import Cell, Table, columns
from expertcut.reporting.text_profile_tables import texts_line


def trace_facts(trace: Trace) -> list[tuple[str, str]]:
    """Model, what was read, and how much is kept of it."""
    info = trace.info
    if isinstance(info, QuizTraceInfo):
        n, quiz = trace.n_sequences, info.quiz
        read = ("quiz", f"{n:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots")
    elif isinstance(info, TextTraceInfo):
        read = ("text", texts_line(info.text))
    else:
        read = ("routes", info.routes.id)
    kept = [("gate weights", info.settings.weights), ("router logits", info.settings.logits)]
    named = " and ".join(["experts", *(name for name, is_kept in kept if is_kept)])
    size = unit(trace.size_bytes, "B")
    blocks = info.model.blocks
    counts = "/".join(map(str, dict.fromkeys(block.experts for block in blocks)))
    top_k = "/".join(map(str, dict.fromkeys(block.top_k for block in blocks)))
    return [
        ("model", f"{info.model.label}: {len(blocks)} layers of {counts} experts, {top_k} a token"),
        read,
        ("tokens", f"{info.n_tokens:,} in {trace.n_sequences:,} sequences, {named}: {size}"),
    ]


def trace_table(trace: Trace) -> Table:
    """One row per MoE block."""
    blocks = trace.info.model.blocks
    rows: list[list[Cell]] = [
        [i, block.name, block.experts, block.top_k] for i, block in enumerate(blocks)
    ]
    return Table("Blocks", columns("layer; block; experts; experts a token"), rows)


def trace_json(trace: Trace) -> dict[str, Any]:
    """What the trace is of."""
    info = trace.info.model_dump(mode="json")
    return {**info, "n_sequences": trace.n_sequences, "size_bytes": trace.size_bytes}
