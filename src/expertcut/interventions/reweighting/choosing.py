"""Which experts to tilt: a score per expert, and the best and worst of those that appear enough."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.errors import PlanError, ProfileError, SettingsError
from expertcut.interventions.questions import hashes, profiled_quiz
from expertcut.interventions.reweighting.records import Records, joined, places
from expertcut.profiling.significance import z_scores
from expertcut.profiling.statistics import share
from expertcut.profiling.storage import Profile, load_profile

Array = np.ndarray[Any, Any]
MIN_APPEARANCES = 0.01


@dataclass(frozen=True)
class Pick:
    """An expert to boost (`sign` +1) or to suppress (−1)."""

    layer: int
    expert: int
    sign: int


@dataclass(frozen=True)
class Chooser:
    """How many of the best to boost and of the worst to suppress, and what ranks them.

    Candidates appear in at least a share `min_appearances` of the questions and lie in one of
    `layers`, where any are given. With a contrast, it ranks them, and `by` does not. Experts that
    are `constant` already, by (layer, expert), are none. `fixed` scores (X,) are the same for any
    questions; they go before `by`.
    """

    boost_best: int = 0
    suppress_worst: int = 0
    by: str = "difference"
    min_appearances: float = MIN_APPEARANCES
    layers: tuple[int, ...] = ()
    contrast: "Contrast | None" = None
    constant: tuple[tuple[int, int], ...] = ()
    fixed: tuple[float, ...] | None = None

    def scores(self, records: Records, left_out: Collection[str] = ()) -> Array:
        """Score (X,) of every expert, NaN where it is no candidate or has none.

        Questions whose overlap hash is in `left_out` do not count.
        """
        records = records.less(left_out)
        if self.contrast is not None:
            score_X = self.contrast.scores(left_out)
        elif self.fixed is not None:
            score_X = np.array(self.fixed)
        else:
            score_X = SCORES[self.by](records)
        return np.where(self.candidates(records), score_X, np.nan)

    def candidates(self, records: Records) -> Array:
        """Which experts (X,) may be tilted at all."""
        layer_X = np.array([layer for layer, _ in places(records.blocks)])
        is_within_X = np.isin(layer_X, self.layers) if self.layers else np.full(len(layer_X), True)
        is_common_X = appearances(records) >= self.min_appearances
        is_own_X = np.array([place not in self.constant for place in places(records.blocks)])
        return np.asarray(is_within_X & is_common_X & is_own_X)

    def choose(self, records: Records, left_out: Collection[str] = ()) -> tuple[Pick, ...]:
        """The best, best first, then the worst, worst first; ties go to the lower id.

        Fewer where there are not so many candidates, and none is both.
        """
        score_X = self.scores(records, left_out)
        by_id = places(records.blocks)
        best_first = [int(x) for x in np.argsort(-score_X, kind="stable")]
        ranked = [x for x in best_first if not np.isnan(score_X[x])]
        best = ranked[: self.boost_best]
        worst = [int(x) for x in np.argsort(score_X, kind="stable") if x in ranked]
        worst = [x for x in worst if x not in best][: self.suppress_worst]
        return tuple(
            Pick(*by_id[x], sign) for sign, found in ((+1, best), (-1, worst)) for x in found
        )

    def looked_at(self, profile: Profile) -> frozenset[str]:
        """Hash lines of questions that rank experts besides those that are given."""
        if self.contrast is not None:
            sides = (self.contrast.wanted, self.contrast.unwanted)
            lines = [side.hash_N if side.line_N is None else side.line_N for side in sides]
            return frozenset(line for line_N in lines for line in line_N.tolist())
        return frozenset() if self.fixed is None else hashes(profiled_quiz(profile))

    def check(self, records: Records) -> None:
        """That there are as many candidates as are asked for.

        Raises:
            PlanError: there are not, or a layer does not exist.
        """
        n_layers = len(records.blocks)
        if outside := [layer for layer in self.layers if not 0 <= layer < n_layers]:
            raise PlanError(
                f"--layers {outside[0]}: the model has MoE layers 0 to {n_layers - 1} "
                "(layers are counted from 0)"
            )
        n_ranked = int((~np.isnan(self.scores(records))).sum())
        n_asked = self.boost_best + self.suppress_worst
        if n_ranked < n_asked:
            raise PlanError(
                f"{n_asked} experts are to be tilted, but only {n_ranked} appear in at least "
                f"{self.min_appearances:.1%} of {len(records):,} questions and have a score: ask "
                "for fewer, lower --min-appearances, or profile more questions"
            )


def difference(records: Records) -> Array:
    """How much better its questions go than others of their subjects.

    The z of Cochran, Mantel and Haenszel, not the raw difference, which is largest where there
    are few questions (design: §8).
    """
    return z_scores(records.counts)


def accuracy(records: Records) -> Array:
    """Share of right answers among the questions that activated each expert."""
    return joined([layer.accuracy_E for layer in records.layers])


def weighted_accuracy(records: Records) -> Array:
    """The same, each question weighted with the expert's α. arXiv:2502.17187."""
    return joined([layer.weighted_accuracy_E for layer in records.layers])


