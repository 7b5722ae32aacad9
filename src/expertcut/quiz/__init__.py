"""What is asked: questions, their splits, and the prompts that lm-evaluation-harness would send."""

from expertcut.quiz.prompts import answer_letter, prompt
from expertcut.quiz.questions import Question, Quiz, Truncate, round_robin, without
from expertcut.quiz.shuffled import reordered, shuffle_choices
from expertcut.quiz.sources import DEFAULT_QUIZ, Selection, load_quiz

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
