"""The command `heal`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertcut.cli.options import (
    Device,
    Dtype,
    Force,
    Format,
    Limit,
    NoVerify,
    OutDir,
    Subjects,
    Threads,
    TruncateOption,
    TrustRemoteCode,
    option,
    value,
)
from expertcut.cli.output import print_tables, quiet
from expertcut.cli.running import bar, is_first, resumable

if TYPE_CHECKING:
    from expertcut.healing.settings import Healing


class Objective(StrEnum):
    """The names in `healing.objectives.OBJECTIVES`; a test holds them together."""

    distill = "distill"
    answer = "answer"
    lm = "lm"


@dataclass(frozen=True)
class Heal:
    """Train a cut checkpoint for a short while, and say what that won back."""

    checkpoint: Annotated[str, typer.Argument(help="What was pruned, merged or reweighted.")]
    quiz: Annotated[
        list[str] | None,
        option(
            "What to train on: a quiz as everywhere, or NAME=WEIGHT of several; may be repeated.  "
            "[default: mmlu, without --text]",
            "--quiz",
        ),
    ] = None
    split: Annotated[str, option("Split of it that is trained on.")] = "val"
    shots: Annotated[int, option("Questions of that split before the last of a row.", min=0)] = 5
    subjects: Subjects = None
    limit: Limit = None
    text: Annotated[
        list[str] | None,
        option(
            "JSON lines with text or messages, or FILE=WEIGHT; for distill and lm; may be repeated."
        ),
    ] = None
    eval_quiz: Annotated[
        str | None, option("What is scored later, if another: kept out of the training.")
    ] = None
    eval_split: Annotated[str, option("Its split.")] = "test"
    truncate: TruncateOption = None
    objective: Annotated[
        Objective | None,
        option(
            "distill: say what the base says. answer: the right letter. lm: all tokens.  "
            "[default: distill where the base is at hand, else answer]"
        ),
    ] = None
    teacher: Annotated[
        str | None, option("The model of distill.  [default: what the checkpoint was made from]")
    ] = None
    likeliest: Annotated[int, option("Of the teacher's tokens that count one by one.", min=1)] = 64
    teacher_cache: Annotated[
        Path | None, option("Folder for what it says, asked for only once, for any number of runs.")
    ] = None
    answer_weight: Annotated[
        float | None,
        option(
            "How much answers' letters weigh beside all of a row.  [default: 1 in distill, else 0]"
        ),
    ] = None
    targets: Annotated[str, option("What is adapted: attention, experts, gate.")] = (
        "attention,experts"
    )
    rank: Annotated[int, option("Of the adapters.", min=1)] = 16
    alpha: Annotated[int | None, option("Their scale times the rank.  [default: the rank]")] = None
    steps: Annotated[int, option("Steps at most.", min=1)] = 300
    learning_rate: Annotated[
        float | None, option("The highest.  [default: 0.64 / width of the model]")
    ] = None
    batch: Annotated[int, option("Rows of a step, over all processes.", min=1)] = 16
    micro_batch: Annotated[
        int | None, option("Rows in memory at once.  [default: what fits into free memory]", min=1)
    ] = None
    balance: Annotated[float, option("Weight of the load-balancing loss.", min=0)] = 0.0
    check_every: Annotated[int, option("Steps between two looks at held-out rows.", min=1)] = 50
    patience: Annotated[int, option("Looks without a better loss that end it.", min=1)] = 3
    max_tokens: Annotated[int, option("Of a row.", min=2)] = 2048
    adapter: Annotated[
        bool, option("Write the adapter alone, not a whole checkpoint.", "--adapter")
    ] = False
    save_memory: Annotated[
        bool, option("Compute activations again instead of keeping them.", "--save-memory")
    ] = False
    shuffle: Annotated[
        bool, option("Ask each time with the choices in another order.", "--shuffle/--no-shuffle")
    ] = True
    seed: Annotated[int, option("Of the rows' order and the adapters.", min=0, max=2**32 - 1)] = 0
    dtype: Dtype = "auto"
    device: Device = "auto"
    threads: Threads = None
    trust_remote_code: TrustRemoteCode = False
    out: OutDir = None
    force: Force = False
    no_verify: NoVerify = False

    def run(self) -> None:
        """Trains, writes, prints what came of it."""
        from expertcut.healing.heal import Options, default_out, heal
        from expertcut.healing.settings import Place
        from expertcut.models.load import LoadOptions

        quiet()
        load_as = LoadOptions(self.dtype, self.device, self.trust_remote_code)
        place = Place(self.out or default_out(self.checkpoint), self.force)
        with resumable(place.working, "the last state is"), bar("healing") as report:
            options = Options(load_as, self.threads, not self.no_verify, report, _tell)
            healed = heal(self.checkpoint, self._asked(), place, options)
        if healed is not None:
            _say(healed)

    def _asked(self) -> "Healing":
        from expertcut.data.sources import Weighted
        from expertcut.healing.adapters import Lora
        from expertcut.healing.settings import Data, Healing

        quizzes = self.quiz or ([] if self.text else ["mmlu"])
        subjects = tuple(s.strip() for s in self.subjects.split(",")) if self.subjects else ()
        data = Data(
            tuple(map(Weighted.read, quizzes)),
            *(self.split, self.shots, subjects, self.limit),
            tuple(map(Weighted.read, self.text or [])),
            *(self.eval_quiz, self.eval_split, self.max_tokens, self.shuffle),
            truncate=value(self.truncate),
        )
        targets = tuple(target.strip() for target in self.targets.split(","))
        alpha = self.rank if self.alpha is None else self.alpha
        lora = Lora(self.rank, alpha, targets, self.seed)
        return Healing(
            data,
            *(value(self.objective), self.teacher, self.likeliest, self.teacher_cache),
            lora=lora,
            training=self._training(),
            is_adapter=self.adapter,
        )

    def _training(self) -> Any:
        from expertcut.healing.settings import Training

        return Training(
            steps=self.steps,
            learning_rate=self.learning_rate,
            answer_weight=self.answer_weight,
            batch=self.batch,
            micro_batch=self.micro_batch,
            balance=self.balance,
            check_every=self.check_every,
            patience=self.patience,
            seed=self.seed,
            saves_memory=self.save_memory,
        )


def _tell(sentence: str) -> None:
    if is_first():
        print(sentence, flush=True)


def _say(healed: Any) -> None:
    from expertcut.reporting.edit_tables import healing_sentences, healing_tables

    print_tables(healing_tables(healed), Format.table)
    for sentence in healing_sentences(healed):
        print(sentence)
    print(f"written to {healed.folder}")
