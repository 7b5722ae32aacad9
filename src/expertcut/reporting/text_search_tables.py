"""Tables, sentences and figures of sweeps and audits that texts judge."""

from collections.abc import Iterator, Sequence

from expertcut.evaluation.results import JudgedTexts, TextComparison, TextResult
from expertcut.evaluation.search_results import Audit, Sweep, SweptTexts, TextCell
from expertcut.reporting import edit_tables as edits
from expertcut.reporting.plots import Curves, Series, draw_lines, series_of
from expertcut.reporting.tables import Cell, Column, Table, columns, signed
from expertcut.reporting.text_tables import behind, is_bound, judged_note, lost_text, span

ALL = "all"
_FIGURES = "loss_low; loss_high; kl; kl_low; kl_high; top1_agreement; acceptance"


def texts_note(asked: JudgedTexts) -> str:
    """How many documents are read, and of what."""
    n = sum(source.documents for source in asked.sources.values())
    return f"{n:,} documents of {', '.join(asked.sources)}"


def _asked(sweep: Sweep) -> JudgedTexts:
    assert sweep.asked.text is not None, "a sweep of texts"
    return sweep.asked.text


def _base(sweep: Sweep) -> SweptTexts | None:
    return sweep.base if isinstance(sweep.base, SweptTexts) else None


def _parts(
    model: SweptTexts, cell: TextCell | None
) -> Iterator[tuple[str, TextResult, TextComparison | None]]:
    """All documents in one, then each source if there are several, with their changes."""
    yield ALL, model.total, cell.change if cell else None
    for source, found in model.text.items() if len(model.text) > 1 else ():
        yield source, found, cell.changes[source] if cell else None


def sweep_table(sweep: Sweep) -> Table:
    """The unedited model and every finished cell, on all documents and on each source."""
    rows: list[list[Cell]] = []
    forms: list[tuple[str, SweptTexts, TextCell | None]] = []
    if (base := _base(sweep)) is not None:
        forms.append(("unedited", base, None))
    forms += [(f"{cell.by} {cell.fraction:g}", cell, cell) for cell in sweep.of_texts]
    for name, model, cell in forms:
        for source, found, c in _parts(model, cell):
            row: list[Cell] = [name if source == ALL else f"  {source}"]
            row += [edits.unit(model.bytes, "B") if source == ALL else None, found.perplexity]
            row += [c.delta_loss, span(c.ci95, "+.3f"), c.kl] if c else [None] * 3
            row += [c.top1_agreement, c.acceptance] if c else [None] * 2
            row += [span(c.kl_ci95, ".4f") if c else None, found.tokens, found.documents]
            rows.append([*row, cell.kept if cell else None, model.parameters])
    heads = columns(
        "criterion, share; size; perplexity::.3f; Δ loss::+.3f; 95 % interval of Δ; KL::.3f | "
        "same top token::.1%; acceptance::.1%; interval of KL; tokens::,d; documents::,d; "
        "kept a layer; parameters::,d"
    )
    request = sweep.asked
    note = f"{texts_note(_asked(sweep))}, layout {request.layout}. {judged_note(_asked(sweep))}"
    n_cells = len(request.by) * len(request.fractions)
    if not sweep.is_complete:
        note += f" {len(sweep.cells)} of {n_cells} cells: the same command does the rest."
    return Table(f"Sweep of {request.scored.model.label}", heads, rows, note)


def sweep_csv(sweep: Sweep) -> Table:
    """One row per form of the model and source, in full precision; `all` is all documents."""
    rows: list[list[Cell]] = []
    base = _base(sweep)
    forms = [*([(None, base)] if base else []), *((cell, cell) for cell in sweep.of_texts)]
    for cell, model in forms:
        named: list[Cell] = [cell.by, cell.fraction, cell.kept] if cell else [None] * 3
        for source, found, c in _parts(model, cell):
            row: list[Cell] = [*named, source, found.documents, found.tokens, found.perplexity]
            row += [found.bits_per_byte, *_changes(c)]
            rows.append([*row, model.parameters, model.active_parameters, model.bytes])
    heads = (
        "by; fraction; kept; text; documents; tokens; perplexity; bits_per_byte; delta_loss; "
        f"{_FIGURES}; parameters; active_parameters; bytes"
    )
    return Table("sweep", columns(heads), rows)


