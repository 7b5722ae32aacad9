"""Whether a checkpoint came back: its answers beside those of two others."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from expertcut.checkpoints.held_out_check import Answered, Difference, Outcome, difference, outcome
from expertcut.data import Quiz
from expertcut.data.held_out import hash_lines
from expertcut.edits.splits import HASHES
from expertcut.healing.data.judges import Judges
from expertcut.models.load import MoeModel
from expertcut.scoring.engine import Engine, ask

_BATCH_TOKENS = 4096
HEALED, BEFORE, BASE = "healed", "before healing", "the unedited base"


@dataclass(frozen=True)
class Verdict:
    """How far apart the forms are, and how well each answers questions that were `used` so.

    `judges` are the hash lines of the questions.
    """

    split: str
    used: str
    differences: list[Difference]
    outcomes: list[Outcome]
    judges: tuple[str, ...] = ()

    def figures(self) -> dict[str, Any]:
        """As they stand in plan.json, under the names that proofs of cuts have."""
        return {
            "held_out_split": self.split,
            "held_out_used": self.used,
            "held_out": [asdict(row) for row in self.differences],
            HASHES: list(self.judges),
            "shares": [],
            "alone": None,
            "agreement": [],
            "outcomes": [asdict(row) for row in self.outcomes],
        }


def answers(moe: MoeModel, quiz: Quiz) -> Tensor:
    """Log p of the choices (N, C)."""
    return ask(Engine(moe, _BATCH_TOKENS), quiz)


def judge(judges: Judges, by_form: dict[str, Tensor]) -> Verdict:
    """`by_form` are log p of choices (N, C); the healed model is compared with the others."""
    healed_NC = by_form[HEALED]
    quiz = judges.quiz
    others = [form for form in (BASE, BEFORE) if form in by_form]
    rows = [difference(form, healed_NC, by_form[form]) for form in others]
    said = {form: _answered(by_form[form]) for form in (*others, HEALED)}
    outcomes = [outcome(form, quiz, found, said[others[0]]) for form, found in said.items()]
    lines = tuple(sorted(hash_lines(quiz)))
    return Verdict(quiz.split, judges.used, rows, outcomes, lines)


def _answered(logprob_NC: Tensor) -> Answered:
    return Answered(logprob_NC, {}, torch.empty(0, dtype=torch.bool))
