"""One file per command, with its settings and its run; here is what several commands share."""

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from expertcut.data import Quiz, Selection, load_quiz, warn_of_repeats, without
from expertcut.data.sources import Weighted
from expertcut.edits.edit_settings import HeldOut
from expertcut.errors import QuizError, SettingsError
from expertcut.files import read_file
from expertcut.reporting.tables import Table, labelled, next_lines
from expertcut.settings import (
    Count,
    FilePath,
    Folder,
    Settings,
    Source,
    Text,
    Texts,
    like,
    option,
    refuse,
)

if TYPE_CHECKING:
    from expertcut.checkpoints.build import BuildOptions, Built
    from expertcut.data.corpus import Corpus, TextSelection
    from expertcut.evaluation.results import Scoring
    from expertcut.evaluation.sweep_judges import TextScoring
    from expertcut.models.load import LoadOptions
    from expertcut.profiling.measure import MeasureOptions
    from expertcut.profiling.storage import Profile
    from expertcut.scoring.passes import OnPass

T = TypeVar("T")
Files = Mapping[str, bytes] | None
"""The contents of files to write beside a plan, by name."""
OnPart = Callable[[int, int], None]
"""Called with the number of finished parts, and of all."""
Watched = Callable[["OnPass"], Iterator[T]]
"""A run that reports its forward passes and yields its results."""

QUIZ, MODEL, JUDGING, OUTPUT = "Quiz", "Model and device", "Judging", "Output"
_DTYPE = like(r"auto|stored|b?float\d+\w*", "is not a dtype: take auto, stored, float32, bfloat16")


def _as_paths(value: Any) -> Any:
    """One path, or several, as texts."""
    several = value if isinstance(value, list | tuple) else [value]
    return [str(path) if isinstance(path, Path) else path for path in several]


ProfilePaths = Annotated[list[str], BeforeValidator(_as_paths), Field(min_length=1)]
argument = partial(option, is_argument=True, in_recipe=False)
quiz_option = partial(option, panel=QUIZ, in_recipe=False)
profile_option = partial(option, panel="Profile", in_recipe=False)
model_option = partial(option, panel=MODEL, in_recipe=False)
output_option = partial(option, panel=OUTPUT, in_recipe=False)
text_option = partial(option, panel="Text", is_recorded="set")
AMOUNT = like(r"\d{1,12}(\.\d{1,6})?[kKmMbB]?", "is not a number: write 200k or 1M")


def read_amount(text: str) -> int:
    """The number of `200k`, `1M` or `2B`; SettingsError below 1."""
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1].lower(), 1)
    if (amount := round(float(text.rstrip("kKmMbB")) * factor)) < 1:
        raise SettingsError(f"--tokens {text} takes no token: give 1 or more")
    return amount


class UI:
    """Where commands report results and progress. This one prints nothing."""

    is_first = True
    """Whether this is the only process, or the first of several that share the work."""

    def quiet(self) -> None:
        """Silences other libraries, before models and data sets are loaded."""

    def say(self, tables: Sequence[Table], sentences: Sequence[str]) -> None:
        """Reports results."""

    def end(
        self, facts: Sequence[tuple[str, str]], written: object, *commands: Sequence[str]
    ) -> None:
        """Reports the last lines: labelled facts, what was written, and what to do next."""
        lines = [labelled(*fact) for fact in facts]
        self.say([], [*lines, f"{'written':<10}{written}", *next_lines(*commands)])

    def text(self, text: str) -> None:
        """Prints output for other programs, unchanged."""

    def watch(
        self, run: Watched[T], what: str, total: int, where: Path, unit: str = "questions"
    ) -> list[T]:
        """All results of a run over `total` units, which keeps finished chunks in `where`."""
        found = []
        with self.parts(what, where) as report:
            for step in run(lambda step: None):
                report(getattr(step, "done", 0), total)
                found.append(step)
        return found

    def parts(self, what: str, kept_in: Path) -> AbstractContextManager[OnPart]:
        """A progress bar for parts of a run, whose last state is kept in a folder."""
        return nullcontext(lambda done, total: None)


