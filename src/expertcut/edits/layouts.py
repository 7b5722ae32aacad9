"""The layouts of a checkpoint as a table: what each allows, and what removing an expert means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Layout = Literal["stock", "exact", "routed", "packed"]
CutLayout = Literal["stock", "exact"]  # what removes, biases or merges experts can be written in
Positions = Literal["answer", "all"]
Removed = Literal["zero", "mean"]  # output of removed experts in layout exact
Fold = Literal["answer", "all", "off"]  # tokens over which layout stock rescales gate weights


@dataclass(frozen=True)
class LayoutRules:
    """What a layout allows, and what removing an expert means."""

    removal: Literal["reroute", "constant"]
    keeps_rows: bool  # of removed experts, which give constants; else no token is routed to them
    needs_equal_counts: bool  # one number of experts for all layers, and for all routing groups
    fits_biases: bool  # as directions in the router's rows, at chosen positions
    options: frozenset[str]  # of `prune` that belong to this layout alone
    mark: str = ""  # suffix in the names of outputs


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
    # The tensors of stock, behind routers that choose by a rule.
    "routed": LayoutRules(
        removal="reroute",
        keeps_rows=False,
        needs_equal_counts=True,
        fits_biases=True,
        options=frozenset({"fold"}),
    ),
    # Every expert stays, each stored in its own way.
    "packed": LayoutRules(
        removal="reroute",
        keeps_rows=True,
        needs_equal_counts=False,
        fits_biases=False,
        options=frozenset(),
    ),
}
