"""The model card: facts about a checkpoint, rendered into the template and checked."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from expertcut import __version__
from expertcut.checkpoints.exact import has_constants, has_earlier_names, is_exact
from expertcut.checkpoints.export import edits_of
from expertcut.edits.criteria import CRITERIA
from expertcut.edits.plan import PLAN_FILE, PlanFile
from expertcut.edits.splits import read_scored_split
from expertcut.hub.provenance import REPORT_FILE, Checkpoint, Evaluated, Origin, public_name
from expertcut.models.expert_routing import ROUTING_KEY
from expertcut.models.load import MODELLING_FILE, PACKED_FILE, ROUTED_EXACT_FILE, ROUTED_FILE
from expertcut.models.modeling_packed import PACKING_KEY
from expertcut.models.validate import class_name
from expertcut.reporting import (
    compress_tables,
    edit_tables,
    eval_tables,
    page_sections,
    route_tables,
    tables,
    text_tables,
)
from expertcut.reporting.tables import Markdown, Table, columns, escaped, one_line
from expertcut.reporting.views import NamedDocument

_WHERE = {"answer": "at the answer position", "all": "over all tokens"}
# By config.model_type. vLLM has a class of its own for these; see docs/publishing.md.
_VLLM_STOCK = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
_VLLM_CONSTANTS = ("olmoe", "qwen2_moe", "qwen3_moe")
_LLAMA_CPP = ("olmoe",)  # converted and run (docs/benchmarks.md)
_ENVIRONMENT = "in an environment of its own (0.33 needs transformers below 5.21)"
# As vLLM 0.33.0 checks it, in SubstitutedRoutedExperts.
_EXCLUDED = (
    "not together with quantised experts, LoRA on experts, EPLB, or expert, data or sequence "
    "parallelism"
)
_PAPERS = {name: own.paper for name, own in CRITERIA.items() if own.paper != "2502.17187"}
_PAPERS |= {"m_smoe": "2310.01334", "hc_smoe": "2410.08589"}  # every card cites the one left out
_SEAL = re.compile(r"\n<!-- expertcut wrote this card: ([0-9a-f]{64}) -->\n")


def is_pruned(origin: Origin) -> bool:
    """Whether any step removed experts, a step before a missing base included."""
    edits = origin.steps[0].blocks.values() if not origin.is_here else ()
    was_before = any(edit.keep[-1] >= len(edit.keep) for edit in edits if edit.keep)
    return was_before or any(step.action.startswith("prune") for step in origin.steps)


def step_sentences(origin: Origin) -> Iterator[str]:
    """Every step, first to last: its rule and the questions it was chosen on."""
    for step in origin.steps:
        chosen = step.chosen_on
        if chosen.quiz.count("/") != 1:  # it may be a path, which must not be published
            chosen = chosen.model_copy(update={"quiz": public_name(chosen.quiz, None)})
        text = f"{step.action} (layout {step.layout})"
        if step.criterion != "by hand":
            text += f", by {step.criterion}, counted {_WHERE[step.positions]}"
        yield f"{text}, on {eval_tables.chosen_text(chosen, step.blend)}."


@dataclass(frozen=True)
class Loader:
    """A program, the version it needs, and the lines that load the checkpoint."""

    name: str
    needs: str
    language: str
    lines: Markdown


def loaders(checkpoint: Checkpoint, repo: str, revision: str | None) -> tuple[Loader, ...]:
    """Programs that read this form on disk, transformers first."""
    is_stock, family = checkpoint.has_family_form, str(checkpoint.config.get("model_type"))
    branch = f", revision={json.dumps(revision)}" if revision else ""
    own = "" if is_stock else ", trust_remote_code=True"
    is_routed = ROUTING_KEY in checkpoint.config  # then `model_type` is of the code too
    auto = class_name(checkpoint.config) if is_stock else "AutoModelForCausalLM"
    kinds = {file.name.partition("_")[0] for file in checkpoint.files}
    reader = "Processor" if {"processor", "preprocessor"} & kinds else "Tokenizer"
    lines = Markdown(
        f"from transformers import {auto}, Auto{reader}\n\n"
        f"name = {json.dumps(repo)}\n"
        f"{reader.lower()} = Auto{reader}.from_pretrained(name{branch}{own if is_routed else ''})\n"
        f'model = {auto}.from_pretrained(name, dtype="auto"{branch}{own})'
    )
    code = ROUTED_FILE if is_routed else MODELLING_FILE
    if is_routed and is_exact(checkpoint.config):
        code = f"{ROUTED_EXACT_FILE} and the two files that it imports"
    if PACKING_KEY in checkpoint.config:
        code = f"{PACKED_FILE} and the file that it imports"
    needs = f"5.22 or later, with trust_remote_code=True: {code} comes along"
    if is_stock:
        needs = "any version that loads the base model (4.56 or later for dtype as written here)"
    branch = f" --revision {revision}" if revision else ""
    serve = Markdown(f"vllm serve {repo}{branch}")
    if widths := packed_widths(checkpoint.config):
        vllm = f"one that reads compressed-tensors in MoE layers (not run), {_ENVIRONMENT}"
        needs = "5.22 or later, with compressed-tensors installed"
        own_loader = [Loader("transformers", needs, "python", lines)] if len(widths) == 1 else []
        return (*own_loader, Loader("vLLM", vllm, "sh", serve))
    found = [Loader("transformers", needs, "python", lines)]
    if is_stock and family in _VLLM_STOCK:
        needs = f"any version that loads the base model, {_ENVIRONMENT}"
        found.append(Loader("vLLM", needs, "sh", serve))
    if not is_stock and family in _VLLM_CONSTANTS:
        found.append(Loader("vLLM", f"0.33 or later, {_ENVIRONMENT}; {_EXCLUDED}", "sh", serve))
    if is_stock and family in _LLAMA_CPP:
        convert = Markdown(
            f"hf download {repo}{branch} --local-dir model\n"
            "python convert_hf_to_gguf.py model --outfile model.gguf\n"
            "llama-cli -m model.gguf"
        )
        needs = "its own converter, which must know the tokenizer as it knows the base model's"
        found.append(Loader("llama.cpp", needs, "sh", convert))
    return tuple(found)


def packed_widths(config: Mapping[str, Any]) -> set[int]:
    """The widths of weights as compressed-tensors packs them; none of other checkpoints."""
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    return {group["weights"]["num_bits"] for group in groups.values()}


@dataclass(frozen=True)
class Place:
    """The repository and revision to publish to, and the address of the Hub."""

    repo: str
    revision: str | None
    endpoint: str

    @property
    def files(self) -> str:
        """The address of its files."""
        return f"{self.endpoint}/{self.repo}/blob/{self.revision or 'main'}"


def card_text(
    checkpoint: Checkpoint, origin: Origin, evaluated: Sequence[Evaluated], place: Place
) -> str:
    """README.md: metadata, text, and a seal that shows later whether it was edited by hand."""
    metadata = card_metadata(origin, evaluated, place)
    environment = jinja2.Environment(
        finalize=escaped,  # values are text unless they are Markdown of our own
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.globals.update(code=tables.code, table=tables.markdown_table, Markdown=Markdown)
    environment.globals.update(eval_tables=eval_tables, text_tables=text_tables)
    environment.globals.update(page_sections=page_sections, proof_table=route_tables.proof_table)
    template = files("expertcut.hub").joinpath("card.md.jinja").read_text(encoding="utf-8")
    body = environment.from_string(template).render(_facts(checkpoint, origin, evaluated, place))
    text = re.sub(r"\n{3,}", "\n\n", f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n")
    ModelCard(text)  # raises if the Hub cannot read the metadata
    return f"{text}\n<!-- expertcut wrote this card: {_digest(text)} -->\n"


def is_edited(content: str) -> bool:
    """Whether a card was edited after it was written."""
    seal = _SEAL.search(content)
    return seal is None or seal.end() < len(content) or _digest(content[: seal.start()]) != seal[1]


def card_metadata(origin: Origin, evaluated: Sequence[Evaluated], place: Place) -> ModelCardData:
    """Metadata for the Hub."""
    is_tilted = any(edit.tilted for step in origin.steps for edit in step.blocks.values())
    tags = {"moe": True, "pruning": is_pruned(origin), "expert-reweighting": is_tilted}
    results = [
        EvalResult(
            task_type="multiple-choice",
            task_name="Multiple choice",
            dataset_type=quiz.quiz,
            dataset_name=quiz.quiz,
            dataset_split=one_line(quiz.split),
            dataset_revision=quiz.revision,
            dataset_args={"num_few_shot": quiz.shots},
            metric_type="accuracy",
            metric_name=f"accuracy ({quiz.shots} shots, {quiz.models[-1].questions} questions)",
            metric_value=round(quiz.models[-1].accuracy, 6),
            source_name="expertcut eval",
            source_url=f"{place.files}/{one.file}",
        )
        for one in evaluated
        # Without a quiz there is no accuracy; if its questions chose the experts it is flattered.
        if (quiz := one.quiz) and not (one.model.chosen_on and one.model.chosen_on.overlap)
    ]
    return ModelCardData(
        base_model=origin.id if origin.revision else None,
        base_model_relation="finetune" if origin.revision else None,
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
    plan, config = checkpoint.plan, checkpoint.config
    name = place.repo.split("/")[-1]
    document = NamedDocument(checkpoint.folder / PLAN_FILE, name, plan)
    is_judged = plan.proof.answered or plan.proof.text
    found = page_sections.checkpoint_headline(document) if is_judged else None
    return {
        "name": name,
        "version": __version__,
        "checkpoint": checkpoint,
        "origin": origin,
        "evaluated": evaluated,
        "base": _base_link(origin, place.endpoint),
        "base_at": _base_link(origin, place.endpoint, is_pinned=True),
        "has_licence_file": any(f.name.startswith("LICEN") for f in checkpoint.files),
        "plan": plan,
        "changes": [*_changes(plan, origin)],
        "steps": step_sentences(origin),
        "papers": {c: p for c in (s.criterion for s in origin.steps) if (p := _PAPERS.get(c))},
        "held_out": edit_tables.shifts_table("Shifts", plan.proof.held_out),
        "scored_on": read_scored_split(plan, checkpoint.folder),
        "limits": _limits(plan, evaluated),
        "judged": found,
        "size": _size(checkpoint, evaluated),
        "loaders": loaders(checkpoint, place.repo, place.revision),
        "is_misread": has_constants(config) and not {"biased_gates", ROUTING_KEY} & set(config),
        "has_earlier_names": has_earlier_names(config),
        "has_report": any(f.name == REPORT_FILE for f in checkpoint.files),
        "files": Markdown(place.files),
    }


def _changes(plan: PlanFile, origin: Origin) -> Iterator[str]:
    """What each edit did, and where a compressed checkpoint loads."""
    for edit in edits_of(plan):
        yield from edit.describe(origin.n_experts)
    if plan.compression is not None:
        was_loaded = bool(plan.proof.held_out or plan.proof.text)
        text = compress_tables.loads_sentence(plan.compression, plan.blocks, was_loaded=was_loaded)
        yield f"It {text}." if plan.compression.loader != "llama.cpp" else f"{text}."


def _limits(plan: PlanFile, evaluated: Sequence[Evaluated]) -> Iterator[str]:
    """What was not judged."""
    is_text = plan.chosen_on.text_tokens is not None
    what = "on the texts above" if is_text else "for one quiz"
    yield (
        f"Experts were chosen {what}. What they do for anything else was not measured, and an "
        "expert that is idle here may matter there."
    )
    models = [one.model for one in evaluated]
    letters = "Answers are judged by log p of a letter after the prompt. "
    judged = "" if is_text and not any(one.quiz for one in evaluated) else letters
    if not any(model.generation or model.tasks for model in models):
        judged += "What the model writes was not judged."
    if judged:
        yield judged.strip()


def _base_link(origin: Origin, endpoint: str, *, is_pinned: bool = False) -> Markdown:
    if not origin.revision:
        return escaped(Path(origin.id).name or "a local folder")
    at = f"{endpoint}/{origin.id}" + (f"/tree/{origin.revision}" if is_pinned else "")
    return Markdown(f"[{escaped(origin.id)}](<{one_line(at).replace('>', '').replace('<', '')}>)")


def _size(checkpoint: Checkpoint, evaluated: Sequence[Evaluated]) -> Table:
    tensors = checkpoint.tensors.values()
    dtypes = Counter[str]()
    for tensor in tensors:
        dtypes[tensor.dtype] += math.prod(tensor.shape)
    measured = evaluated[0].model.parameters if evaluated else None
    parameters = measured or sum(dtypes.values())
    active = evaluated[0].model.active_parameters if evaluated else None
    size_mb = sum(f.stat().st_size for f in {tensor.file for tensor in tensors}) / 1e6
    heads = columns("parameters::,d; used per token::,d; MB::,.1f; stored as")
    stored = ", ".join(name for name, _ in dtypes.most_common())
    return Table("Size", heads, [[parameters, active, size_mb, stored]])


def _digest(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()
