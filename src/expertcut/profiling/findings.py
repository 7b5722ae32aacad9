"""The findings of a profile: statistics, margins, perturbations and tests of experts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from expertcut.errors import ProfileError
from expertcut.profiling import significance
from expertcut.profiling.schema import NO_CHOICE, BlockInfo
from expertcut.profiling.significance import PERMUTATIONS, Significance, SubjectCounts
from expertcut.profiling.statistics import (
    LayerStatistics,
    TextScore,
    expert_json,
    layer_json,
    or_none,
    text_layer_json,
)
from expertcut.profiling.storage import Profile, TextProfile, load_profile
from expertcut.stats import Array, logprob_shift, wilson

THRESHOLDS = (1e-4, 1e-3, 1e-2)  # of probability
QUANTILES = (0.01, 0.05, 0.25, 0.75, 0.95, 0.99)
Kind = Literal["shuffle-choices", "bf16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PERTURBED = "perturbed"  # folder in a profile, with one of each kind


@dataclass(frozen=True)
class Margin:
    """Rank K minus rank K+1 of one layer at the answer position, per question."""

    undefined: str  # why the arrays are empty: something else than α chooses the experts
    probability_N: Array
    logit_N: Array


def margin(block: BlockInfo, alpha_NE: Array, chosen_NK: Array) -> Margin:
    """α of the K-th expert minus α of the next, and the difference of their logits.

    Logits are ln α for a softmax, logit α for a sigmoid, or the inverse of √softplus.
    """
    reason = _why_undefined(block)
    if not reason:
        alpha_NE = alpha_NE.astype(np.float64)
        last_N = np.take_along_axis(alpha_NE, chosen_NK, axis=1).min(axis=1)
        np.put_along_axis(alpha_NE, chosen_NK, -np.inf, axis=1)
        next_N = alpha_NE.max(axis=1)
        if (next_N <= last_N * 1.01).all():  # rounding to bfloat16 may change the order within 1 %
            with np.errstate(divide="ignore", invalid="ignore"):
                logit_N = logits(block, last_N) - logits(block, next_N)
            return Margin("", np.maximum(last_N - next_N, 0), np.maximum(logit_N, 0))
        reason = "experts were chosen that do not have the largest α"
    return Margin(reason, np.empty(0), np.empty(0))


def margin_json(margin: Margin) -> dict[str, Any]:
    """The margins of a layer, null with a reason if undefined."""
    if margin.undefined:
        names = ("margin_undefined", "margin_probability", "margin_logit", "margin_below")
        return dict.fromkeys(names) | {"margin_undefined": margin.undefined}
    return {
        "margin_undefined": None,
        "margin_probability": _distribution(margin.probability_N),
        "margin_logit": _distribution(margin.logit_N),
        "margin_below": [
            {"probability": threshold, "share": float((margin.probability_N < threshold).mean())}
            for threshold in THRESHOLDS
        ],
    }


def _why_undefined(block: BlockInfo) -> str:
    """Why α alone does not determine the chosen experts; empty if it may."""
    if block.is_hashed:
        return "a table of token ids chooses the experts"
    if block.declared is not None and (block.groups > 1 or not block.declared.is_ranked):
        return "the function of a contract chooses the experts"
    if block.places is not None:
        return "a routing rule chooses among the router's experts"
    if block.top_k == block.experts:
        return "every expert is always chosen"
    if block.selection_bias:
        return "a bias is added to α where experts are chosen"
    if block.selection_bias is None and block.scoring != "softmax":
        return "the profile does not say whether a bias is added to α where experts are chosen"
    return "experts are chosen within the best groups" if block.top_groups < block.groups else ""


def logits(block: BlockInfo, alpha: Array) -> Array:
    """Logits up to a constant per question; infinite, with a warning, for α rounded to 0 or 1."""
    if block.scoring == "sqrtsoftplus":
        softplus: Array = alpha**2
        return softplus + np.log(-np.expm1(-softplus))
    log: Array = np.log(alpha)
    return log if block.scoring == "softmax" else log - np.log1p(-alpha)


def _distribution(values_N: Array) -> dict[str, float | None]:
    with np.errstate(invalid="ignore"):  # for α rounded to 0 or 1
        numbers = {
            "mean": values_N.mean(),
            "std": values_N.std(),
            "median": np.median(values_N),
            **{f"q{100 * q:02.0f}": np.quantile(values_N, q) for q in QUANTILES},
        }
    return {name: or_none(float(value)) for name, value in numbers.items()}


def perturbed_profiles(profile: Profile) -> dict[Kind, Profile]:
    """The finished perturbations of a profile, by kind."""
    folders = {kind: profile.path / PERTURBED / kind for kind in KINDS}
    started = {k: load_profile(f) for k, f in folders.items() if (f / "profile.json").is_file()}
    return {kind: other for kind, other in started.items() if other.finished_at is not None}


def _compared(profile: Profile, other: Profile, margins: list[Margin]) -> dict[str, Any]:
    if not np.array_equal(profile.array("row_N"), other.array("row_N")):
        raise ProfileError(f"{other.path} asked other questions than {profile.path}: remove it")
    before_NC, after_NC = profile.answers.logprob_NC, unshuffled(other)
    largest, median = logprob_shift(after_NC, before_NC)
    moved_NC = np.abs(after_NC - before_NC)
    is_there_NC = np.isfinite(moved_NC)
    moved_N = np.where(is_there_NC, moved_NC, 0).max(axis=1)
    flipped_N = after_NC.argmax(axis=1) != before_NC.argmax(axis=1)
    before, after = (np.sort(p.array("chosen_NLK"), axis=2) for p in (profile, other))
    changed_NL = (before != after).any(axis=2)  # the chosen experts at the answer position
    defined = [m.probability_N for m in margins if not m.undefined]
    least_N = np.min(defined, axis=0) if defined else np.empty(0)
    return {
        "questions": len(flipped_N),
        "accuracy": other.answers.accuracy,
        "flipped": float(flipped_N.mean()),
        "mean_abs_logprob_diff": float(moved_NC[is_there_NC].mean()),
        "median_abs_logprob_diff": median,
        "max_abs_logprob_diff": largest,
        "changed": float(changed_NL.any(axis=1).mean()),
        "margin_flipped_correlation": correlation(least_N, flipped_N),
        "margin_logprob_correlation": correlation(least_N, moved_N),
        "layers": [
            {
                "layer": layer,
                "changed": float(changed_N.mean()),
                "margin_changed_correlation": correlation(margin.probability_N, changed_N),
            }
            for layer, (margin, changed_N) in enumerate(zip(margins, changed_NL.T, strict=True))
        ],
    }


def unshuffled(profile: Profile) -> Array:
    """Log p of the choices (N, C) in original order."""
    logprob_NC: Array = profile.array("choice_logprob_NC")
    if "order_NC" not in profile.chunks[0]:
        return logprob_NC
    order_NC = profile.array("order_NC")
    original_NC = np.full_like(logprob_NC, -np.inf)
    rows, places = np.nonzero(order_NC != NO_CHOICE)
    original_NC[rows, order_NC[rows, places]] = logprob_NC[rows, places]
    return original_NC


def correlation(margin_N: Array, moved_N: Array) -> float | None:
    """Spearman's rank correlation by SciPy, with its last bits; None if one does not vary."""
    if len(np.unique(margin_N)) < 2 or len(np.unique(moved_N)) < 2:
        return None
    from scipy.stats import spearmanr  # every profile would wait for it

    return float(spearmanr(margin_N, moved_N).statistic)


