"""From what was asked for to rows: those trained on, in order, and those held out."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
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
    Asked,
    Dropped,
    Judges,
    evaluation_quizzes,
    find_judges,
    texts_without_scored,
    without_scored,
)
from expertcut.healing.rows import (
    Fixed,
    Part,
    Row,
    Rows,
    Text,
    group_questions,
    question_lengths,
    question_row,
    read_texts,
    text_rows,
)

_ONE_IN = 10  # of the questions and texts are held out, by their content
_MOST_HELD_OUT = 256
Lengths = dict[tuple[str, int], int]
"""Tokens of each question's prompt without shots, by subject and row."""


@dataclass(frozen=True)
class Read:
    """All questions and texts of a run, before they are cut into rows.

    `scored` is what the healed model is judged by, never trained on. `hashes` are the hash lines of
    every question that was looked at.
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
        """So many rows to be trained on."""
        return Rows(self.parts, n_rows)

    def judges(self, used: frozenset[str]) -> Judges | None:
        """Who judges the result, where `used` are hashes of all that was looked at."""
        return find_judges(self.scored, self.held_out_quiz, used)

    def fixed(self, first: int) -> Fixed:
        """The held-out rows, numbered from `first`."""
        return Fixed(self.held_out, first)


def read_data(settings: HealSettings, tokenizer: Any, max_tokens: int) -> Read:
    """Reads quizzes and texts, drops what is scored later, holds some out.

    Raises:
        QuizError: a source that cannot be read, that is too small, or of which more than 5 % stand
            in an evaluation split.
    """
    reader = _Reader(settings, tokenizer, max_tokens)
    quizzes = [reader.read_quiz(quiz) for quiz in settings.quizzes]
    texts = [reader.read_texts(text) for text in settings.texts]
    # What one source holds out, no other trains on.
    held_out = [_held_out(quiz, reader.asked_in(texts)) for quiz, _ in quizzes]
    lines = frozenset[str]().union(*map(hash_lines, held_out))
    for named, (quiz, lengths), held in zip(settings.quizzes, quizzes, held_out, strict=True):
        reader.add_quiz(named, without(quiz, lines), held, lengths)
    for named, clean in zip(settings.texts, texts, strict=True):
        reader.add_texts(named, clean)
    return reader.done()


class _Reader:
    def __init__(self, settings: HealSettings, tokenizer: Any, max_tokens: int) -> None:
        self.settings, self.tokenizer, self.max_tokens = settings, tokenizer, max_tokens
        self.seed = settings.seed
        self.parts: list[Part] = []
        self.held_out: list[Row] = []
        self.held_out_quiz: Quiz | None = None
        self.scored = evaluation_quizzes(settings)
        self.dropped: list[Dropped | None] = []
        self.hashes: frozenset[str] = frozenset()
        self.n_questions = self.n_texts = 0
        self.text_counts = Counter[str]()

    def read_quiz(self, named: Weighted) -> tuple[Quiz, Lengths]:
        """A quiz without what is scored later or too long."""
        settings = self.settings
        selection = Selection(
            named.name,
            settings.split,
            shots=0,
            subjects=settings.subjects,
            limit=settings.limit,
            revision=named.revision,
            truncate=settings.truncate,
        )
        quiz, scored = without_scored(load_quiz(selection), self.scored)
        lengths = self._lengths(quiz)
        quiz, too_long = self._without_long(quiz, lengths)
        self.dropped += [scored, too_long]
        self.hashes |= hash_lines(quiz)
        return quiz, lengths

    def add_quiz(self, named: Weighted, kept: Quiz, held_out: Quiz, lengths: Lengths) -> None:
        """Questions to train on, and those that are held out."""
        self.n_questions += len(kept)
        self.held_out_quiz = self.held_out_quiz or held_out
        shuffled = self._shuffled_quiz(kept, lengths, is_turned=self.settings.shuffle)
        self.held_out += self._shuffled_quiz(held_out, lengths)(random.Random(self.seed))
        self._add(named, shuffled)

    def read_texts(self, named: Weighted) -> list[Text]:
        """Texts without those that ask what is scored later."""
        texts = read_texts(Path(named.name), self.tokenizer)
        scored = [question for quiz in self.scored for question in quiz]
        clean, dropped = texts_without_scored(
            named.name, texts, scored, self.settings.kept_out_split
        )
        self.dropped.append(dropped)
        found = [texts[at] for at in clean]
        self.text_counts.update(normalised(text.read) for text in found)
        return found

    def asked_in(self, texts: Sequence[Sequence[Text]]) -> Callable[[Quiz], Quiz]:
        """Tells which questions of a quiz are asked in the texts that are trained on."""

        def find(quiz: Quiz) -> Quiz:
            asked = Asked(quiz)
            found = [q for source in texts for text in source for q in asked.found_in(text.said)]
            return replace_questions(quiz, group_by_subject(found))

        return find

    def add_texts(self, named: Weighted, clean: Sequence[Text]) -> None:
        """Texts to train on, and those that are held out: none stands in both."""
        ids = self.tokenizer([text.read for text in clean])["input_ids"] if clean else []
        once = [self.text_counts[normalised(text.read)] == 1 for text in clean]
        out = [at for at in range(_ONE_IN - 1, len(ids), _ONE_IN) if once[at]][:_MOST_HELD_OUT]
        self.held_out += text_rows([ids[at] for at in out], self.max_tokens)
        kept = [document for at, document in enumerate(ids) if at not in set(out)]
        self.n_texts += len(kept)
        self._add(named, partial(_shuffled, list(text_rows(kept, self.max_tokens))))

    def done(self) -> Read:
        if not self.held_out:
            raise QuizError("too few questions and texts to hold any out: name more")
        scored = self.scored[0] if self.scored else None
        return Read(
            self.parts,
            self.held_out[:_MOST_HELD_OUT],
            self.held_out_quiz,
            scored,
            [found for found in self.dropped if found is not None],
            self.hashes,
            self.n_questions,
            self.n_texts,
        )

    def _lengths(self, quiz: Quiz) -> Lengths:
        questions = list(quiz)
        found = zip(questions, question_lengths(self.tokenizer, questions), strict=True)
        return {(question.subject, question.row): length for question, length in found}

    def _without_long(self, quiz: Quiz, lengths: Lengths) -> tuple[Quiz, Dropped | None]:
        """The questions whose prompt without shots fits into a row."""
        long = [q for q in quiz if lengths[q.subject, q.row] > self.max_tokens]
        if not long:
            return quiz, None
        if len(long) == len(quiz):
            raise _too_little(quiz.id, self.max_tokens)
        names = tuple(f"{q.subject}:{q.row}" for q in long)
        dropped = Dropped(quiz.id, None, len(quiz), names, longest=self.max_tokens)
        left = {(q.subject, q.row) for q in quiz} - {(q.subject, q.row) for q in long}
        kept = [q for q in quiz if (q.subject, q.row) in left]
        return replace_questions(quiz, group_by_subject(kept)), dropped

    def _add(self, named: Weighted, shuffled: Callable[[random.Random], list[Row]]) -> None:
        if not shuffled(random.Random(self.seed)):
            raise _too_little(named.name, self.max_tokens)
        number = len(self.parts)
        self.parts.append(Part(f"{number}", named.weight, shuffled, self.seed))

    def _shuffled_quiz(
        self, quiz: Quiz, lengths: Lengths, *, is_turned: bool = False
    ) -> Callable[[random.Random], list[Row]]:
        def shuffled(order: random.Random) -> list[Row]:
            rows = []
            for questions in quiz.questions.values():
                turned = order.sample(questions, len(questions))
                sizes = [lengths[q.subject, q.row] for q in turned]
                if is_turned:
                    turned = [_turned(question, order) for question in turned]
                groups = group_questions(turned, sizes, self.settings.n_shots + 1, self.max_tokens)
                rows += [question_row(self.tokenizer, group) for group in groups]
            order.shuffle(rows)
            return rows

        return shuffled


def _too_little(name: str, max_tokens: int) -> QuizError:
    return QuizError(
        f"{name} leaves nothing to train on: it has too little, or only rows of more than "
        f"{max_tokens} tokens: raise --max-tokens or name another"
    )


def _held_out(quiz: Quiz, asked_in_texts: Callable[[Quiz], Quiz]) -> Quiz:
    """A tenth, by content, so that another run or seed holds out the same; some in any case.

    None of it is asked in a text that is trained on.
    """
    free = without(quiz, hash_lines(asked_in_texts(quiz)))
    tenth = [q for q in free if int(q.content_hash, 16) % _ONE_IN == 0]
    held_out = round_robin(
        replace_questions(quiz, group_by_subject(tenth or list(free)[:1])), _MOST_HELD_OUT
    )
    if len(without(quiz, hash_lines(held_out))) == 0 or not len(held_out):
        raise QuizError(f"{quiz.id} has too few questions to hold any out: it has {len(quiz)}")
    return held_out


def _turned(question: Question, chance: random.Random) -> Question:
    n_choices = len(question.choices)
    return reordered(question, chance.sample(range(n_choices), n_choices))


def _shuffled(rows: Sequence[Row], order: random.Random) -> list[Row]:
    return order.sample(rows, len(rows))
