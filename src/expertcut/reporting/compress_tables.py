"""Tables and sentences of compressed checkpoints, and of sweeps over their sizes."""

from collections import Counter
from collections.abc import Mapping, Sequence

from expertcut.edits.compression import CompressionFile, Loader, PeerScore
from expertcut.edits.plan import BlockEdit, Compression
from expertcut.evaluation.search_results import (
    CompressionCell,
    CompressionSweep,
    CompressionTextCell,
    SweptModel,
    SweptTexts,
)
from expertcut.reporting import edit_tables as edits
from expertcut.reporting.plots import draw_lines, series_of
from expertcut.reporting.tables import Cell, Table, columns
from expertcut.reporting.text_search_tables import texts_note
from expertcut.reporting.text_tables import span
from expertcut.stats import MARGIN, verdict

_FORMS: Mapping[Loader, str] = {
    "transformers": "loads in transformers 5.22 or later with trust_remote_code",
    "vllm": "loads in vLLM (4 bits were run, on a CPU; 8 bits and CUDA are read in its source)",
    "llama.cpp": "llama-quantize makes the GGUF by tensor-types.txt; K-quants were measured as "
    "rounding to the nearest of the same width, other types by the package gguf if it is there",
}


def options_text(edit: BlockEdit, n_experts: int) -> str:
    """The options of a block and how many experts have each, the most frequent first."""
    counts = Counter((edit.options or {}).values())
    if len(counts) == 1:
        return next(iter(counts))
    assert counts.total() == n_experts, "each expert has one"
    return ", ".join(f"{n} × {option}" for option, n in counts.most_common())


def error_table(file: CompressionFile, blocks: Mapping[str, BlockEdit]) -> Table:
    """By layer the options, the experts' bytes, and the error of the block in both ways."""
    rows: list[list[Cell]] = []
    sizes = dict(zip(file.layers, file.bytes, strict=True))
    n_units, found = Counter(file.layers), file.block_error
    for layer, (name, edit) in enumerate(blocks.items()):
        own = [*(edit.options or {}).values()]
        own = own * n_units[name] if len(own) == 1 else own
        size = sum(sizes[name][file.options.index(option)] for option in own)
        row: list[Cell] = [layer, options_text(edit, n_units[name]), edits.unit(size, "B")]
        row.append(found.sum[layer] if found else None)
        rows.append([*row, found.measured[layer] if found and found.measured else None])
    heads = columns("layer; option; bytes; sum of experts::.3g; measured::.3g")
    asked = file.asked
    weighed = "" if asked.weigh == "output" else ", times what noise there does to log p"
    note = (
        f"Error of the block as a share of its squared output{weighed}: summed over experts, and "
        f"with all of them at once. {asked.tokens:,} tokens of {asked.questions:,} questions or "
        "documents."
    )
    return Table("Options", heads, rows, note)


def peers_table(peers: Sequence[PeerScore]) -> Table:
    """The plan beside others under the same budget, on what is held out."""
    is_text = any(peer.kl is not None for peer in peers)
    rows: list[list[Cell]] = []
    for peer in peers:
        own: list[Cell] = [peer.flipped, peer.median_abs_logprob_diff]
        own = [peer.top1_agreement, peer.kl] if is_text else own
        size = None if peer.bytes is None else edits.unit(peer.bytes, "B")
        rows.append([peer.plan, peer.logprob, *own, peer.bits, size])
    own_heads = "same top token::.1%; KL::.4f" if is_text else "flipped; median |Δ log p|::.4f"
    heads = columns(f"plan; mean log p::.4f; {own_heads} | bits::.2f; size")
    return Table("Under the same budget", heads, rows)


def solved_sentence(compression: Compression, file: CompressionFile) -> str:
    """Bits, and how the program ended."""
    text = f"{compression.bits:.2f} a weight of an expert"
    if (solver := file.solver) is None:
        return f"{text}."
    if solver.status == "optimal":
        how = f"solved (gap {solver.gap:.2g})"
    else:
        how = f"not solved within {solver.seconds:.0f} s: the best choice has at least "
        how += f"{1 - solver.gap:.1%} of this error"
    return f"{text}; the program is {how}."


def loads_sentence(
    compression: Compression, blocks: Mapping[str, BlockEdit], *, was_loaded: bool
) -> str:
    """Where the checkpoint loads, with what was run and what was not."""
    text = _FORMS[compression.loader]
    if compression.loader == "transformers":
        return f"{text} ({'loaded and scored here' if was_loaded else 'not loaded here'})"
    if compression.loader == "llama.cpp":
        return f"{text} (not run here)"
    widths = {option for edit in blocks.values() for option in (edit.options or {}).values()}
    if len(widths) == 1:
        return f"{text}, and in transformers with compressed-tensors"
    return (
        f"{text}; transformers alone does not load it or answers wrongly, for its layers have "
        f"{len(widths)} widths: --for transformers writes one that it can"
    )


def facts(
    compression: Compression,
    file: CompressionFile,
    blocks: Mapping[str, BlockEdit],
    *,
    was_loaded: bool,
) -> list[tuple[str, str]]:
    """How small the experts are, by which program, and where the checkpoint loads."""
    loads = loads_sentence(compression, blocks, was_loaded=was_loaded)
    return [("bits", solved_sentence(compression, file)), ("loads", loads)]


