"""Sources of quizzes (CSV folder, JSON lines, data set), selection and held-out questions."""

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from expertcut.data.questions import (
    Question,
    Quiz,
    Truncate,
    group_by_subject,
    hashes_in,
    replace_questions,
    without,
)
from expertcut.data.readers import json_lines, read_csv, read_records
from expertcut.errors import ExpertcutError, QuizError, SettingsError, SplitError
from expertcut.files import advance, hub_reason, open_file

logger = logging.getLogger(__name__)

DEFAULT_QUIZ = "mmlu"
MMLU_HUB_ID = "cais/mmlu"
MMLU_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"
SHOTS_SPLIT = "dev"
_MAX_LISTED = 6  # files in an error
JUDGING = ("val", "test")  # splits for held-out questions
HELD_OUT_SHARE = 0.2
_ONE_IN = 5


@dataclass(frozen=True)
class Selection:
    """Which questions to use: the options of every command that takes a quiz."""

    quiz: str = DEFAULT_QUIZ
    split: str = "test"
    shots: int = 5
    subjects: tuple[str, ...] = ()  # empty for all
    limit: int | None = None  # per subject
    revision: str | None = None  # of a hub data set; None for main, for `mmlu` the pinned one
    truncate: Truncate | None = None  # for prompts beyond the model's context


def load_quiz(selection: Selection) -> Quiz:
    """Loads the selected questions.

    Raises QuizError: no such quiz or subject, too few shots, or an invalid row; SplitError: no
    questions in the split.
    """
    if selection.shots < 0 or (selection.limit is not None and selection.limit < 1):
        raise QuizError("--shots must be at least 0 and --limit at least 1")
    if not re.fullmatch(r"\w[\w.-]{0,99}", selection.split):  # it becomes part of paths
        raise QuizError(
            f"{selection.split[:80]!a} is not the name of a split: take test, val or another word"
        )
    split = "val" if selection.split == "validation" else selection.split
    source = _find_source(selection.quiz, selection.revision)
    questions = group_by_subject(source.read(split))
    if not questions:
        raise SplitError(source.missing(split))
    if unknown := sorted(set(selection.subjects) - set(questions)):
        raise QuizError(
            f"{selection.quiz} has no subject {', '.join(unknown)} in split {split}: "
            f"it has {', '.join(questions)}"
        )
    wanted = selection.subjects or tuple(questions)
    questions = {s: qs[: selection.limit] for s, qs in questions.items() if s in wanted}
    dev = group_by_subject(source.read(SHOTS_SPLIT)) if selection.shots else {}
    shots = {s: dev.get(s, ())[: selection.shots] for s in questions}
    for subject, examples in shots.items():
        if len(examples) < selection.shots:
            raise QuizError(
                f"{selection.quiz}: {selection.shots} shots asked but split {SHOTS_SPLIT} of "
                f"{subject} has {len(examples)}: use --shots 0 or add questions to it"
            )
    revision, truncate = source.revision, selection.truncate
    return Quiz(source.id, revision, split, selection.shots, questions, shots, truncate)


class _Files:
    """Questions in CSV files or JSON lines: a folder, or one file that stands for every split.

    `<split>/<subject>_<split>.csv`, `<split>/<subject>.csv` or `<split>.csv`; `<split>.jsonl`.
    """

    def __init__(self, path: Path, ending: str) -> None:
        self.path, self.ending, self.id, self.revision = path, ending, str(path), None

    def read(self, split: str) -> list[Question]:
        files = self.files(split)
        if self.ending == ".csv":
            return [q for file, subject in files for q in read_csv(file, subject)]
        return [q for f, subject in files for q in read_records(json_lines(f), str(f), subject)]

    def files(self, split: str) -> list[tuple[Path, str]]:
        """The files of a split, each with its default subject; the first place with any counts."""
        subject = self.path.stem or self.path.resolve().stem
        if self.path.is_file() and split != SHOTS_SPLIT:
            return [(self.path, subject)]
        folder = self.path.parent if self.path.is_file() else self.path
        for place in (folder, folder / "data"):
            for name in ("val", "validation") if split == "val" else (split,):
                if self.ending == ".csv" and (files := self._by_subject(place, name)):
                    return files
                if (whole := place / f"{name}{self.ending}").exists():
                    return [(whole, subject)]
        return []

    def _by_subject(self, folder: Path, split: str) -> list[tuple[Path, str]]:
        ending = f"_{split}.csv"
        files = sorted(f for f in (folder / split).glob("*.csv") if not f.name.startswith("."))
        named = [f for f in files if f.name.endswith(ending)]
        if named and (unread := [f.name for f in files if f not in named]):
            text = "%s: %d files are not read, first %s: name them <subject>%s"
            logger.warning(text, folder / split, len(unread), unread[0], ending)
        return [(f, f.name.removesuffix(ending if named else ".csv")) for f in named or files]

    def missing(self, split: str) -> str:
        """The error for an empty split, with the files that exist."""
        if files := self.files(split):
            empty = ", ".join(str(file) for file, _ in files[:_MAX_LISTED])
            return f"{self.id} has no questions in split {split}: no row in {empty}"
        paths = (f for depth in ("*", "*/*", "*/*/*") for f in self.path.glob(depth))
        names = sorted(
            str(path.relative_to(self.path))
            for path in islice(paths, 1000)
            if path.suffix and not path.is_dir() and not path.name.startswith(".")
        )
        alike = [name for name in names if split.casefold() in name.casefold()]
        places = sorted({Path(name.removeprefix("data/")).parts[0] for name in names})
        listed = ", ".join((alike or places)[:_MAX_LISTED]) or "no file"
        wanted = f"{split}{self.ending}"
        if self.ending == ".csv":
            wanted = f"{split}/<subject>_{split}.csv, {split}/<subject>.csv or {wanted}"
        if alike:
            return f"{self.id}: split {split} must lie in {wanted}: found {listed}"
        return f"{self.id} has no questions in split {split}: it has {listed}, no {wanted}"


