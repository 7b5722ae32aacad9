"""Prompts, byte-identical to task `mmlu` (version 1) of lm-evaluation-harness."""

from collections.abc import Sequence

from expertcut.quiz.questions import Question

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def answer_letter(question: Question) -> str:
    """`A` for the first choice, and so on."""
    return LETTERS[question.answer]


def prompt(question: Question, shots: Sequence[Question] = ()) -> str:
    """Everything the model reads before it writes ` A`, ` B`, …; no trailing space."""
    solved = (f"{_ask(shot)} {answer_letter(shot)}\n\n" for shot in shots)
    return header(question.subject) + "".join(solved) + _ask(question)


def header(subject: str) -> str:
    """What stands before the first question."""
    about = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {about}.\n\n"


def _ask(question: Question) -> str:
    choices = "".join(f"{LETTERS[i]}. {text}\n" for i, text in enumerate(question.choices))
    return f"{question.text.strip()}\n{choices}Answer:"
