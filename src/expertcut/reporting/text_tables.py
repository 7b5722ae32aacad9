"""Tables and sentences of models judged on texts."""

import math
from collections.abc import Iterator, Sequence

from expertcut.evaluation.results import JudgedTexts, Results, TextComparison, TextResult
from expertcut.reporting.tables import Cell, Table, columns, labelled, signed
from expertcut.stats import TextChange

Ends = tuple[float, float] | None


def _judged(
    results: Results,
) -> Iterator[tuple[int, str, TextResult, TextComparison | None]]:
    """Source by source, every model by index with its comparison, None of the base."""
    compared = {c.other: c.text or {} for c in results.comparisons}
    for source in results.models[0].text or {}:
        for index, model in enumerate(results.models):
            if found := (model.text or {}).get(source):
                yield index, source, found, compared.get(index, {}).get(source)


def judged_tables(results: Results, names: Sequence[str]) -> list[Table]:
    """One row per source and model, compared with the first; no table without texts."""
    rows: list[list[Cell]] = []
    for index, source, found, c in _judged(results):
        row: list[Cell] = [source, names[index], found.perplexity]
        row += [c.delta_loss, span(c.ci95, "+.3f"), c.kl] if c else [None] * 3
        row += [found.bits_per_byte, span(found.ci95, ".3f"), found.tokens, found.documents]
        if c is None:
            rows.append([*row, *[None] * 6])
            continue
        row += [span(c.kl_ci95, ".4f"), c.top1_agreement, span(c.top1_agreement_ci95, ".1%")]
        row += [c.acceptance, span(c.acceptance_ci95, ".1%"), c.delta_bits_per_byte]
        rows.append(row)
    heads = columns(
        "text; model; perplexity::.3f; Δ loss::+.3f; 95 % interval of Δ; KL::.3f | "
        "bits per byte::.4f; interval of perplexity; tokens::,d; documents::,d; interval of KL; "
        "same top token::.1%; interval of it; acceptance::.1%; interval of acceptance; "
        "Δ bits per byte::+.4f"
    )
    return [Table("Texts", heads, rows, judged_note(results.text))] if rows else []


def judged_note(asked: JudgedTexts | None) -> str:
    """What the figures of texts mean."""
    text = (
        "Δ loss is in nats per token, KL is that of the base and the model, in nats per token. "
        "Intervals are those of 95 %, by a paired bootstrap over documents."
    )
    if asked is not None and asked.top_k is not None and asked.top_k < asked.vocabulary:
        text += (
            f" All but the base's {asked.top_k:,} likeliest tokens count as one: the KL is a lower "
            "bound, the acceptance an upper one."
        )
    return text


def judged_rows(results: Results) -> list[list[Cell]]:
    """One row per source, model and figure, in the columns of `task_tables.FLAT`.

    The base's own KL is 0, its agreement and acceptance are 1, so each of them has a change too.
    """
    rows: list[list[Cell]] = []
    for index, source, found, c in _judged(results):
        head: list[Cell] = [results.models[index].path, "text", source]
        loss = math.log(found.perplexity)
        changes: dict[str, tuple[float, float | None, Ends]] = {
            "perplexity": (found.perplexity, None, None),
            "loss": (loss, c.delta_loss if c else None, c.ci95 if c else None),
            "bits_per_byte": (
                found.bits_per_byte,
                c.delta_bits_per_byte if c else None,
                c.delta_bits_per_byte_ci95 if c else None,
            ),
        }
        if c and c.kl is not None and c.top1_agreement is not None and c.acceptance is not None:
            changes["kl"] = c.kl, c.kl, c.kl_ci95
            for name, own, ends in (
                ("top1_agreement", c.top1_agreement, c.top1_agreement_ci95),
                ("acceptance", c.acceptance, c.acceptance_ci95),
            ):
                changes[name] = own, own - 1, ends and (ends[0] - 1, ends[1] - 1)
        for metric, (value, delta, ends) in changes.items():
            change: list[Cell] = [delta, *(ends or (None, None))]
            rows.append([*head, metric, value, None, found.documents, *change, *[None] * 7])
    return rows


def judged_facts(results: Results, names: Sequence[str]) -> list[tuple[str, str]]:
    """What each model lost on each source; of a single model its perplexity."""
    facts = []
    for index, source, found, c in _judged(results):
        n = f"{found.tokens:,} tokens in {found.documents:,} document"
        n += "s" if found.documents > 1 else ""
        n += "" if found.ci95 else ", too few for intervals"
        if c is None and len(results.models) == 1:
            text = f"{found.perplexity:.3f}{behind(found.ci95, '.3f')}"
            text = f"{source}: perplexity {text}, {found.bits_per_byte:.4f} bits per byte, on {n}"
            facts.append(("text", text))
        elif c is not None:
            base = (results.models[0].text or {})[source]
            lost = lost_text(base, found, c, is_bound(results.text))
            facts.append(("text", f"{source}: {names[index]} {lost}, on {n}"))
    return facts


def is_bound(asked: JudgedTexts | None) -> bool:
    """Whether KL and acceptance are bounds, because few of the base's tokens are kept."""
    return asked is not None and asked.top_k is not None and asked.top_k < asked.vocabulary


