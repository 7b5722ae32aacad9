"""Calibration passes of the unedited model: bias directions, gate rescaling, mean outputs.

A direction v with v·h ≈ 1 on a router's inputs h, so that a gate row can carry a bias. OLMoE's gate
has no bias, so layout `stock` adds b·v to the expert's row. v is the ridge solution (E[hhᵀ] + λI)⁻¹
E[h], rescaled to mean v·h = 1. A bias for answer positions alone wants 1 there and 0 elsewhere,
both kinds of tokens weighing the same: then E[h] is over answer positions, and E[hhᵀ] is the sum of
both kinds'. (Fitted on answer positions alone, v·h is anything elsewhere: see docs/log.md.) The fit
is judged on other questions by 1 − mean((target − v·h)²): with a constant target the usual R² is
undefined.

How much the gate weights of the kept experts grow where the removed ones' rows are cut. Without the
removed experts the softmax's denominator shrinks, so weights grow by 1 / (1 − Σ removed α). The
fold of an expert is the mean of 1 − Σ removed α over the tokens that chose it, or over all tokens
where none did: multiplied into its output, it undoes the mean growth.

What a block's experts give on stored tokens, so that removals can be tried one after another.
With the legend of `models`: a Gram matrix (E, E) per token holds the inner products of all experts'
outputs, from which the change of the block's output follows for any gate weights.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.data import Quiz, round_robin
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ContractError
from expertcut.models.hooks import (
    ExpertCall,
    Routing,
    observe_experts,
    observe_routers,
    own_forward,
    replaced_forward,
)
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.statistics import layer_statistics
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import Pass
from expertcut.scoring.router_bias import ApplyAt, Tilts, tilted

CALIBRATION_QUESTIONS = 512
Hear = Callable[[Routing, Tensor], None]
_RIDGE = 1e-4  # of the mean eigenvalue of E[hhᵀ]
Array = np.ndarray[Any, Any]
# By block name and expert id: which experts, and what each gives (D,).
Removed = Mapping[str, Collection[int]]
Constants = Mapping[str, Mapping[int, Tensor]]
MOST_TOKENS = 1024
KEPT_BYTES = 256 << 20  # of all layers' inputs, and again of one layer's Gram matrices
_SCRATCH_BYTES = 64 << 20


def collect_routing(engine: Engine, quiz: Quiz, layers: Collection[int], hear: Hear) -> None:
    """Tells what a router did and which of its T tokens are answer positions, pass by pass.

    Tensors come on the CPU. Tokens that the questions of a chunk share come once.
    """
    current: list[Pass] = []

    def see(routing: Routing) -> None:
        step = current[-1]
        is_answer_T = torch.zeros(len(routing.input_TD), dtype=torch.bool)
        is_answer_T[step.answers_N] = True
        valid_T = slice(None) if step.valid_T is None else step.valid_T
        tensors = {
            name: getattr(routing, name).cpu()[valid_T]
            for name in ("input_TD", "logits_TE", "weights_TK", "experts_TK")
        }
        hear(replace(routing, **tensors), is_answer_T[valid_T])

    blocks = [block for block in engine.moe.blocks if block.layer in layers]
    with observe_routers(blocks, see):
        ask(engine, quiz, lambda step: current.__setitem__(slice(None), [step]))


@dataclass(frozen=True)
class Fit:
    """How near v·h is to its target on questions that v was not fitted on.

    `quality` is over all that v was fitted for, `quality_answer` over answer positions, where the
    target is 1 in any case; means and standard deviations are those of v·h.
    """

    layer: int
    quality: float
    quality_answer: float
    mean_answer: float
    std_answer: float
    mean_elsewhere: float
    std_elsewhere: float


@dataclass
class _DirectionSums:
    """Running Σ hhᵀ, Σ h and count, in float64."""

    outer_DD: Tensor | float = 0.0
    total_D: Tensor | float = 0.0
    n_tokens: int = 0

    def add(self, h_TD: Tensor) -> None:
        self.outer_DD = self.outer_DD + h_TD.T @ h_TD
        self.total_D = self.total_D + h_TD.sum(dim=0)
        self.n_tokens += len(h_TD)


@dataclass
class _Moments:
    """One layer's router inputs, at answer positions and elsewhere."""

    answer: _DirectionSums = field(default_factory=_DirectionSums)
    elsewhere: _DirectionSums = field(default_factory=_DirectionSums)

    def add(self, routing: Routing, is_answer_T: Tensor) -> None:
        h_TD = routing.input_TD.double()
        self.answer.add(h_TD[is_answer_T])
        self.elsewhere.add(h_TD[~is_answer_T])

    def direction_D(self, apply_at: ApplyAt) -> Tensor:
        a, b = self.answer, self.elsewhere
        if apply_at == "all":
            n_tokens = a.n_tokens + b.n_tokens
            outer_DD = (a.outer_DD + b.outer_DD) / n_tokens
            mean_D = (a.total_D + b.total_D) / n_tokens
        else:
            outer_DD = a.outer_DD / a.n_tokens + b.outer_DD / max(b.n_tokens, 1)
            mean_D = a.total_D / a.n_tokens
        assert isinstance(outer_DD, Tensor) and isinstance(mean_D, Tensor)
        ridge = _RIDGE * outer_DD.diagonal().mean()
        v_D: Tensor = torch.linalg.solve(outer_DD + ridge * torch.eye(len(mean_D)), mean_D)
        return v_D / (v_D @ mean_D)


