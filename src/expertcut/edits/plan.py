"""The plan: which experts stay, which get a bias or a scale; their ids, and validation.

Layout stock cuts rows out of routers, so expert 12 may lie in row 9. An expert's id is its number
in the first, unedited model; the plan in a checkpoint's folder maps rows to ids.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, FiniteFloat, model_validator

from expertcut.data.ngrams import NGRAMS_FILE
from expertcut.documents import Format1, Identified, Record
from expertcut.edits.compression import COMPRESSION_FILE, Grain, Loader
from expertcut.edits.layouts import LAYOUTS, Fold, Layout, Positions, Removed
from expertcut.errors import PlanError, ProfileError
from expertcut.files import read_file, write_atomically
from expertcut.models.checkpoint_dir import find_local
from expertcut.models.routing_rule import ErrorCoefficients, RoutingRule
from expertcut.profiling.blend import BlendRule
from expertcut.profiling.schema import BlockInfo, ModelInfo
from expertcut.profiling.storage import Profile, once_per_profile
from expertcut.stats import HeldOutResult

PLAN_FILE = "plan.json"
PROOF_FILE = "proof.json"
QUESTIONS_FILE = "chosen_on.txt"
HOLDING_FILE = "holding.json"
HEALING_FILE = "healing.json"
# Of one edit, in its folder.
RECORDS = (
    *(PLAN_FILE, PROOF_FILE, HOLDING_FILE, QUESTIONS_FILE, NGRAMS_FILE, HEALING_FILE),
    COMPRESSION_FILE,
)
Expert = Annotated[int, Field(ge=0, lt=1 << 16)]


class BlockEdit(Record):
    """The edit of one block, by expert id; in plan.json ids are those of the first model."""

    keep: tuple[Expert, ...]
    bias: dict[Expert, FiniteFloat] = Field(default_factory=dict)  # added to router logits
    scale: dict[Expert, FiniteFloat] = Field(default_factory=dict)  # multiplies gate weights
    selection: dict[Expert, FiniteFloat] | None = None  # added to the family's selection bias
    rows: tuple[Expert, ...] | None = (
        None  # ids of the router's rows, if earlier edits changed them
    )
    order: tuple[Expert, ...] | None = None  # ids of the new router's rows, if they moved
    # For each merged expert the shares of its members, itself included.
    merged: dict[Expert, dict[Expert, FiniteFloat]] | None = None
    # How experts are stored, `*` all of them; None as before.
    options: dict[str, str] | None = None
    at: FiniteFloat | None = None  # threshold of the plan's routing rule; None keeps the routing
    fit: ErrorCoefficients | None = None  # coefficients of rule fitted

    @model_validator(mode="after")
    def _names_experts_that_stay(self) -> Self:
        if any(a >= b for a, b in pairwise(self.keep)):
            raise ValueError("keep must be ascending numbers, none of them twice")
        if others := {*self.tilted, *(self.merged or {}), *(self.selection or {})} - set(self.keep):
            raise ValueError(f"expert {min(others)} does not stay, but is changed")
        wanted = [["*"], sorted(map(str, self.keep))]
        if self.options is not None and sorted(self.options) not in wanted:
            raise ValueError("options must name every expert that stays, or * alone")
        own = self.order or self.keep
        if len({*own}) < len(own) or not {*self.keep} <= {*own}:
            raise ValueError("order must name every expert that stays, none of them twice")
        return self

    def ids(self, layout: Layout) -> tuple[int, ...] | None:
        """The ids of the new router's rows in order; None for 0, 1, …, E−1."""
        return self.order or (self.rows if LAYOUTS[layout].keeps_rows else self.keep)

    def is_reordering(self, layout: Layout) -> bool:
        """Whether experts that stay come in another order than before."""
        own = self.ids(layout) or ()
        before = self.rows or sorted(own)
        return own != tuple(expert for expert in before if expert in own)

    @property
    def all_biases(self) -> dict[int, float]:
        """Biases on logits or on the family's selection bias, by id."""
        return self.bias | (self.selection or {})

    @property
    def tilted(self) -> tuple[int, ...]:
        """The experts with a bias or a factor, each once."""
        return tuple(dict.fromkeys((*self.bias, *self.scale)))

    def removed(self, n_experts: int) -> tuple[int, ...]:
        """Sorted ids of the experts that do not stay."""
        return tuple(expert for expert in range(n_experts) if expert not in self.keep)


class PlanModel(Identified):
    """The model that a plan edits."""

    fingerprint: str


