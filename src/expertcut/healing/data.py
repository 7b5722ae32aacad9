"""The data of a recovery run: rows to train on, held-out rows, and questions kept out of both.

The shots of a quiz's row are questions of the same split, so that no dev question is trained on,
every question of the row is, and all numbers of shots occur.
"""

import logging
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from expertcut.data import Question, Quiz, Selection, load_quiz, prompt, round_robin, without
from expertcut.data.corpus import token_ids
from expertcut.data.ngrams import NOTHING, NGrams, ngrams_of
from expertcut.data.questions import LETTERS, hashes_in, normalised, reordered, replace_questions
from expertcut.data.sources import Weighted, hash_lines
from expertcut.data.texts import Text, read_texts
from expertcut.edits.splits import UNUSED
from expertcut.errors import ModelError, QuizError, SplitError
from expertcut.healing.heal_settings import HealSettings
from expertcut.scoring.packing import cut_packs

USED_BEFORE = "an earlier step used and this one did not train on"
CHOSE_STEP = "chose the best step of this training but were not trained on"
_ONE_IN = 10  # questions, by content, and texts that are held out
_MAX_HELD_OUT = 256
_MAX_SCORED = 256
_MAX_DROPPED_SHARE = 0.05
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """Token ids, and the positions just before answer letters."""

    ids: tuple[int, ...]
    answers: tuple[int, ...] = ()


def question_row(tokenizer: Any, group: Sequence[Question]) -> Row:
    """The prompt of the last question, with the others as shots, and its answer letter."""
    prompts = [prompt(question, group[:i]) for i, question in enumerate(group)]
    texts = [*prompts, f"{prompts[-1]} {LETTERS[group[-1].answer]}"]
    *prefixes, whole = tokenizer(texts)["input_ids"]
    is_clean = all(ids == whole[: len(ids)] for ids in prefixes)
    if not is_clean or len(whole) != len(prefixes[-1]) + 1:
        raise ModelError(
            "the tokenizer does not write an answer letter after 'Answer:' as a single token: "
            "train this model on text, with --text"
        )
    return Row(tuple(whole), tuple(len(ids) - 1 for ids in prefixes))


def question_lengths(tokenizer: Any, questions: Sequence[Question]) -> list[int]:
    """Tokens of each question's prompt without shots, the answer's included."""
    return [len(ids) + 1 for ids in tokenizer([prompt(q) for q in questions])["input_ids"]]


def text_rows(documents: Iterable[Sequence[int]], max_tokens: int) -> Iterator[Row]:
    """Documents as rows of 2 to `max_tokens` tokens; longer documents are cut."""
    for ids in documents:
        for begin in range(0, len(ids), max_tokens):
            piece = tuple(ids[begin : begin + max_tokens])
            if len(piece) > 1:
                yield Row(piece)


Shuffled = Callable[[random.Random], list[Row]]  # one epoch of a source in random order


@dataclass
class Part:
    """A source of rows: epochs without end, each in another order."""

    name: str
    weight: float
    shuffled: Shuffled
    seed: int
    starts: list[int] = field(default_factory=lambda: [0])  # of the epochs opened so far
    _epoch: int = -1
    _rows: list[Row] = field(default_factory=list)

    def row(self, nth: int) -> Row:
        """The nth row of all epochs."""
        while nth >= self.starts[-1]:
            self.starts.append(self.starts[-1] + len(self._epoch_rows(len(self.starts) - 1)))
        epoch = bisect_right(self.starts, nth) - 1
        return self._epoch_rows(epoch)[nth - self.starts[epoch]]

    def _epoch_rows(self, epoch: int) -> list[Row]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._rows = self.shuffled(random.Random(f"{self.seed}/{self.name}/{epoch}"))
            assert self._rows, "sources without rows are refused"
        return self._rows


