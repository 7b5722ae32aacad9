"""Where experts lie on disk: found by names and shapes, and refused where they do not fit."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertcut.checkpoints.tensor_names import find_disk_blocks, match_blocks
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ContractError
from expertcut.models.safetensors_index import StoredTensor
from tests.support.rewrites import Fitted, stock_rewrite

Shapes = dict[str, tuple[int, ...]]
NOTHING = Fitted({}, {})


def headers(shapes: Shapes) -> dict[str, StoredTensor]:
    return {n: StoredTensor(Path("m"), "F32", shape, 0, 0) for n, shape in shapes.items()}


def block(name: str, n_experts: int = 4, gate: str = "gate.weight", last: str = "w2") -> Shapes:
    """A block as Mixtral's, of width 6."""
    experts = {
        f"{name}.experts.{e}.{part}.weight": (6, 5) if part == last else (5, 6)
        for e in range(n_experts)
        for part in ("w1", last, "w3")
    }
    return {f"{name}.{gate}": (n_experts, 6), **experts}


def test_a_block_is_told_from_its_names_and_shapes() -> None:
    name = "model.layers.3.block_sparse_moe"
    shapes = {
        **block(name, 12),  # so that expert 10 stands before expert 2 in the alphabet
        f"{name}.e_score_correction_bias": (1, 12),
        f"{name}.shared_experts.gate_proj.weight": (12, 6),  # as long as E by chance
        f"{name}.shared_expert_gate.weight": (1, 6),
        "model.layers.3.self_attn.q_proj.weight": (12, 12),
        "model.layers.2.mlp.gate_proj.weight": (12, 6),
    }
    (found,) = find_disk_blocks(headers(shapes)).values()
    assert (found.name, found.n_experts) == (name, 12)
    assert found.router_weight == f"{name}.gate.weight"
    assert found.axes == {f"{name}.gate.weight": 0, f"{name}.e_score_correction_bias": 1}
    assert found.last == {f"{name}.experts.{e}.w2.weight" for e in range(12)}
    assert found.by_expert[10]["w3.weight"] == f"{name}.experts.10.w3.weight"
    assert (found.logit_bias, found.unclear_bias) == (None, None)


def test_granite_holds_all_experts_of_a_layer_in_two_tensors() -> None:
    name = "model.layers.0.block_sparse_moe"
    shapes: Shapes = {
        f"{name}.input_linear.weight": (4, 10, 6),
        f"{name}.output_linear.weight": (4, 6, 5),
        f"{name}.router.layer.weight": (4, 6),
        "model.layers.0.shared_mlp.input_linear.weight": (10, 6),
    }
    (found,) = find_disk_blocks(headers(shapes)).values()
    assert found.last == {f"{name}.output_linear.weight"}
    assert found.router_weight == f"{name}.router.layer.weight"
    assert found.axes == dict.fromkeys(list(shapes)[:3], 0)


def test_blocks_match_by_name_then_by_layer_then_by_number() -> None:
    shapes = {
        **block("model.layers.1.mlp"),
        **block("mtp.layers.1.mlp"),
        **block("model.layers.2.block_sparse_moe"),
    }
    names = ["model.layers.1.mlp", "model.layers.2.mlp"]
    matched, unused = match_blocks(headers(shapes), names)
    assert [b.name for b in matched.values()] == [
        "model.layers.1.mlp",
        "model.layers.2.block_sparse_moe",
    ]
    assert unused == set(block("mtp.layers.1.mlp"))
    matched, unused = match_blocks(
        headers(block("language_model.layers.7.moe")), ["model.language_model.layers.7.mlp"]
    )
    assert [b.name for b in matched.values()] == ["language_model.layers.7.moe"]
    assert not unused


def test_a_cut_leaves_out_whole_what_the_model_did_not_load() -> None:
    """A new count of experts would make it unreadable; where nothing is cut it stays."""
    extra = {**block("model.layers.1.mlp"), "model.layers.1.enorm.weight": (6,)}
    shapes = {**block("model.layers.0.mlp"), **extra, "model.layers.10.x": (4,)}
    edits = {"model.layers.0.mlp": BlockEdit(keep=(0, 1, 3))}
    removed = stock_rewrite(headers(shapes), edits, NOTHING).removed
    assert {name for name in removed if not name.startswith("model.layers.0.")} == set(extra)
    edits = {"model.layers.0.mlp": BlockEdit(keep=(0, 1, 2, 3))}
    assert stock_rewrite(headers(shapes), edits, NOTHING).removed == frozenset()


@pytest.mark.parametrize(
    ("root", "layer"),
    [("mtp", "mtp.layers.0"), ("model.mtp", "model.mtp.layers.0"), ("model.mtp_layers", "")],
)
def test_a_module_that_predicts_further_tokens_is_left_out_whole(root: str, layer: str) -> None:
    layer = layer or f"{root}.0"
    extra = {**block(f"{layer}.mlp"), f"{root}.fc.weight": (6, 12), f"{root}.norm.weight": (6,)}
    shapes = {**block("model.layers.0.mlp"), **block("model.layers.1.mlp"), **extra}
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    matched, unused = match_blocks(headers({**shapes, "model.norm.weight": (6,)}), names)
    assert [b.name for b in matched.values()] == names
    assert unused == set(extra)
    renamed = {n.replace("model.", "model.language_model.", 1): s for n, s in shapes.items()}
    if layer.startswith("mtp"):  # as Qwen3.5 has it with its vision tower
        vision = {"model.visual.blocks.0.mlp.weight": (6, 6)}
        matched, unused = match_blocks(headers({**renamed, **vision}), names)
        assert [b.name for b in matched.values()] == [
            name.replace("model.", "model.language_model.") for name in names
        ]
        assert unused == set(extra)


