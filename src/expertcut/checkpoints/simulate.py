"""A plan acts in the unedited model while it runs, to the letter or as its checkpoint will."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from expertcut.checkpoints.edit import Edit, Simulation
from expertcut.checkpoints.export import edits_of
from expertcut.checkpoints.prune_edit import PruneEdit
from expertcut.edits.calibrate import Constants
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, EditPlan
from expertcut.models.load import MoeModel
from expertcut.scoring.passes import OnPass


@contextmanager
def apply_at_runtime(moe: MoeModel, plan: EditPlan, constants: Constants) -> Iterator[OnPass]:
    """The plan to the letter; `constants` are the outputs of removed experts in layout exact.

    The yielded function must be called before each forward pass.
    """
    simulation = Simulation(moe, plan.apply_at)
    for edit in edits_of(plan):
        its = replace(edit, constants=constants) if isinstance(edit, PruneEdit) else edit
        its.simulate(simulation)
    with simulation.running() as begin:
        yield begin


@contextmanager
def as_written(moe: MoeModel, plan: EditPlan, edits: Iterable[Edit]) -> Iterator[OnPass]:
    """The fitted edits of a cut, with the rounding of its checkpoint.

    The yielded function must be called before each forward pass.

    Raises:
        ContractError: experts to be scaled whose last projection is not known, or is not used.
    """
    simulation = Simulation(moe, plan.apply_at, is_as_written=True)
    for edit in edits:
        edit.simulate(simulation)
    with simulation.running() as begin:
        yield begin


def renumbered(plan: EditPlan) -> dict[str, BlockEdit]:
    """The edits by the numbers that the experts have in the checkpoint that the plan makes."""
    if LAYOUTS[plan.layout].keeps_rows:
        return dict(plan.edits)
    return {
        name: BlockEdit(
            keep=tuple(range(len(edit.keep))),
            bias={edit.keep.index(e): bias for e, bias in edit.bias.items()},
            scale={edit.keep.index(e): factor for e, factor in edit.scale.items()},
        )
        for name, edit in plan.edits.items()
    }
