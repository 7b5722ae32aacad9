"""Hooks: observe routers and experts, replace forwards, and change router logits for a while.

Routers compute their logits in many ways (a bare parameter, an inner `nn.Linear`, a product and a
cap), but one tensor operation of their forward gives the logits that they score and return. Its
position is found once, by trial, and changes act on its result: after any cap or multiplier, so
`+b` moves a logit by b.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from expertcut.errors import ContractError
from expertcut.models.kernels import BY_EXPERT, INNER, Known, Own, by_expert, own_output
from expertcut.models.moe_block import LogitsOp, MoeBlock, RouterCall, Step

Change = Callable[[Any], Any]
Forward = Callable[..., Any]
Routed = tuple[Tensor, Tensor, Tensor]  # logits_TE, weights_TK, experts_TK
Scope = AbstractContextManager[None]  # at whose end a change is reverted


@dataclass(frozen=True)
class Routing:
    """Input and output of a router in one forward pass."""

    layer: int
    input_TD: Tensor
    logits_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor

    def on(self, device: torch.device) -> "Routing":
        """The same with its tensors on a device."""
        tensors = (self.input_TD, self.logits_TE, self.weights_TK, self.experts_TK)
        return Routing(self.layer, *(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True)
class ExpertCall:
    """Output of one expert, before the gate weight, on its M tokens; `tokens_M` indexes T."""

    layer: int
    expert: int
    tokens_M: Tensor
    weights_M: Tensor
    output_MD: Tensor


@contextmanager
def registered(changes: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Makes changes, such as the handles of hooks, by iterating; reverts them at the end."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


def observe_routers(blocks: Sequence[MoeBlock], see: Callable[[Routing], None]) -> Scope:
    """Calls `see` after each router's forward."""

    def hook(layer: int, _module: nn.Module, args: tuple[Any, ...], output: Routed) -> None:
        see(Routing(layer, args[0].reshape(-1, args[0].shape[-1]), *output))

    return registered(b.router.register_forward_hook(partial(hook, b.layer)) for b in blocks)


