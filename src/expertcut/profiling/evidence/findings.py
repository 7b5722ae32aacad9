"""All that a profile says, and how sure one can be of it: what `show` prints."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from expertcut.profiling.evidence.by_subject import SubjectCounts, count_by_subject, subjects_json
from expertcut.profiling.evidence.margins import Margin, margin_json, margins
from expertcut.profiling.evidence.perturbations import perturbations_json
from expertcut.profiling.evidence.significance import (
    PERMUTATIONS,
    Significance,
    significance,
    wilson,
)
from expertcut.profiling.statistics import (
    LayerStatistics,
    answers,
    as_json,
    expert_json,
    layer_json,
    layer_statistics,
    or_none,
)
from expertcut.profiling.store import Profile

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Findings:
    """The paper's statistics with what tells them from chance; `places` is (layer, expert) of X."""

    profile: Profile
    layers: list[LayerStatistics]
    margins: list[Margin]
    counts: SubjectCounts
    significance: Significance
    places: list[tuple[int, int]]
    perturbations: list[dict[str, Any]]


def find(profile: Profile, permutations: int = PERMUTATIONS, seed: int = 0) -> Findings:
    """Everything, computed once.

    Raises:
        ProfileError: the profile is unfinished, damaged, or holds answers alone.
    """
    layers = layer_statistics(profile)
    is_correct_N = answers(profile).is_correct_N
    is_activated_NX = np.concatenate([layer.is_activated_NE for layer in layers], axis=1)
    found = margins(profile)
    counts = count_by_subject(profile.subjects(), is_correct_N, is_activated_NX)
    return Findings(
        profile=profile,
        layers=layers,
        margins=found,
        counts=counts,
        significance=significance(counts, is_correct_N, is_activated_NX, permutations, seed),
        places=[(layer.layer, e) for layer in layers for e in range(layer.n_experts)],
        perturbations=perturbations_json(profile, found),
    )


def findings_json(found: Findings) -> dict[str, Any]:
    """`show PROFILE --format json`."""
    tested = found.significance
    return as_json(found.profile, found.layers) | {
        "layers": layers_json(found),
        "tests": tested.n_tests,
        "permutations": tested.permutations,
        "seed": tested.seed,
        "p_family": tested.p_family,
        "suspects": suspects_json(found),
        "perturbations": found.perturbations,
        "subjects": subjects_json(found.counts, found.layers),
    }


def layers_json(found: Findings) -> list[dict[str, Any]]:
    """The paper's numbers of every layer with their margins, and of every expert with its tests."""
    rows = evidence_rows(found)
    return [
        layer_json(layer)
        | margin_json(margin)
        | {"expert": [expert_json(layer, e) | next(rows) for e in range(layer.n_experts)]}
        for layer, margin in zip(found.layers, found.margins, strict=True)
    ]


def evidence_rows(found: Findings) -> Iterator[dict[str, Any]]:
    """Each expert's intervals and tests, experts of all layers in order, undefined ones None."""
    tested = found.significance
    x = 0
    for layer in found.layers:
        activated_E = layer.is_activated_NE.sum(axis=0)
        plain = wilson(layer.accuracy_E, activated_E)
        weighted = wilson(layer.weighted_accuracy_E, layer.n_effective_E)
        for e in range(layer.n_experts):
            yield {
                "accuracy_ci95": _interval(plain, e),
                "weighted_accuracy_ci95": _interval(weighted, e),
                "difference": or_none(tested.difference_X[x]),
                "difference_se": or_none(tested.se_X[x]),
                "z": or_none(tested.z_X[x]),
                "p": or_none(tested.p_X[x]),
                "p_adjusted": or_none(tested.p_adjusted_X[x]),
                "p_family": or_none(tested.p_family_X[x]),
            }
            x += 1


def suspects_json(found: Findings) -> list[dict[str, Any]]:
    """Every tested expert with a negative z, the most harmful first."""
    rows = list(evidence_rows(found))
    return [
        {
            "layer": found.places[x][0],
            **expert_json(found.layers[found.places[x][0]], found.places[x][1]),
            **rows[x],
        }
        for x in found.significance.suspects
    ]


def _interval(ends: tuple[Array, Array], expert: int) -> list[float] | None:
    low, high = (float(end_E[expert]) for end_E in ends)
    return None if np.isnan(low) else [low, high]
