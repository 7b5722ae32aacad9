"""A placement in the forms that inference engines read: SGLang, vLLM and vLLM-Ascend.

Experts are rows of the checkpoint here, as the engines number them; devices are contiguous parts
of a layer's places. Each form is for models with equally many experts in every layer.
"""

import json
import re
from collections.abc import Mapping, Sequence

Rows = Sequence[Sequence[int]]
"""The rows on each device of one layer."""


def serving_files(layers: Mapping[str, Rows], n_layers: int | None) -> dict[str, bytes]:
    """`sglang.json`, `vllm.json` and `ascend.json`, from the rows of each MoE block.

    `n_layers` are the layers of the model; of None those up to the last block. `sglang.json` is
    left out where the blocks' names do not tell their layers. Empty if blocks differ in size.
    """
    maps = [[row for own in rows for row in own] for rows in layers.values()]
    if len({(len(places), len({*places})) for places in maps}) > 1:
        return {}
    files = {"vllm.json": maps, "ascend.json": ascend_map([*layers.values()])}
    numbers = layer_numbers(list(layers))
    if numbers is not None:
        by_layer = dict(zip(numbers, maps, strict=True))
        files["sglang.json"] = sglang_map(by_layer, max(n_layers or 0, max(numbers) + 1))
    return {name: (json.dumps(content) + "\n").encode() for name, content in files.items()}


def sglang_map(by_layer: Mapping[int, Sequence[int]], n_layers: int) -> object:
    """SGLang's `--init-expert-location`: a row for every layer; dense ones hold the identity."""
    places = next(iter(by_layer.values()))
    n_experts = len({*places})
    identity = [place % n_experts for place in range(len(places))]
    rows = [[*by_layer.get(layer, identity)] for layer in range(n_layers)]
    return {"physical_to_logical_map": rows}


def ascend_map(layers: Sequence[Rows]) -> object:
    """vLLM-Ascend's `expert_map_path`: MoE layers alone, counted from 0."""
    found = []
    for number, rows in enumerate(layers):
        devices = [{"device_id": d, "device_expert": [*own]} for d, own in enumerate(rows)]
        found.append({"layer_id": number, "device_count": len(rows), "device_list": devices})
    return {"moe_layer_count": len(layers), "layer_list": found}


def layer_numbers(names: Sequence[str]) -> list[int] | None:
    """The layers of blocks, by the one number in their names; None where names do not tell them."""
    found = [re.findall(r"(?<=\.)\d+(?=\.|$)", name) for name in names]
    if any(len(own) != 1 for own in found):
        return None
    numbers = [int(own[0]) for own in found]
    return numbers if len({*numbers}) == len(numbers) else None
