"""One expert made smaller: integers by rounding to nearest, low rank with rows, constants.

R rows are outputs of a projection, C columns its inputs, G groups of S columns, M the tokens of the
expert, D the model's width, P the rank, K the kept rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertcut.edits.compression import Option, Projection
from expertcut.models.modeling_packed import dequantise, low_rank


@dataclass(frozen=True)
class Compressed:
    """One expert under one option.

    `tensors` by projection and suffix (`weight_packed`) are what the files hold, `weights` by
    projection what a loader makes of them; both are empty where the output is c·x + v.
    """

    tensors: Mapping[Projection, Mapping[str, Tensor]] = field(default_factory=dict)
    weights: Mapping[Projection, Tensor] = field(default_factory=dict)
    constant: tuple[float, Tensor] | None = None


def compressed(
    option: Option,
    weights: Mapping[Projection, Tensor],
    inputs: Mapping[Projection, Tensor],
    x_MD: Tensor,
    y_MD: Tensor,
    group_size: int,
    *,
    rows: Mapping[Projection, Tensor] | None = None,
    is_ggml: bool = False,
) -> Compressed:
    """An expert with these matrices (R, C), and with these inputs and outputs on its tokens.

    `inputs` (M, C) of each projection are needed by low rank with rows alone, `x_MD` and `y_MD` by
    the constants. There may be no tokens. `rows` (K,) are those of low rank, if known. With
    `is_ggml` widths are types of llama.cpp, and have no tensors here.
    """
    if option.is_constant:
        dtype = next(iter(weights.values())).dtype
        return Compressed(constant=_constant(option, x_MD, y_MD, dtype))
    tensors, dense = {}, {}
    for name, weight_RC in weights.items():
        if option.kind == "bits" and is_ggml:
            dense[name] = in_ggml(weight_RC, option)
        elif option.kind == "bits":
            tensors[name], dense[name] = _integers(weight_RC, option.bits, group_size)
        elif option.kind == "lowrank":
            tensors[name] = _factors(weight_RC, option, inputs.get(name), (rows or {}).get(name))
            dense[name] = low_rank(
                **{k.removeprefix("weight_"): t for k, t in tensors[name].items()}
            )
        else:
            tensors[name], dense[name] = {"weight": weight_RC}, weight_RC
    return Compressed(tensors, dense)


def quantise(weight_RC: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Integers (R, C) in int8 and scales (R, G) in the weights' dtype; 1 bit: ±1 and mean |w|.

    Of 2 bits and more they are those of compressed-tensors' symmetric groups: the scale is
    max |w| / (2^bits − 1) · 2, and weights are divided by the rounded scale in their own dtype (as
    it does on a CPU; its GPU kernel divides in float32, which moves 0.8 % of the 4-bit integers of
    bf16 weights by one, and 11 % of those of 8 bits).
    1 bit is `binary` of MC-MoE (arXiv 2410.06270).
    """
    groups_RGS = weight_RC.unflatten(1, (-1, group_size))
    if bits == 1:
        scale_RG = groups_RGS.float().abs().mean(dim=2).to(weight_RC.dtype)
        return torch.where(weight_RC < 0, -1, 1).to(torch.int8), scale_RG
    scale_RG = groups_RGS.abs().amax(dim=2) / ((2**bits - 1) / 2)
    scale_RG = torch.where(scale_RG == 0, torch.finfo(scale_RG.dtype).eps, scale_RG)
    half = 2 ** (bits - 1)
    ints_RGS = (groups_RGS / scale_RG[:, :, None]).clamp(-half, half - 1).round()
    return ints_RGS.flatten(1).to(torch.int8), scale_RG


