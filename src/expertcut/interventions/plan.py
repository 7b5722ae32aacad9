"""The plan: per block which experts stay, which get a logit bias, which a gate-weight scale.

`plan.json` holds one line per block, so that it can be read, edited by hand and diffed.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from expertcut.documents import Format1, Identified, Record, load_record
from expertcut.errors import PlanError
from expertcut.files import read_file, write_atomically
from expertcut.profiling.schema import ModelInfo

if TYPE_CHECKING:
    from expertcut.interventions.lineage import Numbers

PLAN_FILE = "plan.json"
PROOF_FILE = "proof.json"
QUESTIONS_FILE = "chosen_on.txt"
HEALING_FILE = "healing.json"
Positions = Literal["answer", "all"]
Layout = Literal["stock", "exact"]
Removed = Literal["zero", "mean"]  # what a removed expert of layout exact gives
Fold = Literal["answer", "all", "off"]  # over which tokens layout stock measures the inflation


Expert = Annotated[int, Field(ge=0, lt=1 << 16)]


class Edit(Record):
    """One block's change; ids are the unedited model's.

    `bias` is added to router logits, `scale` multiplies gate weights. `merged` says what an expert
    that stays is made of, where that is several: their shares by id, its own among them. In
    plan.json the ids are those of the model before any cut, and `rows` gives those of the router's
    rows where earlier cuts made them differ.
    """

    keep: tuple[Expert, ...]
    bias: dict[Expert, FiniteFloat] = Field(default_factory=dict)
    scale: dict[Expert, FiniteFloat] = Field(default_factory=dict)
    rows: tuple[Expert, ...] | None = None
    merged: dict[Expert, dict[Expert, FiniteFloat]] | None = None

    @model_validator(mode="after")
    def _names_experts_that_stay(self) -> Self:
        if any(a >= b for a, b in pairwise(self.keep)):
            raise ValueError("keep must be ascending numbers, none of them twice")
        others = {*self.tilted, *(self.merged or {})} - set(self.keep)
        if others:
            raise ValueError(f"expert {min(others)} does not stay, but is changed")
        return self

    @property
    def tilted(self) -> tuple[int, ...]:
        """The experts with a bias or a factor, each once."""
        return tuple(dict.fromkeys((*self.bias, *self.scale)))

    def removed(self, n_experts: int) -> tuple[int, ...]:
        """Sorted ids of the experts that do not stay."""
        return tuple(expert for expert in range(n_experts) if expert not in self.keep)


class PlanModel(Identified):
    """For which model."""

    fingerprint: str


class ChosenOn(Record):
    """The questions that a plan was chosen or fitted on; their hashes lie in `chosen_on.txt`."""

    quiz: str
    split: str
    questions: int
    fitted_split: str | None = None
    fitted_questions: int = 0
    sha256: str


class PlanAdapter(Record):
    """The LoRA adapter that was cut along: where it lay, and the SHA-256 of its files."""

    path: str
    config_sha256: str
    weights_sha256: str


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

    format: Format1 = 1
    model: PlanModel
    action: str
    criterion: str
    positions: Positions
    removal: Literal["reroute", "constant", "merge"]
    layout: Layout
    removed: Removed | None = None
    fold: Fold | None = None
    apply_at: Positions | None = None
    chosen_on: ChosenOn
    adapter: PlanAdapter | None = None
    tuning: tuple[Point, ...] = ()
    proof: dict[str, Any] = Field(default_factory=dict)
    blocks: dict[str, Edit] = Field(min_length=1)

    @property
    def healed_from(self) -> str | None:
        """Fingerprint of the checkpoint that was healed; None where that was not the last step."""
        return self.model.fingerprint if self.action.startswith("heal ") else None


@dataclass(frozen=True)
class Draft:
    """A choice made from a profile, before anything is fitted or written.

    `slug` names the outputs, `action` says in words what was asked for. `removed` is for layout
    exact, `fold` for layout stock; `apply_at` says at which tokens a bias acts. What was chosen on
    the tuning questions instead of the profile's is `is_tuned`, on both `is_calibrated`; `tuning`
    is the curve of a search;
    `used` are hash lines of what else was looked at.
    `edits` are of rows of the profiled routers, which `numbers` calls by what they were before
    earlier cuts.
    """

    slug: str
    action: str
    criterion: str
    positions: Positions
    edits: Mapping[str, Edit]
    layout: Layout = "stock"
    removed: Removed = "zero"
    fold: Fold = "answer"
    apply_at: Positions = "all"
    is_cut: bool = False
    numbers: "Numbers | None" = None
    is_tuned: bool = False
    is_calibrated: bool = False
    tuning: tuple[Point, ...] = ()
    used: frozenset[str] = frozenset()

    @property
    def is_biased(self) -> bool:
        """Whether any expert gets a logit bias."""
        return any(edit.bias for edit in self.edits.values())

    @property
    def is_tilted(self) -> bool:
        """Whether any expert gets a bias or a factor."""
        return any(edit.tilted for edit in self.edits.values())

    @property
    def is_merging(self) -> bool:
        """Whether experts that go live on in others."""
        return any(edit.merged for edit in self.edits.values())

    @property
    def is_fitting(self) -> bool:
        """Whether directions must be fitted: only a bias in layout stock needs them."""
        return self.layout == "stock" and self.is_biased

    @property
    def asks_tuning(self) -> bool:
        """Whether tuning questions were or will be looked at."""
        return self.is_tuned or self.is_calibrated or self.is_fitting


def plan_model(info: ModelInfo) -> PlanModel:
    """How a plan names the model of a profile."""
    return PlanModel(id=info.id, revision=info.revision, fingerprint=info.fingerprint)


def save_plan(folder: Path, plan: Plan, lines: Collection[str]) -> None:
    """Writes `plan.json` and the hash lines of the questions it was chosen on."""
    write_atomically(folder / QUESTIONS_FILE, _hash_lines(lines))
    write_atomically(folder / PLAN_FILE, plan_text(plan).encode())


def plan_text(plan: Plan) -> str:
    """The plan as JSON with one line per block."""
    without = {"blocks"} if plan.adapter else {"blocks", "adapter"}
    head = plan.model_dump(mode="json", exclude=without)
    lines = [f' "{key}": {json.dumps(value)},' for key, value in head.items()]
    edits = [
        f"  {json.dumps(name)}: {json.dumps(edit.model_dump(mode='json', exclude_none=True))}"
        for name, edit in plan.blocks.items()
    ]
    return "\n".join(["{", *lines, ' "blocks": {', ",\n".join(edits), " }", "}"]) + "\n"


def load_plan(path: Path) -> Plan:
    """A plan from its file or the folder that holds it.

    Raises:
        PlanError: no plan there, or one that does not hold together.
    """
    file = path / PLAN_FILE if path.is_dir() else path
    return load_record(file, Plan, PlanError, "is no plan")


def load_hashes(folder: Path, plan: Plan) -> frozenset[str]:
    """The questions that a plan was chosen or fitted on, as lines of one or two hashes.

    The first is the content hash, the second, which older files lack, the overlap hash.

    Raises:
        PlanError: the list is missing or not the one that the plan was made with.
    """
    file = folder / QUESTIONS_FILE
    try:
        content = read_file(file)
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != plan.chosen_on.sha256:
        raise PlanError(f"{file} is not the list that {PLAN_FILE} was made with")
    return frozenset(filter(None, map(str.strip, content.decode("ascii").splitlines())))


def hashes_sha256(lines: Collection[str]) -> str:
    """The checksum that `chosen_on` carries."""
    return hashlib.sha256(_hash_lines(lines)).hexdigest()


def _hash_lines(lines: Collection[str]) -> bytes:
    """Sorted, a line for each question, though an earlier list may know it by one hash alone."""
    whole = {line.split()[0] for line in lines if " " in line}
    left = {line for line in lines if " " in line or line not in whole}
    return "".join(f"{line}\n" for line in sorted(left)).encode("ascii")
