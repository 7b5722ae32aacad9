"""Weights of packed experts, as a loader makes them of the tensors in the files.

Needs nothing of expertcut. R rows are outputs of a projection, C columns its inputs, G groups of
columns, P the rank, K kept rows.
"""

import torch
from torch import Tensor


def unpack(packed: Tensor, bits: int, n_columns: int) -> Tensor:
    """Integers in int8 (R, C) of dense little-endian bits in int32; of 1 bit ±1."""
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = words.new_zeros(*words.shape[:2], 32, dtype=torch.int8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        low = min(bits, 32 - shift)
        code = (words[..., word] >> shift) & (2**low - 1)  # the shift fills with the sign
        if low < bits:
            code |= (words[..., word + 1] & (2 ** (bits - low) - 1)) << low
        codes[..., i] = code - 2 ** (bits - 1)
    ints_RC: Tensor = codes.flatten(1)[:, :n_columns]
    return ints_RC * 2 + 1 if bits == 1 else ints_RC.contiguous()


def dequantise(ints_RC: Tensor, scale_RG: Tensor) -> Tensor:
    """Integers times the scales of their groups, in the scales' dtype."""
    ints_RGS = ints_RC.unflatten(1, (scale_RG.shape[1], -1))
    weight_RC: Tensor = (ints_RGS.to(scale_RG.dtype) * scale_RG[:, :, None]).flatten(1)
    return weight_RC


def low_rank(u: Tensor, v: Tensor, s: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """U (R, P) · V (P, C), plus S (K, C) at its rows; the sums are not rounded before the end."""
    wide = torch.promote_types(u.dtype, torch.float32)
    weight_RC = u.to(wide) @ v.to(wide)
    if s is not None and rows is not None:
        weight_RC[rows.long()] += s.to(wide)
    return weight_RC.to(u.dtype)
