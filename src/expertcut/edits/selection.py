"""Which experts stay: their order, protection and number, and what the removed ones carried."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from expertcut.edits import plan
from expertcut.edits.criteria import CRITERIA, activations, positions_of, ranked, scores
from expertcut.edits.domains import Limit, Overlap, kept_shares, maxmin
from expertcut.edits.edit_settings import CutSettings, RankSettings
from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.errors import PlanError, ProfileError, SettingsError
from expertcut.profiling.blend import Blend, BlendRule
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile, TextProfile, largest_values
from expertcut.stats import Array

if TYPE_CHECKING:
    from expertcut.scoring.engine import Engine

SUPER = "super"
Ranked = TypeVar("Ranked", bound=RankSettings)
_EXPERT = re.compile(r"(\d{1,9}):(\d{1,9})")


class Protection(NamedTuple):
    """Rows of routers per layer: super experts, and those that were named."""

    supers: tuple[tuple[int, ...], ...]
    named: tuple[tuple[int, ...], ...]

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """All that stay, per layer."""
        return [(*own, *named) for own, named in zip(self.supers, self.named, strict=True)]

    def spared(
        self, edits: Mapping[str, plan.BlockEdit], plain: Mapping[str, plan.BlockEdit]
    ) -> dict[str, tuple[int, ...]]:
        """By block, what stays and without protection would not."""
        return {
            block: tuple(e for e in edit.keep if e in ids and e not in plain[block].keep)
            for (block, edit), ids in zip(edits.items(), self.ids, strict=True)
        }


def expressions_of(expressions: Sequence[str], *, is_super: bool) -> tuple[str, ...]:
    """What to protect; `is_super` adds super experts, unless --protect has `none`."""
    if "none" not in expressions:
        return tuple(dict.fromkeys([*([SUPER] if is_super else []), *expressions]))
    if SUPER in expressions:
        raise SettingsError("--protect none and --protect super contradict each other: give one")
    return tuple(text for text in expressions if text != "none")


def protection(profile: Profile, expressions: Sequence[str]) -> Protection:
    """What `super` and `L:E` (expert E of layer L) protect; SettingsError for other expressions."""
    named: list[list[int]] = [[] for _ in profile.info.model.blocks]
    for text in expressions:
        if match := _EXPERT.fullmatch(text.strip()):
            row = plan.find_row(profile, int(match[1]), int(match[2]))
            named[int(match[1])].append(row)
        elif text != SUPER:
            raise SettingsError(
                f"--protect {text} names no expert: write super, none or L:E, as in 3:12"
            )
    supers = super_experts(profile) if SUPER in expressions else [()] * len(named)
    return Protection(tuple(supers), tuple(tuple(dict.fromkeys(own)) for own in named))


def super_experts(profile: Profile) -> list[tuple[int, ...]]:
    """Super experts (ids per layer): outputs with a value far above all others'. arXiv:2507.23279.

    An expert's largest absolute output value over all tokens is above the 99.5th percentile of all
    experts of all layers and above a tenth of the largest, in the first 75 % of the MoE layers.
    Raises ProfileError: the profile was made with --stats answer.
    """
    largest = largest_values(profile)
    if largest is None:
        raise ProfileError(
            "--protect super: the profile holds no all-token statistics (--stats answer): profile "
            "with --stats all, or take --protect none"
        )
    all_X = np.concatenate(largest).astype(np.float64)
    threshold = max(float(np.percentile(all_X, 99.5)), 0.1 * float(all_X.max()))
    return [
        tuple(np.flatnonzero(value_E > threshold).tolist()) if layer < 0.75 * len(largest) else ()
        for layer, value_E in enumerate(largest)
    ]


def protected(order: Sequence[int], ids: Collection[int]) -> list[int]:
    """An order of experts with the protected ones first; else it stays as it is."""
    return sorted(order, key=lambda expert: expert not in ids)


def empty_draft(settings: CutSettings, slug: str, action: str, criterion: str) -> plan.EditPlan:
    """A draft without edits, named after what makes it differ from the usual."""
    removed, fold = settings.removed or "zero", settings.fold or "answer"
    unusual = {"all": settings.at, "exact": settings.layout, "mean": removed}
    usual = positions_of(settings.by, None)
    marks = "".join(f"-{m}" for m, value in unusual.items() if value == m != usual)
    if "fold" in LAYOUTS[settings.layout].options and fold != "answer":
        marks += f"-fold-{fold}"
    if settings.sequential:
        marks, action = f"{marks}-sequential", f"{action} --sequential"
    return plan.EditPlan(
        f"{slug}{marks}",
        action,
        criterion,
        settings.at,
        edits={},
        layout=settings.layout,
        removed=removed,
        fold=fold,
        is_cut=True,
        is_calibrated=CRITERIA[settings.by].needs == "calibration",
    )


def has_answers(profile: Profile) -> bool:
    """Whether a profile, or each of a blend, is of a quiz."""
    return not any(isinstance(part, TextProfile) for part in profile.parts)


def for_profile(profile: Profile, settings: Ranked) -> Ranked:
    """Settings that count all tokens, which is all that a profile of texts has.

    Raises SettingsError: they ask for answers.
    """
    if has_answers(profile):
        return settings
    for value, flag in ((settings.positions, "tokens"), (settings.fold, "rescale-gates")):
        if value == "answer":
            raise SettingsError(
                f"--{flag} answer: {profile.path} is a profile of texts, which have no answers: "
                "leave it out"
            )
    is_scaling = "fold" in LAYOUTS[settings.layout].options
    fold = settings.fold or ("all" if is_scaling else None)
    return settings.updated(positions="all", fold=fold)


@dataclass(frozen=True)
class Ranking:
    """Every expert of a profile by a criterion: scores (E,) and ids, best first, by layer."""

    blocks: tuple[BlockInfo, ...]
    settings: CutSettings
    scores: tuple[Array, ...]
    orders: tuple[list[int], ...]  # by the criterion alone
    stay: Protection
    counts: tuple[Array, ...]  # how often each expert was active
    numbers: plan.ExpertIds
    blend: Blend | None = None
    shares: tuple[Array, ...] = ()  # (D, E) per layer, if the criterion reads each domain's profile


def rank(profile: Profile, settings: CutSettings, engine: "Engine | None" = None) -> Ranking:
    """Scores by the criterion, the order that follows, and who stays whatever it says."""
    layers = profile.layers
    settings = for_profile(profile, settings)
    counts_all = settings.by == "activations" or not has_answers(profile)
    at = settings.at if counts_all else "answer"
    by_layer = scores(profile, settings.by, settings.at, engine, settings.seed)
    orders = [ranked(s, layer.alpha_mean_E) for s, layer in zip(by_layer, layers, strict=True)]
    return Ranking(
        blocks=profile.info.model.blocks,
        settings=settings,
        scores=tuple(by_layer),
        orders=tuple(orders),
        stay=protection(profile, settings.protect),
        counts=tuple(activations(layer, at) for layer in layers),
        numbers=plan.expert_ids(profile),
        blend=profile if isinstance(profile, Blend) else None,
        shares=domain_shares(profile.parts, settings) if len(profile.parts) > 1 else (),
    )


def domain_shares(parts: Sequence[Profile], settings: CutSettings) -> tuple[Array, ...]:
    """Normalised scores (D, E) by layer of each profile alone; none if others decide on them."""
    if CRITERIA[settings.by].needs != "profile":
        return ()
    of_each = [scores(part, settings.by, settings.at) for part in parts]
    return tuple(np.stack([*map(normalised, own)]) for own in zip(*of_each, strict=True))


def overlap(profile: Blend, settings: CutSettings) -> Overlap:
    """The saliencies of each profile, and its own cut, which protects nothing.

    Raises SettingsError: the criterion does not read the profile; PlanError: some layer cannot keep
    that number.
    """
    if CRITERIA[settings.by].needs != "profile":
        raise SettingsError(
            f"--by {settings.by} does not depend on the profile: take one that does, as reap"
        )
    cuts = {name: choose(p, settings) for name, p in zip(profile.names, profile.parts, strict=True)}
    parts = zip(profile.names, profile.parts, strict=True)
    return Overlap(
        names=tuple(profile.names),
        scores={name: scores(part, settings.by, settings.at) for name, part in parts},
        shares=domain_shares(profile.parts, settings),
        keep={name: [frozenset(ids) for ids in _keeps(own)] for name, own in cuts.items()},
    )


def check_criteria(criteria: Sequence[str], rule: BlendRule) -> None:
    """Raises a SettingsError for a criterion that cannot rank a blend of profiles."""
    for by in criteria:
        if CRITERIA[by].needs == "calibration":
            raise SettingsError(
                f"--by {by} runs the model on the questions of one profile: give one --profile, or "
                "another criterion"
            )
        if rule == "maxmin" and CRITERIA[by].needs != "profile":
            raise SettingsError(
                f"--blend maxmin compares what domains keep, and {by} does not depend on the "
                "domain: take --blend sum or another criterion"
            )


def counts(settings: CutSettings, blocks: Sequence[BlockInfo]) -> range:
    """All that a search may keep, from least to most: per layer, or of all layers together."""
    if settings.budget == "global":
        least = floors(blocks, settings.min_keep)
        return range(sum(least), sum(block.experts for block in blocks) + 1)
    most = min(block.experts for block in blocks)
    if not LAYOUTS[settings.layout].needs_equal_counts:
        return range(1, most + 1)
    return range(max(_stock_count(block, 0) for block in blocks), most + 1, blocks[0].groups)


def _stock_count(block: BlockInfo, n_per_group: int) -> int:
    """The smallest count of layout stock that keeps this many experts of a routing group."""
    least = plan.least_experts(block, "stock") if block.groups == 1 else plan.least_per_group(block)
    return max(n_per_group, least) * block.groups


def wanted_count(settings: CutSettings, blocks: Sequence[BlockInfo]) -> int:
    """The number per layer, or of all layers; a fraction is rounded, to equally large groups."""
    fraction = settings.fraction
    if fraction is None:
        assert settings.keep is not None
        return settings.keep * (len(blocks) if settings.budget == "global" else 1)
    if settings.budget == "global":
        return sum(round(fraction * block.experts) for block in blocks)
    step = blocks[0].groups if LAYOUTS[settings.layout].needs_equal_counts else 1
    return round(fraction * blocks[0].experts / step) * step


def check_wanted(settings: CutSettings, blocks: Sequence[BlockInfo]) -> None:
    """Raises a PlanError for a number, if one is given, that some layer cannot keep."""
    is_number = not settings.keep_active and settings.max_bytes is None
    if is_number and settings.budget == "layer":
        plan.check_count(blocks, wanted_count(settings, blocks), settings.layout)


def kept_counts(n_keeps: list[int], blocks: Sequence[BlockInfo], layout: Layout) -> list[int]:
    """The counts, but all experts of layers that a table of token ids routes, if the layout can."""
    if LAYOUTS[layout].needs_equal_counts:
        return n_keeps
    return [b.experts if b.is_hashed else n for n, b in zip(n_keeps, blocks, strict=True)]


def floors(blocks: Sequence[BlockInfo], min_keep: int | None) -> list[int]:
    """What each layer keeps at least under a global budget: top-k, and `min_keep`."""
    for block in blocks:
        if (min_keep or 0) > block.experts:
            raise PlanError(
                f"--min-keep {min_keep} is more than the {block.experts} experts of {block.name}"
            )
    return [
        block.experts if block.is_hashed else max(block.top_k, min_keep or 0) for block in blocks
    ]


def as_numbers(score_E: Array) -> Array:
    """Scores in float64; what is not a number counts as the layer's lowest, +∞ as its highest."""
    finite = score_E[np.isfinite(score_E)]
    lowest, highest = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    return np.nan_to_num(score_E, nan=lowest, neginf=lowest, posinf=highest).astype(np.float64)


