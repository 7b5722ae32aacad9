"""The tensors of each MoE block on disk, recognised by names and shapes, not by family.

Three forms are known: a tensor per expert and projection (`…mlp.experts.3.down_proj.weight`,
`…block_sparse_moe.experts.3.w2.weight`), or several in its place where it is packed
(`….down_proj.weight_packed`, as modeling_packed.py lists them); all experts in one tensor (GPT-OSS:
`…experts.down_proj`); and such tensors right in the block (Granite: `…input_linear.weight`; Step:
`…moe.down_proj.weight`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from expertcut.edits.compression import Projection
from expertcut.errors import ContractError
from expertcut.models.safetensors_index import StoredTensor
from expertcut.models.validate import OTHER_PART

Headers = Mapping[str, StoredTensor]
OutsideAxes = Mapping[str, Mapping[str, int]]  # by a block's loaded name: tensor on disk, its axis
CONSTANT = "approx_value"  # the only tensor of a removed expert in layout exact
PROJECTIONS: Mapping[str, Projection] = {
    **{"gate_proj.weight": "gate", "up_proj.weight": "up", "down_proj.weight": "down"},
    **{"w1.weight": "gate", "w3.weight": "up", "w2.weight": "down"},
}
COPIED = "approx_scale"  # beside it in a packed checkpoint, of an expert that copies its input

_EXPERT = r"(?P<expert>0|[1-9]\d*)"
_OF_ONE_EXPERT = re.compile(rf"(?P<block>.+)\.experts\.{_EXPERT}\.(?P<part>.+)")
_CONSTANT_EXPERT = re.compile(
    rf"(?P<block>.+)\.constant_experts\.{_EXPERT}\.(?P<part>{CONSTANT}|{COPIED})"
)
_OF_ALL_EXPERTS = re.compile(
    r"(?P<block>.+)\.(experts\.(?P<part>(?!.*norm\.)[^.\d].*)"
    r"|(?P<bare>(input|output)_linear|(gate|up|down)_proj)\.weight)"
)
_SELECTION_BIAS = re.compile(r"(.*\.)?(e_score_correction_bias|expert_bias|router_bias)")
_ROUTER = re.compile(r"(router|gate|moe_statics)\..+")
_FURTHER_TOKENS = re.compile(r"(^|[._])(mtp|nextn)")  # multi-token prediction
# Of a packed projection its scales and factors: what is multiplied, if the expert is.
_LAST = re.compile(r"(down_proj|w2|output_linear)([._](weight(_scale|_u|_s)?|bias))?")
_PACKED = re.compile(r"(?<=\.weight)_(packed|scale|shape|u|v|s|rows)$")


@dataclass(frozen=True)
class DiskBlock:
    """One MoE block on disk; names are those of the headers."""

    name: str
    n_experts: int
    by_expert: tuple[Mapping[str, str], ...]  # by part after the number; empty for a constant
    constants: tuple[int, ...]  # experts whose only tensor is one, so that `fused` lack their rows
    axes: Mapping[str, int]  # of length E, of all tensors that experts share, the router's too
    last: frozenset[str]  # of the experts' last projection; empty if unknown
    router_weight: str
    logit_bias: str | None  # the router's own
    unclear_bias: str | None  # a `gate.bias`, which some families use for a selection bias
    fused: tuple[str, ...]  # each with all experts' weights

    def rows(self, experts: Iterable[int]) -> tuple[int, ...]:
        """The rows in `fused` of those experts that are no constants."""
        own = [expert for expert in range(self.n_experts) if expert not in self.constants]
        return tuple(own.index(expert) for expert in experts if expert in own)


def find_disk_blocks(headers: Headers) -> dict[str, DiskBlock]:
    """The MoE blocks of a checkpoint by their names on disk."""
    found: dict[str, list[str]] = {}
    for name, tensor in headers.items():
        if OTHER_PART.fullmatch(name):
            continue
        experts = _of_one_expert(name)
        fused = _OF_ALL_EXPERTS.fullmatch(name)
        if fused and not (fused["bare"] and len(tensor.shape) != 3):
            experts = experts or fused
        if experts and not _SELECTION_BIAS.fullmatch(name):
            found.setdefault(experts["block"], []).append(name)
    return {name: _disk_block(name, members, headers) for name, members in found.items()}


def match_blocks(
    headers: Headers, names: Iterable[str], outside: OutsideAxes | None = None
) -> tuple[dict[str, DiskBlock], frozenset[str]]:
    """The block on disk of each block of the loaded model, and the unused tensors.

    Unused are layers whose experts the model did not load (multi-token prediction): a new expert
    count would make them unreadable.
    """
    blocks = find_disk_blocks(headers)
    matched = blocks_of(headers, names, outside)
    used = {block.name for block in matched.values()}
    used_layers = {_layer(name)[0] for name in used}
    layers = {_layer(name)[0] for name in set(blocks) - used}
    if len(used) < len(matched) or layers & used_layers:
        raise ContractError(
            f"the experts of {', '.join(sorted(blocks))} on disk do not match those of the model, "
            f"{', '.join(matched)}: this form is not supported"
        )
    unused = tuple(f"{place}." for place in _unused(layers, used_layers))
    return matched, frozenset(name for name in headers if name.startswith(unused))


def _unused(layers: set[str], used: set[str]) -> set[str]:
    """The layers and modules of multi-token prediction, from the layers of their experts.

    In a list of layers that the model uses these are single layers; otherwise the whole module,
    `mtp` of `mtp.layers.0`.
    """
    used_lists = {layer.rpartition(".")[0] for layer in used}  # model.layers of model.layers.3
    places = {layer for layer in layers if layer.rpartition(".")[0] in used_lists}
    for layer in sorted(layers - places):
        parts = layer.split(".")
        roots = (".".join(parts[:i]) for i in range(1, len(parts)))
        root = next(r for r in roots if not any(f"{u}.".startswith(f"{r}.") for u in used))
        if not _FURTHER_TOKENS.search(root):
            raise ContractError(
                f"{layer} holds experts that the loaded model has no place for, and does not say "
                "that it predicts further tokens (mtp): this form is not supported"
            )
        places.add(root)
    return places


def blocks_of(
    headers: Headers, names: Iterable[str], outside: OutsideAxes | None = None
) -> dict[str, DiskBlock]:
    """The block on disk of each loaded one: by name, by name up to its layer, by layer number."""
    names = list(names)
    blocks = find_disk_blocks(headers)
    numbers = {_layer(name)[1] for name in names}
    matched = {}
    for name in names:
        prefix, number = _layer(name)
        found = [b for b in blocks.values() if b.name == name]
        found = found or [b for b in blocks.values() if _layer(b.name)[0] == prefix]
        found = found or _by_number(number, blocks, numbers)
        if len(found) != 1:
            raise ContractError(
                f"{name} has {len(found)} places on disk, must have one: found experts in "
                f"{', '.join(blocks) or 'no layer'}"
            )
        axes = (outside or {}).get(name, {})
        unclear = None if found[0].unclear_bias in axes else found[0].unclear_bias
        matched[name] = replace(found[0], axes={**found[0].axes, **axes}, unclear_bias=unclear)
    return matched


def _by_number(number: int, blocks: Mapping[str, DiskBlock], numbers: set[int]) -> list[DiskBlock]:
    """The blocks of a layer's number; blocks of multi-token prediction only without others."""
    found = [b for b in blocks.values() if _layer(b.name)[1] == number]
    lists: dict[str, set[int]] = {}
    for layer, layer_number in (_layer(name) for name in blocks):
        lists.setdefault(layer.rpartition(".")[0], set()).add(layer_number)
    whole = [b for b in found if numbers <= lists[_layer(b.name)[0].rpartition(".")[0]]]
    return [b for b in whole or found if not _FURTHER_TOKENS.search(b.name)] or whole or found