def test_experts_of_no_known_use_are_not_thrown_away() -> None:
    shapes = {**block("model.layers.0.mlp"), **block("model.encoder.blocks.0.mlp")}
    with pytest.raises(ContractError, match=r"encoder\.blocks\.0 holds experts that the loaded"):
        match_blocks(headers(shapes), ["model.layers.0.mlp"])
    # Of parts that see, hear or speak they are left alone.
    for part in ("model.visual.blocks.0.mlp", "talker.model.layers.0.mlp"):
        shapes = {**block("thinker.model.layers.0.mlp"), **block(part)}
        matched, unused = match_blocks(headers(shapes), ["model.layers.0.mlp"])
        assert matched["model.layers.0.mlp"].name == "thinker.model.layers.0.mlp" and not unused


def without(shapes: Shapes, pattern: str) -> Shapes:
    return {n: shape for n, shape in shapes.items() if not re.search(pattern, n)}


A = "model.layers.0.mlp"
FAULTS: dict[str, tuple[Shapes, str]] = {
    "no experts": ({"a": (1,)}, f"{A} has 0 places on disk, must have one: found experts in no"),
    "another layer": (block("model.layers.1.mlp"), "has 0 places on disk"),
    "two of that number": ({**block("a.layers.0.m"), **block("b.layers.0.m")}, "has 2 places"),
    "two in the layer": ({**block(A), **block("model.layers.0.moe")}, "do not match those of the"),
    "no layer": (block("mlp.moe"), "mlp.moe holds experts but names no layer"),
    "a missing expert": (without(block(A), r"\.1\.w"), "3 experts that are not numbered from 0"),
    "a missing projection": (without(block(A), r"\.2\.w3"), "of expert 2 differ from those of"),
    "another shape": ({**block(A), f"{A}.experts.1.w1.weight": (5, 5)}, "of expert 1 differ"),
    "both forms": ({**block(A), f"{A}.experts.down_proj": (4, 5, 6)}, "must be one form"),
    "two lengths": (
        {f"{A}.experts.down_proj": (4, 5, 6), f"{A}.experts.up": (3, 5, 6)},
        r"of lengths \[3, 4\]",
    ),
    "a scalar": ({f"{A}.experts.down_proj": (4, 5, 6), f"{A}.experts.up": ()}, "must be one form"),
    "no router": (without(block(A), "gate"), r"must have one router of 4 rows, found \[\]"),
    "a shorter router": ({**block(A), f"{A}.gate.weight": (3, 6)}, "must have one router of 4"),
    "a turned router": ({**block(A), f"{A}.gate.weight": (6, 4)}, "must have one router of 4"),
    "two routers": ({**block(A), f"{A}.router.weight": (4, 6)}, "must have one router"),
    "a stranger": (
        {**block(A), f"{A}.per_expert_scale": (4,)},
        f"{A}.per_expert_scale has an axis of 4",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_by_its_name(fault: str) -> None:
    shapes, message = FAULTS[fault]
    with pytest.raises(ContractError, match=message):
        match_blocks(headers(shapes), [A])


def test_edits_that_do_not_fit_what_is_on_disk_are_refused() -> None:
    def edited(shapes: Shapes, edit: BlockEdit, fitted: Fitted = NOTHING) -> Callable[[], object]:
        return lambda: stock_rewrite(headers(shapes), {A: edit}, fitted)

    unclear = {**block(A), f"{A}.gate.bias": (4,)}
    unknown = block(A, last="fc")
    keep = (0, 1, 2, 3)
    directions = Fitted({}, {0: torch.ones(6)})
    edited(unclear, BlockEdit(keep=(0, 1)))()
    edited(unknown, BlockEdit(keep=(0, 1)))()
    for call, message in (
        (edited(block(A), BlockEdit(keep=(0, 4))), "has 4 experts on disk, the plan keeps 4"),
        (
            edited(unclear, BlockEdit(keep=keep, bias={1: 1.0}), directions),
            "boost and suppress are not",
        ),
        (edited(unknown, BlockEdit(keep=keep, scale={1: 0.5})), "cannot be scaled"),
    ):
        with pytest.raises(ContractError, match=message):
            call()


def test_a_bias_whose_experts_lie_on_another_axis_is_cut_there() -> None:
    name = f"{A}.moe_statics.e_score_correction_bias"
    shapes = {**block(A), name: (1, 4)}
    change = stock_rewrite(headers(shapes), {A: BlockEdit(keep=(1, 3))}, NOTHING).changed[name]
    assert change.apply is not None
    assert torch.equal(change.apply(torch.arange(4.0)[None]), torch.tensor([[1.0, 3.0]]))
    assert change.shape == (1, 2)
    assert change.rows is None
