"""Laws of a MoE block that every statistic about its experts relies on.

With α the score of an expert (a function of the router's logits) and w its gate weight:

    weights     w is c·α of the chosen experts, or c·α divided by its sum over them, and possibly
                times a tensor (E,) of the router
    choice      the chosen are the top-k of α + selection bias within the allowed groups
    table       ... or those of a table of token ids (hash-routed blocks)
    repeatable  the same input is routed in the same way twice
    once        a block runs once in a pass, and its router and experts once in a block's forward
    sum         the block's output is affine in Σ w·f_e, the sum of its experts' own outputs
    storage     no two blocks own the same expert weights
    arrays      all blocks route each token to the same number of experts

Blocks of a contract may break the first two, which are then not claimed of them, and the last; two
that share experts must be calls of one module. The first three are tested on real tokens and on
synthetic logits put into the router: real logits are often so peaked that several rules give the
same weights. A block that breaks a law is refused.
`EXCEPTIONS` lists families that break one and are supported, with what is not claimed of them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertcut.errors import ContractError
from expertcut.models import hooks, moe_block
from expertcut.models.hooks import Routing, own_forward, replaced_forward, route
from expertcut.models.kernels import by_expert
from expertcut.models.modeling_routed import SCORES, Scoring
from expertcut.models.moe_block import (
    SELECTION_BIAS,
    MoeBlock,
    RouterCall,
    Selection,
    WeightRule,
)
from expertcut.models.parallel import local

_Call = tuple[tuple[Any, ...], dict[str, Any], Any]  # args, kwargs, output
See = Callable[[MoeBlock, Routing], None]  # a block whose `call` is that of the routing
Law = Literal["weights", "choice", "repeatable", "once", "sum", "storage", "arrays"]

# The law that is not checked, and the config.model_type of the family.
EXCEPTIONS: tuple[tuple[Law, str], ...] = (
    # Its sparse mixer takes each weight from a softmax over the experts that are near the best one,
    # so α (the softmax over all) is not proportional to the weights.
    ("weights", "phimoe"),
    # Its block normalises the sum of experts and shared expert: contributions are those before.
    ("sum", "axk1"),
)


@torch.inference_mode()
def explain_gate(block: MoeBlock, routing: Routing, model_type: str) -> MoeBlock:
    """The block with its gate, identified from its routing of the probe and synthetic logits.

    A rule of a routed checkpoint acts behind its family's gate, which is what is identified.
    """
    with hooks.family_routing(block.router):
        return _explain_gate(block, _by_family(block, routing), model_type)


def _by_family(block: MoeBlock, routing: Routing) -> Routing:
    if not hasattr(block.router, "family_forward"):
        return routing
    return Routing(block.layer, routing.input_TD, *route(block.router, block.call))


def _explain_gate(block: MoeBlock, routing: Routing, model_type: str) -> MoeBlock:
    is_table = _is_table(block, routing)
    logits_TE, weights_TK, experts_TK = route(block.router, block.call)
    is_same = torch.equal(experts_TK, routing.experts_TK) and torch.allclose(
        weights_TK.float(), routing.weights_TK.float(), rtol=_tolerance(routing), atol=1e-6
    )
    if not is_same or not torch.equal(logits_TE, routing.logits_TE):
        raise broken(block, "repeatable", "its router routes the same tokens in another way twice")
    ops = hooks.logits_ops(block.router, block.call)
    op = next((op for op in ops if _acts(block, op, is_table)), None)
    routings = [routing, *_synthetic_routings(block, op)]
    if block.declared is not None:
        return _explain_declared(replace(block, logits_op=op), routings)
    scoring, weights, scaled = _find_weights(block, routings, model_type)
    block = replace(block, scoring=scoring, weights=weights, scaled=scaled, logits_op=op)
    is_cut_softmax = scoring == "softmax" and weights is not None and not weights.is_renormalised
    has_bias = block.selection_bias() is not None
    ways: Sequence[Selection] = ("score", "logits") if has_bias else ("score",)
    selection = "table" if is_table else _find_choice(block, routings, ways)
    is_linear = _is_linear(block, routing)
    return replace(block, inflates=is_cut_softmax, selection=selection, is_linear=is_linear)


def _explain_declared(block: MoeBlock, seen: Sequence[Routing]) -> MoeBlock:
    """The block of a contract with those laws of gates that it follows; others are not claimed."""
    is_varied = any(bool((r.experts_TK >= block.n_experts).any()) for r in seen)
    block = replace(block, is_linear=_is_linear(block, seen[0]), is_ranked=False)
    with suppress(ContractError):
        if not is_varied:
            scoring, weights, scaled = _find_weights(block, seen, "")
            is_cut = scoring == "softmax" and weights is not None and not weights.is_renormalised
            block = replace(block, scoring=scoring, weights=weights, scaled=scaled, inflates=is_cut)
    with suppress(ContractError):
        if not is_varied:
            has_bias = block.selection_bias() is not None
            ways: Sequence[Selection] = ("score", "logits") if has_bias else ("score",)
            block = replace(block, selection=_find_choice(block, seen, ways), is_ranked=True)
    return block


def check_gate(block: MoeBlock, routing: Routing) -> None:
    """Checks the identified gate on the routing of other tokens, by the block's `call`."""
    with hooks.family_routing(block.router):
        _check_gate(block, _by_family(block, routing))


