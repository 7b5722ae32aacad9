"""The stages behind `route --tune` and `--oracle`: one loaded model, scored again and again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np

from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.data import Quiz
from expertcut.data.corpus import as_quiz
from expertcut.edits.reweight_select import QuestionOutcomes, right
from expertcut.edits.route_settings import RouteSetting, RouteSettings
from expertcut.edits.splits import questions_for
from expertcut.evaluation.cross_fit import deal
from expertcut.evaluation.holding import (
    HoldingResult,
    Tuning,
    cross_fit_holding,
    holding_result,
)
from expertcut.evaluation.oracle import oracle_gain, reader_gain
from expertcut.evaluation.results import Scoring
from expertcut.evaluation.reweight_search import CachedScorer
from expertcut.evaluation.route_results import OracleResult, OracleSetting
from expertcut.evaluation.route_sweep import DRAWS, Rules
from expertcut.models.load import LoadOptions
from expertcut.models.routing_rule import SEEDS, RoutingRule
from expertcut.profiling.measure import engine_settings
from expertcut.profiling.schema import ProfileInfo, quiz_info
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.rerouting import Rerouting, rerouted_engine
from expertcut.stats import Array, Comparison, compare

_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of dropped experts, for their number of flips
Report = Callable[[int, int], None]


class RuleScorer:
    """Log p of a quiz's choices under rules and their random controls; each result is cached."""

    def __init__(self, scorer: CachedScorer, rules: Rules) -> None:
        self.scorer, self.rules = scorer, rules
        self.blocks = scorer.engine.moe.blocks

    @property
    def records(self) -> QuestionOutcomes:
        """Answers of the model as it is."""
        return self.scorer.records

    def ruled(self, setting: RouteSetting) -> Array:
        """Log p (N, C) with a rule."""
        return self._scored(self.rules.rerouting(setting))

    def left_out(self, setting: RouteSetting, seed: int) -> Array:
        """Log p (N, C) with as many experts as a rule keeps, but random ones of the K."""
        routing = self.rules.rerouting(setting)
        rule = routing.rule.model_copy(update={"shuffle": True, "seed": seed % SEEDS})
        return self._scored(replace(routing, rule=rule))

    def dropped(self, share: float, seed: int) -> Array:
        """Log p (N, C) with a share of the experts left out at random, but not the best."""
        rule = RoutingRule(rule="dropout", weights=self.rules.settings.weights, seed=seed % SEEDS)
        return self._scored(Rerouting(rule, {block.layer: share for block in self.blocks}))

    def _scored(self, routing: Rerouting) -> Array:
        parts = (routing.at_by_layer, routing.fit_by_layer)
        name = (
            routing.rule.model_dump_json(),
            *(one for own in parts for one in sorted(own.items())),
        )
        return self.scorer.scored(name, 0, rerouted_engine(self.scorer.engine, routing))


@dataclass(frozen=True)
class RouteTuning:
    """The setting that was chosen on the tuning questions (None: the model as it is).

    `tried` has the change of every mean that was tried, on the same questions.
    """

    tuning: Quiz
    rule: str
    chosen: RouteSetting | None
    routing: Rerouting | None
    tried: dict[float, Comparison]
    base_accuracy: float
    proof: HoldingResult | None


def tune(
    profile: Profile, settings: RouteSettings, margin: float, load_as: LoadOptions,
    report: Report, folder: Path,
) -> RouteTuning:  # fmt: skip
    """Chooses the fewest experts that hold on the tuning questions, and cross-fits if asked."""
    means = settings.candidates(profile.info.model.blocks[0].top_k)
    tuning = as_quiz(questions_for(profile, is_fitting=True).tuning)
    engine = engine_as_profiled(profile, profiled_source(profile), load_as)
    rules = Rules(profile, engine, settings)
    scorer = RuleScorer(CachedScorer(engine, tuning, folder=folder), rules)
    records, (rule,) = scorer.records, settings.rules
    steps, tried = count(1), dict[float, Comparison]()

    def right_at(mean: float) -> Array:
        right_N = right(scorer.ruled(settings.calibrated(rule, mean)), records.answer_N)
        if mean not in tried:
            report(next(steps), 0)
        tried[mean] = compare(records.is_correct_N, right_N)
        return right_N

    def random_right_at(mean: float, draw: int) -> Array:
        setting = settings.calibrated(rule, mean)
        report(next(steps), 0)
        return right(scorer.left_out(setting, settings.seed + draw), records.answer_N)

    own = Tuning.of(
        records.is_correct_N, records.subject_N.tolist(), records.hash_N.tolist(), margin,
        settings.seed,
    )  # fmt: skip
    base_accuracy, proof = float(records.is_correct_N.mean()), None
    if settings.prove:
        draws = DRAWS if settings.draws is None else settings.draws
        found = cross_fit_holding(own, means, right_at, random_right_at, draws)
        mean = found.experts
        shared = " --shared" if settings.shared else ""
        procedure = f"route --rule {rule}{shared} --tune --margin {100 * margin:g}"
        proof = holding_result(
            found,
            base_accuracy,
            procedure,
            quiz=tuning.id,
            split=tuning.split,
            seed=settings.seed,
        )
    else:
        mean = own.choose(means, right_at, np.ones(len(records), dtype=bool))
    chosen = None if mean is None else settings.calibrated(rule, mean)
    routing = None if chosen is None else rules.rerouting(chosen)
    return RouteTuning(tuning, rule, chosen, routing, tried, base_accuracy, proof)