@dataclass(frozen=True)
class Findings:
    """Statistics with margins, tests and perturbations; `places` are (layer, expert) of X."""

    profile: Profile
    layers: list[LayerStatistics]
    margins: list[Margin]
    counts: SubjectCounts
    significance: Significance
    places: list[tuple[int, int]]
    perturbations: list[dict[str, Any]]


def find(profile: Profile, permutations: int = PERMUTATIONS, seed: int = 0) -> Findings:
    """Computes all findings."""
    layers, is_correct_N = profile.layers, profile.answers.is_correct_N
    is_activated_NX = np.concatenate([layer.is_activated_NE for layer in layers], axis=1)
    alpha_NLE, chosen_NLK = profile.array("alpha_NLE"), profile.array("chosen_NLK")
    margins = [
        margin(block, alpha_NLE[:, layer, : block.experts], chosen_NLK[:, layer].astype(np.int64))
        for layer, block in enumerate(profile.info.model.blocks)
    ]
    counts = significance.count_by_subject(profile.subjects(), is_correct_N, is_activated_NX)
    tested = significance.significance(counts, is_correct_N, is_activated_NX, permutations, seed)
    return Findings(
        profile=profile,
        layers=layers,
        margins=margins,
        counts=counts,
        significance=tested,
        places=[(layer.layer, e) for layer in layers for e in range(layer.n_experts)],
        perturbations=[
            {"kind": kind, **_compared(profile, other, margins)}
            for kind, other in perturbed_profiles(profile).items()
        ],
    )