@dataclass
class _Products:
    """v·h of every token of one layer."""

    v_D: Tensor
    answer: list[Tensor] = field(default_factory=list)
    elsewhere: list[Tensor] = field(default_factory=list)

    def add(self, routing: Routing, is_answer_T: Tensor) -> None:
        product_T = routing.input_TD.double() @ self.v_D
        self.answer.append(product_T[is_answer_T])
        self.elsewhere.append(product_T[~is_answer_T])


def fit_directions(
    engine: Engine, tuning: Quiz, layers: Collection[int], apply_at: ApplyAt = "all"
) -> dict[int, Tensor]:
    """V (D,) float64 per layer, fitted on every distinct token of at most 512 questions.

    Raises:
        ContractError: a router whose logits are more than its gate matrix times its input.
    """
    for block in engine.moe.blocks:
        if block.layer in layers and not block.is_linear:
            raise ContractError(
                f"{block.name}: its router caps or scales its logits, so nothing that is added to "
                "its gate matrix moves a logit by just a bias: boost and suppress are not "
                "supported here"
            )
    moments = {layer: _Moments() for layer in layers}
    few = round_robin(tuning, CALIBRATION_QUESTIONS)
    collect_routing(
        engine,
        few,
        moments,
        lambda routing, is_answer_T: moments[routing.layer].add(routing, is_answer_T),
    )
    return {layer: m.direction_D(apply_at) for layer, m in moments.items()}


def judge_directions(
    engine: Engine, held_out: Quiz, directions: dict[int, Tensor], apply_at: ApplyAt = "all"
) -> list[Fit]:
    """How well each v holds on questions that it was not fitted on."""
    products = {layer: _Products(v_D) for layer, v_D in directions.items()}
    collect_routing(
        engine,
        held_out,
        products,
        lambda routing, is_answer_T: products[routing.layer].add(routing, is_answer_T),
    )
    return [
        _fit(layer, torch.cat(p.answer), torch.cat(p.elsewhere), apply_at)
        for layer, p in products.items()
    ]


def _fit(layer: int, answer_N: Tensor, elsewhere_T: Tensor, apply_at: ApplyAt) -> Fit:
    if apply_at == "all":
        loss = ((1 - torch.cat([answer_N, elsewhere_T])) ** 2).mean()
    else:
        loss = (((1 - answer_N) ** 2).mean() + (elsewhere_T**2).mean()) / 2
    return Fit(
        layer=layer,
        quality=float(1 - loss),
        quality_answer=float(1 - ((1 - answer_N) ** 2).mean()),
        mean_answer=float(answer_N.mean()),
        std_answer=float(answer_N.std(correction=0)),
        mean_elsewhere=float(elsewhere_T.mean()),
        std_elsewhere=float(elsewhere_T.std(correction=0)),
    )


