"""What weighs a token's experts against each other, and tokens by how far a block moves them."""

import torch
from torch import Tensor


def borda_points(weighted_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Points (T, E) of each token's vote on its K experts by weight · ‖f‖, Borda's.

    K for the largest, 1 for the smallest, equal ones share theirs; 0 for what contributed nothing.
    """
    value_KT = weighted_TE.gather(1, experts_TK).T.contiguous()
    ahead_KT = (value_KT[:, None] - value_KT).sign().sum(dim=1)  # those below, less those above
    points_KT = (len(value_KT) + 1 + ahead_KT) / 2 * (value_KT > 0)
    return torch.zeros_like(weighted_TE).scatter(1, experts_TK, points_KT.T)


def shift(x_TD: Tensor, output_TD: Tensor, factor: float = 1.0) -> Tensor:
    """How far the output turns each token: max(1 − cos(x, x + factor · output), 0), (T,) float64.

    From three inner products; 1 − cos = sin² / (1 + cos), so that little of a small angle is lost.
    0 where x or the sum is 0.
    """
    output_TD = output_TD.to(x_TD.device)
    xx_T, yy_T = _squared(x_TD), _squared(output_TD) * factor**2
    xy_T = _inner(x_TD, output_TD) * factor
    zz_T = (xx_T + 2 * xy_T + yy_T).clamp(min=0)
    lengths_T = xx_T * zz_T
    is_defined_T = lengths_T > 0
    lengths_T = lengths_T.where(is_defined_T, 1.0)
    cos_T = ((xx_T + xy_T) / lengths_T.sqrt()).clamp(-1, 1)
    sin2_T = (xx_T * yy_T - xy_T**2).clamp(min=0) / lengths_T
    shift_T = torch.where(cos_T > 0, sin2_T / (1 + cos_T.abs()), 1 - cos_T)
    return shift_T * is_defined_T


def _squared(x_TD: Tensor) -> Tensor:
    norm_T: Tensor = torch.linalg.vector_norm(x_TD, dim=-1, dtype=torch.float32)
    return norm_T.double() ** 2


def _inner(x_TD: Tensor, y_TD: Tensor) -> Tensor:
    # A product and a sum are twice as fast as vecdot on a CPU.
    return (x_TD.float() * y_TD.float()).sum(dim=-1).double()
