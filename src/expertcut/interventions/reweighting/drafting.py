"""Biases and factors become a draft: of their own, or on top of a cut."""

from collections.abc import Sequence
from dataclasses import replace

from expertcut.errors import PlanError, SettingsError
from expertcut.interventions.lineage import ids_text, numbers_of
from expertcut.interventions.plan import Draft, Edit, Layout, Positions
from expertcut.interventions.reweighting.targets import Scaling, Tilt
from expertcut.profiling.storage import Profile


def reweight_draft(
    profile: Profile,
    found: Sequence[Tilt],
    layout: Layout = "stock",
    scaled: Sequence[Scaling] = (),
    apply_at: Positions | None = None,
) -> Draft:
    """Edits that keep every expert and carry the biases and factors.

    Raises:
        SettingsError: nothing to tilt, or `apply_at` where it cannot be carried.
    """
    if not found and not scaled:
        raise SettingsError(
            "say which experts to tilt: --boost E, --suppress E or --scale E=factor, E as in 3:12"
        )
    blocks = profile.info.model.blocks
    edits = {block.name: Edit(keep=tuple(range(block.experts))) for block in blocks}
    draft = Draft("", "reweight", "by hand", "answer", edits, layout, numbers=numbers_of(profile))
    return with_tilts(draft, found, scaled, apply_at)


def with_tilts(
    draft: Draft,
    found: Sequence[Tilt],
    scaled: Sequence[Scaling] = (),
    apply_at: Positions | None = None,
) -> Draft:
    """A draft that also carries biases and factors, on experts that it keeps.

    Raises:
        PlanError: an expert that the draft removes.
        SettingsError: `apply_at` where it cannot be carried.
    """
    check_place(draft.layout, apply_at, is_biased=bool(found))
    _check_kept(draft, [*found, *scaled])
    edits = {
        name: edit.model_copy(
            update={
                "bias": {t.expert: t.bias for t in found if t.block == name},
                "scale": {s.expert: s.factor for s in scaled if s.block == name},
            }
        )
        for name, edit in draft.edits.items()
    }
    words = [f"--{t.verb} {_name(draft, t)}={abs(t.bias):.6g}" for t in found]
    words += [f"--scale {_name(draft, s)}={s.factor:.6g}" for s in scaled]
    named = [f"{t.verb}-{_name(draft, t, '.')}" for t in found]
    named += [f"scale-{_name(draft, s, '.')}" for s in scaled]
    slug = "-".join([*([draft.slug] if draft.slug else []), *named])[:100]
    if apply_at == "answer":
        words, slug = [*words, "--apply-at answer"], f"{slug}-answer"
    slug += f"-{draft.layout}" if draft.layout != "stock" and not draft.is_cut else ""
    action = " ".join([draft.action, *words])
    return replace(draft, slug=slug, action=action, edits=edits, apply_at=apply_at or "all")


def check_place(layout: Layout, apply_at: Positions | None, *, is_biased: bool) -> None:
    """That a bias can act where it is asked to.

    Raises:
        SettingsError: there is none, or the layout carries it everywhere.
    """
    if apply_at is not None and not is_biased:
        raise SettingsError(
            f"--apply-at {apply_at} says where a bias acts, and there is none: a factor acts at "
            "every token, leave it out"
        )
    if apply_at == "answer" and layout == "exact":
        raise SettingsError(
            "--apply-at answer is of layout stock: gate.bias of layout exact acts at every token, "
            "so take --layout stock or leave it out"
        )


def _check_kept(draft: Draft, named: Sequence[Tilt | Scaling]) -> None:
    for tilt in named:
        keep = draft.edits[tilt.block].keep
        if tilt.expert not in keep:
            kept = keep if draft.numbers is None else draft.numbers.kept(tilt.block, keep)
            raise PlanError(
                f"expert {_name(draft, tilt)} is removed by this cut, which keeps "
                f"{ids_text(kept)} there: tilt one that stays"
            )


def _name(draft: Draft, tilt: Tilt | Scaling, between: str = ":") -> str:
    numbers = draft.numbers
    expert = tilt.expert if numbers is None else numbers.number(tilt.block, tilt.expert)
    return f"{tilt.layer}{between}{expert}"
