"""Profiling itself: a quiz through a model, chunk by chunk, into a folder that can be resumed."""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from expertcut import __version__
from expertcut.errors import OutputError, ProfileError
from expertcut.moe.engine import Engine
from expertcut.moe.loading import LoadOptions, MoeModel, Source, load
from expertcut.moe.packing import encode
from expertcut.profiling.chunks import read_chunk, write_atomically, write_chunk
from expertcut.profiling.recorder import Recorder
from expertcut.profiling.store import (
    BlockInfo,
    ModelInfo,
    Profile,
    ProfileInfo,
    Settings,
    Stats,
    chunk_questions,
    load_profile,
    quiz_info,
)
from expertcut.quiz import Question, Quiz

logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure; None means as recorded where a run is resumed, else the default."""

    stats: Stats | None = None
    batch_tokens: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Progress:
    """How far a run is, in questions; `measured` counts those that were run this time."""

    done: int
    total: int
    measured: int


class Measurement:
    """One quiz asked of one model: settled settings, and `run`, which does what is missing."""

    def __init__(self, moe: MoeModel, quiz: Quiz, limit: int | None, options: MeasureOptions):
        self.moe = moe
        self.quiz = quiz
        self.engine = Engine(moe, options.batch_tokens or DEFAULT_BATCH_TOKENS)
        first = next(iter(quiz.questions))
        shots = quiz.shots_by_subject[first]
        self.engine.check(encode(moe.tokenizer, quiz.questions[first][:4], shots))
        self.info = ProfileInfo(
            model=model_info(moe),
            quiz=quiz_info(quiz, limit),
            settings=_settings(self.engine, options.stats or "all"),
        )

    def run(self, folder: Path) -> Iterator[Progress]:
        """Measures the chunks that the folder lacks, writing each as soon as it is done.

        Raises:
            ProfileError: the folder holds a profile of another model, quiz or setting.
            OutputError: the folder holds something else.
        """
        profile = _open(folder, self.info)
        started, measured, done, total = time.time(), 0, 0, len(self.quiz)
        chunks = ((s, c) for s in self.quiz.questions for c in chunk_questions(self.quiz, s))
        for (name, _, n), (subject, questions) in zip(self.info.chunks(), chunks, strict=True):
            path = profile.chunk_path(name)
            if not _is_done(path):
                write_chunk(path, self._measure(subject, questions))
                measured += n
            done += n
            yield Progress(done, total, measured)
        if measured or profile.finished_at is None:
            _write_run(folder, started, measured)

    def _measure(self, subject: str, questions: tuple[Question, ...]) -> dict[str, np.ndarray]:
        encoded = encode(self.moe.tokenizer, questions, self.quiz.shots_by_subject[subject])
        recorder = Recorder(self.moe.blocks, len(questions), self.info.settings.stats)
        with recorder.listening():
            logprob_NC = self.engine.score(encoded, recorder.begin)
        return {
            **recorder.arrays(),
            "choice_logprob_NC": logprob_NC.numpy(),
            "answer_N": np.array([q.answer for q in questions], dtype=np.uint8),
            "row_N": np.array([q.row for q in questions], dtype=np.int32),
        }


def measure(
    source: Source, quiz: Quiz, limit: int | None, load_as: LoadOptions, options: MeasureOptions
) -> Measurement:
    """Loads the model and settles the settings."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return Measurement(load(source, load_as), quiz, limit, options)


def resumed(
    folder: Path, load_as: LoadOptions, options: MeasureOptions
) -> tuple[LoadOptions, MeasureOptions]:
    """The options with what an earlier run in the folder recorded in place of what is not given."""
    if not (folder / "profile.json").is_file():
        return load_as, options
    recorded = load_profile(folder).info.settings
    dtype = recorded.dtype if load_as.dtype == "auto" else load_as.dtype
    device = recorded.device_type if load_as.device == "auto" else load_as.device
    return (
        LoadOptions(dtype, device, load_as.trust_remote_code),
        MeasureOptions(
            options.stats or recorded.stats,
            options.batch_tokens or recorded.batch_tokens,
            options.threads or recorded.threads,
        ),
    )