class ChosenOn(Record):
    """The questions that a plan was chosen or fitted on; their hashes lie in `chosen_on.txt`."""

    quiz: str
    split: str
    questions: int
    fitted_split: str | None = None
    fitted_questions: int = 0
    sha256: str
    text_tokens: int | None = None  # of texts, whose documents are counted as questions


class BlendedProfile(Record):
    """A profile of a blend; `kept` is the share of its saliency that a cut by each rule keeps."""

    name: str
    profile: str  # its short hash
    quiz: str
    split: str
    questions: int | None  # None of texts
    tokens: int | None  # None without all-token sums
    weight: FiniteFloat
    kept: dict[BlendRule, FiniteFloat]


class PlanBlend(Record):
    """The profiles that a plan was chosen from, if they are several, the heaviest first."""

    rule: BlendRule
    profiles: tuple[BlendedProfile, ...] = Field(min_length=2)


class PlanAdapter(Record):
    """The LoRA adapter that was cut too: its folder, and the SHA-256 of its files."""

    path: str
    config_sha256: str
    weights_sha256: str


MaxVio = tuple[FiniteFloat, FiniteFloat]
"""The largest load of a layer over its mean load, less 1: before, and under the biases."""


class BalancedLoads(Record):
    """The loads of one layer, before and under the biases of `reweight --balance`.

    `tuned` on the sequences that chose the biases, `held_out` on the others, `behind` on these
    behind their shots, which the first had too. `smallest` are smallest held-out loads over the
    mean, `kept` the share of held-out choices that stay, `heaviest` the largest load that tokens
    of equal logits have together, over the mean: they move as one.
    """

    tuned: MaxVio
    held_out: MaxVio
    behind: MaxVio
    smallest: MaxVio
    kept: FiniteFloat
    heaviest: FiniteFloat


class PlanBalance(Record):
    """Loads by block, and the MaxVio that was asked for."""

    target: FiniteFloat
    blocks: dict[str, BalancedLoads] = Field(min_length=1)


class PlanRouting(RoutingRule):
    """The rule by which routers choose; its thresholds are in the blocks."""

    experts_per_token: FiniteFloat | None = None  # mean on held-out questions, if counted

    @classmethod
    def of(cls, rule: RoutingRule) -> Self:
        """The rule, not counted yet."""
        return cls(**{name: getattr(rule, name) for name in RoutingRule.model_fields})