SILENT = UI()


class JudgedSettings(Settings):
    """The margin of the verdicts, and how much is printed."""

    margin: float = option(
        1.0, "Accepted loss in points of accuracy, for the verdicts.",
        panel=JUDGING, in_recipe=False, gt=0, le=100,
    )  # fmt: skip
    wide: bool = output_option(False, "Print all columns and tables.")

    def say(self, ui: UI, tables: Sequence[Table]) -> None:
        """Reports tables, without their notes and wide columns unless asked for."""
        narrow = [replace(table, note="").narrow(unless=False) for table in tables]
        ui.say(tables if self.wide else narrow, [])


class ModelSettings(Settings):
    """How a model is loaded and run."""

    trust_remote_code: bool = model_option(False, "Run code that comes with a checkpoint.")
    dtype: Annotated[str, _DTYPE] = model_option(
        "auto",
        "Type of the weights: stored, float32, bfloat16, ...  "
        "[default: float32 on CPU, as stored elsewhere]",
    )
    device: str = model_option(
        "auto", "Device: cpu, cuda, cuda:1, ...  [default: CUDA if available]"
    )
    device_map: Literal["auto"] | None = model_option(None, "Spread the model over all devices.")
    max_memory: str | None = model_option(None, "Memory limit per device, as 0=20GiB,cpu=60GiB.")
    offload: Folder | None = model_option(None, "Folder for weights that do not fit in memory.")
    threads: int | None = model_option(
        None, "CPU threads; edits need as many as their profile.", ge=1, le=4096
    )

    def load_as(self) -> "LoadOptions":
        """The options of the loader."""
        from expertcut.models.load import LoadOptions

        place = (self.device_map, self.max_memory, Path(self.offload) if self.offload else None)
        return LoadOptions(self.dtype, self.device, self.trust_remote_code, *place)


class LayerwiseSettings(ModelSettings):
    """Whether a model runs layer by layer."""

    layerwise: bool = model_option(
        False, "Run layer by layer: read each weight once, hold two layers in memory."
    )
    hidden_states: Folder | None = model_option(
        None,
        "Folder for outputs of layers, from which --layerwise resumes too.  [default: in memory]",
    )

    def load_as(self) -> "LoadOptions":
        """The options of the loader."""
        if self.hidden_states is not None and not self.layerwise:
            raise SettingsError("--hidden-states is for --layerwise: add that")
        if self.layerwise and self.device_map is not None:
            raise SettingsError("--layerwise and --device-map are two ways: give one of them")
        folder = None if self.hidden_states is None else Path(self.hidden_states)
        return replace(super().load_as(), layerwise=self.layerwise, hidden_states=folder)


class BatchSettings(ModelSettings):
    """How a model is run on batches of questions."""

    batch_tokens: int | None = model_option(
        None, "Tokens of one forward pass.  [default: 2048]", ge=1, le=2**30
    )


class QuizSettings(Settings):
    """The quiz."""

    quiz: Source = quiz_option(
        "mmlu", "Quiz: mmlu, a folder, a .csv or .jsonl file, or a data set of the Hub."
    )
    quiz_revision: str | None = quiz_option(None, "Revision of a quiz of the Hub.")
    shots: int = quiz_option(5, "Solved questions of split dev before each question.", ge=0)
    subjects: Texts = quiz_option(
        [], "Only these subjects, separated by commas.  [default: all]", separator=","
    )
    truncate: Literal["left"] | None = quiz_option(
        None,
        "Cut prompts longer than the context on their left, as lm-evaluation-harness does.  "
        "[default: refuse them]",
    )

    def selection(self, split: str, limit: int | None = None) -> Selection:
        """Questions of a split, at most `limit` of each subject."""
        which = (self.quiz, split, self.shots, tuple(self.subjects), limit)
        return Selection(*which, self.quiz_revision, self.truncate)


