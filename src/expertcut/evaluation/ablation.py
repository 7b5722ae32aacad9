"""The stage behind `audit`: ablates experts one at a time and scores how criteria predict it."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from expertcut import stats
from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.checkpoints.edit import simulated
from expertcut.checkpoints.export import WRITERS
from expertcut.checkpoints.prune_edit import PruneEdit
from expertcut.data import round_robin
from expertcut.data.corpus import Corpus, as_quiz, hash_lines, without
from expertcut.data.sources import fifth_of
from expertcut.edits.criteria import CRITERIA, read_criteria
from expertcut.edits.edit_settings import AuditSettings, read_fractions
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, expert_ids, plan_model
from expertcut.edits.reweight_select import Array
from expertcut.edits.selection import as_numbers, normalised, rank
from expertcut.edits.splits import questions_for
from expertcut.errors import ContractError, PlanError, ProfileError
from expertcut.evaluation import search_results as schema
from expertcut.evaluation.ablation_effects import Ablations, ablations_of, request_of
from expertcut.evaluation.cell_search import load_earlier
from expertcut.evaluation.results import profile_hash
from expertcut.models.load import LoadOptions
from expertcut.profiling.locks import alone
from expertcut.profiling.measure import decided, engine_settings, is_writer
from expertcut.profiling.storage import Profile
from expertcut.profiling.workers import Progress
from expertcut.scoring.packing import Pass
from expertcut.scoring.passes import OnPass

logger = logging.getLogger(__name__)
DRAWS = 2_000


def sample_experts(n_experts: Sequence[int], sample: int, seed: int) -> list[tuple[int, int]]:
    """`sample` random (layer, expert) pairs or all, sorted, spread evenly over the layers."""
    rng = np.random.default_rng(seed)
    quota = [0] * len(n_experts)
    left = min(sample, sum(n_experts))
    while left:
        open_layers = [layer for layer, n in enumerate(n_experts) if quota[layer] < n]
        turn = rng.permutation(open_layers)[:left]
        for layer in turn.tolist():
            quota[layer] += 1
        left -= len(turn)
    drawn = [rng.choice(n, k, replace=False) for n, k in zip(n_experts, quota, strict=True)]
    return [(layer, int(e)) for layer, own in enumerate(drawn) for e in sorted(own.tolist())]


def evaluate_criterion(
    by: str,
    ranks: schema.CriterionRank,
    effects: Sequence[schema.Effect],
    fractions: Sequence[float],
    seed: int,
) -> schema.CriterionEvaluation:
    """How well one criterion predicts the effects of X ablated experts."""
    of_each = [(effect.layer, effect.logprob, effect.accuracy) for effect in effects]
    layer_X, logprob_X, accuracy_X = map(np.array, zip(*of_each, strict=True))
    score_X, share_X = np.array(ranks.score), np.array(ranks.share)
    return schema.CriterionEvaluation(
        by=by,
        within=correlation(score_X, logprob_X, layer_X, seed),
        overall=correlation(share_X, logprob_X, np.zeros_like(layer_X), seed),
        within_accuracy=correlation(score_X, accuracy_X, layer_X, seed),
        regrets=tuple(
            regret(np.array(ranks.place), logprob_X, layer_X, fraction) for fraction in fractions
        ),
    )


def correlation(score_X: Array, effect_X: Array, group_X: Array, seed: int) -> schema.Correlation:
    """Spearman's ρ within groups, with its interval; p is by shuffling effects within them."""
    score_1X, effect_1X = (ranks_within(x_X[None], group_X) for x_X in (score_X, effect_X))
    rho = float(stats.pearson(score_1X, effect_1X)[0])
    if len(score_X) < 3 or not np.isfinite(rho):
        return schema.Correlation(rho=None, ci95=None)
    # Σ (experts − 1) over the groups in which both ranks vary.
    own = [group_X == group for group in np.unique(group_X)]
    freedom = sum(int(o.sum()) - 1 for o in own if score_1X[0, o].any() and effect_1X[0, o].any())
    shuffled_B = stats.pearson(score_1X, effect_1X[0, _shuffles(group_X, seed)])
    return schema.Correlation(
        rho=rho,
        ci95=interval(rho, freedom),
        # Sums in another order differ in their last bits.
        p=float((1 + (shuffled_B >= rho - 1e-9).sum()) / (1 + DRAWS)),
    )


def interval(rho: float, freedom: int) -> tuple[float, float]:
    """95 % interval of a rank correlation, by Fisher's z.

    The variance (1 + ρ²/2)/(n − 3) is Bonett and Wright's (2000), Psychometrika 65:23. They
    subtract one mean of ranks, here one per layer, so n − 1 becomes the degrees of freedom. ρ = ±1
    counts as 1 − 1/freedom, because a few pairs in the same order show no perfect correlation.
    """
    most = 1 - 1 / freedom
    shrunk = min(max(rho, -most), most)
    half = stats.Z95 * math.sqrt((1 + shrunk**2 / 2) / max(freedom - 2, 1))
    low, high = math.tanh(math.atanh(shrunk) - half), math.tanh(math.atanh(shrunk) + half)
    return min(low, rho), max(high, rho)