def normalised(score_E: Array) -> Array:
    """Scores as shares of their layer's sum, so that layers can be compared.

    What is below 0 counts as 0; where no score is above 0 the layer's lowest becomes 0 instead.
    """
    filled_E = as_numbers(score_E)
    lowest = 0.0 if float(filled_E.max()) > 0 else float(filled_E.min())
    shifted_E: Array = np.maximum(filled_E - lowest, 0)
    total = shifted_E.sum()
    return shifted_E / total if total > 0 else np.full(len(score_E), 1 / len(score_E))


def share_out(
    total: int,
    scores: Sequence[Array],
    orders: Sequence[Sequence[int]],
    first: Sequence[Collection[int]],
    least: Sequence[int],
) -> list[int]:
    """How many each layer keeps of `total`, if those with the best normalised scores stay.

    `orders` are best first, with those in `first` before all others; each layer keeps `least`.
    Raises PlanError: more than there are, or fewer than the layers need.
    """
    n_experts = sum(map(len, orders))
    if not sum(least) <= total <= n_experts:
        raise PlanError(
            f"--budget global cannot keep {total} experts in all: keep {sum(least)} (at least "
            f"{min(least)} in each of {len(least)} layers) to {n_experts}"
        )
    candidates = []
    for layer, order in enumerate(orders):
        share_E = normalised(scores[layer])
        values = [np.inf if e in first[layer] else float(share_E[e]) for e in order]
        # What stands before others stays before them, whatever put it there.
        best = np.maximum.accumulate(values[::-1])[::-1]
        candidates += [(-best[rank], rank, layer) for rank in range(least[layer], len(order))]
    n_keeps = list(least)
    for _, _, layer in sorted(candidates)[: total - sum(least)]:
        n_keeps[layer] += 1
    return n_keeps


