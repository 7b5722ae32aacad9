"""In what order the quickstart model learns: few words' letters, all, easy quizzes, the quiz."""

from collections.abc import Collection
from dataclasses import dataclass
from random import Random

from rules import FACTS, LOOK_UPS
from texts import WORDS, Style, Text, fact_text, letters_text, quiz_text

MOST_STEPS = 3000  # before the quiz
FIRST_STEPS = 350  # of the quiz, on questions that say their answer


@dataclass
class Curriculum:
    """What comes next, by what is known already: letters of few words, then of all, the quiz."""

    rng: Random
    seen: Collection[str]
    n_words: float = 10.0
    answer_loss: float = 1.4  # running mean
    quiz_since: int | None = None
    step: int = 0

    @property
    def stage(self) -> str:
        """`letters` or `quiz`."""
        return "letters" if self.quiz_since is None else "quiz"

    def draw(self) -> list[Text]:
        """Draw the texts of one step."""
        if self.quiz_since is None:
            n_words = min(int(self.n_words), len(WORDS))
            return [letters_text(n_words, self.rng) for _ in range(32)]
        if self.step - self.quiz_since < FIRST_STEPS:
            return self.first_quizzes()
        n = self.rng.choice((1, 1, 2, 3, 6))
        styles = [Style(n, 0.1, is_reviewed=self.rng.random() < 0.1) for _ in range(54 // n)]
        quizzes = [quiz_text(style, self.rng, self.seen) for style in styles]
        return quizzes + [fact_text(self.rng, self.seen) for _ in range(6)]

    def first_quizzes(self) -> list[Text]:
        """Draw single questions, most of which say their answer, with look-ups behind them."""
        easy = Style(1, 0.0, is_reviewed=True, subjects=LOOK_UPS)
        hinted = Style(1, 1.0, is_reviewed=True, subjects=FACTS)
        styles = [easy] * 14 + [hinted] * 6 + [Style(1, 0.0, is_reviewed=True)] * 6
        quizzes = [quiz_text(style, self.rng, self.seen) for style in styles]
        return quizzes + [letters_text(len(WORDS), self.rng) for _ in range(6)]

    def learned(self, answer_loss: float) -> None:
        """Note the loss of a step on answers, and go on to more words where it is low."""
        self.step += 1
        self.answer_loss += 0.08 * (answer_loss - self.answer_loss)
        if self.stage == "letters" and self.answer_loss < 0.42:
            self.n_words *= 1.15
            if self.n_words > 1.15 * len(WORDS):
                self.quiz_since = self.step
        if self.stage == "letters" and self.step == MOST_STEPS:
            raise RuntimeError(f"letters not learned in {self.step} steps: try another seed")
