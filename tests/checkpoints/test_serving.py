"""Placements and widths in each tool's form pass a re-implementation of that tool's reader."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from expertcut.checkpoints.serving import (
    gguf_bytes,
    llama_cpp_commands,
    quantisation_recipe,
    serving_files,
    tensor_types,
)
from expertcut.checkpoints.tensor_names import Headers, find_disk_blocks
from expertcut.edits.compression import Option
from expertcut.models.safetensors_index import StoredTensor
from expertcut.profiling.schema import layer_numbers

# Blocks of layers 1 and 3 of five: eight experts, two of them twice, on five devices.
ROWS = {
    "model.layers.1.mlp": [[0, 5], [1, 6], [2, 7], [3, 0], [4, 1]],
    "model.layers.3.mlp": [[7, 6], [5, 4], [3, 2], [1, 0], [7, 6]],
}
N_EXPERTS, N_DEVICES = 8, 5


def files(n_layers: int | None = 5) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in serving_files(ROWS, n_layers).items()}


def sglang(data: dict[str, Any], n_experts: int, ep_size: int) -> list[list[list[int]]]:
    """As SGLang's `ExpertLocationMetadata.init_by_mapping` reads it: the places of each expert.

    python/sglang/srt/eplb/expert_location.py of sgl-project/sglang at 01fec5c2e61f.
    """
    (places_LP,) = data.values()
    places_LP = np.array(places_LP)
    assert [*data] == ["physical_to_logical_map"] and places_LP.ndim == 2
    assert places_LP.shape[1] % ep_size == 0
    found = [[[] for _ in range(n_experts)] for _ in places_LP]
    for layer, places_P in enumerate(places_LP.tolist()):
        for place, expert in enumerate(places_P):
            found[layer][expert].append(place)  # an id beyond the experts fails here
    assert all(places for layer in found for places in layer)  # else it divides by zero
    return found


def vllm(data: list[list[int]], n_layers: int, n_places: int, n_experts: int) -> None:
    """As vLLM is to validate a map: dimensions, ranges, coverage.

    By the description of pull request 49572 of vllm-project/vllm (2026-07-23, open): not its code.
    """
    assert len(data) == n_layers and all(len(places) == n_places for places in data)
    assert all(0 <= expert < n_experts for places in data for expert in places)
    assert all({*places} == {*range(n_experts)} for places in data)


def ascend(data: dict[str, Any], layer: int, n_experts: int, ep_size: int) -> tuple[int, list[int]]:
    """As vLLM-Ascend's `init_eplb_config` reads a layer: redundant experts, and places of experts.

    vllm_ascend/eplb/core/eplb_utils.py of vllm-project/vllm-ascend at 182b75ea84ff (2026-08-22).
    """
    assert layer < data["moe_layer_count"] == len(data["layer_list"])
    own = data["layer_list"][layer]
    assert own["layer_id"] == layer and own["device_count"] == ep_size == len(own["device_list"])
    placed = [device["device_expert"] for device in own["device_list"]]
    placed_DS = np.array(placed)  # ragged lists fail here
    place_of = defaultdict(list)
    for rank, held in enumerate(placed_DS.tolist()):
        local_E = np.full(n_experts, -1)
        local_E[held] = np.arange(len(held))
        n_valid = int((local_E >= 0).sum())
        assert n_valid == placed_DS.shape[1]  # two copies on one rank would share a place
        for expert in np.flatnonzero(local_E >= 0).tolist():
            place_of[expert].append(int(local_E[expert]) + rank * n_valid)
    assert {*place_of} == {*range(n_experts)}
    return placed_DS.size - n_experts, [place_of[expert][0] for expert in range(n_experts)]


def test_sglang_reads_a_row_for_every_layer_and_dense_ones_are_the_identity() -> None:
    data = files()["sglang.json"]
    found = sglang(data, N_EXPERTS, N_DEVICES)
    rows = data["physical_to_logical_map"]
    assert len(rows) == 5
    for layer in (0, 2, 4):
        assert rows[layer] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert found[1][0] == [0, 7] and found[3][7] == [0, 8]
    assert [place // 2 for place in found[1][4]] == [4]
    assert len(files(None)["sglang.json"]["physical_to_logical_map"]) == 4


def test_vllm_reads_a_list_for_every_moe_layer() -> None:
    data = files()["vllm.json"]
    vllm(data, 2, 10, N_EXPERTS)
    assert data[0] == [0, 5, 1, 6, 2, 7, 3, 0, 4, 1]


def test_vllm_ascend_reads_the_experts_of_every_device() -> None:
    data = files()["ascend.json"]
    for layer, rows in enumerate(ROWS.values()):
        n_redundant, place_E = ascend(data, layer, N_EXPERTS, N_DEVICES)
        assert n_redundant == 2
        assert [rows[place // 2][place % 2] for place in place_E] == [*range(N_EXPERTS)]


def test_what_an_engine_cannot_hold_is_left_out() -> None:
    other = {**ROWS, "model.layers.4.mlp": [[0], [1], [2], [3], [4]]}
    assert serving_files(other, None) == {}
    nameless = dict(zip("ab", ROWS.values(), strict=True))
    assert {*serving_files(nameless, None)} == {"vllm.json", "ascend.json"}


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["model.layers.3.mlp", "model.layers.10.mlp"], [3, 10]),
        (["model.language_model.layers.0.feed_forward"], [0]),
        (["model.mtp.0.layers.1.mlp"], None),
        (["a.1.b", "c.1.d"], None),
    ],
)
def test_layers_are_told_by_the_one_number_of_a_block(
    names: list[str], numbers: list[int] | None
) -> None:
    assert layer_numbers(names) == numbers


# Layers 1 and 13 of a model of width 512, eight experts each, the first of width 256.
WIDTH, VOCABULARY, EXPERT_WIDTHS = 512, 96, {1: 256, 13: 96}


def headers(dtype: str) -> Headers:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for layer, width in EXPERT_WIDTHS.items():
        here = f"model.layers.{layer}"
        shapes |= {f"{here}.self_attn.q_proj.weight": (WIDTH, WIDTH)}
        shapes |= {f"{here}.self_attn.o_proj.weight": (WIDTH, 96)}
        shapes |= {f"{here}.self_attn.q_proj.bias": (WIDTH,)}
        shapes |= {f"{here}.mlp.gate.weight": (N_EXPERTS, WIDTH)}
        shapes |= {f"{here}.mlp.shared_expert_gate.weight": (1, WIDTH)}
        for expert in range(N_EXPERTS):
            own = f"{here}.mlp.experts.{expert}"
            for name in ("gate", "up"):
                shapes[f"{own}.{name}_proj.weight"] = (width, WIDTH)
            shapes[f"{own}.down_proj.weight"] = (WIDTH, width)
    return {name: StoredTensor(Path("m"), dtype, shape, 0, 0) for name, shape in shapes.items()}


def in_gguf(dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes that the converter gives these tensors."""
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "mlp.gate": "ffn_gate_inp"}
    parts |= {"self_attn.o_proj": "attn_output"}
    parts |= {"mlp.shared_expert_gate": "ffn_gate_inp_shexp"}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in headers(dtype).items():
        head, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", head)
        shape, name = tensor.shape, names.get(head, "")
        if layer and ".experts." in head:
            projection = head.rpartition(".")[2].removesuffix("_proj")
            name, shape = f"blk.{layer[1]}.ffn_{projection}_exps", (N_EXPERTS, *shape)
        elif layer:
            name = f"blk.{layer[1]}.{parts[layer[2]]}"
        is_f32 = len(shape) < 2 or "gate_inp" in name
        found[f"{name}.{kind}"] = ("F32" if is_f32 else dtype, shape)
    return found