def ranks_within(values_BX: Array, group_X: Array) -> Array:
    """Centred ranks among the experts of the same group."""
    ranks_BX = np.empty(values_BX.shape)
    for group in np.unique(group_X):
        is_own_X = group_X == group
        ranks_BX[:, is_own_X] = stats.centred_ranks(values_BX[:, is_own_X])
    return ranks_BX


def regret(place_X: Array, effect_X: Array, layer_X: Array, fraction: float) -> schema.BudgetRegret:
    """Regret where this fraction of each layer's sampled experts stays."""
    removed, chosen, least, random = 0, 0.0, 0.0, 0.0
    for layer in np.unique(layer_X):
        of_layer = np.flatnonzero(layer_X == layer)
        n_removed = len(of_layer) - round(fraction * len(of_layer))
        by_place = effect_X[of_layer][np.argsort(-place_X[of_layer], kind="stable")]
        removed += n_removed
        chosen += float(by_place[:n_removed].sum())
        least += float(np.sort(by_place)[:n_removed].sum())
        random += n_removed * float(by_place.mean())
    return schema.BudgetRegret(
        fraction=fraction, removed=removed, chosen=chosen, least=least, random=random
    )


def _shuffles(group_X: Array, seed: int) -> Array:
    """Indices (B, X) with the experts of each group in random order."""
    rng = np.random.default_rng(seed)
    drawn_BX = np.empty((DRAWS, len(group_X)), dtype=np.int64)
    for group in np.unique(group_X):
        own = np.flatnonzero(group_X == group)
        drawn_BX[:, own] = rng.permuted(np.tile(own, (DRAWS, 1)), axis=1)
    return drawn_BX


