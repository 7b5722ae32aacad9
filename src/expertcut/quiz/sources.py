"""Where quizzes come from: a Hendrycks CSV folder, JSON lines, or a data set of the hub."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertcut.documents.reading import open_file
from expertcut.errors import QuizError, SplitError
from expertcut.quiz.questions import Question, Quiz, Truncate, group_by_subject
from expertcut.quiz.readers import read_csv, read_jsonl, record_question, subject_of

logger = logging.getLogger(__name__)

DEFAULT_QUIZ = "mmlu"
MMLU_HUB_ID = "cais/mmlu"
MMLU_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"
SHOTS_SPLIT = "dev"
_SPLIT = re.compile(r"\w[\w.-]{0,99}")
_NOT_SUBJECTS = {"all", "auxiliary_train"}  # configurations of cais/mmlu that are no subject


@dataclass(frozen=True)
class Selection:
    """Which questions to ask: the options shared by every command that takes a quiz.

    `subjects` empty means all; `limit` keeps the first so many questions of each subject;
    `revision` is of a hub data set, None for its main one (for `mmlu`, the pinned one). `truncate`
    says what becomes of prompts that are longer than the context of whoever is asked.
    """

    quiz: str = DEFAULT_QUIZ
    split: str = "test"
    shots: int = 5
    subjects: tuple[str, ...] = ()
    limit: int | None = None
    revision: str | None = None
    truncate: Truncate | None = None


def load_quiz(selection: Selection) -> Quiz:
    """The questions a selection names.

    Raises:
        QuizError: no such quiz or subject; too few shots; a row that cannot be asked.
        SplitError: it has no questions in the split.
    """
    if selection.shots < 0 or (selection.limit is not None and selection.limit < 1):
        raise QuizError("--shots must be at least 0 and --limit at least 1")
    split = _canonical_split(selection.split)
    source = _find_source(selection.quiz, selection.revision)
    questions = _select(group_by_subject(source.read(split)), selection, split)
    shots: dict[str, tuple[Question, ...]] = dict.fromkeys(questions, ())
    if selection.shots:
        dev = group_by_subject(source.read(SHOTS_SPLIT))
        shots = {s: dev.get(s, ())[: selection.shots] for s in questions}
        _refuse_too_few_shots(shots, selection)
    kind = (source.id, source.revision, split, selection.shots)
    return Quiz(*kind, questions, shots, selection.truncate)


def _select(
    questions: dict[str, tuple[Question, ...]], selection: Selection, split: str
) -> dict[str, tuple[Question, ...]]:
    if not questions:
        raise SplitError(f"{selection.quiz} has no questions in split {split}")
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
class _CsvFolder:
    path: Path
    revision: str | None = None

    @property
    def id(self) -> str:
        return str(self.path)

    def read(self, split: str) -> list[Question]:
        ending = f"_{split}.csv"
        files = sorted((self.path / split).glob(f"*{ending}"))
        return [q for file in files for q in read_csv(file, file.name.removesuffix(ending))]


@dataclass(frozen=True)
class _JsonLines:
    """A folder of `<split>.jsonl`, or one file that is whichever split is asked for."""

    path: Path
    revision: str | None = None

    @property
    def id(self) -> str:
        return str(self.path)

    def read(self, split: str) -> list[Question]:
        is_file = self.path.is_file()
        folder = self.path.parent if is_file else self.path
        file = self.path if is_file and split != SHOTS_SPLIT else folder / f"{split}.jsonl"
        return read_jsonl(file, self.path.stem) if file.is_file() else []


@dataclass(frozen=True)
class _DataSet:
    """A data set of the hub, or a local folder in its form, read through `datasets`."""

    id: str
    revision: str | None

    def read(self, split: str) -> list[Question]:
        with _one_line(self.id, self.revision):
            names = _config_names(self.id, self.revision)
        subjects = [name for name in names if name not in _NOT_SUBJECTS]
        if "all" in names or subjects in ([], ["default"]):  # the rows say what they are about
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
        questions = []
        for number, row in enumerate(rows):
            where = f"{self.id} {config}/{name} row {number}"
            its = subject or subject_of(row, self.id.rsplit("/", 1)[-1], where)
            questions.append(record_question(row, its, counts.setdefault(its, 0), where))
            counts[its] += 1
        return questions


def _find_source(quiz: str, revision: str | None) -> _CsvFolder | _JsonLines | _DataSet:
    path = Path(quiz)
    if path.is_file() and path.suffix == ".jsonl":
        return _JsonLines(path)
    if path.is_dir():
        if any(path.glob("*/*.csv")):
            return _CsvFolder(path)
        if any(path.glob("*.jsonl")):
            return _JsonLines(path)
        if not _parquet_files(path):
            raise QuizError(
                f"{quiz} holds no quiz: no <split>/<subject>_<split>.csv, no <split>.jsonl, "
                "no parquet files"
            )
        return _open_data_set(str(path), None)
    if quiz == DEFAULT_QUIZ:
        return _open_mmlu()
    if "/" not in quiz or quiz.startswith((".", "/")) or quiz.count("/") > 1:
        raise QuizError(f"no such quiz: {quiz} is no folder, no .jsonl file and no hub id")
    return _open_data_set(quiz, revision)


def _parquet_files(folder: Path) -> list[Path]:
    """Those of a data set; `datasets` itself would wait for a pipe.

    Raises:
        QuizError: one that is no ordinary file.
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
        # A mirror or a cache may hold another revision only; the profile records what was read.
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
        # Offline, datasets reads its cache but has no names for it: the cached card has.
        card = hf_hub_download(quiz, "README.md", repo_type="dataset", revision=revision)
        configs = DatasetCard.load(card).data.get("configs") or []
        if configs:
            return [entry["config_name"] for entry in configs]
    return list(get_dataset_config_names(quiz, revision=revision))


@contextmanager
def _one_line(quiz: str, revision: str | None) -> Iterator[None]:
    """Any fault of `datasets`, and of the YAML, Parquet and HTTP below it, as a QuizError."""
    try:
        yield
    except Exception as error:
        pinned = f" at revision {revision[:8]}" if revision else ""
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, OSError):
            cause = cause.__cause__  # an OSError names the place, others only wrap what happened
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise QuizError(f"no such quiz: {quiz}{pinned} cannot be read: {reason}") from error