@dataclass
class Rows(Dataset[tuple[int, Row]]):
    """`n_rows` rows of all parts, mixed by weight; item i is (i, row)."""

    parts: Sequence[Part]
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, at: int) -> tuple[int, Row]:
        part, nth = self._order[at]
        return at, self.parts[part].row(nth)

    @cached_property
    def _order(self) -> list[tuple[int, int]]:
        """Part and row of each item: always the part that lags its share most."""
        total = sum(part.weight for part in self.parts)
        shares = [part.weight / total for part in self.parts]
        counts = [0] * len(shares)
        order = []
        for at in range(1, self.n_rows + 1):
            lags = [share * at - count for share, count in zip(shares, counts, strict=True)]
            part = lags.index(max(lags))
            order.append((part, counts[part]))
            counts[part] += 1
        return order


@dataclass(frozen=True)
class ScoredQuiz:
    """Questions that score the result, and how they were `used`: UNUSED or a sentence above."""

    quiz: Quiz
    used: str


@dataclass(frozen=True)
class Dropped:
    """Questions or texts of a source that are left out, by name, and the size of the source."""

    source: str
    split: str | None  # evaluation split that holds them
    total: int
    names: tuple[str, ...]
    longest: int | None = None  # most tokens of a row, if they have more


@dataclass
class TrainingData:
    """All questions and texts of a run, before they become rows."""

    scored: Quiz | None  # is kept out
    parts: list[Part] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    held_out_quiz: Quiz | None = None
    dropped: list[Dropped] = field(default_factory=list)
    hashes: frozenset[str] = frozenset()  # hash lines of all questions and texts read
    ngrams: NGrams = NOTHING  # runs of words of all texts read
    n_questions: int = 0
    n_texts: int = 0

    def numbered_rows(self, n_rows: int) -> tuple[Rows, list[tuple[int, Row]]]:
        """The first rows to train on, and the held-out rows, numbered behind them."""
        return Rows(self.parts, n_rows), list(enumerate(self.held_out, n_rows))

    def scored_quiz(self, used: frozenset[str]) -> ScoredQuiz | None:
        """The evaluation split without `used` questions, or all of it, else held-out questions."""
        if self.scored is not None:
            unused = without(self.scored, used)
            quiz, how = (unused, UNUSED) if len(unused) else (self.scored, USED_BEFORE)
        elif self.held_out_quiz is not None:
            quiz, how = self.held_out_quiz, CHOSE_STEP
        else:
            return None
        return ScoredQuiz(round_robin(quiz, _MAX_SCORED), how)


def read_data(settings: HealSettings, tokenizer: Any, max_tokens: int) -> TrainingData:
    """Reads quizzes and texts, drops what is scored later, and holds some out."""
    reader = _Reader(settings, tokenizer, max_tokens)
    quizzes = [reader.read_quiz(quiz) for quiz in settings.quizzes]
    texts = [reader.read_texts(text) for text in settings.texts]
    # No source trains on what another holds out.
    held_out = [_held_out(quiz, texts) for quiz in quizzes]
    lines = frozenset[str]().union(*map(hash_lines, held_out))
    data = reader.data
    for source, quiz, held in zip(settings.quizzes, quizzes, held_out, strict=True):
        kept = without(quiz, lines)
        data.n_questions += len(kept)
        held_out_rows = reader.shuffled_quiz(held, shuffles_choices=False)
        data.held_out += held_out_rows(random.Random(settings.seed))
        reader.add(source, reader.shuffled_quiz(kept, shuffles_choices=settings.shuffle))
    for source, clean in zip(settings.texts, texts, strict=True):
        reader.add_texts(source, clean)
    if not data.held_out:
        raise QuizError("too few questions and texts to hold any out: name more")
    del data.held_out[_MAX_HELD_OUT:]
    data.held_out_quiz = held_out[0] if held_out else None
    read = [text for clean in texts for text in clean]
    data.hashes = frozenset(text.hash_line for text in read).union(*map(hash_lines, quizzes))
    data.ngrams = ngrams_of(text.said for text in read)
    return data


