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
        text = f"KL {change.kl:.4f}, top-1 agreement {100 * change.top1_agreement:.1f} %, "
        text += f"acceptance {100 * change.acceptance:.1f} %, against {change.against}"
        lines.append(labelled("distance", text))
    return lines


def behind(ends: Ends, spec: str) -> str:
    """The interval in brackets; nothing without one."""
    return f" ({span(ends, spec)})" if ends else ""
