"""The data of a recovery run: rows to train on, in order, and held-out rows."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from expertcut.data import Question, Quiz, Selection, load_quiz, reordered, round_robin, without
from expertcut.data.questions import group_by_subject, normalised, replace_questions
from expertcut.data.sources import Weighted, hash_lines
from expertcut.errors import QuizError
from expertcut.healing.heal_settings import HealSettings
from expertcut.healing.leakage import (
    Dropped,
    QuestionFinder,
    ScoredQuiz,
    choose_scored,
    quizzes_kept_out,
    texts_without_scored,
    without_scored,
)
from expertcut.healing.rows import (
    Fixed,
    Part,
    Row,
    Rows,
    Shuffled,
    Text,
    group_questions,
    question_lengths,
    question_row,
    read_texts,
    text_rows,
)

_ONE_IN = 10  # questions, by content, and texts that are held out
_MAX_HELD_OUT = 256
Lengths = dict[tuple[str, int], int]
"""Tokens of each question's prompt without shots, by subject and row."""


@dataclass(frozen=True)
class TrainingData:
    """All questions and texts of a run, before they become rows.

    `scored` is the quiz that is kept out. `hashes` are the hash lines of all questions read.
    """

    parts: list[Part]
    held_out: list[Row]
    held_out_quiz: Quiz | None
    scored: Quiz | None
    dropped: list[Dropped]
    hashes: frozenset[str]
    n_questions: int
    n_texts: int

    def rows(self, n_rows: int) -> Rows:
        """The first rows to train on."""
        return Rows(self.parts, n_rows)

    def scored_quiz(self, used: frozenset[str]) -> ScoredQuiz | None:
        """The questions that score the result; `used` are hash lines of the questions read."""
        return choose_scored(self.scored, self.held_out_quiz, used)

    def fixed(self, first: int) -> Fixed:
        """The held-out rows, numbered from `first`."""
        return Fixed(self.held_out, first)


def read_data(settings: HealSettings, tokenizer: Any, max_tokens: int) -> TrainingData:
    """Reads quizzes and texts, drops what is scored later, and holds some out."""
    reader = _Reader(settings, tokenizer, max_tokens)
    quizzes = [reader.read_quiz(quiz) for quiz in settings.quizzes]
    texts = [reader.read_texts(text) for text in settings.texts]
    # No source trains on what another holds out.
    held_out = [_held_out(quiz, texts) for quiz, _ in quizzes]
    lines = frozenset[str]().union(*map(hash_lines, held_out))
    for source, (quiz, lengths), held in zip(settings.quizzes, quizzes, held_out, strict=True):
        reader.add_quiz(source, without(quiz, lines), held, lengths)
    for source, clean in zip(settings.texts, texts, strict=True):
        reader.add_texts(source, clean)
    return reader.result()


