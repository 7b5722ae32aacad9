"""A profile on disk: `profile.json`, one safetensors file per chunk, and `run.json`."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

import numpy as np
from pydantic import Field, model_validator

from expertcut.documents.reading import parse_json, read_file
from expertcut.documents.records import Format1, Identified, Record, load_record
from expertcut.errors import ProfileError
from expertcut.profiling.chunks import Arrays, read_chunk
from expertcut.profiling.sound import NO_CHOICE, Expected, Stats, arrays_fault
from expertcut.quiz import Quiz, Truncate

CHUNK_QUESTIONS = 256
MOST_EXPERTS = 1 << 15  # they are kept as int16
MOST_QUESTIONS = 10_000_000  # of a subject
CUT = "cut_N"  # tokens that prompts lost on their left, in a chunk where one did
_PADDING = {"choice_logprob_NC": -np.inf, "order_NC": NO_CHOICE}


class BlockInfo(Record):
    """A MoE block as the contract saw it; see `moe.contract.MoeBlock`.

    `selection_bias` says whether one is added to α where experts are chosen; None is unknown.
    """

    name: str
    experts: int = Field(ge=1, le=MOST_EXPERTS)
    top_k: int = Field(ge=1)
    scoring: Literal["softmax", "sigmoid"]
    inflates: bool
    groups: int = Field(ge=1)
    top_groups: int = Field(ge=1)
    selection_bias: bool | None = None

    @model_validator(mode="after")
    def _can_route(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"routes each token to {self.top_k} of {self.experts} experts")
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ValueError(f"{self.experts} experts do not lie in {self.groups} groups")
        return self


class ModelInfo(Identified):
    """Which model, to the last bit of its weights."""

    fingerprint: str
    blocks: tuple[BlockInfo, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _blocks_have_names(self) -> Self:
        if len({block.name for block in self.blocks}) < len(self.blocks):
            raise ValueError("two blocks have one name")
        return self


class SubjectInfo(Record):
    """One subject's questions; the hash covers its shots too."""

    questions: int = Field(ge=1, le=MOST_QUESTIONS)
    content_hash: str


class QuizInfo(Identified):
    """Which questions."""

    split: str
    shots: int = Field(ge=0)
    limit: int | None
    subjects: dict[str, SubjectInfo] = Field(min_length=1)


class Settings(Record):
    """Everything but chunk and model that the bytes of a chunk depend on."""

    dtype: str
    device_type: str
    threads: int = Field(ge=1, le=4096)
    batch_tokens: int = Field(ge=1, le=1 << 30)
    stats: Stats
    way: Literal["shared", "single"]
    experts_implementation: str
    attention: str
    torch: str
    cpu_capability: str | None
    device_map: Literal["auto"] | None = None  # set where the model runs on several devices
    truncate: Truncate | None = None


class ProfileInfo(Record):
    """`profile.json`."""

    format: Format1 = 1
    model: ModelInfo
    quiz: QuizInfo
    settings: Settings

    @property
    def short_hash(self) -> str:
        """8 hex digits over all of it, for naming the folder."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]

    def place(self, chunk: str, subject: str) -> str:
        """A hash that a chunk carries, of all that its bytes depend on and of its own name.

        Other subjects of the quiz are no part of it, nor is where the model lies.
        """
        asked = self.quiz.subjects[subject].content_hash
        settings = self.settings.model_dump_json()
        text = "\n".join((chunk, asked, self.model.fingerprint, settings))
        return hashlib.sha256(text.encode()).hexdigest()

    def chunks(self) -> Iterator[tuple[str, str, int]]:
        """(file name, subject, questions) of every chunk, in the quiz's order."""
        for subject, info in self.quiz.subjects.items():
            starts = [*range(0, info.questions, CHUNK_QUESTIONS), info.questions]
            for k, (start, end) in enumerate(pairwise(starts)):
                # Quoted, so that no subject's name can lead out of the folder.
                yield f"{quote(subject, safe=' ')}-{k}.safetensors", subject, end - start