def contribution(records: Records) -> Array:
    """Mean share of the chosen experts' α, in percent, where chosen. arXiv:2502.17187."""
    return joined([layer.contribution_pct_E for layer in records.layers])


def appearances(records: Records) -> Array:
    """Share of questions that activated each expert."""
    return joined([layer.appearances_E for layer in records.layers])


def gate_mass(records: Records) -> Array:
    """Mean α over all questions."""
    return joined([layer.alpha_mean_E for layer in records.layers])


SCORES = {
    f.__name__: f
    for f in (difference, accuracy, weighted_accuracy, contribution, appearances, gate_mass)
}


# Over every token, shots included: sums of a whole profile, which know nothing of right and wrong,
# so that a fold may be chosen by them.
TOKEN_SCORES = {
    "tokens": ("tokens", None),  # that chose each expert
    "token_weight": ("weight", None),  # Σ gate weight
    "output_norm": ("norm", "tokens"),  # mean ‖f‖ where chosen
    "weighted_output_norm": ("weighted_norm", "tokens"),  # mean weight·‖f‖ where chosen
}


def token_scores(profile: Profile, by: str) -> tuple[float, ...]:
    """A score of `TOKEN_SCORES` (X,), NaN where no token chose the expert.

    Raises:
        ProfileError: the profile was made with --stats answer.
    """
    total_LE, per_LE = (profile.token_sum(name) if name else None for name in TOKEN_SCORES[by])
    if total_LE is None:
        raise ProfileError(
            f"--by {by}: {profile.path} holds no all-token statistics (--stats answer): profile "
            "with --stats all"
        )
    score_LE = total_LE if per_LE is None else share(total_LE, per_LE)
    blocks = profile.info.model.blocks
    rows = [score_LE[layer, : block.experts] for layer, block in enumerate(blocks)]
    return tuple(float(value) for value in np.concatenate(rows))


@dataclass(frozen=True)
class Contrast:
    """Two sets of questions; an expert's score is how much more often the first activates it.

    The detection of SteerMoE (arXiv:2509.09660) and of Mixture of Tunable Experts
    (arXiv:2502.11096), at the answer position.
    """

    wanted: Records
    unwanted: Records

    def scores(self, left_out: Collection[str] = ()) -> Array:
        """Difference of activation rates (X,), NaN where a side has no question left."""
        rates = [appearances(side.less(left_out)) for side in (self.wanted, self.unwanted)]
        return np.asarray(rates[0] - rates[1])

    def less(self, hashes: Collection[str]) -> "Contrast":
        """Without the questions of these overlap hashes.

        Raises:
            SettingsError: no question is left of a side.
        """
        sides = (self.wanted.less(hashes), self.unwanted.less(hashes))
        if not all(map(len, sides)):
            raise SettingsError(
                "--contrast: a side has only questions that are held out: name other parts, or "
                "choose on all questions with --held-out 0"
            )
        return Contrast(*sides)


def read_contrast(expressions: Sequence[str], fingerprint: str) -> Contrast:
    """Two expressions `PROFILE`, `PROFILE@right`, `PROFILE@wrong` or `PROFILE@subject,subject`.

    Raises:
        ProfileError: no such profile, or an unfinished one.
        SettingsError: no question is left of one, or it is of another model.
    """
    return Contrast(*(_side(expression, fingerprint) for expression in expressions))


def _side(expression: str, fingerprint: str) -> Records:
    path, _, which = expression.partition("@")
    profile = load_profile(Path(path))
    if profile.info.model.fingerprint != fingerprint:
        raise SettingsError(
            f"--contrast {path} is a profile of another model, {profile.info.model.id}: "
            "take profiles of the model that is to be changed"
        )
    records = _part(profile, which, expression)
    if not len(records):
        raise SettingsError(f"--contrast {expression} leaves no question: name another part")
    return records


def _part(profile: Profile, which: str, expression: str) -> Records:
    records = Records.of(profile, profiled_quiz(profile))
    if not which:
        return records
    if which in ("right", "wrong"):
        return records.part(records.is_correct_N == (which == "right"))
    subjects = [name.strip() for name in which.split(",")]
    if unknown := [name for name in subjects if name not in profile.info.quiz.subjects]:
        raise SettingsError(
            f"--contrast {expression}: {unknown[0]!r} is no subject of that profile: write right, "
            f"wrong or some of {', '.join(list(profile.info.quiz.subjects)[:3])}, …"
        )
    return records.part(np.isin(records.subject_N, subjects))
