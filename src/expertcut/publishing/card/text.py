"""The card: everything that is known of a checkpoint, put into the template and checked."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from expertcut import __version__
from expertcut.edits.splits import read_judged
from expertcut.publishing.card.changes import (
    change_sentences,
    held_out_table,
    is_pruned,
    is_tilted,
    step_sentences,
)
from expertcut.publishing.card.evidence import Evaluated, eval_results
from expertcut.publishing.card.loaders import loaders, misreaders
from expertcut.publishing.card.markup import Markdown, code, escaped, markdown_table, printable
from expertcut.publishing.card.origin import Licence, Origin
from expertcut.publishing.verify import REPORT_FILE, Checkpoint
from expertcut.reporting.outcomes import plan_table, result_sentences, results_table
from expertcut.reporting.profiles import cut_text
from expertcut.reporting.proving import proof_table
from expertcut.reporting.tables import Cell, Column, Table

_TEMPLATE = "card.md.jinja"
_SEAL = re.compile(r"\n<!-- expertcut wrote this card: ([0-9a-f]{64}) -->\n")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint goes: a repository, a revision of it, and the Hub's address."""

    repo: str
    revision: str | None
    endpoint: str

    @property
    def files(self) -> str:
        """The address under which its files are shown."""
        return f"{self.endpoint}/{self.repo}/blob/{self.revision or 'main'}"


def card_text(
    checkpoint: Checkpoint, origin: Origin, evaluated: Sequence[Evaluated], place: Place
) -> str:
    """README.md: metadata, text, and a seal by which a later run knows that nobody edited it."""
    metadata = card_metadata(origin, evaluated, place)
    environment = jinja2.Environment(
        finalize=escaped,  # whatever is put in is text, unless it was made as Markdown here
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.globals.update(code=code, table=markdown_table)
    template = environment.from_string(
        files("expertcut.publishing.card").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    )
    body = template.render(_facts(checkpoint, origin, evaluated, place))
    text = re.sub(r"\n{3,}", "\n\n", f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n")
    ModelCard(text)  # raises where the Hub could not read the metadata
    return f"{text}\n<!-- expertcut wrote this card: {_digest(text)} -->\n"


def is_edited(content: str) -> bool:
    """Whether a card is not as it was written here."""
    seal = _SEAL.search(content)
    return (
        seal is None or bool(content[seal.end() :]) or _digest(content[: seal.start()]) != seal[1]
    )


def card_metadata(origin: Origin, evaluated: Sequence[Evaluated], place: Place) -> ModelCardData:
    """What the Hub reads of a card."""
    tags = {"moe": True, "pruning": is_pruned(origin), "expert-reweighting": is_tilted(origin)}
    results = eval_results(evaluated, place.files)
    return ModelCardData(
        base_model=origin.id if origin.is_on_hub else None,
        base_model_relation="finetune" if origin.is_on_hub else None,
        license=origin.licence.id,
        license_name=origin.licence.name,
        license_link=origin.licence.link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*(tag for tag, is_it in tags.items() if is_it), "expertcut"],
        metrics=["accuracy"] if results else None,
        model_name=place.repo.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _facts(
    checkpoint: Checkpoint, origin: Origin, evaluated: Sequence[Evaluated], place: Place
) -> dict[str, Any]:
    plan, proof = checkpoint.plan, checkpoint.proof
    return {
        "name": place.repo.split("/")[-1],
        "version": __version__,
        "origin": origin,
        "base": _base_link(origin, place.endpoint),
        "licence": _licence_text(origin.licence),
        "has_licence_file": any(f.name.startswith("LICEN") for f in checkpoint.files),
        "plan": plan,
        "changes": list(change_sentences(plan, origin)),
        "steps": list(step_sentences(origin)),
        "plan_table": plan_table(plan),
        "held_out": held_out_table(plan),
        "judged": read_judged(plan, checkpoint.folder),
        "proof": proof,
        "proof_table": proof_table(proof) if proof else None,
        "evaluated": [(one, _results_facts(one)) for one in evaluated],
        "size": _size(checkpoint, evaluated),
        "loaders": loaders(checkpoint, place.repo, place.revision),
        "misreaders": misreaders(checkpoint),
        "has_family_form": checkpoint.has_family_form,
        "has_report": any(f.name == REPORT_FILE for f in checkpoint.files),
        "files": Markdown(place.files),
    }


def _base_link(origin: Origin, endpoint: str) -> Markdown:
    if not origin.is_on_hub:
        return escaped(origin.name)
    at = f"{endpoint}/{origin.id}/tree/{origin.revision}"
    return Markdown(f"[{escaped(origin.id)}](<{printable(at).replace('>', '').replace('<', '')}>)")


def _licence_text(licence: Licence) -> str:
    if licence.id != "other":
        return licence.id
    link = f" ({licence.link})" if licence.link else ""
    return f"{licence.name or 'a licence of its own'}{link}"


def _results_facts(one: Evaluated) -> dict[str, Any]:
    models = one.results.models
    rows: list[list[Cell]] = [
        [
            name,
            *(m.subjects[name].accuracy if name in m.subjects else None for m in models),
            r.questions,
        ]
        for name, r in one.model.subjects.items()
    ]
    columns = (
        Column("subject"),
        *(Column(Path(m.path).name, ".2%") for m in models),
        Column("questions", ",d"),
    )
    return {
        "file": Markdown(one.file),
        "cut": cut_text(one.model.cut),
        "table": results_table(one.results),
        "sentences": result_sentences(one.results) if one.results.comparisons else [],
        "subjects": Table("Subjects", columns, rows),
    }


def _size(checkpoint: Checkpoint, evaluated: Sequence[Evaluated]) -> Table:
    tensors = checkpoint.tensors.values()
    dtypes = Counter[str]()
    for tensor in tensors:
        dtypes[tensor.dtype] += math.prod(tensor.shape)
    parameters = evaluated[0].model.parameters if evaluated else sum(dtypes.values())
    active = evaluated[0].model.active_parameters if evaluated else None
    size_mb = sum(f.stat().st_size for f in {tensor.file for tensor in tensors}) / 1e6
    columns = (
        Column("parameters", ",d"),
        Column("used per token", ",d"),
        Column("MB", ",.1f"),
        Column("stored as"),
    )
    stored = ", ".join(name for name, _ in dtypes.most_common())
    return Table("Size", columns, [[parameters, active, size_mb, stored]])


def _digest(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()
