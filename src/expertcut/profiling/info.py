"""What `profile.json` says: which model, which questions, which settings. No arrays here."""

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, Self
from urllib.parse import quote

from pydantic import Field, model_validator

from expertcut.data import Quiz, Truncate
from expertcut.documents import Format1, Identified, Record
from expertcut.profiling.sound import Stats

CHUNK_QUESTIONS = 256
MOST_EXPERTS = 1 << 15  # they are kept as int16
MOST_QUESTIONS = 10_000_000  # of a subject


class BlockInfo(Record):
    """A MoE block as the contract saw it; see `models.moe_block.MoeBlock`.

    `selection_bias` says whether one is added where experts are chosen; None is unknown.
    `selection` says what ranks them where it is not α (plus that bias): the logits plus that bias,
    or a table of token ids.
    """

    name: str
    experts: int = Field(ge=1, le=MOST_EXPERTS)
    top_k: int = Field(ge=1)
    scoring: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    inflates: bool
    groups: int = Field(ge=1)
    top_groups: int = Field(ge=1)
    selection_bias: bool | None = None
    selection: Literal["logits", "table"] | None = None

    @property
    def is_hashed(self) -> bool:
        """Whether a table of token ids chooses the experts, so that none of them can be removed."""
        return self.selection == "table"

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

    def called(self, model: str) -> Self:
        """The same with another id of its model."""
        return self.model_copy(update={"model": self.model.model_copy(update={"id": model})})

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
