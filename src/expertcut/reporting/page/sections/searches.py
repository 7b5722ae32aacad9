"""What was tried without writing it: sweeps of cuts, audits of single experts."""

from expertcut.evaluation.search_results import Audit, Sweep
from expertcut.reporting.audits import audit_sentences, audit_tables, ranked
from expertcut.reporting.page.figures import Curves, Series
from expertcut.reporting.page.gathering import Run
from expertcut.reporting.page.parts import Part, Section, Text, key_of
from expertcut.reporting.sweeps import sweep_sentences, sweep_table
from expertcut.reporting.tables import Column


def search_sections(run: Run) -> list[Section]:
    """One for each sweep and each audit."""
    sections: list[Section] = []
    for sweep in run.sweeps:
        key = key_of(f"sweep-{sweep.name}", [section.key for section in sections])
        sections.append(Section(key, f"Sweep: {sweep.name}", _sweep_parts(sweep.its, key)))
    for audit in run.audits:
        key = key_of(f"audit-{audit.name}", [section.key for section in sections])
        sections.append(Section(key, f"Audit: {audit.name}", _audit_parts(audit.its, key)))
    return sections


def _sweep_parts(found: Sweep, key: str) -> list[Part]:
    parts: list[Part] = [*map(Text, sweep_sentences(found)), sweep_table(found)]
    return [*parts, _cuts(found, key)] if found.cells else parts


def _cuts(found: Sweep, key: str) -> Curves:
    """Accuracy against the share of experts that stays, a series for each criterion."""
    fractions = sorted(found.asked.fractions, reverse=True)
    series = []
    for by in found.asked.by:
        cells = [found.cell(by, fraction) for fraction in fractions]
        series.append(
            Series(
                by,
                tuple(None if cell is None else cell.accuracy for cell in cells),
                tuple(None if cell is None else cell.ci95[0] for cell in cells),
                tuple(None if cell is None else cell.ci95[1] for cell in cells),
            )
        )
    if found.base is not None:
        level = (found.base.accuracy,) * len(fractions)
        series.append(Series("unedited", level, is_reference=True))
    return Curves(
        key=f"{key}-accuracy",
        title="Accuracy against the share of experts that stays",
        note="Bars are 95 % intervals (Wilson); the questions are the same for every cut.",
        across="share that stays",
        categories=tuple(f"{fraction:g}" for fraction in fractions),
        series=tuple(series),
        column=Column("accuracy", ".1%"),
    )


def _audit_parts(found: Audit, key: str) -> list[Part]:
    tables: list[Part] = list(audit_tables(found))
    if not found.verdicts:
        return tables
    return [*map(Text, audit_sentences(found)), *tables, _correlations(found, key),
            _regrets(found, key)]  # fmt: skip


def _correlations(found: Audit, key: str) -> Curves:
    order = ranked(found)
    ends = [verdict.within.ci95 or (None, None) for verdict in order]
    its = Series(
        "ρ within layers",
        tuple(verdict.within.rho for verdict in order),
        tuple(low for low, _ in ends),
        tuple(high for _, high in ends),
    )
    return Curves(
        key=f"{key}-correlations",
        title="How well each criterion foretold the harm",
        note="Spearman's ρ of score and harm within layers, with 95 % intervals.",
        across="criterion",
        categories=tuple(verdict.by for verdict in order),
        series=(its,),
        column=Column("ρ", "+.2f"),
        is_flat=True,
        zero=0.0,
    )


def _regrets(found: Audit, key: str) -> Curves:
    order = ranked(found)
    return Curves(
        key=f"{key}-regrets",
        title="Regret of each criterion",
        note="How much more mean log p its removals cost, one by one, than the least harmful.",
        across="criterion",
        categories=tuple(verdict.by for verdict in order),
        series=tuple(
            Series(f"{fraction:g} kept", tuple(verdict.regrets[i].regret for verdict in order))
            for i, fraction in enumerate(found.asked.fractions)
        ),
        column=Column("regret, nats", ".3f"),
        is_flat=True,
        zero=0.0,
    )
