"""Sound files whose tensors are not those of the model, or no numbers."""

from pathlib import Path

import torch

from tests.hostile.case import Corpus
from tests.hostile.edits import (
    EXPERT,
    INDEX,
    Q_PROJ,
    Change,
    eval_cut,
    evaluate,
    in_cut,
    in_model,
    in_shards,
    json_of,
    merge,
    profile,
    reweight,
    run,
    shard,
    tensors,
)
from tests.hostile.world import World

CASES = Corpus("tensors")
FILE = r"olmoe/model\.safetensors"
EXPERTS = "model.layers.1.mlp.experts."


def without(*starts: str) -> Change:
    def change(found: dict[str, torch.Tensor]) -> None:
        for name in [name for name in found if name.startswith(starts)]:
            del found[name]

    return tensors(change)


def shaped(name: str, *shape: int) -> Change:
    return tensors(lambda found: found.update({name: torch.ones(shape)}))


def of_another_count(found: dict[str, torch.Tensor]) -> None:
    """Layer 1 has a ninth expert, a copy of the first, and a router that knows it."""
    for name in [name for name in found if name.startswith(f"{EXPERTS}0.")]:
        found[name.replace(".0.", ".8.")] = found[name].clone()
    gate = "model.layers.1.mlp.gate.weight"
    found[gate] = torch.cat([found[gate], found[gate][:1]])


def renumbered(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if name.startswith(f"{EXPERTS}7.")]:
        found[name.replace(".7.", ".70000.")] = found.pop(name)


WRONG: dict[str, tuple[Change, str]] = {
    "a projection missing": (without(Q_PROJ), f"lacks 1 of .*{Q_PROJ}|holds"),
    "the embedding missing": (without("model.embed_tokens"), "holds|lacks"),
    "the router of a layer missing": (without("model.layers.1.mlp.gate"), "holds|lacks"),
    "a tensor of an expert missing": (without(EXPERT), f"lacks {EXPERT}"),
    "an expert missing from one layer": (without(f"{EXPERTS}3."), rf"lacks {EXPERTS}3\.down_proj"),
    "the last expert missing from one layer": (
        without(f"{EXPERTS}7."),
        "says 8 experts, model.layers.1.mlp.experts holds 7",
    ),
    "all experts missing from one layer": (without(EXPERTS), "holds|lacks"),
    "a layer missing": (without("model.layers.1."), "says 2 layers, the weights hold 1"),
    "an expert too many in one layer": (
        tensors(of_another_count),
        "says 8 experts, model.layers.1.mlp.experts holds 9",
    ),
    "experts that are not numbered from 0": (tensors(renumbered), rf"lacks {EXPERTS}7\.down_proj"),
    "a projection of another shape": (shaped(Q_PROJ, 3, 3), "holds|lacks"),
    "a projection turned round": (
        shaped("model.layers.1.self_attn.k_proj.weight", 32, 16),
        r"k_proj.weight of shape \[16, 32\] \(it has \[32, 16\]\)",
    ),
    "a projection with an axis of nothing": (shaped(Q_PROJ, 0, 32), "holds|lacks"),
    "an expert of another shape": (
        shaped(EXPERT, 32, 8),
        r"3\.down_proj.weight has shape",
    ),
    "a router of another length": (shaped("model.layers.1.mlp.gate.weight", 9, 32), "gate.weight"),
    "an embedding of another width": (shaped("model.embed_tokens.weight", 290, 33), "embed_tokens"),
}
for fault, (change, says) in WRONG.items():
    CASES.add(fault, in_model(change), "olmoe/(config.json|model.safetensors)", says)


def filled(name: str, value: float, *, all_of_it: bool = False) -> Change:
    def change(found: dict[str, torch.Tensor]) -> None:
        tensor = found[name] if all_of_it else found[name].view(-1)[7:8]
        tensor.fill_(value)

    return tensors(change)


NAN, INF = float("nan"), float("inf")
PLACES = {
    "a router": "model.layers.0.mlp.gate.weight",
    "an expert": EXPERT,
    "attention": Q_PROJ,
    "the embedding": "model.embed_tokens.weight",
    "a norm": "model.layers.0.input_layernorm.weight",
    "the output": "lm_head.weight",
}
for place, name in PLACES.items():
    CASES.add(
        f"one NaN in {place}",
        in_model(filled(name, NAN)),
        FILE,
        f"NaN or infinity, 1 of the .* values of {name}:",
    )
CASES.add(
    "infinity in an expert, met by eval", in_model(filled(EXPERT, INF), evaluate), FILE, EXPERT
)
CASES.add(
    "minus infinity in a router",
    in_model(filled(PLACES["a router"], -INF)),
    FILE,
    "NaN or infinity, 1 .*mlp.gate.weight",
)
CASES.add(
    "NaN in all of an expert, met by run",
    in_model(filled(EXPERT, NAN, all_of_it=True), run),
    FILE,
    "NaN or infinity, 512 of the 512 values",
    keeps="out",
)
CASES.add(
    "NaN in an edited checkpoint",
    in_cut(filled(EXPERT.replace(".3.", ".2."), NAN), eval_cut),
    r"cut/model\.safetensors",
    "NaN or infinity",
)


def halved(found: dict[str, torch.Tensor]) -> None:
    """bfloat16 holds this, float16 does not."""
    found[EXPERT].view(-1)[0] = 1e6


def _overflowing(world: World) -> list[str]:
    tensors(halved)(world / world.model)
    return [*profile(world), "--dtype", "float16"]


CASES.add(
    "a weight too large for --dtype float16", _overflowing, FILE, "do not fit in torch.float16"
)


def nan_in_a_shard(folder: Path) -> None:
    for number in range(1, 7):
        if shard(folder, number).is_file():
            filled_any(shard(folder, number))
            return


def filled_any(file: Path) -> None:
    def change(found: dict[str, torch.Tensor]) -> None:
        next(iter(found.values())).fill_(NAN)

    tensors(change, file.name)(file.parent)


CASES.add(
    "NaN in one shard of six",
    in_shards(nan_in_a_shard),
    r"sharded/model-00001-of-00006\.safetensors",
    "NaN or infinity",
)


def another_expert_count(folder: Path) -> None:
    """Shard and index agree that there is no such tensor."""
    name = EXPERT
    file = next(
        f for f in sorted(folder.glob("*-of-*.safetensors")) if name.encode() in f.read_bytes()
    )
    tensors(lambda found: found.pop(name), file.name)(folder)
    json_of(INDEX, lambda index: index["weight_map"].pop(name))(folder)


CASES.add(
    "an expert that neither shard nor index holds",
    in_shards(another_expert_count),
    r"sharded/model\.safetensors\.index\.json",
    f"lacks {EXPERT}",
)
for command in (reweight, merge):
    CASES.add(
        f"other weights than those profiled, met by {command.__name__}",
        in_model(tensors(lambda found: found[EXPERT].mul_(1.5)), command),
        "profiles/finished",
        "is a profile of another model",
    )