class AuditRun:
    """An audit of one loaded model; `audit` holds the results so far."""

    def __init__(self, profile: Profile, settings: AuditSettings, load_as: LoadOptions) -> None:
        self.profile, self.settings = profile, settings
        self.by = read_criteria(settings.by)
        self.fractions = read_fractions(settings.fractions, "--fractions")
        self.blocks, layout = profile.info.model.blocks, settings.layout
        for block in self.blocks:
            if block.experts <= block.top_k and not LAYOUTS[layout].keeps_rows:
                raise PlanError(
                    f"{block.name} routes each token to all of its {block.experts} experts: "
                    "none can be removed"
                )
        source = profiled_source(profile)
        WRITERS[layout].check(source, is_cutting=True)
        is_fitting = any(CRITERIA[by].needs == "calibration" for by in self.by)
        questions = questions_for(profile, is_fitting=is_fitting, n_held_out=settings.questions)
        self.held_out = questions.held_out
        if not len(self.held_out):
            if isinstance(self.held_out, Corpus):
                raise ProfileError(f"{questions.why_unscored}: profile more documents")
            fifth = fifth_of(as_quiz(questions.tuning))
            self.held_out = round_robin(fifth, settings.questions)
        used = hash_lines(questions.profiled) | questions.inherited
        if is_fitting:
            used |= hash_lines(questions.tuning)
        self.overlap = len(self.held_out) - len(without(self.held_out, used))
        self.engine = engine_as_profiled(profile, source, load_as)
        # Without those of the unedited model.
        n_ablations = min(settings.sample, sum(block.experts for block in self.blocks))
        self.n_questions = len(self.held_out) * n_ablations
        self.unit = "documents" if isinstance(self.held_out, Corpus) else "questions"

    def run(self, folder: Path, on_pass: OnPass) -> Iterator[Progress]:
        """Ablates every sampled expert that the folder lacks, and saves each result."""
        info = self.profile.info
        request = schema.AuditRequest(
            model=plan_model(info.model),
            settings=engine_settings(self.engine, info.settings.stats, info.settings.truncate),
            profile=profile_hash(info),
            **request_of(self.engine, self.held_out),
            by=self.by,
            fractions=self.fractions,
            **self.settings.model_dump(include={"positions", "layout", "sample", "seed"}),
        )
        moe = self.engine.moe
        find = partial(load_earlier, folder / schema.AUDIT_FILE, schema.Audit, request)
        earlier = decided(moe, find)
        if earlier is not None and earlier.verdicts:
            self.audit = earlier
            return
        with alone(folder, "audit") if is_writer(moe) else nullcontext():
            earlier = decided(moe, find)  # another run may have ended since
            if earlier is not None and earlier.is_complete:
                self.audit = earlier  # only the verdicts are missing
            else:
                ablations = ablations_of(self.engine, self.held_out)
                self.audit = earlier or self._begin(request, ablations)
                self._rank(folder)
                yield from self._remove(ablations, folder, on_pass)
            verdicts = tuple(
                evaluate_criterion(by, ranks, self.audit.harms, self.fractions, self.settings.seed)
                for by, ranks in self.audit.standings.items()
            )
            self._save(folder, self.audit.model_copy(update={"verdicts": verdicts}))

    def _save(self, folder: Path, audit: schema.Audit) -> None:
        self.audit = audit
        if is_writer(self.engine.moe):
            audit.save(folder / schema.AUDIT_FILE)

    def _begin(self, request: schema.AuditRequest, ablations: Ablations) -> schema.Audit:
        numbers = expert_ids(self.profile)
        # A table of token ids chooses the experts of hashed blocks: they cannot be removed.
        n_experts = [0 if block.is_hashed else block.experts for block in self.blocks]
        sampled = tuple(
            schema.SampledExpert(
                layer=layer, row=row, expert=numbers.number(self.blocks[layer].name, row)
            )
            for layer, row in sample_experts(n_experts, request.sample, request.seed)
        )
        return schema.Audit(
            asked=request,
            overlap=self.overlap,
            **ablations.unedited(),
            sampled=sampled,
            standings={},
        )

    def _rank(self, folder: Path) -> None:
        """Ranks by each criterion; of `all`, those that the profile cannot serve are only logged.

        Those that need no model come first: they fail before anything is saved.
        """
        sampled, ranks = self.audit.sampled, dict(self.audit.standings)
        for name in sorted(self.by, key=lambda by: CRITERIA[by].needs_model):
            if name in ranks:
                continue
            needed = self.engine if CRITERIA[name].needs_model else None
            try:
                ranking = rank(self.profile, self.settings.cut_by(name), needed)
            except (ContractError, ProfileError) as error:
                if self.settings.by != "all":
                    raise
                logger.warning("%s is left out: %s", name, error)
                continue
            numbers = [as_numbers(score_E) for score_E in ranking.scores]
            shares = [normalised(score_E) for score_E in ranking.scores]
            ranks[name] = schema.CriterionRank(
                score=tuple(float(numbers[s.layer][s.row]) for s in sampled),
                share=tuple(float(shares[s.layer][s.row]) for s in sampled),
                place=tuple(ranking.orders[s.layer].index(s.row) for s in sampled),
            )
            ordered = {name: ranks[name] for name in self.by if name in ranks}
            self.audit = self.audit.model_copy(update={"standings": ordered})
            if needed is not None:
                self._save(folder, self.audit)
        if not ranks:
            raise ProfileError(f"{self.profile.path} can serve none of {', '.join(self.by)}")
        self._save(folder, self.audit)

    def _remove(self, ablations: Ablations, folder: Path, on_pass: OnPass) -> Iterator[Progress]:
        n_each, n_before = len(self.held_out), len(self.audit.harms)
        total, started = len(self.audit.sampled), time.monotonic()
        is_masked = not LAYOUTS[self.settings.layout].keeps_rows
        if n_before:
            yield Progress(n_before * n_each, total * n_each, 0)
        for done, expert in enumerate(self.audit.sampled[n_before:], start=n_before + 1):
            change = observed(self._without(expert), on_pass)
            effect = ablations.effect(expert, change, is_masked=is_masked)
            harms = (*self.audit.harms, effect)
            self._save(folder, self.audit.model_copy(update={"harms": harms}))
            n_here, elapsed_s = done - n_before, time.monotonic() - started
            left_s = elapsed_s * (total - done) / n_here
            yield Progress(done * n_each, total * n_each, n_here * n_each, 0, elapsed_s, left_s)

    def _without(self, expert: schema.SampledExpert) -> AbstractContextManager[OnPass]:
        """The unedited model without one expert, as the layout removes it."""
        settings, moe = self.settings, self.engine.moe
        name = self.blocks[expert.layer].name
        edits = {block.name: BlockEdit(keep=tuple(range(block.experts))) for block in self.blocks}
        edits[name] = BlockEdit(keep=tuple(r for r in edits[name].keep if r != expert.row))
        is_exact = LAYOUTS[settings.layout].keeps_rows
        nothing_D = torch.zeros(moe.blocks[expert.layer].width)
        constants = {name: {expert.row: nothing_D}} if is_exact else {}
        edit = PruneEdit(edits, settings.layout, constants=constants)
        return simulated(moe, [edit], is_as_written=False)


@contextmanager
def observed(change: AbstractContextManager[OnPass], on_pass: OnPass) -> Iterator[OnPass]:
    """The change, which also reports each pass."""
    with change as begin:

        def begin_and_report(step: Pass) -> None:
            begin(step)
            on_pass(step)

        yield begin_and_report