def lost_text(base: TextResult, found: TextResult, c: TextComparison, has_bounds: bool) -> str:
    """A sentence with the changes and their intervals."""
    perplexities = f"perplexity {base.perplexity:.3f} → {found.perplexity:.3f}"
    if c.delta_loss is None or c.kl is None:
        text = f"reads other tokens than the base: bits per byte {base.bits_per_byte:.4f} → "
        text += f"{found.bits_per_byte:.4f}"
        if c.delta_bits_per_byte is None:
            return text
        delta = signed(c.delta_bits_per_byte, "+.4f")
        return f"{text}, {delta}{behind(c.delta_bits_per_byte_ci95, '+.4f')}"
    loss = f"loss {signed(c.delta_loss, '+.4f')} nats per token"
    loss += behind(c.ci95, "+.4f").replace("(", "(95 % interval ")
    if c.ci95 and c.ci95[0] <= 0 <= c.ci95[1]:
        loss += ", no significant change"
    ratio = math.exp(min(c.delta_loss, 700.0))
    text = f"{loss}, {perplexities} (× {ratio:.3f}); KL {'≥ ' if has_bounds else ''}{c.kl:.4f}"
    text += f"{behind(c.kl_ci95, '.4f')}, same top token {c.top1_agreement:.1%}"
    text += f"{behind(c.top1_agreement_ci95, '.1%')}, acceptance "
    return f"{text}{'≤ ' if has_bounds else ''}{c.acceptance:.1%}{behind(c.acceptance_ci95, '.1%')}"


def span(ends: Ends, spec: str) -> str | None:
    """An interval; None without one."""
    return None if ends is None else " … ".join(signed(end, spec) for end in ends)


def text_change_lines(changes: Sequence[TextChange]) -> list[str]:
    """Perplexity and distance on held-out texts, against the first base that was compared with."""
    lines = []
    for change in (c for c in changes if c.against == changes[0].against):
        text = f"perplexity {change.perplexity:.3f}, was {change.base_perplexity:.3f} on "
        text += f"{change.tokens:,} held-out tokens in {change.documents:,} documents of "
        text += f"{change.source}: loss {signed(change.delta_loss, '+.4f')} nats per token"
        lines.append(labelled("predicts", f"{text}{behind(change.ci95, '+.4f')}"))
        least, most = ("≥ ", "≤ ") if change.has_bounds else ("", "")
        text = f"KL {least}{change.kl:.4f}, same top token {100 * change.top1_agreement:.1f} %, "
        text += f"acceptance {most}{100 * change.acceptance:.1f} %, against {change.against}"
        lines.append(labelled("distance", text))
    return lines


def behind(ends: Ends, spec: str) -> str:
    """The interval in brackets; nothing without one."""
    return f" ({span(ends, spec)})" if ends else ""


def text_findings(results: Results, names: Sequence[str]) -> list[tuple[int, str, str]]:
    """What a model, by index, lost on each source in plain words, and the figures behind."""
    findings = []
    for index, source, found, c in _judged(results):
        if c is not None:
            base = (results.models[0].text or {})[source]
            figures = f"{names[index]} against {names[0]}: "
            figures += lost_text(base, found, c, is_bound(results.text))
            findings.append((index, _in_words(source, c.delta_loss, c.ci95), figures))
        elif len(results.models) == 1:
            findings.append((index, f"perplexity {found.perplexity:.3f} on {source}", names[0]))
    return findings


def _in_words(source: str, delta_loss: float | None, ends: Ends) -> str:
    """How much the perplexity rose: exp of the change of the loss, and of its ends."""
    if delta_loss is None:
        return f"reads {source} in other tokens than the base"
    text = f"perplexity on {source} {_ratio(delta_loss)}"
    if ends is None:
        return f"{text}, too few documents for an interval"
    text += f" ({_ratio(ends[0])} … {_ratio(ends[1])})"
    return f"{text}, no significant change" if ends[0] <= 0 <= ends[1] else text


def _ratio(delta_loss: float) -> str:
    return f"{signed(100 * math.expm1(min(delta_loss, 700.0)), '+.1f')} %"


def held_out_finding(changes: Sequence[TextChange]) -> str:
    """The same of a checkpoint's held-out documents, against its base."""
    against = [c for c in changes if c.against == changes[0].against]
    words = "; ".join(_in_words(c.source, c.delta_loss, c.ci95) for c in against)
    return f"{words}, on {sum(c.documents for c in against):,} held-out documents"


def held_out_table(changes: Sequence[TextChange]) -> Table:
    """One row per source and base of the held-out check on texts."""
    rows: list[list[Cell]] = [
        [
            *(c.source, c.against, c.base_perplexity, c.perplexity, c.delta_loss),
            *(span(c.ci95, "+.4f"), c.kl, c.top1_agreement, c.acceptance, c.documents, c.tokens),
        ]
        for c in changes
    ]
    heads = columns(
        "text; against; its perplexity::.3f; perplexity::.3f; Δ loss::+.4f; 95 % interval; "
        "KL::.4f | same top token::.1%; acceptance::.1%; documents::,d; tokens::,d"
    )
    note = (
        "Δ loss and KL are in nats per token. Of the base's tokens the likeliest count one by one, "
        "the others as one: where there are others, KL is a lower bound and acceptance an upper."
    )
    return Table("Held-out documents", heads, rows, note)


def checked_sentences(asked: JudgedTexts | None) -> list[str]:
    """Which documents were read, and how many were left out for a part in an edit."""
    return [
        f"{name}: {source.documents:,} documents, none of which chose, tuned or trained a model "
        f"({source.dropped:,} left out, by hash and by runs of 13 words)"
        for name, source in (asked.sources if asked else {}).items()
    ]