def fold_at_answers(
    profile: Profile,
    edits: Mapping[str, BlockEdit],
    left_out: Collection[tuple[str, int]] = (),
) -> dict[int, Array]:
    """Folds (kept,) per layer that needs them, from a profile's answer positions.

    Questions in `left_out` (subject and row) do not count, so that they can judge the result.
    """
    names = zip(profile.subjects(), profile.array("row_N").tolist(), strict=True)
    is_used_N = np.array([name not in left_out for name in names])
    alpha_NLE = profile.array("alpha_NLE")[is_used_N]
    folds = {}
    for layer in layer_statistics(profile):
        block = profile.info.model.blocks[layer.layer]
        keep = list(edits[block.name].keep)
        if not block.inflates or len(keep) == block.experts:
            continue
        sums = _GateSums(keep, block.experts)
        alpha_NE = alpha_NLE[:, layer.layer, : block.experts].astype(np.float64)
        sums.add(torch.from_numpy(alpha_NE), torch.from_numpy(layer.is_activated_NE[is_used_N]))
        folds[layer.layer] = sums.folds()
    return folds


def fold_over_tokens(
    engine: Engine, tuning: Quiz, edits: Mapping[str, BlockEdit]
) -> dict[int, Array]:
    """The same from every distinct token of at most 512 questions."""
    blocks = {b.layer: b for b in engine.moe.blocks if _needs_fold(b, edits[b.name])}
    sums = {
        layer: _GateSums(list(edits[block.name].keep), block.n_experts)
        for layer, block in blocks.items()
    }

    def hear(routing: Routing, _is_answer_T: Tensor) -> None:
        alpha_TE = blocks[routing.layer].alpha(routing.logits_TE).double()
        chosen_TE = torch.zeros_like(alpha_TE, dtype=torch.bool)
        sums[routing.layer].add(alpha_TE, chosen_TE.scatter(1, routing.experts_TK, True))

    if sums:
        collect_routing(engine, round_robin(tuning, CALIBRATION_QUESTIONS), sums, hear)
    return {layer: found.folds() for layer, found in sums.items()}


def _needs_fold(block: MoeBlock, edit: BlockEdit) -> bool:
    return block.inflates and len(edit.keep) < block.n_experts


class _GateSums:
    """Running sums of 1 − Σ removed α, over the tokens that chose each kept expert and over all."""

    def __init__(self, keep: list[int], n_experts: int) -> None:
        self.keep = torch.tensor(keep)
        self.is_removed_E = torch.ones(n_experts, dtype=torch.bool)
        self.is_removed_E[self.keep] = False
        self.by_expert = torch.zeros(len(keep), dtype=torch.float64)
        self.n_by_expert = torch.zeros(len(keep), dtype=torch.float64)
        self.total, self.n_tokens = 0.0, 0

    def add(self, alpha_TE: Tensor, chosen_TE: Tensor) -> None:
        left_T = 1 - alpha_TE[:, self.is_removed_E].sum(dim=1)
        chosen_TE = chosen_TE[:, self.keep].double()
        self.by_expert += left_T @ chosen_TE
        self.n_by_expert += chosen_TE.sum(dim=0)
        self.total += float(left_T.sum())
        self.n_tokens += len(left_T)

    def folds(self) -> Array:
        mean_E = self.by_expert / self.n_by_expert.clamp(min=1)
        overall = self.total / self.n_tokens
        folds: Array = torch.where(self.n_by_expert > 0, mean_E, overall).numpy()
        return folds


def zero_outputs(removed: Removed, width: int) -> dict[str, dict[int, Tensor]]:
    """Zeros (D,) for every removed expert."""
    return {block: {e: torch.zeros(width) for e in ids} for block, ids in removed.items()}


