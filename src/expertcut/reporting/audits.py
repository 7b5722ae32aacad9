"""Audits: which criterion foretold the harm of removing an expert, in tables, words, a figure."""

from expertcut.evaluation.search_results import Audit, Correlation, Verdict
from expertcut.reporting.figures import Point, Series, forests
from expertcut.reporting.profiles import cut_text
from expertcut.reporting.tables import Cell, Column, Table


def audit_tables(found: Audit) -> list[Table]:
    """The criteria, and the experts whose removal did most."""
    return [*([verdict_table(found)] if found.verdicts else []), harm_table(found)]


def verdict_table(found: Audit) -> Table:
    """One row per criterion, the best correlation first."""
    rows: list[list[Cell]] = []
    for its in ranked(found):
        regrets: list[Cell] = [r.regret for r in its.regrets]
        rows.append(
            [
                its.by,
                *_correlation(its.within),
                *_correlation(its.overall),
                *_correlation(its.within_accuracy),
                *regrets,
            ]
        )
    columns = (
        Column("criterion"),
        *(Column("ρ within layers", "+.2f"), Column("95 % interval")),
        *(Column("ρ over all", "+.2f"), Column("95 % interval")),
        *(Column("ρ with accuracy", "+.2f"), Column("95 % interval")),
        *(Column(f"regret at {f:g}", ".4f") for f in found.asked.fractions),
    )
    expected = ", ".join(
        f"{r.random - r.least:.4f} at {r.fraction:g}" for r in found.verdicts[0].regrets
    )
    note = (
        "ρ is Spearman's between score and harm: +1 where the criterion removes the least harmful "
        "experts first. Regret is in nats of mean log p, as a sum of single harms; removing at "
        f"random costs {expected} on average."
    )
    return Table(f"Audit of {found.asked.model.label}: the criteria", columns, rows, note)


def harm_table(found: Audit, most: int = 10) -> Table:
    """The experts whose removal did most."""
    harms = sorted(found.harms, key=lambda harm: -harm.logprob)[:most]
    rows: list[list[Cell]] = [
        [h.layer, h.expert, h.logprob, h.stderr, h.accuracy, h.gained, h.lost, h.mcnemar_p]
        for h in harms
    ]
    columns = (
        Column("layer"),
        Column("expert"),
        Column("loss of log p", "+.4f"),
        Column("± standard error", ".4f"),
        Column("loss of accuracy", "+.2%"),
        Column("gained"),
        Column("lost"),
        Column("McNemar p", ".3g"),
    )
    asked = found.asked
    note = (
        f"{len(found.harms)} of {len(found.sampled)} sampled experts removed one at a time (layout "
        f"{asked.layout}); {asked.questions:,} {asked.split} questions of {asked.quiz} at "
        f"{asked.shots} shots{cut_text(found.cut)}, unedited accuracy {found.accuracy:.2%}."
    )
    if not found.is_complete:
        note += " The same command does the rest."
    return Table(
        f"Audit of {asked.model.label}: what removing one expert does", columns, rows, note
    )


def audit_csv(found: Audit) -> Table:
    """One row per removed expert, with what every criterion said of it."""
    names = [
        *("layer", "expert", "loss_logprob", "stderr", "loss_accuracy", "gained", "lost"),
        *("mcnemar_p", "largest_abs_logprob_diff", *found.standings),
    ]
    rows: list[list[Cell]] = [
        [
            *(h.layer, h.expert, h.logprob, h.stderr, h.accuracy, h.gained, h.lost),
            *(h.mcnemar_p, h.largest, *(its.score[i] for its in found.standings.values())),
        ]
        for i, h in enumerate(found.harms)
    ]
    return Table("audit", tuple(map(Column, names)), rows)


def audit_sentences(found: Audit) -> list[str]:
    """What the questions are worth, and which criterion to trust."""
    asked = found.asked
    if found.overlap:
        leak = (
            f"{found.overlap:,} of the {asked.questions:,} questions that were asked had been "
            "profiled, calibrated or cut on, so they are not held out: criteria that look at them "
            "are flattered."
        )
    else:
        which = f"{asked.questions:,} held-out questions ({asked.split})"
        leak = f"None of the {which} had a part in scoring the experts."
    first = ranked(found)[0]
    if first.within.rho is None:
        return [leak, "No rank correlation is defined: sample more experts."]
    clear = [v.by for v in ranked(found) if v.within.is_clear]
    best = f"the best is {first.by} (ρ = {first.within.rho:+.2f} within layers)"
    told = "No criterion clearly orders these experts by their harm"
    if clear:
        told = f"These order experts by their harm beyond chance: {', '.join(clear)}"
    return [leak, f"{told}; {best}.", f"Least regret: {_least_regrets(found)}."]


def _least_regrets(found: Audit) -> str:
    """At each budget the criterion whose removals do least harm, and what chance would do."""
    parts, n_sampled = [], len(found.harms)
    for i, fraction in enumerate(found.asked.fractions):
        least = min(v.regrets[i].regret for v in found.verdicts)
        best = [v.by for v in found.verdicts if v.regrets[i].regret <= least + 1e-12]
        its = found.verdicts[0].regrets[i]
        if its.removed in (0, n_sampled):
            parts.append(f"at {fraction:g} {'all' if its.removed else 'none'} of the sample go")
            continue
        names = "all alike" if len(best) == len(found.verdicts) > 1 else " and ".join(best)
        parts.append(
            f"at {fraction:g} {names} ({least:.4f}, at random {its.random - its.least:.4f})"
        )
    return ", ".join(parts)


def audit_figure(found: Audit) -> dict[str, bytes]:
    """`audit.png` and `audit.svg`: correlations with their intervals, and regrets."""
    order = ranked(found)
    rhos = [Series(v.by, [_point(v.within)] if v.within.rho is not None else []) for v in order]
    regrets, marks = [], []
    for i, fraction in enumerate(found.asked.fractions):
        its = [v.regrets[i] for v in order]
        values = [Point(r.regret, 0, r.regret, r.regret) for r in its]
        regrets.append(Series(f"{fraction:g} kept", values))
        marks.append(its[0].random - its[0].least)
    left = "Spearman's ρ of score and harm, within layers"
    right = "regret (nats); dotted: at random"
    return forests("audit", (left, rhos), (right, regrets), marks)


def ranked(found: Audit) -> list[Verdict]:
    """The best correlation within layers first, undefined ones last."""
    rho = {v.by: -2.0 if v.within.rho is None else v.within.rho for v in found.verdicts}
    return sorted(found.verdicts, key=lambda v: -rho[v.by])


def _point(found: Correlation) -> Point:
    assert found.rho is not None
    low, high = found.ci95 or (found.rho, found.rho)
    return Point(found.rho, 0, min(low, found.rho), max(high, found.rho))


def _correlation(found: Correlation) -> list[Cell]:
    interval = None if found.ci95 is None else f"{found.ci95[0]:+.2f} … {found.ci95[1]:+.2f}"
    return [found.rho, interval]
