"""Which experts to reweight: scores of X, the experts of all blocks in order; admission gaps."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from expertcut.data import Quiz
from expertcut.data.sources import hash_lines
from expertcut.edits.edit_settings import ReweightSettings, read_layers
from expertcut.edits.plan import expert_ids
from expertcut.edits.splits import profiled_quiz
from expertcut.errors import PlanError, ProfileError, SettingsError
from expertcut.profiling.findings import logits
from expertcut.profiling.schema import BlockInfo, ModelInfo
from expertcut.profiling.significance import SubjectCounts, count_by_subject, z_scores
from expertcut.profiling.statistics import LayerStatistics, layers_of, share
from expertcut.profiling.storage import Profile, ProfilePart, load_profile

Array = np.ndarray[Any, Any]
MIN_APPEARANCES = 0.01
_SELECTION_BIAS = re.compile(r"(.*\.)?(e_score_correction_bias|expert_bias)")
_FARTHEST = 1e6  # logits; a bias beyond it reaches nothing that a smaller one does not
_EXACT = 1e-12  # logits


def admission_gap(
    block: BlockInfo,
    alpha_NE: Array,
    chosen_NK: Array,
    expert: int,
    selection_E: Array | None = None,
) -> float:
    """The bias on an expert's logit that raises its mean score to that of the lowest chosen expert.

    A routing score is α, or the logit in some families, plus the selection bias if there is one;
    means are over all questions. Infinite if no bias closes the gap, NaN if a hash table of token
    ids routes. Routing groups are ignored.
    """
    if block.is_hashed:
        return math.nan
    is_used_N = (chosen_NK >= 0).any(axis=1)  # a routing rule may leave places empty (−1)
    alpha_NE, chosen_NK = alpha_NE[is_used_N], chosen_NK[is_used_N]
    chosen_NK = np.where(chosen_NK < 0, chosen_NK.max(axis=1, keepdims=True), chosen_NK)
    alpha_NE, chosen_NK = alpha_NE.astype(np.float64), chosen_NK.astype(np.int64)
    ranked_NE = alpha_NE
    if block.selection == "logits":
        with np.errstate(divide="ignore"):
            ranked_NE = logits(block, alpha_NE)
    selection_E = np.zeros(alpha_NE.shape[1]) if selection_E is None else selection_E
    score_NK = np.take_along_axis(ranked_NE, chosen_NK, axis=1) + selection_E[chosen_NK]
    last_N = score_NK.min(axis=1) - selection_E[expert]
    if block.selection == "logits":
        return float((last_N - ranked_NE[:, expert]).mean())
    return _bias_to_mean(block, alpha_NE[:, expert], float(last_N.mean()))


def _bias_to_mean(block: BlockInfo, alpha_N: Array, goal: float) -> float:
    """The bias for which mean α is `goal`, by bisection; α increases with the bias.

    Under a softmax the other experts' sum is unchanged, so α moves as under a sigmoid.
    """
    from scipy.special import expit, logit  # slow import

    def distance(bias: float) -> float:
        if block.scoring == "sqrtsoftplus":
            with np.errstate(divide="ignore"):
                moved_N = np.sqrt(np.logaddexp(0, logits(block, alpha_N) + bias))
        else:
            moved_N = expit(logit(alpha_N) + bias)
        return float(moved_N.mean()) - goal

    here = float(alpha_N.mean()) - goal
    if here == 0:
        return 0.0
    sign = 1.0 if here < 0 else -1.0
    if distance(sign * _FARTHEST) * sign <= 0:
        return sign * math.inf
    low, high = 0.0, 1.0
    while distance(sign * high) * sign < 0:
        low, high = high, 2 * high
    while high - low > _EXACT * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if distance(sign * middle) * sign < 0 else (low, middle)
    return sign * high


def stored_selection(model: ModelInfo, layer: int) -> Array | None:
    """The selection bias (E,) of a profiled model's layer, read from its checkpoint."""
    block = model.blocks[layer]
    is_unknown = block.selection_bias is None and block.scoring != "softmax"
    if not block.selection_bias and not is_unknown:
        return None
    from safetensors import safe_open

    from expertcut.models.load import find_source  # with torch, which `show` does without

    source, number = find_source(model.id, model.revision), _number_in(block.name)
    tensors = source.even_quantized.tensors
    of_layer = {name: tensor for name, tensor in tensors.items() if _number_in(name) == number}
    own = [name for name, tensor in of_layer.items() if math.prod(tensor.shape) == block.experts]
    biases = [name for name in own if _SELECTION_BIAS.fullmatch(name)]
    # On disk some families call it by another name (DeepSeek-V4: ffn.gate.bias).
    biases = biases or [name for name in own if name.endswith("bias") and not is_unknown]
    if len(biases) == 1:
        with safe_open(tensors[biases[0]].file, framework="pt") as weights:
            values: Array = weights.get_tensor(biases[0]).double().reshape(-1).numpy()
        return values
    if not biases and is_unknown:
        return None
    raise PlanError(
        f"{source.path} holds {len(biases)} tensors that may be the bias which {block.name} adds "
        f"where experts are chosen, so there is no default strength: give one, as in {layer}:0=0.5"
    )


