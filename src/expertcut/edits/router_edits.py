"""Reweighting: expert expressions such as `3:12=0.25`, settings, and their plan."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from expertcut.edits.edit_settings import ReweightSettings
from expertcut.edits.layouts import LAYOUTS, Layout
from expertcut.edits.plan import (
    BlockEdit,
    EditPlan,
    ExpertIds,
    Positions,
    expert_ids,
    find_expert,
    ids_text,
)
from expertcut.edits.reweight_select import (
    MIN_APPEARANCES,
    SCORES,
    TOKEN_SCORES,
    Chooser,
    Contrast,
    QuestionOutcomes,
    SelectedExpert,
    admission_gap,
    no_default_strength,
    read_contrast,
    stored_selection,
    token_scores,
)
from expertcut.edits.reweight_tune import Procedure, RouterEdit, Settled
from expertcut.edits.splits import held_out_quiz, profiled_quiz
from expertcut.errors import PlanError, SettingsError
from expertcut.profiling.statistics import LayerStatistics
from expertcut.profiling.storage import Profile, ProfilePart

_EXPRESSION = re.compile(r"(?:(\d{1,9}):)?(\d{1,9})(?:=([+-]?[\d.]+(?:[eE][+-]?\d+)?))?")
_LAYERS = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?")


@dataclass(frozen=True)
class Target:
    """An expert to reweight; `layer` None is the last MoE block, `strength` None the default."""

    layer: int | None
    expert: int
    strength: float | None


def parse_target(expression: str) -> Target:
    """`12` (last layer), `3:12` (layer 3), either with `=0.25` (strength in logits).

    Raises:
        SettingsError: another form, or a strength that is not a number.
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


def tilts(profile: Profile, boost: Sequence[str], suppress: Sequence[str]) -> list[RouterEdit]:
    """Biases for all targets; the default strength is the admission gap.

    Raises:
        SettingsError: an invalid expression.
        PlanError: no such layer or expert, one named twice, or no gap to close.
    """
    return [_tilt(profile, *target) for target in _targets(profile, boost, suppress)]


def named_picks(
    profile: Profile, boost: Sequence[str], suppress: Sequence[str]
) -> tuple[tuple[SelectedExpert, float | None], ...]:
    """The experts named by hand, each with its given strength.

    Raises:
        SettingsError: an invalid expression.
        PlanError: no such layer or expert, or one named twice.
    """
    return tuple(
        (SelectedExpert(layer.layer, row, sign), _strength(target, layer.layer, sign))
        for layer, row, target, sign in _targets(profile, boost, suppress)
    )


def _targets(
    profile: Profile, boost: Sequence[str], suppress: Sequence[str]
) -> list[tuple[LayerStatistics, int, Target, int]]:
    """Layer, router row, target and sign of each expression."""
    numbers, layers = expert_ids(profile), profile.layers
    found = []
    for sign, expressions in ((+1, boost), (-1, suppress)):
        for target in map(parse_target, expressions):
            layer, row = _find(layers, target.layer, target.expert, numbers)
            found.append((layer, row, target, sign))
    _check_once([(layer.layer, row) for layer, row, *_ in found], [*boost, *suppress])
    return found


def tilts_of(
    profile: Profile, shifts: Sequence[RouterEdit], origins: Sequence[str]
) -> list[RouterEdit]:
    """Biases with the names of their blocks, and their origins."""
    blocks = profile.info.model.blocks
    return [
        s._replace(block=blocks[s.layer].name, origin=origin)
        for s, origin in zip(shifts, origins, strict=True)
    ]


def scalings(profile: Profile, expressions: Sequence[str]) -> list[RouterEdit]:
    """Factors for all targets, `12=1.5` or `3:12=1.5`; 0 silences an expert.

    Raises:
        SettingsError: an invalid expression, or a factor that is missing, negative or 1.
        PlanError: no such layer or expert, or one named twice.
    """
    numbers, layers = expert_ids(profile), profile.layers
    found: list[RouterEdit] = []
    for text in expressions:
        index, expert, factor = _parsed(text, "factor")
        if factor is None or factor < 0 or factor == 1:
            raise SettingsError(
                f"--scale {text} must give a factor, 0 or above and not 1: as in 3:12=1.5"
            )
        layer, row = _find(layers, index, expert, numbers)
        found.append(RouterEdit(layer.layer, row, scale=factor, block=layer.block))
    _check_once([(s.layer, s.expert) for s in found], expressions)
    return found


