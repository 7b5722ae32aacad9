"""A profile's sums per expert: over every token, and gate weights at the answer position."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from expertcut.profiling.store import Profile

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OverTokens:
    """One MoE block's sums over every token, shots included, as if each prompt had run alone.

    None is what the profile does not hold: it was made before the sum was there or, with
    `residual_shift_E`, by a model whose residual stream is not known.
    """

    tokens_E: Array
    weight_E: Array
    norm_E: Array
    weighted_norm_E: Array
    votes_E: Array | None = None
    input_shift_E: Array | None = None
    residual_shift_E: Array | None = None


def over_tokens(profile: Profile) -> list[OverTokens | None]:
    """Every MoE block's, in layer order; None where only the answer position was kept."""
    blocks = profile.info.model.blocks
    sums = {f.name: profile.token_sum(f.name.removesuffix("_E")) for f in fields(OverTokens)}
    if sums["tokens_E"] is None:
        return [None] * len(blocks)
    return [
        OverTokens(**{k: None if v is None else v[layer, : b.experts] for k, v in sums.items()})  # type: ignore[arg-type]
        for layer, b in enumerate(blocks)
    ]


def answer_weights(profile: Profile) -> list[Array]:
    """Σ gate weight (E,) over the questions that chose each expert, per MoE block."""
    weight_NLK = profile.array("weight_NLK").astype(np.float64)
    chosen_NLK = profile.array("chosen_NLK").astype(np.int64)
    return [
        np.bincount(
            chosen_NLK[:, layer].ravel(), weight_NLK[:, layer].ravel(), minlength=block.experts
        )
        for layer, block in enumerate(profile.info.model.blocks)
    ]


def largest_values(profile: Profile) -> list[Array] | None:
    """The largest absolute value (E,) that each expert gave at any token, per MoE block."""
    if "question_largest_LE" not in profile.chunks[0]:
        return None
    parts = [c[f"{part}_largest_LE"] for c in profile.chunks for part in ("prefix", "question")]
    largest_LE = np.max(parts, axis=0)
    blocks = profile.info.model.blocks
    return [largest_LE[layer, : block.experts] for layer, block in enumerate(blocks)]
