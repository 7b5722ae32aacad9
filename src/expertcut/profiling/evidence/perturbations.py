"""What a perturbation moved: chosen sets, log p, answers; and whether margins foretold it."""

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from expertcut.errors import ProfileError
from expertcut.profiling.evidence.margins import Margin
from expertcut.profiling.sound import NO_CHOICE
from expertcut.profiling.statistics import answers
from expertcut.profiling.store import Profile, load_profile

Array = np.ndarray[Any, Any]
Kind = Literal["shuffle-choices", "bf16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_FOLDER = "perturbed"


def perturbed_folder(folder: Path, kind: Kind) -> Path:
    """Where a perturbation of a profile lies."""
    return folder / _FOLDER / kind


def perturbed_profiles(profile: Profile) -> dict[Kind, Profile]:
    """The finished perturbations of a profile, by kind."""
    folders = {kind: perturbed_folder(profile.path, kind) for kind in KINDS}
    found = {k: load_profile(f) for k, f in folders.items() if (f / "profile.json").is_file()}
    return {kind: other for kind, other in found.items() if other.finished_at is not None}


def perturbations_json(profile: Profile, margins: list[Margin]) -> list[dict[str, Any]]:
    """One entry per finished perturbation.

    Raises:
        ProfileError: one that asked other questions.
    """
    return [
        {"kind": kind, **_compared(profile, other, margins)}
        for kind, other in perturbed_profiles(profile).items()
    ]


def _compared(profile: Profile, other: Profile, margins: list[Margin]) -> dict[str, Any]:
    if not np.array_equal(profile.array("row_N"), other.array("row_N")):
        raise ProfileError(f"{other.path} asked other questions than {profile.path}: remove it")
    before, after = answers(profile), answers(other)
    moved_NC = np.abs(unshuffled(other) - before.logprob_NC)
    is_there_NC = np.isfinite(moved_NC)
    moved_N = np.where(is_there_NC, moved_NC, 0).max(axis=1)
    choice_N = before.logprob_NC.argmax(axis=1)
    flipped_N = unshuffled(other).argmax(axis=1) != choice_N
    changed_NL = changed_sets(profile, other)
    known = [m.probability_N for m in margins if not m.undefined]
    least_N = np.min(known, axis=0) if known else None
    return {
        "questions": len(flipped_N),
        "accuracy": after.accuracy,
        "flipped": float(flipped_N.mean()),
        "mean_abs_logprob_diff": float(moved_NC[is_there_NC].mean()),
        "median_abs_logprob_diff": float(np.median(moved_NC[is_there_NC])),
        "max_abs_logprob_diff": float(moved_NC[is_there_NC].max()),
        "changed": float(changed_NL.any(axis=1).mean()),
        "margin_flipped_correlation": correlation(least_N, flipped_N),
        "margin_logprob_correlation": correlation(least_N, moved_N),
        "layers": [
            {
                "layer": layer,
                "changed": float(changed_NL[:, layer].mean()),
                "margin_changed_correlation": correlation(
                    None if margin.undefined else margin.probability_N, changed_NL[:, layer]
                ),
            }
            for layer, margin in enumerate(margins)
        ],
    }


def unshuffled(profile: Profile) -> Array:
    """Log p of the choices (N, C) in their original order."""
    logprob_NC: Array = profile.array("choice_logprob_NC")
    if "order_NC" not in profile.chunks[0]:
        return logprob_NC
    order_NC = profile.array("order_NC")
    found_NC = np.full_like(logprob_NC, -np.inf)
    rows, places = np.nonzero(order_NC != NO_CHOICE)
    found_NC[rows, order_NC[rows, places]] = logprob_NC[rows, places]
    return found_NC


def changed_sets(profile: Profile, other: Profile) -> Array:
    """Whether another set of experts was chosen at the answer position, (N, L)."""
    before, after = (np.sort(p.array("chosen_NLK"), axis=2) for p in (profile, other))
    changed_NL: Array = (before != after).any(axis=2)
    return changed_NL


def correlation(margin_N: Array | None, moved_N: Array) -> float | None:
    """Spearman's rank correlation, None where either is the same for all questions."""
    if margin_N is None or len(np.unique(margin_N)) < 2 or len(np.unique(moved_N)) < 2:
        return None
    from scipy.stats import spearmanr  # every profile would wait for it

    return float(spearmanr(margin_N, moved_N).statistic)
