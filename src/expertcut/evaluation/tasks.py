"""Tasks of lm-evaluation-harness: run with its samples logged, kept beside the results.

The harness is the extra `expertcut[tasks]` and is imported where it is used.
"""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from expertcut.checkpoints.output_dir import atomic_dir
from expertcut.errors import OutputError, SettingsError
from expertcut.files import read_file, without_secrets
from expertcut.models.load import LoadOptions, Source, load

Backend = Literal["hf", "vllm", "local-completions"]
_ALLOW_CODE = "HF_ALLOW_CODE_EVAL"  # read by the metric when it runs
# A missing library or data set, a wrong YAML, a server that does not answer.
_OF_THE_USER = (ImportError, OSError, ValueError, LookupError, RuntimeError, TypeError)


@dataclass(frozen=True)
class TaskOptions:
    """What is asked of the harness, and how it runs a model."""

    names: tuple[str, ...]
    backend: Backend
    include_path: Path | None  # a folder of task YAMLs
    limit: int | None  # documents of each task
    apply_chat_template: bool
    runs_code: bool  # of tasks that run what a model writes
    load_as: LoadOptions
    threads: int | None


@dataclass(frozen=True)
class Tested:
    """A model by its name; its checkpoint unless only a server has it, and the server's URL."""

    name: str
    source: Source | None
    base_url: str | None

    @property
    def short_name(self) -> str:
        """For names of folders."""
        return self.source.name if self.source else Path(self.name).name


def _check_installed(backend: Backend) -> None:
    """Refuses a backend whose library is missing."""
    if find_spec("lm_eval") is None:
        raise SettingsError("--tasks needs lm-evaluation-harness: pip install 'expertcut[tasks]'")
    needs = {"hf": "torch", "vllm": "vllm", "local-completions": "tenacity"}[backend]
    if find_spec(needs) is None:
        how = "pip install vllm" if backend == "vllm" else "pip install 'lm_eval[api]'"
        raise SettingsError(f"--backend {backend} needs {needs}: {how}")


def check_tasks(options: TaskOptions) -> None:
    """Loads the tasks with their documents, before any model; one error for one that cannot be."""
    _check_installed(options.backend)
    manager = _manager(options)
    if unknown := [name for name in options.names if name not in manager.all_tasks]:
        raise SettingsError(f"--tasks {unknown[0]}: no such task: {_near(unknown[0], manager)}")
    for name in options.names:
        try:
            with _one_line(f"--tasks {name}"), _code_allowed(options):
                tasks = manager.load([name])["tasks"]
            unsafe = [task for task in tasks if _is_unsafe(tasks[task])]
        except SettingsError as error:
            if options.runs_code or _ALLOW_CODE not in str(error.__cause__):
                raise
            unsafe = [name]  # the metric asks before the task is loaded
        if unsafe and not options.runs_code:
            raise SettingsError(
                f"--tasks {name}: {unsafe[0]} runs code that the model writes: add "
                "--confirm-run-unsafe-code, in a sandbox"
            )


def _manager(options: TaskOptions) -> Any:
    """The index of tasks; of the folder alone if it has all of them: the rest takes seconds."""
    from lm_eval.tasks import TaskManager

    if options.include_path is not None:
        if not options.include_path.is_dir():
            raise SettingsError(f"--include-path {options.include_path} is not a folder")
        own = TaskManager(include_path=str(options.include_path), include_defaults=False)
        if set(options.names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=options.include_path and str(options.include_path))


@contextmanager
def _code_allowed(options: TaskOptions) -> Iterator[None]:
    """Tells the metric `code_eval` of humaneval and mbpp that it may run code, if so confirmed."""
    before = os.environ.get(_ALLOW_CODE)
    if options.runs_code:
        os.environ[_ALLOW_CODE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_ALLOW_CODE, None)
        if before is not None:
            os.environ[_ALLOW_CODE] = before


def _near(name: str, manager: Any) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, manager.all_tasks, n=3)
    return f"did you mean {', '.join(near)}?" if near else "see `lm_eval ls tasks`"