def observe_residuals(blocks: Sequence[MoeBlock], see: Callable[[int, Tensor], None]) -> Scope:
    """Calls `see` with layer and residual stream (T, D), if known, before a block's router runs."""

    def hook(layer: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        see(layer, args[0].reshape(-1, args[0].shape[-1]))

    return registered(
        block.residual.norm.register_forward_pre_hook(partial(hook, block.layer))
        for block in blocks
        if block.residual is not None
    )


def observe_steps(
    blocks: Sequence[MoeBlock], see: Callable[[int, Step, Tensor, Tensor], None]
) -> Scope:
    """Calls `see` with layer, step, input and output of every norm or projection behind experts."""

    def hook(at: tuple[int, Step], _module: nn.Module, args: Any, output: Tensor) -> None:
        see(*at, args[0], output)

    return registered(
        step.module.register_forward_hook(partial(hook, (block.layer, step)))
        for block in blocks
        if block.residual is not None
        for step in block.residual.steps
    )


def observe_experts(
    blocks: Sequence[MoeBlock],
    see: Callable[[ExpertCall], None],
    combined: Callable[[int, Tensor], None] | None = None,
    *,
    sees_own: bool = False,
) -> Scope:
    """Runs experts one by one, in id order, and calls `see` with each output.

    After a block's last expert, `combined` gets the layer and the weighted sum (T, D), on a CPU
    bit-equal to that of the unobserved model. One expert's output is `experts(x, e, 1)`: the code
    of the model, so no family needs code here. Of processes that hold one model together each sees
    all outputs; with `sees_own` only those of the experts that it holds whole.
    """

    def run(
        block: MoeBlock, own: Own, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        def watch(*parts: Any) -> None:
            see(ExpertCall(block.layer, *parts))

        routing = (x_TD, experts_TK, weights_TK, block.n_experts)
        share = getattr(block.experts, "share", None)
        if share is None:
            y_TD = by_expert(*routing, own, watch)
        elif sees_own and share.is_whole:
            y_TD = by_expert(*routing, share.part, watch, only=share.ids)
            share.group.total(y_TD)
        else:  # the parts of all outputs are summed at once
            y_TD = by_expert(*routing, share.part, watch, total=share.group.total)
        if combined is not None:
            combined(block.layer, y_TD)
        return y_TD

    changes = (replaced_forward(b.experts, partial(run, b, own_expert(b))) for b in blocks)
    return registered(changes)


def given_outputs(block: MoeBlock, outputs: Iterable[Known]) -> Scope:
    """Known outputs of a block's experts, pass by pass: only what is missing is computed."""
    left, own = iter(outputs), own_expert(block)

    def run(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        parts = (x_TD, experts_TK, weights_TK, block.n_experts)
        return by_expert(*parts, own, known=next(left))

    return replaced_forward(block.experts, run)


def own_expert(block: MoeBlock) -> Own:
    """A function of one expert: its tokens (M, D) → its outputs before the gate weight."""
    if block.declared is not None:
        own: Own = block.experts.own_expert  # type: ignore[assignment]
        return own
    if (share := getattr(block.experts, "share", None)) is not None:
        whole: Own = share.whole
        return whole
    config = getattr(block.experts, "config", None)
    is_constant_too = hasattr(block.experts, "places")  # layout exact
    if getattr(config, "_experts_implementation", None) == BY_EXPERT and not is_constant_too:
        return partial(own_output, block.experts)
    forward = own_forward(block.experts)

    def one(expert: int, x_MD: Tensor) -> Any:
        chosen_M1 = torch.full((len(x_MD), 1), expert, device=x_MD.device)
        return forward(x_MD, chosen_M1, x_MD.new_ones(len(x_MD), 1))

    return one


def own_forward(module: nn.Module) -> Any:
    """The forward of a module, inside accelerate's wrapper if it has one."""
    return module.__dict__.get(INNER, module.forward)


@contextmanager
def replaced_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Replaces the forward of a module in the context, inside accelerate's wrapper."""
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


class _Softmaxes(TorchFunctionMode):
    """Keeps inputs and results of softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax":
            self.calls.append((args[0], result))
        return result


def give_logits(router: nn.Module) -> None:
    """Lets a router that gives the softmax of its logits give those instead, from now on."""
    forward = own_forward(router)
    if isinstance(forward, partial) and forward.func is _with_logits:
        return
    name = INNER if INNER in router.__dict__ else "forward"
    setattr(router, name, partial(_with_logits, forward))


def _with_logits(forward: Forward, *args: Any, **kwargs: Any) -> Routed:
    with _Softmaxes() as watched:
        given, weights_TK, experts_TK = forward(*args, **kwargs)
    logits_TE = next((x for x, result in watched.calls if result is given), given)
    return logits_TE, weights_TK, experts_TK


def family_routing(router: nn.Module) -> Scope:
    """Routes without the rule of a routed checkpoint, whose routers name their family's forward."""
    family: Forward | None = getattr(router, "family_forward", None)
    return nullcontext() if family is None else replaced_forward(router, family)


@torch.inference_mode()
def route(router: nn.Module, call: RouterCall) -> Routed:
    """Runs a router without its hooks."""
    logits_TE, weights_TK, experts_TK = router.forward(*call.args, **call.kwargs)
    return logits_TE, weights_TK, experts_TK


class _Operations(TorchFunctionMode):
    """Passes the arguments of all operations to `read`, and position, name and result to `see`."""

    def __init__(self, see: Callable[[int, str, Any], Any], read: Change | None = None) -> None:
        super().__init__()
        self.see, self.read, self.n_done = see, read, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.read is not None:
            with torch._C.DisableTorchFunction():  # nested changes must not count these
                args = tuple(map(self.read, args))
        result = func(*args, **(kwargs or {}))
        self.n_done += 1
        return self.see(self.n_done - 1, str(getattr(func, "__name__", func)), result)


def _run_changed(
    forward: Forward, op: LogitsOp, change: Change, read: Change | None, *args: Any, **kwargs: Any
) -> Routed:
    def see(index: int, name: str, result: Any) -> Any:
        if index != op.index:
            return result
        if name != op.name or not isinstance(result, Tensor):
            raise ContractError(
                f"a router computes its logits by {name} where it used {op.name} on the probe: "
                "its logits cannot be changed"
            )
        with torch._C.DisableTorchFunction():
            return change(result)

    operations = _Operations(see, read)
    with operations:
        logits_TE, weights_TK, experts_TK = forward(*args, **kwargs)
    if operations.n_done <= op.index:
        raise ContractError("a router ran fewer operations than on the probe")
    return logits_TE, weights_TK, experts_TK


def changed_logits(router: nn.Module, op: LogitsOp, change: Change) -> Scope:
    """Changes the logits of a router in the context."""
    return replaced_forward(router, partial(_run_changed, own_forward(router), op, change, None))


def tape_of(router: nn.Module, call: RouterCall) -> tuple[list[tuple[str, Any]], Routed]:
    """All operations of one call with their results, and the output of the router."""
    results: list[tuple[str, Any]] = []
    forward = own_forward(router)

    def note(_index: int, name: str, result: Any) -> Any:
        results.append((name, result))
        return result

    def taped(*args: Any, **kwargs: Any) -> Any:
        with _Operations(note):
            return forward(*args, **kwargs)

    with replaced_forward(router, taped):
        return results, route(router, call)


def tensors_read(call: Callable[[], Any]) -> tuple[set[int], Any]:
    """The ids of the tensors that the operations of a call read, and its result."""
    read: set[int] = set()

    def note(value: Any) -> Any:
        if isinstance(value, Tensor):
            read.add(id(value))
        return value

    with _Operations(lambda _index, _name, result: result, note):
        return read, call()


def logits_ops(router: nn.Module, call: RouterCall) -> Iterator[LogitsOp]:
    """Candidates for the operation of the logits: first those that give the very tensor."""
    results, (logits_TE, *_) = tape_of(router, call)
    same = [i for i, (_, result) in enumerate(results) if result is logits_TE]
    equal = [i for i, (_, result) in enumerate(results) if _equals(result, logits_TE)]
    for index in dict.fromkeys((*reversed(same), *reversed(equal))):
        yield LogitsOp(index, results[index][0])


def _equals(result: object, logits_TE: Tensor) -> bool:
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return False
    if result.numel() != logits_TE.numel() or result.shape[-1] != logits_TE.shape[-1]:
        return False
    return torch.equal(result.reshape(logits_TE.shape).to(logits_TE.dtype), logits_TE)


def biased_forward(
    block: MoeBlock, bias_E: Tensor, rows: Callable[[], Tensor | None] = lambda: None
) -> Callable[..., Routed]:
    """A router's forward with `bias_E` (E,) added to its logits; −inf forbids an expert.

    `rows` gives the tokens (N,) for finite biases, None for all. A selection bias is masked by −inf
    as well: a masked logit alone would not keep an expert from being chosen.
    """
    if (op := block.logits_op) is None:
        raise ContractError(
            f"{block.name}: no operation of its router gives the logits that it chooses by, so "
            "biases and masks cannot act there: this model can be profiled, and not changed"
        )
    forward, is_forbidden_E = own_forward(block.router), bias_E.isneginf()

    def is_one_each(value: Any) -> bool:
        is_number = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0
        return is_number and value.shape[-1] == value.numel() == len(bias_E)

    def masked(value: Any) -> Any:
        if not is_one_each(value):
            return value
        return value.masked_fill(is_forbidden_E.to(value.device), -torch.inf)

    def read(value: Any) -> Any:
        # Looked up in each operation: an offloaded bias is present only during the forward.
        return masked(value) if is_one_each(value) and value is block.selection_tensor() else value

    def run(*args: Any, **kwargs: Any) -> Routed:
        add = partial(_added, bias_E=bias_E, rows_N=rows())
        # Some blocks pass their selection bias (E,) to the router in each call.
        with torch._C.DisableTorchFunction():  # as in `_Operations`
            args = tuple(map(masked, args))
            kwargs = {name: masked(value) for name, value in kwargs.items()}
        routed = _run_changed(forward, op, add, read, *args, **kwargs)
        is_forbidden_X = F.pad(is_forbidden_E, (0, 1)).to(routed[2].device)  # nobody may be chosen
        if bool(is_forbidden_X[routed[2]].any()):
            raise ContractError(
                f"{block.name}: its router chooses an expert that is masked: this cut cannot "
                "be shown as a mask"
            )
        return routed

    return run


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
    """Whether logits differ by the bias, (E,) or (T, E), up to rounding in their dtype."""
    bias = bias.to(before_TE.device).double()
    wanted_TE = before_TE.double() + bias
    after_TE = after_TE.double()
    if not torch.equal(wanted_TE.isneginf(), after_TE.isneginf()):
        return False
    # The sum is rounded once; on some devices the product is not repeatable to the bit.
    size_TE = before_TE.double().abs() + bias.abs() + 1
    is_off_TE = (wanted_TE - after_TE).abs() > torch.finfo(before_TE.dtype).eps * size_TE
    return not bool((is_off_TE & wanted_TE.isfinite()).any())
