"""The order in which experts are kept, and those that are protected whatever their score."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from expertcut.edits.criteria import CRITERIA, activations, positions_of, ranked, scores
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, EditPlan, ExpertIds, expert_ids, find_expert
from expertcut.errors import PlanError, ProfileError, SettingsError
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile, largest_values

if TYPE_CHECKING:
    from expertcut.scoring.engine import Engine

PERCENTILE = 99.5
SHARE_OF_LARGEST = 0.1
SHARE_OF_LAYERS = 0.75
SUPER = "super"
_EXPERT = re.compile(r"(\d{1,9}):(\d{1,9})")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Protection:
    """Rows of routers per layer: super experts, and those that were named."""

    supers: tuple[tuple[int, ...], ...]
    named: tuple[tuple[int, ...], ...]

    @property
    def ids(self) -> list[tuple[int, ...]]:
        """All that stay, per layer."""
        return [(*own, *named) for own, named in zip(self.supers, self.named, strict=True)]

    def first(self, orders: Sequence[Sequence[int]]) -> list[list[int]]:
        """Orders of all layers' experts, those that were named first, then super experts."""
        layers = zip(orders, self.supers, self.named, strict=True)
        return [protected(protected(order, own), named) for order, own, named in layers]

    def spared(
        self, edits: Mapping[str, BlockEdit], plain: Mapping[str, BlockEdit]
    ) -> dict[str, tuple[int, ...]]:
        """By block, what stays and without protection would not."""
        blocks = zip(edits.items(), self.ids, strict=True)
        return {
            block: tuple(e for e in edit.keep if e in ids and e not in plain[block].keep)
            for (block, edit), ids in blocks
        }

    def check(self, edits: Mapping[str, BlockEdit]) -> None:
        """That all that were named stay.

        Raises:
            PlanError: there was no room for one of them.
        """
        for (block, edit), named in zip(edits.items(), self.named, strict=True):
            if not set(named) <= set(edit.keep):
                raise PlanError(
                    f"{block} keeps {len(edit.keep)} experts, too few for the {len(named)} that "
                    "--protect names there: keep more or protect fewer"
                )


def expressions_of(asked: Sequence[str], *, is_super: bool) -> tuple[str, ...]:
    """What --protect asks for; `is_super` says whether super experts are protected unasked.

    Raises:
        SettingsError: none and super.
    """
    if "none" not in asked:
        return tuple(dict.fromkeys([*([SUPER] if is_super else []), *asked]))
    if SUPER in asked:
        raise SettingsError("--protect none and --protect super contradict each other: give one")
    return tuple(text for text in asked if text != "none")


def protection(profile: Profile, expressions: Sequence[str]) -> Protection:
    """What `super` and `L:E` (expert E of layer L) protect.

    Raises:
        SettingsError: neither of the two.
        PlanError: no such layer or expert.
        ProfileError: super experts of a profile made with --stats answer.
    """
    blocks = [(b.name, b.experts) for b in profile.info.model.blocks]
    named: list[list[int]] = [[] for _ in blocks]
    for text in expressions:
        match = _EXPERT.fullmatch(text.strip())
        if match is not None:
            layer, row = find_expert(blocks, int(match[1]), int(match[2]), expert_ids(profile))
            named[layer].append(row)
        elif text != SUPER:
            raise SettingsError(
                f"--protect {text} names no expert: write super, none or L:E, as in 3:12"
            )
    supers = super_experts(profile) if SUPER in expressions else [()] * len(blocks)
    return Protection(tuple(supers), tuple(tuple(dict.fromkeys(own)) for own in named))


def super_experts(profile: Profile) -> list[tuple[int, ...]]:
    """Super experts (ids per layer): outputs with a value far above all others'. arXiv:2507.23279.

    An expert's largest absolute output value over all tokens is above the 99.5th percentile of all
    experts of all layers and above a tenth of the largest, in the first 75 % of the MoE layers.

    Raises:
        ProfileError: the profile was made with --stats answer.
    """
    largest = largest_values(profile)
    if largest is None:
        raise ProfileError(
            "--protect super: the profile holds no all-token statistics (--stats answer): profile "
            "with --stats all, or take --protect none"
        )
    all_X = np.concatenate(largest).astype(np.float64)
    threshold = max(float(np.percentile(all_X, PERCENTILE)), SHARE_OF_LARGEST * float(all_X.max()))
    n_layers = SHARE_OF_LAYERS * len(largest)
    return [
        tuple(np.flatnonzero(value_E > threshold).tolist()) if layer < n_layers else ()
        for layer, value_E in enumerate(largest)
    ]


def protected(order: Sequence[int], ids: Collection[int]) -> list[int]:
    """An order of experts with the protected ones first; else it stays as it is."""
    return [*(e for e in order if e in ids), *(e for e in order if e not in ids)]


def empty_draft(settings: CutSettings, slug: str, action: str, criterion: str) -> EditPlan:
    """A draft without edits, named after what makes it differ from the usual."""
    at, fold = settings.at, settings.rescale
    unusual = {"all": at, "exact": settings.layout, "mean": settings.fill}
    usual = {positions_of(settings.by, None)}
    marks = "".join(f"-{m}" for m, value in unusual.items() if value == m and m not in usual)
    if "fold" in LAYOUTS[settings.layout].options and fold != "answer":
        marks += f"-fold-{fold}"
    return EditPlan(
        f"{slug}{marks}",
        action,
        criterion,
        at,
        edits={},
        layout=settings.layout,
        removed=settings.fill,
        fold=fold,
        is_cut=True,
        is_calibrated=CRITERIA[settings.by].is_calibrated,
    )


@dataclass(frozen=True)
class Ranking:
    """Every expert of a profile by a criterion: scores (E,) and ids, best first, by layer.

    `orders` are the criterion's alone; `counts` say how often each expert was active.
    """

    blocks: tuple[BlockInfo, ...]
    settings: CutSettings
    scores: tuple[Array, ...]
    orders: tuple[list[int], ...]
    stay: Protection
    counts: tuple[Array, ...]
    numbers: ExpertIds


def rank(profile: Profile, settings: CutSettings, engine: "Engine | None" = None) -> Ranking:
    """Scores by the criterion, the order that follows, and who stays whatever it says."""
    layers = profile.layers
    at = settings.at if settings.by == "activations" else "answer"
    found = scores(profile, settings.by, settings.at, engine, settings.seed)
    orders = [ranked(s, layer.alpha_mean_E) for s, layer in zip(found, layers, strict=True)]
    return Ranking(
        blocks=profile.info.model.blocks,
        settings=settings,
        scores=tuple(found),
        orders=tuple(orders),
        stay=protection(profile, settings.protect),
        counts=tuple(activations(layer, at) for layer in layers),
        numbers=expert_ids(profile),
    )
