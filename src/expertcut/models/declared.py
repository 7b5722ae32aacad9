"""Blocks of other shapes, as a contract file declares them: what routes, and what are experts.

Each `Declared` becomes a block with a thin router and thin experts around the contract's functions,
and the module's own forward gives way to theirs: shared + Σ w·f. Routing is then recomputed instead
of read, so it is believed only as far as numbers go: `contract_check.declare` compares the outputs
of both on 16 tokens, `gate_laws.verifying` again on the first real prompt.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expertcut.models import hooks
from expertcut.models.gate_laws import broken, first
from expertcut.models.kernels import by_expert
from expertcut.models.modeling_routed import Scoring

Kind = Literal["zero", "copy", "constant"]
_EXACT, _FUSED, _HALF = 1e-5, 1e-3, 3e-2  # of the largest output; fused is a contract's own `run`
_FITS = 1e-3  # of the largest output: what is left over where another sum explains it


@dataclass(frozen=True, eq=False)
class Declared:
    """One MoE block, as `blocks(model)` of a contract yields it.

    `route(module, x_TD, *state)` gives logits_TE, weights_TK, experts_TK and what the forward of
    `module` returns beside its output. `state` is what that forward takes beside x, in its order,
    as far as `route` has room for it. Expert −1, with weight 0, is nobody. `run(module, x_TD,
    experts_TK, weights_TK)` is a faster Σ w·f for passes that nobody watches.
    """

    name: str  # of the module in the model
    module: nn.Module
    experts: Sequence[Callable[[Tensor], Tensor]]  # modules or functions: x_MD → y_MD
    top_k: int  # experts per token, at most
    route: Callable[..., tuple[Any, ...]]
    run: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] | None = None
    shared: Callable[[Tensor], Tensor] | None = None  # x_TD → y_TD, added to the sum
    calls: int = 1  # forwards of the module in one pass: each becomes a block
    constants: Mapping[int, Kind] = field(default_factory=dict)  # experts without computation
    names: str | None = None  # of experts in the files: model.layers.{l}.mlp.experts.{e}
    groups: int = 1  # of experts, each of which gives equally many of a token's
    scoring: Scoring = "softmax"  # makes α of the logits where the gate weights do not tell
    by_prompt: bool = False  # routing depends on the other tokens of a pass, as capacities do


@dataclass(frozen=True)
class OwnCall:
    """One forward of a declared module by the model's own code."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


class _Router(nn.Module):
    """The contract's routing; `further` is what it gave last beside logits, weights and experts."""

    def __init__(self, source: Declared) -> None:
        super().__init__()
        self.source = source
        self.parts = nn.ModuleList()  # what holds the tensors that it reads
        self.further: tuple[Any, ...] = ()

    def forward(self, x_TD: Tensor, *state: Any) -> hooks.Routed:
        own = self.source
        logits_TE, weights_TK, experts_TK, *further = own.route(own.module, x_TD, *state)
        self.further = tuple(further)
        return logits_TE, weights_TK, experts_TK.masked_fill(experts_TK < 0, len(own.experts))

    def hold(self, read: set[int]) -> None:
        """Makes its own what holds these tensors, by their ids."""
        experts = {id(part) for e in modules_of(self.source) for part in e.modules()}
        for module in self.source.module.modules():
            direct = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            used = {name: tensor for name, tensor in direct if id(tensor) in read}
            if used and experts & set(map(id, module.modules())):  # the block itself: without them
                holder = nn.Module()
                for name, tensor in used.items():
                    setattr(holder, name, tensor)
                self.parts.append(holder)
            elif used:
                self.parts.append(module)


def modules_of(source: Declared) -> list[nn.Module]:
    """The modules among the experts, also those that a `partial` calls."""
    found = []
    for expert in source.experts:
        given = expert.args if isinstance(expert, partial) else (expert,)
        found += [value for value in given if isinstance(value, nn.Module)]
    return found


class _Experts(nn.Module):
    """The contract's experts as one module."""

    def __init__(self, source: Declared) -> None:
        super().__init__()
        self.source = source
        self.parts = nn.ModuleList(modules_of(source))

    def own_expert(self, expert: int, x_MD: Tensor) -> Tensor:
        """The outputs of one expert on its tokens."""
        return self.source.experts[expert](x_MD)

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        own = self.source
        if own.run is not None:
            return own.run(own.module, x_TD, experts_TK, weights_TK)
        return by_expert(x_TD, experts_TK, weights_TK, len(own.experts), self.own_expert)


