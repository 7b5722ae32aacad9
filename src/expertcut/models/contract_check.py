"""Reads a contract file, and believes the blocks that it declares once their numbers are right."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.errors import ContractError, ExpertcutError
from expertcut.files import read_file
from expertcut.models import hooks
from expertcut.models.declared import Declared, DeclaredBlock, OwnCall, copied
from expertcut.models.gate_laws import broken, check_calls, routing_faults
from expertcut.models.kernels import INNER
from expertcut.models.moe_block import MoeBlock


@dataclass(frozen=True)
class Contract:
    """A contract file that was read and run."""

    path: Path
    sha256: str
    blocks: Callable[[Any], Iterable[Any]] = field(compare=False)


def read_contract(path: Path, recorded: str | None = None) -> Contract:
    """Runs a contract file; ContractError if it is not the `recorded` one, or not a contract."""
    try:
        content = read_file(path)
    except OSError as error:
        raise ContractError(f"{path} cannot be read: {error.strerror}: put it there") from None
    sha256 = hashlib.sha256(content).hexdigest()
    if recorded not in (None, sha256):
        raise ContractError(
            f"{path} is not the contract that was profiled with: its SHA-256 begins with "
            f"{sha256[:8]}, recorded is {str(recorded)[:8]}: put that file back, or profile again"
        )
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    with _running(str(path)):
        exec(compile(content, str(path), "exec"), names)  # as --trust-remote-code allows
    if not callable(blocks := names.get("blocks")):
        raise ContractError(f"{path} is not a contract: it must define blocks(model)")
    return Contract(path.absolute(), sha256, blocks)


@contextmanager
def _running(what: str) -> Iterator[None]:
    """Turns any exception of a contract's code into a ContractError."""
    try:
        yield
    except ExpertcutError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ContractError(f"{what} fails with {type(error).__name__}: {reason}") from error


@torch.inference_mode()
def declare(model: Any, contract: Contract, input_ids_1T: Tensor) -> tuple[MoeBlock, ...]:
    """The declared blocks, checked on the tokens; from then on modules run as their contract says.

    Routers are not explained yet; ContractError if a number is not as the contract says.
    """
    weights = _weights(model)
    with _running(f"{contract.path}: blocks(model)"):
        declared = list(contract.blocks(model))
    if not declared:
        family = str(getattr(model.config, "model_type", "?"))
        raise ContractError(
            f"{contract.path} yields no block of this {family}: it is the contract of another "
            "model, or recognises blocks by other names"
        )
    owner: dict[int, Declared] = {}
    for own in declared:
        _check_fields(model, contract, own)
        if (first := owner.setdefault(id(own.module), own)) is not own:
            raise broken(own, "storage", f"it owns the same experts as {first.name}")
    own_calls = _own_calls(model, declared, input_ids_1T)
    blocks: list[MoeBlock] = []
    for own, calls in zip(declared, own_calls, strict=True):
        check_calls(own, len(calls), own.calls)
        with _running(f"{contract.path}: the code of {own.name}"):
            parts = [_checked(own, call) for call in calls]
        for call, part in enumerate(parts):
            blocks.append(_block(own, call, len(blocks), *part))
        _install(model, own, [part for part, _ in parts])
    after = _weights(model)
    if changed := [name for name in weights if weights[name] != after.get(name)]:
        raise ContractError(f"{contract.path} changes the model: {changed[0]} is not as loaded")
    return tuple(blocks)


def _weights(model: nn.Module) -> dict[str, str]:
    """The SHA-256 of every tensor that is in memory."""
    return {
        name: hashlib.sha256(
            tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        ).hexdigest()
        for name, tensor in model.state_dict().items()
        if tensor.device.type != "meta"
    }


def _check_fields(model: nn.Module, contract: Contract, own: Any) -> None:
    """Refuses a block that cannot be one, before anything runs."""
    if not isinstance(own, Declared):
        found = type(own).__name__
        raise ContractError(f"{contract.path} yields a {found}, must be a Declared for each block")
    n_experts, faults = len(own.experts), []
    modules = dict(model.named_modules())
    if modules.get(own.name) is not own.module:
        faults.append("the model has another module of that name than `module`")
    if not 1 <= own.top_k <= n_experts:
        faults.append(f"it cannot route each token to {own.top_k} of {n_experts} experts")
    if own.calls < 1 or n_experts % own.groups or own.top_k % own.groups:
        faults.append(
            f"{own.top_k} of {n_experts} experts do not lie in {own.groups} groups, or calls "
            f"{own.calls} is below 1"
        )
    if any(not 0 <= e < n_experts for e in own.constants):
        faults.append(f"`constants` names experts outside 0 to {n_experts - 1}")
    if faults:
        raise ContractError(f"{contract.path}: {own.name}: {faults[0]}")


