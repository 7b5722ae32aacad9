"""The schema of a profile: `profile.json`, and the arrays of a chunk."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from urllib.parse import quote

import numpy as np
from pydantic import Field, model_validator

from expertcut.data import Quiz, Truncate
from expertcut.data.questions import LETTERS
from expertcut.documents import Format1, Identified, Record
from expertcut.errors import ProfileError
from expertcut.files import parse_json, read_file
from expertcut.stats import Array

if TYPE_CHECKING:
    from expertcut.models.contract_check import Contract

Stats = Literal["none", "answer", "all", "routes"]  # routes: tokens by expert alone, given
NO_CHOICE = 255  # padding of order_NC
CHUNK_QUESTIONS = 256


class DeclaredInfo(Record):
    """What a contract says of a block; see `models.declared.Declared`."""

    calls: int = Field(ge=1)  # blocks of the same experts, one for each
    has_state: bool  # its router reads what an earlier block hands on
    is_ranked: bool  # the experts with the largest α are chosen
    constants: dict[int, Literal["zero", "copy", "constant"]]
    names: str | None

    @property
    def why_not_cut(self) -> str | None:
        """Why no checkpoint with fewer of its experts can be written; None if one can be."""
        if self.calls > 1:
            return "one expert serves several calls of its block"
        if self.constants:
            return "it has zero-computation experts, which own no tensors"
        if self.has_state:
            return "its router reads a state that an earlier one hands on"
        return None if self.names else "its contract does not give `names` of experts in the files"


class ContractInfo(Record):
    """The contract file that declared the blocks of a model."""

    path: str
    sha256: str

    def read(self) -> "Contract":
        """Runs the file; ContractError if it is gone or another."""
        from expertcut.models.contract_check import read_contract  # torch

        return read_contract(Path(self.path), self.sha256)


class BlockInfo(Record):
    """A MoE block; see `models.moe_block.MoeBlock`."""

    name: str
    experts: int = Field(ge=1, le=1 << 15)  # ids are int16
    top_k: int = Field(ge=1)
    scoring: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    inflates: bool
    groups: int = Field(ge=1)
    top_groups: int = Field(ge=1)
    selection_bias: bool | None = None  # whether one is added to choose experts; None is unknown
    # What chooses experts: None for α, or the logits, each plus that bias; or a table of token ids.
    selection: Literal["logits", "table"] | None = None
    places: int | None = Field(None, ge=1)  # per token, if a routing rule may leave some empty
    declared: DeclaredInfo | None = None  # of a contract

    @property
    def n_places(self) -> int:
        """Columns of the chosen experts; where a routing rule leaves a place empty, it holds −1."""
        return self.places or self.top_k

    @property
    def is_hashed(self) -> bool:
        """Whether a table of token ids chooses the experts, so none can be removed."""
        return self.selection == "table"

    @model_validator(mode="after")
    def _can_route(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"routes each token to {self.top_k} of {self.experts} experts")
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ValueError(f"{self.experts} experts do not lie in {self.groups} groups")
        return self


def layer_numbers(names: Sequence[str]) -> list[int] | None:
    """The layers of blocks, by the one number in their names; None where names do not tell them."""
    found = [re.findall(r"(?<=\.)\d+(?=\.|$)", name) for name in names]
    if any(len(own) != 1 for own in found):
        return None
    numbers = [int(own[0]) for own in found]
    return numbers if len({*numbers}) == len(numbers) else None


class ModelInfo(Identified):
    """The profiled model, identified by its fingerprint."""

    fingerprint: str
    blocks: tuple[BlockInfo, ...] = Field(min_length=1)
    contract: ContractInfo | None = None

    @property
    def identity(self) -> str:
        """What the bytes of a chunk depend on: the fingerprint, and a contract."""
        return self.fingerprint + (f" {self.contract.sha256}" if self.contract else "")

    def read_contract(self) -> "Contract | None":
        """The contract that declares the blocks; None without one."""
        return None if self.contract is None else self.contract.read()

    @model_validator(mode="after")
    def _blocks_have_names(self) -> Self:
        if len({block.name for block in self.blocks}) < len(self.blocks):
            raise ValueError("two blocks have one name")
        return self


class SubjectInfo(Record):
    """The questions of a subject; the hash includes the shots."""

    questions: int = Field(ge=1, le=10_000_000)
    content_hash: str


class QuizInfo(Identified):
    """The questions of a profile."""

    split: str
    shots: int = Field(ge=0)
    limit: int | None
    subjects: dict[str, SubjectInfo] = Field(min_length=1)


class Settings(Record):
    """Everything else that the bytes of a chunk depend on."""

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
    device_map: Literal["auto"] | None = None  # only on several devices
    truncate: Truncate | None = None
    parallel: str | None = Field(None, pattern=r"^(tensor|expert):[0-9]{1,4}$")


class TextSourceInfo(Record):
    """One source of texts; `chunks` are the numbers of rows in each chunk."""

    spec: str
    revision: str | None
    weight: float = Field(gt=0)
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    chunks: tuple[int, ...] = Field(min_length=1)
    content_hash: str


class JudgedInfo(Record):
    """How rows of `eval` become chunks, and what these keep.

    `prefix` stands before each document, `top` tokens of each position are kept; `base` is the hash
    of the run that the predictions are compared with.
    """

    prefix: int | None
    top: int = Field(ge=0)
    chunk_tokens: int = Field(ge=1)
    base: str | None


class TextInfo(Record):
    """The texts of a profile, and how they became rows; see `data.corpus.TextSelection`."""

    sources: dict[str, TextSourceInfo] = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    tokens: int | None
    seed: int
    assistant_only: bool
    has_loss: bool
    judged: JudgedInfo | None = None  # of `eval`; a profile has none

    @property
    def id(self) -> str:
        """The names of the sources."""
        return ", ".join(self.sources)

    @property
    def split(self) -> str:
        """What stands for a quiz's split."""
        return "text"

    @property
    def revision(self) -> None:
        """None: each source has its own."""
        return

    @property
    def shots(self) -> int:
        """Texts have no shots."""
        return 0

    @property
    def limit(self) -> None:
        """Texts are limited by tokens instead."""
        return

    @property
    def subjects(self) -> dict[str, SubjectInfo]:
        """Rows and content of each source."""
        return {
            name: SubjectInfo(questions=sum(s.chunks), content_hash=s.content_hash)
            for name, s in self.sources.items()
        }

    @property
    def n_documents(self) -> int:
        """Documents of all sources."""
        return sum(source.documents for source in self.sources.values())

    @property
    def n_tokens(self) -> int:
        """Tokens that count, of all sources."""
        return sum(source.tokens for source in self.sources.values())


