"""Sources of quizzes (CSV folder, JSON lines, data set), selection and held-out questions."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
from expertcut.data.readers import (
    read_csv,
    read_jsonl,
    record_question,
    subject_of,
    warn_if_counted_from_one,
)
from expertcut.errors import QuizError, SettingsError, SplitError
from expertcut.files import open_file

logger = logging.getLogger(__name__)

DEFAULT_QUIZ = "mmlu"
MMLU_HUB_ID = "cais/mmlu"
MMLU_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"
SHOTS_SPLIT = "dev"
_SPLIT = re.compile(r"\w[\w.-]{0,99}")
_NOT_SUBJECTS = {"all", "auxiliary_train"}  # configurations of cais/mmlu that are not subjects
_ALIASES = {"val": ("val", "validation")}  # of splits in folder and file names
_DATA_FOLDER = "data"  # alternative place of a quiz's files
_MAX_LISTED = 6  # files in an error
_MAX_LOOKED_AT = 1000  # files of a folder
JUDGING = ("val", "test")  # splits for held-out questions
HELD_OUT_SHARE = 0.2
_ONE_IN = 5
_MOST_OVERLAP = 0.05


@dataclass(frozen=True)
class Selection:
    """Which questions to use: the options of every command that takes a quiz.

    Empty `subjects` mean all; `limit` is per subject; `revision` is of a hub data set, None for its
    main one (for `mmlu`, the pinned one). `truncate` is for prompts beyond the model's context.
    """

    quiz: str = DEFAULT_QUIZ
    split: str = "test"
    shots: int = 5
    subjects: tuple[str, ...] = ()
    limit: int | None = None
    revision: str | None = None
    truncate: Truncate | None = None


def load_quiz(selection: Selection) -> Quiz:
    """Loads the selected questions.

    Raises:
        QuizError: no such quiz or subject, too few shots, or an invalid row.
        SplitError: no questions in the split.
    """
    if selection.shots < 0 or (selection.limit is not None and selection.limit < 1):
        raise QuizError("--shots must be at least 0 and --limit at least 1")
    split = _canonical_split(selection.split)
    source = _find_source(selection.quiz, selection.revision)
    of_split = group_by_subject(source.read(split))
    if not of_split:
        raise SplitError(source.missing(split))
    questions = _select(of_split, selection, split)
    shots: dict[str, tuple[Question, ...]] = dict.fromkeys(questions, ())
    if selection.shots:
        dev = group_by_subject(source.read(SHOTS_SPLIT))
        shots = {s: dev.get(s, ())[: selection.shots] for s in questions}
        _refuse_too_few_shots(shots, selection)
    return Quiz(
        id=source.id,
        revision=source.revision,
        split=split,
        shots=selection.shots,
        questions=questions,
        shots_by_subject=shots,
        truncate=selection.truncate,
    )


def _select(
    questions: dict[str, tuple[Question, ...]], selection: Selection, split: str
) -> dict[str, tuple[Question, ...]]:
    unknown = sorted(set(selection.subjects) - set(questions))
    if unknown:
        raise QuizError(
            f"{selection.quiz} has no subject {', '.join(unknown)} in split {split}: "
            f"it has {', '.join(questions)}"
        )
    wanted = selection.subjects or tuple(questions)
    return {s: qs[: selection.limit] for s, qs in questions.items() if s in wanted}


def _refuse_too_few_shots(shots: dict[str, tuple[Question, ...]], selection: Selection) -> None:
    short = [f"{s} has {len(qs)}" for s, qs in shots.items() if len(qs) < selection.shots]
    if short:
        raise QuizError(
            f"{selection.quiz}: {selection.shots} shots asked but split {SHOTS_SPLIT} of "
            f"{short[0]}: use --shots 0 or add questions to it"
        )


def _canonical_split(split: str) -> str:
    if not _SPLIT.fullmatch(split):  # it becomes part of paths
        raise QuizError(f"{split[:80]!a} is no name of a split: take test, val or another word")
    return "val" if split == "validation" else split


@dataclass(frozen=True)
class _Files:
    """Questions in files: a folder, or one file that stands for every split."""

    path: Path
    revision: str | None = None

    @property
    def id(self) -> str:
        return str(self.path)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where to look for a split; the first match counts."""
        folder = self.path.parent if self.path.is_file() else self.path
        return (folder, folder / _DATA_FOLDER)

    @property
    def subject(self) -> str:
        """The default subject: the file name."""
        return self.path.stem or self.path.resolve().stem

    def files(self, split: str) -> list[tuple[Path, str]]:
        """The files of a split, each with its default subject."""
        if self.path.is_file() and split != SHOTS_SPLIT:
            return [(self.path, self.subject)]
        found = (self.files_in(f, n) for f in self.folders for n in _ALIASES.get(split, (split,)))
        return next(filter(None, found), [])

    def files_in(self, folder: Path, split: str) -> list[tuple[Path, str]]:
        raise NotImplementedError

    def looked_for(self, split: str) -> str:
        raise NotImplementedError

    def missing(self, split: str) -> str:
        """The error for an empty split, with the files that exist."""
        if files := self.files(split):
            empty = ", ".join(str(file) for file, _ in files[:_MAX_LISTED])
            return f"{self.id} has no questions in split {split}: no row in {empty}"
        found = (f for depth in ("*", "*/*", "*/*/*") for f in self.path.glob(depth))
        there = sorted(
            str(file.relative_to(self.path))
            for file in islice(found, _MAX_LOOKED_AT)
            if file.suffix and not file.is_dir() and not file.name.startswith(".")
        )
        alike = [name for name in there if split.casefold() in name.casefold()]
        listed = ", ".join((alike or there)[:_MAX_LISTED]) or "no file"
        wanted = self.looked_for(split)
        if alike:
            return f"{self.id}: split {split} must lie in {wanted}: found {listed}"
        return f"{self.id} has no questions in split {split}: no {wanted}, but {listed}"