def _check_gate(block: MoeBlock, routing: Routing) -> None:
    if block.is_hashed != _is_table(block, routing):
        raise broken(block, "choice", "a table of token ids chooses its experts only sometimes")
    name, rule = block.scaled or (None, block.weights)
    seen = _unscaled(block, name, routing)
    off = 0.0 if rule is None else _misfit(block.scoring, rule, seen)
    if off > _tolerance(routing):
        raise _broken_weights(block, block.scoring, off)
    if not block.is_hashed and block.is_ranked:
        _find_choice(block, [routing], [block.selection])


class Named(Protocol):
    """A block, or what a contract declares as one."""

    @property
    def name(self) -> str:
        """The name in the model."""


def broken(block: Named, law: Law, fault: str) -> ContractError:
    """The error for a block that breaks a law."""
    return ContractError(f"{block.name} breaks the law of {law} (docs/families.md): {fault}")


def _tolerance(*routings: Routing) -> float:
    tensors = [t for r in routings for t in (r.logits_TE, r.weights_TK)]
    return 3e-2 if any(t.dtype.itemsize < 4 for t in tensors) else 1e-4


def _is_exempt(law: Law, model_type: str) -> bool:
    return (law, re.sub(r"^((routed|packed|exact)_)+", "", model_type)) in EXCEPTIONS


def _is_table(block: MoeBlock, routing: Routing) -> bool:
    given = (*block.call.args, *block.call.kwargs.values())
    ids = [v for v in given if isinstance(v, Tensor) and not v.is_floating_point()]
    if not ids or ids[0].numel() != len(routing.experts_TK):
        return False
    tables = (t for _, t in block.router_tensors() if not t.is_floating_point() and t.ndim == 2)
    return any(
        table.shape[1] == block.top_k
        and torch.equal(table[ids[0].reshape(-1)].long(), routing.experts_TK)
        for table in tables
    )


def _acts(block: MoeBlock, op: moe_block.LogitsOp, is_table: bool) -> bool:
    """Whether changing the result of the operation changes the router's logits."""
    before_TE, _, experts_TK = route(block.router, block.call)
    expert = int(experts_TK[experts_TK < block.n_experts].mode().values)
    bias_E = torch.zeros(block.n_experts)
    bias_E[(expert + 1) % block.n_experts] = 1.0
    if block.top_k < block.n_experts and not is_table:
        bias_E[expert] = -torch.inf
    try:
        biased = hooks.biased_forward(replace(block, logits_op=op), bias_E)
        with replaced_forward(block.router, biased):
            after_TE, _, _ = route(block.router, block.call)
    except (ContractError, RuntimeError):
        return False
    return hooks.moved_by(before_TE, after_TE, bias_E)


def _synthetic_routings(block: MoeBlock, op: moe_block.LogitsOp | None) -> Iterator[Routing]:
    """Routings of synthetic logits, or of scaled inputs if logits cannot be changed."""
    generator = torch.Generator().manual_seed(0)
    x, *more = block.call.args
    for scale in (0.03, 0.3, 1.0, 3.0):  # from nearly equal to peaked
        if op is None:
            call = RouterCall((x * scale, *more), block.call.kwargs)
            yield Routing(block.layer, call.args[0], *route(block.router, call))
        else:
            with hooks.changed_logits(block.router, op, partial(_random_logits, scale, generator)):
                routed = route(block.router, block.call)
            yield Routing(block.layer, x, *routed)


def _random_logits(scale: float, generator: torch.Generator, logits: Tensor) -> Tensor:
    return (torch.randn(logits.shape, generator=generator) * scale).to(logits)


