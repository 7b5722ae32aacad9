"""The plan of a healed checkpoint: the experts it has, by their numbers, and what it was shown."""

from expertcut.checkpoints.exact import is_exact
from expertcut.edits.plan import ChosenOn, Edit, Layout, Plan, PlanModel, hashes_sha256, load_hashes
from expertcut.healing.asking import Healing
from expertcut.healing.data.sources import Read
from expertcut.healing.lineage import plan_of
from expertcut.models.checkpoint_dir import absolute_id, read_config
from expertcut.models.load import MoeModel, Source


def used_questions(source: Source, read: Read) -> frozenset[str]:
    """Hash lines of all that this run, or a step before it, looked at."""
    plan = plan_of(source)
    return read.hashes | (load_hashes(source.path, plan) if plan else frozenset())


def healed_plan(moe: MoeModel, asked: Healing, objective: str, read: Read) -> Plan:
    """Without its proof. Experts stay who they are, so blocks are those of the plan before."""
    source = moe.source
    before = plan_of(source)
    layout: Layout = "exact" if is_exact(read_config(source.path)) else "stock"
    first = asked.data.quizzes[0].name if asked.data.quizzes else asked.data.texts[0].name
    return Plan(
        model=PlanModel(
            id=absolute_id(source.id, source.revision),
            revision=source.revision,
            fingerprint=source.fingerprint,
        ),
        action=f"heal --objective {objective}",
        criterion="by hand",
        positions="all",
        removal="constant" if layout == "exact" else "reroute",
        layout=layout,
        removed=before.removed if before else None,
        chosen_on=ChosenOn(
            quiz=first,
            split=asked.data.split,
            questions=read.n_questions,
            sha256=hashes_sha256(used_questions(source, read)),
        ),
        blocks=_blocks(moe, before),
    )


def _blocks(moe: MoeModel, before: Plan | None) -> dict[str, Edit]:
    found: dict[str, Edit] = {}
    for block in moe.blocks:
        edit = before.blocks.get(block.name) if before else None
        if edit is None:
            found[block.name] = Edit(keep=tuple(range(block.n_experts)))
        else:
            found[block.name] = Edit(keep=edit.keep, rows=edit.rows)
    return found
