"""The stage behind `sweep`: scores every cut of a grid in one loaded model."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from expertcut.checkpoints.build import (
    check_declared,
    engine_as_profiled,
    fit_edits,
    profiled_source,
)
from expertcut.checkpoints.edit import simulated
from expertcut.checkpoints.held_out_check import NOT_REACHED
from expertcut.checkpoints.sequential import rank_sequentially
from expertcut.checkpoints.size import size_of_cut, size_of_cuts
from expertcut.data import Quiz
from expertcut.edits.criteria import CRITERIA
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import EditPlan
from expertcut.edits.selection import cut, empty_draft, rank
from expertcut.edits.splits import Questions, questions_for, used_hashes
from expertcut.errors import ContractError
from expertcut.evaluation import search_results as schema
from expertcut.evaluation.ablation import observed
from expertcut.evaluation.cell_search import CellSearch, Step
from expertcut.evaluation.results import ChosenOnResult, Scoring, profile_hash
from expertcut.evaluation.sweep_judges import Cell, Cut, TextScoring, judge_of
from expertcut.models.load import LoadOptions
from expertcut.profiling.blend import Blend
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.statistics import Answers, share
from expertcut.profiling.storage import (
    Profile,
    ProfilePart,
    TextPart,
    TextProfile,
    load_profile,
)
from expertcut.profiling.workers import Progress
from expertcut.scoring.passes import OnPass

_MIN_WEIGHT = 0.01  # of an answer's gate weights: less may be lost in rounding
_MIN_ANSWERS = 0.05  # of all answers


class SweepRun(CellSearch[schema.Sweep]):
    """A sweep of one profiled model; `sweep` holds the finished cells."""

    file_name = schema.SWEEP_FILE

    def __init__(
        self,
        profile: Profile,
        grid: schema.Grid,
        settings: CutSettings,
        scoring: Scoring | TextScoring,
    ) -> None:
        blocks, measured = profile.info.model.blocks, profile.info.settings
        grid.check(blocks, settings)
        check_declared(profile, settings.layout)
        self.profile, self.grid, self.settings = profile, grid, settings
        self.scoring = scoring
        self.waits = scoring.options.waits
        source = profiled_source(profile)
        self.size_of = size_of_cuts(source, settings.layout, blocks[0].experts)
        drafts = [empty_draft(settings.updated(by=by), "", "", by) for by in grid.by]
        used = frozenset().union(*(used_hashes(d, _questions(profile, d)) for d in drafts))
        self.engine = engine_as_profiled(profile, source, scoring.load_as)
        options = MeasureOptions("none", measured.batch_tokens, measured.threads, self.waits)
        self.judge = judge_of(self.engine.moe, scoring, options)
        overlap = self.judge.n_used(used)
        chosen_on = ChosenOnResult(split=profile.info.quiz.split, overlap=overlap)
        layout_options = LAYOUTS[settings.layout].options
        judged = self.judge.request()
        judged["scored"] = judged["scored"].called(profile.info.model.id)
        request = schema.SweepRequest(
            **judged,
            profile=profile_hash(profile.info),
            by=grid.by,
            fractions=grid.fractions,
            **settings.model_dump(include={"budget", "min_keep", "positions", "layout", "seed"}),
            removed=drafts[0].removed if "removed" in layout_options else None,
            fold=drafts[0].fold if "fold" in layout_options else None,
            protect=tuple(settings.protect),
            sequential=settings.sequential or None,
            chosen_by=_n_choosing(profile),
            blend=profile.key if isinstance(profile, Blend) else None,
        )
        self.sweep = schema.Sweep(asked=request, chosen_on=chosen_on)

    def steps(self, folder: Path) -> Iterator[Step]:
        """The unedited model, then every cell that the folder lacks; each is saved when done."""
        is_resumed = self.resume(folder)
        # Criteria that need no model are ranked first: they fail before anything runs.
        run_the_model = {by for by in self.grid.by if CRITERIA[by].needs_model}
        if self.settings.sequential:
            run_the_model = {*self.grid.by}
        at_once = {by: self._cuts(by) for by in self.grid.by if by not in run_the_model}
        if not is_resumed:
            self.note(folder, {})  # by every process: it claims the folder
        store = folder / "cells"
        yield from self.base_step(folder)
        for by in self.grid.by:
            cuts = at_once[by] if by in at_once else self._cuts(by)
            for fraction, draft in cuts.items():
                kept = {name: edit.keep for name, edit in draft.edits.items()}
                # Hashed, so that cells of other experts or another kind of removal never mix.
                content = repr((kept, draft.layout, draft.removed, draft.fold)).encode()
                name = f"{draft.slug}-{hashlib.sha256(content).hexdigest()[:8]}"
                yield Step(f"{fraction:g} by {by}", partial(self._run, draft, store, name))
                if self.waits:
                    cell = self._cell(by, fraction, draft, store, name)
                    finished = {(c.by, c.fraction): c for c in (*self.sweep.cells, cell)}
                    in_order = product(self.grid.by, self.grid.fractions)
                    cells = tuple(finished[key] for key in in_order if key in finished)
                    best = self.judge.best(store, self.sweep.model_copy(update={"cells": cells}))
                    self.note(folder, {"cells": cells, **best})

    def _cuts(self, by: str) -> dict[float, EditPlan]:
        missing = [f for f in self.grid.fractions if self.sweep.cell(by, f) is None]
        if not missing:
            return {}
        settings = self.settings.updated(by=by)
        ranking = rank(self.profile, settings, self.engine if CRITERIA[by].needs_model else None)
        drafts = {}
        for fraction in missing:
            n_keep, own = self.grid.n_keep(fraction, ranking.blocks, settings), ranking
            if settings.sequential:
                own = rank_sequentially(self.profile, ranking, n_keep, self.engine)
            drafts[fraction] = cut(own, n_keep).draft
        return drafts

    def _run(self, draft: EditPlan, store: Path, name: str, on_pass: OnPass) -> Iterator[Progress]:
        edits = fit_edits(self.profile, draft, _questions(self.profile, draft), self.engine)
        with simulated(self.engine.moe, edits, is_as_written=True):
            yield from self.judge.run(store, name, on_pass)

    def _cell(self, by: str, fraction: float, draft: EditPlan, store: Path, name: str) -> Cell:
        numbers = draft.numbers
        assert numbers is not None
        kept = {block: numbers.kept(block, edit.keep) for block, edit in draft.edits.items()}
        cut_size = size_of_cut(self.engine.moe, draft, self.size_of(draft))
        cell = self.judge.cell(store, name, cut_size, Cut(by, fraction, kept))
        if cell.is_unchanged and self._must_change(draft):
            raise ContractError(NOT_REACHED.format(f"{fraction:g} by {by}"))
        return cell

    def _must_change(self, draft: EditPlan) -> bool:
        """Whether what judges is like what was profiled, and the cut removes what that used."""
        if isinstance(self.scoring, TextScoring):
            return self.scoring.is_held_out and removes_used_by_tokens(self.profile, draft)
        return removes_used_experts(self.profile, draft)


def _n_choosing(profile: Profile) -> int | None:
    """Questions and rows that choose; None if none is held out."""
    if not any(isinstance(part, ProfilePart | TextPart) for part in profile.parts):
        return None
    return sum(
        len(part.array("tokens_N")) if isinstance(part, TextProfile) else len(part.subjects())
        for part in profile.parts
    )


def _questions(profile: Profile, draft: EditPlan) -> Questions:
    """The same questions as `prune` uses."""
    return questions_for(profile, is_fitting=draft.asks_tuning, used=draft.used)


Watch = Callable[[Callable[[OnPass], Iterator[Progress]], str, int, Path], object]


def simulate(
    profile: Profile, plan: EditPlan, quiz: Quiz, load_as: LoadOptions, folder: Path, watch: Watch
) -> tuple[Answers, Answers]:
    """Answers of the unedited model, and of the same loaded model with the plan applied.

    The folder receives the chunks of both runs; `watch` runs what it is given. A plan that changes
    nothing is a ContractError.
    """
    measured = profile.info.settings
    engine = engine_as_profiled(profile, profiled_source(profile), load_as)
    options = MeasureOptions("none", measured.batch_tokens, measured.threads)
    measurement = Measurement(engine.moe, quiz, None, options)
    base, edited = folder / "base", folder / "edited"
    watch(partial(measurement.run, base), "the unedited model", len(quiz), base)
    edits = fit_edits(profile, plan, _questions(profile, plan), engine)

    def run(on_pass: OnPass) -> Iterator[Progress]:
        with observed(simulated(engine.moe, edits, is_as_written=True), on_pass) as both:
            yield from measurement.run(edited, both)

    watch(run, "the plan", len(quiz), edited)
    before, after = load_profile(base).answers, load_profile(edited).answers
    if removes_used_experts(profile, plan) and np.array_equal(before.logprob_NC, after.logprob_NC):
        raise ContractError(NOT_REACHED.format("the plan"))
    return before, after


def removes_used_experts(profile: Profile, plan: EditPlan) -> bool:
    """Whether a stock cut removes experts that answers used, so that some answer must change."""
    is_of_texts = any(isinstance(part, TextProfile) for part in profile.parts)
    if LAYOUTS[plan.layout].keeps_rows or is_of_texts:
        return False
    chosen_NLK = profile.array("chosen_NLK")
    share_NLK = np.abs(profile.array("weight_NLK"))
    share_NLK = share(share_NLK, share_NLK.sum(axis=2, keepdims=True), 0.0)
    is_hit_N = np.zeros(len(chosen_NLK), dtype=bool)
    for layer, block in enumerate(profile.info.model.blocks):
        is_removed_NK = ~np.isin(chosen_NLK[:, layer], plan.edits[block.name].keep)
        is_hit_N |= (is_removed_NK & (share_NLK[:, layer] > _MIN_WEIGHT)).any(axis=1)
    return bool(is_hit_N.mean() >= _MIN_ANSWERS)


def removes_used_by_tokens(profile: Profile, plan: EditPlan) -> bool:
    """Whether a stock cut removes experts that tokens used, so that some loss must change."""
    tokens_LE = profile.token_sum("tokens")
    if LAYOUTS[plan.layout].keeps_rows or tokens_LE is None:
        return False
    for tokens_E, block in zip(tokens_LE, profile.info.model.blocks, strict=True):
        n_removed = tokens_E[list(plan.edits[block.name].removed(block.experts))].sum()
        if n_removed >= _MIN_ANSWERS * tokens_E.sum() > 0:
            return True
    return False