def _number_in(name: str) -> str | None:
    """The last number in a name: the decoder layer of a tensor that belongs to no single expert."""
    return next((part for part in reversed(name.split(".")) if part.isdecimal()), None)


def no_default_strength(layer: int, expert: int, sign: int, gap: float) -> str:
    """Why a gap cannot be the strength to boost (`sign` +1) or suppress (−1) an expert."""
    name = f"expert {expert} of layer {layer}"
    if math.isnan(gap):
        return f"a table of token ids chooses the experts of layer {layer}, whatever their logits"
    if not math.isfinite(gap) and gap * sign > 0:
        way = "lifts" if sign > 0 else "lowers"
        return f"no bias on its logit {way} {name} to the last expert let in on average"
    state = "admitted" if sign > 0 else "left out"
    return f"{name} is {state} on average already (admission gap {gap:+.4f})"


@dataclass(frozen=True)
class QuestionOutcomes:
    """N questions and the unedited model's answers and routing at their answer positions."""

    blocks: tuple[BlockInfo, ...]
    subject_N: Array
    hash_N: Array  # overlap hashes, by which repeats are found
    answer_N: Array
    logprob_NC: Array
    alpha_NLE: Array
    chosen_NLK: Array
    selection_of: Callable[[int], Array | None] = lambda layer: None  # the bias (E,) of a layer
    line_N: Array | None = None  # both hashes of each

    @classmethod
    def of(cls, profile: Profile, quiz: Quiz) -> Self:
        """A profile's records of the questions of a quiz; ProfileError if it lacks one."""
        names = zip(profile.subjects(), profile.array("row_N").tolist(), strict=True)
        place = {name: n for n, name in enumerate(names)}
        try:
            rows_N = np.array([place[q.subject, q.row] for q in quiz])
        except KeyError as error:
            raise ProfileError(f"{profile.path} did not ask question {error}") from None
        return cls(
            blocks=profile.info.model.blocks,
            subject_N=np.array([q.subject for q in quiz]),
            hash_N=np.array([q.overlap_hash for q in quiz]),
            answer_N=np.array([q.answer for q in quiz]),
            logprob_NC=profile.array("choice_logprob_NC")[rows_N],
            alpha_NLE=profile.array("alpha_NLE")[rows_N],
            chosen_NLK=profile.array("chosen_NLK")[rows_N],
            selection_of=partial(stored_selection, profile.info.model),
            line_N=np.array([q.hash_line for q in quiz]),
        )

    def __len__(self) -> int:
        return len(self.answer_N)

    def part(self, which_N: Array) -> Self:
        """Some of the questions, by index or mask."""
        names = [f.name for f in fields(self) if f.name.endswith(("_N", "_NC", "_NLE", "_NLK"))]
        arrays = {name: getattr(self, name) for name in names}
        return replace(self, **{k: v[which_N] for k, v in arrays.items() if v is not None})

    def less(self, hashes: Collection[str]) -> Self:
        """Without the questions of these overlap hashes."""
        return self.part(~np.isin(self.hash_N, list(hashes))) if hashes else self

    @cached_property
    def is_correct_N(self) -> Array:
        """Whether the best choice is the right one; ties go to the first."""
        return right(self.logprob_NC, self.answer_N)

    @cached_property
    def layers(self) -> list[LayerStatistics]:
        """The paper's statistics over these questions."""
        return layers_of(self.blocks, self.alpha_NLE, self.chosen_NLK, self.is_correct_N)

    @cached_property
    def counts(self) -> SubjectCounts:
        """By subject and expert."""
        is_activated_NX = np.concatenate([x.is_activated_NE for x in self.layers], axis=1)
        return count_by_subject(self.subject_N.tolist(), self.is_correct_N, is_activated_NX)


def right(logprob_NC: Array, answer_N: Array) -> Array:
    """Right answers (N,) bool; ties go to the first choice."""
    return np.asarray(logprob_NC.argmax(axis=1) == answer_N)


def places(blocks: Sequence[BlockInfo]) -> list[tuple[int, int]]:
    """(layer, expert) of each of X."""
    return [(layer, e) for layer, block in enumerate(blocks) for e in range(block.experts)]


