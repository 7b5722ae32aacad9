"""`predictions.parquet` of one or several results: the same questions, answered by many models."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.data.questions import LETTERS, Question, hashes_in
from expertcut.edits.plan import load_hashes, plan_in
from expertcut.edits.splits import profiled_quiz
from expertcut.errors import OutputError, ProfileError, QuizError, SettingsError
from expertcut.evaluation.dispatching import Answered, folds_of, predict_labels
from expertcut.evaluation.results import (
    QuizModelResult,
    QuizResults,
    load_results,
    predictions_file,
)
from expertcut.files import read_file
from expertcut.profiling.storage import Profile
from expertcut.stats import Array

_MAX_BYTES = 1 << 30
QuestionKey = tuple[str, str, int, int]
"""Subject, content hash, right answer, and how many such questions come before it."""


@dataclass(frozen=True)
class Predictions:
    """Models and questions that at least one of them answered, but for those that made a model."""

    models: Sequence[QuizModelResult]
    questions: Sequence[Question]
    answered: Answered
    dropped: Sequence[Question]
    folders: Sequence[Path | None]  # of the models, None where one is not here


@dataclass(frozen=True)
class _File:
    """One results file with its quiz and the log p of each of its models (N, C)."""

    file: Path
    results: QuizResults
    quiz: Quiz
    logprobs: Sequence[Array]


def load_predictions(files: Sequence[Path], quiz: str | None = None) -> Predictions:
    """The answers beside results, by the content of the questions; `quiz` is where that lies now.

    Questions that a model was chosen or healed on are dropped for all.
    """
    read: list[_File] = []
    for file in files:
        read.append(_read(file, quiz))
        _check_same_prompts(read[0], read[-1])
    models: dict[str, QuizModelResult] = {}
    keys = [question_keys(one.quiz) for one in read]
    asked = chain.from_iterable(one.quiz for one in read)
    questions = dict(zip(chain.from_iterable(keys), asked, strict=True))
    place = {key: n for n, key in enumerate(questions)}
    most = max(logprob_NC.shape[1] for one in read for logprob_NC in one.logprobs)
    found: dict[str, Array] = {}
    where: dict[str, Path | None] = {}
    used_N = np.zeros(len(questions), dtype=bool)
    for one, own_keys in zip(read, keys, strict=True):
        at_N = np.array([place[key] for key in own_keys])
        for model, logprob_NC in zip(one.results.models, one.logprobs, strict=True):
            if models.setdefault(model.path, model).fingerprint != model.fingerprint:
                raise OutputError(
                    f"{model.path} has other weights in {one.file} than in the results before it: "
                    "evaluate it again"
                )
            where.setdefault(model.path, model_folder(model, one.file))
            own_NC = found.setdefault(model.path, np.full((len(questions), most), np.nan))
            is_new_N = np.isnan(own_NC[at_N]).any(axis=1)
            padding = [(0, 0), (0, most - logprob_NC.shape[1])]
            padded_NC = np.pad(logprob_NC, padding, constant_values=-np.inf)
            own_NC[at_N[is_new_N]] = padded_NC[is_new_N]
            used_N[at_N] |= _used(model, one, where[model.path])
    dropped, left = list[Question](), list[Question]()
    for question, is_used in zip(questions.values(), used_N, strict=True):
        (dropped if is_used else left).append(question)
    answered = Answered(
        logprob_MNC=np.stack([found[path][~used_N] for path in models]),
        answer_N=np.array([q.answer for q in left]),
        subject_N=np.array([q.subject for q in left]),
        group_N=np.array([q.overlap_hash for q in left]),
        size_M=np.array([model.bytes for model in models.values()]),
    )
    for path, is_answered_N in zip(models, answered.is_answered_MN, strict=True):
        if not is_answered_N.any():
            raise OutputError(
                f"no question is left that {path} answered: all were used to choose or heal one "
                "of the models: evaluate on another split"
            )
    folders = [where[path] for path in models]
    return Predictions([*models.values()], left, answered, dropped, folders)


def question_keys(quiz: Quiz) -> list[QuestionKey]:
    """What each question is found by in other results: never its row."""
    seen = Counter[tuple[str, str, int]]()
    keys = []
    for question in quiz:
        content = (question.subject, question.content_hash, question.answer)
        keys.append((*content, seen[content]))
        seen[content] += 1
    return keys


def _read(file: Path, moved_to: str | None) -> _File:
    results = load_results(file)
    if not isinstance(results, QuizResults):
        raise OutputError(f"{file} has no answers to a quiz: name results of `eval` with --quiz")
    which = (moved_to or results.quiz, results.split, results.shots, tuple(results.content_hashes))
    try:
        quiz = load_quiz(Selection(*which, results.limit, None if moved_to else results.revision))
    except QuizError as error:
        raise QuizError(f"the quiz of {file}, which tells repeats: {error}") from None
    hashes = {subject: quiz.content_hash(subject) for subject in quiz.questions}
    if hashes != results.content_hashes:
        changed = next(s for s in hashes if hashes[s] != results.content_hashes.get(s))
        raise OutputError(
            f"{quiz.id} is no longer the quiz of {file}: the questions or shots of {changed} "
            "changed: evaluate again, or name the quiz that was asked with --quiz"
        )
    return _File(file, results, quiz, _read_parquet(file, results, quiz))


def _read_parquet(file: Path, results: QuizResults, quiz: Quiz) -> list[Array]:
    """Log p (N, C) of each model, −∞ where a question has fewer choices."""
    import pyarrow as pa
    from pyarrow import parquet

    place, n = predictions_file(file), len(quiz)
    try:
        table = parquet.read_table(pa.BufferReader(read_file(place, _MAX_BYTES)))
    except OSError as error:  # pyarrow's too, which has no strerror
        why = error.strerror or str(error).splitlines()[0][:200]
        raise OutputError(f"{place} cannot be read: {why}: run `expertcut eval` again") from None
    except pa.ArrowException as error:
        why = str(error).splitlines()[0][:200]
        raise OutputError(f"{place} is not a file of predictions: {why}") from None
    names = [name for letter in LETTERS if (name := f"logprob_{letter}") in table.column_names]
    expected = {
        "model": [model.path for model in results.models for _ in range(n)],
        "subject": [q.subject for q in quiz] * len(results.models),
        "row": [q.row for q in quiz] * len(results.models),
        "answer": [LETTERS[q.answer] for q in quiz] * len(results.models),
    }
    is_same = {*expected} <= {*table.column_names} and all(
        table.column(name).to_pylist() == column for name, column in expected.items()
    )
    choices_N1 = np.array([[len(q.choices)] for q in quiz] * len(results.models))
    if is_same and len(names) == choices_N1.max():
        logprob_NC = np.column_stack([table.column(name).to_numpy() for name in names])
        if (np.isfinite(logprob_NC) == (np.arange(len(names)) < choices_N1)).all():
            logprob_NC = np.nan_to_num(logprob_NC.astype(np.float64), nan=-np.inf)
            logprob_NC -= np.logaddexp.reduce(logprob_NC, axis=1, keepdims=True)
            answer_N = np.array([q.answer for q in quiz])
            parts = np.split(logprob_NC, len(results.models))
            shares = [float((part.argmax(axis=1) == answer_N).mean()) for part in parts]
            if np.allclose(shares, [m.accuracy for m in results.models], rtol=0, atol=1e-9):
                return parts
    raise OutputError(f"{place} does not hold the answers of {file}: run `expertcut eval` again")


def _check_same_prompts(first: _File, other: _File) -> None:
    """Refuses results of another quiz, or the same questions behind other shots."""
    for subject, shots in other.quiz.shots_by_subject.items():
        if shots != first.quiz.shots_by_subject.get(subject, shots):
            ours, theirs = (
                f"{one.quiz.shots} shots ({one.results.content_hashes[subject][:8]})"
                for one in (first, other)
            )
            raise OutputError(
                f"{other.file} asked {subject} with {theirs}, {first.file} with {ours}: evaluate "
                "all models with the same shots"
            )
    if not {*question_keys(first.quiz)} & {*question_keys(other.quiz)}:
        of_first, of_other = (
            f"{one.results.quiz}, split {one.results.split}" for one in (first, other)
        )
        raise OutputError(
            f"{other.file} has no question in common with {first.file} ({of_other}; {of_first}): "
            "evaluate all models on the same questions"
        )


def _used(model: QuizModelResult, one: _File, folder: Path | None) -> Array:
    """Which questions of a file (N,) the plan of a checkpoint was chosen or healed on."""
    is_used_N = np.zeros(len(one.quiz), dtype=bool)
    if model.chosen_on is None or not model.chosen_on.overlap:
        return is_used_N
    if folder is not None and (plan := plan_in(folder)) is not None:
        known = hashes_in(load_hashes(folder, plan))
        is_used_N = np.array([question.is_among(known) for question in one.quiz])
    if is_used_N.sum() != model.chosen_on.overlap:
        raise OutputError(
            f"{model.path} was chosen on {model.chosen_on.overlap:,} of these questions, and its "
            "chosen_on.txt is not there to tell which: put the checkpoint back, or evaluate on "
            "another split"
        )
    return is_used_N


def model_folder(model: QuizModelResult, near: Path) -> Path | None:
    """The folder that was evaluated, if it is here; `near` is the results file."""
    if model.revision is not None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        return Path(cached).parent if isinstance(cached, str) else None
    folders = (above / model.path for above in (Path(), *near.resolve().parents))
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def read_categories(by: str, predictions: Predictions) -> Mapping[str, Array]:
    """Masks of the questions of each subject, or of each skill of a CSV (`by`)."""
    subject_N = predictions.answered.subject_N
    if by in ("subject", "routing"):
        return {str(name): subject_N == name for name in np.unique(subject_N)}
    numbers_N, skills = np.arange(len(subject_N)), read_skills(Path(by), predictions)
    return {skill: np.isin(numbers_N, [*own]) for skill, own in skills.items()}


def predict_subjects(
    predictions: Predictions, profile: Profile, layers: Sequence[int], seed: int
) -> Array:
    """The subject of each question (N,), by its place in name order, predicted from its routing.

    A logistic regression on the router probabilities at the answer position of some layers (all
    without), fitted without the question's fold.
    """
    keys = [(q.subject, q.content_hash, q.answer) for q in predictions.questions]
    profiled = question_keys(profiled_quiz(profile))
    place = {key[:3]: n for n, key in reversed([*enumerate(profiled)])}
    if unknown := [key for key in keys if key not in place]:
        raise ProfileError(
            f"{profile.path} did not ask {len(unknown):,} of the {len(keys):,} questions, first of "
            f"subject {unknown[0][0]}: profile the split that was evaluated"
        )
    n_layers = len(profile.info.model.blocks)
    if max(layers, default=0) >= n_layers:
        raise SettingsError(
            f"--layers {max(layers)}: {profile.path} has MoE layers 0 to {n_layers - 1}"
        )
    at_N, of_layers = [place[key] for key in keys], list(layers or range(n_layers))
    alpha_NLE = profile.array("alpha_NLE")[at_N][:, of_layers]
    _, label_N = np.unique(predictions.answered.subject_N, return_inverse=True)
    feature_NX = alpha_NLE.reshape(len(keys), -1).astype(np.float64)
    return predict_labels(feature_NX, label_N, folds_of(predictions.answered, seed))


def read_skills(file: Path, predictions: Predictions) -> Mapping[str, frozenset[int]]:
    """The questions (indices) of each skill in a CSV with the columns `question` and `skill`.

    A question is named by its text or by its content hash; several rows may name it.
    """
    by_name: dict[str, set[int]] = {}
    for n, question in enumerate((*predictions.questions, *predictions.dropped)):
        for name in (question.text.strip(), question.content_hash):
            by_name.setdefault(name, set()).update({n} if n < len(predictions.questions) else ())
    try:
        text = read_file(file).decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except OSError as error:
        raise QuizError(f"{file} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise QuizError(f"{file} is not a CSV file in UTF-8: {error}") from None
    head = rows[0] if rows else []
    if not {"question", "skill"} <= {*head}:
        raise QuizError(f"{file} must begin with a line that names the columns question and skill")
    of_question, of_skill = head.index("question"), head.index("skill")
    skills: dict[str, set[int]] = {}
    unknown: list[str] = []
    for cells in filter(None, rows[1:]):
        if len(cells) != len(head) or not cells[of_skill].strip():
            raise QuizError(
                f"{file}: {','.join(cells)[:80]!a} is not a question and its skill: write both, "
                "in double quotes where they hold a comma"
            )
        name = cells[of_question].strip()
        if name not in by_name:
            unknown.append(name)
        skills.setdefault(cells[of_skill].strip(), set()).update(by_name.get(name, ()))
    if not skills:
        raise QuizError(f"{file} names no question: add a row for each question and skill")
    if unknown:
        raise QuizError(
            f"{file} names {len(unknown):,} question{'s' if unknown[1:] else ''} that nobody "
            f"answered, first {unknown[0][:80]!a}: name questions by their text or content hash"
        )
    return {skill: frozenset(own) for skill, own in sorted(skills.items())}