@dataclass(frozen=True)
class Pruning:
    """The experts that stay, how many were active, and which idle ones fill up, by block."""

    draft: plan.EditPlan
    n_active: dict[str, int]
    fillers: dict[str, tuple[int, ...]]
    spared: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by their protection alone


def choose(profile: Profile, settings: CutSettings, engine: "Engine | None" = None) -> Pruning:
    """The experts that stay; some criteria run the engine's model."""
    settings.check()
    if settings.keep_active:
        pruning = keep_active(profile, settings)
        if not isinstance(profile, Blend):
            return pruning
        shares = domain_shares(profile.parts, settings)
        return _named(pruning, profile, {"sum": kept_shares(shares, _keeps(pruning))})
    check_wanted(settings, profile.info.model.blocks)  # before a criterion runs the model
    n_keep = wanted_count(settings, profile.info.model.blocks)
    return cut(rank(profile, settings, engine), n_keep)


def cut(ranking: Ranking, n_keep: int) -> Pruning:
    """Keeps the best `n_keep` of each layer, with a global budget of all layers together.

    A blend by maxmin ranks anew for each number; its worst domain keeps at least what it keeps in
    the cut by the sum.
    """
    pruning = _cut(ranking, n_keep)
    if ranking.blend is None:
        return pruning
    by_rule: dict[BlendRule, Pruning] = {"sum": pruning}
    if ranking.shares:
        by_rule["maxmin"] = _maxmin(ranking, n_keep, pruning)
    kept = {r: kept_shares(ranking.shares, _keeps(p)) for r, p in by_rule.items() if ranking.shares}
    return _named(by_rule[ranking.blend.rule], ranking.blend, kept)