class SelectedExpert(NamedTuple):
    """An expert to boost (`sign` +1) or to suppress (−1)."""

    layer: int
    expert: int
    sign: int


@dataclass(frozen=True)
class Chooser:
    """How many of the best experts to boost and of the worst to suppress, and the score."""

    boost_best: int = 0
    suppress_worst: int = 0
    by: str = "difference"
    min_appearances: float = MIN_APPEARANCES  # least share of questions that use a candidate
    layers: tuple[int, ...] = ()  # of the candidates; empty: any
    contrast: "Contrast | None" = None  # takes the place of `by`
    constant: tuple[tuple[int, int], ...] = ()  # (layer, expert) that are never candidates
    fixed: tuple[float, ...] | None = None  # scores (X,) for `by`, whatever the questions

    def scores(self, records: QuestionOutcomes, left_out: Collection[str] = ()) -> Array:
        """Scores (X,) without questions of these overlap hashes, NaN for others than candidates."""
        records = records.less(left_out)
        if self.contrast is not None:
            score_X = self.contrast.scores(left_out)
        elif self.fixed is not None:
            score_X = np.array(self.fixed)
        else:
            score_X = SCORES[self.by](records)
        return np.where(self.candidates(records), score_X, np.nan)

    def candidates(self, records: QuestionOutcomes) -> Array:
        """Which experts (X,) are candidates."""
        is_own_X = [
            place not in self.constant and (not self.layers or place[0] in self.layers)
            for place in places(records.blocks)
        ]
        return np.array(is_own_X) & (appearances(records) >= self.min_appearances)

    def choose(
        self, records: QuestionOutcomes, left_out: Collection[str] = ()
    ) -> tuple[SelectedExpert, ...]:
        """The best, best first, then the worst, worst first; ties go to the lower id.

        Fewer if there are too few candidates; no expert is in both lists.
        """
        score_X, by_id = self.scores(records, left_out), places(records.blocks)
        n_ranked = int((~np.isnan(score_X)).sum())  # NaN comes last in every order
        best: list[int] = np.argsort(-score_X, kind="stable")[:n_ranked].tolist()[: self.boost_best]
        worst: list[int] = np.argsort(score_X, kind="stable")[:n_ranked].tolist()
        worst = [x for x in worst if x not in best][: self.suppress_worst]
        signs = dict.fromkeys(best, +1) | dict.fromkeys(worst, -1)
        return tuple(SelectedExpert(*by_id[x], sign) for x, sign in signs.items())

    def looked_at(self, profile: Profile) -> frozenset[str]:
        """Hash lines of further questions that rank the experts."""
        if self.contrast is None:
            return frozenset() if self.fixed is None else hash_lines(profiled_quiz(profile))
        lines = [side.hash_N if side.line_N is None else side.line_N for side in self.contrast]
        return frozenset(np.concatenate(lines).tolist())

    def check(self, records: QuestionOutcomes) -> None:
        """Raises a PlanError for too few candidates, or a layer that does not exist."""
        n_layers = len(records.blocks)
        if outside := [layer for layer in self.layers if not 0 <= layer < n_layers]:
            raise PlanError(
                f"--layers {outside[0]}: the model has MoE layers 0 to {n_layers - 1} "
                "(layers are counted from 0)"
            )
        n_ranked = int((~np.isnan(self.scores(records))).sum())
        n_wanted = self.boost_best + self.suppress_worst
        if n_ranked < n_wanted:
            raise PlanError(
                f"{n_wanted} experts are to be tilted, but only {n_ranked} appear in at least "
                f"{self.min_appearances:.1%} of {len(records):,} questions and have a score: ask "
                "for fewer, lower --min-appearances, or profile more questions"
            )


def _by_layer(records: QuestionOutcomes, name: str) -> Array:
    """An array (E,) of `LayerStatistics`, of all layers together (X,)."""
    return np.concatenate([getattr(x, name).astype(np.float64) for x in records.layers])


appearances = partial(_by_layer, name="appearances_E")  # share of questions that activated each
# The difference is the z of Cochran, Mantel and Haenszel, within subjects: the raw difference is
# largest where there are few questions.
SCORES: dict[str, Callable[[QuestionOutcomes], Array]] = {
    "difference": lambda records: z_scores(records.counts),
    "accuracy": partial(_by_layer, name="accuracy_E"),
    "weighted_accuracy": partial(_by_layer, name="weighted_accuracy_E"),
    "contribution": partial(_by_layer, name="contribution_pct_E"),
    "appearances": appearances,
    "gate_mass": partial(_by_layer, name="alpha_mean_E"),
}

