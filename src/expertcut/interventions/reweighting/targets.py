"""Tilting the gate: expert expressions such as `3:12=0.25`, and the bias that admits an expert."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from expertcut.errors import PlanError, SettingsError
from expertcut.interventions.plan import Draft, Edit, Layout
from expertcut.interventions.reweighting.choosing import Pick
from expertcut.interventions.reweighting.tuning import Shift
from expertcut.profiling.store import BlockInfo, Profile

_EXPRESSION = re.compile(r"(?:(\d{1,9}):)?(\d{1,9})(?:=([+-]?[\d.]+(?:[eE][+-]?\d+)?))?")


@dataclass(frozen=True)
class Target:
    """An expert to tilt; `layer` None is the last MoE block, `strength` None the default."""

    layer: int | None
    expert: int
    strength: float | None


@dataclass(frozen=True)
class Tilt:
    """A logit bias for one expert, and in words where it came from."""

    layer: int
    block: str
    expert: int
    bias: float
    origin: str

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


def named_picks(
    profile: Profile, boost: Sequence[str], suppress: Sequence[str]
) -> tuple[tuple[Pick, float | None], ...]:
    """The experts named by hand, with the strengths that were given.

    Raises:
        SettingsError: one that cannot be read.
        PlanError: no such layer or expert, or one named twice.
    """
    signed = [(text, +1) for text in boost] + [(text, -1) for text in suppress]
    blocks = profile.info.model.blocks
    found = [_named(blocks, parse_target(text), sign) for text, sign in signed]
    seen: set[tuple[int, int]] = set()
    for pick, _ in found:
        if (pick.layer, pick.expert) in seen:
            raise PlanError(f"expert {pick.layer}:{pick.expert} is named twice: name it once")
        seen.add((pick.layer, pick.expert))
    return tuple(found)


def _named(blocks: Sequence[BlockInfo], target: Target, sign: int) -> tuple[Pick, float | None]:
    index = len(blocks) - 1 if target.layer is None else target.layer
    if index >= len(blocks):
        raise PlanError(
            f"no layer {index}: the model has MoE layers 0 to {len(blocks) - 1} "
            "(layers are counted from 0)"
        )
    expert, n_experts = target.expert, blocks[index].experts
    if expert >= n_experts:
        raise PlanError(f"no expert {expert} in layer {index}: it has experts 0 to {n_experts - 1}")
    strength = target.strength
    if strength is not None and sign > 0 and strength < 0:
        raise PlanError(f"--boost {index}:{expert}={strength:g}: use --suppress")
    return Pick(index, expert, sign), None if strength is None else abs(strength)


def tilts_of(profile: Profile, shifts: Sequence[Shift], origins: Sequence[str]) -> list[Tilt]:
    """Shifts with their blocks' names and where they came from."""
    blocks = profile.info.model.blocks
    return [
        Tilt(s.layer, blocks[s.layer].name, s.expert, s.bias, origin)
        for s, origin in zip(shifts, origins, strict=True)
    ]


def reweight_draft(
    profile: Profile, found: Sequence[Tilt], layout: Layout = "stock", criterion: str = "by hand"
) -> Draft:
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
    return Draft(slug, f"reweight {' '.join(words)}", criterion, "answer", edits, layout)
