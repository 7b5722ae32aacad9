"""What was asked for: data, objective, adapters, and how long to train."""

from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from expertcut.data import Truncate
from expertcut.data.sources import Weighted
from expertcut.errors import SettingsError
from expertcut.healing.adapters import TARGETS, Lora
from expertcut.healing.objectives import OBJECTIVES

# Tried on the bundled model of width 128; Adam's best rates fall as width grows (arXiv:2203.03466).
_RATE_TIMES_WIDTH = 0.64


@dataclass(frozen=True)
class Data:
    """What is trained on: one split of quizzes, and texts.

    Nothing that stands in split `eval_split` of `eval_quiz` (else of any of the quizzes) is.
    `shots` is how many solved questions stand before the last of a row, all of the same split.
    Whenever a question comes, its choices stand in another order, if `is_shuffled`. `truncate` is
    for the questions that judge the result, where their prompts are longer than the context.
    """

    quizzes: tuple[Weighted, ...]
    split: str = "val"
    shots: int = 5
    subjects: tuple[str, ...] = ()
    limit: int | None = None
    texts: tuple[Weighted, ...] = ()
    eval_quiz: str | None = None
    eval_split: str = "test"
    max_tokens: int = 2048
    is_shuffled: bool = True
    eval_revision: str | None = None
    truncate: Truncate | None = None


@dataclass(frozen=True)
class Training:
    """How long and how fast; `micro_batch` rows are in memory at once, `batch` make a step.

    Every `check_every` steps the held-out rows are asked, and after `patience` times without a
    better loss training stops. What stands before answers' letters weighs `answer_weight` times as
    much as all of a row, besides. Without a learning rate it is `_RATE_TIMES_WIDTH` over the
    model's width.
    """

    steps: int = 300
    learning_rate: float | None = None
    answer_weight: float | None = None
    batch: int = 16
    micro_batch: int | None = None
    warmup: float = 0.03
    balance: float = 0.0
    check_every: int = 50
    patience: int = 3
    seed: int = 0
    saves_memory: bool = False

    def check(self) -> None:
        """That the numbers can be used.

        Raises:
            SettingsError: one that cannot.
        """
        counts = ("steps", "batch", "check_every", "patience")
        for name in counts:
            if getattr(self, name) < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be at least 1")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise SettingsError(
                f"--micro-batch {self.micro_batch} must divide --batch {self.batch}"
            )
        if not 0 <= self.seed < 2**32:
            raise SettingsError(f"--seed {self.seed} must lie between 0 and {2**32 - 1}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise SettingsError("--learning-rate must lie between 0 and 1")
        for name in ("balance", "answer_weight"):
            if not 0 <= (getattr(self, name) or 0.0) < inf:  # which NaN is not
                raise SettingsError(f"--{name.replace('_', '-')} must be a number of at least 0")

    def rate(self, width: int) -> float:
        """The learning rate for a model of so many hidden channels."""
        return _RATE_TIMES_WIDTH / width if self.learning_rate is None else self.learning_rate

    def weight_of_answers(self, objective: str) -> float:
        """For an objective: all tokens alike in `lm`, answers as much as the rest in `distill`."""
        default = 1.0 if objective == "distill" else 0.0
        return default if self.answer_weight is None else self.answer_weight


@dataclass(frozen=True)
class Healing:
    """All of it. Without an `objective`, `distill` where the base is at hand, else `answer`.

    `teacher` is the model to come close to, without one that which the checkpoint was made from.
    `likeliest` of its tokens count by themselves, the others as one; what it says lies in `cache`,
    where one is named, and is asked for only once.
    """

    data: Data
    objective: str | None = None
    teacher: str | None = None
    likeliest: int = 64
    cache: Path | None = None
    lora: Lora = field(default_factory=lambda: Lora(16, 16, ("attention", "experts")))
    training: Training = field(default_factory=Training)
    is_adapter: bool = False

    def check(self) -> None:
        """All that can be refused before anything is read.

        Raises:
            SettingsError: naming the option.
        """
        self.training.check()
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise SettingsError(
                f"--objective {self.objective} is unknown: it can be {', '.join(OBJECTIVES)}"
            )
        if not self.data.quizzes and not self.data.texts:
            raise SettingsError("say what to train on: --quiz or --text")
        if self.data.texts and self.objective == "answer":
            raise SettingsError("--text has no answers to train on: take --objective lm or distill")
        if unknown := [target for target in self.lora.targets if target not in TARGETS]:
            raise SettingsError(
                f"--targets {unknown[0]} is unknown: it can be {', '.join(TARGETS)}"
            )
        if not self.lora.targets or self.lora.rank < 1 or not 0 < self.lora.alpha < inf:
            raise SettingsError("--targets must name something, --rank and --alpha be above 0")
        if self.likeliest < 1 or self.data.max_tokens < 2:
            raise SettingsError("--likeliest must be at least 1, --max-tokens at least 2")


@dataclass(frozen=True)
class Place:
    """Where it goes; `working` keeps what a run that was stopped has done."""

    folder: Path
    is_forced: bool = False

    @property
    def working(self) -> Path:
        """A sibling that goes when all is done; `.` and links have none of their own."""
        place = self.folder.resolve()
        return place.with_name(f"{place.name}.healing")
