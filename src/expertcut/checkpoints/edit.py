"""An edit of a model as an object: what it fits, what it does at run time and on disk.

To add an edit, write a class of `Edit` and append it to `EDITS` (checkpoints/export.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from expertcut.checkpoints.shards import Change, Rewrite
from expertcut.checkpoints.tensor_names import DiskBlock, Headers, renumbered
from expertcut.data.corpus import CalibrationSet
from expertcut.edits.calibrate import Constants, Fit
from expertcut.edits.layouts import Positions
from expertcut.edits.merging import Quality
from expertcut.edits.plan import BlockEdit, Compression, EditPlan, PlanFile
from expertcut.edits.splits import Questions
from expertcut.errors import ContractError
from expertcut.models.expert_routing import ExpertRouting
from expertcut.models.hooks import registered
from expertcut.models.load import MoeModel, Source
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.passes import OnPass
from expertcut.scoring.rerouting import Rerouting, rerouted
from expertcut.scoring.router_bias import Tilts, tilted

Apply = Callable[[Tensor], Tensor]
RunEdited = Callable[[Sequence[MoeBlock]], AbstractContextManager[None]]
_PART = 1 << 15  # values that are scaled at a time: their float64 copies stay in the CPU's cache


@dataclass(kw_only=True)
class TensorChanges(Rewrite):
    """A `Rewrite` in the making; `blocks` are by loaded name, `unused` tensors are not loaded."""

    headers: Headers
    edits: Mapping[str, BlockEdit]
    blocks: Mapping[str, DiskBlock]
    unused: frozenset[str] = frozenset()
    routing: ExpertRouting | None = None  # the rule of the routers
    compression: Compression | None = None  # in the way that the edits' options say

    def change(self, name: str) -> Change:
        """What becomes of a tensor so far."""
        return self.changed.get(name) or Change(self.headers[name].shape)

    def apply(self, name: str, function: Apply) -> None:
        """Makes new values from those that the changes before gave."""
        before = self.change(name).apply
        both = function if before is None else lambda tensor: function(before(tensor))
        self.changed[name] = replace(self.change(name), apply=both)

    def keep_rows(self, name: str, axis: int, keep: tuple[int, ...]) -> None:
        """Keeps these entries of an axis; a change made before is kept for axis 0 alone."""
        shape = list(self.headers[name].shape)
        shape[axis] = len(keep)
        if axis == 0:
            self.changed[name] = replace(self.change(name), shape=tuple(shape), rows=keep)
        else:
            select = partial(torch.index_select, dim=axis, index=torch.tensor(keep))
            self.changed[name] = Change(tuple(shape), select)

    def scale_outputs(self, name: str, factors: Mapping[int, float]) -> None:
        """Scales the last projections of a block's experts, by their positions among the kept."""
        block, keep = self.blocks[name], self.edits[name].keep
        factors = {position: factor for position, factor in factors.items() if factor != 1}
        if factors and not block.last:
            raise ContractError(
                f"{block.name}: which projection of its experts is the last is not known, so their "
                "outputs cannot be scaled"
            )
        if not factors:
            return
        if block.by_expert:
            for position, factor in factors.items():
                for own in block.last & {*block.by_expert[keep[position]].values()}:
                    self.apply(own, partial(_scaled, factor=factor))
        stored = [expert for expert in keep if expert not in block.constants]
        by_row = {stored.index(keep[position]): factor for position, factor in factors.items()}
        for fused in block.last & set(block.axes):
            self.apply(fused, partial(_scaled_rows, factors=by_row))


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """Multiplied in float64 and rounded, as the loaded model would be."""
    for part in tensor.view(-1).split(_PART):
        part.copy_(part.double().mul_(factor))
    return tensor


def _scaled_rows(tensor: Tensor, factors: Mapping[int, float]) -> Tensor:
    for row, factor in factors.items():
        _scaled(tensor[row], factor)
    return tensor


@dataclass
class Simulation:
    """What edits do to an unedited model while it runs; they change the tensors in place."""

    moe: MoeModel
    is_as_written: bool  # scales kept experts as in the checkpoint; else the plan acts literally
    biases: Mapping[int, Tensor]  # (E,) by layer, on router logits; −inf forbids an expert
    scales: Mapping[int, Tensor]  # (E,) by layer, factors on gate weights
    apply_at: Positions = "all"  # where finite biases act
    routing: Rerouting | None = None  # acts on biased logits, and before the factors
    contexts: list[AbstractContextManager[Any]] = field(default_factory=list)


