"""A checkpoint checked for consistency, its base, licence and evaluations."""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

from expertcut.checkpoints.exact import has_constants, is_exact
from expertcut.checkpoints.tensor_names import match_blocks, with_constants
from expertcut.edits import plan as plans
from expertcut.errors import ModelError, OutputError, PlanError, SettingsError
from expertcut.evaluation.results import ModelResult, QuizResults, Results, load_results
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.expert_routing import ROUTING_KEY
from expertcut.models.load import (
    MODELLING_FILE,
    PACKED_FILE,
    ROUTED_EXACT_FILE,
    ROUTED_FILE,
    Source,
    find_source,
)
from expertcut.models.modeling_packed import PACKING_KEY
from expertcut.models.safetensors_index import INDEX_FILE, StoredTensor, read_headers, read_index
from expertcut.models.validate import expert_count
from expertcut.reporting.tables import one_line
from expertcut.reporting.views import Proof, proofs_in

CARD_FILE = "README.md"
REPORT_FILE = "report.html"
_ENDINGS = (".json", ".txt", ".model", ".jinja", ".py", ".yaml", ".ngrams")
_NAMES = ("LICENSE", "LICENCE", "NOTICE")
_RESULTS = "results"  # uploaded as read for the card, not from the folder
RESULTS_FILE = "results.json"
logger = logging.getLogger(__name__)

_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.S)
UNKNOWN = "unknown"  # the Hub's own word
# By the first words of a licence file, in lower case and without commas.
_LICENCES = {"apache license version 2.0": "apache-2.0", "mit license": "mit"}


@dataclass(frozen=True)
class Checkpoint:
    """A consistent checkpoint; `tensors` are read from its headers, by name."""

    source: Source
    config: Mapping[str, Any]
    plan: plans.PlanFile
    proofs: Mapping[str, Proof]  # by file name
    tensors: Mapping[str, StoredTensor]

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.source.path

    @property
    def has_family_form(self) -> bool:
        """Whether it has its family's form: no constants, biased gates, rules or packing."""
        keys = ("biased_gates", ROUTING_KEY, PACKING_KEY)
        own = any(self.config.get(key) for key in keys)
        return not has_constants(self.config) and not own

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Files to upload besides the card and results."""
        weights = {tensor.file for tensor in self.tensors.values()}
        return tuple(sorted(weights | set(filter(self._belongs, self._entries))))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Other files of the folder, subfolders with a slash."""
        known = {*self.files, self.folder / CARD_FILE}
        others = [f for f in self._entries if f.is_file() and not f.name.startswith(_RESULTS)]
        folders = [f"{f.name}/" for f in self._entries if f.is_dir()]
        return tuple(sorted([*(f.name for f in others if f not in known), *folders]))

    @property
    def _entries(self) -> list[Path]:
        return [f for f in self.folder.iterdir() if not f.name.startswith(".")]

    def _belongs(self, file: Path) -> bool:
        if not file.is_file() or file.name.startswith(_RESULTS):
            return False
        if file.name.endswith(".index.json"):
            return file.name == INDEX_FILE and bool(read_index(self.folder))
        return file.suffix in _ENDINGS or file.name.startswith(_NAMES) or file.name == REPORT_FILE