class MeasuredInfo(Record):
    """What every `profile.json` and `trace.json` has."""

    noun: ClassVar = "profile"
    reads: ClassVar[str]
    """What is read: `quiz`, `text`, … and the key of it in the file."""
    format: Format1 = 1
    model: ModelInfo

    @classmethod
    def file_in(cls, folder: Path) -> Path:
        """Its file in a folder."""
        return folder / f"{cls.noun}.json"

    @classmethod
    def load_from(cls, folder: Path) -> Any:
        """The info of a folder, of one of `kinds`; ProfileError without a valid one."""
        if not (file := cls.file_in(folder)).exists():
            raise ProfileError(
                f"no {cls.noun} in {folder}: it has no {file.name}: run `expertcut {cls.noun}`"
            )
        kind = cls.kinds()[0]
        with suppress(OSError, ValueError):  # said when it is loaded
            content = parse_json(read_file(file))
            keys = content if isinstance(content, dict) else {}
            kind = next((k for k in cls.kinds() if k.reads in keys), kind)
        return kind.load(file, ProfileError, f"is not a valid {cls.noun}")

    @classmethod
    def kinds(cls) -> "tuple[type[MeasuredInfo], ...]":
        """The classes of such a file, told apart by what is read."""
        return ProfileInfo, TextProfileInfo

    @property
    def content(self) -> str:
        """How much is read of what, with a hash."""
        raise NotImplementedError

    def chunk_hash(self, chunk: str, subject: str) -> str:
        """The hash in a chunk: all that its bytes depend on, no other subject and no path."""
        raise NotImplementedError

    def chunks(self) -> Iterator[tuple[str, str, int]]:
        """(file name, subject or source, number of items) of every chunk, in order."""
        raise NotImplementedError

    @property
    def short_hash(self) -> str:
        """8 hex digits over all of it, for the folder name."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]

    def called(self, model: str) -> Self:
        """The info with another model id."""
        return self.model_copy(update={"model": self.model.model_copy(update={"id": model})})


class ProfileInfo(MeasuredInfo):
    """`profile.json` of a quiz."""

    reads: ClassVar = "quiz"
    quiz: QuizInfo
    settings: Settings

    @property
    def text(self) -> None:
        """The texts; a quiz has none."""
        return

    @property
    def content(self) -> str:
        """How much of what it reads, with a hash."""
        quiz, subjects = self.quiz, self.quiz.subjects.values()
        total, short = sum(s.questions for s in subjects), _short(s.content_hash for s in subjects)
        return f"{total} {quiz.split} questions of {quiz.id} at {quiz.shots} shots ({short})"

    def chunk_hash(self, chunk: str, subject: str) -> str:
        """The hash in a chunk: all that its bytes depend on, no other subject and no path."""
        quiz_hash, settings = self.quiz.subjects[subject].content_hash, self.settings
        lines = (chunk, quiz_hash, self.model.identity, settings.model_dump_json())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def questions_of_chunk(self) -> int:
        """The most questions of a chunk."""
        return CHUNK_QUESTIONS

    def chunks(self) -> Iterator[tuple[str, str, int]]:
        """(file name, subject, number of questions) of every chunk, in quiz order."""
        for subject, info in self.quiz.subjects.items():
            starts = [*range(0, info.questions, self.questions_of_chunk), info.questions]
            for k, (start, end) in enumerate(pairwise(starts)):
                # Quoted: a subject must not lead out of the folder.
                yield f"{quote(subject, safe=' ')}-{k}.safetensors", subject, end - start


class TextProfileInfo(MeasuredInfo):
    """`profile.json` of texts."""

    reads: ClassVar = "text"
    text: TextInfo
    settings: Settings

    @property
    def quiz(self) -> TextInfo:
        """What was read in place of a quiz."""
        return self.text

    @property
    def content(self) -> str:
        """How much of what it reads, with a hash."""
        short = _short(source.content_hash for source in self.text.sources.values())
        return f"{self.text.n_tokens} tokens of {self.text.id} ({short})"

    def chunk_hash(self, chunk: str, source: str) -> str:
        """The hash in a chunk: all that its bytes depend on, no other source and no path."""
        content, settings = self.text.sources[source].content_hash, self.settings
        lines: tuple[str, ...] = (chunk, content, self.model.identity)
        lines += (settings.model_dump_json(),)
        judged = self.text.judged
        lines += (str(self.text.has_loss), *([judged.model_dump_json()] if judged else []))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def chunks(self) -> Iterator[tuple[str, str, int]]:
        """(file name, source, number of rows) of every chunk, in order."""
        for name, source in self.text.sources.items():
            for k, n_rows in enumerate(source.chunks):
                yield f"{quote(name, safe=' ')}-{k}.safetensors", name, n_rows


def _short(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:8]


AnyProfileInfo = ProfileInfo | TextProfileInfo


def quiz_info(quiz: Quiz, limit: int | None) -> QuizInfo:
    """The quiz's entry in a profile."""
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


