"""Write the quickstart quiz: CSV files in the form of Hendrycks' MMLU.

    python make_quiz.py --out quiz

The same seed writes the same bytes. No question (text and choices) stands twice in the quiz, and
`unseen` draws the training questions so that none of them is a quiz question.
"""

import argparse
import csv
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from rules import SUBJECTS, Drawn, Rule

LETTERS = "ABCD"
SPLIT_SIZES = {"dev": 5, "val": 100, "test": 250}
SEED = 20250217


class Question(NamedTuple):
    """One row of the CSV."""

    text: str
    choices: tuple[str, ...]
    letter: str


def with_letter(drawn: Drawn, letter: str, rng: Random) -> Question:
    """Put the right choice at `letter` and the wrong ones around it in random order."""
    choices = rng.sample(drawn.wrong, len(drawn.wrong))
    choices.insert(LETTERS.index(letter), drawn.right)
    return Question(drawn.text, tuple(choices), letter)


def key(text: str, choices: Collection[str]) -> str:
    """Name a question by its text and its choices, in whatever order they stand."""
    return "\n".join([text, *sorted(choices)])


def unseen(rule: Rule, rng: Random, seen: Collection[str]) -> Drawn:
    """Draw until the question, text and choices, is not among the keys `seen`."""
    while True:
        drawn = rule(rng)
        if key(drawn.text, (drawn.right, *drawn.wrong)) not in seen:
            return drawn


def balanced_letters(n: int, rng: Random) -> list[str]:
    """Draw `n` letters whose counts differ by at most one, in random order."""
    letters = rng.sample(LETTERS, len(LETTERS)) * (n // len(LETTERS) + 1)
    return rng.sample(letters[:n], n)


def make_subject(subject: str, seed: int) -> dict[str, list[Question]]:
    """Draw all splits of a subject, no question twice."""
    rng = Random(f"{seed} {subject}")
    seen: set[str] = set()
    splits: dict[str, list[Question]] = {}
    for split, n in SPLIT_SIZES.items():
        splits[split] = []
        for letter in balanced_letters(n, rng):
            drawn = unseen(SUBJECTS[subject], rng, seen)
            seen.add(key(drawn.text, (drawn.right, *drawn.wrong)))
            splits[split].append(with_letter(drawn, letter, rng))
    return splits


def make_quiz(seed: int = SEED) -> Iterator[tuple[str, str, list[Question]]]:
    """Yield (split, subject, questions) for every file of the quiz."""
    for subject in SUBJECTS:
        for split, questions in make_subject(subject, seed).items():
            yield split, subject, questions


def quiz_keys(seed: int = SEED) -> frozenset[str]:
    """Collect the keys of every quiz question: what training must not draw."""
    made = (questions for _, _, questions in make_quiz(seed))
    return frozenset(key(q.text, q.choices) for questions in made for q in questions)


def write_quiz(folder: Path, seed: int = SEED) -> None:
    """Write `folder/<split>/<subject>_<split>.csv` for all subjects and splits."""
    for split, subject, questions in make_quiz(seed):
        path = folder / split / f"{subject}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = ((q.text, *q.choices, q.letter) for q in questions)
            csv.writer(file, lineterminator="\n").writerows(rows)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write the quickstart quiz.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "quiz")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    write_quiz(args.out, args.seed)


if __name__ == "__main__":
    main()