def profile_json(profile: Profile) -> dict[str, Any]:
    """The numbers of the paper."""
    ties, answers = profile.near_ties(), profile.answers
    return {
        "questions": len(answers.answer_N),
        "accuracy": answers.accuracy,
        **({} if answers.n_cut is None else {"cut_prompts": answers.n_cut}),
        "near_ties": {"questions": len(ties), "listed": ties},
        "layers": [layer_json(layer) for layer in profile.layers],
    }


def text_json(profile: TextProfile) -> dict[str, Any]:
    """`show PROFILE --format json` of texts."""
    info = profile.info.text
    whole = _score_json(profile.score) if info.has_loss else {}
    sources = {}
    for name, source in info.sources.items():
        own = _score_json(profile.scores[name]) if info.has_loss else {}
        sources[name] = {"tokens": source.tokens, "documents": source.documents, **own}
    return {
        "tokens": info.n_tokens,
        "documents": info.n_documents,
        **whole,
        "sources": sources,
        "layers": [text_layer_json(layer) for layer in profile.layers],
    }


def _score_json(score: TextScore) -> dict[str, Any]:
    """Shares and perplexity with intervals over documents, None if undefined."""
    ends = score.perplexity_ci95
    return {
        "scored_tokens": score.scored,
        "next_token_accuracy": or_none(score.accuracy),
        "next_token_accuracy_ci95": score.accuracy_ci95 and list(score.accuracy_ci95),
        "perplexity": or_none(score.perplexity),
        "perplexity_ci95": None if ends is None else [or_none(end) for end in ends],
    }


def findings_json(findings: Findings) -> dict[str, Any]:
    """`show PROFILE --format json`."""
    tested = findings.significance
    return profile_json(findings.profile) | {
        "layers": layers_json(findings),
        "tests": tested.n_tests,
        "permutations": tested.permutations,
        "seed": tested.seed,
        "p_family": tested.p_family,
        "suspects": suspects_json(findings),
        "perturbations": findings.perturbations,
        "subjects": significance.subjects_json(findings.counts, findings.layers),
    }


def layers_json(findings: Findings) -> list[dict[str, Any]]:
    """The numbers of every layer with its margins, and of every expert with its tests."""
    rows = _expert_rows(findings)
    return [
        layer_json(layer)
        | margin_json(margin)
        | {"expert": [next(rows) for _ in range(layer.n_experts)]}
        for layer, margin in zip(findings.layers, findings.margins, strict=True)
    ]


def _expert_rows(findings: Findings) -> Iterator[dict[str, Any]]:
    """Numbers, intervals and tests of each expert of all layers in order, None if undefined."""
    tested = findings.significance
    tests = {"difference": tested.difference_X, "difference_se": tested.se_X}
    tests |= {name: getattr(tested, f"{name}_X") for name in ("z", "p", "p_adjusted", "p_family")}
    x = 0
    for layer in findings.layers:
        intervals = {
            "accuracy_ci95": wilson(layer.accuracy_E, layer.is_activated_NE.sum(axis=0)),
            "weighted_accuracy_ci95": wilson(layer.weighted_accuracy_E, layer.n_effective_E),
        }
        for e in range(layer.n_experts):
            yield (
                expert_json(layer, e)
                | {
                    name: None if np.isnan(low_E[e]) else [float(low_E[e]), float(high_E[e])]
                    for name, (low_E, high_E) in intervals.items()
                }
                | {name: or_none(value_X[x]) for name, value_X in tests.items()}
            )
            x += 1


def suspects_json(findings: Findings) -> list[dict[str, Any]]:
    """Every tested expert with z < 0, the lowest first."""
    rows, places = list(_expert_rows(findings)), findings.places
    return [{"layer": places[x][0], **rows[x]} for x in findings.significance.suspects]
