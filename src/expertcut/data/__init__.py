"""Quizzes: questions, splits, and prompts as lm-evaluation-harness builds them."""

from expertcut.data.questions import (
    Question,
    Quiz,
    Truncate,
    answer_letter,
    prompt,
    reordered,
    round_robin,
    shuffle_choices,
    without,
)
from expertcut.data.sources import DEFAULT_QUIZ, Selection, load_quiz

__all__ = [
    "DEFAULT_QUIZ",
    "Question",
    "Quiz",
    "Selection",
    "Truncate",
    "answer_letter",
    "load_quiz",
    "prompt",
    "reordered",
    "round_robin",
    "shuffle_choices",
    "without",
]
