"""`expertcut place`: what it reads, writes, shows and refuses."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from expertcut.edits.cache_plan import load_cache
from expertcut.edits.placement import Devices, device_loads
from expertcut.edits.placement_results import (
    RANDOM,
    PlacementRequest,
    load_placement,
    place_trace,
    trace_hash,
)
from expertcut.edits.plan import ExpertIds, load_plan
from expertcut.errors import OutputError
from expertcut.profiling.expert_load import use_counts
from expertcut.profiling.trace import load_trace
from tests.conftest import Commands, slow_but

Checkpoint = Callable[..., Path]


@pytest.fixture
def trace(checkpoint: Checkpoint, quiz_folder: Path, tmp_path: Path, expertcut: Commands) -> Path:
    """A trace of a tiny model of two layers with eight experts."""
    model = checkpoint("olmoe")
    expertcut(f"trace {model} --quiz {quiz_folder} --split val --shots 0 --out {tmp_path}/traced")
    return tmp_path / "traced"


def wide_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > 80]


def test_a_placement_is_written_shown_and_reported(
    trace: Path, tmp_path: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    printed = expertcut("place traced --devices 4 --nodes 2")
    folder = Path("placements/traced-4-devices-2-nodes")
    found = load_placement(folder)
    assert not wide_lines(printed)
    assert (found.devices, found.nodes, found.redundant, found.load_cap) == (4, 2, 0, None)
    assert found.trace == trace_hash(load_trace(trace))
    assert [*found.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    scored = found.scored
    assert [*scored.peers] == ["contiguous", "round robin", "EPLB greedy", RANDOM]
    assert scored.same_device is not None and scored.same_node is not None
    assert scored.same_device <= scored.same_node <= 1
    # All by brute force on the half that did not choose.
    chosen_by, scored_by = load_trace(trace).halves()
    assert (found.solver.sequences, scored.sequences) == (len(chosen_by), len(scored_by))
    device_LE = [np.array(layer.device) for layer in found.layers.values()]
    same = node = total = 0
    for sequence in scored_by:
        for before_K, after_K in sequence.experts_TLK:
            for a in device_LE[0][before_K]:
                for b in device_LE[1][after_K]:
                    same, node, total = same + (a == b), node + (a // 2 == b // 2), total + 1
    assert scored.same_device == pytest.approx(same / total)
    assert scored.same_node == pytest.approx(node / total)
    for layer, load_E in enumerate(use_counts(scored_by, 2, 8)):
        copies_ED = np.eye(4)[device_LE[layer]]
        assert scored.largest_load[layer] == pytest.approx(device_loads(load_E, copies_ED).max())
    for said in ("contiguous", "EPLB greedy", "same node", "a local one", "did not choose"):
        assert said in printed
    shown = expertcut(f"show {folder}")
    assert shown.split("placed")[1] in printed and shown.split("\n")[0] == "Placement on 4 devices"
    as_json = json.loads(expertcut(f"show {folder}/placement.json --format json"))
    assert as_json == found.model_dump(mode="json")
    assert "model.layers.0.mlp,0," in expertcut(f"show {folder} --format csv")
    expertcut("report placements")
    page = Path("placements/report.html").read_text()
    assert "Placement: traced-4-devices-2-nodes" in page and "EPLB greedy" in page
    maps = json.loads((folder / "vllm.json").read_text())
    assert maps == found.order
    assert json.loads((folder / "sglang.json").read_text()) == {"physical_to_logical_map": maps}
    assert (folder / "ascend.json").is_file()
    before = (folder / "placement.json").read_bytes()
    assert "is not empty" in expertcut("place traced --devices 4 --nodes 2", status=2)
    expertcut("place traced --devices 4 --nodes 2 --force")
    assert (folder / "placement.json").read_bytes() == before


def test_redundant_experts_fill_the_devices_and_even_the_loads(
    trace: Path, expertcut: Commands
) -> None:
    out = trace.parent / "placed"
    refused = expertcut(f"place {trace} --devices 3 --out {out}", status=2)
    assert "8 experts are not a multiple of --devices 3" in refused
    assert "--redundant 1" in refused
    expertcut(f"place {trace} --devices 3 --redundant 4 --out {out}")
    found = load_placement(out)
    uses_LE = use_counts(load_trace(trace).halves()[0], 2, 8)
    for layer, uses_E in zip(found.layers.values(), uses_LE, strict=True):
        assert [len(own) for own in layer.slots] == [4] * 3
        twice = {e for e in range(8) if sum(e in own for own in layer.slots) > 1}
        assert int(uses_E.argmax()) in twice
    assert max(found.solver.largest_load) < 1.2


@pytest.mark.parametrize(
    "family", slow_but(("olmoe", "glm4_moe"), ["olmoe", "gpt_oss", "glm4_moe"])
)
def test_the_checkpoint_in_the_order_of_the_placement_chooses_as_before(
    checkpoint: Checkpoint, quiz_folder: Path, tmp_path: Path, expertcut: Commands, family: str
) -> None:
    asked = f"--quiz {quiz_folder} --split val --shots 0 --out"
    expertcut(f"trace {checkpoint(family)} {asked} traced")
    said = expertcut("place traced --devices 2 --write --out placed")  # GLM's groups stay whole
    assert "choices of experts (tokens times layers) are the same" in " ".join(said.split())
    found, plan = load_placement(Path("placed")), load_plan(Path("placed/checkpoint"))
    moved = {name: list(own) for name, edit in plan.blocks.items() if (own := edit.order)}
    expected = dict(zip(found.layers, found.order, strict=True))
    assert moved == {name: own for name, own in expected.items() if own != sorted(own)} != {}
    expertcut(f"trace placed/checkpoint {asked} again")
    before_TLK, after_TLK = (
        np.concatenate([sequence.experts_TLK for sequence in load_trace(Path(name)).sequences()])
        for name in ("traced", "again")
    )
    ids_TLK = np.stack(
        [np.array(own)[after_TLK[:, layer]] for layer, own in enumerate(found.order)], axis=1
    )
    same_T = (np.sort(before_TLK) == np.sort(ids_TLK)).all(axis=(1, 2))
    assert len(same_T) > 500 and same_T.mean() > 0.995  # but for near-ties
    assert (np.sort(before_TLK) == np.sort(after_TLK)).all(axis=(1, 2)).mean() < 0.5


def test_groups_of_a_router_are_placed_as_wholes_for_a_checkpoint(
    checkpoint: Checkpoint, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    model = checkpoint("deepseek_v3")
    expertcut(f"trace {model} --quiz {quiz_folder} --split val --shots 0 --out {tmp_path}/traced")
    trace = load_trace(tmp_path / "traced")
    groups = trace.info.model.blocks[0].groups
    assert groups == 2
    asked = PlacementRequest(Devices(2), keeps_groups=True)
    file, _ = place_trace(trace, asked, ExpertIds())
    for layer in file.layers.values():
        assert {own[0] // 4 for own in layer.slots} == {0, 1}
        assert all(len({expert // 4 for expert in own}) == 1 for own in layer.slots)
    said = expertcut(f"place {trace.path} --devices 4 --write --out {tmp_path}/out", status=2)
    assert "routes in 2 groups, which --write keeps whole" in said


def test_a_cache_plan_is_written_shown_and_listed(
    trace: Path, tmp_path: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    printed = expertcut("place traced --cache 4 --hits 0.6 --csv")
    found = load_cache(Path("placements/traced-cache-4"))
    assert not wide_lines(printed) and "experts a layer that hit 60.0 %" in printed
    whole = load_trace(trace)
    uses_LE = use_counts(whole.sequences(), 2, 8)
    for layer, uses_E in zip(found.layers.values(), uses_LE, strict=True):
        assert layer.uses == tuple(sorted(uses_E.tolist(), reverse=True)[:4])
        assert [uses_E[expert] for expert in layer.experts] == list(layer.uses)
    rates = found.rates
    assert [*rates] == ["static", "lru", "lfu", "belady"]
    assert max(rates[name].hits for name in ("lru", "lfu")) <= rates["belady"].hits
    # Two matrices up and one down of 16 by 32, in float32; misses of both layers.
    n_bytes = 3 * 16 * 32 * 4
    n_choices = sum(uses_LE.sum(1))
    for own in rates.values():
        moved = (1 - own.hits) * n_choices * n_bytes / found.tokens
        assert own.moved_bytes == pytest.approx(moved)
    smallest = found.smallest["static"]
    assert smallest is not None
    for size, is_enough in ((smallest, True), (smallest - 1, False)):
        expertcut(f"place traced --cache {size} --out at-{size}")
        assert (load_cache(Path(f"at-{size}")).rates["static"].hits >= 0.6) is is_enough
    rows = list(csv.reader(Path("placements/traced-cache-4/cache.csv").read_text().splitlines()))
    assert rows[0] == ["layer", "expert", "count"] and len(rows) == 9
    first = found.layers["model.layers.0.mlp"]
    assert rows[1] == ["0", str(first.experts[0]), str(first.uses[0])]
    assert "static" in expertcut("show placements/traced-cache-4")
    expertcut("report placements")
    assert "Cache: traced-cache-4" in Path("placements/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "give --devices N or --cache C"),
        ("--devices 4 --cache 2", "give --devices N or --cache C"),
        ("--devices 4 --csv", "--csv is an option of --cache"),
        ("--cache 2 --nodes 2", "--nodes is an option of --devices"),
        ("--devices 4 --nodes 3", "--nodes 3 does not divide --devices 4"),
        ("--devices 4 --redundant 4 --write", "--write keeps each expert once"),
        ("--devices 4 --no-verify", "--no-verify is for --write"),
        ("--devices 4 --redundant 28", "more than a copy of each of the 8 experts"),
        ("--devices 8 --load 1.0", "cannot be met in layer 0: the smallest load found there is"),
        ("--cache 9", "more than the 8 experts of a layer"),
    ],
)
def test_what_cannot_be_placed_is_refused_in_one_line(
    trace: Path, expertcut: Commands, words: str, said: str
) -> None:
    refused = expertcut(f"place {trace} {words} --out {trace.parent}/out", status=2)
    assert said in refused and not (trace.parent / "out").exists()


def test_a_trace_that_is_not_there_and_one_of_another_model_are_refused(
    trace: Path, tmp_path: Path, expertcut: Commands
) -> None:
    assert "is not there" in expertcut(f"place {tmp_path}/none --devices 4", status=2)
    model = Path(json.loads((trace / "trace.json").read_text())["model"]["id"])
    config, content = model / "config.json", (model / "config.json").read_text()
    config.write_text(content.replace("{", '{"changed": 1,', 1))
    try:
        said = expertcut(f"place {trace} --devices 4 --write --out {tmp_path}/out", status=2)
    finally:  # other tests read it too
        config.write_text(content)
    assert "is a trace of another model" in said


def test_a_placement_that_was_altered_is_not_shown(trace: Path, expertcut: Commands) -> None:
    out = trace.parent / "placed"
    expertcut(f"place {trace} --devices 4 --out {out}")
    content = json.loads((out / "placement.json").read_text())
    slots = content["layers"]["model.layers.0.mlp"]["slots"]
    for change, why in (
        ({"devices": 3}, "lies on 4 devices, not 3"),
        ({"nodes": 3}, "do not lie in 3 nodes"),
        ({"redundant": 1}, "does not have 1 redundant experts"),
        ({"trace": "x"}, "should match pattern"),
        ({"more": 1}, "Extra inputs"),
    ):
        (out / "placement.json").write_text(json.dumps(content | change))
        with pytest.raises(OutputError, match=why):
            load_placement(out)
    slots[0], slots[1] = slots[1], slots[0]
    (out / "placement.json").write_text(json.dumps(content))
    assert "device and slots are different" in expertcut(f"show {out}", status=2)
    slots[0][0] = slots[0][1]
    (out / "placement.json").write_text(json.dumps(content))
    assert "two copies of one expert" in expertcut(f"show {out}", status=2)
