"""`route.json`: answers or losses by routing rule, and experts a token. Does not import torch."""

from pathlib import Path
from typing import Self

from pydantic import Field, FiniteFloat, model_validator

from expertcut.documents import Format1, Record
from expertcut.edits.route_settings import RouteSetting
from expertcut.evaluation.oracle import OracleVerdict
from expertcut.evaluation.results import (
    ChosenOnResult,
    JudgedTexts,
    TextComparison,
    load_outcome,
)
from expertcut.evaluation.search_results import Correlation, SweptModel, SweptTexts
from expertcut.models.routing_rule import Level, Weights
from expertcut.profiling.schema import AnyProfileInfo, ProfileInfo
from expertcut.stats import Comparison, Count, Share

ROUTE_FILE = "route.json"
ORACLE_FILE = "oracle.json"


class RouteRequest(Record):
    """Everything that a sweep of rules depends on, so that two are never mixed.

    `profile` is the hash of the profile whose tuning questions calibrate thresholds.
    """

    scored: AnyProfileInfo
    profile: str
    settings: tuple[RouteSetting, ...] = Field(min_length=1)
    most: int | None  # 0 is all
    weights: Weights
    level: Level
    seed: int
    text: JudgedTexts | None = None


class RouteFigures(Record):
    """Experts a token and layer; `thresholds` by layer are empty for a rule without.

    Means are over all tokens, as if every prompt had been read alone; by subject over the tokens
    of its questions or rows.
    """

    setting: RouteSetting
    thresholds: tuple[FiniteFloat, ...]
    experts_per_token: FiniteFloat
    experts_by_layer: tuple[FiniteFloat, ...]
    experts_by_subject: dict[str, FiniteFloat]


class RouteCell(RouteFigures, SweptModel):
    """A rule on a quiz, compared with the model as it is.

    `difficulty` correlates experts a token with wrong answers over subjects: positive where harder
    subjects use more.
    """

    accuracy_by_subject: dict[str, Share]
    difficulty: Correlation
    change: Comparison
    max_abs_logprob_diff: FiniteFloat
    median_abs_logprob_diff: FiniteFloat

    @property
    def flipped(self) -> int:
        """Questions that only one of both answers right."""
        return self.change.gained + self.change.lost


class RouteTextCell(RouteFigures, SweptTexts):
    """A rule on texts, compared with the model as it is; `chunks` is the folder of its sums."""

    change: TextComparison
    changes: dict[str, TextComparison] = Field(min_length=1)
    chunks: str

    @property
    def delta_loss(self) -> float:
        """Nats per token that the rule loses."""
        return self.change.delta_loss or 0.0


class RouteSweep(Record):
    """`route.json`; `cells` are the finished ones, in the order of the settings."""

    format: Format1 = 1
    asked: RouteRequest
    chosen_on: ChosenOnResult
    chance: Share | None = None
    base: SweptModel | SweptTexts | None = None
    base_experts: FiniteFloat | None = None  # a token and layer
    cells: tuple[RouteCell | RouteTextCell, ...] = ()

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        is_text = self.asked.text is not None
        if is_text != (self.asked.scored.text is not None):
            raise ValueError("it does not say which texts were read")
        if any(isinstance(cell, RouteTextCell) != is_text for cell in self.cells):
            raise ValueError("a cell of a quiz among those of texts, or the other way round")
        return self

    @property
    def of_quiz(self) -> list[RouteCell]:
        """The cells of a quiz, controls apart; empty where texts judge."""
        return [c for c in self.cells if isinstance(c, RouteCell) and not c.setting.is_control]

    @property
    def of_texts(self) -> list[RouteTextCell]:
        """The cells of texts, controls apart; empty where a quiz judges."""
        return [c for c in self.cells if isinstance(c, RouteTextCell) and not c.setting.is_control]

    @property
    def controls(self) -> list[RouteCell | RouteTextCell]:
        """The finished draws of random experts."""
        return [cell for cell in self.cells if cell.setting.rule == "random"]

    def matched(self, setting: RouteSetting) -> list[RouteCell | RouteTextCell]:
        """The finished draws that leave out as many experts as a setting, but random ones."""
        own = [cell for cell in self.cells if cell.setting.is_matched]
        return [c for c in own if c.setting.model_copy(update={"draw": None}) == setting]

    @property
    def is_complete(self) -> bool:
        """Whether every cell is finished."""
        return len(self.cells) == len(self.asked.settings)

    @property
    def n_questions(self) -> int:
        """Questions or rows that every cell scores."""
        return sum(subject.questions for subject in self.asked.scored.quiz.subjects.values())

    def cell(self, setting: RouteSetting) -> RouteCell | RouteTextCell | None:
        """The cell, None if it is not finished."""
        return next((cell for cell in self.cells if cell.setting == setting), None)


def load_route_sweep(path: Path) -> RouteSweep:
    """A sweep of rules from its folder or file."""
    return load_outcome(path / ROUTE_FILE if path.is_dir() else path, RouteSweep)


class OracleSetting(Record):
    """One setting of an oracle: its change, and its answers that differ from the model's.

    `noise_flips` are those of its variants, in the mean.
    """

    setting: RouteSetting
    change: Comparison
    flips: Count
    noise_flips: FiniteFloat


class OracleResult(Record):
    """`oracle.json`: the best setting of each question, against `sets` of noise variants.

    `noise_gain` is the mean gain of these sets, `range95` has 95 % of them; `excess` is the gain
    beyond the mean with `ci95` over questions. `reader` chooses beforehand, cross-fitted.
    """

    format: Format1 = 1
    scored: ProfileInfo
    questions: Count
    seed: int
    sets: Count
    base_accuracy: Share
    settings: tuple[OracleSetting, ...] = Field(min_length=1)
    accuracy: Share
    gain: FiniteFloat
    noise_gain: FiniteFloat
    range95: tuple[FiniteFloat, FiniteFloat]
    p: Share
    excess: FiniteFloat
    ci95: tuple[FiniteFloat, FiniteFloat]
    verdict: OracleVerdict
    reader: Comparison


def load_oracle(path: Path) -> OracleResult:
    """An oracle from its folder or file."""
    return load_outcome(path / ORACLE_FILE if path.is_dir() else path, OracleResult)
