"""Calibration passes of the unedited model: bias directions, gate rescaling, mean outputs."""

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.data.corpus import CalibrationSet, round_robin
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ContractError
from expertcut.models import hooks
from expertcut.models.hooks import ExpertCall, Routing
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import Pass
from expertcut.scoring.router_bias import ApplyAt, Tilts, tilted
from expertcut.stats import Array

CALIBRATION_QUESTIONS = 512
_RIDGE = 1e-4  # of the mean eigenvalue of E[hhᵀ]
# By block name and expert id: which experts, and what each gives (D,).
Removed = Mapping[str, Collection[int]]
Constants = Mapping[str, Mapping[int, Tensor]]
MOST_TOKENS = 1024
KEPT_BYTES = 256 << 20  # of all layers' inputs, and again of one layer's Gram matrices
_SCRATCH_BYTES = 64 << 20


def collect_routing(
    engine: Engine,
    quiz: CalibrationSet,
    layers: Collection[int],
    see: Callable[[Routing, Tensor], None],
) -> None:
    """Calls `see` with each router's pass and which of its T tokens are answer positions.

    Tensors are on the CPU. A prefix that questions share is seen once.
    """
    current = deque[Pass](maxlen=1)

    def observe(routing: Routing) -> None:
        step = current[0]
        is_answer_T = torch.zeros(len(routing.input_TD), dtype=torch.bool)
        is_answer_T[step.answers_N] = True
        valid_T = slice(None) if step.valid_T is None else step.valid_T
        names = ("input_TD", "logits_TE", "weights_TK", "experts_TK")
        tensors = {name: getattr(routing, name).cpu()[valid_T] for name in names}
        see(replace(routing, **tensors), is_answer_T[valid_T])

    blocks = [block for block in engine.moe.blocks if block.layer in layers]
    with hooks.observe_routers(blocks, observe):
        ask(engine, quiz, current.append)


@dataclass(frozen=True)
class Fit:
    """1 − mean((target − v·h)²) on held-out questions, as R² is undefined for a target of 1."""

    layer: int
    quality: float  # over all fitted tokens
    quality_answer: float  # over answer positions, where the target is always 1
    mean_answer: float  # of v·h, as the others below
    std_answer: float
    mean_elsewhere: float
    std_elsewhere: float


@dataclass
class Moments:
    """Σ hhᵀ, Σ h and number of router inputs, in float64."""

    outer_DD: Tensor = field(default_factory=lambda: torch.zeros(()).double())
    total_D: Tensor = field(default_factory=lambda: torch.zeros(()).double())
    n_tokens: int = 0

    def add(self, h_TD: Tensor) -> None:
        """Adds the inputs of some tokens."""
        self.outer_DD = self.outer_DD + h_TD.T @ h_TD
        self.total_D = self.total_D + h_TD.sum(dim=0)
        self.n_tokens += len(h_TD)


def fit_directions(
    engine: Engine, tuning: CalibrationSet, layers: Collection[int], apply_at: ApplyAt = "all"
) -> dict[int, Tensor]:
    """V (D,) float64 per layer with v·h ≈ 1 on router inputs h: gate row + b·v adds a bias b.

    The ridge solution (E[hhᵀ] + λI)⁻¹ E[h], rescaled to mean v·h = 1, on the distinct tokens of at
    most 512 questions. At answer positions alone the target is 1 there and 0 elsewhere, both kinds
    of tokens with equal weight (why: docs/log.md).
    Raises ContractError: a router whose logits are more than its gate matrix times its input.
    """
    for block in engine.moe.blocks:
        if block.layer in layers and not block.is_linear:
            raise ContractError(
                f"{block.name}: its router caps or scales its logits, so nothing that is added to "
                "its gate matrix moves a logit by just a bias: boost and suppress are not "
                "supported here"
            )
    moments = {layer: (Moments(), Moments()) for layer in layers}  # at answers, and elsewhere

    def add(routing: Routing, is_answer_T: Tensor) -> None:
        h_TD, (answer, elsewhere) = routing.input_TD.double(), moments[routing.layer]
        answer.add(h_TD[is_answer_T])
        elsewhere.add(h_TD[~is_answer_T])

    collect_routing(engine, round_robin(tuning, CALIBRATION_QUESTIONS), layers, add)
    directions = {}
    for layer, (answer, elsewhere) in moments.items():
        if apply_at == "all":
            n_tokens = answer.n_tokens + elsewhere.n_tokens
            outer_DD = (answer.outer_DD + elsewhere.outer_DD) / n_tokens
            mean_D = (answer.total_D + elsewhere.total_D) / n_tokens
        else:
            outer_DD = answer.outer_DD / answer.n_tokens
            outer_DD = outer_DD + elsewhere.outer_DD / max(elsewhere.n_tokens, 1)
            mean_D = answer.total_D / answer.n_tokens
        ridge = _RIDGE * outer_DD.diagonal().mean()
        v_D = torch.linalg.solve(outer_DD + ridge * torch.eye(len(mean_D)), mean_D)
        directions[layer] = v_D / (v_D @ mean_D)
    return directions