def _find(
    layers: list[LayerStatistics], index: int | None, expert: int, numbers: ExpertIds
) -> tuple[LayerStatistics, int]:
    """The layer (default: the last) and the router row of an expert."""
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


def _tilt(
    profile: Profile, layer: LayerStatistics, row: int, target: Target, sign: int
) -> RouterEdit:
    index, expert = layer.layer, target.expert
    strength = _strength(target, index, sign)
    if strength is not None:
        return RouterEdit(index, row, sign * strength, block=layer.block, origin="given")
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
    return RouterEdit(index, row, bias, block=layer.block, origin="its admission gap")


def reweight_draft(
    profile: Profile,
    found: Sequence[RouterEdit],
    layout: Layout = "stock",
    scaled: Sequence[RouterEdit] = (),
    apply_at: Positions | None = None,
) -> EditPlan:
    """A plan that keeps every expert, with biases and factors.

    Raises:
        SettingsError: no expert is named, or the layout cannot hold `apply_at`.
    """
    if not found and not scaled:
        raise SettingsError(
            "say which experts to tilt: --boost E, --suppress E or --scale E=factor, E as in 3:12"
        )
    blocks = profile.info.model.blocks
    edits = {block.name: BlockEdit(keep=tuple(range(block.experts))) for block in blocks}
    draft = EditPlan(
        "", "reweight", "by hand", "answer", edits, layout, numbers=expert_ids(profile)
    )
    return with_tilts(draft, found, scaled, apply_at)


def with_tilts(
    draft: EditPlan,
    found: Sequence[RouterEdit],
    scaled: Sequence[RouterEdit] = (),
    apply_at: Positions | None = None,
) -> EditPlan:
    """A plan with biases and factors on experts that it keeps.

    Raises:
        PlanError: an expert that the plan removes.
        SettingsError: the layout cannot hold `apply_at`.
    """
    check_place(draft.layout, apply_at, is_biased=bool(found))
    _check_kept(draft, [*found, *scaled])
    edits = {
        name: edit.model_copy(
            update={
                "bias": {t.expert: t.bias for t in found if t.block == name},
                "scale": {s.expert: s.scale for s in scaled if s.block == name},
            }
        )
        for name, edit in draft.edits.items()
    }
    words = [f"--{t.verb} {_name(draft, t)}={abs(t.bias):.6g}" for t in found]
    words += [f"--scale {_name(draft, s)}={s.scale:.6g}" for s in scaled]
    named = [f"{t.verb}-{_name(draft, t, '.')}" for t in found]
    named += [f"scale-{_name(draft, s, '.')}" for s in scaled]
    slug = "-".join([*([draft.slug] if draft.slug else []), *named])[:100]
    if apply_at == "answer":
        words, slug = [*words, "--apply-at answer"], f"{slug}-answer"
    mark = LAYOUTS[draft.layout].mark
    slug += f"-{mark}" if mark and not draft.is_cut else ""
    action = " ".join([draft.action, *words])
    return replace(draft, slug=slug, action=action, edits=edits, apply_at=apply_at or "all")


def check_place(layout: Layout, apply_at: Positions | None, *, is_biased: bool) -> None:
    """Checks that a bias can act at these positions.

    Raises:
        SettingsError: no bias, or a layout whose biases act everywhere.
    """
    if apply_at is not None and not is_biased:
        raise SettingsError(
            f"--apply-at {apply_at} says where a bias acts, and there is none: a factor acts at "
            "every token, leave it out"
        )
    if apply_at == "answer" and not LAYOUTS[layout].fits_biases:
        raise SettingsError(
            "--apply-at answer is of layout stock: gate.bias of layout exact acts at every token, "
            "so take --layout stock or leave it out"
        )