class SplitSettings(BatchSettings, QuizSettings):
    """The questions of the quiz, and how a model is run on them."""

    split: str = option("test", "Split of the quiz: test, val, ...", panel=QUIZ)
    limit: Count | None = option(
        None, "Only the first N questions of each subject.", panel=QUIZ, metavar="N"
    )

    def load_quiz(self) -> Quiz:
        """The questions."""
        quiz = load_quiz(self.selection(self.split, self.limit))
        warn_of_repeats(quiz)
        return quiz


class TextsSettings(Settings):
    """Texts."""

    text: Texts = text_option(
        [],
        "Texts: a .jsonl (text, messages, prompt and completion), .parquet or text file, a folder, "
        "or org/name[:config][:split][:field] of the Hub; =W weighs by tokens; repeatable.",
        metavar="SPEC[=W]",
    )


class TextRowsSettings(TextsSettings):
    """Texts, and how they become rows."""

    assistant_only: bool = text_option(False, "Count only tokens that the assistant wrote.")
    max_tokens: int = text_option(
        2048, "Cut longer documents into rows of this many tokens.", ge=2, le=1 << 20
    )

    def check_text(self) -> None:
        """Refuses options of texts without a text."""
        for name in ("assistant_only", "tokens"):
            if not self.text and getattr(self, name, None):
                raise SettingsError(f"--{name.replace('_', '-')} is for texts: add --text FILE")

    def text_selection(self) -> "TextSelection":
        """Which texts, and how they become rows."""
        from expertcut.data.corpus import TextSelection

        return TextSelection(tuple(self.text), self.max_tokens, assistant_only=self.assistant_only)


class TextSettings(TextRowsSettings):
    """Texts, how many of them, and how they become rows."""

    tokens: Annotated[Text, AMOUNT] | None = text_option(
        None, "Stop after so many tokens, taken at random: 1M, 200k, ...  [default: all]",
        metavar="N",
    )  # fmt: skip
    seed: int = text_option(0, "Seed of the documents that --tokens takes.", ge=0)

    @property
    def n_tokens(self) -> int | None:
        """`tokens` as a number."""
        return None if self.tokens is None else read_amount(self.tokens)

    def text_selection(self) -> "TextSelection":
        """Which texts, how many, and how they become rows."""
        return replace(super().text_selection(), tokens=self.n_tokens, seed=self.seed)

    def load_corpus(self, tokenizer: Any) -> "Corpus":
        """The texts, tokenized."""
        from expertcut.data.corpus import load_corpus

        return load_corpus(self.text_selection(), tokenizer)


class ProfiledSettings(ModelSettings):
    """The profile that an edit is chosen from, and how its model is loaded."""

    profile: ProfilePaths | None = profile_option(
        None, "Profile to use.  [default: newest in profiles/]", metavar="PATH"
    )
    truncate: Literal["left"] | None = profile_option(
        None,
        "Cut prompts of questions outside the profile too, as `profile --truncate`.  "
        "[default: as profiled]",
    )
    held_out: HeldOut | None = option(
        None,
        "Share of the profile's questions to hold out for scoring, if no other split can "
        "(0: none).  [default: 0.2]",
        panel=JUDGING,
    )
    blends: ClassVar[bool] = False
    """Whether the command takes several profiles."""

    @model_validator(mode="after")
    def _one_profile_unless_it_blends(self) -> Self:
        if len(self.profile or ()) > 1 and not self.blends:
            refuse("this command works from one profile: only prune and sweep blend several")
        return self

    def load_profile(self) -> "Profile":
        """The profile; SettingsError if `threads` differs from its own."""
        return self.load_one(None if self.profile is None else Path(self.profile[0]))

    def load_one(self, path: Path | None) -> "Profile":
        """The profile at a path, or the newest."""
        from expertcut.profiling.storage import load_profile, newest_profile

        cut = self.truncate
        profile = newest_profile(truncate=cut) if path is None else load_profile(path, cut)
        profile.trust_remote_code = self.trust_remote_code
        threads = profile.info.settings.threads
        if self.threads not in (None, threads):
            raise SettingsError(
                f"--threads {self.threads}: the profile was made with {threads}, and what is "
                "compared with it must be too"
            )
        return profile

    def check_profile(self, _profile: "Profile") -> None:
        """Refuses what the profile's model rules out, before a quiz is read."""

    def choosing_profile(self, ui: UI) -> "Profile":
        """The profile without its held-out questions."""
        self.check_profile(profile := self.load_profile())
        from expertcut.edits.splits import choosing_profile  # not if there is no profile

        profile, note = choosing_profile(profile, self.held_out)
        ui.say([], [labelled("split", f"{note}.")] if note else [])
        return profile

    def say_profile(self, profile: "Profile", ui: UI) -> None:
        """Names each profile, and newer unfinished ones where none was named."""
        from expertcut.profiling.storage import unfinished_after
        from expertcut.reporting.edit_tables import profile_line

        unfinished = unfinished_after(profile) if self.profile is None else None
        ui.say([], [profile_line(part, unfinished) for part in profile.parts])


