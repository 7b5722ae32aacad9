"""How experts are ranked before any of them goes, and what removing will mean."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from expertcut.errors import SettingsError
from expertcut.interventions.criteria.observed import activations
from expertcut.interventions.criteria.protection import Protection, protection
from expertcut.interventions.criteria.scoring import CALIBRATED, positions_of, ranked, scores
from expertcut.interventions.lineage import Numbers, numbers_of
from expertcut.interventions.plan import Draft, Fold, Layout, Positions, Removed
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.statistics import layer_statistics
from expertcut.profiling.storage import Profile

if TYPE_CHECKING:
    from expertcut.scoring.engine import Engine

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Way:
    """How to rank and what removing means, as on the command line.

    `protect` are expressions of `protection`, `seed` is for the criterion `random`.
    """

    by: str = "activations"
    positions: Positions | None = None
    layout: Layout = "stock"
    removed: Removed = "zero"
    fold: Fold = "answer"
    protect: tuple[str, ...] = ()
    seed: int = 0

    @property
    def at(self) -> Positions:
        """The positions that count: the criterion's own where none were asked for."""
        return positions_of(self.by, self.positions)

    @classmethod
    def of(
        cls,
        by: str,
        positions: Positions | None,
        layout: Layout,
        removed: Removed | None,
        fold: Fold | None,
    ) -> Self:
        """As given, and what each layout does where nothing is.

        Raises:
            SettingsError: an option of the other layout.
        """
        if removed is not None and layout != "exact":
            raise SettingsError(
                f"--removed {removed} is of layout exact: add --layout exact or leave it out"
            )
        if fold is not None and layout != "stock":
            raise SettingsError(
                f"--fold {fold} is of layout stock: {layout} scales nothing, leave it out"
            )
        return cls(by, positions, layout, removed or "zero", fold or "answer")

    def draft(self, slug: str, action: str, criterion: str) -> Draft:
        """A draft without edits, named after what makes it differ from the usual."""
        unusual = {"all": self.at, "exact": self.layout, "mean": self.removed}
        usual = {positions_of(self.by, None)}
        marks = "".join(f"-{m}" for m, value in unusual.items() if value == m and m not in usual)
        if self.layout == "stock" and self.fold != "answer":
            marks += f"-fold-{self.fold}"
        return Draft(
            f"{slug}{marks}",
            action,
            criterion,
            self.at,
            edits={},
            layout=self.layout,
            removed=self.removed,
            fold=self.fold,
            is_cut=True,
            is_calibrated=self.by in CALIBRATED,
        )


@dataclass(frozen=True)
class Ranking:
    """Every expert of a profile by a criterion: scores (E,) and ids, best first, by layer.

    `orders` are the criterion's alone; `counts` say how often each expert was active.
    """

    blocks: tuple[BlockInfo, ...]
    way: Way
    scores: tuple[Array, ...]
    orders: tuple[list[int], ...]
    stay: Protection
    counts: tuple[Array, ...]
    numbers: Numbers


def rank(profile: Profile, way: Way, engine: "Engine | None" = None) -> Ranking:
    """Scores by the criterion, the order that follows, and who stays whatever it says."""
    layers = layer_statistics(profile)
    at = way.at if way.by == "activations" else "answer"
    found = scores(profile, way.by, way.at, engine, way.seed)
    orders = [ranked(s, layer.alpha_mean_E) for s, layer in zip(found, layers, strict=True)]
    return Ranking(
        blocks=profile.info.model.blocks,
        way=way,
        scores=tuple(found),
        orders=tuple(orders),
        stay=protection(profile, way.protect),
        counts=tuple(activations(layer, at) for layer in layers),
        numbers=numbers_of(profile),
    )