def _maxmin(ranking: Ranking, n_keep: int, by_sum: Pruning) -> Pruning:
    """The best of the ranking by the weights, of the fractions that stay, and of the sum."""
    relaxed = maxmin(ranking.shares, _limits(ranking, n_keep), ranking.stay.ids)
    weighed = [relaxed.weights_D @ share_DE for share_DE in ranking.shares]
    # Experts that tie by their weighed shares are ordered by the fraction of them that stays.
    ordered = [k_E + w_E for k_E, w_E in zip(relaxed.kept_LE, weighed, strict=True)]
    cuts = []
    for by_layer in (weighed, ordered):
        places = [np.argsort(order) for order in ranking.orders]
        orders = [ranked(s, -place_E) for s, place_E in zip(by_layer, places, strict=True)]
        cuts.append(_cut(replace(ranking, scores=tuple(by_layer), orders=tuple(orders)), n_keep))
    cuts.append(by_sum)
    worst = [float(kept_shares(ranking.shares, _keeps(found)).min()) for found in cuts]
    return cuts[int(np.argmax(np.round(worst, 12)))]


def _limits(ranking: Ranking, n_keep: int) -> list[Limit]:
    """What `_cut` keeps to: how many of each group of each layer, or of all layers together."""
    settings, blocks = ranking.settings, ranking.blocks
    if settings.budget == "global":
        least = floors(blocks, settings.min_keep)
        layers = [[(i, e) for e in range(b.experts)] for i, b in enumerate(blocks)]
        own = [Limit(ids, n, len(ids)) for ids, n in zip(layers, least, strict=True)]
        return [*own, Limit([expert for ids in layers for expert in ids], n_keep, n_keep)]
    limits = []
    for layer, block in enumerate(blocks):
        n_groups = block.groups if LAYOUTS[settings.layout].needs_equal_counts else 1
        n_own, size = n_keep // n_groups, block.experts // n_groups
        for start in range(0, block.experts, size):
            limits.append(Limit([(layer, e) for e in range(start, start + size)], n_own, n_own))
    return limits