class Compression(Record):
    """How experts are stored in fewer bytes; their options are in the blocks."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)
    loader: Loader = Field(alias="for")
    grain: Grain
    by: str
    group_size: int = Field(ge=1)
    budget_bytes: int | None
    bytes: int  # of all safetensors files
    bits: FiniteFloat  # per weight of an expert
    gap: FiniteFloat | None  # between the plan's error and the least possible


class Point(Record):
    """One try of a search for the strength; `biases` are (layer, expert, bias in logits)."""

    experts: int
    strength: FiniteFloat
    biases: tuple[tuple[int, int, FiniteFloat], ...]
    questions: int
    accuracy: FiniteFloat
    ci95: tuple[FiniteFloat, FiniteFloat]


class PlanFile(Record):
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
    routing: PlanRouting | None = None
    compression: Compression | None = None
    chosen_on: ChosenOn
    blend: PlanBlend | None = None
    adapter: PlanAdapter | None = None
    balance: PlanBalance | None = None
    tuning: tuple[Point, ...] = ()
    proof: HeldOutResult = HeldOutResult()
    blocks: dict[str, BlockEdit] = Field(min_length=1)

    @property
    def healed_from(self) -> str | None:
        """Fingerprint of the checkpoint that was healed; None where that was not the last step."""
        return self.model.fingerprint if self.action.startswith("heal ") else None

    @property
    def rows_layout(self) -> Layout:
        """The layout that router rows follow: exact also where a rule was put on constants."""
        return "exact" if self.removal == "constant" else self.layout


@dataclass(frozen=True)
class ExpertIds:
    """Ids of the experts in router rows, by block name; in other blocks they equal the rows."""

    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constant: Mapping[str, frozenset[int]] = field(default_factory=dict)  # rows of removed experts

    def number(self, block: str, row: int) -> int:
        """The id of the expert in a row."""
        return self.rows[block][row] if block in self.rows else row

    def kept(self, block: str, rows: tuple[int, ...]) -> tuple[int, ...]:
        """The ids of rows, ascending, without constants."""
        gone = self.constant.get(block, frozenset())
        return tuple(sorted(self.number(block, row) for row in rows if row not in gone))

    def named(self, block: str, edit: BlockEdit, layout: Layout = "stock") -> BlockEdit:
        """An edit of rows as plan.json states it, by id."""

        def ids(values: Mapping[int, float]) -> dict[int, float]:
            return {self.number(block, row): value for row, value in values.items()}

        merged = {self.number(block, e): ids(own) for e, own in (edit.merged or {}).items()}
        keep, rows = self.kept(block, edit.keep), self.rows.get(block)
        order = edit.order or (() if LAYOUTS[layout].keeps_rows else edit.keep)
        order = tuple(self.number(block, row) for row in order)
        expected = BlockEdit(keep=keep, rows=rows).ids(layout) or tuple(range(len(order)))
        return BlockEdit(
            keep=keep,
            bias=ids(edit.bias),
            scale=ids(edit.scale),
            selection=None if edit.selection is None else ids(edit.selection),
            rows=rows,
            order=None if order in ((), expected) else order,
            merged=None if edit.merged is None else merged,
            options=None
            if edit.options is None
            else {
                e if e == "*" else str(self.number(block, int(e))): o
                for e, o in edit.options.items()
            },
            at=edit.at,
            fit=edit.fit,
        )


@dataclass(frozen=True)
class EditPlan:
    """A plan in memory, before anything is fitted or written."""

    slug: str  # names the outputs
    action: str  # the command in words
    criterion: str
    positions: Positions
    edits: Mapping[str, BlockEdit]  # by row of the profiled routers
    layout: Layout = "stock"
    removed: Removed = "zero"  # for layout exact
    fold: Fold = "answer"  # for layout stock
    apply_at: Positions = "all"  # of biases
    routing: RoutingRule | None = None  # thresholds are in the edits
    compression: Compression | None = None  # options are in the edits
    is_cut: bool = False
    numbers: ExpertIds = ExpertIds()  # of the rows
    is_tuned: bool = False  # chosen on the tuning questions instead of the profile's
    is_calibrated: bool = False  # chosen on both
    tuning: tuple[Point, ...] = ()  # the curve of a search
    used: frozenset[str] = frozenset()  # hash lines of other questions that were read
    blend: PlanBlend | None = None
    balance: PlanBalance | None = None

    @property
    def blocks(self) -> Mapping[str, BlockEdit]:
        """The edits by block, under the name that they have in plan.json."""
        return self.edits

    @property
    def is_biased(self) -> bool:
        """Whether any expert gets a logit bias."""
        return any(edit.bias for edit in self.edits.values())

    @property
    def is_fitting(self) -> bool:
        """Whether tuning questions rank the experts too, or fit bias directions."""
        return self.is_calibrated or (LAYOUTS[self.layout].fits_biases and self.is_biased)

    @property
    def asks_tuning(self) -> bool:
        """Whether the edit reads tuning questions."""
        return self.is_tuned or self.is_fitting


def plan_model(info: ModelInfo) -> PlanModel:
    """The profiled model, as a plan names it."""
    return PlanModel(id=info.id, revision=info.revision, fingerprint=info.fingerprint)


def save_plan(folder: Path, plan: PlanFile, lines: Collection[str]) -> None:
    """Writes `plan.json` and the hash lines of the questions it was chosen on."""
    write_atomically(folder / QUESTIONS_FILE, _hash_lines(lines))
    write_atomically(folder / PLAN_FILE, plan_text(plan).encode())


def plan_text(plan: PlanFile) -> str:
    """The plan as JSON with one line per block."""
    without = {"blocks"} if plan.adapter else {"blocks", "adapter"}
    head = plan.model_dump(mode="json", exclude=without)
    lines = [f' "{key}": {json.dumps(value)},' for key, value in head.items()]
    edits = [
        f"  {json.dumps(name)}: {json.dumps(edit.model_dump(mode='json', exclude_none=True))}"
        for name, edit in plan.blocks.items()
    ]
    return "\n".join(["{", *lines, ' "blocks": {', ",\n".join(edits), " }", "}"]) + "\n"


def load_plan(path: Path) -> PlanFile:
    """A plan from its file or the folder that holds it."""
    file = path / PLAN_FILE if path.is_dir() else path
    return PlanFile.load(file, PlanError, "is not a valid plan")


def plan_in(folder: Path) -> PlanFile | None:
    """The plan in a checkpoint's folder; None for a model that was not edited."""
    return load_plan(folder) if os.path.lexists(folder / PLAN_FILE) else None