def verified(folder: Path) -> Checkpoint:
    """A checkpoint of this tool, with weights, config, plan and hashes checked for consistency."""
    if not folder.is_dir():
        raise ModelError(f"no such checkpoint: {folder} is not a folder")
    config = read_config(folder)
    if not (folder / plans.PLAN_FILE).is_file():
        raise PlanError(
            f"{folder} has no {plans.PLAN_FILE}: publish a checkpoint of `prune`, `merge`, "
            "`reweight` or `heal`"
        )
    source, tensors, plan = find_source(str(folder)), read_headers(folder), plans.load_plan(folder)
    plans.load_hashes(folder, plan)
    blocks, _ = match_blocks(tensors, plan.blocks)
    for name, edit in plan.blocks.items():
        block, n_experts = blocks[name], expert_count(config)
        ids = edit.order or edit.rows or range(block.n_experts)
        rows = zip(range(block.n_experts), ids, strict=False)
        # Those that are not constants.
        if source.packing is not None:  # whose constants are experts that stay
            block = with_constants(block, tensors)
        own = [number for row, number in rows if row not in block.constants]
        is_right = block.n_experts == len(edit.keep) == n_experts
        if plan.removal == "constant":
            is_right = set(own) == set(edit.keep)
        if not is_right:
            raise PlanError(
                f"{plans.PLAN_FILE} is not of these weights: it keeps {len(edit.keep)} experts of "
                f"{block.name}, on disk are {len(own)} and config.json says {n_experts}: put the "
                "plan back that made them"
            )
    needed = {MODELLING_FILE: is_exact(config), ROUTED_FILE: ROUTING_KEY in config}
    needed[ROUTED_EXACT_FILE] = all(needed.values())
    needed[PACKED_FILE] = PACKING_KEY in config
    lost = [file for file, is_it in needed.items() if is_it and not (folder / file).is_file()]
    if lost:
        raise ModelError(f"{folder} lacks {lost[0]}, which config.json names: export it again")
    return Checkpoint(source, config, plan, proofs_in(folder), tensors)


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of checkpoint and base, without local paths."""

    file: str  # its name on the Hub
    results: Results
    source: Path  # where it was read

    @property
    def model(self) -> ModelResult:
        """The checkpoint's own result."""
        return self.results.models[-1]

    @property
    def quiz(self) -> QuizResults | None:
        """The results if a quiz was asked."""
        return self.results if isinstance(self.results, QuizResults) else None


def evaluations(checkpoint: Checkpoint, named: Sequence[Path]) -> tuple[Evaluated, ...]:
    """Evaluations in the named files, else in each `results.json` that is looked for.

    It may lie in the folder, in the one above, in the run's, and in the working directory.
    """
    folder, found = checkpoint.folder, dict[Path, Results]()
    above = folder.resolve().parents
    runs = [place for place in above if (place / "manifest.json").is_file()]
    places = {place.resolve(): place for place in (Path(), *runs[:1], above[0], folder)}
    beside = (place / RESULTS_FILE for place in reversed(places.values()))
    for file in named or filter(Path.is_file, beside):
        try:
            own = of_model(load_results(file), checkpoint.source.fingerprint)
        except OutputError as error:
            if named:
                raise
            logger.warning("%s: not used", one_line(str(error)))
            continue
        if own is not None and own not in found.values():
            found[file] = own
        elif own is None and named:
            raise SettingsError(
                f"{file} holds no results of {folder}, known by the hash of its weights: "
                "evaluate it again with `expertcut eval`"
            )
    return tuple(
        Evaluated(RESULTS_FILE if i == 1 else f"results-{i}.json", results, file)
        for i, (file, results) in enumerate(found.items(), start=1)
    )


def of_model(results: Results, fingerprint: str) -> Results | None:
    """Results of the base and of the model with these weights; None without it."""
    own = (i for i, m in enumerate(results.models) if m.fingerprint == fingerprint)
    if (place := max(own, default=None)) is None:
        return None
    compared = [c for c in results.comparisons if c.other == place]
    kept = [results.models[i] for i in ([compared[0].base, place] if compared else [place])]
    models = [m.model_copy(update={"path": public_name(m.path, m.revision)}) for m in kept]
    comparisons = [c.model_copy(update={"base": 0, "other": 1}) for c in compared[:1]]
    changed: dict[str, object] = {"models": models, "comparisons": comparisons}
    if results.quiz is not None:
        changed["quiz"] = public_name(results.quiz, results.revision)
    if results.text is not None:
        sources = {
            name: source.model_copy(update={"spec": public_name(source.spec, source.revision)})
            for name, source in results.text.sources.items()
        }
        changed["text"] = results.text.model_copy(update={"sources": sources})
    return results.model_copy(update=changed)


def public_name(id: str, revision: str | None) -> str:
    """An id of the Hub, or the last part of a path, which must not be published whole."""
    return one_line(id if revision is not None else Path(id).resolve().name) or "unnamed"


