"""The stage behind `route --sweep`: scores every setting of the rules in one loaded model."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.checkpoints.size import size_with
from expertcut.data.corpus import CalibrationSet, hash_lines
from expertcut.edits.route_fit import fit_errors
from expertcut.edits.route_settings import CALIBRATED, RouteSetting, RouteSettings
from expertcut.edits.route_thresholds import GateSample, sample_gates
from expertcut.edits.splits import questions_for
from expertcut.errors import ContractError, SettingsError
from expertcut.evaluation import route_results as schema
from expertcut.evaluation.ablation import correlation
from expertcut.evaluation.cell_search import CellSearch, Step
from expertcut.evaluation.results import ChosenOnResult, Scoring, profile_hash
from expertcut.evaluation.sweep_judges import TextScoring, judge_of
from expertcut.models.routing_rule import RULE_KINDS, ErrorCoefficients
from expertcut.profiling.measure import MeasureOptions
from expertcut.profiling.storage import Profile, load_profile, read_chunk
from expertcut.profiling.workers import Progress
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Pass
from expertcut.scoring.passes import OnPass
from expertcut.scoring.rerouting import Rerouting, rerouted_engine
from expertcut.stats import Array

DRAWS = 20


class Rules:
    """The rules of some settings in a loaded model, with thresholds calibrated once."""

    def __init__(self, profile: Profile, engine: Engine, settings: RouteSettings) -> None:
        self.profile, self.engine, self.settings = profile, engine, settings

    @cached_property
    def samples(self) -> dict[str, GateSample]:
        """Of each rule that may be calibrated, its scores on the tuning questions."""
        rules = [rule for rule in self.settings.rules if rule in CALIBRATED]
        return sample_gates(self.engine, self._tuning, rules, self.settings.n_most, self.fits)

    @cached_property
    def fits(self) -> dict[int, ErrorCoefficients]:
        """By layer the fit of rule fitted, if it is one of them."""
        if "fitted" not in self.settings.rules:
            return {}
        return fit_errors(self.engine, self._tuning, self.settings.weights)

    @property
    def _tuning(self) -> CalibrationSet:
        return questions_for(self.profile, is_fitting=True).tuning

    def rerouting(self, setting: RouteSetting) -> Rerouting:
        """The rule with its thresholds by layer; a SettingsError where the model has no place."""
        layers = [block.layer for block in self.engine.moe.blocks]
        if setting.experts is not None and setting.rule in CALIBRATED:
            at_by_layer = self.samples[setting.rule].thresholds(
                setting.experts, is_shared=bool(setting.shared)
            )
        else:
            at_by_layer = dict.fromkeys(layers, 0.0 if setting.at is None else setting.at)
        n_experts = min(block.n_experts for block in self.engine.moe.blocks)
        rule = self.settings.rule_of(setting, n_experts)
        try:
            for block in self.engine.moe.blocks:
                rule.check_threshold(at_by_layer[block.layer])
                rule.check(block, at_by_layer[block.layer])
        except (ValueError, ContractError) as error:
            raise SettingsError(f"--rule {setting.rule}: {error}") from None
        fits = self.fits if setting.rule == "fitted" else {}
        return Rerouting(rule, at_by_layer, fits, setting.beta or 0.0)


def with_controls(
    settings: Sequence[RouteSetting], draws: int, matched: int
) -> tuple[RouteSetting, ...]:
    """The settings, draws of those that leave experts out, and draws of rule `random`."""
    own = [setting for setting in settings if setting.rule != "random"]
    dropping = [setting for setting in own if RULE_KINDS[setting.rule].effect != "chooses"]
    return (
        *own,
        *(s.model_copy(update={"draw": i}) for s in dropping for i in range(matched)),
        *(RouteSetting(rule="random", draw=i) for i in range(draws)),
    )


class RouteSweepRun(CellSearch[schema.RouteSweep]):
    """A sweep over rules of one profiled model; `sweep` holds the finished cells."""

    file_name = schema.ROUTE_FILE

    def __init__(
        self, profile: Profile, settings: RouteSettings, scoring: Scoring | TextScoring
    ) -> None:
        blocks, measured = profile.info.model.blocks, profile.info.settings
        draws = DRAWS if settings.draws is None else settings.draws
        choices = with_controls(settings.choices(blocks[0].top_k), draws, settings.matched)
        self.waits = scoring.options.waits
        self.engine = engine_as_profiled(profile, profiled_source(profile), scoring.load_as)
        options = MeasureOptions(
            *("none", measured.batch_tokens, measured.threads, self.waits), counts_experts=True
        )
        self.judge = judge_of(self.engine.moe, scoring, options)
        self.rules = Rules(profile, self.engine, settings)
        judged = self.judge.request()
        judged["scored"] = judged["scored"].called(profile.info.model.id)
        request = schema.RouteRequest(
            **judged,
            profile=profile_hash(profile.info),
            settings=choices,
            most=settings.n_most,
            **settings.model_dump(include={"weights", "level", "seed"}),
        )
        questions = questions_for(profile, is_fitting=True)
        used = frozenset(hash_lines(questions.tuning)) | questions.inherited
        overlap = self.judge.n_used(used)
        chosen_on = ChosenOnResult(split=questions.tuning.split, overlap=overlap)
        self.sweep = schema.RouteSweep(asked=request, chosen_on=chosen_on)

    def steps(self, folder: Path) -> Iterator[Step]:
        """The model as it is, then every setting that the folder lacks; each is saved when done."""
        is_resumed = self.resume(folder)
        settings = self.sweep.asked.settings
        missing = [setting for setting in settings if self.sweep.cell(setting) is None]
        # All settings are refused before anything runs but the pass that calibrates.
        routings = {setting: self.rules.rerouting(setting) for setting in missing}
        if not is_resumed:
            self.note(folder, {})  # by every process: it claims the folder
        yield from self.base_step(folder)
        store = folder / "cells"
        if self.waits:
            experts, _, _ = used_experts(store / "base")
            self.note(folder, {"base_experts": experts})
        for setting, routing in routings.items():
            name = f"{setting.slug}-{_digest(routing)}"
            title = " ".join(filter(None, (setting.rule, setting.label)))
            yield Step(title, partial(self._run, routing, store, name))
            if self.waits:
                finished = {cell.setting: cell for cell in self.sweep.cells}
                finished[setting] = self._cell(setting, routing, store, name)
                cells = tuple(finished[own] for own in settings if own in finished)
                self.note(folder, {"cells": cells})

    def _run(self, routing: Rerouting, store: Path, name: str, see: OnPass) -> Iterator[Progress]:
        with rerouted_engine(self.judge.engine, routing) as begin:

            def on_pass(step: Pass) -> None:
                begin(step)
                see(step)

            yield from self.judge.run(store, name, on_pass)

    def _cell(
        self, setting: RouteSetting, routing: Rerouting, store: Path, name: str
    ) -> schema.RouteCell | schema.RouteTextCell:
        n_runs = 2 if setting.rule == "contrast" else 1  # of every token, each counted
        experts, experts_L, by_subject = used_experts(store / name, n_runs)
        moe = self.engine.moe
        figures = self.judge.figures(store, name, size_with(moe, experts_L.tolist()))
        has_threshold = bool(routing.rule.kind.threshold)
        figures |= {
            "setting": setting,
            "thresholds": routing.thresholds if has_threshold else (),
            "experts_per_token": experts,
            "experts_by_layer": tuple(experts_L.tolist()),
            "experts_by_subject": by_subject,
        }
        if self.sweep.asked.text is not None:
            return schema.RouteTextCell(**figures)
        scored = load_profile(store / name)
        is_correct_N, subject_N = scored.answers.is_correct_N, np.array(scored.subjects())
        accuracies = {s: float(is_correct_N[subject_N == s].mean()) for s in by_subject}
        experts_S, right_S = (np.array([*own.values()]) for own in (by_subject, accuracies))
        together_S = np.zeros(len(right_S))  # one group
        found = correlation(experts_S.round(12), 1 - right_S, together_S, self.rules.settings.seed)
        return schema.RouteCell(**figures, accuracy_by_subject=accuracies, difficulty=found)


def _digest(routing: Rerouting) -> str:
    """A hash of all that answers with a rule depend on, besides the model."""
    content = repr((routing.rule, sorted(routing.at_by_layer.items())))
    content += repr(sorted(routing.fit_by_layer.items())) if routing.fit_by_layer else ""
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def used_experts(folder: Path, n_runs: int = 1) -> tuple[float, Array, dict[str, float]]:
    """Experts a token and layer: in all, by layer (L,), and by subject over its own tokens.

    Those of all runs, if each token was run several times.
    """
    info = load_profile(folder).info
    used_L, n_tokens = np.zeros(len(info.model.blocks)), 0
    by_subject: dict[str, list[float]] = {}
    for file, subject, n in info.chunks():
        chunk = read_chunk(folder / "chunks" / file, info.chunk_hash(file, subject))
        own_L, n_own = chunk["used_NL"].sum(axis=0, dtype=np.float64), int(chunk["tokens_N"].sum())
        sums = by_subject.setdefault(subject, [0.0, 0])
        sums[0] += float(own_L.mean())
        sums[1] += n_own
        # As if every prompt had been read alone.
        used_L += own_L + n * chunk["prefix_used_L"].astype(np.float64)
        n_tokens += n_own + n * int(chunk["prefix_tokens"][0])
    mean_L = n_runs * used_L / n_tokens
    own_means = {s: n_runs * used / own for s, (used, own) in by_subject.items()}
    return float(mean_L.mean()), mean_L, own_means