def _keeps(pruning: Pruning) -> list[tuple[int, ...]]:
    return [edit.keep for edit in pruning.draft.edits.values()]


def _n_tokens(profile: Profile) -> int | None:
    tokens_LE, block = profile.token_sum("tokens"), profile.info.model.blocks[0]
    if tokens_LE is None or block.places is not None:  # tokens use more or fewer experts
        return None
    return round(float(tokens_LE[0].sum()) / block.top_k)


def _named(pruning: Pruning, blend: Blend, kept: Mapping[BlendRule, Array]) -> Pruning:
    """With the blend in the plan, its action and its slug."""
    profiles = tuple(
        plan.BlendedProfile(
            name=name,
            profile=part.info.short_hash,
            quiz=part.info.quiz.id,
            split=part.info.quiz.split,
            questions=None if part.info.text else len(part.subjects()),
            tokens=_n_tokens(part),
            weight=float(blend.weights_D[d]),
            kept={rule: float(kept_D[d]) for rule, kept_D in kept.items()},
        )
        for d, (name, part) in enumerate(zip(blend.names, blend.parts, strict=True))
    )
    draft = replace(
        pruning.draft,
        slug=f"{pruning.draft.slug}-{blend.slug}",
        action=f"{pruning.draft.action} {blend.text}",
        blend=plan.PlanBlend(rule=blend.rule, profiles=profiles),
    )
    return replace(pruning, draft=draft)


def _cut(ranking: Ranking, n_keep: int) -> Pruning:
    settings, stay, blocks = ranking.settings, ranking.stay, ranking.blocks
    name = f"random-{settings.seed}" if settings.by == "random" else settings.by
    if settings.budget == "global":
        n_experts = sum(block.experts for block in blocks)
        action = f"prune --budget global ({n_keep} of {n_experts} experts)"
        draft = empty_draft(settings, f"keep-{n_keep}-global-{name}", action, name)
    else:
        plan.check_count(blocks, n_keep, settings.layout)
        draft = empty_draft(settings, f"keep-{n_keep}-{name}", f"prune --keep {n_keep}", name)

    def prune(orders: Sequence[list[int]], first: Sequence[tuple[int, ...]]) -> Pruning:
        n_keeps = [n_keep] * len(blocks)
        if settings.budget == "global":
            least = floors(blocks, settings.min_keep)
            by_score = [protected(o, ids) for o, ids in zip(ranking.orders, first, strict=True)]
            n_keeps = share_out(n_keep, ranking.scores, by_score, first, least)
        n_keeps = kept_counts(n_keeps, blocks, settings.layout)
        return _prune(n_keeps, orders, ranking.counts, blocks, draft, ranking.numbers)

    plain = prune(ranking.orders, [()] * len(blocks))
    layers = zip(ranking.orders, stay.supers, stay.named, strict=True)
    pruning = prune([protected(protected(o, own), named) for o, own, named in layers], stay.ids)
    for (block, edit), named in zip(pruning.draft.edits.items(), stay.named, strict=True):
        if not set(named) <= set(edit.keep):
            raise PlanError(
                f"{block} keeps {len(edit.keep)} experts, too few for the {len(named)} that "
                "--protect names there: keep more or protect fewer"
            )
    return replace(pruning, spared=stay.spared(pruning.draft.edits, plain.draft.edits))


def keep_active(profile: Profile, settings: CutSettings) -> Pruning:
    """Keeps what fires; layout stock also as many more as make one count for all layers.

    The others are filled by all-token count where the profile has it, else by mean α. What is
    protected counts as firing. Raises SettingsError: a criterion by which it does not choose.
    """
    if settings.by != "activations":
        raise SettingsError(f"--by {settings.by} ranks what --keep N keeps: leave it out")
    settings = for_profile(profile, settings)
    layers, blocks = profile.layers, profile.info.model.blocks
    counts = [activations(layer, settings.at) for layer in layers]
    stay = protection(profile, settings.protect)
    n_keeps, orders, most = [], [], 0
    for layer, block, count_E, ids in zip(layers, blocks, counts, stay.ids, strict=True):
        is_active_E = (count_E > 0) | np.isin(np.arange(len(count_E)), list(ids))
        n_keeps.append(int(is_active_E.sum()))
        per_group = is_active_E.reshape(block.groups, -1).sum(axis=1)
        most = max(most, _stock_count(block, int(per_group.max())))
        fill_E = layer.alpha_mean_E if layer.tokens_E is None else layer.tokens_E
        orders.append(ranked(is_active_E * (1.0 + fill_E.max()) + fill_E, layer.alpha_mean_E))
    is_equal = LAYOUTS[settings.layout].needs_equal_counts
    n_keeps = kept_counts([most] * len(blocks) if is_equal else n_keeps, blocks, settings.layout)
    draft = empty_draft(settings, "keep-active", "prune --keep-active", "activations")
    pruning = _prune(n_keeps, orders, counts, blocks, draft, plan.expert_ids(profile))
    if not settings.protect:
        return pruning
    plain = keep_active(profile, settings.updated(protect=[]))
    return replace(pruning, spared=stay.spared(pruning.draft.edits, plain.draft.edits))


