"""Watching routers and experts, and changing a router's logits, without leaving a trace.

A router's forward as a sequence of tensor operations, and its logits changed within it. Routers
compute their logits in many ways (a bare parameter, an `nn.Linear` inside, a product and a cap).
What they share is that one operation gives the very logits that they score and return. Its position
in the sequence is found once, by trying, and a change of the logits is put in there: so it acts
after any cap or multiplier, and `+b` moves a logit by b.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from expertcut.errors import ContractError
from expertcut.models.kernels import BY_EXPERT, INNER, Own, by_expert, own_output
from expertcut.models.moe_block import LogitsOp, MoeBlock, RouterCall

Combined = Callable[[int, Tensor], None]  # layer, the experts' weighted sum (T, D)
Change = Callable[[Tensor], Tensor]
Routed = tuple[Tensor, Tensor, Tensor]  # logits_TE, weights_TK, experts_TK


@dataclass(frozen=True)
class Routing:
    """What a router read and decided in one forward pass."""

    layer: int
    input_TD: Tensor
    logits_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor


@dataclass(frozen=True)
class ExpertCall:
    """One expert's own output, before the gate weight, on the tokens it was chosen for.

    `tokens_M` indexes T; M tokens chose the expert.
    """

    layer: int
    expert: int
    tokens_M: Tensor
    weights_M: Tensor
    output_MD: Tensor


@contextmanager
def observe_routers(blocks: Sequence[MoeBlock], see: Callable[[Routing], None]) -> Iterator[None]:
    """Calls `see` after each router's forward."""
    with ExitStack() as stack:
        for block in blocks:
            handle = block.router.register_forward_hook(_relay(block.layer, see))
            stack.callback(handle.remove)
        yield