class _Reader:
    def __init__(self, settings: HealSettings, tokenizer: Any, max_tokens: int) -> None:
        self.settings, self.tokenizer, self.max_tokens = settings, tokenizer, max_tokens
        self.scored = quizzes_kept_out(settings)
        self.data = TrainingData(self.scored[0] if self.scored else None)
        self.n_tokens: dict[Question, int] = {}  # of a question's prompt
        self.text_counts = Counter[str]()

    def read_quiz(self, source: Weighted) -> Quiz:
        """A quiz without questions that are scored later or do not fit into a row."""
        own = self.settings
        selection = Selection(
            source.name, own.split, 0, own.subjects, own.limit, source.revision, own.truncate
        )
        quiz, dropped = without_scored(load_quiz(selection), self.scored)
        self.data.dropped += dropped
        lengths = question_lengths(self.tokenizer, list(quiz))
        self.n_tokens.update(zip(quiz, lengths, strict=True))
        kept = [q for q in quiz if self.n_tokens[q] <= self.max_tokens]
        if not kept and lengths:
            raise _too_little(quiz.id, self.max_tokens)
        if long := _names(q for q in quiz if self.n_tokens[q] > self.max_tokens):
            self.data.dropped.append(Dropped(quiz.id, None, len(quiz), long, self.max_tokens))
        return replace_questions(quiz, kept)

    def shuffled_quiz(self, quiz: Quiz, *, shuffles_choices: bool) -> Shuffled:
        def shuffled(order: random.Random) -> list[Row]:
            rows = []
            for questions in quiz.questions.values():
                drawn = order.sample(questions, len(questions))
                sizes = [self.n_tokens[q] for q in drawn]
                if shuffles_choices:
                    drawn = [
                        reordered(q, order.sample(range(len(q.choices)), len(q.choices)))
                        for q in drawn
                    ]
                packs = cut_packs(sizes, self.max_tokens, n_most=self.settings.n_shots + 1)
                rows += [question_row(self.tokenizer, [drawn[q] for q in pack]) for pack in packs]
            order.shuffle(rows)
            return rows

        return shuffled

    def read_texts(self, source: Weighted) -> list[Text]:
        """Texts without those that contain a question that is scored later."""
        texts = read_texts(source.name, self.tokenizer)
        scored = [question for quiz in self.scored for question in quiz]
        split = self.settings.kept_out_split
        clean, dropped = texts_without_scored(source.name, texts, scored, split)
        self.data.dropped += dropped
        self.text_counts.update(normalised(text.read) for text in clean)
        return clean

    def add_texts(self, source: Weighted, clean: Sequence[Text]) -> None:
        """Adds texts to train on and held-out texts; no text is both."""
        ids = token_ids(self.tokenizer, clean)
        is_single = [self.text_counts[normalised(text.read)] == 1 for text in clean]
        tenth = (at for at in range(_ONE_IN - 1, len(ids), _ONE_IN) if is_single[at])
        held_out = list(tenth)[:_MAX_HELD_OUT]
        self.data.held_out += text_rows([ids[at] for at in held_out], self.max_tokens)
        kept = [document for at, document in enumerate(ids) if at not in set(held_out)]
        self.data.n_texts += len(kept)
        rows = list(text_rows(kept, self.max_tokens))
        self.add(source, lambda order: order.sample(rows, len(rows)))

    def add(self, source: Weighted, shuffled: Shuffled) -> None:
        seed = self.settings.seed
        if not shuffled(random.Random(seed)):
            raise _too_little(source.name, self.max_tokens)
        self.data.parts.append(Part(f"{len(self.data.parts)}", source.weight, shuffled, seed))


def _too_little(name: str, max_tokens: int) -> QuizError:
    return QuizError(
        f"{name} leaves nothing to train on: it is too small, or has only rows of more than "
        f"{max_tokens} tokens: raise --max-tokens or name another"
    )


def _held_out(quiz: Quiz, texts: Iterable[Iterable[Text]]) -> Quiz:
    """A tenth by content, the same for every seed, and at least one; none is in a trained text."""
    in_texts = chain.from_iterable(_questions_in(chain.from_iterable(texts), quiz))
    free = without(quiz, (question.hash_line for question in in_texts))
    tenth = [q for q in free if int(q.content_hash, 16) % _ONE_IN == 0] or list(free)[:1]
    held_out = round_robin(replace_questions(quiz, tenth), _MAX_HELD_OUT)
    if len(without(quiz, hash_lines(held_out))) == 0 or not len(held_out):
        raise QuizError(f"{quiz.id} has too few questions to hold any out: it has {len(quiz)}")
    return held_out