class _Reader:
    def __init__(self, settings: HealSettings, tokenizer: Any, max_tokens: int) -> None:
        self.settings, self.tokenizer, self.max_tokens = settings, tokenizer, max_tokens
        self.parts: list[Part] = []
        self.held_out: list[Row] = []
        self.held_out_quiz: Quiz | None = None
        self.scored = quizzes_kept_out(settings)
        self.dropped: list[Dropped | None] = []
        self.hashes: frozenset[str] = frozenset()
        self.n_questions = self.n_texts = 0
        self.text_counts = Counter[str]()

    def read_quiz(self, source: Weighted) -> tuple[Quiz, Lengths]:
        """A quiz without questions that are scored later or too long."""
        settings = self.settings
        selection = Selection(
            source.name,
            settings.split,
            shots=0,
            subjects=settings.subjects,
            limit=settings.limit,
            revision=source.revision,
            truncate=settings.truncate,
        )
        quiz, scored = without_scored(load_quiz(selection), self.scored)
        questions = list(quiz)
        tokens = question_lengths(self.tokenizer, questions)
        lengths = {(q.subject, q.row): n for q, n in zip(questions, tokens, strict=True)}
        quiz, too_long = self._without_long(quiz, lengths)
        self.dropped += [scored, too_long]
        self.hashes |= hash_lines(quiz)
        return quiz, lengths

    def _without_long(self, quiz: Quiz, lengths: Lengths) -> tuple[Quiz, Dropped | None]:
        """The questions whose prompt without shots fits into a row."""
        long = [q for q in quiz if lengths[q.subject, q.row] > self.max_tokens]
        if not long:
            return quiz, None
        if len(long) == len(quiz):
            raise _too_little(quiz.id, self.max_tokens)
        names = tuple(f"{q.subject}:{q.row}" for q in long)
        dropped = Dropped(quiz.id, None, len(quiz), names, longest=self.max_tokens)
        kept = [q for q in quiz if lengths[q.subject, q.row] <= self.max_tokens]
        return replace_questions(quiz, group_by_subject(kept)), dropped

    def add_quiz(self, source: Weighted, kept: Quiz, held_out: Quiz, lengths: Lengths) -> None:
        """Adds questions to train on and held-out questions."""
        self.n_questions += len(kept)
        self.held_out_quiz = self.held_out_quiz or held_out
        rows = self._shuffled_quiz(kept, lengths, shuffles_choices=self.settings.shuffle)
        held_out_rows = self._shuffled_quiz(held_out, lengths, shuffles_choices=False)
        self.held_out += held_out_rows(random.Random(self.settings.seed))
        self._add(source, rows)

    def _shuffled_quiz(self, quiz: Quiz, lengths: Lengths, *, shuffles_choices: bool) -> Shuffled:
        def shuffled(order: random.Random) -> list[Row]:
            rows = []
            for questions in quiz.questions.values():
                drawn = order.sample(questions, len(questions))
                sizes = [lengths[q.subject, q.row] for q in drawn]
                if shuffles_choices:
                    drawn = [_with_shuffled_choices(question, order) for question in drawn]
                groups = group_questions(drawn, sizes, self.settings.n_shots + 1, self.max_tokens)
                rows += [question_row(self.tokenizer, group) for group in groups]
            order.shuffle(rows)
            return rows

        return shuffled

    def read_texts(self, source: Weighted) -> list[Text]:
        """Texts without those that contain a question that is scored later."""
        texts = read_texts(Path(source.name), self.tokenizer)
        scored = [question for quiz in self.scored for question in quiz]
        split = self.settings.kept_out_split
        clean, dropped = texts_without_scored(source.name, texts, scored, split)
        self.dropped.append(dropped)
        self.text_counts.update(normalised(text.read) for text in clean)
        return clean

    def add_texts(self, source: Weighted, clean: Sequence[Text]) -> None:
        """Adds texts to train on and held-out texts; no text is both."""
        ids = self.tokenizer([text.read for text in clean])["input_ids"] if clean else []
        is_single = [self.text_counts[normalised(text.read)] == 1 for text in clean]
        tenth = (at for at in range(_ONE_IN - 1, len(ids), _ONE_IN) if is_single[at])
        held_out = list(tenth)[:_MAX_HELD_OUT]
        self.held_out += text_rows([ids[at] for at in held_out], self.max_tokens)
        kept = [document for at, document in enumerate(ids) if at not in set(held_out)]
        self.n_texts += len(kept)
        self._add(source, partial(_shuffled, list(text_rows(kept, self.max_tokens))))

    def _add(self, source: Weighted, shuffled: Shuffled) -> None:
        seed = self.settings.seed
        if not shuffled(random.Random(seed)):
            raise _too_little(source.name, self.max_tokens)
        self.parts.append(Part(f"{len(self.parts)}", source.weight, shuffled, seed))

    def result(self) -> TrainingData:
        if not self.held_out:
            raise QuizError("too few questions and texts to hold any out: name more")
        return TrainingData(
            self.parts,
            self.held_out[:_MAX_HELD_OUT],
            self.held_out_quiz,
            scored=self.scored[0] if self.scored else None,
            dropped=[dropped for dropped in self.dropped if dropped is not None],
            hashes=self.hashes,
            n_questions=self.n_questions,
            n_texts=self.n_texts,
        )


def _too_little(name: str, max_tokens: int) -> QuizError:
    return QuizError(
        f"{name} leaves nothing to train on: it is too small, or has only rows of more than "
        f"{max_tokens} tokens: raise --max-tokens or name another"
    )


def _held_out(quiz: Quiz, texts: Iterable[Iterable[Text]]) -> Quiz:
    """A tenth by content, the same for every seed, and at least one question.

    None of it is contained in a text that is trained on.
    """
    finder = QuestionFinder(quiz)
    in_texts = [q for source in texts for text in source for q in finder.questions_in(text.said)]
    free = without(quiz, hash_lines(replace_questions(quiz, group_by_subject(in_texts))))
    tenth = [q for q in free if int(q.content_hash, 16) % _ONE_IN == 0]
    held_out = round_robin(
        replace_questions(quiz, group_by_subject(tenth or list(free)[:1])), _MAX_HELD_OUT
    )
    if len(without(quiz, hash_lines(held_out))) == 0 or not len(held_out):
        raise QuizError(f"{quiz.id} has too few questions to hold any out: it has {len(quiz)}")
    return held_out


def _with_shuffled_choices(question: Question, order: random.Random) -> Question:
    n_choices = len(question.choices)
    return reordered(question, order.sample(range(n_choices), n_choices))


def _shuffled(rows: Sequence[Row], order: random.Random) -> list[Row]:
    return order.sample(rows, len(rows))
