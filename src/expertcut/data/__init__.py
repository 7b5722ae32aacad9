"""Quizzes: questions, splits, and prompts as lm-evaluation-harness builds them."""

from expertcut.data.questions import Question as Question
from expertcut.data.questions import Quiz as Quiz
from expertcut.data.questions import Truncate as Truncate
from expertcut.data.questions import prompt as prompt
from expertcut.data.questions import round_robin as round_robin
from expertcut.data.questions import shuffle_choices as shuffle_choices
from expertcut.data.questions import without as without
from expertcut.data.sources import DEFAULT_QUIZ as DEFAULT_QUIZ
from expertcut.data.sources import Selection as Selection
from expertcut.data.sources import load_quiz as load_quiz
from expertcut.data.sources import warn_of_repeats as warn_of_repeats
