"""What the profiled model was made from: numbers that its experts had before, questions used then.

Layout stock cuts rows out of routers, so what was expert 12 may lie in row 9. The plan that such a
checkpoint holds tells, and experts are called by what they were in the model that was first.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expertcut.errors import PlanError, ProfileError
from expertcut.interventions.plan import PLAN_FILE, Edit, Plan, load_hashes, load_plan
from expertcut.models.checkpoint_dir import find_local
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile


@dataclass(frozen=True)
class Numbers:
    """By block name: the number of each router row, and rows whose experts are constants already.

    In blocks that are not named, rows are numbered from 0 and all experts are there.
    """

    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constant: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def number(self, block: str, row: int) -> int:
        """What the expert of a row is called."""
        return self.rows[block][row] if block in self.rows else row

    def row(self, block: str, number: int) -> int | None:
        """Where an expert lies; None where it is none of those that were kept."""
        rows = self.rows.get(block)
        row = number if rows is None else rows.index(number) if number in rows else None
        return None if row in self.constant.get(block, ()) else row

    def kept(self, block: str, rows: tuple[int, ...]) -> tuple[int, ...]:
        """The numbers of those of some rows that hold an expert."""
        gone = self.constant.get(block, frozenset())
        return tuple(self.number(block, row) for row in rows if row not in gone)

    def named(self, block: str, edit: Edit) -> Edit:
        """An edit of rows, in the words of plan.json."""
        return Edit(
            keep=self.kept(block, edit.keep),
            bias={self.number(block, e): bias for e, bias in edit.bias.items()},
            scale={self.number(block, e): factor for e, factor in edit.scale.items()},
            rows=self.rows.get(block),
            merged=None if edit.merged is None else self._merged(block, edit.merged),
        )

    def _merged(
        self, block: str, merged: Mapping[int, Mapping[int, float]]
    ) -> dict[int, dict[int, float]]:
        return {
            self.number(block, e): {self.number(block, m): share for m, share in members.items()}
            for e, members in merged.items()
        }


def numbers_of(profile: Profile) -> Numbers:
    """As the plan in the profiled checkpoint has them; a model without one was never cut.

    Raises:
        PlanError: a plan that is not this checkpoint's.
        ProfileError: the checkpoint is not there.
    """
    found = _plan_of(profile)
    if found is None:
        return Numbers()
    folder, plan = found
    rows: dict[str, tuple[int, ...]] = {}
    constant: dict[str, frozenset[int]] = {}
    for block in profile.info.model.blocks:
        edit = plan.blocks.get(block.name)
        own = () if edit is None else _rows(plan, edit, block)
        if edit is None or len(own) != block.experts:
            raise PlanError(
                f"{folder / PLAN_FILE} is not of this checkpoint, whose {block.name} has "
                f"{block.experts} experts: put the plan back that made it, or take this one away"
            )
        if own != tuple(range(block.experts)):
            rows[block.name] = own
        if gone := frozenset(row for row, number in enumerate(own) if number not in edit.keep):
            constant[block.name] = gone
    return Numbers(rows, constant)


def find_expert(
    blocks: Sequence[tuple[str, int]], layer: int, expert: int, numbers: Numbers
) -> tuple[int, int]:
    """The layer and the row of its router that an expert has; blocks are names and counts.

    Raises:
        PlanError: no such layer or expert.
    """
    if layer >= len(blocks):
        raise PlanError(
            f"no layer {layer}: the model has MoE layers 0 to {len(blocks) - 1} "
            "(layers are counted from 0)"
        )
    name, n_experts = blocks[layer]
    kept = numbers.kept(name, tuple(range(n_experts)))
    row = numbers.row(name, expert)
    if expert not in kept or row is None:
        if kept == tuple(range(n_experts)):
            raise PlanError(
                f"no expert {expert} in layer {layer}: it has experts 0 to {n_experts - 1}"
            )
        raise PlanError(
            f"expert {expert} of layer {layer} is not in this pruned model: "
            f"there it keeps {ids_text(kept)}, name one of these"
        )
    return layer, row


def inherited_hashes(profile: Profile) -> frozenset[str]:
    """Hash lines of what the profiled checkpoint was itself chosen or fitted on.

    Raises:
        PlanError: its list is missing or not its own.
        ProfileError: the checkpoint is not there.
    """
    found = _plan_of(profile)
    return frozenset() if found is None else load_hashes(*found)


def ids_text(ids: tuple[int, ...]) -> str:
    """Ids as `0–3, 7, 9–12`."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def _rows(plan: Plan, edit: Edit, block: BlockInfo) -> tuple[int, ...]:
    """The numbers of the rows that a plan left."""
    if plan.layout == "stock":
        return edit.keep
    return edit.rows or tuple(range(block.experts))


def model_folder(profile: Profile) -> Path | None:
    """Where the profiled model lies on this machine; None for one of the hub.

    A folder that holds a plan, or that an older profile names by a relative path, must hold the
    weights that were profiled; of others this is seen where they are read.

    Raises:
        ProfileError: it is not there.
    """
    model = profile.info.model
    if model.revision is not None:
        return None
    folder = Path(model.id)
    if folder.is_absolute() and folder.is_dir() and not os.path.lexists(folder / PLAN_FILE):
        return folder
    found = find_local(model.id, model.fingerprint, profile.path)
    if found is None:
        raise ProfileError(
            f"no such model: {profile.path} is a profile of {model.id}, which is not there with "
            f"its weights ({model.fingerprint[:8]}), so what was done to it before is not known: "
            "put it back, or profile again"
        )
    return found


def _plan_of(profile: Profile) -> tuple[Path, Plan] | None:
    """The plan in a checkpoint's folder, or among what was downloaded of it."""
    folder, model = model_folder(profile), profile.info.model
    if folder is None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.id, PLAN_FILE, revision=model.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return (folder, load_plan(folder)) if os.path.lexists(folder / PLAN_FILE) else None