def _is_linear(block: MoeBlock, routing: Routing) -> bool:
    tensors = [(name, t) for name, t in block.router_tensors() if t.is_floating_point()]
    shape = (block.n_experts, routing.input_TD.shape[1])
    weight_ED = next((t.float() for _, t in tensors if t.shape == shape), None)
    if weight_ED is None:
        return False
    bias_E = next((t.float() for n, t in tensors if n == "bias" and t.shape == shape[:1]), None)
    product_TE = F.linear(routing.input_TD.float().to(weight_ED.device), weight_ED, bias_E)
    logits_TE = routing.logits_TE.float().to(weight_ED.device)
    tolerance = 3e-2 if routing.input_TD.dtype.itemsize < 4 else _tolerance(routing)
    return bool((product_TE - logits_TE).abs().max() <= tolerance * logits_TE.abs().max())


def _find_weights(
    block: MoeBlock, seen: Sequence[Routing], model_type: str
) -> tuple[Scoring, WeightRule | None, tuple[str, WeightRule] | None]:
    if _is_exempt("weights", model_type):
        return "softmax", None, None
    n = block.n_experts
    names = [name for name, t in block.router_tensors() if t.numel() == t.shape[-1:].numel() == n]
    for name in (own for own in names if own not in ("bias", *SELECTION_BIAS)):
        try:
            scoring, rule = _plain_weights(block, [_unscaled(block, name, r) for r in seen])
            return scoring, None, (name, rule)
        except ContractError:
            continue
    return *_plain_weights(block, seen), None


def _unscaled(block: MoeBlock, name: str | None, routing: Routing) -> Routing:
    """The routing with weights divided by the router's own factor of each expert."""
    if name is None:
        return routing
    scale_E = next(t for n, t in block.router_tensors() if n == name).to(routing.weights_TK)
    return replace(routing, weights_TK=routing.weights_TK / scale_E.flatten()[routing.experts_TK])


def _plain_weights(block: MoeBlock, seen: Sequence[Routing]) -> tuple[Scoring, WeightRule]:
    weights = torch.cat([r.weights_TK.double().flatten() for r in seen])
    fits = []
    for is_renormalised, scoring in product((False, True), SCORES):
        shares = torch.cat([_shares(scoring, is_renormalised, r).flatten() for r in seen])
        rule = WeightRule(is_renormalised, float(weights @ shares / (shares @ shares)))
        fits.append((max(_misfit(scoring, rule, r) for r in seen), scoring, rule))
    fitting = [fit for fit in fits if fit[0] <= _tolerance(*seen)]
    if not fitting:
        off, scoring, _ = min(fits, key=lambda fit: fit[0])
        raise _broken_weights(block, scoring, off)
    if block.top_k == 1 and fitting[0][2].is_renormalised:
        # A weight divided by itself tells nothing: look at the operations of the router.
        own = _scoring_on_tape(block)
        return next((fit for fit in fitting if fit[1] == own), fitting[0])[1:]
    if block.top_k == block.n_experts:  # both rules are equal
        fitting = [fit for fit in fitting if not fit[2].is_renormalised] or fitting
    return min(fitting, key=lambda fit: fit[0])[1:]


def _shares(scoring: Scoring, is_renormalised: bool, routing: Routing) -> Tensor:
    """The weights (T, K) up to a factor, float64."""
    alpha_TK = SCORES[scoring](routing.logits_TE.double()).gather(1, routing.experts_TK)
    return alpha_TK / alpha_TK.sum(dim=-1, keepdim=True) if is_renormalised else alpha_TK


def _misfit(scoring: Scoring, rule: WeightRule, routing: Routing) -> float:
    """Largest relative error of the rule; absolute for far smaller weights than the largest."""
    wanted_TK = rule.factor * _shares(scoring, rule.is_renormalised, routing)
    floor_T1 = 1e-3 * wanted_TK.amax(dim=-1, keepdim=True)
    off_TK = (routing.weights_TK.double() - wanted_TK).abs() / (wanted_TK + floor_T1)
    return float(off_TK.max()) if bool(off_TK.isfinite().all()) else float("inf")


def _scoring_on_tape(block: MoeBlock) -> Scoring | None:
    results, (logits_TE, *_) = hooks.tape_of(block.router, block.call)
    for scoring, score in SCORES.items():
        wanted_TE = score(logits_TE.float())
        for _, result in results:
            is_like = isinstance(result, Tensor) and result.shape == wanted_TE.shape
            if is_like and torch.allclose(result.float(), wanted_TE, rtol=1e-2, atol=1e-4):
                return scoring
    return None


def _broken_weights(block: MoeBlock, scoring: Scoring, off: float) -> ContractError:
    return broken(
        block,
        "weights",
        f"its gate weights are neither {', '.join(SCORES)} of its router's logits nor one of them "
        f"renormalised ({scoring} comes nearest, off by up to {off:.1%})",
    )


