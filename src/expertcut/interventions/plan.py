"""The plan: per block which experts stay, which get a logit bias, which a gate-weight scale.

`plan.json` holds one line per block, so that it can be read, edited by hand and diffed.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat, ValidationError

from expertcut.errors import PlanError
from expertcut.profiling.chunks import write_atomically
from expertcut.profiling.store import BlockInfo, ModelInfo, Record, first_fault

PLAN_FILE = "plan.json"
QUESTIONS_FILE = "chosen_on.txt"
Positions = Literal["answer", "all"]
Layout = Literal["stock", "exact"]
Removed = Literal["zero", "mean"]  # what a removed expert of layout exact gives
ApplyAt = Literal["answer", "all"]  # at which tokens a bias acts
Fold = Literal["answer", "all", "off"]  # over which tokens layout stock measures the inflation


class Edit(Record):
    """One block's change; ids are the unedited model's.

    `bias` is added to router logits, `scale` multiplies gate weights.
    """

    keep: tuple[int, ...]
    bias: dict[int, FiniteFloat] = Field(default_factory=dict)
    scale: dict[int, FiniteFloat] = Field(default_factory=dict)

    def removed(self, n_experts: int) -> tuple[int, ...]:
        """Sorted ids of the experts that do not stay."""
        return tuple(expert for expert in range(n_experts) if expert not in self.keep)


class PlanModel(Record):
    """For which model."""

    id: str
    revision: str | None
    fingerprint: str


class ChosenOn(Record):
    """The questions that a plan was chosen or fitted on; their hashes lie in `chosen_on.txt`."""

    quiz: str
    split: str
    questions: int
    fitted_split: str | None = None
    fitted_questions: int = 0
    sha256: str


class Point(Record):
    """One try of a search for the strength; `biases` are (layer, expert, bias in logits)."""

    experts: int
    strength: FiniteFloat
    biases: tuple[tuple[int, int, FiniteFloat], ...]
    questions: int
    accuracy: FiniteFloat
    ci95: tuple[FiniteFloat, FiniteFloat]


class Plan(Record):
    """`plan.json`."""

    format: Literal[1] = 1
    model: PlanModel
    action: str
    criterion: str
    positions: Positions
    removal: Literal["reroute", "constant"]
    layout: Layout
    removed: Removed | None = None
    fold: Fold | None = None
    apply_at: ApplyAt | None = None
    chosen_on: ChosenOn
    tuning: tuple[Point, ...] = ()
    proof: dict[str, Any] = Field(default_factory=dict)
    blocks: dict[str, Edit] = Field(min_length=1)


@dataclass(frozen=True)
class Draft:
    """A choice made from a profile, before anything is fitted or written.

    `slug` names the outputs, `action` says in words what was asked for. `removed` is for layout
    exact, `fold` for layout stock, `apply_at` for biases.
    """

    slug: str
    action: str
    criterion: str
    positions: Positions
    edits: Mapping[str, Edit]
    layout: Layout = "stock"
    removed: Removed = "zero"
    fold: Fold = "answer"
    apply_at: ApplyAt = "all"

    @property
    def is_biased(self) -> bool:
        """Whether any expert gets a logit bias."""
        return any(edit.bias for edit in self.edits.values())

    @property
    def is_fitting(self) -> bool:
        """Whether directions must be fitted: only a bias in layout stock needs them."""
        return self.layout == "stock" and self.is_biased


def plan_model(info: ModelInfo) -> PlanModel:
    """How a plan names the model of a profile."""
    return PlanModel(id=info.id, revision=info.revision, fingerprint=info.fingerprint)


def check_edits(edits: Mapping[str, Edit], blocks: Sequence[BlockInfo], layout: Layout) -> None:
    """That the edits fit the blocks and that the layout can carry them.

    Stock has one count for all layers, and the router must find K experts among those that stay;
    exact only needs one that stays.

    Raises:
        PlanError: naming the block and what it must be.
    """
    if list(edits) != [block.name for block in blocks]:
        raise PlanError(
            f"the plan names {len(edits)} blocks, the model has {len(blocks)}: "
            f"list {blocks[0].name} … {blocks[-1].name} in order"
        )
    for block in blocks:
        _check_block(block, edits[block.name], block.top_k if layout == "stock" else 1)
    if layout == "exact":
        return
    for block in blocks:
        _check_groups(block, edits[block.name])
    counts = {len(edit.keep) for edit in edits.values()}
    if len(counts) > 1 or len({block.experts for block in blocks}) > 1:
        raise PlanError(
            f"layout stock needs one count for all layers, found {sorted(counts)}: "
            "keep the same number in each, or take --layout exact"
        )


def _check_block(block: BlockInfo, edit: Edit, least: int) -> None:
    name, n_kept = block.name, len(edit.keep)
    if list(edit.keep) != sorted(set(edit.keep)):
        raise PlanError(f"{name}: keep must be sorted and without repeats")
    outside = [e for e in edit.keep if not 0 <= e < block.experts]
    if outside:
        raise PlanError(
            f"{name} keeps expert {outside[0]} but has experts 0 to {block.experts - 1}"
        )
    if n_kept < least:
        raise PlanError(
            f"{name} keeps {n_kept} experts but routes each token to {block.top_k}: "
            f"keep at least {least}"
        )
    unknown = sorted({*edit.bias, *edit.scale} - set(edit.keep))
    if unknown:
        raise PlanError(f"{name}: expert {unknown[0]} has a bias or scale but is not kept")


def _check_groups(block: BlockInfo, edit: Edit) -> None:
    if block.groups == 1 or len(edit.keep) == block.experts:
        return
    size = block.experts // block.groups
    per_group = [sum(e // size == g for e in edit.keep) for g in range(block.groups)]
    least = least_per_group(block)
    if len(set(per_group)) > 1 or per_group[0] < least:
        raise PlanError(
            f"{block.name} routes in {block.groups} groups and keeps {per_group} of them: "
            f"keep equally many in each, at least {least}"
        )


def least_per_group(block: BlockInfo) -> int:
    """Experts that each group must keep: 2 rank a group, and those used must hold the top k."""
    return max(2, -(-block.top_k // block.top_groups))


def save_plan(folder: Path, plan: Plan, hashes: Collection[str]) -> None:
    """Writes `plan.json` and the hashes of the questions it was chosen on."""
    write_atomically(folder / QUESTIONS_FILE, _hash_lines(hashes))
    write_atomically(folder / PLAN_FILE, plan_text(plan).encode())


def plan_text(plan: Plan) -> str:
    """The plan as JSON with one line per block."""
    head = plan.model_dump(mode="json", exclude={"blocks"})
    lines = [f' "{key}": {json.dumps(value)},' for key, value in head.items()]
    edits = [
        f"  {json.dumps(name)}: {json.dumps(edit.model_dump(mode='json'))}"
        for name, edit in plan.blocks.items()
    ]
    return "\n".join(["{", *lines, ' "blocks": {', ",\n".join(edits), " }", "}"]) + "\n"


def load_plan(path: Path) -> Plan:
    """A plan from its file or the folder that holds it.

    Raises:
        PlanError: no plan there, or one that does not hold together.
    """
    file = path / PLAN_FILE if path.is_dir() else path
    try:
        return Plan.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise PlanError(f"{file} is no plan: {first_fault(error)}") from None
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}") from None


def load_hashes(folder: Path, plan: Plan) -> frozenset[str]:
    """The hashes of the questions that a plan was chosen or fitted on.

    Raises:
        PlanError: the list is missing or not the one that the plan was made with.
    """
    file = folder / QUESTIONS_FILE
    try:
        content = file.read_bytes()
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != plan.chosen_on.sha256:
        raise PlanError(f"{file} is not the list that {PLAN_FILE} was made with")
    return frozenset(content.decode("ascii").split())


def hashes_sha256(hashes: Collection[str]) -> str:
    """The checksum that `chosen_on` carries."""
    return hashlib.sha256(_hash_lines(hashes)).hexdigest()


def _hash_lines(hashes: Collection[str]) -> bytes:
    return "".join(f"{h}\n" for h in sorted(set(hashes))).encode("ascii")
