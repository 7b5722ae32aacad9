"""The stage behind `heal`: read, train, write, prove on questions that were not used."""

import json
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
from expertcut.checkpoints.output_dir import atomic_dir, check_writable
from expertcut.edits.plan import HEALING_FILE, Plan, save_plan
from expertcut.errors import SettingsError
from expertcut.healing.asking import Healing, Place
from expertcut.healing.begun import Begun, go_on, plain
from expertcut.healing.data.judges import Judges
from expertcut.healing.data.sources import Read, read_data
from expertcut.healing.judging import BASE, BEFORE, HEALED, Verdict, answers, judge
from expertcut.healing.lineage import first_base
from expertcut.healing.planning import healed_plan, used_questions
from expertcut.healing.training.adapters import adapted, put_on
from expertcut.healing.training.cache import Whose, check_whose, filled
from expertcut.healing.training.fit import Curve, Report, Tell, fit
from expertcut.healing.training.objectives import OBJECTIVES, Objective
from expertcut.healing.training.teacher import Live, Teacher
from expertcut.healing.written import write_adapter, write_merged
from expertcut.models.load import LoadOptions, MoeModel, Source, find_source, load
from expertcut.models.memory import give_back
from expertcut.profiling.locks import alone


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
    plan: Plan
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