def direction_quality(
    engine: Engine,
    held_out: CalibrationSet,
    directions: dict[int, Tensor],
    apply_at: ApplyAt = "all",
) -> list[Fit]:
    """Fit of each v on held-out questions."""
    products: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in directions}

    def add(routing: Routing, is_answer_T: Tensor) -> None:
        product_T = routing.input_TD.double() @ directions[routing.layer]
        products[routing.layer].append((product_T[is_answer_T], product_T[~is_answer_T]))

    collect_routing(engine, held_out, directions, add)
    fits = []
    for layer, pairs in products.items():
        answer_N, elsewhere_T = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        answer_loss = ((1 - answer_N) ** 2).mean()
        if apply_at == "all":
            loss = ((1 - torch.cat([answer_N, elsewhere_T])) ** 2).mean()
        else:
            loss = (answer_loss + (elsewhere_T**2).mean()) / 2
        fit = Fit(
            layer=layer,
            quality=float(1 - loss),
            quality_answer=float(1 - answer_loss),
            mean_answer=float(answer_N.mean()),
            std_answer=float(answer_N.std(correction=0)),
            mean_elsewhere=float(elsewhere_T.mean()),
            std_elsewhere=float(elsewhere_T.std(correction=0)),
        )
        fits.append(fit)
    return fits


def rescaling_at_answers(
    profile: Profile, edits: Mapping[str, BlockEdit], left_out: Collection[tuple[str, int]] = ()
) -> dict[int, Array]:
    """Factors (kept,) per layer that needs them, from answer positions not in `left_out`."""
    names = zip(profile.subjects(), profile.array("row_N").tolist(), strict=True)
    is_used_N = np.array([name not in left_out for name in names])
    alpha_NLE = profile.array("alpha_NLE")[is_used_N]
    folds = {}
    for layer, block in zip(profile.layers, profile.info.model.blocks, strict=True):
        keep = edits[block.name].keep
        if block.inflates and len(keep) < block.experts:
            sums = _GateSums(keep, block.experts)
            alpha_NE = alpha_NLE[:, layer.layer, : block.experts].astype(np.float64)
            sums.add(torch.from_numpy(alpha_NE), torch.from_numpy(layer.is_activated_NE[is_used_N]))
            folds[layer.layer] = sums.folds()
    return folds


def rescaling_over_tokens(
    engine: Engine, tuning: CalibrationSet, edits: Mapping[str, BlockEdit]
) -> dict[int, Array]:
    """The same from the distinct tokens of at most 512 questions."""
    cut = [b for b in engine.moe.blocks if b.inflates and len(edits[b.name].keep) < b.n_experts]
    blocks = {block.layer: block for block in cut}
    sums = {block.layer: _GateSums(edits[block.name].keep, block.n_experts) for block in cut}

    def add(routing: Routing, _is_answer_T: Tensor) -> None:
        alpha_TE = blocks[routing.layer].alpha(routing.logits_TE).double()
        nothing_TX = alpha_TE.new_zeros(len(alpha_TE), alpha_TE.shape[1] + 1, dtype=torch.bool)
        chosen_TX = nothing_TX.scatter(1, routing.experts_TK, True)  # the id E is nobody
        sums[routing.layer].add(alpha_TE, chosen_TX[:, :-1])

    if sums:
        collect_routing(engine, round_robin(tuning, CALIBRATION_QUESTIONS), sums, add)
    return {layer: own.folds() for layer, own in sums.items()}


