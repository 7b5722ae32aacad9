"""The stage behind `heal`: read, train, write, check on questions that were not used."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from expertcut.checkpoints.build import add_files
from expertcut.checkpoints.exact import is_exact
from expertcut.checkpoints.held_out_check import Answered, Difference, Outcome, difference, outcome
from expertcut.checkpoints.output_dir import atomic_dir, check_writable
from expertcut.data import Quiz
from expertcut.data.held_out import hash_lines
from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.edits.plan import (
    HEALING_FILE,
    PLAN_FILE,
    BlockEdit,
    ChosenOn,
    PlanFile,
    PlanModel,
    hashes_sha256,
    load_hashes,
    load_plan,
    save_plan,
)
from expertcut.edits.splits import HASHES
from expertcut.errors import ModelError, SettingsError
from expertcut.healing.adapters import adapted, put_on, write_adapter, write_merged
from expertcut.healing.data import Read, read_data
from expertcut.healing.heal_settings import Healing, Place
from expertcut.healing.leakage import Judges
from expertcut.healing.objectives import OBJECTIVES, Live, Objective, Teacher
from expertcut.healing.state import Begun, go_on, plain
from expertcut.healing.teacher_cache import Whose, check_whose, filled
from expertcut.healing.trainer import Curve, Report, Tell, fit
from expertcut.models.checkpoint_dir import absolute_id, find_local, read_config
from expertcut.models.load import LoadOptions, MoeModel, Source, find_source, load
from expertcut.models.memory import give_back
from expertcut.profiling.locks import alone
from expertcut.scoring.engine import Engine, ask

logger = logging.getLogger(__name__)

_MOST_STEPS = 20
_BATCH_TOKENS = 4096
HEALED, BEFORE, BASE = "healed", "before healing", "the unedited base"


def plan_of(source: Source) -> PlanFile | None:
    """The plan in a checkpoint's folder.

    Raises:
        PlanError: one that does not hold together.
    """
    return load_plan(source.path) if (source.path / PLAN_FILE).is_file() else None


def first_base(source: Source) -> Source | None:
    """The model under all steps, if each of them is there unchanged; None for a model without."""
    base: Source | None = None
    here = source
    for _ in range(_MOST_STEPS):
        plan = plan_of(here)
        if plan is None:
            break
        try:
            here = _source_of(plan, here.path)
        except ModelError as error:
            logger.warning("the base is not at hand: %s", error)
            return None
        if here.fingerprint != plan.model.fingerprint:
            logger.warning("%s is not at hand as it was: it changed since", Path(here.id))
            return None
        base = here
    return base


def _source_of(plan: PlanFile, near: Path) -> Source:
    """The model that a plan is for; a folder where it is there with its weights.

    Raises:
        ModelError: it is not there.
    """
    model = plan.model
    if model.revision is not None:
        return find_source(model.id, model.revision)
    folder = find_local(model.id, model.fingerprint, near)
    if folder is None:
        raise ModelError(f"{model.id} is not there with its weights ({model.fingerprint[:8]})")
    return find_source(str(folder))


def used_questions(source: Source, read: Read) -> frozenset[str]:
    """Hash lines of all that this run, or a step before it, looked at."""
    plan = plan_of(source)
    return read.hashes | (load_hashes(source.path, plan) if plan else frozenset())


def healed_plan(moe: MoeModel, asked: Healing, objective: str, read: Read) -> PlanFile:
    """Without its proof. Experts stay who they are, so blocks are those of the plan before."""
    source = moe.source
    before = plan_of(source)
    layout: Layout = "exact" if is_exact(read_config(source.path)) else "stock"
    first = asked.data.quizzes[0].name if asked.data.quizzes else asked.data.texts[0].name
    return PlanFile(
        model=PlanModel(
            id=absolute_id(source.id, source.revision),
            revision=source.revision,
            fingerprint=source.fingerprint,
        ),
        action=f"heal --objective {objective}",
        criterion="by hand",
        positions="all",
        removal=LAYOUTS[layout].removal,
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


def _blocks(moe: MoeModel, before: PlanFile | None) -> dict[str, BlockEdit]:
    found: dict[str, BlockEdit] = {}
    for block in moe.blocks:
        edit = before.blocks.get(block.name) if before else None
        if edit is None:
            found[block.name] = BlockEdit(keep=tuple(range(block.n_experts)))
        else:
            found[block.name] = BlockEdit(keep=edit.keep, rows=edit.rows)
    return found


@dataclass(frozen=True)
class Verdict:
    """How far apart the forms are, and how well each answers questions that were `used` so.

    `judges` are the hash lines of the questions.
    """

    split: str
    used: str
    differences: list[Difference]
    outcomes: list[Outcome]
    judges: tuple[str, ...] = ()

    def figures(self) -> dict[str, Any]:
        """As they stand in plan.json, under the names that proofs of cuts have."""
        return {
            "held_out_split": self.split,
            "held_out_used": self.used,
            "held_out": [asdict(row) for row in self.differences],
            HASHES: list(self.judges),
            "shares": [],
            "alone": None,
            "agreement": [],
            "outcomes": [asdict(row) for row in self.outcomes],
        }


def answers(moe: MoeModel, quiz: Quiz) -> Tensor:
    """Log p of the choices (N, C)."""
    return ask(Engine(moe, _BATCH_TOKENS), quiz)


def judge(judges: Judges, by_form: dict[str, Tensor]) -> Verdict:
    """`by_form` are log p of choices (N, C); the healed model is compared with the others."""
    healed_NC = by_form[HEALED]
    quiz = judges.quiz
    others = [form for form in (BASE, BEFORE) if form in by_form]
    rows = [difference(form, healed_NC, by_form[form]) for form in others]
    said = {form: _answered(by_form[form]) for form in (*others, HEALED)}
    outcomes = [outcome(form, quiz, found, said[others[0]]) for form, found in said.items()]
    lines = tuple(sorted(hash_lines(quiz)))
    return Verdict(quiz.split, judges.used, rows, outcomes, lines)


def _answered(logprob_NC: Tensor) -> Answered:
    return Answered(logprob_NC, {}, torch.empty(0, dtype=torch.bool))


@dataclass(frozen=True)
class Options:
    """How to load and run; without `is_verified` no question is asked of the result.

    `beside` are files, by name, to lie beside the plan. `tell` is told how steps will run.
    """

    load_as: LoadOptions
    threads: int | None = None
    is_verified: bool = True
    report: Report = lambda done, total: None
    tell: Tell = lambda sentence: None
    beside: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Healed:
    """What was made, what it was trained on, and how the loss fell.

    `trained` counts the weights of the adapters, `parameters` those of the checkpoint.
    """

    folder: Path
    plan: PlanFile
    objective: str
    read: Read
    curve: Curve
    trained: int
    parameters: int
    verdict: Verdict | None


@dataclass(frozen=True)
class _Run:
    """What a run works from: the checkpoint that is trained and the questions that judge it."""

    asked: Healing
    objective: Objective
    moe: MoeModel
    read: Read
    judges: Judges | None
    options: Options


def heal(checkpoint: str, asked: Healing, place: Place, options: Options) -> Healed | None:
    """Trains a checkpoint and writes the healed one; the folder appears when all is done.

    Of several processes the first writes and has a result.

    Raises:
        ContractError: a model whose experts cannot be told apart, or cannot be written back.
        ModelError: a checkpoint or teacher that cannot be loaded, or losses that are no numbers.
        OutputError: a place that must not be written, that holds another run, or where one is at
            work.
        QuizError: data that cannot be read, or of which too much is scored later.
        SettingsError: options that cannot be used.
    """
    asked.check()
    working = place.working  # by its whole path: the working directory may be what is replaced
    source = find_source(checkpoint)
    check_writable(place.folder, is_forced=place.is_forced, inputs=(source.path, *_named(asked)))
    if options.threads:
        torch.set_num_threads(options.threads)
    objective, base = _objective(source, asked)
    if base is not None:  # looked for later, because that reads every byte of it
        check_writable(place.folder, is_forced=place.is_forced, inputs=(base.path,))
    moe = load(source, options.load_as)
    processes = PartialState(cpu=moe.device.type == "cpu")  # those of a launcher find each other
    read = read_data(asked, moe.tokenizer, _max_tokens(moe, asked))
    judges = read.judges(used_questions(source, read)) if options.is_verified else None
    run = _Run(asked, objective, moe, read, judges, options)
    if asked.cache is not None and objective.needs_teacher and base is not None:
        check_whose(asked.cache, _whose(run, base))
    with ExitStack() as until_done:
        if processes.is_main_process:
            until_done.enter_context(alone(working, "healing"))
            go_on(working, Begun.of(moe, base, objective.name, asked, read))
        processes.wait_for_everyone()
        return _trained(run, base, place, working)


def _trained(run: _Run, base: Source | None, place: Place, working: Path) -> Healed | None:
    """What becomes of a run, in the first process; its working folder goes when that is there."""
    asked = run.asked
    teacher, before = _ask_others(run, base)
    model = adapted(run.moe, replace(asked.lora, seed=asked.training.seed))
    curve = fit(
        run.moe, model, run.read, asked.training, (run.objective, teacher),
        (working / "steps", run.options.report), run.options.tell,
    )  # fmt: skip
    model.eval()
    del teacher
    give_back()
    if not PartialState().is_main_process:
        return None
    healed = _write(run, model, curve, before, place)
    shutil.rmtree(working, ignore_errors=True)
    return healed


def default_out(checkpoint: str) -> Path:
    """Beside other checkpoints, by its name."""
    name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint
    return Path("checkpoints") / f"{name.split('/')[-1]}-healed"


def _named(asked: Healing) -> Iterator[Path]:
    """What lies here and is read, or filled, for one more run."""
    data = asked.data
    names = [*(source.name for source in (*data.quizzes, *data.texts)), data.eval_quiz]
    yield from (Path(name) for name in names if name is not None and Path(name).exists())
    if asked.cache is not None:
        yield asked.cache


def _objective(source: Source, asked: Healing) -> tuple[Objective, Source | None]:
    """What is asked for, or what suits; and the model to come close to, where one is at hand."""
    base = find_source(asked.teacher) if asked.teacher else first_base(source)
    name = asked.objective or ("answer" if base is None else "distill")
    objective = OBJECTIVES[name]
    if objective.needs_teacher and base is None:
        raise SettingsError(
            f"--objective {name}: the model that {source.id} was made from is not at hand: name it "
            "with --teacher, or take --objective answer or lm"
        )
    return objective, base


def _max_tokens(moe: MoeModel, asked: Healing) -> int:
    config = moe.model.config.get_text_config()
    return min(asked.data.max_tokens, getattr(config, "max_position_embeddings", None) or 10**9)


def _ask_others(run: _Run, base: Source | None) -> tuple[Teacher | None, dict[str, Tensor]]:
    """The teacher, where one is needed; and what the base and the checkpoint say now."""
    before: dict[str, Tensor] = {}
    teacher: Teacher | None = None
    if base is not None and (run.objective.needs_teacher or run.judges is not None):
        other = cache(partial(_load_other, run, base))
        if run.judges is not None:
            before[BASE] = answers(other(), run.judges.quiz)
        if run.objective.needs_teacher:
            teacher = _teacher(run, base, other)
    if run.judges is not None:
        before[BEFORE] = answers(run.moe, run.judges.quiz)
    return teacher, before


def _teacher(run: _Run, base: Source, other: Callable[[], MoeModel]) -> Teacher:
    asked = run.asked
    if asked.cache is None:
        return Live(other(), asked.likeliest)
    n_rows = asked.training.steps * asked.training.batch
    rows: Any = (run.read.rows(n_rows), run.read.fixed(n_rows))
    live = lambda: Live(other(), asked.likeliest)  # noqa: E731
    return filled(asked.cache, _whose(run, base), rows, live, asked.training.batch)


def _whose(run: _Run, base: Source) -> Whose:
    return Whose(base.fingerprint, str(run.moe.dtype), run.asked.likeliest)


def _load_other(run: _Run, base: Source) -> MoeModel:
    other = load(base, run.options.load_as)
    ours, theirs = (moe.tokenizer.get_vocab() for moe in (run.moe, other))
    if ours != theirs:
        raise SettingsError(f"{base.id} cannot teach {run.moe.source.id}: their tokenizers differ")
    return other


def _write(run: _Run, model: Any, curve: Curve, before: dict[str, Tensor], place: Place) -> Healed:
    plan, verdict = healed_plan(run.moe, run.asked, run.objective.name, run.read), None
    source, write = run.moe.source, write_adapter if run.asked.is_adapter else write_merged
    trained, parameters = model.get_nb_trainable_parameters()
    with atomic_dir(place.folder, is_forced=place.is_forced) as temporary:
        write(source, model, temporary)
        if run.judges is not None:
            written = _reloaded(run, temporary, place.folder)
            verdict = judge(run.judges, {**before, HEALED: answers(written, run.judges.quiz)})
            plan = plan.model_copy(update={"proof": verdict.figures()})
        save_plan(temporary, plan, used_questions(source, run.read))
        record = json.dumps(_record(run, curve), indent=1) + "\n"
        add_files(temporary, {HEALING_FILE: record.encode(), **run.options.beside})
    sizes = (trained, parameters - trained)
    return Healed(place.folder, plan, run.objective.name, run.read, curve, *sizes, verdict)


def _reloaded(run: _Run, written: Path, folder: Path) -> MoeModel:
    """What was written, read as anyone will."""
    if not run.asked.is_adapter:
        return load(Source(str(folder), written), run.options.load_as)
    moe = load(run.moe.source, run.options.load_as)
    put_on(moe, written)
    return moe


def _record(run: _Run, curve: Curve) -> dict[str, Any]:
    """`healing.json`: what was asked, what was trained on, and every loss."""
    read, asked = run.read, run.asked
    return {
        "objective": run.objective.name,
        "asked": plain(asked),
        "rate": asked.training.rate(run.moe.model.config.get_text_config().hidden_size),
        "questions": read.n_questions,
        "texts": read.n_texts,
        "held_out_rows": len(read.held_out),
        "dropped": [asdict(dropped) for dropped in read.dropped],
        **asdict(curve),
    }