def most_places(blocks: Sequence[BlockInfo]) -> int:
    """Columns of the chosen experts of all blocks."""
    return max(block.n_places for block in blocks)


def arrays_faults(arrays: Mapping[str, Array], info: ProfileInfo, n: int) -> Iterator[str]:
    """The errors in the arrays of a chunk of n questions; read one only if there is none before."""
    blocks, has_routing = info.model.blocks, info.settings.stats != "none"
    shape_LE = (len(blocks), max(block.experts for block in blocks))
    shapes: dict[str, tuple[int, ...]] = {"answer_N": (n,), "row_N": (n,)}
    if has_routing:
        shapes |= {"alpha_NLE": (n, *shape_LE), "gap_N": (n,), "prefix_gap": (1,)}
        shapes |= dict.fromkeys(("chosen_NLK", "weight_NLK"), (n, len(blocks), most_places(blocks)))
    sums = [name for name in arrays if name.endswith("_LE")]
    kinds = {name.partition("_")[2].removesuffix("_LE") for name in sums}
    kinds |= {"tokens", "weight", "norm", "weighted_norm"} if sums else set()
    each = [f"{part}_{kind}_LE" for kind in sorted(kinds) for part in ("prefix", "question")]
    if "calibration_N" in arrays:  # with sums over the questions that are not held out
        shapes["calibration_N"] = (n,)
        each += [f"calibration_{kind}_LE" for kind in sorted(kinds)]
    for name, shape in {**shapes, **dict.fromkeys(each, shape_LE)}.items():
        if name not in arrays:
            yield f"it has no {name}"
        elif arrays[name].shape != shape:
            yield f"{name} has shape {list(arrays[name].shape)}, not {list(shape)}"
    yield from _wrong_answers(arrays, n)
    if has_routing:
        yield from _wrong_routing(arrays, blocks)
    for name in sums:
        if not np.isfinite(arrays[name]).all():
            yield f"{name} holds a value that is not finite"