def _relay(layer: int, see: Callable[[Routing], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits_TE, weights_TK, experts_TK = output
        input_TD = args[0].reshape(-1, args[0].shape[-1])
        see(Routing(layer, input_TD, logits_TE, weights_TK, experts_TK))

    return hook


@contextmanager
def observe_residuals(
    blocks: Sequence[MoeBlock], see: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Calls `see` with the layer and the residual stream (T, D) that its output is added to.

    It is told before the block's router runs, of blocks whose stream is known.
    """
    with ExitStack() as stack:
        for block in blocks:
            if block.residual is not None:
                hook = _relay_input(block.layer, see)
                handle = block.residual.norm.register_forward_pre_hook(hook)
                stack.callback(handle.remove)
        yield


def _relay_input(layer: int, see: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        see(layer, args[0].reshape(-1, args[0].shape[-1]))

    return hook


@contextmanager
def observe_experts(
    blocks: Sequence[MoeBlock],
    see: Callable[[ExpertCall], None],
    combined: Combined | None = None,
) -> Iterator[None]:
    """Runs experts one by one, in id order, and calls `see` with each one's own output.

    After a block's last expert, `combined` gets the layer and the weighted sum (T, D).

    One expert's output is `experts(x, e, 1)`: the model's own code, so no family needs code here.
    The sum over experts is bit-equal to what the model runs unwatched on a CPU.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block.experts, _watched(block, see, combined)))
        yield


def _watched(
    block: MoeBlock, see: Callable[[ExpertCall], None], combined: Combined | None
) -> Callable[..., Tensor]:
    own = own_expert(block)

    def note(expert: int, tokens_M: Tensor, weights_M: Tensor, output_MD: Tensor) -> None:
        see(ExpertCall(block.layer, expert, tokens_M, weights_M, output_MD))

    def run(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TD = by_expert(x_TD, experts_TK, weights_TK, own, note)
        if combined is not None:
            combined(block.layer, y_TD)
        return y_TD

    return run


def own_expert(block: MoeBlock) -> Own:
    """One expert of a block by itself: its tokens (M, D) → its outputs before any weight."""
    config = getattr(block.experts, "config", None)
    is_constant_too = hasattr(block.experts, "places")  # layout exact
    if getattr(config, "_experts_implementation", None) == BY_EXPERT and not is_constant_too:
        return partial(own_output, block.experts)
    forward = own_forward(block.experts)

    def one(expert: int, x_MD: Tensor) -> Tensor:
        chosen_M1 = torch.full((len(x_MD), 1), expert, device=x_MD.device)
        output_MD: Tensor = forward(x_MD, chosen_M1, x_MD.new_ones(len(x_MD), 1))
        return output_MD

    return one


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """What a module does, without what brings its weights where it is spread over devices."""
    forward: Callable[..., Any] = module.__dict__.get(INNER, module.forward)
    return forward


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for one module while the block runs; its weights come once for all of it."""
    name = INNER if INNER in module.__dict__ else "forward"
    before = module.__dict__.get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


@torch.inference_mode()
def route(router: nn.Module, call: RouterCall) -> Routed:
    """What the router gives when it is called so, past the hooks of those who watch it."""
    logits_TE, weights_TK, experts_TK = router.forward(*call.args, **call.kwargs)
    return logits_TE, weights_TK, experts_TK


class _Tape(TorchFunctionMode):
    """Keeps the results of all operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.results.append((_name(func), result))
        return result


def _as_it_is(value: Any) -> Any:
    return value


class _Changing(TorchFunctionMode):
    """Changes the result of one operation, and what any operation reads."""

    def __init__(self, op: LogitsOp, change: Change, reading: Callable[[Any], Any]) -> None:
        super().__init__()
        self.op, self.change, self.reading, self.n_done = op, change, reading, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # one change inside another must not count these
            args = tuple(map(self.reading, args))
        result = func(*args, **(kwargs or {}))
        index, self.n_done = self.n_done, self.n_done + 1
        if index != self.op.index:
            return result
        if _name(func) != self.op.name or not isinstance(result, Tensor):
            raise ContractError(
                f"a router computes its logits by {_name(func)} where it used {self.op.name} on "
                "the probe: its logits cannot be changed"
            )
        with torch._C.DisableTorchFunction():
            return self.change(result)


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _run_changed(
    forward: Callable[..., Any],
    op: LogitsOp,
    change: Change,
    args: Any,
    kwargs: Any,
    reading: Callable[[Any], Any] = _as_it_is,
) -> Routed:
    mode = _Changing(op, change, reading)
    with mode:
        logits_TE, weights_TK, experts_TK = forward(*args, **kwargs)
    if mode.n_done <= op.index:
        raise ContractError("a router ran fewer operations than on the probe")
    return logits_TE, weights_TK, experts_TK


@contextmanager
def changed_logits(router: nn.Module, op: LogitsOp, change: Change) -> Iterator[None]:
    """The router's logits are changed while the block runs."""
    forward = own_forward(router)

    def changed(*args: Any, **kwargs: Any) -> Routed:
        return _run_changed(forward, op, change, args, kwargs)

    with replaced_forward(router, changed):
        yield


def tape_of(router: nn.Module, call: RouterCall) -> tuple[list[tuple[str, Any]], Routed]:
    """All operations of one call with their results, and what the router gave."""
    tape, forward = _Tape(), own_forward(router)

    def taped(*args: Any, **kwargs: Any) -> Any:
        with tape:
            return forward(*args, **kwargs)

    with replaced_forward(router, taped):
        return tape.results, route(router, call)


def logits_ops(router: nn.Module, call: RouterCall) -> Iterator[LogitsOp]:
    """Operations that may be the one that gives the logits, the likeliest first.

    Those whose result is the tensor that the router returns, the last of them first, then those
    that give the same values.
    """
    results, (logits_TE, *_) = tape_of(router, call)
    same = [i for i, (_, result) in enumerate(results) if result is logits_TE]
    equal = [i for i, (_, result) in enumerate(results) if _equals(result, logits_TE)]
    for index in dict.fromkeys((*reversed(same), *reversed(equal))):
        yield LogitsOp(index, results[index][0])


def _equals(result: object, logits_TE: Tensor) -> bool:
    if not isinstance(result, Tensor) or result.numel() != logits_TE.numel():
        return False
    if result.shape[-1] != logits_TE.shape[-1] or not result.is_floating_point():
        return False
    return torch.equal(result.reshape(logits_TE.shape).to(logits_TE.dtype), logits_TE)


# --- Biases -------------------------------------------------------------------------------------


class BiasedForward:
    """A router's forward with `bias_E` (E,) added to its logits; −inf forbids an expert.

    `rows` gives the tokens (N,) that finite biases are for, None for all; −inf is for all tokens.
    Where a selection bias is added to scores, a masked logit alone would not keep an expert from
    being chosen, so −inf is read there as well.

    Raises:
        ContractError: the bias cannot be put in; when called, a forbidden expert is chosen.
    """

    def __init__(
        self, block: MoeBlock, bias_E: Tensor, rows: Callable[[], Tensor | None] = lambda: None
    ) -> None:
        if block.logits_op is None:
            raise ContractError(
                f"{block.name}: no operation of its router gives the logits that it chooses by, so "
                "biases and masks cannot act there: this model can be profiled, and not changed"
            )
        self.block, self.bias_E, self.rows = block, bias_E, rows
        self.forward, self.op = own_forward(block.router), block.logits_op
        self.is_forbidden_E = bias_E.isneginf()

    def __call__(self, *args: Any, **kwargs: Any) -> Routed:
        """As the router's own."""
        add = partial(_added, bias_E=self.bias_E, rows_N=self.rows())
        # Some blocks hand their selection bias (E,) to the router with each call.
        with torch._C.DisableTorchFunction():  # as in `_Changing`
            given = tuple(map(self._masked, args))
            named = {name: self._masked(value) for name, value in kwargs.items()}
        routed = _run_changed(self.forward, self.op, add, given, named, self._read)
        if bool(self.is_forbidden_E.to(routed[2].device)[routed[2]].any()):
            raise ContractError(
                f"{self.block.name}: its router chooses an expert that is masked: this cut cannot "
                "be shown as a mask"
            )
        return routed

    def _read(self, value: Any) -> Any:
        """What an operation reads: masked where it is the router's own selection bias.

        That is looked up with each operation: where accelerate offloads it, it is there only then.
        """
        is_own = self._is_one_each(value) and value is self.block.selection_tensor()
        return self._masked(value) if is_own else value

    def _masked(self, value: Any) -> Any:
        """−inf for the forbidden, in a tensor that holds one number for each expert."""
        if not self._is_one_each(value):
            return value
        return value.masked_fill(self.is_forbidden_E.to(value.device), -torch.inf)

    def _is_one_each(self, value: Any) -> bool:
        n_experts = len(self.bias_E)
        is_number = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
        return is_number and value.shape[-1] == value.numel() == n_experts


def _added(logits: Tensor, bias_E: Tensor, rows_N: Tensor | None) -> Tensor:
    bias_E = bias_E.to(logits)
    if rows_N is None:
        return logits + bias_E
    is_forbidden_E = bias_E.isneginf()
    rows_N = rows_N.to(logits.device)
    added_NE = bias_E.masked_fill(is_forbidden_E, 0).expand(len(rows_N), -1)
    flat_TE = logits.reshape(-1, len(bias_E)).index_add(0, rows_N, added_NE)
    return flat_TE.masked_fill(is_forbidden_E, -torch.inf).view_as(logits)


def moved_by(before_TE: Tensor, after_TE: Tensor, bias: Tensor) -> bool:
    """Whether logits differ by just the bias, (E,) or (T, E), up to rounding in their dtype."""
    bias = bias.to(before_TE.device).double()
    wanted_TE = before_TE.double() + bias
    after_TE = after_TE.double()
    if not torch.equal(wanted_TE.isneginf(), after_TE.isneginf()):
        return False
    # The sum is rounded once; on some devices the product before it is not repeatable to the bit.
    eps = torch.finfo(before_TE.dtype).eps
    size_TE = before_TE.double().abs() + bias.abs() + 1
    is_off_TE = (wanted_TE - after_TE).abs() > eps * size_TE
    return not bool((is_off_TE & wanted_TE.isfinite()).any())