class LayoutWriter(Protocol):
    """How one layout stores a plan."""

    def check(self, source: Source, *, is_cutting: bool) -> None:
        """Raises ContractError unless the layout supports this model and such edits of it."""

    def changes(self, source: Source, edits: Mapping[str, BlockEdit]) -> TensorChanges:
        """Tensors that nothing has changed yet."""

    def remove_experts(self, tensors: TensorChanges, constants: Constants) -> None:
        """Removes the experts that the plan does not keep."""

    def reorder_experts(self, tensors: TensorChanges) -> None:
        """Moves experts into the order of the edits: their names, and every tensor's rows."""
        for name, block in tensors.blocks.items():
            order = tensors.edits[name].order or ()
            for position, expert in enumerate(order if block.by_expert else ()):
                tensors.renamed |= renumbered(block, expert, position)
            for tensor, axis in block.axes.items() if order else ():
                rows = block.rows(order) if tensor in block.fused else order
                tensors.keep_rows(tensor, axis, rows)

    def check_expert(self, tensors: TensorChanges, block: str, expert: int) -> None:
        """Raises ContractError if an expert has no weights of its own to change."""
        return

    def check_biases(self, source: Source, edits: Mapping[str, BlockEdit]) -> None:
        """Raises ContractError if a bias would not act as it should."""
        return

    def add_biases(
        self, tensors: TensorChanges, directions: Mapping[int, Tensor], apply_at: Positions
    ) -> None:
        """Adds the plan's biases to the routers; `directions` v (D,) are by layer."""

    def check_routing(self, source: Source, routing: Rerouting) -> None:
        """Raises ContractError unless the layout can hold this rule for the model."""

    def config(self, source: Source, tensors: TensorChanges, n_experts: int) -> dict[str, Any]:
        """`config.json` of the new checkpoint."""

    def files(self, _source: Source, _tensors: TensorChanges) -> Mapping[str, bytes]:
        """Further files, by name, in place of those that are copied."""
        return {}


@dataclass(frozen=True)
class Calibration:
    """What edits are fitted on: a profile, its questions, and the unedited checkpoint."""

    profile: Profile
    questions: Questions
    source: Source

    @property
    def n_experts(self) -> int:
        """Experts of each block before the edit."""
        return self.profile.info.model.blocks[0].experts


class Edit(Protocol):
    """One way to change a model; the methods that a class leaves out do nothing."""

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        """The edit of this kind in a plan, not fitted yet."""
        ...

    def check(self, _layout: LayoutWriter, _source: Source, _plan: EditPlan) -> None:
        """Raises a ContractError unless the layout can hold the edit for this model."""
        return

    def needs_engine(self, _calibration: Calibration) -> bool:
        """Whether `fit` must run the model."""
        return False

    def fit(self, _engine: Engine | None, _calibration: Calibration) -> Self:
        """The edit with the calibrated values that `rewrite` needs."""
        return self

    def judge(self, _engine: Engine, _held_out: CalibrationSet) -> Sequence[Fit | Quality]:
        """The quality of the fit on held-out questions, by layer."""
        return ()

    def simulate(self, _simulation: Simulation) -> None:
        """Acts on the unedited model while it runs."""
        return

    @property
    def reference(self) -> str:
        """The name of what the held-out check compares with; empty for an edit without effect."""
        return ""

    @property
    def is_named_alone(self) -> bool:
        """Whether `reference` says too little where other edits act too."""
        return False

    def forms(self) -> Mapping[str, Self | None]:
        """What the held-out check simulates in place of the edit, by name; None is nothing."""
        return {}

    def reference_of_edited(self, _moe: MoeModel) -> RunEdited | None:
        """From the unedited model: how the edited one runs as the reference, if none simulates."""
        return None

    def rewrite(self, _layout: LayoutWriter, _tensors: TensorChanges) -> None:
        """Acts on the tensors on disk."""
        return

    def describe(self, _n_experts: int | None) -> Iterable[str]:
        """Sentences for card and page; the base had `n_experts` in each layer, None if unknown."""
        return ()


@contextmanager
def simulated(moe: MoeModel, edits: Iterable[Edit], *, is_as_written: bool) -> Iterator[OnPass]:
    """Runs an unedited model with edits; the yielded function must be called before each pass."""
    biases = {block.layer: torch.zeros(block.n_experts) for block in moe.blocks}
    scales = {b.layer: torch.ones(b.n_experts, dtype=torch.float64) for b in moe.blocks}
    simulation = Simulation(moe, is_as_written, biases, scales)
    for edit in edits:
        edit.simulate(simulation)
    biases = {layer: bias_E for layer, bias_E in biases.items() if bias_E.any()}
    scales = {layer: scale_E for layer, scale_E in scales.items() if (scale_E != 1).any()}
    tilts, contexts = Tilts(biases, scales, simulation.apply_at), registered(simulation.contexts)
    if simulation.routing is None:
        with contexts, tilted(moe.blocks, tilts) as begin:
            yield begin
        return
    with (
        contexts,
        tilted(moe.blocks, Tilts(biases)),
        rerouted(moe.blocks, simulation.routing) as begin,
        tilted(moe.blocks, Tilts(scale_by_layer=scales)),
    ):
        yield begin