def _layer(block: str) -> tuple[str, int]:
    """A block's name up to its layer's number, and that number: `model.layers.3`, 3."""
    parts = block.split(".")
    for i in reversed(range(len(parts))):
        if parts[i].isdecimal():
            return ".".join(parts[: i + 1]), int(parts[i])
    raise ContractError(f"{block} holds experts but names no layer: this form is not supported")


def constant_name(block: str, expert: int, part: str = CONSTANT) -> str:
    """The tensor name of a removed expert's constant; loaders without such experts refuse it."""
    return f"{block}.constant_experts.{expert}.{part}"


def with_constants(block: DiskBlock, headers: Headers) -> DiskBlock:
    """The block with the tensors of its constant experts as their own: all go where others do."""
    by_expert = []
    for expert, own in enumerate(block.by_expert):
        names = {part: constant_name(block.name, expert, part) for part in (CONSTANT, COPIED)}
        by_expert.append(own or {part: name for part, name in names.items() if name in headers})
    constants = {n for own in by_expert for part, n in own.items() if part in (CONSTANT, COPIED)}
    return replace(block, by_expert=tuple(by_expert), constants=(), last=block.last | constants)


def output_width(block: DiskBlock, headers: Headers) -> int:
    """The width D of an expert's output; of experts in one tensor as their router reads it."""
    last = sorted(block.last.difference(block.fused))
    return headers[last[0]].shape[0] if last else headers[block.router_weight].shape[1]