def text_arrays_faults(arrays: Mapping[str, Array], info: TextProfileInfo, n: int) -> Iterator[str]:
    """The errors in the arrays of a chunk of n rows."""
    blocks = info.model.blocks
    needed: dict[str, tuple[int, ...]] = {"tokens_N": (n,), "document_N": (n,)}
    if info.text.has_loss:
        needed |= dict.fromkeys(("scored_N", "loss_N", "right_N"), (n,))
    if info.settings.stats == "routes":
        shape_LE = (len(blocks), max(block.experts for block in blocks))
        needed |= {"calibration_N": (n,)}
        needed |= dict.fromkeys(("tokens_LE", "calibration_tokens_LE"), shape_LE)
    elif info.settings.stats != "none":
        shape_LE = (len(blocks), max(block.experts for block in blocks))
        kinds = ["tokens", "weight", "norm", "weighted_norm", "votes", "largest", "probability"]
        kinds += ["predicted", "right", "loss", "alpha", "alpha_right"] * info.text.has_loss
        every = [f"{prefix}{kind}_LE" for kind in kinds for prefix in ("", "calibration_")]
        needed |= {"calibration_N": (n,), **dict.fromkeys(every, shape_LE)}
        needed["moments_2LX"] = (2, len(blocks), 2 + most_places(blocks))
    for name, shape in needed.items():
        if name not in arrays:
            yield f"it has no {name}"
        elif arrays[name].shape != shape:
            yield f"{name} has shape {list(arrays[name].shape)}, not {list(shape)}"
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            yield f"{name} holds a value that is not finite"


def _wrong_answers(arrays: Mapping[str, Array], n: int) -> Iterator[str]:
    logprob_NC = arrays.get("choice_logprob_NC", np.zeros(0, np.float32))
    shape = logprob_NC.shape
    if len(shape) != 2 or shape[0] != n or not 2 <= shape[1] <= len(LETTERS):
        yield f"choice_logprob_NC has shape {list(shape)}, not {[n]} and 2 to {len(LETTERS)}"
        return
    order_NC = arrays.get("order_NC", np.zeros(shape, np.uint8))
    if order_NC.shape != shape or ((order_NC >= shape[1]) & (order_NC != NO_CHOICE)).any():
        yield "order_NC is not an order of the choices"
    if logprob_NC.dtype != np.float32 or np.isnan(logprob_NC).any() or (logprob_NC > 1).any():
        yield "choice_logprob_NC holds a value that is not a log probability"
    answer_N = arrays["answer_N"]
    if answer_N.dtype != np.uint8 or (answer_N >= shape[1]).any():
        yield "answer_N names choices that are not there"


def _wrong_routing(arrays: Mapping[str, Array], blocks: Sequence[BlockInfo]) -> Iterator[str]:
    chosen_NLK, limit_L1 = arrays["chosen_NLK"], np.array([[b.experts] for b in blocks])
    is_ruled = any(block.places is not None for block in blocks)  # which leaves places empty
    is_ruled |= len({block.n_places for block in blocks}) > 1
    is_whole = np.issubdtype(chosen_NLK.dtype, np.integer)
    if not is_whole or (chosen_NLK < -int(is_ruled)).any() or (chosen_NLK >= limit_L1).any():
        yield "chosen_NLK names experts that are not there"
    for name in ("alpha_NLE", "weight_NLK"):
        if arrays[name].dtype != np.float32 or not np.isfinite(arrays[name]).all():
            yield f"{name} holds a value that is not finite"
    for name in ("gap_N", "prefix_gap"):
        if np.isnan(arrays[name]).any():
            yield f"{name} holds a value that is not finite"