def base_folder(model: PlanModel, near: Path) -> Path | None:
    """The local folder of a plan's model, if it holds the same weights; None for one of the Hub."""
    return find_local(model.id, model.fingerprint, near) if model.revision is None else None


def lineage(
    folder: Path, find_base: Callable[[PlanModel, Path], Path | None] = base_folder
) -> Iterator[tuple[PlanFile, Path | None]]:
    """Each plan from a checkpoint to its base, with its model's folder; the walk ends at None."""
    for _ in range(20):  # more edits than anybody makes, so a cycle ends
        if (plan := plan_in(folder)) is None:
            return
        base = find_base(plan.model, folder)
        yield plan, base
        if base is None or base.resolve() == folder.resolve():
            return
        folder = base


def load_hashes(folder: Path, plan: PlanFile) -> frozenset[str]:
    """The questions that a plan was chosen or fitted on: lines of content and overlap hash."""
    file = folder / QUESTIONS_FILE
    try:
        content = read_file(file)
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != plan.chosen_on.sha256:
        raise PlanError(f"{file} is not the list that {PLAN_FILE} was made with")
    return frozenset(filter(None, map(str.strip, content.decode("ascii").splitlines())))


def hashes_sha256(lines: Collection[str]) -> str:
    """The checksum in `chosen_on`."""
    return hashlib.sha256(_hash_lines(lines)).hexdigest()


def _hash_lines(lines: Collection[str]) -> bytes:
    """Sorted, one line per question; a line of one hash is dropped beside one of two."""
    whole = {line.split()[0] for line in lines if " " in line}
    left = {line for line in lines if " " in line or line not in whole}
    return "".join(f"{line}\n" for line in sorted(left)).encode("ascii")


@once_per_profile
def expert_ids(profile: Profile) -> ExpertIds:
    """The ids in the profiled checkpoint's plan; a model without a plan was never cut."""
    if (earlier := profiled_plan(profile)) is None:
        return ExpertIds()
    folder, plan = earlier
    rows: dict[str, tuple[int, ...]] = {}
    constant: dict[str, frozenset[int]] = {}
    for block in profile.info.model.blocks:
        edit, same = plan.blocks.get(block.name, BlockEdit(keep=())), tuple(range(block.experts))
        own = edit.ids(plan.rows_layout) or same
        if block.name not in plan.blocks or len(own) != block.experts:
            raise PlanError(
                f"{folder / PLAN_FILE} is not of this checkpoint, whose {block.name} has "
                f"{block.experts} experts: put the plan back that made it, or take this one away"
            )
        if own != same:
            rows[block.name] = own
        if gone := frozenset(row for row, number in enumerate(own) if number not in edit.keep):
            constant[block.name] = gone
    return ExpertIds(rows, constant)


def find_row(profile: Profile, layer: int, expert: int) -> int:
    """The router row of an expert id, or PlanError."""
    blocks = profile.info.model.blocks
    if layer >= len(blocks):
        raise PlanError(
            f"no layer {layer}: the model has MoE layers 0 to {len(blocks) - 1} "
            "(layers are counted from 0)"
        )
    name, rows = blocks[layer].name, tuple(range(blocks[layer].experts))
    numbers = expert_ids(profile)
    kept = numbers.kept(name, rows)
    if expert in kept:
        return numbers.rows.get(name, rows).index(expert)
    if kept == rows:
        raise PlanError(f"no expert {expert} in layer {layer}: it has experts 0 to {rows[-1]}")
    raise PlanError(
        f"expert {expert} of layer {layer} is not in this pruned model: "
        f"there it keeps {ids_text(kept)}, name one of these"
    )


def removed_experts(edits: Mapping[str, BlockEdit], n_experts: int) -> dict[str, tuple[int, ...]]:
    """The experts that each block's edit does not keep; blocks that keep all are left out."""
    return {name: gone for name, edit in edits.items() if (gone := edit.removed(n_experts))}


