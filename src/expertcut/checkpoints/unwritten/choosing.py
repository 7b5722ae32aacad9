"""A cut as it was asked for: with the model where the criterion needs it, up to a size if given."""

from collections.abc import Sequence
from dataclasses import dataclass

from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.checkpoints.unwritten.sizing import largest, size_of_cuts
from expertcut.edits.budget import Keep
from expertcut.edits.criteria import CRITERIA, NEEDS_MODEL
from expertcut.edits.prune import Pruning, choose
from expertcut.edits.ranking import Way, expressions_of, rank
from expertcut.errors import SettingsError
from expertcut.models.load import LoadOptions
from expertcut.profiling.storage import Profile

_UNKNOWN = "Super experts are not known without all-token statistics: none is protected."


@dataclass(frozen=True)
class Chosen:
    """Who stays; `notes` say what else there is to know of the choice."""

    pruning: Pruning
    notes: tuple[str, ...] = ()


def choose_cut(profile: Profile, keep: Keep, way: Way, load_as: LoadOptions) -> Chosen:
    """The experts that stay.

    Raises:
        ContractError: the layout does not know the model's family.
        PlanError: a number that does not fit the model, or a size that no cut has.
        ProfileError: the model changed, or the profile does not hold what the criterion needs.
        SettingsError: an option that does not go with the others.
    """
    keep.check(way.layout)
    needs_model = way.by in NEEDS_MODEL
    source = profiled_source(profile) if keep.max_bytes or needs_model else None
    engine = None
    if source is not None and needs_model:
        engine = engine_as_profiled(profile, source, load_as)
    if source is None or keep.max_bytes is None:
        return Chosen(choose(profile, keep, way, engine))
    size_of = size_of_cuts(source, way.layout, profile.info.model.blocks[0].experts)
    found = largest(rank(profile, way, engine), keep, size_of)
    size_bytes = size_of(found.draft)
    note = f"the weights will have {size_bytes:,} bytes, of at most {keep.max_bytes:,}"
    return Chosen(found, (note,))


def protected(
    profile: Profile, asked: Sequence[str], *, is_active: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What stays whatever its score, super experts unasked where they are known; and notes.

    Raises:
        SettingsError: what is asked contradicts itself.
    """
    is_known = profile.info.settings.stats == "all"
    notes = () if is_known or is_active or asked else (_UNKNOWN,)
    return expressions_of(asked, is_super=is_known and not is_active), notes


def check_criterion(by: str) -> None:
    """That there is one of that name.

    Raises:
        SettingsError: there is none.
    """
    if by not in CRITERIA:
        known = ", ".join(CRITERIA)
        raise SettingsError(f"--by {by} is no criterion: take one of {known}")
