"""A placement in each engine's form passes a re-implementation of that engine's loader."""

import json
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from expertcut.checkpoints.serving import layer_numbers, serving_files

# Blocks of layers 1 and 3 of five: eight experts, two of them twice, on five devices.
ROWS = {
    "model.layers.1.mlp": [[0, 5], [1, 6], [2, 7], [3, 0], [4, 1]],
    "model.layers.3.mlp": [[7, 6], [5, 4], [3, 2], [1, 0], [7, 6]],
}
N_EXPERTS, N_DEVICES = 8, 5


def files(n_layers: int | None = 5) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in serving_files(ROWS, n_layers).items()}


def sglang(data: dict[str, Any], n_experts: int, ep_size: int) -> list[list[list[int]]]:
    """As `ExpertLocationMetadata.init_by_mapping` reads it: the places of each expert."""
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
    """As pull request 49572 validates a map: dimensions, ranges, coverage."""
    assert len(data) == n_layers and all(len(places) == n_places for places in data)
    assert all(0 <= expert < n_experts for places in data for expert in places)
    assert all({*places} == {*range(n_experts)} for places in data)


def ascend(data: dict[str, Any], layer: int, n_experts: int, ep_size: int) -> tuple[int, list[int]]:
    """As `eplb_utils.init_eplb_config` reads a layer: redundant experts, and a rank's places."""
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
