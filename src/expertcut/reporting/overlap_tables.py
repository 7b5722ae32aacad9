"""Tables of several domains: what each keeps under a cut, and how far their saliencies agree."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from expertcut.edits.domains import Overlap
from expertcut.edits.plan import BlockEdit, PlanBlend
from expertcut.profiling.blend import Blend, BlendRule
from expertcut.profiling.statistics import or_none
from expertcut.profiling.storage import Profile, TextProfile
from expertcut.reporting.edit_tables import traffic_line
from expertcut.reporting.tables import Cell, Column, Table, columns
from expertcut.reporting.views import Shown


def kept_table(blend: PlanBlend, criterion: str) -> Table:
    """What each domain keeps of its saliency in the cut by each rule; the cut is by one of them."""
    rules: tuple[BlendRule, ...] = get_args(BlendRule)
    rules = tuple(rule for rule in rules if all(rule in own.kept for own in blend.profiles))
    rows: list[list[Cell]] = [
        [own.name, own.weight, own.questions, own.tokens, *(own.kept[rule] for rule in rules)]
        for own in blend.profiles
    ]
    heads = (
        *columns("profile; weight::.3f; questions::,d; tokens::,d"),
        *(Column(f"kept by {rule}", ".1%") for rule in rules),
    )
    note = (
        f"Kept: share of a profile's own saliency by {criterion} in the experts that stay, the "
        f"mean over the layers. This cut is by {blend.rule}."
    )
    return Table("What each profile keeps", heads, rows, note if rules else "")


def shown_overlap(overlap: Overlap, by: str, positions: str, n_keep: int) -> Shown:
    """What `show --overlap` prints: pairs of profiles, and what each keeps under each cut."""
    where = f"by {by}, {n_keep} experts per layer"
    return Shown(
        tables=lambda: [_pairs_table(overlap, where), _kept_under_table(overlap, where)],
        flat=lambda: _overlap_csv(overlap),
        json=lambda: overlap_json(overlap, by, positions, n_keep),
    )


def _pairs_table(overlap: Overlap, where: str) -> Table:
    rows: list[list[Cell]] = [
        [a, b, *_summary(overlap.correlations(a, b)), *_summary(overlap.jaccards(a, b))]
        for a, b in overlap.pairs
    ]
    heads = columns(
        "profile; profile; Spearman::+.3f; least::+.3f; most::+.3f; Jaccard::.3f; least::.3f; "
        "most::.3f"
    )
    sizes = [share_DE.shape[1] for share_DE in overlap.shares]
    pairs = zip(sizes, overlap.keep[overlap.names[0]], strict=True)
    chance = float(np.mean([_random_jaccard(n, len(ids)) for n, ids in pairs]))
    note = (
        "Means over the layers, with the least and the largest of a layer. Jaccard: experts that "
        f"the cuts of both keep, of those that either keeps; {chance:.3f} for cuts at random."
    )
    return Table(f"Overlap of saliencies, {where}", heads, rows, note)


def _kept_under_table(overlap: Overlap, where: str) -> Table:
    rows: list[list[Cell]] = [
        [name, *(float(np.mean(overlap.kept(name, cut))) for cut in overlap.names)]
        for name in overlap.names
    ]
    heads = (Column("profile"), *(Column(f"cut by {name}", ".1%") for name in overlap.names))
    note = "Share of a profile's own saliency that stays, the mean over the layers."
    return Table(f"What each profile keeps under each cut, {where}", heads, rows, note)


def _overlap_csv(overlap: Overlap) -> Table:
    """One row for each two profiles and layer."""
    rows: list[list[Cell]] = [
        [a, b, layer, or_none(rho), *numbers]
        for a, b in overlap.pairs
        for layer, (rho, *numbers) in enumerate(
            zip(
                overlap.correlations(a, b),
                overlap.jaccards(a, b),
                *(overlap.kept(name, cut) for cut in (a, b) for name in (a, b)),
                strict=True,
            )
        )
    ]
    kept = "; ".join(f"{name}_kept_by_{cut}" for cut in "ab" for name in "ab")
    return Table("overlap", columns(f"a; b; layer; spearman; jaccard; {kept}"), rows)


def overlap_json(overlap: Overlap, by: str, positions: str, n_keep: int) -> dict[str, Any]:
    """The means over the layers, and each layer's values."""
    return {
        "by": by,
        "positions": positions,
        "keep": n_keep,
        "profiles": list(overlap.names),
        "pairs": [
            {
                "profiles": [a, b],
                "spearman": _summary(rhos := overlap.correlations(a, b))[0],
                "jaccard": float(np.mean(jaccards := overlap.jaccards(a, b))),
                "layers": [
                    {"spearman": or_none(rho), "jaccard": own}
                    for rho, own in zip(rhos, jaccards, strict=True)
                ],
            }
            for a, b in overlap.pairs
        ],
        "kept": [
            {
                "profile": name,
                "cut": cut,
                "share": float(np.mean(kept := overlap.kept(name, cut))),
                "layers": kept,
            }
            for name in overlap.names
            for cut in overlap.names
        ],
    }


def _summary(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Mean, least and largest of the layers that have a value."""
    defined = [value for value in values if not np.isnan(value)]
    return (float(np.mean(defined)), min(defined), max(defined)) if defined else (None, None, None)


def _random_jaccard(n_experts: int, n_keep: int) -> float:
    """The mean Jaccard index of two random sets of `n_keep` experts."""
    from scipy.stats import hypergeom  # slow import

    both_X = np.arange(n_keep + 1)
    share_X = hypergeom.pmf(both_X, n_experts, n_keep, n_keep)
    return float((share_X * both_X / (2 * n_keep - both_X)).sum())


def traffic_lines(profile: Profile, edits: Mapping[str, BlockEdit], experts: str) -> list[str]:
    """What removed experts had in the profile, in each of a blend, or in each source of texts."""
    domains: dict[str, Profile] = {}
    if isinstance(profile, Blend):
        domains = dict(zip(profile.names, profile.parts, strict=True))
    elif isinstance(profile, TextProfile):
        domains = profile.by_source()
    if len(domains) < 2:
        return [traffic_line(profile, edits, experts)]
    return [traffic_line(part, edits, f"{experts}, in {name},") for name, part in domains.items()]