def calibrated(profile: Profile, settings: RouteSettings, load_as: LoadOptions) -> Rerouting:
    """The rule of settings that name one, with its thresholds; the model runs to calibrate them."""
    engine = engine_as_profiled(profile, profiled_source(profile), load_as)
    (choice,) = settings.choices(engine.moe.blocks[0].top_k)
    return Rules(profile, engine, settings).rerouting(choice)


def score_oracle(
    profile: Profile, settings: RouteSettings, scoring: Scoring, report: Report, folder: Path
) -> OracleResult:
    """Scores every setting, and as many noise variants as there are sets, on a quiz."""
    engine = engine_as_profiled(profile, profiled_source(profile), scoring.load_as)
    rules = Rules(profile, engine, settings)
    choices = settings.choices(engine.moe.blocks[0].top_k)
    scorer = RuleScorer(CachedScorer(engine, scoring.quiz, folder=folder), rules)
    records, n_sets = scorer.records, DRAWS if settings.draws is None else settings.draws
    n_steps = len(choices) + len(_SHARES) + n_sets * len(choices)
    steps = count(1)

    def told(logprob_NC: Array) -> Array:
        report(next(steps), n_steps)
        return logprob_NC

    answers_SN = np.array([told(scorer.ruled(one)).argmax(axis=1) for one in choices])
    base_N = records.logprob_NC.argmax(axis=1)
    flips_S = (answers_SN != base_N).sum(axis=1)
    flips_G = np.array(
        [(told(scorer.dropped(share, settings.seed)).argmax(axis=1) != base_N).sum()
         for share in _SHARES]
    )  # fmt: skip
    share_S = shares_for(flips_S, flips_G)
    noise_BSN = np.array(
        [
            [
                told(scorer.dropped(share, settings.seed + 1 + b * len(choices) + s)).argmax(axis=1)
                for s, share in enumerate(share_S)
            ]
            for b in range(n_sets)
        ]
    )
    return oracle_result(
        records,
        dict(zip(choices, answers_SN, strict=True)),
        noise_BSN,
        scored_info(profile, engine, scoring),
        settings.seed,
    )


def oracle_result(
    records: QuestionOutcomes,
    answers: Mapping[RouteSetting, Array],
    noise_BSN: Array,
    scored: ProfileInfo,
    seed: int,
) -> OracleResult:
    """The record of answers (N,) by setting, and of B sets of variants of each."""
    base_N, is_correct_N = records.logprob_NC.argmax(axis=1), records.is_correct_N
    right_SN = np.array([own_N == records.answer_N for own_N in answers.values()])
    gain = oracle_gain(is_correct_N, right_SN, noise_BSN == records.answer_N, seed)
    low, high = np.percentile(gain.noise_gain_B, [2.5, 97.5])
    fold_N = deal(records.subject_N.tolist(), records.hash_N.tolist(), seed)
    return OracleResult(
        scored=scored,
        questions=len(records),
        seed=seed,
        sets=len(noise_BSN),
        base_accuracy=float(is_correct_N.mean()),
        settings=tuple(
            OracleSetting(
                setting=setting,
                change=compare(is_correct_N, right_SN[place]),
                flips=int((own_N != base_N).sum()),
                noise_flips=float((noise_BSN[:, place] != base_N).sum(axis=1).mean()),
            )
            for place, (setting, own_N) in enumerate(answers.items())
        ),
        accuracy=gain.accuracy,
        gain=gain.gain,
        noise_gain=float(gain.noise_gain_B.mean()),
        range95=(float(low), float(high)),
        p=gain.p,
        excess=gain.excess,
        ci95=gain.ci95,
        verdict=gain.verdict,
        reader=reader_gain(is_correct_N, right_SN, figures_of(records), fold_N),
    )


def scored_info(profile: Profile, engine: Engine, scoring: Scoring) -> ProfileInfo:
    """What was scored, as a profile of it would say."""
    return ProfileInfo(
        model=profile.info.model,
        quiz=quiz_info(scoring.quiz, scoring.limit),
        settings=engine_settings(engine, "answer", scoring.quiz.truncate),
    )


def shares_for(flips_S: Array, flips_G: Array) -> tuple[float, ...]:
    """Shares of dropped experts that flip as many answers, by interpolation over `_SHARES`."""
    flips = np.maximum.accumulate(np.concatenate([[0], flips_G]))
    rising = np.concatenate([[True], np.diff(flips) > 0])
    shares = np.concatenate([[0.0], _SHARES])
    return tuple(np.interp(flips_S, flips[rising], shares[rising]).tolist())


def figures_of(records: QuestionOutcomes) -> Array:
    """What a reader knows beforehand (N, F): gate entropy by layer, and the answer's margin."""
    alpha_NLE = records.alpha_NLE.astype(np.float64)
    share_NLE = alpha_NLE / np.maximum(alpha_NLE.sum(axis=2, keepdims=True), 1e-30)
    entropy_NL = -(share_NLE * np.log(np.maximum(share_NLE, 1e-30))).sum(axis=2)
    best_NC = np.sort(records.logprob_NC, axis=1)
    return np.column_stack([entropy_NL, best_NC[:, -1] - best_NC[:, -2]])
