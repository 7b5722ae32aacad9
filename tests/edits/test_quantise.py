"""One expert made smaller: bytes as compressed-tensors writes them, factors, constants."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertcut.edits.allocation import allocate, smallest_size
from expertcut.edits.compression import Option, Projection, parse_options
from expertcut.edits.quantise import Compressed, compressed, in_ggml, pack, quantise
from expertcut.models.modeling_packed import dequantise, low_rank, unpack
from expertcut.models.safetensors_index import DTYPES

D, H, M, GROUP = 64, 64, 96, 32
Weights = dict[Projection, Tensor]


def expert(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Weights:
    rng = torch.Generator().manual_seed(seed)
    names: tuple[Projection, ...] = ("gate", "up", "down")
    return {name: (torch.randn(H, D, generator=rng) * D**-0.5).to(dtype) for name in names}


def output(weights: Weights, x_MD: Tensor) -> Tensor:
    """down(silu(gate x) · up x)."""
    return inner(weights, x_MD) @ weights["down"].double().T


def inner(weights: Weights, x_MD: Tensor) -> Tensor:
    gate, up = (x_MD.double() @ weights[name].double().T for name in ("gate", "up"))
    return torch.nn.functional.silu(gate) * up


def made(option: str, weights: Weights, x_MD: Tensor, y_MD: Tensor | None = None) -> Compressed:
    inputs: Weights = {"gate": x_MD, "up": x_MD, "down": inner(weights, x_MD)}
    y_MD = output(weights, x_MD) if y_MD is None else y_MD
    return compressed(Option.parse(option), weights, inputs, x_MD, y_MD, GROUP)


def error(option: str, weights: Weights, x_MD: Tensor) -> float:
    found, y_MD = made(option, weights, x_MD), output(weights, x_MD)
    if found.constant is not None:
        approx_MD = found.constant[0] * x_MD + found.constant[1]
    else:
        approx_MD = output({**found.weights}, x_MD)
    return float((y_MD - approx_MD).square().sum())


def tokens(n: int = M, seed: int = 9) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_undoes_pack_at_every_length(bits: int):
    rng = np.random.default_rng(bits)
    for columns in range(1, 66):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if bits > 1 else (0, 2)
        ints = rng.integers(low, high, (3, columns))
        ints_RC = torch.tensor(2 * ints - 1 if bits == 1 else ints, dtype=torch.int8)
        packed = pack(ints_RC, bits)
        assert packed.dtype == torch.int32 and packed.shape == (3, math.ceil(columns * bits / 32))
        assert torch.equal(unpack(packed, bits, columns), ints_RC)


def test_packed_values_lie_one_behind_the_other_from_the_lowest_bit():
    packed = pack(torch.tensor([[-4, 3, 0, *[-4] * 7, 3]], dtype=torch.int8), 3)
    # Codes 0, 7 and 4, then zeros; value 10 begins at bit 30 and ends in the next word.
    assert [int(word) & 0xFFFFFFFF for word in packed[0]] == [7 << 3 | 4 << 6 | 3 << 30, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_byte_for_byte_those_of_compressed_tensors(bits: int, dtype: torch.dtype):
    reason = "compressed-tensors is not installed: uv pip install compressed-tensors"
    compressor: Any = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    quantization: Any = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=GROUP
    )
    weight_RC = torch.cat([expert(bits, dtype)["up"], torch.zeros(1, D, dtype=dtype)])
    groups = weight_RC.unflatten(1, (-1, GROUP))
    scale_RG, _ = quantization.utils.calculate_qparams(groups.amin(2), groups.amax(2), args)
    theirs = compressor.PackedQuantizationCompressor.compress(
        {"weight": weight_RC, "weight_scale": scale_RG},
        quantization.QuantizationScheme(targets=["Linear"], weights=args),
    )
    ours = compressed(Option("bits", bits=bits), {"up": weight_RC}, {}, tokens(0), tokens(0), GROUP)
    assert {*ours.tensors["up"]} == {*theirs}
    for name, tensor in theirs.items():
        assert ours.tensors["up"][name].dtype == tensor.dtype
        assert torch.equal(ours.tensors["up"][name], tensor), name
    again = compressor.PackedQuantizationCompressor.decompress(
        theirs, quantization.QuantizationScheme(targets=["Linear"], weights=args)
    )
    assert torch.equal(again["weight"], ours.weights["up"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_weight_moves_further_than_half_a_step(bits: int):
    weight_RC = expert(1, torch.float32)["gate"]
    ints_RC, scale_RG = quantise(weight_RC, bits, GROUP)
    moved = (dequantise(ints_RC, scale_RG) - weight_RC).unflatten(1, (-1, GROUP)).abs()
    assert (moved <= scale_RG[:, :, None] * (0.5 + 1e-5)).all()
    assert int(ints_RC.min()) >= -(2 ** (bits - 1)) and int(ints_RC.max()) < 2 ** (bits - 1)
    assert len(ints_RC.unique()) > 2 ** (bits - 1)


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    weight_RC = expert(2, torch.float32)["gate"]
    weight_RC[0, 0] = 0
    ints_RC, scale_RG = quantise(weight_RC, 1, GROUP)
    groups = weight_RC.unflatten(1, (-1, GROUP))
    expected = torch.where(groups >= 0, 1.0, -1.0) * groups.abs().mean(dim=2, keepdim=True)
    torch.testing.assert_close(dequantise(ints_RC, scale_RG), expected.flatten(1))


@pytest.mark.parametrize("text", ["1", "3", "8", "lowrank:0.25", "lowrank:0.25:0.1", "whole"])
def test_what_is_stored_is_what_the_option_says(text: str):
    found, option = made(text, expert(), tokens()), Option.parse(text)
    for name, tensors in found.tensors.items():
        said = option.stored(f"{name}_proj.weight", (H, D), "BF16", GROUP)
        assert {f"{name}_proj.{suffix}" for suffix in tensors} == {*said}
        for suffix, tensor in tensors.items():
            dtype, shape = said[f"{name}_proj.{suffix}"]
            assert (tensor.dtype, tensor.shape) == (DTYPES[dtype], shape)
            assert tensor.is_contiguous()
    n_bytes = sum(tensor.nbytes for part in found.tensors.values() for tensor in part.values())
    assert n_bytes == option.expert_bytes(
        {name: (H, D) for name in found.tensors}, "BF16", D, GROUP
    )


@pytest.mark.parametrize("text", ["2", "lowrank:0.25:0.1"])
def test_weights_are_those_that_a_loader_makes_of_the_stored_tensors(text: str):
    found = made(text, expert(), tokens())
    for name, tensors in found.tensors.items():
        parts = {suffix.removeprefix("weight_"): tensor for suffix, tensor in tensors.items()}
        if "packed" in parts:
            ints_RC = unpack(parts["packed"], 2, int(parts["shape"][1]))
            weight_RC = dequantise(ints_RC, parts["scale"])
        else:
            weight_RC = low_rank(**parts)
        assert torch.equal(weight_RC, found.weights[name])
        assert weight_RC.dtype == torch.bfloat16


def test_full_rank_whole_and_the_copy_of_a_linear_expert_have_no_error():
    weights, x_MD = expert(3, torch.float32), tokens()
    full = Option("lowrank", rank_share=2.0)
    dense = compressed(full, weights, {}, x_MD, x_MD, GROUP).weights
    assert float((output({**dense}, x_MD) - output(weights, x_MD)).square().sum()) < 1e-10
    assert error("whole", weights, x_MD) < 1e-10
    assert error("lowrank:0.5", weights, x_MD) > 1e-3
    y_MD = 0.75 * x_MD + torch.arange(D) / D
    c, v_D = made("copy", weights, x_MD, y_MD).constant or (0, x_MD)
    assert float((y_MD - c * x_MD - v_D).square().sum()) < 1e-10
    assert (made("mean", weights, x_MD, y_MD).constant or (1,))[0] == 0


def test_low_rank_is_the_truncated_svd_for_wide_and_tall_matrices():
    for shape in ((24, 40), (40, 24)):
        weight_RC = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        option = Option("lowrank", rank_share=0.4)
        found = compressed(option, {"up": weight_RC}, {}, tokens(0), tokens(0), GROUP)
        u, s, vh = torch.linalg.svd(weight_RC, full_matrices=False)
        rank = 6  # 0.4 · 24 · 40 / 64
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(found.weights["up"], expected, rtol=1e-4, atol=1e-5)


def test_kept_rows_are_those_that_the_tokens_feel_most_and_come_out_exact():
    weight_RC = expert(4, torch.float32)["up"]
    x_MD = tokens()
    option = Option("lowrank", rank_share=0.25, row_share=0.1)
    found = compressed(option, {"up": weight_RC}, {"up": x_MD}, x_MD, x_MD, GROUP)
    tensors = found.tensors["up"]
    rest_RC = weight_RC - tensors["weight_u"] @ tensors["weight_v"]
    expected = (x_MD @ rest_RC.T).norm(dim=0).argsort(descending=True)[:7]
    kept = tensors["weight_rows"].tolist()
    assert kept == sorted(expected.tolist())
    torch.testing.assert_close(found.weights["up"][kept], weight_RC[kept])
    alone = compressed(option, {"up": weight_RC}, {}, x_MD[:0], x_MD[:0], GROUP)
    longest = rest_RC.norm(dim=1).argsort(descending=True)[:7]
    assert alone.tensors["up"]["weight_rows"].tolist() == sorted(longest.tolist())


def test_copy_is_the_least_squares_and_beats_the_mean_and_zero():
    weights, x_MD = expert(5), tokens()
    y_MD = output(weights, x_MD) + 0.3 * x_MD + 1
    errors = {}
    for option in ("zero", "mean", "copy"):
        c, v_D = made(option, weights, x_MD, y_MD).constant or (0, x_MD)
        assert v_D.dtype == torch.bfloat16
        errors[option] = float((y_MD - c * x_MD - v_D).square().sum())
    assert errors["copy"] < 0.9 * errors["mean"] < 0.9 * errors["zero"]
    for option in ("mean", "copy"):  # of an expert that no token chooses
        c, v_D = made(option, weights, x_MD[:0], y_MD[:0]).constant or (1, x_MD)
        assert c == 0 and not v_D.any()


def test_outliers_get_the_most_bits_and_an_unchosen_expert_the_fewest_at_every_budget():
    experts = [expert(seed) for seed in range(6)]
    for weight_RC in experts[2].values():
        weight_RC[:, ::GROUP] *= 40  # one column of each group takes its range
    menu = "2,3,4,8"
    x = [tokens(0 if e == 4 else M, seed=e) for e in range(6)]
    error_EO = np.array([[error(o, experts[e], x[e]) for o in menu.split(",")] for e in range(6)])
    shapes = {name: (H, D) for name in experts[0]}
    sizes_O = [o.expert_bytes(shapes, "BF16", D, GROUP) for o in parse_options(menu)]
    bytes_EO = np.tile(sizes_O, (6, 1))
    for budget in np.linspace(smallest_size(error_EO, bytes_EO), bytes_EO[:, 3].sum(), 8)[1:]:
        choice_E = allocate(error_EO, bytes_EO, int(budget)).choice_U
        assert choice_E[2] == choice_E.max() and choice_E[4] == 0


def test_low_rank_expert_is_given_its_factors_and_not_four_bits():
    rng = torch.Generator().manual_seed(0)
    planted: Weights = {
        name: (torch.randn(H, 8, generator=rng) @ torch.randn(8, D, generator=rng) / D).bfloat16()
        for name in expert()
    }
    menu = parse_options("4,lowrank:0.25")
    shapes = {name: (H, D) for name in planted}
    sizes_O = [o.expert_bytes(shapes, "BF16", D, GROUP) for o in menu]
    assert sizes_O[1] <= sizes_O[0] < 1.2 * sizes_O[1]
    error_EO = np.array([[error(str(o), w, tokens()) for o in menu] for w in (planted, expert())])
    bytes_EO = np.full((2, 2), max(sizes_O))  # at equal bytes
    assert allocate(error_EO, bytes_EO, 2 * max(sizes_O)).choice_U.tolist() == [1, 0]


def test_blocks_of_llama_cpp_round_to_the_nearest_of_their_steps():
    weight_RC = expert(dtype=torch.float32)["gate"]
    blocks_RGS = weight_RC.unflatten(1, (-1, 32))
    largest_RG = blocks_RGS.abs().amax(dim=2)
    errors = []
    for bits, steps in (("8", 127), ("5", 16), ("4", 8)):
        found_RC = in_ggml(weight_RC, Option.parse(bits))
        moved_RG = (found_RC.unflatten(1, (-1, 32)) - blocks_RGS).abs().amax(dim=2)
        assert (moved_RG <= largest_RG / steps * 1.01).all()
        errors.append(float(moved_RG.square().mean()))
    assert errors == sorted(errors) and errors[0] > 0


def test_what_gguf_cannot_write_is_rounded_to_as_many_bits(monkeypatch: pytest.MonkeyPatch):
    of_blocks_RC = expert(dtype=torch.float32)["gate"]
    k_quant_RC = of_blocks_RC.repeat(1, 4)
    for option in parse_options("2,3,4"):
        expected_RC = dequantise(*quantise(k_quant_RC, option.bits, 32))
        assert torch.equal(in_ggml(k_quant_RC, option), expected_RC)
    four = Option.parse("4")
    by_gguf_RC = in_ggml(of_blocks_RC, four)
    monkeypatch.setitem(sys.modules, "gguf", None)
    expected_RC = dequantise(*quantise(of_blocks_RC, 4, 32))
    assert torch.equal(in_ggml(of_blocks_RC, four), expected_RC)
    assert not torch.equal(by_gguf_RC, expected_RC)


def test_widths_for_llama_cpp_are_its_types():
    x_MD, weights = tokens(), expert()
    option = Option.parse("4")
    found = compressed(option, weights, {}, x_MD, x_MD, GROUP, is_ggml=True)
    assert {*found.weights} == {*weights} and not found.tensors
    for name, weight_RC in weights.items():
        assert torch.equal(found.weights[name], in_ggml(weight_RC, option))
        assert not torch.equal(found.weights[name], made("4", weights, x_MD).weights[name])