def ids_text(ids: tuple[int, ...]) -> str:
    """Ids as `0–3, 7, 9–12`."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(ids), lambda at: at[1] - at[0])]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)


def model_folder(profile: Profile) -> Path | None:
    """The folder of the profiled model; None for a model of the hub.

    A folder with a plan, or one that an older profile names by a relative path, must hold the
    profiled weights; others are checked where they are read. Raises ProfileError: it is missing.
    """
    model = profile.info.model
    if model.revision is not None:
        return None
    folder = Path(model.id)
    if folder.is_absolute() and folder.is_dir() and not os.path.lexists(folder / PLAN_FILE):
        return folder
    if local := find_local(model.id, model.fingerprint, profile.path):
        return local
    raise ProfileError(
        f"no such model: {profile.path} is a profile of {model.id}, which is not there with "
        f"its weights ({model.fingerprint[:8]}), so what was done to it before is not known: "
        "put it back, or profile again"
    )


@once_per_profile
def profiled_plan(profile: Profile) -> tuple[Path, PlanFile] | None:
    """The folder and plan of the profiled checkpoint; None for a model that was not edited."""
    if (folder := model_folder(profile)) is None:
        from huggingface_hub import try_to_load_from_cache

        model = profile.info.model
        cached = try_to_load_from_cache(model.id, PLAN_FILE, revision=model.revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    plan = plan_in(folder)
    return None if plan is None else (folder, plan)


def validate_edits(
    edits: Mapping[str, BlockEdit], blocks: Sequence[BlockInfo], layout: Layout
) -> None:
    """Raises a PlanError that names the block and the requirement, for edits that do not fit."""
    if list(edits) != [block.name for block in blocks]:
        raise PlanError(
            f"the plan names {len(edits)} blocks, the model has {len(blocks)}: "
            f"list {blocks[0].name} … {blocks[-1].name} in order"
        )
    for block in blocks:
        if fault := next(_faults(block, edits[block.name], layout), None):
            raise PlanError(fault)
    counts = {len(edit.keep) for edit in edits.values()}
    is_uneven = len(counts) > 1 or len({block.experts for block in blocks}) > 1
    if is_uneven and LAYOUTS[layout].needs_equal_counts:
        raise PlanError(
            f"layout stock needs one count for all layers, found {sorted(counts)}: "
            "keep the same number in each, or take --layout exact"
        )


def check_count(blocks: Sequence[BlockInfo], n_keep: int, layout: Layout) -> None:
    """Raises a PlanError unless every block can keep this number of experts."""
    for block in blocks:
        least = least_experts(block, layout)
        if not least <= n_keep <= block.experts:
            raise PlanError(
                f"--keep {n_keep} does not fit {block.name}, which routes each token to "
                f"{block.top_k} of {block.experts} experts: keep {least} to {block.experts}"
            )
        if LAYOUTS[layout].needs_equal_counts and n_keep % block.groups:
            raise PlanError(
                f"{block.name} routes in {block.groups} groups: keep a multiple of "
                f"{block.groups}, not {n_keep}"
            )


def _faults(block: BlockInfo, edit: BlockEdit, layout: Layout) -> Iterator[str]:
    name, n, n_kept = block.name, block.experts, len(edit.keep)
    if block.is_hashed and (n_kept < n or edit.merged):
        what = f"{name} chooses its experts by a table of token ids, so all {n} must stay"
        is_stock = LAYOUTS[layout].needs_equal_counts and not edit.merged
        one_count = f", and layout {layout} has one count for all layers: take --layout exact"
        yield what + (one_count if is_stock else "")
    if outside := [e for e in edit.keep if not 0 <= e < n]:
        yield f"{name} keeps expert {outside[0]} but has experts 0 to {n - 1}"
    if n_kept < (least := least_experts(block, layout)):
        yield (
            f"{name} keeps {n_kept} experts but routes each token to {block.top_k}: "
            f"keep at least {least}"
        )
    if unknown := set(edit.tilted) - set(edit.keep):
        yield f"{name}: expert {min(unknown)} has a bias or scale but is not kept"
    if LAYOUTS[layout].needs_equal_counts and block.groups > 1 and n_kept < n:
        size, least = n // block.groups, least_per_group(block)
        per_group = [sum(e // size == g for e in edit.keep) for g in range(block.groups)]
        if len(set(per_group)) > 1 or per_group[0] < least:
            yield (
                f"{name} routes in {block.groups} groups and keeps {per_group} of them: "
                f"keep equally many in each, at least {least}"
            )


def least_experts(block: BlockInfo, layout: Layout) -> int:
    """The fewest experts that may stay."""
    # A router without the removed rows needs K; a model of one expert cannot be loaded again.
    return 1 if LAYOUTS[layout].keeps_rows else max(2, block.top_k)


def least_per_group(block: BlockInfo) -> int:
    """Experts that each routing group must keep: 2 rank a group, the chosen groups hold top-k."""
    return max(2, -(-block.top_k // block.top_groups))
