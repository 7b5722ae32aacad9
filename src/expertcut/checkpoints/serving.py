"""Placements and widths in the forms that other tools read.

A placement: SGLang, vLLM and vLLM-Ascend. Experts are rows of the checkpoint here, as the engines
number them; devices are contiguous parts of a layer's places. Each form is for models with equally
many experts in every layer. Widths of experts: llama-quantize and llm-compressor.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from expertcut.checkpoints.tensor_names import PROJECTIONS, DiskBlock, Headers
from expertcut.edits.compression import Option, Projection
from expertcut.errors import ContractError
from expertcut.profiling.schema import layer_numbers

Rows = Sequence[Sequence[int]]
"""The rows on each device of one layer."""
TENSOR_TYPES = "tensor-types.txt"
RECIPE = "recipe.yaml"
_WHOLE = Option("whole")
_GGUF_ALIGNMENT = 32
_F32_IN_GGUF = ("norm.weight", "shared_expert_gate.weight")


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


def tensor_types(
    headers: Headers,
    blocks: Mapping[str, DiskBlock],
    options: Mapping[str, Option],
    rest: Option = _WHOLE,
) -> bytes:
    """`tensor-types.txt` for llama-quantize, from the option of each block, and of the `rest`.

    A line for each projection, which lies in one tensor with all experts of a layer, and a last one
    of all others: the first line that is found in a tensor's name counts.
    """
    numbers = layer_numbers(list(blocks))
    if numbers is None:
        raise ContractError(f"the names of blocks do not tell their layers: {', '.join(blocks)}")
    types = _ggml_types(headers, blocks, options)
    lines = [
        rf"blk\.{number}\.ffn_{projection}_exps={ggml}"
        for number, block in zip(numbers, blocks, strict=True)
        for projection, ggml in types[block].items()
    ]
    others = rest.ggml_type(_columns(_others(headers, blocks)), _dtype(headers, blocks))
    return "\n".join([*lines, f"weight={others}\n"]).encode()


def gguf_bytes(
    headers: Headers,
    blocks: Mapping[str, DiskBlock],
    options: Mapping[str, Option],
    rest: Option = _WHOLE,
) -> int:
    """Bytes of all tensors in the GGUF file that these types give, each padded to 32.

    Norms, routers, biases and vectors are float32 there, whatever they are on disk.
    """
    sizes = []
    for name, block in blocks.items():
        for part, tensor in block.by_expert[0].items():
            option = options[name] if part in PROJECTIONS else _WHOLE
            shape = headers[tensor].shape
            one = option.gguf_bytes({part: (shape[0], shape[1])}, headers[tensor].dtype)
            sizes.append(one * block.n_experts)
    others, dtype = _others(headers, blocks), _dtype(headers, blocks)
    columns = _columns(others)
    for shape, is_f32 in others:
        n = math.prod(shape)
        rows = {"": (n, 1) if is_f32 else (n // columns, columns)}
        sizes.append((_WHOLE if is_f32 else rest).gguf_bytes(rows, "F32" if is_f32 else dtype))
    return sum(-(-size // _GGUF_ALIGNMENT) * _GGUF_ALIGNMENT for size in sizes)


def _others(
    headers: Headers, blocks: Mapping[str, DiskBlock]
) -> list[tuple[tuple[int, ...], bool]]:
    """The shape of each tensor that is no expert's, and whether it is float32 in a GGUF."""
    f32 = tuple(block.router_weight for block in blocks.values()) + _F32_IN_GGUF
    experts = {n for block in blocks.values() for own in block.by_expert for n in own.values()}
    return [
        (t.shape, len(t.shape) < 2 or not name.endswith(".weight") or name.endswith(f32))
        for name, t in headers.items()
        if name not in experts
    ]


def _columns(others: Sequence[tuple[tuple[int, ...], bool]]) -> int:
    """What divides the columns of all of them that may be quantised: they get one type."""
    return math.gcd(*(shape[-1] for shape, is_f32 in others if not is_f32)) or 1


def llama_cpp_commands(
    checkpoint: str,
    headers: Headers,
    blocks: Mapping[str, DiskBlock],
    options: Mapping[str, Option],
) -> tuple[str, str]:
    """What makes a checkpoint's GGUF, and what quantises that.

    llama-quantize reads the file of types only where the type in its last word is quantised.
    """
    types = _ggml_types(headers, blocks, options)
    used = Counter(ggml for own in types.values() for ggml in own.values())
    named = [ggml.upper() for ggml, _ in used.most_common() if "f" not in ggml]
    rest = _WHOLE.ggml_type(1, _dtype(headers, blocks))
    whole, quantised = f"{checkpoint}-{rest}.gguf", f"{checkpoint}.gguf"
    file = f"--tensor-type-file {checkpoint}/{TENSOR_TYPES}"
    return (
        f"python convert_hf_to_gguf.py {checkpoint} --outtype {rest} --outfile {whole}",
        f"llama-quantize {file} {whole} {quantised} {(named or ['Q8_0'])[0]}",
    )


def _ggml_types(
    headers: Headers, blocks: Mapping[str, DiskBlock], options: Mapping[str, Option]
) -> dict[str, dict[Projection, str]]:
    return {
        name: {
            PROJECTIONS[part]: options[name].ggml_type(headers[own].shape[1], headers[own].dtype)
            for part, own in block.by_expert[0].items()
            if part in PROJECTIONS
        }
        for name, block in blocks.items()
    }


def _dtype(headers: Headers, blocks: Mapping[str, DiskBlock]) -> str:
    """The dtype of experts, which what is left as it is gets too."""
    first = next(iter(blocks.values())).by_expert[0]
    return headers[next(iter(first.values()))].dtype


def quantisation_recipe(quantization_config: Mapping[str, Any]) -> bytes:
    """`recipe.yaml`: the groups of a checkpoint's config, by llm-compressor's GPTQModifier.

    For the unquantised model: GPTQ (arXiv 2210.17323) in place of rounding to nearest.
    """
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size")
    groups = {
        name: {
            "targets": [*group["targets"]],
            "weights": {key: group["weights"][key] for key in keys},
        }
        for name, group in quantization_config["config_groups"].items()
    }
    modifiers = {"GPTQModifier": {"ignore": ["lm_head"], "config_groups": groups}}
    recipe = {"quantization_stage": {"quantization_modifiers": modifiers}}
    return yaml.safe_dump(recipe, sort_keys=False).encode()
