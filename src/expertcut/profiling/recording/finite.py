"""What a chunk's records may not hold: NaN and infinities, also of tokens that answer nothing."""

from typing import Any

import numpy as np

from expertcut.errors import ModelError
from expertcut.models.load import MoeModel
from expertcut.profiling.chunks import Arrays
from expertcut.scoring.engine import advice


def check_finite(moe: MoeModel, subject: str, arrays: Arrays) -> None:
    """That all that was recorded per layer is finite.

    Of the last block's other tokens no answer tells.

    Raises:
        ModelError: naming the first layer where something is not.
    """
    bad = {name: found for name, array in arrays.items() if (found := _layers(name, array))}
    if not bad:
        return
    name = min(bad, key=lambda name: min(bad[name]))
    layer = min(bad[name])
    raise ModelError(
        f"{moe.source.id} computes what is no finite number for tokens of {subject}: {name} of "
        f"layer {layer} ({moe.blocks[layer].name}): {advice(moe)}"
    )


def _layers(name: str, array: np.ndarray[Any, Any]) -> list[int]:
    """The layers in which an array whose name ends in its axes holds NaN or infinity."""
    axes = name.rpartition("_")[2]
    if "L" not in axes or array.dtype.kind != "f" or np.isfinite(array).all():
        return []
    return [int(layer) for layer in np.argwhere(~np.isfinite(array))[:, axes.index("L")]]