def mean_outputs(engine: Engine, quiz: Quiz, removed: Removed) -> dict[str, dict[int, Tensor]]:
    """Mean output (D,) of each removed expert over the tokens that chose it, zeros where none did.

    It is what the expert gave before its gate weight, summed in float64. Every distinct token of
    at most 512 questions counts.
    """
    sums = _OutputSums(removed)
    blocks = [block for block in engine.moe.blocks if block.name in removed]
    names = {block.layer: block.name for block in blocks}
    with observe_experts(blocks, lambda call: sums.add(names[call.layer], call)):
        ask(engine, round_robin(quiz, CALIBRATION_QUESTIONS), sums.start)
    width = int(engine.moe.model.config.get_text_config().hidden_size)
    means = zero_outputs(removed, width)
    for (block, expert), (total_D, n_tokens) in sums.by_expert.items():
        means[block][expert] = total_D / n_tokens
    return means


class _OutputSums:
    """Sums of the removed experts' outputs and how many there were; pads are left out."""

    def __init__(self, removed: Removed) -> None:
        self.removed = removed
        self.by_expert: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self.valid_T: Tensor | None = None

    def start(self, step: Pass) -> None:
        """Before each forward pass."""
        self.valid_T = step.valid_T

    def add(self, block: str, call: ExpertCall) -> None:
        """One expert's outputs in that pass."""
        if call.expert not in self.removed[block]:
            return
        output_MD = call.output_MD
        if self.valid_T is not None:
            output_MD = output_MD[self.valid_T.to(output_MD.device)[call.tokens_M]]
        if not len(output_MD):
            return
        total_D, n_tokens = self.by_expert.get((block, call.expert), (torch.zeros(()), 0))
        total_D = total_D + output_MD.double().sum(dim=0).cpu()
        self.by_expert[block, call.expert] = (total_D, n_tokens + len(output_MD))


