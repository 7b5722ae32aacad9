"""Expert expressions such as `3:12=0.25`, what they ask for, and the bias that admits an expert."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from expertcut.errors import PlanError, SettingsError
from expertcut.interventions.lineage import Numbers, find_expert, numbers_of
from expertcut.interventions.reweighting.admission import (
    admission_gap,
    no_default_strength,
    stored_selection,
)
from expertcut.interventions.reweighting.choosing import Pick
from expertcut.interventions.reweighting.tuning import Shift
from expertcut.profiling.statistics import LayerStatistics, layer_statistics
from expertcut.profiling.storage import Profile

_EXPRESSION = re.compile(r"(?:(\d{1,9}):)?(\d{1,9})(?:=([+-]?[\d.]+(?:[eE][+-]?\d+)?))?")


@dataclass(frozen=True)
class Target:
    """An expert to tilt; `layer` None is the last MoE block, `strength` None the default."""

    layer: int | None
    expert: int
    strength: float | None


@dataclass(frozen=True)
class Tilt:
    """A logit bias for the expert in a row of a router, and in words where it came from."""

    layer: int
    block: str
    expert: int
    bias: float
    origin: str

    @property
    def verb(self) -> str:
        """`boost` or `suppress`."""
        return "boost" if self.bias > 0 else "suppress"


@dataclass(frozen=True)
class Scaling:
    """A factor on the gate weight of the expert in a row of a router."""

    layer: int
    block: str
    expert: int
    factor: float


def parse_target(expression: str) -> Target:
    """`12` (last layer), `3:12` (layer 3), either with `=0.25` (strength in logits).

    Raises:
        SettingsError: not of that form, or a strength that is no number.
    """
    layer, expert, value = _parsed(expression, "bias")
    if value == 0:
        raise SettingsError(f"{expression!r}: a bias of 0 cannot tilt anything")
    return Target(layer, expert, value)


def _parsed(expression: str, what: str) -> tuple[int | None, int, float | None]:
    """Layer, expert and the finite number after `=`."""
    match = _EXPRESSION.fullmatch(expression.strip())
    if match is None:
        raise SettingsError(
            f"{expression!r} names no expert: write E, L:E, E={what} or L:E={what}, as in 3:12=0.25"
        )
    layer, expert, number = match.groups()
    try:
        value = None if number is None else float(number)
    except ValueError:
        raise SettingsError(f"{expression!r}: {number!r} is no number") from None
    if value is not None and not math.isfinite(value):
        raise SettingsError(f"{expression!r}: a {what} of {number} cannot tilt anything")
    return None if layer is None else int(layer), int(expert), value


def tilts(profile: Profile, boost: Sequence[str], suppress: Sequence[str]) -> list[Tilt]:
    """Biases for all targets; a strength without a number is the admission gap.

    Raises:
        SettingsError: one that cannot be read.
        PlanError: no such layer or expert, one named twice, or no gap to close.
    """
    numbers, layers = numbers_of(profile), layer_statistics(profile)
    found: list[Tilt] = []
    for sign, expressions in ((+1, boost), (-1, suppress)):
        for text in expressions:
            target = parse_target(text)
            layer, row = _find(layers, target.layer, target.expert, numbers)
            found.append(_tilt(profile, layer, row, target, sign))
    _check_once([(t.layer, t.expert) for t in found], [*boost, *suppress])
    return found


def named_picks(
    profile: Profile, boost: Sequence[str], suppress: Sequence[str]
) -> tuple[tuple[Pick, float | None], ...]:
    """The experts named by hand, each with the strength that was given.

    Raises:
        SettingsError: one that cannot be read.
        PlanError: no such layer or expert, or one named twice.
    """
    numbers, layers = numbers_of(profile), layer_statistics(profile)
    found: list[tuple[Pick, float | None]] = []
    for sign, expressions in ((+1, boost), (-1, suppress)):
        for text in expressions:
            target = parse_target(text)
            layer, row = _find(layers, target.layer, target.expert, numbers)
            strength = _strength(target, layer.layer, sign)
            found.append((Pick(layer.layer, row, sign), strength))
    _check_once([(p.layer, p.expert) for p, _ in found], [*boost, *suppress])
    return tuple(found)


def tilts_of(profile: Profile, shifts: Sequence[Shift], origins: Sequence[str]) -> list[Tilt]:
    """Shifts with their blocks' names, and where they came from."""
    blocks = profile.info.model.blocks
    return [
        Tilt(s.layer, blocks[s.layer].name, s.expert, s.bias, origin)
        for s, origin in zip(shifts, origins, strict=True)
    ]


def scalings(profile: Profile, expressions: Sequence[str]) -> list[Scaling]:
    """Factors for all targets, `12=1.5` or `3:12=1.5`; 0 leaves an expert nothing to say.

    Raises:
        SettingsError: one that cannot be read, has no factor, or one that is negative or 1.
        PlanError: no such layer or expert, or one named twice.
    """
    numbers, layers = numbers_of(profile), layer_statistics(profile)
    found: list[Scaling] = []
    for text in expressions:
        index, expert, factor = _parsed(text, "factor")
        if factor is None or factor < 0 or factor == 1:
            raise SettingsError(
                f"--scale {text} must give a factor, 0 or above and not 1: as in 3:12=1.5"
            )
        layer, row = _find(layers, index, expert, numbers)
        found.append(Scaling(layer.layer, layer.block, row, factor))
    _check_once([(s.layer, s.expert) for s in found], expressions)
    return found


def _find(
    layers: list[LayerStatistics], index: int | None, expert: int, numbers: Numbers
) -> tuple[LayerStatistics, int]:
    """The layer, the last one without an index, and the row of its router that an expert has."""
    blocks = [(layer.block, layer.n_experts) for layer in layers]
    found, row = find_expert(blocks, len(layers) - 1 if index is None else index, expert, numbers)
    return layers[found], row


def _check_once(found: Sequence[tuple[int, int]], expressions: Sequence[str]) -> None:
    for place, text in zip(found, expressions, strict=True):
        if found.count(place) > 1:
            expert = _parsed(text, "number")[1]
            raise PlanError(f"expert {place[0]}:{expert} is named twice: name it once")


def _strength(target: Target, layer: int, sign: int) -> float | None:
    strength = target.strength
    if strength is not None and sign > 0 and strength < 0:
        raise PlanError(f"--boost {layer}:{target.expert}={strength:g}: use --suppress")
    return None if strength is None else abs(strength)


def _tilt(profile: Profile, layer: LayerStatistics, row: int, target: Target, sign: int) -> Tilt:
    index, expert = layer.layer, target.expert
    strength = _strength(target, index, sign)
    if strength is not None:
        return Tilt(index, layer.block, row, sign * strength, "given")
    bias = admission_gap(
        profile.info.model.blocks[index],
        profile.array("alpha_NLE")[:, index, : layer.n_experts],
        profile.array("chosen_NLK")[:, index],
        row,
        stored_selection(profile.info.model, index),
    )
    if not math.isfinite(bias) or bias * sign <= 0:
        option = "--boost" if sign > 0 else "--suppress"
        raise PlanError(
            f"{no_default_strength(index, expert, sign, bias)}: give the strength, as in {option} "
            f"{index}:{expert}=0.5"
        )
    return Tilt(index, layer.block, row, bias, "its admission gap")