def _is_unsafe(task: Any) -> bool:
    return bool(getattr(task, "UNSAFE_CODE", False))


def run_tasks(tested: Tested, options: TaskOptions, folder: Path) -> Path:
    """The folder of a model's samples; those of an earlier run that finished are kept."""
    key = hashlib.sha256(json.dumps(_key(tested, options)).encode()).hexdigest()[:8]
    place = folder / f"{tested.short_name}-tasks-{key}"
    if place.is_dir():
        return place
    with (
        atomic_dir(place) as temporary,
        _one_line(f"lm_eval on {tested.name}"),
        _code_allowed(options),
    ):
        _ask(tested, options, temporary)
    gc.collect()
    return place


def _key(tested: Tested, options: TaskOptions) -> list[object]:
    """All that the samples depend on, but for documents that a task reads elsewhere."""
    files = sorted((options.include_path or Path("/dev/null")).rglob("*.[yp]*"))
    hashes = [hashlib.sha256(read_file(f)).hexdigest() for f in files if f.is_file()]
    model = tested.source.fingerprint if tested.source else tested.name
    loaded = [options.load_as.dtype, options.load_as.device]
    asked = [options.names, options.limit, options.apply_chat_template]
    return [model, tested.base_url, options.backend, *loaded, *asked, hashes, version("lm_eval")]


def _ask(tested: Tested, options: TaskOptions, folder: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    found = simple_evaluate(
        **_model(tested, options),
        tasks=list(options.names),
        task_manager=_manager(options),
        limit=options.limit,
        log_samples=True,
        bootstrap_iters=0,  # the standard errors are ours
        apply_chat_template=options.apply_chat_template,
        confirm_run_unsafe_code=options.runs_code,
    )
    samples: Mapping[str, Sequence[Any]] = found.pop("samples")
    tracker = EvaluationTracker(output_path=str(folder))
    described = {"pretrained": tested.short_name}  # names the folder
    tracker.general_config_tracker.log_experiment_args(
        options.backend, described, None, None, options.apply_chat_template
    )
    tracker.save_results_aggregated(found, samples)
    for task, documents in samples.items():
        tracker.save_results_samples(task, documents)
    # It logs what it cannot write, and goes on.
    if len(list(folder.rglob("samples_*.jsonl"))) < len(samples):
        raise OutputError(f"lm_eval could not write its samples into {folder}")


def _model(tested: Tested, options: TaskOptions) -> dict[str, Any]:
    """The model as the harness takes it: one that we loaded, or a name for an engine or server."""
    source, as_is = tested.source, options.load_as
    if options.backend == "hf":
        assert source is not None
        return {"model": _loaded(source, options)}
    where = str(source.path) if source else tested.name
    dtype = "auto" if as_is.dtype == "stored" else as_is.dtype
    model_args: dict[str, Any] = {"pretrained": where, "dtype": dtype}
    if options.backend == "local-completions":
        model_args = {"model": tested.name, "base_url": tested.base_url, "tokenizer": where}
    model_args["trust_remote_code"] = as_is.trust_remote_code
    batch_size = "auto" if options.backend == "vllm" else 1
    return {"model": options.backend, "model_args": model_args, "batch_size": batch_size}


def _loaded(source: Source, options: TaskOptions) -> Any:
    """A model of our loader, which knows layout exact and runs no code unasked."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    moe = load(source, options.load_as)
    if (source.path / "generation_config.json").is_file():
        # As the harness loads it: it may name further tokens that end a text.
        moe.model.generation_config = GenerationConfig.from_pretrained(source.path)
    batch_size = 1 if moe.device.type == "cpu" else "auto"
    return HFLM(pretrained=moe.model, tokenizer=moe.tokenizer, batch_size=batch_size)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Silences the harness and its data sets; what they raise for the user comes in one line."""
    own = os.dup(2)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 2)  # of processes too, as it asks git
        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
        try:
            yield
        except _OF_THE_USER as error:
            said = without_secrets(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            raise SettingsError(f"{what}: {said.removesuffix(':')}") from error
        finally:
            os.dup2(own, 2)
            os.close(own)
