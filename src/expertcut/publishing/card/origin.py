"""Where a checkpoint comes from: the steps that made it, the base under them, and its licence."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expertcut.edits.plan import PLAN_FILE, Plan, load_plan
from expertcut.errors import ModelError, PlanError
from expertcut.models.checkpoint_dir import find_local, read_config
from expertcut.models.validate import expert_count
from expertcut.publishing.card.markup import printable

logger = logging.getLogger(__name__)

_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.S)
_MOST_STEPS = 20
UNKNOWN = "unknown"  # the Hub's own word
# What the Hub takes as `license` (huggingface.co/docs/hub/repositories-licenses).
LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma
    gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 pddl
    postgresql unlicense wtfpl zlib
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Licence:
    """As a card's metadata has it; `name` and `link` only where `id` is `other`."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Origin:
    """The base as the first plan names it, and the plans from the first step to this checkpoint.

    `is_here` says whether a base that is a folder is there with its weights: only then it is known
    that nothing was done to it before. `n_experts` is the base's count, None where the base's
    config cannot be read.
    """

    id: str
    revision: str | None
    licence: Licence
    n_experts: int | None
    steps: tuple[Plan, ...]
    is_here: bool = True

    @property
    def is_on_hub(self) -> bool:
        """Whether others can find it by its id."""
        return self.revision is not None

    @property
    def name(self) -> str:
        """Its id, or of a folder on this machine the last part."""
        return self.id if self.is_on_hub else Path(self.id).name or "a local folder"


def origin(plan: Plan, folder: Path) -> Origin:
    """What a checkpoint was made from, as far as it can be found here or in the cache."""
    steps = [plan]
    while len(steps) < _MOST_STEPS and (before := _made_from(steps[0], folder)) is not None:
        steps.insert(0, before)
    base = steps[0].model
    place = _folder_of(steps[0], folder)
    files = _Files(base.id if place is None else str(place), base.revision, folder)
    is_here = base.revision is not None or place is not None
    if not is_here:
        logger.warning(
            "%s is not there with its weights (%s): the card cannot say what was done to it before",
            *(printable(base.id), base.fingerprint[:8]),
        )
    return Origin(
        id=base.id,
        revision=base.revision,
        licence=_licence(files),
        n_experts=expert_count(files.config()),
        steps=tuple(steps),
        is_here=is_here,
    )


def _made_from(plan: Plan, folder: Path) -> Plan | None:
    """The plan in the folder on this machine that a plan was for; a model of the Hub is a base."""
    place = _folder_of(plan, folder)
    if place is None or place.resolve() == folder.resolve():
        return None
    file = place / PLAN_FILE
    if not file.is_file():
        return None
    try:
        return load_plan(file)
    except PlanError:  # what lies there now is no checkpoint of ours
        return None


def _folder_of(plan: Plan, near: Path) -> Path | None:
    """The folder that a plan was for, if it is there with its weights; of the Hub there is none."""
    model = plan.model
    if model.revision is not None:
        return None
    return find_local(model.id, model.fingerprint, near)


@dataclass(frozen=True)
class _Files:
    """The small files of the base, from its folder, the cache or the Hub."""

    id: str
    revision: str | None
    folder: Path

    def text(self, name: str) -> str | None:
        path = self._path(name)
        try:
            return None if path is None else path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError):
            return None

    def config(self) -> dict[str, Any]:
        path = self._path("config.json")
        try:
            return {} if path is None else read_config(path.parent)
        except ModelError:
            return {}

    def _path(self, name: str) -> Path | None:
        if self.revision is None:
            file = Path(self.id) / name
            return file if file.is_file() else None
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(self.id, name, revision=self.revision)
        if isinstance(cached, str):
            return Path(cached)
        try:
            return Path(hf_hub_download(self.id, name, revision=self.revision))
        except (OSError, ValueError):  # every error of the Hub is an OSError, of a name the other
            return None


def _licence(files: _Files) -> Licence:
    """What the base's card says, else its config; never a guess."""
    metadata = front_matter(files.text("README.md") or "")
    stated = metadata.get("license") or files.config().get("license")
    if isinstance(stated, list) and len(stated) == 1:
        (stated,) = stated
    if not isinstance(stated, str) or not printable(stated):
        return Licence(UNKNOWN)
    stated = printable(stated)
    if stated.lower() in LICENCES or stated.lower() == UNKNOWN:
        return Licence(stated.lower())
    name = metadata.get("license_name") if stated.lower() == "other" else stated
    return Licence("other", _text(name), _link(files, metadata.get("license_link")))


def front_matter(content: str) -> Mapping[str, Any]:
    """The metadata at the head of a card; empty where there is none that can be read."""
    found = _FRONT_MATTER.match(content)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _text(value: object) -> str | None:
    return printable(value)[:100] or None if isinstance(value, str) else None


def _link(files: _Files, value: object) -> str | None:
    """A licence's link; one that is relative leads to the base, if it is on the Hub."""
    link = _text(value)
    if link is None or link.startswith(("https://", "http://")):
        return link
    if files.revision is None:
        return link if (files.folder / link).is_file() else None
    from huggingface_hub import hf_hub_url

    return hf_hub_url(files.id, link, revision=files.revision).replace("/resolve/", "/blob/", 1)