def _prune(
    n_keeps: Sequence[int],
    orders: Sequence[list[int]],
    counts: Sequence[Array],
    blocks: Sequence[BlockInfo],
    draft: plan.EditPlan,
    numbers: plan.ExpertIds,
) -> Pruning:
    """Keeps the first of each order, in layout stock equally many of each routing group."""
    edits, fillers, n_active = {}, {}, {}
    for order, n_keep, block, count_E in zip(orders, n_keeps, blocks, counts, strict=True):
        n_groups = block.groups if LAYOUTS[draft.layout].needs_equal_counts else 1
        size = block.experts // n_groups
        groups = [[e for e in order if e // size == g] for g in range(n_groups)]
        keep = tuple(sorted(e for group in groups for e in group[: n_keep // n_groups]))
        edits[block.name] = plan.BlockEdit(keep=keep)
        fillers[block.name] = tuple(e for e in keep if count_E[e] == 0)
        n_active[block.name] = int((count_E > 0).sum())
    plan.validate_edits(edits, blocks, draft.layout)
    return Pruning(replace(draft, edits=edits, numbers=numbers), n_active, fillers)


class RemovedTraffic(NamedTuple):
    """What goes with the removed experts of one block; None without all-token sums of it."""

    block: str
    n_removed: int
    n_questions: int | None  # that chose a removed expert at the answer position; None of texts
    n_used: int | None  # removed experts that any token chose, shots included
    mass: float | None  # their share of all tokens' gate weight


def removed_traffic(profile: Profile, edits: Mapping[str, plan.BlockEdit]) -> list[RemovedTraffic]:
    """What the removal of experts would touch, block by block."""
    chosen_NLK = profile.array("chosen_NLK") if has_answers(profile) else None
    tokens_LE, weight_LE = profile.token_sum("tokens"), profile.token_sum("weight")
    traffic = []
    for layer, block in enumerate(profile.info.model.blocks):
        removed = list(edits[block.name].removed(block.experts))
        n_hit = None
        if chosen_NLK is not None:
            n_hit = int(np.isin(chosen_NLK[:, layer], removed).any(axis=1).sum())
        n_used, mass = None, None
        if tokens_LE is not None:
            n_used = int((tokens_LE[layer, removed] > 0).sum())
        if weight_LE is not None:
            mass = float(weight_LE[layer, removed].sum() / weight_LE[layer].sum())
        traffic.append(RemovedTraffic(block.name, len(removed), n_hit, n_used, mass))
    return traffic


def removed_share(
    profile: Profile, edits: Mapping[str, plan.BlockEdit]
) -> tuple[int, int | None, float | None]:
    """Removed experts, questions that chose one to answer, and share of all gate weight.

    Questions are None where texts were profiled.
    """
    traffic, weight_LE = removed_traffic(profile, edits), profile.token_sum("weight")
    removed = [list(edits[b.name].removed(b.experts)) for b in profile.info.model.blocks]
    n_hit = share = None
    if has_answers(profile):
        chosen_NLK = profile.array("chosen_NLK")
        hit_LN = [np.isin(chosen_NLK[:, i], ids).any(axis=1) for i, ids in enumerate(removed)]
        n_hit = int(np.any(hit_LN, axis=0).sum())
    if weight_LE is not None:
        share_L = np.array([block.mass for block in traffic], dtype=np.float64)
        share = float(share_L @ weight_LE.sum(axis=1) / weight_LE.sum())
    return sum(map(len, removed)), n_hit, share