class _DataSet:
    """A data set of the hub or of a local folder, read through `datasets`."""

    def __init__(self, id: str, revision: str | None) -> None:
        self.id, self.revision, self.names = id, revision, _config_names(id, revision)
        self.main = "all" if "all" in self.names else self.names[0]

    def read(self, split: str) -> list[Question]:
        # Configurations of cais/mmlu that are not subjects.
        subjects = [name for name in self.names if name not in ("all", "auxiliary_train")]
        if self.main == "all" or subjects in ([], ["default"]):  # each row names its subject
            return self._read_config(self.main, split, None)
        return [q for name in subjects for q in self._read_config(name, split, name)]

    def _read_config(self, config: str, split: str, subject: str | None) -> list[Question]:
        from datasets import get_dataset_split_names, load_dataset

        with _quiz_errors(self.id, self.revision):
            splits = get_dataset_split_names(self.id, config, revision=self.revision)
            name = "validation" if split == "val" and "validation" in splits else split
            if name not in splits:
                return []
            place, default = f"{self.id} {config}/{name}", self.id.rsplit("/", 1)[-1]
            advance(f"reading {place}", 0, 0)  # `datasets` tells nobody its bytes
            rows: Any = load_dataset(self.id, config, split=name, revision=self.revision)
        records = ((f"{place} row {number}", row) for number, row in enumerate(rows))
        return read_records(records, place, subject or default, is_only=subject is not None)

    def missing(self, split: str) -> str:
        from datasets import get_dataset_split_names

        with _quiz_errors(self.id, self.revision):
            splits = get_dataset_split_names(self.id, self.main, revision=self.revision)
        return f"{self.id} has no questions in split {split}: it has {', '.join(splits)}"


def _find_source(quiz: str, revision: str | None) -> _Files | _DataSet:
    path = Path(quiz)
    if path.is_file() and path.suffix in (".csv", ".jsonl"):
        return _Files(path, path.suffix)
    if path.is_dir():
        return _find_in(path)
    if quiz == DEFAULT_QUIZ:
        if Path(MMLU_HUB_ID).is_dir():
            return _DataSet(MMLU_HUB_ID, None)
        try:
            return _DataSet(MMLU_HUB_ID, MMLU_REVISION)
        except QuizError as error:
            # A mirror or cache may hold only another revision; the profile records which.
            source = _DataSet(MMLU_HUB_ID, None)
            logger.warning("%s; using its main revision instead", error)
            return source
    if "/" not in quiz or quiz.startswith((".", "/")) or quiz.count("/") > 1:
        raise QuizError(f"no such quiz: {quiz} is not a folder, a .csv or .jsonl file or a hub id")
    return _DataSet(quiz, revision)


def _find_in(folder: Path) -> _Files | _DataSet:
    """The kind of a folder; the first match counts."""
    for pattern in ("*/*.csv", "*.jsonl", "**/*.parquet", "*.csv", "data/*/*.csv", "data/*.jsonl"):
        files = sorted(folder.glob(pattern))
        if files and not pattern.endswith(".parquet"):
            return _Files(folder, Path(pattern).suffix)
        for file in files:  # `datasets` would wait for a pipe
            try:
                open_file(file).close()
            except OSError as error:
                raise QuizError(f"{file}: cannot be read: {error.strerror}") from None
        if files:
            return _DataSet(str(folder), None)
    raise QuizError(
        f"{folder} holds no quiz: no <split>/<subject>_<split>.csv, no <split>.csv, no "
        "<split>.jsonl, no parquet files"
    )


