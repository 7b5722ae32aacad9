"""The admission gap: the bias on an expert's logit that lifts it to the last expert let in."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from expertcut.errors import PlanError
from expertcut.profiling.findings import logits
from expertcut.profiling.schema import BlockInfo, ModelInfo

Array = np.ndarray[Any, Any]
SelectionOf = Callable[[int], Array | None]
"""By layer: the bias (E,) that is added to α where experts are chosen, or None."""

_SELECTION_BIAS = re.compile(r"(.*\.)?(e_score_correction_bias|expert_bias)")
_FARTHEST = 1e6  # logits; a bias beyond it reaches nothing that a smaller one does not
_EXACT = 1e-12  # logits


def admission_gap(
    block: BlockInfo,
    alpha_NE: Array,
    chosen_NK: Array,
    expert: int,
    selection_E: Array | None = None,
) -> float:
    """The bias on one expert's logits that makes its mean score that of the last one let in.

    A score is what experts are chosen by: α, or the logit in some families, plus the selection
    bias where there is one. The mean over all questions of the lowest chosen score is held against
    the mean of this expert's; infinite where no bias closes the gap, NaN where a table of token
    ids chooses. In which groups experts are chosen is not looked at.
    """
    if block.is_hashed:
        return math.nan
    alpha_NE, chosen_NK = alpha_NE.astype(np.float64), chosen_NK.astype(np.int64)
    ranked_NE = alpha_NE
    if block.selection == "logits":
        with np.errstate(divide="ignore"):
            ranked_NE = logits(block, alpha_NE)
    selection_E = np.zeros(alpha_NE.shape[1]) if selection_E is None else selection_E
    score_NK = np.take_along_axis(ranked_NE, chosen_NK, axis=1) + selection_E[chosen_NK]
    last_N = score_NK.min(axis=1) - selection_E[expert]
    if block.selection == "logits":
        return float((last_N - ranked_NE[:, expert]).mean())
    return _bias_to_mean(block, alpha_NE[:, expert], float(last_N.mean()))


def biased_alpha(block: BlockInfo, alpha_N: Array, bias: float) -> Array:
    """α of an expert once a bias is on its logits, those of the other experts being as before.

    Under a softmax the others' share of the sum stays, so α moves as under a sigmoid.
    """
    if block.scoring == "sqrtsoftplus":
        with np.errstate(divide="ignore"):
            moved_N: Array = np.sqrt(np.logaddexp(0, logits(block, alpha_N) + bias))
        return moved_N
    return np.asarray(expit(logit(alpha_N) + bias))


def _bias_to_mean(block: BlockInfo, alpha_N: Array, goal: float) -> float:
    """The bias with which α is `goal` on average, by bisection; α never falls with it."""

    def distance(bias: float) -> float:
        return float(biased_alpha(block, alpha_N, bias).mean()) - goal

    here = float(alpha_N.mean()) - goal
    if here == 0:
        return 0.0
    sign = 1.0 if here < 0 else -1.0
    if distance(sign * _FARTHEST) * sign <= 0:
        return sign * math.inf
    low, high = 0.0, 1.0
    while distance(sign * high) * sign < 0:
        low, high = high, 2 * high
    while high - low > _EXACT * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if distance(sign * middle) * sign < 0 else (low, middle)
    return sign * high


def no_selection(layer: int) -> Array | None:
    """Of a model in which α alone decides."""
    return None


def stored_selection(model: ModelInfo, layer: int) -> Array | None:
    """The selection bias (E,) of a profiled model's layer, read from its checkpoint.

    Raises:
        PlanError: the profile says that there is one, and no single tensor holds it.
        ModelError: the checkpoint cannot be read.
    """
    block = model.blocks[layer]
    is_unknown = block.selection_bias is None and block.scoring != "softmax"
    if not block.selection_bias and not is_unknown:
        return None
    from expertcut.models.load import find_source  # with torch, which `show` does without
    from expertcut.models.safetensors_index import read_even_quantized

    source = find_source(model.id, model.revision)
    tensors = read_even_quantized(source.path).tensors
    own = [
        name
        for name, tensor in tensors.items()
        if _last_number(name) == _last_number(block.name)
        and math.prod(tensor.shape) == block.experts
    ]
    found = [name for name in own if _SELECTION_BIAS.fullmatch(name)]
    # On disk some families call it by another name (DeepSeek-V4: ffn.gate.bias).
    found = found or [name for name in own if name.endswith("bias") and not is_unknown]
    if len(found) == 1:
        return _read(tensors[found[0]].file, found[0])
    if not found and is_unknown:
        return None
    raise PlanError(
        f"{source.path} holds {len(found)} tensors that may be the bias which {block.name} adds "
        f"where experts are chosen, so there is no default strength: give one, as in {layer}:0=0.5"
    )


def _last_number(name: str) -> str | None:
    """Of a tensor that is no single expert's: its decoder layer."""
    numbers: Iterator[str] = (part for part in reversed(name.split(".")) if part.isdecimal())
    return next(numbers, None)


def _read(file: Path, name: str) -> Array:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        values: Array = weights.get_tensor(name).double().reshape(-1).numpy()
    return values


def no_default_strength(layer: int, expert: int, sign: int, gap: float) -> str:
    """Why a gap is no strength to boost (`sign` +1) or to suppress (−1) an expert by."""
    its = f"expert {expert} of layer {layer}"
    if math.isnan(gap):
        return f"a table of token ids chooses the experts of layer {layer}, whatever their logits"
    if not math.isfinite(gap) and gap * sign > 0:
        way = "lifts" if sign > 0 else "lowers"
        return f"no bias on its logit {way} {its} to the last expert let in on average"
    state = "admitted" if sign > 0 else "left out"
    return f"{its} is {state} on average already (admission gap {gap:+.4f})"