@dataclass(frozen=True)
class Licence:
    """Licence fields of a card's metadata; `name` and `link` only where `id` is `other`."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Origin:
    """The base that the first plan names, and the plans of all steps, first to last."""

    id: str
    revision: str | None
    licence: Licence
    n_experts: int | None  # of the base; None if its config cannot be read
    steps: tuple[plans.PlanFile, ...]
    is_here: bool  # false for a local base that is missing or changed: earlier steps are unknown


def origin(folder: Path) -> Origin:
    """The base and steps of a checkpoint, as far as they are available here or in the cache."""
    steps: list[plans.PlanFile] = []
    place: Path | None = None
    with suppress(PlanError):  # the base's folder now holds something else
        for step, before in plans.lineage(folder):
            steps.insert(0, step)
            place = before
    base = steps[0].model
    is_here = base.revision is not None or place is not None
    if not is_here:
        logger.warning(
            "%s is not there with its weights (%s): the card cannot say what was done to it before",
            *(one_line(base.id), base.fingerprint[:8]),
        )
    base_id = base.id if place is None else str(place)
    config: dict[str, Any] = {}
    if config_file := _base_file(base_id, base.revision, "config.json"):
        with suppress(ModelError):
            config = read_config(config_file.parent)
    card = _base_file(base_id, base.revision, CARD_FILE)
    metadata = _front_matter(card) if card else {}
    stated = metadata.get("license") or config.get("license") or _licence_in(place or folder)
    licence = _licence(stated, metadata, base, folder)
    return Origin(base.id, base.revision, licence, expert_count(config), tuple(steps), is_here)


def _base_file(id: str, revision: str | None, name: str) -> Path | None:
    """A small file of the base, from its folder, the cache or the Hub."""
    if revision is None:
        file = Path(id) / name
        return file if file.is_file() else None
    cached = try_to_load_from_cache(id, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    with suppress(OSError, ValueError):  # errors of the Hub are OSErrors, of a name ValueErrors
        return Path(hf_hub_download(id, name, revision=revision))
    return None


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The metadata at the head of a card; empty if missing or invalid."""
    metadata = None
    with suppress(OSError, ValueError, yaml.YAMLError):  # YAML's dates can be ValueErrors
        if found := _FRONT_MATTER.match(card.read_text(encoding="utf-8-sig")):
            metadata = yaml.safe_load(found[1])
    return metadata if isinstance(metadata, dict) else {}


def _licence_in(folder: Path) -> str | None:
    """The licence that the files LICENSE of a folder begin with; None if that is not clear."""
    found = set()
    for file in filter(Path.is_file, folder.glob("LICEN[CS]E*")):
        text = one_line(file.read_text(encoding="utf-8", errors="replace")).lower()
        head = text.replace(",", "").lstrip("# ").removeprefix("the ")
        found.add(next((id for words, id in _LICENCES.items() if head.startswith(words)), None))
    return found.pop() if len(found) == 1 else None


def _licence(
    stated: object, metadata: Mapping[str, Any], base: plans.PlanModel, folder: Path
) -> Licence:
    """The licence that the base's card, config or licence file states; never guessed."""
    if isinstance(stated, list) and len(stated) == 1:
        (stated,) = stated
    if not isinstance(stated, str) or not one_line(stated):
        return Licence(UNKNOWN)
    stated = one_line(stated)
    # What the Hub takes as `license` (huggingface.co/docs/hub/repositories-licenses).
    known = files("expertcut.hub").joinpath("licences.txt").read_text(encoding="utf-8").split()
    if stated.lower() in (*known, UNKNOWN):
        return Licence(stated.lower())
    name = metadata.get("license_name") if stated.lower() == "other" else stated
    link = _text(metadata.get("license_link"))
    if link is not None and not link.startswith(("https://", "http://")):
        if base.revision is not None:
            url = hf_hub_url(base.id, link, revision=base.revision)
            link = url.replace("/resolve/", "/blob/", 1)
        elif not (folder / link).is_file():
            link = None
    return Licence("other", _text(name), link)


def _text(value: object) -> str | None:
    return one_line(value)[:100] or None if isinstance(value, str) else None