def _config_names(quiz: str, revision: str | None) -> list[str]:
    with _quiz_errors(quiz, revision):
        advance(f"reading {quiz}", 0, 0)
        from datasets import config, get_dataset_config_names
        from huggingface_hub import DatasetCard, hf_hub_download

        if config.HF_HUB_OFFLINE and not Path(quiz).is_dir():
            # Offline, `datasets` has no configuration names; the cached card has.
            card = hf_hub_download(quiz, "README.md", repo_type="dataset", revision=revision)
            if configs := DatasetCard.load(card).data.get("configs"):
                return [entry["config_name"] for entry in configs]
        return list(get_dataset_config_names(quiz, revision=revision))


@contextmanager
def hub_errors(kind: type[ExpertcutError], named: str, hint: str = "") -> Iterator[None]:
    """Turns any error of `datasets` and the libraries below it into one of a kind, in one line."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, OSError):
            cause = cause.__cause__  # an OSError names the file, others only wrap it
        raise kind(f"{named} cannot be read: {hub_reason(cause)}{hint}") from error


def _quiz_errors(quiz: str, revision: str | None) -> AbstractContextManager[None]:
    pinned, hint = f" at revision {revision[:8]}" if revision else "", ""
    if (quiz, revision) == (MMLU_HUB_ID, None):  # the default, which nobody may have named
        hint = ": name a quiz of your own with --quiz FILE.jsonl"
    return hub_errors(QuizError, f"no such quiz: {quiz}{pinned}", hint)


@dataclass(frozen=True)
class Weighted:
    """A quiz or text file with its weight in the training mix; `revision` is of a hub data set."""

    name: str
    weight: float = 1.0
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> "Weighted":
        """From `name` or `name=0.7`."""
        name, equals, number = text.rpartition("=")
        try:
            weight = float(number if equals else "")
        except ValueError:  # a path may hold an equals sign of its own
            return cls(text)
        if not 0 < weight < float("inf"):
            raise SettingsError(f"{text}: a weight must be above 0")
        return cls(name, weight)


def hash_lines(quiz: Quiz) -> frozenset[str]:
    """Both hashes of every question, as lines of `chosen_on.txt`."""
    return frozenset(question.hash_line for question in quiz)


def warn_of_repeats(quiz: Quiz) -> None:
    """Logs how many questions repeat another or one of their choices, if above a fifth."""
    n_repeats = len(quiz) - len({(q.text.strip(), q.choices) for q in quiz})
    n_same = sum(len(set(q.choices)) < len(q.choices) for q in quiz)
    if n_repeats + n_same > 0.2 * len(quiz):  # of a subject of MMLU, 11 % may
        text = "of %d questions of %s, %d repeat another and %d have a choice twice: all count"
        logger.warning(text, len(quiz), quiz.id, n_repeats, n_same)


def is_one_set(quiz: Quiz) -> bool:
    """Whether no other split has questions to evaluate on; logs nothing."""
    splits = (s for s in JUDGING if s != quiz.split)
    return not any(other_split(quiz, split, quiz, is_quiet=True) for split in splits)


def is_held_out(question: Question) -> bool:
    """Whether a question is in the held-out fifth of a quiz without another split.

    Trivial changes of a question do not matter. Profiles keep separate sums by it.
    """
    return int(question.overlap_hash, 16) % _ONE_IN == 0


def fifth_of(quiz: Quiz) -> Quiz:
    """A fifth by content hash; of trivially different questions the least hash counts for all."""
    least: dict[str, str] = {}
    for q in quiz:
        least[q.overlap_hash] = min(least.get(q.overlap_hash, q.content_hash), q.content_hash)
    fifth = [q for q in quiz if int(least[q.overlap_hash], 16) % _ONE_IN == 0]
    return replace_questions(quiz, fifth)


def other_split(quiz: Quiz, split: str, *used: Quiz, is_quiet: bool = False) -> Quiz | None:
    """The same subjects' questions of another split without those in `used`; None if none is left.

    Raises QuizError: more than 5 % of them stand in a used one.
    """
    if Path(quiz.id).is_file():
        return None  # one file stands for every split
    which = Selection(quiz.id, split, quiz.shots, revision=quiz.revision, truncate=quiz.truncate)
    try:
        other = load_quiz(which)
    except QuizError as error:
        if not is_quiet:
            logger.warning("split %s is not used to judge: %s", split, error)
        return None
    same = [q for q in other if q.subject in quiz.questions]
    other, lines = replace_questions(other, same), frozenset[str]().union(*map(hash_lines, used))
    known = hashes_in(lines)
    repeated = [q for q in other if q.is_among(known)]
    if len(repeated) == len(other):
        return None
    if repeated and not is_quiet:
        logger.warning(
            "%d of %d %s questions stand in %s too and are left out, first %s:%d",
            *(len(repeated), len(other), split, " and ".join(sorted({q.split for q in used}))),
            *(repeated[0].subject, repeated[0].row),
        )
    if len(repeated) > 0.05 * len(other):
        raise QuizError(
            f"{len(repeated)} of {len(other)} {split} questions of {other.id} stand in "
            f"{used[0].split} too, at most 5 % may: they cannot judge anything"
        )
    return without(other, lines)