def default_folder(info: ProfileInfo, source: Source, root: Path = Path("profiles")) -> Path:
    """`profiles/<model>-<quiz>-<split>-<shots>shot-<8 hex of the settings>`."""
    quiz = info.quiz
    quiz_name = Path(quiz.id).resolve().name.removesuffix(".jsonl")
    name = f"{source.name}-{quiz_name}-{quiz.split}-{quiz.shots}shot-{info.short_hash}"
    return root / name


def model_info(moe: MoeModel) -> ModelInfo:
    """What a profile says of the model that it watched."""
    blocks = tuple(
        BlockInfo(
            name=b.name,
            experts=b.n_experts,
            top_k=b.top_k,
            scoring=b.scoring,
            inflates=b.inflates,
            groups=b.n_groups,
            top_groups=b.top_groups,
            selection_bias=b.selection_bias() is not None,
        )
        for b in moe.blocks
    )
    source = moe.source
    return ModelInfo(
        id=source.id, revision=source.revision, fingerprint=source.fingerprint, blocks=blocks
    )


def _settings(engine: Engine, stats: Stats) -> Settings:
    moe, on_cpu = engine.moe, engine.moe.device.type == "cpu"
    return Settings(
        dtype=str(moe.dtype).removeprefix("torch."),
        device_type=moe.device.type,
        threads=torch.get_num_threads(),
        batch_tokens=engine.batch_tokens,
        stats=stats,
        way="shared" if engine.is_trusted else "single",
        experts_implementation=str(moe.model.config._experts_implementation),
        attention=str(moe.model.config._attn_implementation),
        torch=torch.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability() if on_cpu else None,
    )


def _open(folder: Path, info: ProfileInfo) -> Profile:
    if (folder / "profile.json").is_file():
        profile = load_profile(folder)
        _refuse_other(folder, profile.info, info)
        return profile
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is not empty and holds no profile: name another --out")
    write_atomically(folder / "profile.json", (info.model_dump_json(indent=1) + "\n").encode())
    return Profile(folder, info)


def _refuse_other(folder: Path, theirs: ProfileInfo, ours: ProfileInfo) -> None:
    if theirs.model.fingerprint != ours.model.fingerprint:
        raise ProfileError(
            f"{folder} is a profile of another model: {theirs.model.id} with weights "
            f"{theirs.model.fingerprint[:8]}, not {ours.model.fingerprint[:8]}: name another --out"
        )
    if theirs.quiz != ours.quiz:
        raise ProfileError(
            f"{folder} is a profile of another quiz: {_describe(theirs)}, not "
            f"{_describe(ours)}: name another --out"
        )
    for key, recorded in theirs.settings.model_dump().items():
        asked = getattr(ours.settings, key)
        if asked != recorded:
            raise ProfileError(
                f"{folder} was begun with {key} {recorded}, now it is {asked}: "
                "give the recorded value or name another --out"
            )


def _describe(info: ProfileInfo) -> str:
    quiz = info.quiz
    asked = "".join(s.content_hash for s in quiz.subjects.values()).encode()
    total = sum(s.questions for s in quiz.subjects.values())
    return (
        f"{total} {quiz.split} questions of {quiz.id} at {quiz.shots} shots "
        f"({hashlib.sha256(asked).hexdigest()[:8]})"
    )


def _is_done(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        read_chunk(path)
    except ProfileError as error:
        logger.warning("%s: measuring it again", error)
        return False
    return True


def _write_run(folder: Path, started: float, measured: int) -> None:
    elapsed_s = time.time() - started
    run = {
        "started": started,
        "finished": time.time(),
        "elapsed_s": elapsed_s,
        "questions_measured": measured,
        "questions_per_s": measured / elapsed_s,
        "host": platform.node(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "expertcut": __version__,
    }
    write_atomically(folder / "run.json", (json.dumps(run, indent=1) + "\n").encode())
