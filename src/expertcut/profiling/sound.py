"""Whether a chunk's arrays are what its profile says: a checksum proves only who wrote them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Stats = Literal["none", "answer", "all"]
_PARTS, _SUMS = ("prefix", "question"), ("tokens", "weight", "norm", "weighted_norm")
_MASK = "calibration_N"  # where sums over the questions that are not held out are kept too
_MOST_CHOICES = 26
NO_CHOICE = 255  # in order_NC, where a question has fewer choices


@dataclass(frozen=True)
class Expected:
    """A chunk's questions, its model's experts by layer and per token, and what was kept."""

    questions: int
    experts: tuple[int, ...]
    top_k: int
    stats: Stats

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays that must be there; those with choices come beside."""
        n, n_layers, most = self.questions, len(self.experts), max(self.experts)
        shapes: dict[str, tuple[int, ...]] = {"answer_N": (n,), "row_N": (n,)}
        if self.stats != "none":
            shapes |= {"alpha_NLE": (n, n_layers, most), "gap_N": (n,), "prefix_gap": (1,)}
            shapes |= dict.fromkeys(("chosen_NLK", "weight_NLK"), (n, n_layers, self.top_k))
        return shapes


def arrays_fault(arrays: Mapping[str, Array], expected: Expected) -> str | None:
    """What is wrong with them, None if nothing is."""
    return next(_faults(arrays, expected), None)


def _faults(arrays: Mapping[str, Array], expected: Expected) -> Iterator[str]:
    sums = [name for name in arrays if name.endswith("_LE")]
    kinds = {name.partition("_")[2].removesuffix("_LE") for name in sums} | {
        *(_SUMS if sums else ())
    }
    each = [f"{part}_{kind}_LE" for kind in sorted(kinds) for part in _PARTS]
    if _MASK in arrays:
        each += [f"calibration_{kind}_LE" for kind in sorted(kinds)]
        if arrays[_MASK].shape != (expected.questions,):
            yield f"{_MASK} has shape {list(arrays[_MASK].shape)}, not {[expected.questions]}"
    shape_LE = (len(expected.experts), max(expected.experts))
    for name, shape in {**expected.shapes, **dict.fromkeys(each, shape_LE)}.items():
        if name not in arrays:
            yield f"it has no {name}"
        elif arrays[name].shape != shape:
            yield f"{name} has shape {list(arrays[name].shape)}, not {list(shape)}"
    yield from _wrong_answers(arrays, expected.questions)
    if expected.stats != "none":
        yield from _wrong_experts(arrays, expected.experts)
    for name in sums:
        if not np.isfinite(arrays[name]).all():
            yield f"{name} holds what is no number"


def _wrong_answers(arrays: Mapping[str, Array], n: int) -> Iterator[str]:
    logprob_NC = arrays.get("choice_logprob_NC", np.zeros(0, np.float32))
    shape = logprob_NC.shape
    if len(shape) != 2 or shape[0] != n or not 2 <= shape[1] <= _MOST_CHOICES:
        yield f"choice_logprob_NC has shape {list(shape)}, not {[n]} and 2 to {_MOST_CHOICES}"
        return
    order_NC = arrays.get("order_NC", np.zeros(shape, np.uint8))
    if order_NC.shape != shape or ((order_NC >= shape[1]) & (order_NC != NO_CHOICE)).any():
        yield "order_NC is no order of the choices"
    if logprob_NC.dtype != np.float32 or np.isnan(logprob_NC).any() or (logprob_NC > 1).any():
        yield "choice_logprob_NC holds what is no log probability"
    answer_N = arrays["answer_N"]
    if answer_N.dtype != np.uint8 or (answer_N >= shape[1]).any():
        yield "answer_N names choices that are not there"


def _wrong_experts(arrays: Mapping[str, Array], experts: tuple[int, ...]) -> Iterator[str]:
    chosen_NLK, limit_L1 = arrays["chosen_NLK"], np.array(experts)[:, None]
    is_whole = np.issubdtype(chosen_NLK.dtype, np.integer)
    if not is_whole or (chosen_NLK < 0).any() or (chosen_NLK >= limit_L1).any():
        yield "chosen_NLK names experts that are not there"
    for name in ("alpha_NLE", "weight_NLK"):
        if arrays[name].dtype != np.float32 or not np.isfinite(arrays[name]).all():
            yield f"{name} holds what is no number"
    for name in ("gap_N", "prefix_gap"):
        if np.isnan(arrays[name]).any():
            yield f"{name} holds what is no number"