@dataclass(frozen=True)
class _CsvFiles(_Files):
    """`<split>/<subject>_<split>.csv`, `<split>/<subject>.csv` or `<split>.csv`."""

    def read(self, split: str) -> list[Question]:
        return [q for file, subject in self.files(split) for q in read_csv(file, subject)]

    def files_in(self, folder: Path, split: str) -> list[tuple[Path, str]]:
        ending = f"_{split}.csv"
        files = sorted(f for f in (folder / split).glob("*.csv") if not f.name.startswith("."))
        named = [f for f in files if f.name.endswith(ending)]
        if named and len(named) < len(files):
            logger.warning(
                "%s: %d files are not read, first %s: name them <subject>%s",
                *(folder / split, len(files) - len(named)),
                *(next(f.name for f in files if f not in named), ending),
            )
        if named:
            return [(f, f.name.removesuffix(ending)) for f in named]
        if files:
            return [(f, f.stem) for f in files]
        whole = folder / f"{split}.csv"
        return [(whole, self.subject)] if whole.exists() else []

    def looked_for(self, split: str) -> str:
        return f"{split}/<subject>_{split}.csv, {split}/<subject>.csv or {split}.csv"


@dataclass(frozen=True)
class _JsonLines(_Files):
    """A folder of `<split>.jsonl`, or one file."""

    def read(self, split: str) -> list[Question]:
        return [q for file, subject in self.files(split) for q in read_jsonl(file, subject)]

    def files_in(self, folder: Path, split: str) -> list[tuple[Path, str]]:
        file = folder / f"{split}.jsonl"
        return [(file, self.subject)] if file.exists() else []

    def looked_for(self, split: str) -> str:
        return f"{split}.jsonl"


@dataclass(frozen=True)
class _DataSet:
    """A data set of the hub or of a local folder, read through `datasets`."""

    id: str
    revision: str | None

    def read(self, split: str) -> list[Question]:
        with _one_line(self.id, self.revision):
            names = _config_names(self.id, self.revision)
        subjects = [name for name in names if name not in _NOT_SUBJECTS]
        if "all" in names or subjects in ([], ["default"]):  # each row names its subject
            return self._read_config("all" if "all" in names else names[0], split, None)
        return [q for name in subjects for q in self._read_config(name, split, name)]

    def _read_config(self, config: str, split: str, subject: str | None) -> list[Question]:
        from datasets import get_dataset_split_names, load_dataset

        with _one_line(self.id, self.revision):
            splits = get_dataset_split_names(self.id, config, revision=self.revision)
            name = "validation" if split == "val" and "validation" in splits else split
            if name not in splits:
                return []
            rows: Any = load_dataset(self.id, config, split=name, revision=self.revision)
        counts: dict[str, int] = {}
        questions, answers = [], []
        for number, row in enumerate(rows):
            where = f"{self.id} {config}/{name} row {number}"
            of = subject or subject_of(row, self.id.rsplit("/", 1)[-1], where)
            questions.append(record_question(row, of, counts.setdefault(of, 0), where))
            answers.append(row["answer"])
            counts[of] += 1
        warn_if_counted_from_one(f"{self.id} {config}/{name}", answers)
        return questions

    def missing(self, split: str) -> str:
        """The error for an empty split, with the splits that exist."""
        from datasets import get_dataset_split_names

        with _one_line(self.id, self.revision):
            names = _config_names(self.id, self.revision)
            config = "all" if "all" in names else names[0]
            splits = get_dataset_split_names(self.id, config, revision=self.revision)
        return f"{self.id} has no questions in split {split}: it has {', '.join(splits)}"


def _find_source(quiz: str, revision: str | None) -> _CsvFiles | _JsonLines | _DataSet:
    path = Path(quiz)
    if path.is_file() and path.suffix in (".csv", ".jsonl"):
        return _CsvFiles(path) if path.suffix == ".csv" else _JsonLines(path)
    if path.is_dir():
        return _find_in(path)
    if quiz == DEFAULT_QUIZ:
        return _open_mmlu()
    if "/" not in quiz or quiz.startswith((".", "/")) or quiz.count("/") > 1:
        raise QuizError(f"no such quiz: {quiz} is no folder, no .csv or .jsonl file and no hub id")
    return _open_data_set(quiz, revision)