def renumbered(block: DiskBlock, expert: int, number: int) -> dict[str, str]:
    """The names of an expert's tensors, and those that they have under another number."""
    kinds = {CONSTANT: "constant_experts", COPIED: "constant_experts"}
    return {
        name: f"{block.name}.{kinds.get(part, 'experts')}.{number}.{part}"
        for part, name in block.by_expert[expert].items()
    }


def earlier_constants(headers: Headers) -> dict[str, str]:
    """Constants under their earlier names (`experts.<id>.`), and today's names."""
    names = {name: constant_name(*of) for name, of in constants_in(headers).items()}
    return {name: today for name, today in names.items() if name != today}


def constants_in(headers: Headers) -> dict[str, tuple[str, int]]:
    """The block and the expert of each constant, by its tensor under either name."""
    found = {name: _of_one_expert(name) for name in headers}
    return {
        name: (of["block"], int(of["expert"]))
        for name, of in found.items()
        if of is not None and of["part"] == CONSTANT
    }


def selection_bias(block: DiskBlock, headers: Headers) -> str:
    """The tensor of a block's selection bias (E values); ContractError without one."""
    others = {*block.fused, block.router_weight, block.logit_bias, block.unclear_bias}
    own = [
        n for n in block.axes if n not in others and math.prod(headers[n].shape) == block.n_experts
    ]
    named = [n for n in own if _SELECTION_BIAS.fullmatch(n)]
    found = named or [n for n in own if n.endswith("bias")]
    if len(found) != 1:
        raise ContractError(
            f"{block.name} has {len(found)} selection biases on disk, must have one"
        )
    return found[0]


def _of_one_expert(name: str) -> re.Match[str] | None:
    return _OF_ONE_EXPERT.fullmatch(name) or _CONSTANT_EXPERT.fullmatch(name)