class Tried:
    """A block on stored tokens, all its experts run on all of them once."""

    @torch.inference_mode()
    def __init__(self, block: MoeBlock, x_TD: Tensor) -> None:
        self.block = block
        self.x_TD = x_TD.to(next(block.router.parameters()).device)
        self.route, own_TD = _own_calls(block, self.x_TD)
        n_rows = max(1, _SCRATCH_BYTES // (block.n_experts * x_TD.shape[1] * 8))
        parts = zip(self.x_TD.split(n_rows), own_TD.split(n_rows), strict=True)
        self.gram_TEE = torch.cat([_gram(block, *rows) for rows in parts])
        self.gate_TE = self._gates(())

    @torch.inference_mode()
    def change(self, removed: tuple[int, ...]) -> float:
        """Mean ‖Δy‖² over the tokens, these experts cut and the tokens routed anew."""
        delta_TE = self._gates(removed) - self.gate_TE
        return float(torch.einsum("te,tef,tf->t", delta_TE, self.gram_TEE, delta_TE).mean())

    def _gates(self, removed: tuple[int, ...]) -> Tensor:
        """Gate weights (T, E) by the model's own router, float64, 0 where not chosen."""
        bias_E = torch.zeros(self.block.n_experts)
        bias_E[list(removed)] = -torch.inf
        with tilted([self.block], Tilts({self.block.layer: bias_E} if removed else {})):
            _, weights_TK, experts_TK = self.route()
        nothing_TE = torch.zeros(len(self.x_TD), len(bias_E), dtype=torch.float64)
        return nothing_TE.scatter(1, experts_TK.cpu(), weights_TK.double().cpu())


def keep_inputs(engine: Engine, quiz: Quiz) -> dict[int, Tensor]:
    """Inputs (T, D) of every block, by layer, at the same T tokens.

    They are drawn from all distinct tokens of at most 512 questions, at most 1,024 and no more than
    `KEPT_BYTES` hold.
    """
    draw = _Draw(_n_tokens(engine))
    layers = {block.layer for block in engine.moe.blocks}
    collect_routing(engine, round_robin(quiz, CALIBRATION_QUESTIONS), layers, draw.see)
    return draw.kept


def _n_tokens(engine: Engine) -> int:
    blocks = engine.moe.blocks
    width = int(engine.moe.model.config.get_text_config().hidden_size)
    n_experts = max(block.n_experts for block in blocks)
    by_inputs = KEPT_BYTES // (len(blocks) * width * engine.moe.dtype.itemsize)
    return max(1, min(MOST_TOKENS, by_inputs, KEPT_BYTES // (n_experts**2 * 8)))


class _Draw:
    """Keeps the inputs of the T tokens with the smallest of seeded random keys, pass by pass."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.generator = torch.Generator().manual_seed(0)
        self.keys = torch.empty(0)
        self.kept: dict[int, Tensor] = {}
        self.stays = torch.empty(0, dtype=torch.long)
        self.seen: set[int] = set()

    def see(self, routing: Routing, _is_answer_T: Tensor) -> None:
        """One router's tokens; the first of a pass draws for all."""
        if not self.seen or routing.layer in self.seen:
            self.seen = set()
            self._draw(len(routing.input_TD))
        self.seen.add(routing.layer)
        before = self.kept.get(routing.layer, routing.input_TD[:0])
        n_before = len(before)
        is_old_T = self.stays < n_before
        rows = (before[self.stays[is_old_T]], routing.input_TD[self.stays[~is_old_T] - n_before])
        self.kept[routing.layer] = torch.cat(rows)

    def _draw(self, n_new: int) -> None:
        keys = torch.cat([self.keys, torch.rand(n_new, generator=self.generator)])
        n_kept = min(self.n_tokens, len(keys))
        self.stays = keys.topk(n_kept, largest=False).indices.sort().values
        self.keys = keys[self.stays]


def _gram(block: MoeBlock, x_RD: Tensor, own_RD: Tensor) -> Tensor:
    """Inner products (R, E, E) of what all experts add to the block's output, float64."""
    n_rows, n_experts = len(x_RD), block.n_experts
    device = next(block.experts.parameters()).device
    forward = own_forward(block.experts)
    rows = own_RD.to(device)
    # Experts that work in another width are followed by a projection.
    is_projected = own_RD.shape[1] != x_RD.shape[1]
    nothing_RD = _given(block, x_RD, torch.zeros_like(rows)) if is_projected else torch.zeros(())
    outputs = []
    for expert in range(n_experts):
        chosen_R1 = torch.full((n_rows, 1), expert, device=device)
        output_RD = forward(rows, chosen_R1, rows.new_ones(n_rows, 1))
        if is_projected:
            output_RD = _given(block, x_RD, output_RD)
        outputs.append(output_RD.double().cpu() - nothing_RD)
    f_RED = torch.stack(outputs, dim=1)
    return f_RED @ f_RED.transpose(1, 2)


def _given(block: MoeBlock, x_RD: Tensor, output_RW: Tensor) -> Tensor:
    """What the block gives, (R, D) float64, where its experts give this."""
    with replaced_forward(block.experts, lambda *_: output_RW):
        found = block.module(x_RD[None])
    y_RD: Tensor = (found[0] if isinstance(found, tuple) else found)[0]
    return y_RD.double().cpu()


def _own_calls(block: MoeBlock, x_TD: Tensor) -> tuple[Callable[[], Any], Tensor]:
    """The router on these tokens as its block calls it, and what the block gives its experts.

    A router may want another rank than (T, D), and more than the tokens; experts may want what a
    projection makes of them.
    """
    calls: list[tuple[Any, ...]] = []
    given: list[Tensor] = []

    def nothing(own_TD: Tensor, *_: Any) -> Tensor:
        given.append(own_TD)
        return torch.zeros_like(own_TD)

    handle = block.router.register_forward_pre_hook(lambda _module, args: calls.append(args))
    try:
        with replaced_forward(block.experts, nothing):
            block.module(x_TD[None])
    finally:
        handle.remove()
    return lambda: block.router(*calls[0]), given[0]