class DeclaredBlock(nn.Module):
    """The forward of a declared module by its contract, in place of its own."""

    def __init__(self, source: Declared, call: OwnCall) -> None:
        super().__init__()
        self.source = source
        self.own_forward = hooks.own_forward(source.module)
        self.signature = inspect.signature(self.own_forward)
        kinds = [p.kind for p in inspect.signature(source.route).parameters.values()]
        has_room = inspect.Parameter.VAR_POSITIONAL in kinds
        self.n_state = None if has_room else max(len(kinds) - 2, 0)
        # Of what the module returns beside its output; None if that is all.
        is_tuple = isinstance(call.output, tuple)
        self.are_none = [v is None for v in call.output[1:]] if is_tuple else None
        self.router, self.experts = _Router(source), _Experts(source)

    def split(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, list[Any]]:
        """The input and the state among the arguments of the module's forward."""
        if len(args) == 1 and not kwargs and self.n_state == 0:
            return args[0], []
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        x, *state = (*bound.args, *bound.kwargs.values())
        return x, state[: self.n_state]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        x, state = self.split(args, kwargs)
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE, weights_TK, experts_TK = self.router(x_TD, *state)
        further = iter(self.router.further or (logits_TE,))
        y_TD = self.experts(x_TD, experts_TK, weights_TK)
        if self.source.shared is not None:
            y_TD = y_TD + self.source.shared(x_TD)
        y = y_TD.reshape(*x.shape[:-1], y_TD.shape[-1])
        if self.are_none is None:
            return y
        return (y, *(None if is_none else next(further, None) for is_none in self.are_none))

    def expert_weights(self) -> Iterator[Tensor]:
        """The matrices (E, ·, ·) of experts that are modules alike; none of others."""
        parts = [dict(part.named_parameters()) for part in modules_of(self.source)]
        shapes = [{n: t.shape for n, t in own.items() if t.ndim == 2} for own in parts]
        if len(parts) == len(self.source.experts) and all(own == shapes[0] for own in shapes):
            yield from (torch.stack([own[name] for own in parts]) for name in shapes[0])

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Compares an output with that of the module's own forward; ContractError if it drifts."""
        args, kwargs = [*map(copied, args)], {name: copied(v) for name, v in kwargs.items()}
        given = [*map(copied, args)], {name: copied(v) for name, v in kwargs.items()}
        own = self.own_forward(*args, **kwargs)  # some change their input in place
        self.check_output(OwnCall(tuple(given[0]), given[1], own), output)

    def check_output(self, own: OwnCall, output: Any) -> None:
        """Refuses an output that differs from that of the module's own forward."""
        wanted, found = first(own.output), first(output)
        if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
            shape = tuple(getattr(wanted, "shape", ()))
            fault = f"its own output has shape {shape}, the contract's {tuple(found.shape)}"
            raise broken(self.source, "sum", fault)
        tolerance = _EXACT if self.source.run is None else _FUSED
        tolerance = _HALF if wanted.dtype.itemsize < 4 else tolerance
        off = _distance(found, wanted)
        if not off <= tolerance:
            fault = f"its own output differs from the contract's by {off:.2%}: {self._why(own)}"
            raise broken(self.source, "sum", fault)
        further = zip(own.output[1:], output[1:], strict=True) if self.are_none else ()
        for number, (was, now) in enumerate(further, start=2):
            is_same = was is now
            if isinstance(was, Tensor) and isinstance(now, Tensor) and was.numel() == now.numel():
                is_same = _distance(now.reshape(was.shape), was) <= tolerance
            if not is_same:
                fault = (
                    f"its own forward returns something else in place {number} than `route` of "
                    "the contract gives behind logits, weights and experts"
                )
                raise broken(self.source, "sum", fault)

    def _why(self, own: OwnCall) -> str:
        """What would explain the difference: other weights, other experts, or something more."""
        x, state = self.split(own.args, own.kwargs)
        x_TD = x.reshape(-1, x.shape[-1])
        _, weights_TK, experts_TK = self.router(x_TD, *state)
        outputs_TDE = torch.stack([e(x_TD) for e in self.source.experts], dim=-1).double().cpu()
        rest_TD = first(own.output).reshape(len(x_TD), -1).double().cpu()
        if self.source.shared is not None:
            rest_TD = rest_TD - self.source.shared(x_TD).double().cpu()
        given_TE = rest_TD.new_zeros(len(x_TD), len(self.source.experts) + 1)
        given_TE = given_TE.scatter(1, experts_TK.cpu(), weights_TK.double().cpu())[:, :-1]
        chosen_TE = given_TE != 0
        found_TE = _solved(outputs_TDE * chosen_TE[:, None], rest_TD)
        if found_TE is not None:
            token, expert = divmod(int((found_TE - given_TE).abs().argmax()), given_TE.shape[1])
            return (
                f"it weighs expert {expert} with {found_TE[token, expert]:.3g} where `route` gives "
                f"{given_TE[token, expert]:.3g}"
            )
        found_TE = _solved(outputs_TDE, rest_TD)
        if found_TE is not None:
            is_run_TE = found_TE.abs() > _FITS
            token = int((is_run_TE != chosen_TE).sum(dim=1).argmax())
            ran, chosen = (m[token].nonzero()[:, 0].tolist() for m in (is_run_TE, chosen_TE))
            return (
                f"it runs experts {ran} for a token that `route` sends to {chosen}: are some of "
                "`experts` swapped?"
            )
        return (
            "it adds something that `experts` do not give: a shared expert, which `shared` names, "
            "or experts with other weights"
        )


def _solved(columns_TDE: Tensor, wanted_TD: Tensor) -> Tensor | None:
    """The weights (T, E) with which columns make what is wanted; None if none do, or too many."""
    found = torch.linalg.lstsq(columns_TDE, wanted_TD[..., None], driver="gelsd").solution
    off = (columns_TDE @ found)[..., 0] - wanted_TD
    is_made = bool(off.abs().max() <= _FITS * wanted_TD.abs().max())
    return found[..., 0] if is_made and columns_TDE.shape[1] > columns_TDE.shape[2] else None


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value that is wanted."""
    off, size = (found.float() - wanted.float()).abs().max(), wanted.float().abs().max()
    return float(off / size.clamp(min=1e-30))


def copied(value: Any) -> Any:
    """A tensor of its own; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value
