"""The same questions with their choices in another order: an answer that is known should stay."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from expertcut.quiz.questions import Question, Quiz, replace_questions


def shuffle_choices(quiz: Quiz) -> Quiz:
    """Every question with its choices in another order, the same each time; shots stay."""
    shuffled = {s: tuple(map(_shuffle, questions)) for s, questions in quiz.questions.items()}
    return replace_questions(quiz, shuffled)


def _shuffle(question: Question) -> Question:
    places = range(len(question.choices))
    order = list(places)
    chance = Random(int(question.content_hash, 16))
    while order == list(places):
        chance.shuffle(order)
    return reordered(question, order)


def reordered(question: Question, order: Sequence[int]) -> Question:
    """Its choices as `order` says: which of the original stands at each place."""
    return replace(
        question,
        choices=tuple(question.choices[i] for i in order),
        answer=order.index(question.answer),
        order=tuple(order),
    )