class Profile:
    """A profile's folder; arrays are read when asked for, every chunk checked.

    `truncate` is for prompts of what is asked from here on: as the profile's, unless given.
    """

    def __init__(self, path: Path, info: ProfileInfo, truncate: Truncate | None = None) -> None:
        self.path = path
        self.info = info
        self.truncate = truncate or info.settings.truncate

    @property
    def missing(self) -> list[str]:
        """Chunks that are still to be measured."""
        return [name for name, _, _ in self.info.chunks() if not self.chunk_path(name).is_file()]

    @property
    def finished_at(self) -> float | None:
        """Seconds since the epoch, None while chunks are missing."""
        try:
            run = parse_json(read_file(self.path / "run.json"))
            return None if self.missing else float(run["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def chunk_path(self, name: str) -> Path:
        """Where a chunk lies."""
        return self.path / "chunks" / name

    @cached_property
    def chunks(self) -> list[Arrays]:
        """All chunks in order.

        Raises:
            ProfileError: one is missing or damaged.
        """
        if self.missing:
            total = sum(1 for _ in self.info.chunks())
            raise ProfileError(
                f"{self.path} is not finished: {len(self.missing)} of {total} chunks are missing: "
                "run the same `expertcut profile` again to finish it"
            )
        return [self._chunk(*chunk) for chunk in self.info.chunks()]

    def _chunk(self, name: str, subject: str, n_questions: int) -> Arrays:
        path, blocks = self.chunk_path(name), self.info.model.blocks
        arrays = read_chunk(path, self.info.place(name, subject))
        experts = tuple(block.experts for block in blocks)
        expected = Expected(n_questions, experts, blocks[0].top_k, self.info.settings.stats)
        if (found := arrays_fault(arrays, expected)) is not None:
            raise ProfileError(f"{path} is damaged ({found}): profile again to redo it")
        return arrays

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A per-question array (first axis N) over all chunks.

        Raises:
            ProfileError: only answers were kept.
        """
        chunks = [chunk[name] for chunk in self.chunks if name in chunk]
        if len(chunks) < len(self.chunks):
            raise ProfileError(
                f"{self.path} holds no {name}, it keeps answers alone as `expertcut eval` writes "
                "them: use a folder that `expertcut profile` made"
            )
        if name in _PADDING:  # questions may differ in their number of choices
            most = max(chunk.shape[1] for chunk in chunks)
            widths = [((0, 0), (0, most - chunk.shape[1])) for chunk in chunks]
            pairs = zip(chunks, widths, strict=True)
            chunks = [np.pad(c, w, constant_values=_PADDING[name]) for c, w in pairs]
        return np.concatenate(chunks)

    @property
    def n_cut(self) -> int | None:
        """Questions whose prompts lost tokens on their left; None where none may."""
        found = sum(int((chunk[CUT] > 0).sum()) for chunk in self.chunks if CUT in chunk)
        return found if self.info.settings.truncate else None

    def subjects(self) -> list[str]:
        """The subject of each question."""
        return [s for _, subject, n in self.info.chunks() for s in [subject] * n]

    def token_sum(self, name: str) -> np.ndarray[Any, Any] | None:
        """An all-token sum (L, E) as if every prompt had run alone; None where a chunk lacks it."""
        if not all(f"question_{name}_LE" in chunk for chunk in self.chunks):
            return None
        sums = [
            len(c["row_N"]) * c[f"prefix_{name}_LE"] + c[f"question_{name}_LE"] for c in self.chunks
        ]
        return np.asarray(np.sum(sums, axis=0))


def load_profile(path: Path, truncate: Truncate | None = None) -> Profile:
    """A profile's description.

    Raises:
        ProfileError: no profile there, or its description does not hold.
    """
    file = path / "profile.json"
    if not file.exists():
        raise ProfileError(f"no profile in {path}: it has no profile.json")
    info = load_record(file, ProfileInfo, ProfileError, "is no profile")
    return Profile(path, info, truncate)


def newest_profile(root: Path = Path("profiles"), truncate: Truncate | None = None) -> Profile:
    """The profile in `root` that was finished last.

    Raises:
        ProfileError: none is finished.
    """
    found = [load_profile(file.parent, truncate) for file in root.glob("*/profile.json")]
    finished = [(at, p) for p in found if (at := p.finished_at) is not None]
    if not finished:
        state = f"holds {len(found)} unfinished" if found else "holds no"
        raise ProfileError(f"{root}/ {state} profile: run `expertcut profile` or name --profile")
    return max(finished, key=lambda pair: pair[0])[1]


def quiz_info(quiz: Quiz, limit: int | None) -> QuizInfo:
    """What a profile says of the quiz that it asked."""
    subjects = {
        name: SubjectInfo(questions=len(questions), content_hash=quiz.content_hash(name))
        for name, questions in quiz.questions.items()
    }
    return QuizInfo(
        id=quiz.id,
        revision=quiz.revision,
        split=quiz.split,
        shots=quiz.shots,
        limit=limit,
        subjects=subjects,
    )
