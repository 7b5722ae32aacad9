"""Where each tensor of an adapter belongs in the model, told by names and shapes on disk.

What adapts all experts of a block at once lies, for E experts and rank r, as lora_A (r·E, in), row
e·r + j for expert e, and as lora_B (out, r·E), column j·E + e. A second parameter of the same
module wraps the first, which then goes by `….base_layer`; which is which is told by their shapes.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from expertcut.checkpoints.adapters.reading import PARAMETER, PREFIX, Adapter
from expertcut.checkpoints.layouts.names import DiskBlock, Headers

Kind = Literal["all experts", "one expert", "router", "whole router", "elsewhere"]

_WRAPPED = r"(\.base_layer)*"
_ALL_EXPERTS = re.compile(rf"experts{_WRAPPED}")
_ONE_EXPERT = re.compile(r"experts\.(?P<expert>0|[1-9]\d*)\.(?P<part>[^.]+)")
_ROUTER = re.compile(rf"(gate|router){_WRAPPED}")
_OF_BLOCK = re.compile(r"(experts|gate|router)(\..*)?")
_LAST = re.compile(r"(.*\.)?(down_proj|w2|output_linear)")


@dataclass(frozen=True)
class Place:
    """What a tensor, or a pair of lora_A and lora_B, adapts.

    `block` is the loaded model's name, None elsewhere; `is_last` says that it adapts the last
    projection of experts.
    """

    kind: Kind
    names: tuple[str, ...]
    block: str | None = None
    expert: int | None = None
    is_last: bool = False


@dataclass(frozen=True)
class Base:
    """The model that the adapter must be of: its tensors, its blocks by their loaded names."""

    headers: Headers
    blocks: Mapping[str, DiskBlock]
    is_tied: bool

    def block_of(self, module: str) -> tuple[str, str]:
        """The block that a module of it is in, by its loaded name, and its name in there."""
        for name, disk in self.blocks.items():
            for prefix in (name, disk.name):
                if module.startswith(f"{prefix}."):
                    return name, module.removeprefix(f"{prefix}.")
        return "", module


def places(adapter: Adapter, base: Base) -> Iterator[Place]:
    """Every tensor of an adapter once, in no order.

    Raises:
        ModelError: something that the model does not have or that cannot be sliced.
    """
    for module, pair in adapter.pairs.items():
        block, part = base.block_of(module)
        if block and _ALL_EXPERTS.fullmatch(part):
            yield _all_experts(adapter, base, block, pair)
        elif block and (one := _ONE_EXPERT.fullmatch(part)):
            yield _one_expert(adapter, base, block, (int(one["expert"]), one["part"]), pair)
        elif block and _ROUTER.fullmatch(part):
            yield _router(adapter, base, block, pair)
        else:
            yield _elsewhere(adapter, base, module, pair)
    for name in adapter.others:
        yield _other(adapter, base, name)


def _all_experts(adapter: Adapter, base: Base, block: str, pair: tuple[str, str]) -> Place:
    disk = base.blocks[block]
    _check_axes(adapter, pair, 2)
    (rows, n_in), (n_out, _) = (adapter.shape(name) for name in pair)
    first, last = _widths(disk, base.headers)
    if first == last:
        raise adapter.refusal(f"the projections of {block} are all {first}: they look alike")
    if (n_out, n_in) in (first, last) and (n_in, n_out) not in (first, last):
        raise adapter.refusal(
            f"{pair[0]} is {adapter.shape(pair[0])} and its lora_B {adapter.shape(pair[1])}: an "
            "older peft saved it, with in and out of experts exchanged, and a peft of today cannot "
            "load it: load it with that peft, merge it, and profile and prune the merged model"
        )
    if (n_in, n_out) not in (first, last) or rows % disk.n_experts:
        raise adapter.refusal(
            f"{pair[0]} is {adapter.shape(pair[0])} and its lora_B {adapter.shape(pair[1])}, but "
            f"{block} has {disk.n_experts} experts of {first[0]} → {first[1]} and "
            f"{last[0]} → {last[1]}: {_ANOTHER}"
        )
    is_last = (n_in, n_out) == last
    rank, ranks = rows // disk.n_experts, _ranks(adapter, block, is_last=is_last)
    if rank not in ranks:
        raise adapter.refusal(
            f"{pair[0]} has rank {rank} for each of {disk.n_experts} experts, its config says "
            f"{' or '.join(map(str, sorted(ranks))) or 'nothing'}: {_ANOTHER}"
        )
    return Place("all experts", pair, block, is_last=is_last)


def _ranks(adapter: Adapter, block: str, *, is_last: bool) -> set[int]:
    """The ranks of the targeted parameters of experts that are, or are not, the last projection."""
    named = {t.rpartition(".")[2] for t in adapter.settings.target_parameters or ()}
    named = {name for name in named if PARAMETER.fullmatch(name)}
    own = {name for name in named if bool(_LAST.fullmatch(name)) == is_last}
    return {adapter.rank(f"{block}.experts.{name}") for name in own}


def _widths(disk: DiskBlock, headers: Headers) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of an expert's first projections, which the loaded model has as one, and of its last.

    Each as in and out; biases are no matrices and do not count.
    """
    width = headers[disk.router_weight].shape[1]
    own = disk.by_expert[0].values() if disk.by_expert else disk.fused
    sizes: dict[bool, int] = {True: 0, False: 0}
    for name in own:
        shape = headers[name].shape[0 if disk.by_expert else 1 :]
        if len(shape) == 2:
            sizes[name in disk.last] += math.prod(shape)
    return (width, sizes[False] // width), (sizes[True] // width, width)


def _one_expert(
    adapter: Adapter, base: Base, block: str, which: tuple[int, str], pair: tuple[str, str]
) -> Place:
    (expert, part), disk = which, base.blocks[block]
    if not disk.by_expert:
        raise adapter.refusal(
            f"{pair[0]} is of one expert, but the experts of {block} lie in one tensor: {_ANOTHER}"
        )
    own = disk.by_expert[expert] if expert < disk.n_experts else {}
    _check_linear(adapter, base.headers, own.get(f"{part}.weight"), pair)
    return Place("one expert", pair, block, expert, is_last=bool(_LAST.fullmatch(part)))


def _router(adapter: Adapter, base: Base, block: str, pair: tuple[str, str]) -> Place:
    _check_linear(adapter, base.headers, base.blocks[block].router_weight, pair)
    return Place("router", pair, block)


def _elsewhere(adapter: Adapter, base: Base, module: str, pair: tuple[str, str]) -> Place:
    weight = f"{module}.weight" if f"{module}.weight" in base.headers else None
    if weight is not None or not (base.is_tied and module == "lm_head"):
        _check_linear(adapter, base.headers, weight, pair)
    return Place("elsewhere", pair)


def _check_linear(
    adapter: Adapter, headers: Headers, weight: str | None, pair: tuple[str, str]
) -> None:
    """That a pair adapts a weight that is there; the widths of a convolution are not told."""
    if weight is None:
        raise adapter.refusal(f"{pair[0]} adapts what the model does not have: {_ANOTHER}")
    _check_axes(adapter, pair, len(headers[weight].shape))
    (_, n_in, *more), (n_out, *_) = (adapter.shape(name) for name in pair)
    if not more and headers[weight].shape != (n_out, n_in):
        raise adapter.refusal(
            f"{pair[0]} and its lora_B adapt {n_in} → {n_out}, but {weight} is "
            f"{headers[weight].shape}: {_ANOTHER}"
        )


def _check_axes(adapter: Adapter, pair: tuple[str, str], n_axes: int) -> None:
    if wrong := next((name for name in pair if len(adapter.shape(name)) != n_axes), None):
        raise adapter.refusal(
            f"{wrong} is {adapter.shape(wrong)}, but what it adapts has {n_axes} axes: {_ANOTHER}"
        )


def _other(adapter: Adapter, base: Base, name: str) -> Place:
    """Modules that were trained whole, biases, embeddings, magnitudes of DoRA."""
    own = name.removeprefix(PREFIX)
    block, part = base.block_of(own)
    if block and _OF_BLOCK.fullmatch(part):
        disk = base.blocks[block]
        is_weight = re.fullmatch(r"(gate|router)\.weight", part) is not None
        stored = disk.router_weight if is_weight else f"{disk.name}.{part}"
        if stored not in disk.axes or stored in disk.fused:
            raise adapter.refusal(
                f"{name} is neither lora_A nor lora_B: of experts and routers only these, and "
                "routers trained whole, can be sliced (no DoRA, no bias, no modules_to_save)"
            )
        _check_same(adapter, base.headers, stored, name)
        return Place("whole router", (name,), block)
    if own in base.headers:
        _check_same(adapter, base.headers, own, name)
    return Place("elsewhere", (name,))


def _check_same(adapter: Adapter, headers: Headers, stored: str, name: str) -> None:
    if adapter.shape(name) != headers[stored].shape:
        raise adapter.refusal(
            f"{name} is {adapter.shape(name)}, in the model {headers[stored].shape}: {_ANOTHER}"
        )


_ANOTHER = "the adapter was trained on another model, give the one of this"
