"""The options of `heal`: what to train on, the objective, the adapters, and how long to train."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from expertcut.data import DEFAULT_QUIZ, Truncate
from expertcut.data.sources import Weighted
from expertcut.settings import Settings, Source, WorkFolder, option, refuse

ObjectiveName = Literal["distill", "answer", "lm"]
Target = Literal["attention", "experts", "gate"]
_TRAINING = (
    *("steps", "learning_rate", "answer_weight", "batch", "micro_batch", "warmup", "balance"),
    *("check_every", "patience", "seed"),
)  # in the order of `healing.json`
# The best rate of a model of width 128; Adam's best rates fall as width grows (arXiv:2203.03466).
_RATE_TIMES_WIDTH = 0.64


def _as_tuple(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) else value


# Options by panel of the help.
DATA = "What to train on"
_data = partial(option, panel=DATA)
_objective = partial(option, panel="Objective")
_adapter = partial(option, panel="Adapters")
_training = partial(option, panel="Training")
_output = partial(option, panel="Output")
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Targets = Annotated[tuple[Target, ...], BeforeValidator(_as_tuple)]


class HealSettings(Settings):
    """All options of a recovery run; no question of the evaluation split is trained on."""

    quiz: Names = _data(
        (), "Quiz to train on, or NAME=WEIGHT for a mixture. Repeatable.  "
        "[default: mmlu, unless --text is given]",
    )  # fmt: skip
    split: str = _data("val", "Split to train on.")
    shots: int | None = _data(
        None, "Solved questions before the last question of a row.  [default: 5]", ge=0
    )
    subjects: Names = _data((), "Train on these subjects only, separated by commas.", separator=",")
    limit: int | None = _data(None, "Train on the first LIMIT questions of each subject.", ge=1)
    text: Names = _data(
        (),
        "Texts as `profile --text` reads them, or SPEC=WEIGHT; for distill and lm. Repeatable.",
    )
    eval_quiz: Source | None = _data(None, "Quiz to keep out of the training.  [default: --quiz]")
    eval_split: str | None = _data(None, "Split to keep out of the training.  [default: test]")
    truncate: Truncate | None = _data(
        None, "left: drop the first tokens of prompts longer than the context, as "
        "lm-evaluation-harness does.  [default: refuse them]", in_recipe=False,
    )  # fmt: skip
    objective: ObjectiveName | None = _objective(
        None, "distill: match the base model's distribution. answer: the letter of the right "
        "choice. lm: all tokens.  [default: distill if the base model is available, else answer]",
    )  # fmt: skip
    teacher: Source | None = _objective(
        None, "Teacher of distill.  [default: the checkpoint's base model]"
    )
    teacher_cache: WorkFolder | None = _objective(
        None, "Folder that keeps the teacher's outputs for later runs."
    )
    likeliest: int = _objective(
        64, "Match the teacher's K most likely tokens; the others count as one.",
        flags=("--top-k-logits",), aliases=("--likeliest",), ge=1,
    )  # fmt: skip
    answer_weight: float | None = _objective(
        None, "Extra weight of the answer letters, relative to all tokens of a row.  "
        "[default: 1 for distill, else 0]", ge=0,
    )  # fmt: skip
    targets: Targets = _adapter(
        ("attention", "experts"), "Modules to adapt, separated by commas: attention, experts, "
        "gate.  [default: attention,experts]", separator=",", min_length=1,
    )  # fmt: skip
    rank: int = _adapter(16, "Rank of the adapters.", ge=1)
    alpha: int | None = _adapter(
        None, "Scale of the adapters times the rank.  [default: the rank]", ge=1
    )
    steps: int = _training(300, "Maximum number of steps.", ge=1)
    learning_rate: float | None = _training(
        None, "Peak learning rate.  [default: 0.64 / hidden size]", gt=0, lt=1
    )
    batch: int = _training(
        16, "Rows per step, over all processes.",
        flags=("--batch-size",), aliases=("--batch",), ge=1,
    )  # fmt: skip
    micro_batch: int | None = _training(
        None, "Rows in memory at once.  [default: chosen from the free memory]",
        flags=("--micro-batch-size",), aliases=("--micro-batch",), ge=1,
    )  # fmt: skip
    balance: float = _training(0.0, "Weight of the load-balancing loss.", ge=0)
    check_every: int = _training(
        50, "Steps between two evaluations on held-out rows.",
        flags=("--eval-every",), aliases=("--check-every",), ge=1,
    )  # fmt: skip
    patience: int = _training(3, "Stop after this many evaluations without a better loss.", ge=1)
    max_tokens: int = _training(2048, "Maximum tokens of a row.", ge=2)
    adapter: bool = _output(
        False, "Write only the adapter, not a whole checkpoint.",
        flags=("--adapter",), in_recipe=False,
    )  # fmt: skip
    save_memory: bool = _training(
        False, "Recompute activations in the backward pass instead of keeping them.",
        flags=("--gradient-checkpointing",), aliases=("--save-memory",),
    )  # fmt: skip
    shuffle: bool = _data(
        True, "Shuffle the choices of a question each time.", flags=("--shuffle/--no-shuffle",)
    )
    seed: int = _training(0, "Seed of the row order and the adapters.", ge=0, le=2**32 - 1)
    verify: bool = _output(
        True, "Score the healed checkpoint on held-out questions.", flags=("--verify/--no-verify",)
    )
    # No options: the revisions of hub quizzes that a recipe pins.
    quiz_revision: str | None = Field(None, exclude=True)
    eval_revision: str | None = Field(None, exclude=True)

    warmup: ClassVar[float] = 0.03  # share of the steps

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            refuse(f"--micro-batch-size {self.micro_batch} must divide --batch-size {self.batch}")
        if self.text and self.objective == "answer":
            refuse("--text has no answers to train on: take --objective lm or distill")
        return self

    @property
    def quizzes(self) -> tuple[Weighted, ...]:
        """Quizzes to train on."""
        names = self.quiz or (() if self.text else (DEFAULT_QUIZ,))
        return tuple(replace(Weighted.read(n), revision=self.quiz_revision) for n in names)

    @property
    def texts(self) -> tuple[Weighted, ...]:
        """Text files to train on."""
        return tuple(map(Weighted.read, self.text))

    @property
    def n_shots(self) -> int:
        """Solved questions before the last question of a row."""
        return 5 if self.shots is None else self.shots

    @property
    def kept_out_split(self) -> str:
        """Split that is scored later."""
        return self.eval_split or "test"

    def rate(self, width: int) -> float:
        """Peak learning rate for a hidden size."""
        return _RATE_TIMES_WIDTH / width if self.learning_rate is None else self.learning_rate

    def recorded(self) -> dict[str, Any]:
        """The settings as `healing.json` and the state of a run name them."""
        return {
            "data": {
                "quizzes": [vars(quiz) for quiz in self.quizzes],
                "split": self.split,
                "shots": self.n_shots,
                "subjects": list(self.subjects),
                "limit": self.limit,
                "texts": [vars(text) for text in self.texts],
                "eval_quiz": self.eval_quiz,
                "eval_split": self.kept_out_split,
                "max_tokens": self.max_tokens,
                "is_shuffled": self.shuffle,
                "eval_revision": self.eval_revision,
                "truncate": self.truncate,
            },
            "objective": self.objective,
            "teacher": self.teacher,
            "likeliest": self.likeliest,
            "cache": None if self.teacher_cache is None else str(self.teacher_cache),
            "lora": {
                "rank": self.rank,
                "alpha": self.alpha or self.rank,
                "targets": list(self.targets),
                "seed": self.seed,
            },
            "training": {n: getattr(self, n) for n in _TRAINING}
            | {"saves_memory": self.save_memory},
            "is_adapter": self.adapter,
        }