class BlendedSettings(ProfiledSettings):
    """One profile, or several of one model that are blended."""

    profile: ProfilePaths | None = profile_option(
        None,
        "Profile to use; repeatable, =W weighs each of several.  [default: newest in profiles/]",
        metavar="PATH[=W]",
    )
    blend: Literal["sum", "maxmin"] | None = profile_option(
        None,
        "Blend several profiles: sum adds their weighed statistics, maxmin keeps most for the "
        "worst of them.  [default: sum]",
    )
    blends: ClassVar[bool] = True

    @property
    def weighted(self) -> "list[Weighted]":
        """The paths of the profiles with their weights; a path may hold an equals sign."""
        texts = self.profile or []
        return [Weighted(t) if os.path.lexists(t) else Weighted.read(t) for t in texts]

    def check_blend(self, criteria: Sequence[str], *, is_sequential: bool) -> None:
        """Refuses --blend with one profile, and what cannot rank a blend."""
        if len(self.weighted) > 1:
            if is_sequential and self.blend == "maxmin":
                raise SettingsError(
                    "--blend maxmin compares the shares that the unedited model's domains keep: "
                    "give --sequential with --blend sum"
                )
            from expertcut.edits.selection import check_criteria

            check_criteria(criteria, self.blend or "sum")
        elif self.blend is not None:
            raise SettingsError(
                f"--blend {self.blend} blends several profiles: repeat --profile PATH=W, or leave "
                "--blend out"
            )

    def load_profile(self) -> "Profile":
        """The profile, or the blend of several."""
        weighted = self.weighted
        if len(weighted) < 2:
            return self.load_one(Path(weighted[0].name) if weighted else None)
        from expertcut.profiling.blend import Blend

        parts = [self.load_one(Path(one.name)) for one in weighted]
        return Blend(parts, [one.weight for one in weighted], self.blend or "sum")


class ScoredSettings(Settings):
    """Questions to score or to profile, by default the profile's quiz at its shots."""

    quiz: Source | None = quiz_option(None, "Quiz to run.  [default: the profile's]")
    split: str | None = quiz_option(None, "Split of the quiz.  [default: test]")
    shots: int | None = quiz_option(None, "Shots.  [default: the profile's, or 5]", ge=0)
    subjects: Texts | None = quiz_option(
        None, "Only these subjects, separated by commas.  [default: the profile's, or all]",
        separator=",",
    )  # fmt: skip
    limit: Count | None = quiz_option(None, "Only the first N of each subject.", metavar="N")

    @property
    def scored_given(self) -> list[str]:
        """Those of these options that are given."""
        return [f"--{n}" for n in ScoredSettings.model_fields if getattr(self, n) is not None]

    def scored_quiz(self, profile: "Profile") -> Quiz:
        """The quiz as profiled, but split test, where no option says otherwise.

        Without options, a profile that holds questions out is scored on those.
        """
        from expertcut.edits.splits import profiled_quiz
        from expertcut.profiling.storage import ProfilePart

        profile = profile.parts[0]  # of a blend the heaviest
        if isinstance(profile, ProfilePart) and not self.scored_given:
            return profiled_quiz(profile, is_held_out=True)
        if self.quiz is None and profile.info.text is not None:
            raise SettingsError(
                f"{profile.path} is a profile of texts, which have no answers: name a quiz"
            )
        info = profile.info.quiz
        is_same = self.quiz in (None, info.id)
        subjects, revision = (tuple(info.subjects), info.revision) if is_same else ((), None)
        if self.subjects is not None:
            subjects = tuple(self.subjects)
        shots = info.shots if self.shots is None else self.shots
        which = (self.quiz or info.id, self.split or "test", shots, subjects)
        return load_quiz(Selection(*which, self.limit, revision, profile.truncate))