def tables(file: CompressionFile, blocks: Mapping[str, BlockEdit]) -> list[Table]:
    """The options by layer, and the plan beside its peers."""
    peers = [peers_table(file.peers)] if file.peers else []
    return [error_table(file, blocks), *peers]


def sweep_table(sweep: CompressionSweep, margin: float = MARGIN) -> Table:
    """The unedited model, and each size."""
    asked, is_text = sweep.asked, sweep.asked.text is not None
    rows: list[list[Cell]] = []
    if sweep.base is not None:
        rows.append(["unedited", edits.unit(sweep.base.bytes, "B"), None, *_scored(sweep.base)])
    for cell in sweep.cells:
        row: list[Cell] = [edits.unit(cell.size, "B"), edits.unit(cell.bytes, "B"), cell.bits]
        rows.append(row + _scored(cell, margin))
    own = "perplexity::.3f; Δ loss::+.4f; 95 % | KL::.4f; same top token::.1%"
    if not is_text:
        own = f"accuracy::.2%; {edits.CHANGE}; verdict | log p right::.4f; median |Δ log p|::.4f"
    quiz = asked.scored.quiz
    note = f"{sweep.n_questions:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots."
    if asked.text is not None:
        note = f"{texts_note(asked.text)}."
    note += (
        f" Options {asked.options} for {asked.loader}, by {asked.by}, one for each {asked.grain}."
    )
    if len(sweep.cells) < len(asked.sizes):
        note += f" {len(sweep.cells)} of {len(asked.sizes)} sizes: the same command does the rest."
    heads = columns(f"at most; size; bits::.2f; {own}")
    return Table(f"Sizes of {asked.scored.model.label}", heads, rows, note)


def _scored(
    model: SweptModel | SweptTexts | CompressionCell | CompressionTextCell, margin: float = MARGIN
) -> list[Cell]:
    if isinstance(model, SweptTexts):
        if not isinstance(model, CompressionTextCell):
            return [model.total.perplexity, *[None] * 4]
        change = model.change
        ends = span(change.ci95, "+.4f")
        return [model.total.perplexity, change.delta_loss, ends, change.kl, change.top1_agreement]
    if not isinstance(model, CompressionCell):
        return [model.accuracy, None, None, model.right_logprob, None]
    change_text, *_ = edits.change_cells(model.change)
    word = verdict(model.change.gained, model.change.lost, model.questions, margin)
    return [
        model.accuracy,
        change_text,
        word,
        model.right_logprob,
        model.median_abs_logprob_diff,
    ]


def sweep_csv(sweep: CompressionSweep) -> Table:
    """A row for each form of the model, in full precision."""
    rows: list[list[Cell]] = []
    if isinstance(sweep.base, SweptTexts):
        rows.append([*[None] * 3, sweep.base.bytes, sweep.base.total.perplexity, *[None] * 4])
    elif sweep.base is not None:
        scored: list[Cell] = [sweep.base.accuracy, sweep.base.right_logprob]
        rows.append([*[None] * 3, sweep.base.bytes, *scored, *[None] * 3])
    for cell in sweep.cells:
        if isinstance(cell, CompressionCell):
            scored = [cell.accuracy, cell.right_logprob, cell.change.delta, *cell.change.ci95]
        else:
            ends = cell.change.ci95 or (None, None)
            scored = [cell.total.perplexity, None, cell.change.delta_loss, *ends]
        rows.append([cell.size, cell.bits, cell.error, cell.bytes, *scored])
    scored_names = "accuracy; right_logprob; delta"
    if sweep.asked.text is not None:
        scored_names = "perplexity; right_logprob; delta_loss"
    heads = columns(f"size; bits; error; bytes; {scored_names}; delta_low; delta_high")
    return Table("compress_sweep", heads, rows)


def sweep_figure(sweep: CompressionSweep) -> dict[str, bytes]:
    """`compress_sweep.png` and `.svg`: accuracy or loss against the size, with paired intervals."""
    cells = sorted(sweep.cells, key=lambda cell: cell.bytes)
    values, ends = [], []
    for cell in cells:
        if isinstance(cell, CompressionCell):
            values.append(100 * cell.change.delta)
            ends.append((100 * cell.change.ci95[0], 100 * cell.change.ci95[1]))
        else:
            values.append(cell.change.delta_loss or 0.0)
            ends.append(cell.change.ci95 or (values[-1], values[-1]))
    sizes = tuple(cell.bytes / 1e6 for cell in cells)
    what = "Δ loss (nats)" if sweep.asked.text is not None else "Δ accuracy (points)"
    series = series_of("against the base", values, ends, sizes)
    return draw_lines("compress_sweep", [series], None, ("size of the weights (MB)", what))


def sweep_facts(sweep: CompressionSweep) -> list[tuple[str, str]]:
    """What judged, and how much of it had a part in the choice."""
    used = sweep.chosen_on.overlap
    had = f"{used:,} of them" if used else "none of them"
    quiz = sweep.asked.scored.quiz
    what = f"{sweep.n_questions:,} {quiz.split} questions of {quiz.id}"
    if sweep.asked.text is not None:
        what = texts_note(sweep.asked.text)
    return [("judged on", f"{what}; {had} measured errors")]