def _disk_block(name: str, members: list[str], headers: Headers) -> DiskBlock:
    parts_of = _parts_of(name, members)
    fused = [n for n in members if not _of_one_expert(n)]
    constants = tuple(expert for expert, parts in parts_of.items() if CONSTANT in parts)
    n_constants = len(constants) if fused else 0
    lengths = {(headers[n].shape[0] if headers[n].shape else 0) + n_constants for n in fused}
    one_by_one = len(parts_of) - n_constants
    lengths |= {one_by_one} - {0}
    is_numbered = not fused or max(parts_of, default=0) < max(lengths)
    if len(lengths) != 1 or (fused and one_by_one) or not is_numbered:
        raise ContractError(
            f"{name} holds {one_by_one} experts one by one and {len(fused)} tensors of all "
            f"experts, of lengths {sorted(lengths)}: must be one form and one length"
        )
    n_experts = lengths.pop()
    by_expert = () if fused else _by_expert(name, parts_of, headers)
    router = _router_axes(name, members, headers, n_experts)
    gates = [n for n in router if n.endswith("weight") and len(headers[n].shape) == 2]
    if len(gates) != 1 or router[gates[0]] != 0:
        raise ContractError(f"{name} must have one router of {n_experts} rows, found {gates}")
    biases = [n for n in router if n.endswith(".bias") and headers[n].shape == (n_experts,)]
    parts = {n: p for own in by_expert for p, n in own.items()}
    parts |= {n: n.removeprefix(f"{name}.").removeprefix("experts.") for n in fused}
    return DiskBlock(
        name=name,
        n_experts=n_experts,
        by_expert=by_expert,
        constants=constants,
        axes=dict.fromkeys(fused, 0) | router,
        last=frozenset(n for n, part in parts.items() if _LAST.fullmatch(part)),
        router_weight=gates[0],
        logit_bias=next((n for n in biases if ".router." in n), None),
        unclear_bias=next((n for n in biases if ".router." not in n), None),
        fused=tuple(fused),
    )


def _parts_of(name: str, members: list[str]) -> dict[int, dict[str, str]]:
    """The tensors of single experts by id and part, in the order of ids."""
    found: dict[int, dict[str, str]] = {}
    for member in members:
        if of_one := _of_one_expert(member):
            found.setdefault(int(of_one["expert"]), {})[of_one["part"]] = member
    return dict(sorted(found.items()))


def _by_expert(
    name: str, found: Mapping[int, Mapping[str, str]], headers: Headers
) -> tuple[Mapping[str, str], ...]:
    if [*found] != list(range(len(found))):
        raise ContractError(f"{name} holds {len(found)} experts that are not numbered from 0")
    own = tuple({} if CONSTANT in parts else parts for parts in found.values())
    first = next((expert for expert, parts in enumerate(own) if parts), 0)
    forms = [_form(parts, headers) for parts in own]
    if any(_PACKED.search(part) for parts in own for part in parts):
        # Each in its own way, which the config says; Source.headers are checked against that.
        forms = [{_PACKED.sub("", part): ((), "") for part in form} for form in forms]
    for expert, form in enumerate(forms):
        if form and form != forms[first]:
            raise ContractError(
                f"{name}: the tensors of expert {expert} differ from those of expert {first} in "
                "name, shape or dtype: experts that are not alike are not supported"
            )
    return own


def _form(parts: Mapping[str, str], headers: Headers) -> dict[str, tuple[tuple[int, ...], str]]:
    return {part: (headers[name].shape, headers[name].dtype) for part, name in parts.items()}


def _router_axes(
    block: str, members: list[str], headers: Headers, n_experts: int
) -> dict[str, int]:
    """The axis of length E of the router's tensors and the selection biases."""
    axes: dict[str, int] = {}
    for name in {name for name in headers if name.startswith(f"{block}.")} - set(members):
        part, shape = name.removeprefix(f"{block}."), headers[name].shape
        if part.startswith("shared_") or n_experts not in shape:
            continue
        if not (_ROUTER.fullmatch(part) or _SELECTION_BIAS.fullmatch(part)):
            if block.rpartition(".")[2].isdecimal():  # a whole layer, which holds other modules too
                continue
            raise ContractError(
                f"{name} has an axis of {n_experts}, as many as there are experts, but belongs to "
                "neither experts nor router: this form is not supported"
            )
        axes[name] = shape.index(n_experts)
    return axes