def _changes(c: TextComparison | None) -> list[Cell]:
    if c is None:
        return [None] * 8
    nothing = (None, None)
    changed: list[Cell] = [c.delta_loss, *(c.ci95 or nothing), c.kl, *(c.kl_ci95 or nothing)]
    return [*changed, c.top1_agreement, c.acceptance]


def leak_sentence(n_documents: int, n_used: int) -> str:
    """Whether documents that judge had a part in the choice."""
    if not n_used:
        return f"None of the {n_documents:,} documents read here had a part in the choice."
    return (
        f"{n_used:,} of the {n_documents:,} documents read here were used to choose the experts, "
        "so this flatters the cuts."
    )


def sweep_sentences(sweep: Sweep) -> list[str]:
    """Leakage, and for each share the cut that loses least and those that it does not beat."""
    n = sum(source.documents for source in _asked(sweep).sources.values())
    leak = leak_sentence(n, sweep.chosen_on.overlap)
    return [leak, *(_best_cell(share, sweep) for share in sweep.asked.fractions)]


def _best_cell(fraction: float, sweep: Sweep) -> str:
    best = next((b for b in sweep.text or () if b.fraction == fraction), None)
    cell = best and sweep.cell(best.by, fraction)
    base = _base(sweep)
    if best is None or base is None or not isinstance(cell, TextCell):
        return f"At {fraction:g} no cell is finished."
    lost = lost_text(base.total, cell.total, cell.change, is_bound(_asked(sweep)))
    text = f"At {fraction:g} of the experts {cell.by} "
    text += f"loses least: {lost}" if best.behind else f"has {lost}"
    if len(cell.changes) > 1:
        own = [f"{name} {signed(c.delta_loss or 0, '+.4f')}" for name, c in cell.changes.items()]
        text += f"; by text {', '.join(own)}"
    if cell.change.ci95 is None:
        text += "; too few documents for intervals"
    if not best.behind:
        return f"{text}."
    worse = [by for by in best.behind if by not in best.ties]
    text += f"; shown to lose more: {', '.join(worse) or 'none'}"
    if best.ties:
        text += f"; not told apart from it: {', '.join(best.ties)}"
        text += f", so chance flatters the best of {len(best.behind) + 1} criteria"
    return f"{text}."


def to_prune(sweep: Sweep) -> TextCell:
    """The smallest cut without a significant change, else the one that loses least."""
    cells = sweep.of_texts
    held = [c for c in cells if c.change.ci95 and c.change.ci95[0] <= 0 <= c.change.ci95[1]]
    if held:
        return min(held, key=lambda c: (c.bytes, c.delta_loss))
    return min(cells, key=lambda c: c.delta_loss)


def losses(name: str, cells: Sequence[TextCell | None], x: tuple[float, ...] = ()) -> Series:
    """Δ loss on all documents with its interval, one value each."""
    ends = [(None, None) if c is None else c.change.ci95 or (None, None) for c in cells]
    return series_of(name, [None if c is None else c.delta_loss for c in cells], ends, x)


def sweep_figure(sweep: Sweep) -> dict[str, bytes]:
    """`sweep.png` and `sweep.svg`: Δ loss against the size of the weights, with intervals."""
    cells = sorted(sweep.of_texts, key=lambda cell: cell.bytes)
    series = []
    for by in sweep.asked.by:
        own = [cell for cell in cells if cell.by == by]
        exact = [cell.change.ci95 or (cell.delta_loss, cell.delta_loss) for cell in own]
        x = tuple(cell.bytes / 1e6 for cell in own)
        series.append(series_of(by, [cell.delta_loss for cell in own], exact, x))
    base = None
    if (unedited := _base(sweep)) is not None:
        base = series_of("unedited", [0.0], [(0.0, 0.0)], (unedited.bytes / 1e6,))
    return draw_lines("sweep", series, base, ("size of the weights (MB)", "Δ loss (nats a token)"))


