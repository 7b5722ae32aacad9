"""The layouts of a checkpoint as a table: what each allows, and what removing an expert means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Layout = Literal["stock", "exact"]
Positions = Literal["answer", "all"]
Removed = Literal["zero", "mean"]  # output of removed experts in layout exact
Fold = Literal["answer", "all", "off"]  # tokens over which layout stock rescales gate weights


@dataclass(frozen=True)
class LayoutRules:
    """`keeps_rows`: routers keep a row for each removed expert, which then gives a constant.

    Otherwise the rows go, and no token is routed to a removed expert. `options` are those of
    `prune` that belong to this layout alone; `mark` is its suffix in the names of outputs.
    """

    removal: Literal["reroute", "constant"]
    keeps_rows: bool
    needs_equal_counts: bool  # one number of experts for all layers, and for all routing groups
    fits_biases: bool  # as directions in the router's rows, at chosen positions
    options: frozenset[str]
    mark: str = ""


LAYOUTS: Mapping[Layout, LayoutRules] = {
    "stock": LayoutRules(
        removal="reroute",
        keeps_rows=False,
        needs_equal_counts=True,
        fits_biases=True,
        options=frozenset({"fold"}),
    ),
    "exact": LayoutRules(
        removal="constant",
        keeps_rows=True,
        needs_equal_counts=False,
        fits_biases=False,
        options=frozenset({"removed"}),
        mark="exact",
    ),
}
