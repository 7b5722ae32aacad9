"""Recovery training of an edited checkpoint: read, train, write, score held-out questions."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from expertcut import stats
from expertcut.checkpoints.build import add_files
from expertcut.checkpoints.exact import is_exact
from expertcut.checkpoints.held_out_check import compare_logprobs, form_result
from expertcut.checkpoints.output_dir import atomic_dir, check_writable
from expertcut.data import Quiz, ngrams
from expertcut.edits import plan as plans
from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.errors import ModelError, SettingsError
from expertcut.healing.adapters import adapted, without_warning, write_adapter, write_merged
from expertcut.healing.data import ScoredQuiz, TrainingData, read_data
from expertcut.healing.heal_settings import HealSettings
from expertcut.healing.objectives import OBJECTIVES, LiveTeacher, Objective, Teacher
from expertcut.healing.state import RunIdentity, check_resumable
from expertcut.healing.teacher_cache import CacheKey, check_cache, fill_cache
from expertcut.healing.trainer import Curve, Report, Tell, fit
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.devices import give_back
from expertcut.models.expert_routing import ROUTING_KEY
from expertcut.models.load import LoadOptions, MoeModel, Source, find_source, load
from expertcut.profiling.locks import alone
from expertcut.profiling.measure import model_info
from expertcut.scoring.engine import Engine, ask
from expertcut.stats import HeldOutResult

logger = logging.getLogger(__name__)

HEALED, BEFORE, BASE = "healed", "before healing", "the unedited base"


@dataclass(frozen=True)
class Options:
    """How to load, run and write.

    `report` gets steps done and their number, `tell` sentences. `extra_files`, by
    name, are written beside the plan.
    """

    load_as: LoadOptions
    threads: int | None = None
    is_forced: bool = False
    report: Report = lambda done, total: None
    tell: Tell = lambda sentence: None
    extra_files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Healed:
    """A healed checkpoint, its training data and its losses.

    `trained` counts the weights of the adapters, `parameters` those of the checkpoint.
    """

    folder: Path
    plan: plans.PlanFile
    objective: str
    data: TrainingData
    curve: Curve
    trained: int
    parameters: int


def working_folder(out: Path) -> Path:
    """Sibling of the output that holds the states of an unfinished run."""
    place = out.resolve()
    return place.with_name(f"{place.name}.healing")


def heal(checkpoint: str, settings: HealSettings, out: Path, options: Options) -> Healed | None:
    """Trains a checkpoint and writes the healed one; the folder appears when all is complete.

    With several processes, the first one writes and returns the result.
    """
    working = working_folder(out)
    source = find_source(checkpoint)
    source.refuse_packed("healed")
    names = [*(part.name for part in (*settings.quizzes, *settings.texts)), settings.eval_quiz]
    files = [Path(name) for name in names if name is not None and Path(name).exists()]
    files += [settings.teacher_cache] if settings.teacher_cache is not None else []
    check_writable(out, is_forced=options.is_forced, inputs=(source.path, *files))
    if options.threads:
        torch.set_num_threads(options.threads)
    base = find_source(settings.teacher) if settings.teacher else first_base(source)
    name = settings.objective or ("answer" if base is None else "distill")
    objective = OBJECTIVES[name]
    if objective.needs_teacher and base is None:
        raise SettingsError(
            f"--objective {name}: the base model of {source.id} is not available: name it with "
            "--teacher, or take --objective answer or lm"
        )
    if base is not None:  # apart, because finding the base reads all its bytes
        check_writable(out, is_forced=options.is_forced, inputs=(base.path,))
    moe = load(source, options.load_as)
    processes = PartialState(cpu=moe.device.type == "cpu")  # joins the processes of a launcher
    config = moe.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or settings.max_tokens
    data = read_data(settings, moe.tokenizer, min(settings.max_tokens, limit))
    scored = data.scored_quiz(used_questions(source, data)) if settings.verify else None
    run = _Run(settings, objective, base, moe, data, scored, options)
    if run.cache:
        check_cache(*run.cache)
    with ExitStack() as until_done:
        if processes.is_main_process:
            until_done.enter_context(alone(working, "healing"))
            check_resumable(working, RunIdentity.of(moe, base, objective.name, settings, data))
        processes.wait_for_everyone()
        return run.train(out, working)


def first_base(source: Source) -> Source | None:
    """The unedited model below all edits; None, logged, if a step is missing or has changed."""
    base: Source | None = None

    def find_base(model: plans.PlanModel, near: Path) -> Path | None:
        nonlocal base
        base, folder = None, plans.base_folder(model, near)
        try:
            if folder is None and model.revision is None:
                short = model.fingerprint[:8]
                raise ModelError(f"{model.id} is not there with its weights ({short})")
            found = find_source(str(folder)) if folder else find_source(model.id, model.revision)
        except ModelError as error:
            logger.warning("the base model is not available: %s", error)
            return None
        if found.fingerprint != model.fingerprint:
            logger.warning("%s is not the base model any more: it has changed", Path(found.id))
            return None
        base = found
        return base.path

    for _ in plans.lineage(source.path, find_base):
        pass
    return base


def used_questions(source: Source, data: TrainingData) -> frozenset[str]:
    """Hash lines of the questions that this run or an earlier step of the checkpoint used."""
    plan = plans.plan_in(source.path)
    return data.hashes | (plans.load_hashes(source.path, plan) if plan else frozenset())


def healed_plan(
    moe: MoeModel, settings: HealSettings, objective: str, data: TrainingData
) -> plans.PlanFile:
    """The plan of the healed checkpoint, without its proof; experts keep their identity."""
    source, before = moe.source, plans.plan_in(moe.source.path)
    blocks = {
        block.name: plans.BlockEdit(keep=tuple(range(block.n_experts))) for block in moe.blocks
    }
    no_change: dict[str, Any] = {"bias": {}, "scale": {}, "selection": None, "merged": None}
    for name, edit in before.blocks.items() if before else ():
        if name in blocks:
            blocks[name] = edit.model_copy(update=no_change)
    config = read_config(source.path)
    layout: Layout = "exact" if is_exact(config) else "stock"
    removal = LAYOUTS[layout].removal
    if ROUTING_KEY in config:
        layout = "routed"
    return plans.PlanFile(
        model=plans.plan_model(model_info(moe)),
        action=f"heal --objective {objective}",
        criterion="by hand",
        positions="all",
        removal=removal,
        layout=layout,
        removed=before.removed if before else None,
        routing=before.routing if before else None,
        chosen_on=plans.ChosenOn(
            quiz=(*settings.quizzes, *settings.texts)[0].name,
            split=settings.split,
            questions=data.n_questions,
            sha256=plans.hashes_sha256(used_questions(source, data)),
        ),
        blocks=blocks,
    )


def _choice_logprobs(moe: MoeModel, quiz: Quiz) -> Tensor:
    return ask(Engine(moe, batch_tokens=4096), quiz)


def compare(scored: ScoredQuiz, by_form: dict[str, Tensor]) -> HeldOutResult:
    """Compares the healed model with the others, by their log p of the choices."""
    quiz, healed_NC = scored.quiz, by_form[HEALED]
    others = [form for form in (BASE, BEFORE) if form in by_form]
    first_NC = by_form[others[0]]
    outcomes = (form_result(form, quiz, by_form[form], first_NC) for form in (*others, HEALED))
    result = HeldOutResult(
        held_out_split=quiz.split,
        held_out_used=scored.used,
        held_out=tuple(compare_logprobs(form, healed_NC, by_form[form]) for form in others),
        held_out_hashes=tuple(sorted(question.hash_line for question in quiz)),
        chance=stats.chance(healed_NC.numpy()),
        shares=(),
        alone=None,
        agreement=(),
        outcomes=tuple(outcomes),
    )
    if BASE not in by_form:
        return result
    answer_N = torch.tensor([question.answer for question in quiz])
    base_N, own_N = ((form.argmax(1) == answer_N).numpy() for form in (first_NC, healed_NC))
    change = stats.compare(base_N, own_N)
    answered = stats.HeldOutAccuracy(base=float(base_N.mean()), change=change)
    return result.model_copy(update={"answered": answered})


@dataclass(frozen=True)
class _Run:
    settings: HealSettings
    objective: Objective
    base: Source | None
    moe: MoeModel
    data: TrainingData
    scored: ScoredQuiz | None
    options: Options

    @property
    def cache(self) -> tuple[Path, CacheKey] | None:
        """Folder of the teacher's outputs on disk, and what they depend on."""
        folder = self.settings.teacher_cache
        if folder is None or self.base is None or not self.objective.needs_teacher:
            return None
        return folder, CacheKey(self.base.fingerprint, str(self.moe.dtype), self.settings.likeliest)

    def train(self, out: Path, working: Path) -> Healed | None:
        """Trains and, in the first process, writes; then removes the working folder."""
        teacher, before = self._ask_others()
        model = adapted(self.moe, self.settings)
        curve = fit(
            self.moe, model, self.data, self.settings, self.objective, teacher,
            folder=working / "steps", report=self.options.report, tell=self.options.tell,
        )  # fmt: skip
        model.eval()
        del teacher
        give_back()
        if not PartialState().is_main_process:
            return None
        healed = _write(self, model, curve, before, out)
        shutil.rmtree(working, ignore_errors=True)
        return healed

    def _ask_others(self) -> tuple[Teacher | None, dict[str, Tensor]]:
        """The teacher, if needed; and log p of the base model and the checkpoint before."""
        before: dict[str, Tensor] = {}
        teacher: Teacher | None = None
        if self.base is not None:
            other = cache(partial(_load_other, self, self.base))
            if self.scored is not None:
                before[BASE] = _choice_logprobs(other(), self.scored.quiz)
            if self.objective.needs_teacher:
                likeliest, batch = self.settings.likeliest, self.settings.batch
                live: Callable[[], LiveTeacher] = lambda: LiveTeacher(other(), likeliest)  # noqa: E731
                rows: Any = self.data.numbered_rows(self.settings.steps * batch)
                teacher = fill_cache(*self.cache, rows, live, batch) if self.cache else live()
        if self.scored is not None:
            before[BEFORE] = _choice_logprobs(self.moe, self.scored.quiz)
        return teacher, before


