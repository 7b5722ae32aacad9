"""Options that several commands share, each defined once, and what they name."""

import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, get_type_hints

import typer

from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.data import Quiz
    from expertcut.profiling.storage import Profile

DEFAULT_MODEL = "allenai/OLMoE-1B-7B-0125-Instruct"


class Format(StrEnum):
    """How `show` prints."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"


class Stats(StrEnum):
    """What `profile` keeps."""

    answer = "answer"
    all = "all"


class Perturbation(StrEnum):
    """How `profile` asks again."""

    shuffle_choices = "shuffle-choices"
    bf16 = "bf16"


class Positions(StrEnum):
    """Which tokens count."""

    answer = "answer"
    all = "all"


class Criterion(StrEnum):
    """The names in `edits.criteria.CRITERIA`; a test holds them together."""

    activations = "activations"
    gate_mass = "gate_mass"
    weighted_accuracy = "weighted_accuracy"
    output_norm = "output_norm"
    output_norm_mean = "output_norm_mean"
    reap = "reap"
    easy_ep = "easy_ep"
    easy_ep_postnorm = "easy_ep_postnorm"
    ranked_choice = "ranked_choice"
    aimer = "aimer"
    reconstruction = "reconstruction"
    random = "random"


class Truncate(StrEnum):
    """Where prompts that are too long lose tokens."""

    left = "left"


class Layout(StrEnum):
    """Forms of a checkpoint."""

    stock = "stock"
    exact = "exact"


class Removed(StrEnum):
    """What a removed expert of layout exact gives."""

    zero = "zero"
    mean = "mean"


class ApplyAt(StrEnum):
    """At which tokens a bias acts."""

    answer = "answer"
    all = "all"


class Fold(StrEnum):
    """Over which tokens layout stock measures how much gate weights grow."""

    answer = "answer"
    all = "all"
    off = "off"


def option(text: str, *names: str, **more: Any) -> Any:
    """An option with its help first."""
    return typer.Option(*names, help=text, **more)


class Runs(Protocol):
    """A command whose fields are its options."""

    def run(self) -> None:
        """Does what was asked."""


def command(options: type[Runs]) -> Callable[..., None]:
    """A command of the class's name whose options are the fields of that frozen dataclass.

    For commands with so many options that a function's signature would be a page long.
    """

    def run(**given: Any) -> None:
        options(**given).run()

    run.__name__, run.__doc__ = options.__name__.lower(), options.__doc__
    run.__annotations__ = get_type_hints(options, include_extras=True)
    run.__signature__ = inspect.signature(options, eval_str=True)  # type: ignore[attr-defined]
    return run


QuizName = Annotated[
    str, option("mmlu, a folder, a .csv or .jsonl file, or a data set of the hub.", "--quiz")
]
Split = Annotated[str, option("Split of the quiz: test, val, ...")]
Shots = Annotated[int, option("Solved questions of split dev before each question.")]
Subjects = Annotated[str | None, option("Only these, separated by commas.")]
Limit = Annotated[int | None, option("Only the first so many questions of each subject.")]
TruncateOption = Annotated[
    Truncate | None,
    option(
        "left: prompts longer than the context lose their first tokens, as in "
        "lm-evaluation-harness; without they are refused.",
        "--truncate",
    ),
]
TruncateMore = Annotated[
    Truncate | None,
    option("left: as in `profile`; as the profile was made without.", "--truncate"),
]
Dtype = Annotated[
    str, option("auto (float32 on CPU, as stored elsewhere), stored, float32, bfloat16, ...")
]
Device = Annotated[str, option("auto, cpu, cuda, cuda:1, ...")]
DeviceMap = Annotated[
    str | None, option("auto: spread over all devices and the CPU.", "--device-map")
]
MaxMemory = Annotated[
    str | None, option("How much to use of each, as 0=20GiB,cpu=60GiB.", "--max-memory")
]
Offload = Annotated[Path | None, option("Folder for weights that fit in no memory.", "--offload")]
Threads = Annotated[
    int | None, option("CPU threads; part of a profile's settings.", min=1, max=4096)
]
BatchTokens = Annotated[int | None, option("Tokens of one forward pass.", min=1, max=2**30)]
TrustRemoteCode = Annotated[
    bool, option("Run code that comes with a checkpoint.", "--trust-remote-code")
]
StatsOption = Annotated[
    Stats | None, option("answer leaves the all-token statistics out.  [default: all]", "--stats")
]
Perturb = Annotated[
    list[Perturbation] | None,
    option("Then ask again, choices shuffled or in bfloat16; may be repeated.", "--perturb"),
]
ProfileDir = Annotated[
    Path | None, option("The profile to work from; the newest in profiles/ without.", "--profile")
]
OutDir = Annotated[Path | None, option("Where to write; absent or empty without --force.")]
Force = Annotated[
    bool, option("Replace what is at --out, once the new one is complete.", "--force")
]
NoVerify = Annotated[
    bool, option("Do not ask held-out questions of the new checkpoint.", "--no-verify")
]
ResultsFile = Annotated[
    Path, option("Where to; its chunks beside it are resumed.", "--out", dir_okay=False)
]
LmEvalJson = Annotated[
    Path | None,
    option(
        "Also a results file in the form of lm-evaluation-harness; of several models one each.",
        "--lm-eval-json",
        dir_okay=False,
    ),
]
HeldOut = Annotated[
    float | None,
    option(
        "Share of the questions that judge and do not choose, where no other split can. 0: all of "
        "them choose and none judges.  [default: 0.2]",
        "--held-out",
    ),
]
PlanOnly = Annotated[bool, option("Write only the plan.", "--plan-only")]
ProtectOption = Annotated[
    list[str] | None,
    option(
        "super (super experts), none, or L:E: what stays whatever its score; may be repeated.  "
        "[default: super, with --keep and --keep-fraction]",
        "--protect",
    ),
]
PositionsOption = Annotated[
    Positions | None,
    option("Count at the answer position or at all tokens; the criterion's own without."),
]
RemovedOption = Annotated[
    Removed | None, option("What removed experts give in layout exact; zero without.", "--removed")
]
FoldOption = Annotated[
    Fold | None,
    option("Which tokens say how much layout stock must scale experts; answer without.", "--fold"),
]
Boost = Annotated[
    list[str] | None, option("E, L:E, E=bias or L:E=bias; may be repeated.", "--boost")
]
Suppress = Annotated[list[str] | None, option("As --boost, the other way.", "--suppress")]
Scale = Annotated[
    list[str] | None,
    option("E=factor or L:E=factor on its gate weight: who is chosen stays.", "--scale"),
]
ApplyAtOption = Annotated[
    ApplyAt | None,
    option(
        "Let biases act at the answer position only (layout stock).  [default: all]", "--apply-at"
    ),
]
LayoutOption = Annotated[
    Layout,
    option(
        "stock: loads wherever the base model does. exact: changes nothing else, loads in "
        "transformers with --trust-remote-code.",
        "--layout",
    ),
]


def value(choice: Any) -> Any:
    """A choice in the words of the stages."""
    return None if choice is None else choice.value


def read_quiz(
    quiz: str,
    split: str,
    shots: int,
    subjects: str | None,
    limit: int | None,
    truncate: Truncate | None,
) -> "Quiz":
    """The quiz that the shared options name."""
    from expertcut.data import Selection, load_quiz

    names = tuple(name.strip() for name in subjects.split(",")) if subjects else ()
    return load_quiz(Selection(quiz, split, shots, names, limit, truncate=value(truncate)))


def read_choosing_profile(
    path: Path | None,
    threads: int | None,
    truncate: Truncate | None = None,
    held_out: float | None = None,
) -> "Profile":
    """The named profile, or the newest, without what is held out of it; says so.

    Raises:
        SettingsError: other threads than it was made with, or a share that cannot be held out.
    """
    from expertcut.edits.splits import choosing_profile

    found = choosing_profile(read_profile(path, threads, truncate), held_out)
    for note in found.notes:
        print(f"{note}.")
    return found.profile


def read_profile(
    path: Path | None, threads: int | None, truncate: Truncate | None = None
) -> "Profile":
    """The named profile, or the newest; `truncate` is for what else is asked.

    Raises:
        SettingsError: other threads than it was made with.
    """
    from expertcut.profiling.storage import load_profile, newest_profile

    cut = value(truncate)
    found = newest_profile(truncate=cut) if path is None else load_profile(path, cut)
    if threads not in (None, found.info.settings.threads):
        raise SettingsError(
            f"--threads {threads}: the profile was made with {found.info.settings.threads}, "
            "and what is compared with it must be too"
        )
    return found