def quizzes_kept_out(settings: HealSettings) -> list[Quiz]:
    """The evaluation split of `eval_quiz`, else of every quiz that is trained on."""
    if settings.eval_quiz is not None:
        return [_evaluation_split(settings.eval_quiz, settings, settings.eval_revision)]
    kept_out = []
    for name, revision in {quiz.name: quiz.revision for quiz in settings.quizzes}.items():
        if Path(name).is_file():
            logger.warning("%s is one file: name the scored quiz by --eval-quiz", name)
            continue
        try:
            kept_out.append(_evaluation_split(name, settings, revision))
        except SplitError as error:
            logger.warning("no evaluation split to keep out: %s", error)
    if not kept_out:
        logger.warning(
            "nothing is kept out of the training: name the scored quiz by --eval-quiz; eval --text "
            "leaves out documents that were trained on"
        )
    return kept_out


def _evaluation_split(name: str, settings: HealSettings, revision: str | None) -> Quiz:
    """The quiz with shots, or without if it has too few."""
    split, shots, truncate = settings.kept_out_split, settings.n_shots, settings.truncate
    selection = Selection(name, split, shots, revision=revision, truncate=truncate)
    try:
        return load_quiz(selection)
    except SplitError:
        raise
    except QuizError as error:
        quiz = load_quiz(replace(selection, shots=0))  # raises again unless shots were the reason
        logger.warning("%s is scored without shots: %s", name, error)
        return quiz


def without_scored(quiz: Quiz, scored: Sequence[Quiz]) -> tuple[Quiz, list[Dropped]]:
    """The quiz without questions whose content is in a scored quiz; at most 5 % may be."""
    known = hashes_in(question.hash_line for other in scored for question in other)
    names = _names(q for q in quiz if q.is_among(known))
    split = scored[0].split if scored else None
    return without(quiz, known), _dropped("questions", quiz.id, split, len(quiz), names)


def _names(questions: Iterable[Question]) -> tuple[str, ...]:
    return tuple(f"{question.subject}:{question.row}" for question in questions)


def _questions_in(texts: Iterable[Text], questions: Iterable[Question]) -> Iterator[list[Question]]:
    """The questions that each text contains: their first line as a line, text and all choices."""
    by_line: dict[str, list[Question]] = {}
    for question in questions:
        if line := next(filter(None, map(normalised, question.text.splitlines())), ""):
            by_line.setdefault(line, []).append(question)
    for text in texts:
        lines = map(normalised, text.said.splitlines())
        candidates = [q for line in lines for q in by_line.get(line, ())]
        whole = normalised(text.said) if candidates else ""
        yield [q for q in candidates if all(normalised(x) in whole for x in (q.text, *q.choices))]


def texts_without_scored(
    name: str, texts: Sequence[Text], scored: Iterable[Question], split: str
) -> tuple[list[Text], list[Dropped]]:
    """The texts that contain no scored question; at most 5 % of them may."""
    contained = list(_questions_in(texts, scored))
    clean = [text for text, questions in zip(texts, contained, strict=True) if not questions]
    dropped = [text for text, questions in zip(texts, contained, strict=True) if questions]
    places = tuple(re.sub(rf"^{re.escape(name)}:(?=\d)", "line ", text.where) for text in dropped)
    return clean, _dropped("texts", name, split, len(texts), places)


def _dropped(
    kind: str, source: str, split: str | None, total: int, names: tuple[str, ...]
) -> list[Dropped]:
    if len(names) > _MAX_DROPPED_SHARE * total:
        raise QuizError(
            f"{len(names)} of {total} {kind} of {source} stand in split {split}, which is scored "
            f"later, first {names[0]}; at most 5 % may: train on others, or name what is scored "
            "with --eval-quiz and --eval-split"
        )
    return [Dropped(source, split, total, names)] if names else []
