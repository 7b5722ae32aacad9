"""Weights before and after loading: enough, all that the model wants, all of them numbers."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from expertcut.errors import ModelError
from expertcut.moe.stored.headers import Stored, StoredTensor, weights_file

_CHECKED = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_VALUES_PER_QUANTIZED_BYTE = 8

logger = logging.getLogger(__name__)


def check_total(folder: Path, model: Any, stored: Stored) -> None:
    """That the weights hold about as many values as a model, which was made on the meta device.

    What is lacking is allocated while loading, to be refused by name after that: so not too much.

    Raises:
        ModelError: they hold less than half of them.
    """
    needed = sum(parameter.numel() for parameter in model.parameters())
    held = sum(map(_most_values, stored.tensors.values()))
    if needed > 2 * held:
        raise ModelError(
            f"{folder / 'config.json'} describes a model of {needed:,} values, "
            f"{weights_file(folder)} holds {held:,}: one of them is wrong or not whole"
        )


def _most_values(tensor: StoredTensor) -> int:
    """Quantized ones, and the integers that others are packed in, hold several in a byte."""
    if tensor.dtype in ("F64", "F32", "F16", "BF16"):
        return math.prod(tensor.shape)
    return (tensor.end - tensor.begin) * _VALUES_PER_QUANTIZED_BYTE


def check_complete(folder: Path, info: dict[str, Any]) -> None:
    """That every weight of the model was in the files, in its shape.

    What the model has no place for is warned of.

    Raises:
        ModelError: one was not.
    """
    lost = sorted(info["missing_keys"])
    lost += sorted(
        f"{name} of shape {list(wanted)} (it has {list(found)})"
        for name, found, wanted in info["mismatched_keys"]
    )
    if lost:
        raise ModelError(
            f"{weights_file(folder)} lacks {len(lost)} of the model's weights, first {lost[0]}"
        )
    if info["unexpected_keys"]:
        n_left, first = len(info["unexpected_keys"]), min(info["unexpected_keys"])
        logger.warning("%s: no place for %d tensors, first %s: left out", folder, n_left, first)


def check_finite(folder: Path, model: Any, files: list[Path]) -> None:
    """That no weight is NaN or infinite: one pass over each, the file is sought only where one is.

    Raises:
        ModelError: one is, as stored or in the dtype that it was loaded in.
    """
    tensors = model.state_dict()
    # What accelerate brings in when it is used is on the meta device until then.
    is_elsewhere = any(tensor.device.type == "meta" for tensor in tensors.values())
    bad = next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)
    if bad is None and not is_elsewhere:
        return
    for file in files:
        check_values(file)
    if bad is not None:
        raise ModelError(
            f"{weights_file(folder)} holds values that do not fit in {model.dtype}, in {bad}: "
            "take another --dtype"
        )


def check_values(file: Path) -> None:
    """That no weight in a file is NaN or infinite.

    Raises:
        ModelError: one is.
    """
    for name, tensor in _on_disk(file):
        if not _is_finite(tensor):
            n_bad = int((~tensor.isfinite()).sum())
            raise ModelError(
                f"{file} holds NaN or infinity, {n_bad} of the {tensor.numel()} values of "
                f"{name}: download it again, or ask who made it"
            )


def _on_disk(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            yield name, weights.get_tensor(name)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are; NaN goes through minimum and maximum, which read at full speed."""
    if tensor.dtype not in _CHECKED or tensor.device.type == "meta" or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())