class ScoredTextSettings(TextRowsSettings, ScoredSettings, ProfiledSettings):
    """Texts to judge on, in place of those that the profile holds out."""

    top_k_logprobs: int = text_option(
        64, "Keep the base's K likeliest tokens for KL; the others count as one.", ge=1, metavar="K"
    )

    def check_scored(self) -> None:
        """Refuses options of a quiz beside --text, and options of texts without it."""
        self.check_text()
        if not self.text and (ours := {"max_tokens", "top_k_logprobs"} & self.model_fields_set):
            flag = f"--{min(ours).replace('_', '-')}"
            raise SettingsError(f"{flag} is for texts: add --text FILE")
        if self.text and (given := self.scored_given):
            raise SettingsError(
                f"{given[0]} is for a quiz, and --text judges on texts: leave one of them out"
            )

    def scored_texts(self, profile: "Profile", options: "MeasureOptions") -> "TextScoring | None":
        """The texts that are named, or that the profile holds out; None if a quiz judges."""
        from expertcut.evaluation.sweep_judges import TextScoring, held_out_texts, unused_texts

        dropped: dict[str, int] = {}
        corpus = held_out_texts(profile) if not self.text else None
        if self.text:
            corpus, dropped = unused_texts(profile, self.text_selection())
        if corpus is None:
            return None
        how = (self.top_k_logprobs, self.load_as(), options)
        return TextScoring(corpus, *how, dropped, is_held_out=not self.text)

    def scoring(self, profile: "Profile", options: "MeasureOptions") -> "Scoring | TextScoring":
        """What judges: texts or a quiz as named, else what the profile holds out."""
        from expertcut.evaluation.results import Scoring

        if self.scored_given or (texts := self.scored_texts(profile, options)) is None:
            return Scoring(self.scored_quiz(profile), self.limit, self.load_as(), options)
        return texts


class ProfiledQuizSettings(JudgedSettings, ScoredSettings, ProfiledSettings):
    """The profile and the questions to score."""


class ModelFirstSettings(ProfiledQuizSettings):
    """The profile, or the model and the quiz or the texts to make it from."""

    model: str | None = argument(
        None, "Model to profile first on --quiz or --text: folder or Hub id."
    )
    text: Texts = text_option(
        [], "Texts to profile MODEL on, as `profile --text`; repeatable.",
        in_recipe=False, metavar="SPEC[=W]",
    )  # fmt: skip

    def check_model(self) -> None:
        """Refuses a model with nothing to profile it on or beside a profile, and the reverse."""
        if self.model is None and (given := self.scored_given or ["--text"] * bool(self.text)):
            kind, own = ("--text", "texts") if self.text else ("--quiz", "questions")
            how = f"give MODEL and {kind}, or leave it out: a profile has its own {own}"
            raise SettingsError(f"{given[0]} is for a MODEL that is profiled first: {how}")
        has_source = self.quiz is not None or self.text
        if self.model is not None and (not has_source or self.profile is not None):
            how = ", or add --quiz QUIZ or --text FILE, and no --profile, to profile it first"
            raise no_profile(self.model, how)