def quantised(file: bytes, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """As llama-quantize (llama-quant.cpp) does: patterns in lower case, the first one found."""
    types = []
    for word in file.decode().split():
        pattern, separator, ggml = word.partition("=")
        assert separator and pattern and ggml.upper() in GGMLQuantizationType.__members__
        types.append((pattern.lower(), ggml.upper()))
    found = {}
    for name, (ggml, shape) in in_gguf(dtype).items():
        is_quantised = len(shape) > 1 and name.endswith("weight") and "gate_inp" not in name
        new = next((own for pattern, own in types if re.search(pattern, name)), "never")
        assert new != "never" or not is_quantised
        found[name] = (new if is_quantised else ggml, shape)
    return found


def own_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    total = 0
    for ggml, shape in tensors.values():
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[ggml]]
        assert shape[-1] % block == 0, "llama-quantize would take another type"
        total += -(-math.prod(shape) // block * block_bytes // 32) * 32
    return total


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("menu", [("4", "8"), ("2", "whole"), ("whole", "3"), ("5", "6")])
def test_llama_quantize_makes_the_types_and_bytes_that_were_said(
    menu: tuple[str, str], dtype: str
) -> None:
    disk = find_disk_blocks(headers(dtype))
    options = {name: Option.parse(text) for name, text in zip(disk, menu, strict=True)}
    made = quantised(tensor_types(headers(dtype), disk, options), dtype)
    for layer, text in zip(EXPERT_WIDTHS, menu, strict=True):
        k_quant = f"Q{text}_K" if text in "2 3 4 5 6" else {"8": "Q8_0"}.get(text, dtype)
        assert made[f"blk.{layer}.ffn_up_exps.weight"][0] == k_quant
        is_smaller = made[f"blk.{layer}.ffn_down_exps.weight"][0] != k_quant
        assert is_smaller == (layer == 13 and k_quant.endswith("K")), "256 does not divide 96"
    others = {name for name in made if "_exps" not in name}
    assert {made[name][0] for name in others} == {"F32", dtype}
    assert gguf_bytes(headers(dtype), disk, options) == own_bytes(made)
    whole = dict.fromkeys(disk, Option("whole"))
    assert gguf_bytes(headers(dtype), disk, whole) == own_bytes(in_gguf(dtype)) > own_bytes(made)
    for rest, ggml in (("8", "Q8_0"), ("4", "Q4_0")):  # 256 does not divide all columns
        own = (headers(dtype), disk, options, Option.parse(rest))
        smaller = quantised(tensor_types(*own), dtype)
        assert {smaller[name][0] for name in others} == {"F32", ggml}
        assert gguf_bytes(*own) == own_bytes(smaller) < own_bytes(made)


def test_the_last_word_for_llama_quantize_is_quantised_or_it_would_not_read_the_types() -> None:
    disk = find_disk_blocks(headers("F16"))
    for menu, last in (("44", "Q4_K"), ("w8", "Q8_0"), ("ww", "Q8_0")):
        options = [Option("whole") if text == "w" else Option.parse(text) for text in menu]
        of_blocks = dict(zip(disk, options, strict=True))
        convert, quantise = llama_cpp_commands("small", headers("F16"), disk, of_blocks)
        assert convert.split()[-1] in quantise and "--outtype f16" in convert
        assert quantise.endswith(last) and "small/tensor-types.txt" in quantise


def test_llm_compressor_gets_the_groups_of_the_config() -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": 64, "observer": "memoryless_minmax", "actorder": None}
    target = r"re:.*layers\.(0|2)\.mlp\.experts\.\d+\.(gate|up|down)_proj$"
    groups = {
        f"group_{bits}": {"targets": [target], "weights": {**weights, "num_bits": bits}}
        for bits in (4, 8)
    }
    ((_, stage),) = yaml.safe_load(quantisation_recipe({"config_groups": groups})).items()
    found = stage["quantization_modifiers"]["GPTQModifier"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in found.values()] == [4, 8]
    for name, group in found.items():
        assert group["targets"] == [target]
        assert group["weights"].items() < groups[name]["weights"].items()
