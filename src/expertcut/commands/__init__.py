"""One file per command: its settings and its run, for the command line, recipes and Python.

Here is what they share: options, the user interface, the profile, the output folder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import AfterValidator

from expertcut.data.sources import HELD_OUT_SHARE
from expertcut.errors import SettingsError
from expertcut.settings import (
    Count,
    FilePath,
    Folder,
    Settings,
    Source,
    Texts,
    like,
    option,
    refuse,
)

if TYPE_CHECKING:
    from expertcut.checkpoints.build import BuildOptions, Built
    from expertcut.data import Quiz
    from expertcut.edits.plan import EditPlan
    from expertcut.models.load import LoadOptions
    from expertcut.profiling.storage import Profile
    from expertcut.reporting.tables import Table
    from expertcut.scoring.passes import OnPass

T = TypeVar("T")
Parts = Callable[[int, int], None]
"""Told how many parts are done, of how many."""

QUIZ, MODEL, JUDGING, OUTPUT = "Quiz", "Model and device", "Judging", "Output"
_DTYPE = like(r"auto|stored|b?float\d+\w*", "is no dtype: take auto, stored, float32 or bfloat16")


class UI:
    """Who is told what happens, and where long runs show how far they are. This one is silent."""

    is_first = True
    """Whether this is the only process, or the first of several that share the work."""

    def quiet(self) -> None:
        """Called before models and data sets are loaded: other libraries must not print."""

    def say(self, tables: "Sequence[Table]", sentences: Sequence[str]) -> None:
        """What a command found."""

    def text(self, text: str) -> None:
        """Output for other programs, as it is."""

    def watch(
        self, run: "Callable[[OnPass], Iterator[T]]", what: str, total: int, where: Path
    ) -> list[T]:
        """All that a long run of questions yields; what it has done lies in `where`."""
        return list(run(lambda step: None))

    def parts(self, what: str, kept_in: Path | None = None) -> AbstractContextManager[Parts]:
        """A bar for parts of a run, whose last state is kept in a folder."""
        return nullcontext(lambda done, total: None)

    def stage(self, name: str, why: str, *, is_dry: bool) -> None:
        """A stage of a recipe is current (`why` is empty), or runs, or would."""

    def stage_done(self, name: str, elapsed_s: float) -> None:
        """A stage of a recipe has run."""


SilentUI = UI


def _share_held_out(value: float) -> float:
    if value not in (0, HELD_OUT_SHARE):
        refuse(
            f"must be {HELD_OUT_SHARE:g} or 0, not {value:g}: a profile keeps the sums of a fifth "
            "of its questions apart"
        )
    return value


class ModelSettings(Settings):
    """How a model is loaded and run."""

    trust_remote_code: bool = option(
        False, "Run code that comes with a checkpoint.", panel=MODEL, in_recipe=False
    )
    dtype: Annotated[str, AfterValidator(_DTYPE)] = option(
        "auto",
        "Type of the weights: stored, float32, bfloat16, ...  "
        "[default: float32 on CPU, as stored elsewhere]",
        panel=MODEL,
        in_recipe=False,
    )
    device: str = option(
        "auto", "Device: cpu, cuda, cuda:1, ...  [default: CUDA where there is one]",
        panel=MODEL, in_recipe=False,
    )  # fmt: skip
    device_map: Literal["auto"] | None = option(
        None, "Spread the model over all devices and the CPU.", panel=MODEL, in_recipe=False
    )
    max_memory: str | None = option(
        None, "Memory to use of each device, as 0=20GiB,cpu=60GiB.", panel=MODEL, in_recipe=False
    )
    offload: Folder | None = option(
        None, "Folder for weights that fit in no memory.", panel=MODEL, in_recipe=False
    )
    threads: int | None = option(
        None, "CPU threads; part of a profile's settings.",
        panel=MODEL, in_recipe=False, ge=1, le=4096,
    )  # fmt: skip

    def load_as(self) -> "LoadOptions":
        """The options of the loader."""
        from expertcut.models.load import LoadOptions

        return LoadOptions(
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            device_map=self.device_map,
            max_memory=self.max_memory,
            offload=Path(self.offload) if self.offload else None,
        )


class BatchSettings(ModelSettings):
    """How questions are batched."""

    batch_tokens: int | None = option(
        None, "Tokens of one forward pass.", panel=MODEL, in_recipe=False, ge=1, le=2**30
    )


class QuizSettings(Settings):
    """The quiz that is asked."""

    quiz: Source = option(
        "mmlu", "Quiz: mmlu, a folder, a .csv or .jsonl file, or a data set of the Hub.",
        panel=QUIZ, in_recipe=False,
    )  # fmt: skip
    quiz_revision: str | None = option(
        None, "Revision of a quiz of the Hub.", panel=QUIZ, in_recipe=False
    )
    shots: int = option(
        5, "Solved questions of split dev before each question.",
        panel=QUIZ, in_recipe=False, ge=0,
    )  # fmt: skip
    subjects: Texts = option(
        [],
        "Only these subjects, separated by commas.",
        panel=QUIZ,
        separator=",",
        in_recipe=False,
    )
    truncate: Literal["left"] | None = option(
        None,
        "Cut prompts longer than the context on their left, as lm-evaluation-harness does.  "
        "[default: refuse them]",
        panel=QUIZ,
        in_recipe=False,
    )


class SplitSettings(QuizSettings):
    """The part of the quiz that is asked."""

    split: str = option("test", "Split of the quiz: test, val, ...", panel=QUIZ)
    limit: Count | None = option(
        None, "Only the first N questions of each subject.", panel=QUIZ, metavar="N"
    )

    def load_quiz(self) -> "Quiz":
        """The questions.

        Raises:
            QuizError: no such quiz or subject; too few shots; a row that cannot be asked.
        """
        from expertcut.data import Selection, load_quiz

        subjects, revision = tuple(self.subjects), self.quiz_revision
        return load_quiz(
            Selection(
                self.quiz, self.split, self.shots, subjects, self.limit, revision, self.truncate
            )
        )


class ProfiledSettings(ModelSettings):
    """What an edit works from: a profile, and how its model is loaded."""

    profile: FilePath | None = option(
        None, "Profile to use.  [default: newest in profiles/]", panel="Profile", in_recipe=False
    )
    truncate: Literal["left"] | None = option(
        None, "As in `profile`, for other questions.  [default: as profiled]",
        panel="Profile", in_recipe=False,
    )  # fmt: skip

    def load_profile(self) -> "Profile":
        """The profile.

        Raises:
            ProfileError: there is none, or it is unfinished or damaged.
            SettingsError: other threads than it was made with.
        """
        from expertcut.profiling.storage import load_profile, newest_profile

        cut, path = self.truncate, self.profile
        found = newest_profile(truncate=cut) if path is None else load_profile(path, cut)
        if self.threads not in (None, found.info.settings.threads):
            raise SettingsError(
                f"--threads {self.threads}: the profile was made with "
                f"{found.info.settings.threads}, and what is compared with it must be too"
            )
        return found


def choosing_profile(
    settings: ProfiledSettings, ui: UI, held_out: float | None = None
) -> "Profile":
    """The profile without the questions that are held out of it."""
    from expertcut.edits.splits import choosing_profile as without_held_out

    found = without_held_out(settings.load_profile(), held_out)
    ui.say([], [f"{note}." for note in found.notes])
    return found.profile


class CheckpointSettings(ProfiledSettings):
    """How an edited checkpoint is judged, and where it is written."""

    held_out: Annotated[float, AfterValidator(_share_held_out)] | None = option(
        None,
        "Share of the questions that judge and do not choose, where no other split can (0: all "
        "choose, none judges).  [default: 0.2]",
        panel=JUDGING,
    )
    verify: bool = option(
        True, "Skip the held-out questions of the new checkpoint.",
        panel=JUDGING, flags=("--no-verify",),
    )  # fmt: skip
    out: FilePath | None = option(
        None, "Output folder; must be absent or empty.", panel=OUTPUT, in_recipe=False
    )
    force: bool = option(
        False, "Replace the output folder once the new one is complete.",
        panel=OUTPUT, in_recipe=False,
    )  # fmt: skip
    plan_only: bool = option(False, "Write only the plan.", panel=OUTPUT, in_recipe=False)

    def build_options(
        self, beside: Mapping[str, bytes], adapter: str | None = None
    ) -> "BuildOptions":
        """How to build; `beside` are files to lie beside the plan."""
        from expertcut.checkpoints.build import BuildOptions

        folder = None if adapter is None else Path(adapter)
        return BuildOptions(self.load_as(), self.verify, self.force, beside, folder)


def output_folder(profile: "Profile", slug: str, settings: CheckpointSettings, ui: UI) -> Path:
    """Where the checkpoint or plan goes; refused at once if something is there."""
    from expertcut.checkpoints.build import default_out, found_source, inputs_of
    from expertcut.checkpoints.output_dir import check_writable

    folder = settings.out or default_out(profile, slug, is_plan=settings.plan_only)
    check_writable(folder, is_forced=settings.force, inputs=inputs_of(profile))
    if not settings.plan_only:  # the source is checked before anything is said of it
        ui.quiet()
        found_source(profile)
    return folder


def write_edit(
    profile: "Profile",
    draft: "EditPlan",
    folder: Path,
    options: "BuildOptions",
    ui: UI,
    *,
    is_plan: bool,
) -> "Built | None":
    """Builds the checkpoint and says how it was judged; None where only the plan is written."""
    from expertcut.checkpoints.build import build, write_plan
    from expertcut.reporting.edit_tables import adapter_sentences, proof_sentences, proof_tables

    if is_plan:
        write_plan(profile, draft, folder, options)
        ui.say([], [f"written to {folder}"])
        return None
    ui.quiet()
    built = build(profile, draft, folder, options)
    sentences = [*proof_sentences(built), *adapter_sentences(built)]
    ui.say(proof_tables(built), [*sentences, f"written to {folder}"])
    return built