def _find_choice(block: MoeBlock, seen: Sequence[Routing], ways: Sequence[Selection]) -> Selection:
    for selection in ways:
        if all(_follows(block, routing, selection) for routing in seen):
            return selection
    raise broken(
        block,
        "choice",
        f"its router does not choose the {block.top_k} experts with the largest {block.scoring} "
        "of its logits (plus its selection bias, within the allowed groups)",
    )


def _follows(block: MoeBlock, routing: Routing, selection: Selection) -> bool:
    """Whether the chosen experts are the best, except for near-ties."""
    block = replace(block, selection=selection)
    score_TE = block.selection_scores(routing.logits_TE)
    near = (2e-6, 1e-2)[_tolerance(routing) > 1e-3] * max(1.0, float(score_TE.abs().max()))
    n_best = block.top_k // block.n_groups if block.is_even else block.top_k
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, routing.experts_TK, True)
    for allowed_TE in _allowed(block, score_TE):
        for outside in (-torch.inf, 0.0):  # the score of experts in other groups
            offered = score_TE.where(allowed_TE, outside)
            if block.is_even:
                offered = offered.unflatten(1, (block.n_groups, -1))
            best = offered.topk(n_best, dim=-1).indices
            best_TE = torch.zeros_like(offered, dtype=torch.bool).scatter(-1, best, True)
            best_TE = best_TE.view_as(chosen_TE)
            best_TK = best_TE.nonzero()[:, 1].view(len(best_TE), -1)
            is_tie_T = block.selection_gap(score_TE, best_TK) <= near
            if not bool(((best_TE != chosen_TE).any(dim=1) & ~is_tie_T).any()):
                return True
    return False