class CheckpointSettings(ModelFirstSettings):
    """How an edited checkpoint is scored, and where it is written."""

    verify: bool = option(
        True, "Do not score the checkpoint on held-out questions.",
        panel=JUDGING, flags=("--no-verify",),
    )  # fmt: skip
    out: FilePath | None = output_option(
        None, "Output folder; must be absent or empty.  [default: in checkpoints/ or plans/]"
    )
    force: bool = output_option(False, "Replace the output folder once the new one is complete.")
    plan_only: bool = output_option(False, "Write only the plan.")

    def check_model(self) -> None:
        """Refuses a taken output folder too, before anything is loaded."""
        super().check_model()
        if self.out is not None:
            from expertcut.checkpoints.output_dir import check_writable

            check_writable(self.out, is_forced=self.force)

    def build_options(self, extra_files: Files, adapter: str | None = None) -> "BuildOptions":
        """How to build."""
        from expertcut.checkpoints.build import BuildOptions

        folder = None if adapter is None else Path(adapter)
        return BuildOptions(self.load_as(), self.verify, self.force, extra_files or {}, folder)

    def output_folder(self, profile: "Profile", slug: str, ui: UI) -> Path:
        """The folder of the checkpoint or plan; refused early if it is not empty."""
        from expertcut.checkpoints.build import default_out, found_source, inputs_of
        from expertcut.checkpoints.output_dir import check_writable

        folder = self.out or default_out(profile.info.model.id, slug, is_plan=self.plan_only)
        check_writable(folder, is_forced=self.force, inputs=inputs_of(profile))
        if not self.plan_only:  # the source is checked before anything is said of it
            ui.quiet()
            found_source(profile)
        return folder

    def say_result(
        self, built: "Built | None", folder: Path, profile: "Profile", notes: Sequence[str], ui: UI
    ) -> None:
        """Reports a new checkpoint, or with None a plan: size, accuracy, folder, next commands."""
        from expertcut.checkpoints.build import found_source
        from expertcut.checkpoints.size import stored_size
        from expertcut.models.load import Source
        from expertcut.reporting.edit_tables import outcome_lines

        lines, model, quiz = [], Path(profile.info.model.id), profile.info.quiz
        commands = [["show", str(folder)]]
        if built is not None:
            before, after = map(stored_size, (found_source(profile), Source(str(folder), folder)))
            lines = outcome_lines(built, before, after, self.margin / 100)
            base = model.relative_to(Path.cwd()) if model.is_relative_to(Path.cwd()) else model
            words = ["eval", str(base), str(folder), "--text", "NEW.jsonl"]
            if profile.info.text is None:
                words = eval_words(str(base), folder, quiz.id, quiz.shots, quiz.revision)
            commands.insert(0, words)
        ui.say([], [*lines, *(labelled("", note) for note in notes)])
        ui.end([], folder, *commands)


def eval_words(base: str, folder: Path, quiz: str, shots: int, revision: str | None) -> list[str]:
    """`eval` on the split of a quiz (if any) that had no part in a checkpoint, or on NEW.jsonl."""
    from expertcut.edits.plan import QUESTIONS_FILE

    used = read_file(folder / QUESTIONS_FILE).decode().splitlines()
    where = ["--quiz", "NEW.jsonl"] if quiz else []
    for split in ("test", "val") if quiz else ():
        with suppress(QuizError):
            asked = load_quiz(Selection(quiz, split, 0, revision=revision))
            if len(without(asked, used)) >= 0.95 * len(asked):
                where = ["--quiz", quiz, *(["--split", split] if split != "test" else [])]
                break
    return ["eval", base, str(folder), *where, *(["--shots", str(shots)] if shots != 5 else [])]


def no_profile(model: str, otherwise: str = "") -> SettingsError:
    """The error for a model where experts are chosen from a profile."""
    if Path(model, "profile.json").is_file():
        return SettingsError(f"{model} is a profile: name it with --profile {shlex.quote(model)}")
    return SettingsError(
        "experts are chosen from a profile, not from a model: make one with `expertcut profile "
        f"{shlex.quote(model)} --quiz QUIZ`{otherwise}"
    )
