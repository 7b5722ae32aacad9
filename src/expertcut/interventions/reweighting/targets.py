"""Tilting the gate: expert expressions such as `3:12=0.25`, and the bias that admits an expert."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertcut.errors import PlanError, SettingsError
from expertcut.interventions.plan import Draft, Edit, Layout
from expertcut.profiling.statistics import LayerStatistics, layer_statistics
from expertcut.profiling.store import Profile

_EXPRESSION = re.compile(r"(?:(\d{1,9}):)?(\d{1,9})(?:=([+-]?[\d.]+(?:[eE][+-]?\d+)?))?")


@dataclass(frozen=True)
class Target:
    """An expert to tilt; `layer` None is the last MoE block, `strength` None the default."""

    layer: int | None
    expert: int
    strength: float | None


@dataclass(frozen=True)
class Tilt:
    """A logit bias for one expert, and where it came from."""

    layer: int
    block: str
    expert: int
    bias: float
    is_given: bool

    @property
    def verb(self) -> str:
        """`boost` or `suppress`."""
        return "boost" if self.bias > 0 else "suppress"


def parse_target(expression: str) -> Target:
    """`12` (last layer), `3:12` (layer 3), either with `=0.25` (strength in logits).

    Raises:
        SettingsError: not of that form, or a strength that is no number.
    """
    match = _EXPRESSION.fullmatch(expression.strip())
    if match is None:
        raise SettingsError(
            f"{expression!r} names no expert: write E, L:E, E=bias or L:E=bias, as in 3:12=0.25"
        )
    layer, expert, strength = match.groups()
    try:
        value = None if strength is None else float(strength)
    except ValueError:
        raise SettingsError(f"{expression!r}: {strength!r} is no number") from None
    if value is not None and (value == 0 or not math.isfinite(value)):
        raise SettingsError(f"{expression!r}: a bias of {strength} cannot tilt anything")
    return Target(None if layer is None else int(layer), int(expert), value)


def tilts(profile: Profile, boost: Sequence[str], suppress: Sequence[str]) -> list[Tilt]:
    """Biases for all targets; a strength without a number is the admission gap.

    Raises:
        SettingsError: no target, or one that cannot be read.
        PlanError: no such layer or expert, one named twice, or no gap to close.
    """
    if not boost and not suppress:
        raise SettingsError("say which experts to tilt: --boost E or --suppress E, E as in 3:12")
    layers = layer_statistics(profile)
    found = [_tilt(profile, layers, parse_target(text), +1) for text in boost]
    found += [_tilt(profile, layers, parse_target(text), -1) for text in suppress]
    seen: set[tuple[int, int]] = set()
    for tilt in found:
        if (tilt.layer, tilt.expert) in seen:
            raise PlanError(f"expert {tilt.layer}:{tilt.expert} is named twice: name it once")
        seen.add((tilt.layer, tilt.expert))
    return found


def reweight_draft(profile: Profile, found: list[Tilt], layout: Layout = "stock") -> Draft:
    """Edits that keep every expert and carry the biases."""
    edits = {
        block.name: Edit(
            keep=tuple(range(block.experts)),
            bias={t.expert: t.bias for t in found if t.block == block.name},
        )
        for block in profile.info.model.blocks
    }
    words = [f"--{t.verb} {t.layer}:{t.expert}={abs(t.bias):.6g}" for t in found]
    slug = "-".join(f"{t.verb}-{t.layer}.{t.expert}" for t in found)[:100]
    slug += "" if layout == "stock" else f"-{layout}"
    return Draft(slug, f"reweight {' '.join(words)}", "by hand", "answer", edits, layout)


def admission_gap(profile: Profile, layer: int, expert: int) -> float:
    """ln(mean α of the K-th chosen expert) − ln(mean α of this one), over all questions, in logits.

    The bias that lifts an expert's mean probability to that of the last one let in.
    """
    block = profile.info.model.blocks[layer]
    alpha_NE = profile.array("alpha_NLE")[:, layer, : block.experts].astype(np.float64)
    chosen_NK = profile.array("chosen_NLK")[:, layer].astype(np.int64)
    last_N = np.take_along_axis(alpha_NE, chosen_NK, axis=1).min(axis=1)
    with np.errstate(divide="ignore"):  # an expert of probability 0 is infinitely far away
        return float(np.log(last_N.mean()) - np.log(alpha_NE[:, expert].mean()))


def _tilt(profile: Profile, layers: list[LayerStatistics], target: Target, sign: int) -> Tilt:
    index = len(layers) - 1 if target.layer is None else target.layer
    if index >= len(layers):
        raise PlanError(
            f"no layer {index}: the model has MoE layers 0 to {len(layers) - 1} "
            "(layers are counted from 0)"
        )
    layer, expert = layers[index], target.expert
    if expert >= layer.n_experts:
        raise PlanError(
            f"no expert {expert} in layer {index}: it has experts 0 to {layer.n_experts - 1}"
        )
    if target.strength is not None:
        if sign > 0 and target.strength < 0:
            raise PlanError(f"--boost {index}:{expert}={target.strength:g}: use --suppress")
        return Tilt(index, layer.block, expert, sign * abs(target.strength), True)
    return Tilt(index, layer.block, expert, _default_bias(profile, index, expert, sign), False)


def _default_bias(profile: Profile, layer: int, expert: int, sign: int) -> float:
    bias = admission_gap(profile, layer, expert)
    if not math.isfinite(bias) or bias * sign <= 0:
        option, state = ("--boost", "admitted") if sign > 0 else ("--suppress", "left out")
        raise PlanError(
            f"expert {expert} of layer {layer} is {state} on average already (admission gap "
            f"{bias:+.4f}): give the strength, as in {option} {layer}:{expert}=0.5"
        )
    return bias