def pack(ints_RC: Tensor, bits: int) -> Tensor:
    """Integers as dense little-endian bits in int32 (R, ⌈C·bits/32⌉): value i from bit i·bits on.

    As compressed-tensors' `pack_to_int32`, for any width from 1 to 8.
    """
    ints_RC = ints_RC >> 1 if bits == 1 else ints_RC  # ±1 as 0 and −1
    codes_RC = ints_RC.to(torch.int32) + 2 ** (bits - 1)
    n_columns = codes_RC.shape[1]
    codes = torch.nn.functional.pad(codes_RC, (0, -n_columns % 32)).unflatten(1, (-1, 32))
    words = codes.new_zeros(*codes.shape[:2], bits)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= codes[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= codes[..., i] >> (32 - shift)
    packed: Tensor = words.flatten(1)[:, : -(-n_columns * bits // 32)]
    return packed.contiguous()


def _integers(weight_RC: Tensor, bits: int, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    ints_RC, scale_RG = quantise(weight_RC, bits, group_size)
    tensors = {
        "weight_packed": pack(ints_RC, bits),
        "weight_scale": scale_RG,
        "weight_shape": torch.tensor(weight_RC.shape),
    }
    return tensors, dequantise(ints_RC, scale_RG)


def _factors(
    weight_RC: Tensor, option: Option, inputs_MC: Tensor | None, rows_K: Tensor | None = None
) -> dict[str, Tensor]:
    """U (R, P), V (P, C) of the truncated SVD, and the rows S (K, C) of W − UV with their ids.

    The rows are those with the largest ‖row·X‖ over the tokens, without tokens the longest. The
    left singular vectors are eigenvectors of W·Wᵀ (or right ones of Wᵀ·W, whichever is smaller).
    """
    rows, columns = shape = (weight_RC.shape[0], weight_RC.shape[1])
    dtype, rank = weight_RC.dtype, option.rank(shape)
    wide = weight_RC.double()
    if rows <= columns:
        u_RP = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]
        v_PC = u_RP.T @ wide
    else:
        v_PC = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -rank:].T
        u_RP = wide @ v_PC.T
    made = {"weight_u": u_RP.to(dtype).contiguous(), "weight_v": v_PC.to(dtype).contiguous()}
    if kept := option.n_rows(shape):
        rest_RC = wide - made["weight_u"].double() @ made["weight_v"].double()
        if rows_K is None:
            seen_RM = rest_RC
            if inputs_MC is not None and len(inputs_MC):
                seen_RM = rest_RC @ inputs_MC.double().T
            rows_K = seen_RM.norm(dim=1).topk(kept).indices.sort().values
        made["weight_s"] = rest_RC[rows_K.long()].to(dtype)
        made["weight_rows"] = rows_K.to(torch.int32)
    return made


def _constant(
    option: Option, x_MD: Tensor, y_MD: Tensor, dtype: torch.dtype
) -> tuple[float, Tensor]:
    """The c and v of c·x + v, as stored: the least squares over the tokens for `copy`."""
    c, v_D = 0.0, y_MD.new_zeros(y_MD.shape[1]).double()
    if option.kind != "zero" and len(y_MD):
        x_MD, y_MD = x_MD.double(), y_MD.double()
        if option.kind == "copy":
            around_MD = x_MD - x_MD.mean(dim=0)
            spread = float(around_MD.square().sum())
            slope = float((around_MD * y_MD).sum()) / spread if spread else 0.0
            c = torch.tensor(slope, dtype=dtype).item()
        v_D = y_MD.mean(dim=0) - c * x_MD.mean(dim=0) if c else y_MD.mean(dim=0)
    return c, v_D.to(dtype)


def in_ggml(weight_RC: Tensor, option: Option) -> Tensor:
    """A matrix as llama.cpp reads it back from the option's type, by the package gguf.

    Without it (the extra `gguf`), and for K-quants, which it reads but cannot write: rounded to
    the nearest of as many bits, in groups of 32.
    """
    name = option.ggml_type(weight_RC.shape[1], "BF16")
    try:
        from gguf import GGMLQuantizationType, dequantize
        from gguf import quantize as to_ggml

        kind = GGMLQuantizationType[name.upper()]
        array_RC = dequantize(to_ggml(weight_RC.float().cpu().numpy(), kind), kind)
        return torch.from_numpy(array_RC).to(weight_RC)
    except (ImportError, NotImplementedError):
        if not name.startswith("q"):
            return weight_RC
        return dequantise(*quantise(weight_RC, int(name[1]), 32))
