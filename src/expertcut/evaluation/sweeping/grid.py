"""Which cuts a sweep tries: criteria against the share of experts that stays."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

from expertcut.edits.budget import Budget, Keep, asked_count, check_budget, counts
from expertcut.edits.plan import Layout
from expertcut.errors import PlanError, SettingsError
from expertcut.evaluation.sweeping.outcome import Sweep, SweepCell
from expertcut.profiling.schema import BlockInfo

ALL = "all"


@dataclass(frozen=True)
class Grid:
    """Every criterion with every fraction, and how a fraction becomes numbers of experts."""

    by: tuple[str, ...]
    fractions: tuple[float, ...]
    budget: Budget = "layer"
    min_keep: int | None = None

    @classmethod
    def of(
        cls, by: str, fractions: str, known: Collection[str], budget: Budget, min_keep: int | None
    ) -> Self:
        """As on the command line.

        Raises:
            SettingsError: a criterion that is none, a share that is none, or one of them twice.
        """
        shares = read_fractions(fractions, "--sweep")
        return cls(read_criteria(by, known), shares, budget, min_keep)

    def check(self, blocks: Sequence[BlockInfo], layout: Layout) -> None:
        """That the model and the layout allow every cell.

        Raises:
            PlanError: one that keeps too few.
            SettingsError: a budget that the layout cannot carry.
        """
        check_budget(self.budget, self.min_keep, layout)
        for fraction in self.fractions:
            keep, n_keep = self.keep(fraction, blocks, layout)
            allowed = counts(keep, blocks, layout)
            if n_keep not in allowed:
                place = "in all" if self.budget == "global" else "a layer"
                raise PlanError(
                    f"{fraction:g} of the experts are {n_keep} {place}: keep {allowed[0]} to "
                    f"{allowed[-1]}"
                )

    def keep(
        self, fraction: float, blocks: Sequence[BlockInfo], layout: Layout
    ) -> tuple[Keep, int]:
        """What is kept at a fraction, and how many that are."""
        keep = Keep(fraction=fraction, budget=self.budget, min_keep=self.min_keep)
        return keep, asked_count(keep, blocks, layout)

    def with_cell(self, found: Sweep, cell: SweepCell) -> Sweep:
        """The sweep with a cell more, in the grid's order."""
        cells = sorted(
            (*found.cells, cell),
            key=lambda c: (self.by.index(c.by), self.fractions.index(c.fraction)),
        )
        return found.model_copy(update={"cells": tuple(cells)})


def read_criteria(text: str, known: Collection[str]) -> tuple[str, ...]:
    """`reap,activations`, or `all` of them.

    Raises:
        SettingsError: one that is no criterion, or twice there.
    """
    if text == ALL:
        return tuple(known)
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise SettingsError(f"--by {name} is no criterion: take one of {', '.join(known)}")
        if names.count(name) > 1:
            raise SettingsError(f"--by names {name} twice")
    return names


def read_fractions(text: str, option: str) -> tuple[float, ...]:
    """`0.75,0.5,0.25` as numbers.

    Raises:
        SettingsError: one that is no share above 0 and at most 1, or twice there.
    """
    shares = []
    for part in text.split(","):
        try:
            share = float(part)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise SettingsError(
                f"{option} {text}: {part.strip()!r} must be a share above 0, at most 1"
            )
        if share in shares:
            raise SettingsError(f"{option} {text} has {share:g} twice")
        shares.append(share)
    return tuple(shares)