class _GateSums:
    """Sums of 1 − Σ removed α, by which a softmax cut to the kept experts inflates gate weights.

    Over the tokens routed to each kept expert, and over all for those without tokens.
    """

    def __init__(self, keep: tuple[int, ...], n_experts: int) -> None:
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
        folds: Array = torch.where(self.n_by_expert > 0, mean_E, self.total / self.n_tokens).numpy()
        return folds


def mean_outputs(
    engine: Engine, quiz: CalibrationSet, removed: Removed
) -> dict[str, dict[int, Tensor]]:
    """Mean output (D,) of each removed expert over the tokens routed to it, zeros where none is.

    Outputs are before the gate weight, summed in float64 over the distinct tokens of at most 512
    questions.
    """
    blocks = [block for block in engine.moe.blocks if block.name in removed]
    names = {block.layer: block.name for block in blocks}
    sums: dict[tuple[str, int], tuple[Tensor, int]] = {}
    current = deque[Pass](maxlen=1)

    def add(call: ExpertCall) -> None:
        block, output_MD, valid_T = names[call.layer], call.output_MD, current[0].valid_T
        if valid_T is not None:
            output_MD = output_MD[valid_T.to(output_MD.device)[call.tokens_M]]
        if call.expert in removed[block] and len(output_MD):
            total_D, n_tokens = sums.get((block, call.expert), (torch.zeros(()), 0))
            total_D = total_D + output_MD.double().sum(dim=0).cpu()
            sums[block, call.expert] = (total_D, n_tokens + len(output_MD))

    with hooks.observe_experts(blocks, add):
        ask(engine, round_robin(quiz, CALIBRATION_QUESTIONS), current.append)
    means = {b.name: {e: torch.zeros(b.width) for e in removed[b.name]} for b in blocks}
    for (block, expert), (total_D, n_tokens) in sums.items():
        means[block][expert] = total_D / n_tokens
    return means