def sweep_curves(sweep: Sweep, key: str) -> Curves:
    """Δ loss on all documents against the share of experts that stays."""
    fractions = sorted(sweep.asked.fractions, reverse=True)
    cells = {(c.by, c.fraction): c for c in sweep.of_texts}
    series = [losses(by, [cells.get((by, f)) for f in fractions]) for by in sweep.asked.by]
    return Curves(
        key=f"{key}-loss",
        title="Loss against the share of experts that stays",
        note="Bars are 95 % intervals, by a paired bootstrap over documents; the unedited model "
        "is at 0.",
        across="share that stays",
        categories=tuple(f"{fraction:g}" for fraction in fractions),
        series=tuple(series),
        column=Column("Δ loss, nats a token", "+.3f"),
        zero=0.0,
    )


# Audits


def effects_table(audit: Audit) -> Table:
    """The ten experts whose ablation costs most, on all documents and on each source."""
    asked = audit.asked.text
    assert asked is not None, "an audit on texts"
    several = list(asked.sources) if len(asked.sources) > 1 else []
    rows: list[list[Cell]] = []
    for effect in sorted(audit.of_texts, key=lambda effect: -effect.logprob)[:10]:
        row: list[Cell] = [effect.layer, effect.expert, effect.logprob, effect.stderr]
        row += [effect.text[source].delta_loss for source in several]
        row += [100 * effect.accuracy, *_divergences(list(effect.text.values()))]
        rows.append(row)
    heads = "layer; expert; Δ loss::+.4f; ± standard error::.4f"
    heads += "".join(f"; on {source}::+.4f" for source in several)
    heads += " | next tokens lost, %::+.2f; largest KL::.4f; least same top token::.1%"
    note = (
        f"{len(audit.harms)} of {len(audit.sampled)} sampled experts removed one at a time (layout "
        f"{audit.asked.layout}); {texts_note(asked)}; unedited loss {-audit.right_logprob:.4f} "
        f"nats per token, next token right {audit.accuracy:.2%}. Standard errors are over "
        "documents."
    )
    if not audit.is_complete:
        note += " The same command does the rest."
    title = f"Audit of {audit.asked.model.label}: what removing one expert does"
    return Table(title, columns(heads), rows, note)


def _divergences(changes: Sequence[TextComparison]) -> list[Cell]:
    """Of several sources the largest KL and the least agreement."""
    return [max(c.kl or 0.0 for c in changes), min(c.top1_agreement or 0.0 for c in changes)]


def audit_csv(audit: Audit) -> Table:
    """One row per ablated expert and source, with its score by every criterion."""
    rows: list[list[Cell]] = []
    for i, effect in enumerate(audit.of_texts):
        scores = [ranks.score[i] for ranks in audit.standings.values()]
        head: list[Cell] = [effect.layer, effect.expert, effect.logprob, effect.stderr]
        head.append(effect.accuracy)
        rows += [
            [*head, source, *_changes(change), *scores] for source, change in effect.text.items()
        ]
    heads = columns(
        f"layer; expert; loss_logprob; stderr; loss_accuracy; text; delta_loss; {_FIGURES}"
    )
    return Table("audit", (*heads, *map(Column, audit.standings)), rows)


def ablated_sentence(audit: Audit) -> str:
    """What the ablations did."""
    effects = audit.of_texts
    worst = max(effects, key=lambda effect: effect.logprob)
    n_worse = sum(effect.logprob > 1.96 * effect.stderr for effect in effects)
    n_better = sum(effect.logprob < -1.96 * effect.stderr for effect in effects)
    text = (
        f"{len(effects)} experts, one at a time (layout {audit.asked.layout}); without one the "
        f"loss rises in {n_worse} cases and falls in {n_better}, each beyond 1.96 standard errors"
        f"; most harm without {worst.layer}:{worst.expert}, {worst.logprob:.4f} nats per token"
    )
    if len(worst.text) > 1:
        own = [
            f"{name} {signed(c.delta_loss or 0, '+.4f')}{behind(c.ci95, '+.4f')}"
            for name, c in worst.text.items()
        ]
        text += f": {', '.join(own)}"
    return text