def _allowed(block: MoeBlock, score_TE: Tensor) -> Iterator[Tensor]:
    """Masks (T, E) of the best groups, for each ranking of groups."""
    if block.top_groups == block.n_groups:
        yield torch.ones_like(score_TE, dtype=torch.bool)
        return
    for group_score_TG in block.group_scores(score_TE):
        best_T = group_score_TG.topk(block.top_groups, dim=-1).indices
        is_best_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter(1, best_T, True)
        yield is_best_TG.repeat_interleave(score_TE.shape[1] // block.n_groups, dim=1)


def check_blocks(blocks: Sequence[MoeBlock]) -> None:
    """Checks the laws of storage and arrays, which need no forward pass."""
    owner: dict[object, MoeBlock] = {}
    for block in blocks:
        tensors = list(block.experts.parameters())
        held = [local(t) for t in tensors if t.device.type != "meta" and t.numel()]
        places = [(t.device, t.data_ptr()) for t in held]
        for key in (id(block.experts), *map(id, tensors), *places):
            first = owner.setdefault(key, block)
            is_call = block.declared is not None and block.declared.source is first.declared.source
            if first is not block and not is_call:
                raise broken(block, "storage", f"it owns the same experts as {first.name}")
    counts = Counter(block.top_k for block in blocks if block.declared is None)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        other = next(block for block in blocks if block.top_k != usual)
        fault = f"it routes each token to {other.top_k} experts, other blocks to {usual}"
        raise broken(other, "arrays", fault)


def check_calls(block: Named, n_calls: int, n_wanted: int = 1) -> None:
    """Checks how often a block ran in one pass of the model."""
    if n_calls != n_wanted:
        fault = f"it ran {n_calls} times in one pass, must be {n_wanted}"
        raise broken(block, "once", fault)


@contextmanager
def verifying(
    blocks: Sequence[MoeBlock], model_type: str, see: See, *, is_one_pass: bool = False
) -> Iterator[None]:
    """Checks the laws of once and sum in each block's first forward, and passes its routing on."""
    is_summed, n_calls = not _is_exempt("sum", model_type), Counter[int]()
    with hooks.registered(
        # A whole layer may do more with the sum.
        replaced_forward(
            block.module, _verified(block, is_summed and not block.is_layer, see, n_calls)
        )
        for block in blocks
    ):
        yield
    for block in blocks if is_one_pass else ():
        if n_calls[block.layer]:  # else another error says so
            check_calls(block, n_calls[block.layer])


def _verified(block: MoeBlock, is_summed: bool, see: See, n_calls: Counter[int]) -> hooks.Forward:
    forward = own_forward(block.module)

    def run(*args: Any, **kwargs: Any) -> Any:
        n_calls[block.layer] += 1
        if n_calls[block.layer] > 1:
            return forward(*args, **kwargs)
        with (
            _watching(block.router) as routed,
            _watching(block.experts) as summed,
            _one_by_one(block) as own_sums,
        ):
            output = forward(*args, **kwargs)
        for part, calls in (("router", routed), ("experts", summed)):
            if len(calls) != 1:
                fault = f"its {part} ran {len(calls)} times in one forward pass, must be once"
                raise broken(block, "once", fault)
        if block.declared is not None:
            block.declared.check(args, kwargs, output)
        called, routing = _routing(block, *routed[0])
        inputs, named_inputs, output_TD = summed[0]
        _, experts_TK, weights_TK, *_ = (*inputs, *named_inputs.values())
        is_routed = torch.equal(experts_TK, routing.experts_TK) and torch.equal(
            weights_TK.float(), routing.weights_TK.float()
        )
        if not is_routed:
            fault = "its experts get other choices or weights than its router gave"
            raise broken(block, "sum", fault)
        part_TD = output_TD.reshape(-1, output_TD.shape[-1])[: len(own_sums[0])]
        if not _is_near(own_sums[0], part_TD, part_TD):
            raise broken(block, "sum", "its experts together give another sum than one by one")
        if is_summed:
            _check_affine(block, lambda: first(forward(*args, **kwargs)), first(output), output_TD)
        see(called, routing)
        return output

    return run


def routing_faults(routed: hooks.Routed, n_experts: int) -> Iterator[str]:
    """What no router may give: the id E is nobody."""
    _, weights_TK, experts_TK = routed
    is_nobody_TK = experts_TK == n_experts
    if bool(((experts_TK < 0) | (experts_TK > n_experts)).any()):
        yield f"its router chooses experts outside 0 to {n_experts - 1}"
    if bool((weights_TK[is_nobody_TK] != 0).any()) or not bool(weights_TK.isfinite().all()):
        yield "its router gives a weight to an expert id that stands for none, or no finite one"
    sorted_TK = experts_TK.sort(dim=1).values
    is_twice_TK = sorted_TK[:, 1:] == sorted_TK[:, :-1]
    if bool((is_twice_TK & (sorted_TK[:, 1:] < n_experts)).any()):
        yield "its router chooses an expert twice"


@contextmanager
def _watching(module: nn.Module) -> Iterator[list[_Call]]:
    calls: list[_Call] = []
    with module.register_forward_hook(lambda _module, *call: calls.append(call), with_kwargs=True):
        yield calls


@contextmanager
def _one_by_one(block: MoeBlock) -> Iterator[list[Tensor]]:
    """Σ (rows, D) of the first tokens' experts one by one, while offloaded weights exist."""
    forward, own = own_forward(block.experts), hooks.own_expert(block)
    sums: list[Tensor] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        x, experts_TK, weights_TK, *_ = (*args, *kwargs.values())
        rows, x_TD = slice(16), x.reshape(-1, x.shape[-1])
        parts = x_TD[rows], experts_TK[rows], weights_TK[rows]
        sums.append(by_expert(*parts, block.n_experts, own))
        return output

    with replaced_forward(block.experts, run):
        yield sums


def first(output: Any) -> Any:
    """A module's output, or the first part of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _routing(block: MoeBlock, args: Any, kwargs: Any, output: Any) -> tuple[MoeBlock, Routing]:
    if not isinstance(output, tuple) or len(output) != 3:
        raise ContractError(f"{block.name}: its router must give logits, weights and experts")

    def kept(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    call = RouterCall(tuple(map(kept, args)), {k: kept(v) for k, v in kwargs.items()})
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return replace(block, call=call), Routing(block.layer, x.reshape(-1, x.shape[-1]), *output)


def _check_affine(
    block: MoeBlock, again: Callable[[], Tensor], whole: Tensor, output_TD: Tensor
) -> None:
    """Compares the output with the whole, half and none of the experts' sum."""
    with replaced_forward(block.experts, lambda *_, **__: torch.zeros_like(output_TD)):
        without = again()
    with replaced_forward(block.experts, lambda *_, **__: output_TD / 2):
        half = again()
    if not _is_near(half, (whole + without) / 2, whole):
        raise broken(block, "sum", "its output is not the sum of its experts and a shared part")
    share = (whole - without).abs().max()
    if bool(output_TD.any()) and share == 0 and output_TD.abs().max() > 1e-2 * whole.abs().max():
        raise broken(block, "sum", "its output does not depend on its experts")


def _is_near(found: Tensor, wanted: Tensor, whole: Tensor) -> bool:
    tolerance = 3e-2 if whole.dtype.itemsize < 4 else 1e-4
    off = (found.float() - wanted.float()).abs().max()
    return bool(off <= tolerance * whole.float().abs().max())