def _check_kept(draft: EditPlan, named: Sequence[RouterEdit]) -> None:
    for tilt in named:
        keep = draft.edits[tilt.block].keep
        if tilt.expert not in keep:
            kept = keep if draft.numbers is None else draft.numbers.kept(tilt.block, keep)
            raise PlanError(
                f"expert {_name(draft, tilt)} is removed by this cut, which keeps "
                f"{ids_text(kept)} there: tilt one that stays"
            )


def _name(draft: EditPlan, tilt: RouterEdit, between: str = ":") -> str:
    numbers = draft.numbers
    expert = tilt.expert if numbers is None else numbers.number(tilt.block, tilt.expert)
    return f"{tilt.layer}{between}{expert}"


def procedure_of(profile: Profile, settings: ReweightSettings) -> Procedure:
    """The way of choosing experts and strengths that the settings say.

    Raises:
        PlanError: no such layer or expert, or one named twice.
        SettingsError: nothing to tilt, or an option that does not go with the others.
    """
    check_settings(settings)
    picks = named_picks(profile, settings.boost or [], settings.suppress or [])
    if settings.tune and any(strength for _, strength in picks):
        raise SettingsError("--tune searches for the strength: leave the number out")
    return Procedure(picks, _chooser(profile, settings), settings.strength, settings.tune)


def check_settings(settings: ReweightSettings) -> None:
    """That the options go together, and that the score is one.

    Raises:
        SettingsError: which does not.
    """
    settings.check()
    names = (*SCORES, *TOKEN_SCORES)
    if settings.by is not None and settings.by not in names:
        raise SettingsError(f"--by {settings.by} is no score: take one of {', '.join(names)}")


def _chooser(profile: Profile, settings: ReweightSettings) -> Chooser:
    least, by = settings.min_appearances, settings.by or "difference"
    constant = expert_ids(profile).constant
    return Chooser(
        boost_best=settings.boost_best,
        suppress_worst=settings.suppress_worst,
        by=by,
        min_appearances=MIN_APPEARANCES if least is None else least,
        layers=read_layers(settings.layers),
        contrast=_contrast(profile, settings),
        fixed=token_scores(profile, by) if by in TOKEN_SCORES else None,
        constant=tuple(
            (layer, row)
            for layer, block in enumerate(profile.info.model.blocks)
            for row in sorted(constant.get(block.name, ()))
        ),
    )


def _contrast(profile: Profile, settings: ReweightSettings) -> Contrast | None:
    """The two sides, without what is held out of the profile."""
    if settings.contrast is None:
        return None
    first, second = settings.contrast
    found = read_contrast((first, second), profile.info.model.fingerprint)
    if not isinstance(profile, ProfilePart):
        return found
    return found.less({q.overlap_hash for q in held_out_quiz(profile)})


def procedure_name(profile: Profile, settings: ReweightSettings, procedure: Procedure) -> str:
    """The procedure in words, which also name the outputs."""
    numbers, blocks = expert_ids(profile), profile.info.model.blocks
    words = {+1: "boost", -1: "suppress"}
    named = [
        f"{words[p.sign]} {p.layer}:{numbers.number(blocks[p.layer].name, p.expert)}"
        for p, _ in procedure.named
    ]
    chosen = (("boost-best", settings.boost_best), ("suppress-worst", settings.suppress_worst))
    named += [f"{name} {n}" for name, n in chosen if n]
    criterion = settings.criterion
    by = () if criterion in ("by hand", "difference") else (f"by {criterion}",)
    return " ".join((*named, *by, *(("tuned",) if procedure.is_tuned else ())))


def read_layers(text: str | None) -> tuple[int, ...]:
    """`0,3,8-15` as numbers.

    Raises:
        SettingsError: another form.
    """
    found: list[int] = []
    for part in (text or "").split(",") if text is not None else ():
        first, _, last = part.strip().partition("-")
        if not _LAYERS.fullmatch(part.strip()):
            raise SettingsError(f"--layers: {part[:80]!r} is no layer: write them as 0,3,8-15")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


def settled_on_profile(profile: Profile, procedure: Procedure) -> Settled:
    """Experts and strengths from the profile alone.

    Raises:
        PlanError: too few candidates, or one without a strength.
    """
    records = QuestionOutcomes.of(profile, profiled_quiz(profile))
    procedure.check(records)
    return Settled(procedure.untuned(records, procedure.pick(records)))