def _load_other(run: _Run, base: Source) -> MoeModel:
    other = load(base, run.options.load_as)
    ours, theirs = (moe.tokenizer.get_vocab() for moe in (run.moe, other))
    if ours != theirs:
        raise SettingsError(f"{base.id} cannot teach {run.moe.source.id}: their tokenizers differ")
    return other


def _write(run: _Run, model: Any, curve: Curve, before: dict[str, Tensor], out: Path) -> Healed:
    settings, data, source = run.settings, run.data, run.moe.source
    plan = healed_plan(run.moe, settings, run.objective.name, data)
    write = write_adapter if settings.adapter else write_merged
    record = {
        "objective": run.objective.name,
        "asked": settings.recorded(),
        "rate": settings.rate(run.moe.model.config.get_text_config().hidden_size),
        "questions": data.n_questions,
        "texts": data.n_texts,
        "held_out_rows": len(data.held_out),
        "dropped": [asdict(dropped) for dropped in data.dropped],
        **asdict(curve),
    }
    content = (json.dumps(record, indent=1) + "\n").encode()
    with atomic_dir(out, is_forced=run.options.is_forced) as temporary:
        write(source, model, temporary)
        if run.scored is not None:
            written = source if settings.adapter else Source(str(out), temporary)
            healed = load(written, run.options.load_as)  # as a user loads it
            if settings.adapter:
                from peft import PeftModel

                with without_warning():
                    PeftModel.from_pretrained(healed.model, temporary)
            after = _choice_logprobs(healed, run.scored.quiz)
            plan = plan.model_copy(update={"proof": compare(run.scored, {**before, HEALED: after})})
        plans.save_plan(temporary, plan, used_questions(source, data))
        ngrams.save(temporary, data.ngrams | ngrams.load(source.path))
        add_files(temporary, {plans.HEALING_FILE: content, **run.options.extra_files})
    trained, parameters = model.get_nb_trainable_parameters()
    return Healed(out, plan, run.objective.name, data, curve, trained, parameters - trained)