def _find_in(folder: Path) -> _CsvFiles | _JsonLines | _DataSet:
    """The kind of a folder; the first match counts."""
    if any(folder.glob("*/*.csv")):
        return _CsvFiles(folder)
    if any(folder.glob("*.jsonl")):
        return _JsonLines(folder)
    if _parquet_files(folder):
        return _open_data_set(str(folder), None)
    if any(folder.glob("*.csv")) or any(folder.glob(f"{_DATA_FOLDER}/*/*.csv")):
        return _CsvFiles(folder)
    if any(folder.glob(f"{_DATA_FOLDER}/*.jsonl")):
        return _JsonLines(folder)
    raise QuizError(
        f"{folder} holds no quiz: no <split>/<subject>_<split>.csv, no <split>.csv, no "
        "<split>.jsonl, no parquet files"
    )


def _parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a data set.

    Raises:
        QuizError: one is not a regular file; `datasets` would wait for a pipe.
    """
    files = sorted(folder.rglob("*.parquet"))
    for file in files:
        try:
            open_file(file).close()
        except OSError as error:
            raise QuizError(f"{file}: cannot be read: {error.strerror}") from None
    return files


def _open_mmlu() -> _DataSet:
    if Path(MMLU_HUB_ID).is_dir():
        return _open_data_set(MMLU_HUB_ID, None)
    try:
        return _open_data_set(MMLU_HUB_ID, MMLU_REVISION)
    except QuizError as error:
        # A mirror or cache may hold only another revision; the profile records which.
        source = _open_data_set(MMLU_HUB_ID, None)
        logger.warning("%s; using its main revision instead", error)
        return source


def _open_data_set(quiz: str, revision: str | None) -> _DataSet:
    with _one_line(quiz, revision):
        _config_names(quiz, revision)
    return _DataSet(quiz, revision)


def _config_names(quiz: str, revision: str | None) -> list[str]:
    from datasets import config, get_dataset_config_names
    from huggingface_hub import DatasetCard, hf_hub_download

    if config.HF_HUB_OFFLINE and not Path(quiz).is_dir():
        # Offline, `datasets` has no configuration names; the cached card has.
        card = hf_hub_download(quiz, "README.md", repo_type="dataset", revision=revision)
        configs = DatasetCard.load(card).data.get("configs") or []
        if configs:
            return [entry["config_name"] for entry in configs]
    return list(get_dataset_config_names(quiz, revision=revision))


@contextmanager
def _one_line(quiz: str, revision: str | None) -> Iterator[None]:
    """Turns any error of `datasets` and the libraries below it into a QuizError."""
    try:
        yield
    except Exception as error:
        pinned = f" at revision {revision[:8]}" if revision else ""
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, OSError):
            cause = cause.__cause__  # an OSError names the file, others only wrap it
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise QuizError(f"no such quiz: {quiz}{pinned} cannot be read: {reason}") from error


@dataclass(frozen=True)
class Weighted:
    """A quiz or text file with its weight in the training mix; `revision` is of a hub data set."""

    name: str
    weight: float = 1.0
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> "Weighted":
        """From `name` or `name=0.7`.

        Raises:
            SettingsError: a weight that is not above 0.
        """
        name, equals, weight = text.rpartition("=")
        if not equals or not _is_number(weight):  # a path may hold one of its own
            return cls(text)
        if not 0 < float(weight) < float("inf"):
            raise SettingsError(f"{text}: a weight must be above 0")
        return cls(name, float(weight))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def hash_lines(quiz: Quiz) -> frozenset[str]:
    """Both hashes of every question, as lines of `chosen_on.txt`."""
    return frozenset(question.hash_line for question in quiz)


def is_one_set(quiz: Quiz) -> bool:
    """Whether no other split has questions to evaluate on; logs nothing."""
    others = (s for s in JUDGING if s != quiz.split)
    return all(other_split(quiz, split, quiz, is_quiet=True) is None for split in others)


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
    return replace_questions(quiz, group_by_subject(fifth))


def other_split(quiz: Quiz, split: str, *used: Quiz, is_quiet: bool = False) -> Quiz | None:
    """The same subjects' questions of another split without those in `used`; None if none is left.

    Raises:
        QuizError: more than 5 % of them stand in a used one.
    """
    if Path(quiz.id).is_file():
        return None  # one file stands for every split
    selection = Selection(
        *(quiz.id, split, quiz.shots), revision=quiz.revision, truncate=quiz.truncate
    )
    try:
        other = load_quiz(selection)
    except QuizError as error:
        if not is_quiet:
            logger.warning("split %s is not used to judge: %s", split, error)
        return None
    same = {s: qs for s, qs in other.questions.items() if s in quiz.questions}
    other = replace_questions(other, same)
    lines = frozenset[str]().union(*map(hash_lines, used))
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
    if len(repeated) > _MOST_OVERLAP * len(other):
        raise QuizError(
            f"{len(repeated)} of {len(other)} {split} questions of {other.id} stand in "
            f"{used[0].split} too, at most 5 % may: they cannot judge anything"
        )
    return without(other, lines)