def _own_calls(
    model: Any, declared: Sequence[Declared], input_ids_1T: Tensor
) -> list[list[OwnCall]]:
    """The forwards of each module in one pass of the model as it is."""
    found: dict[int, list[OwnCall]] = {id(own.module): [] for own in declared}
    given: dict[int, tuple[Any, Any]] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        # Some change their input in place.
        given[id(module)] = tuple(map(copied, args)), {k: copied(v) for k, v in kwargs.items()}

    def after(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        found[id(module)].append(OwnCall(*given.pop(id(module)), output))

    modules = {id(own.module): own.module for own in declared}.values()
    with (
        hooks.registered(m.register_forward_pre_hook(before, with_kwargs=True) for m in modules),
        hooks.registered(m.register_forward_hook(after, with_kwargs=True) for m in modules),
    ):
        model(input_ids=input_ids_1T, use_cache=False)
    return [found[id(own.module)] for own in declared]


def _checked(own: Declared, call: OwnCall) -> tuple[DeclaredBlock, hooks.Routed]:
    """The block of one call with its routing on the probe; ContractError if a number is off."""
    block = DeclaredBlock(own, call)
    x, state = block.split(call.args, call.kwargs)
    x_TD = x.reshape(-1, x.shape[-1])
    read, routed = hooks.tensors_read(lambda: block.router(x_TD, *state))
    block.router.hold(read)
    experts_TK, n_tokens, n_experts = routed[2], len(x_TD), len(own.experts)
    shapes = [tuple(tensor.shape) for tensor in routed]
    if shapes != [(n_tokens, n_experts), *[(n_tokens, own.top_k)] * 2]:
        fault = (
            f"its logits, weights and experts have the shapes {shapes}, must be "
            f"{(n_tokens, n_experts)} and twice {(n_tokens, own.top_k)}"
        )
        raise broken(own, "choice", fault)
    if fault := next(routing_faults(routed, n_experts), ""):
        raise broken(own, "choice", fault)
    per_group_TG = torch.stack(
        [experts_TK // (n_experts // own.groups) == g for g in range(own.groups)]
    ).sum(-1)
    if bool((per_group_TG != own.top_k // own.groups).any()) and own.groups > 1:
        raise broken(own, "choice", f"a token's experts do not lie evenly in {own.groups} groups")
    for expert, kind in own.constants.items():
        y_TD = own.experts[expert](x_TD)
        factor = 0.0 if kind == "zero" else float((x_TD * y_TD).sum() / (x_TD * x_TD).sum())
        if kind != "constant" and not torch.allclose(y_TD, factor * x_TD, rtol=1e-2, atol=1e-6):
            raise broken(
                own, "sum", f"expert {expert} is not a {kind} expert, but `constants` says so"
            )
    block.check_output(call, block(*call.args, **call.kwargs))
    return block, routed


def _block(
    own: Declared, call: int, layer: int, part: DeclaredBlock, routed: hooks.Routed
) -> MoeBlock:
    n_experts, is_one = len(own.experts), own.calls == 1
    is_varied = bool((routed[2] == n_experts).any())
    return MoeBlock(
        own.name if is_one else f"{own.name}.{call}",
        layer,
        own.module if is_one else part,
        part.router,
        part.experts,
        n_experts,
        # Who may take all experts takes as many as it needs: one may be enough.
        1 if is_varied and own.top_k == n_experts else own.top_k,
        own.groups,
        own.groups,
        scoring=own.scoring,
        most=own.top_k if is_varied else None,
        declared=part,
    )


def _install(model: nn.Module, own: Declared, parts: Sequence[DeclaredBlock]) -> None:
    """Replaces the forward of a module, inside accelerate's wrapper, from now on."""
    turn = cycle(parts)

    def begin(*_: object) -> None:
        nonlocal turn
        turn = cycle(parts)

    if own.calls > 1:  # a pass that ended early must not shift the next one's calls
        model.get_submodule(own.name.rpartition(".")[0]).register_forward_pre_hook(begin)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return next(turn)(*args, **kwargs)

    setattr(own.module, INNER if INNER in vars(own.module) else "forward", forward)