# Over every token, shots included: sums of a whole profile, which know nothing of right and wrong,
# so that a fold may be chosen by them.
TOKEN_SCORES = {
    "tokens": ("tokens", None),  # that chose each expert
    "token_weight": ("weight", None),  # Σ gate weight
    "output_norm": ("norm", "tokens"),  # mean ‖f‖ where chosen
    "weighted_output_norm": ("weighted_norm", "tokens"),  # mean weight·‖f‖ where chosen
}


class Contrast(NamedTuple):
    """Two sets of questions; an expert's score is how much more often the first activates it.

    The detection of SteerMoE (arXiv:2509.09660) and of Mixture of Tunable Experts
    (arXiv:2502.11096), at the answer position.
    """

    wanted: QuestionOutcomes
    unwanted: QuestionOutcomes

    def scores(self, left_out: Collection[str] = ()) -> Array:
        """Difference of activation rates (X,), NaN where a side has no question left."""
        wanted_X, unwanted_X = (appearances(side.less(left_out)) for side in self)
        return np.asarray(wanted_X - unwanted_X)

    def less(self, hashes: Collection[str]) -> "Contrast":
        """Without the questions of these overlap hashes; SettingsError if a side has no other."""
        sides = [side.less(hashes) for side in self]
        if not all(map(len, sides)):
            raise SettingsError(
                "--contrast: a side has only questions that are held out: name other parts, or "
                "choose on all questions with --held-out 0"
            )
        return Contrast(*sides)


def read_contrast(expressions: Sequence[str], fingerprint: str) -> Contrast:
    """Two expressions `PROFILE`, `PROFILE@right`, `PROFILE@wrong` or `PROFILE@subject,subject`."""
    sides = []
    for expression in expressions:
        path, _, which = expression.partition("@")
        profile = load_profile(Path(path))
        if profile.info.model.fingerprint != fingerprint:
            raise SettingsError(
                f"--contrast {path} is a profile of another model, {profile.info.model.id}: "
                "take profiles of the model that is to be changed"
            )
        records = QuestionOutcomes.of(profile, profiled_quiz(profile))
        if which in ("right", "wrong"):
            records = records.part(records.is_correct_N == (which == "right"))
        elif which:
            names, known = [name.strip() for name in which.split(",")], profile.info.quiz.subjects
            if unknown := [name for name in names if name not in known]:
                raise SettingsError(
                    f"--contrast {expression}: {unknown[0]!r} is not a subject of that profile: "
                    f"write right, wrong or some of {', '.join(list(known)[:3])}, …"
                )
            records = records.part(np.isin(records.subject_N, names))
        if not len(records):
            raise SettingsError(f"--contrast {expression} leaves no question: name another part")
        sides.append(records)
    return Contrast(*sides)


def check_settings(settings: ReweightSettings) -> None:
    """Raises a SettingsError for options that do not go together, or an unknown score."""
    settings.check()
    names = (*SCORES, *TOKEN_SCORES)
    if settings.by is not None and settings.by not in names:
        raise SettingsError(f"--by {settings.by} is not a score: take one of {', '.join(names)}")


def chooser_of(profile: Profile, settings: ReweightSettings) -> Chooser:
    """The number, the score and the candidates that the settings say."""
    least, by = settings.min_appearances, settings.by or "difference"
    contrast = fixed = None
    if by in TOKEN_SCORES:  # NaN where no token chose the expert
        total_LE, per_LE = (profile.token_sum(name) if name else None for name in TOKEN_SCORES[by])
        if total_LE is None:
            raise ProfileError(
                f"--by {by}: {profile.path} holds no all-token statistics (--stats answer): "
                "profile with --stats all"
            )
        score_LE = total_LE if per_LE is None else share(total_LE, per_LE)
        fixed = tuple(float(score_LE[place]) for place in places(profile.info.model.blocks))
    if settings.contrast is not None:
        contrast = read_contrast(settings.contrast, profile.info.model.fingerprint)
        if isinstance(profile, ProfilePart):
            held_out = profiled_quiz(profile, is_held_out=True)
            contrast = contrast.less({q.overlap_hash for q in held_out})
    return Chooser(
        boost_best=settings.boost_best,
        suppress_worst=settings.suppress_worst,
        by=by,
        min_appearances=MIN_APPEARANCES if least is None else least,
        layers=read_layers(settings.layers),
        contrast=contrast,
        fixed=fixed,
        constant=tuple(
            (layer, row)
            for layer, block in enumerate(profile.info.model.blocks)
            for row in sorted(expert_ids(profile).constant.get(block.name, ()))
        ),
    )