class RemovalTrial:
    """A block whose experts all ran once on all stored tokens, so that removals can be tried."""

    @torch.inference_mode()
    def __init__(self, block: MoeBlock, x_TD: Tensor) -> None:
        self.block = block
        self.x_TD = x_TD.to(next(block.router.parameters()).device)
        calls: list[tuple[Any, ...]] = []
        given: list[Tensor] = []

        def nothing(own_TD: Tensor, *_: Any) -> Tensor:
            given.append(own_TD)
            return torch.zeros_like(own_TD)

        # The block's own calls: routers may take another rank than (T, D) and further arguments,
        # experts a projection of the tokens.
        handle = block.router.register_forward_pre_hook(lambda _module, args: calls.append(args))
        with handle, hooks.replaced_forward(block.experts, nothing):
            block.run(self.x_TD[None])
        self.route, own_TD = partial(block.router, *calls[0]), given[0]
        n_rows = max(1, _SCRATCH_BYTES // (block.n_experts * x_TD.shape[1] * 8))
        parts = zip(self.x_TD.split(n_rows), own_TD.split(n_rows), strict=True)
        self.gram_TEE = torch.cat([_gram(block, *rows) for rows in parts])
        self.gate_TE = self.gates()

    @torch.inference_mode()
    def change(self, removed: tuple[int, ...]) -> float:
        """Mean ‖Δy‖² over the tokens, rerouted without these experts."""
        bias_E = torch.zeros(self.block.n_experts)
        bias_E[list(removed)] = -torch.inf
        with tilted([self.block], Tilts({self.block.layer: bias_E} if removed else {})):
            return float(self.squares(self.gates() - self.gate_TE).mean())

    def squares(self, weight_TE: Tensor) -> Tensor:
        """‖Σ weight · output of the experts‖² of each token (T,)."""
        return torch.einsum("te,tef,tf->t", weight_TE, self.gram_TEE, weight_TE)

    @torch.inference_mode()
    def gates(self) -> Tensor:
        """Gate weights (T, E) as the router gives them now, float64, 0 for the other experts."""
        _, weights_TK, experts_TK = self.route()
        width = self.block.n_experts + 1  # the id E is nobody
        nothing_TX = torch.zeros(len(self.x_TD), width, dtype=torch.float64)
        return nothing_TX.scatter(1, experts_TK.cpu(), weights_TK.double().cpu())[:, :-1]


def sample_inputs(engine: Engine, quiz: CalibrationSet) -> dict[int, Tensor]:
    """Inputs (T, D) of every block, by layer, at the same sample of T tokens."""
    blocks = engine.moe.blocks
    width = int(engine.moe.model.config.get_text_config().hidden_size)
    by_inputs = KEPT_BYTES // (len(blocks) * width * engine.moe.dtype.itemsize)
    by_grams = KEPT_BYTES // (max(block.n_experts for block in blocks) ** 2 * 8)
    reservoir = Reservoir(max(1, min(MOST_TOKENS, by_inputs, by_grams)))
    few, layers = round_robin(quiz, CALIBRATION_QUESTIONS), {block.layer for block in blocks}
    collect_routing(engine, few, layers, lambda r, _: reservoir.add(r.layer, r.input_TD))
    return reservoir.kept


class Reservoir:
    """A sample of tokens by reservoir sampling: those with the smallest of seeded random keys."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.generator = torch.Generator().manual_seed(0)
        self.keys = torch.empty(0)
        self.kept: dict[int, Tensor] = {}
        self.stays = torch.empty(0, dtype=torch.long)
        self.seen: set[int] = set()

    def add(self, layer: int, rows_TX: Tensor) -> None:
        """A row for each token of one router; the first router of a pass draws for all."""
        if not self.seen or layer in self.seen:
            self.seen = set()
            keys = torch.cat([self.keys, torch.rand(len(rows_TX), generator=self.generator)])
            n_kept = min(self.n_tokens, len(keys))
            self.stays = keys.topk(n_kept, largest=False).indices.sort().values
            self.keys = keys[self.stays]
        self.seen.add(layer)
        before = self.kept.get(layer, rows_TX[:0])
        is_old_T = self.stays < len(before)
        rows = (before[self.stays[is_old_T]], rows_TX[self.stays[~is_old_T] - len(before)])
        self.kept[layer] = torch.cat(rows)


def _gram(block: MoeBlock, x_RD: Tensor, own_RD: Tensor) -> Tensor:
    """Inner products (R, E, E) of all experts' contributions to the block's output, float64."""
    forward = hooks.own_forward(block.experts)
    device = next(block.experts.parameters()).device
    rows, n_rows = own_RD.to(device), len(x_RD)
    # A projection follows experts of another width.
    is_projected = own_RD.shape[1] != x_RD.shape[1]
    nothing_RD = _given(block, x_RD, torch.zeros_like(rows)) if is_projected else torch.zeros(())
    outputs = []
    for expert in range(block.n_experts):
        chosen_R1 = torch.full((n_rows, 1), expert, device=device)
        output_RD = forward(rows, chosen_R1, rows.new_ones(n_rows, 1))
        if is_projected:
            output_RD = _given(block, x_RD, output_RD)
        outputs.append(output_RD.double().cpu() - nothing_RD)
    f_RED = torch.stack(outputs, dim=1)
    return f_RED @ f_RED.transpose(1, 2)


def _given(block: MoeBlock, x_RD: Tensor, output_RW: Tensor) -> Tensor:
    """The block's output (R, D) float64 for a given output of its experts."""
    with hooks.replaced_forward(block.experts, lambda *_: output_RW):
        output = block.run(x_RD[None])
    y_RD: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
    return y_RD.double().cpu()
