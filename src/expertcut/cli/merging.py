"""The command `merge`."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from expertcut.cli.changing import Place
from expertcut.cli.options import (
    Device,
    Dtype,
    Force,
    Format,
    HeldOut,
    NoVerify,
    OutDir,
    PlanOnly,
    ProfileDir,
    Threads,
    TruncateMore,
    TrustRemoteCode,
    option,
)
from expertcut.cli.output import print_tables, quiet
from expertcut.cli.reading import read_choosing_profile
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.checkpoints.build import Merged
    from expertcut.profiling.storage import Profile


class Method(StrEnum):
    """The names in `edits.merge_groups.METHODS`; a test holds them together."""

    m_smoe = "m_smoe"
    hc_smoe = "hc_smoe"


class RouterRow(StrEnum):
    """What a group's router row is made of."""

    fitted = "fitted"
    mean = "mean"
    dominant = "dominant"


def merge(
    profile: ProfileDir = None,
    keep: Annotated[int | None, option("Experts per layer afterwards.")] = None,
    by: Annotated[
        Method, option("What makes a group: like router logits, or like mean outputs.")
    ] = Method.m_smoe,
    router: Annotated[
        RouterRow,
        option("A group's router row: fitted to its members' mass, their mean, or one's own."),
    ] = RouterRow.fitted,
    align: Annotated[
        bool | None,
        option("Put neurons in the same order first.  [default: in m_smoe]", "--align/--no-align"),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    truncate: TruncateMore = None,
    trust_remote_code: TrustRemoteCode = False,
    held_out: HeldOut = None,
    out: OutDir = None,
    force: Force = False,
    no_verify: NoVerify = False,
    plan_only: PlanOnly = False,
) -> None:
    """Make one expert of several, and say what that did."""
    from expertcut.checkpoints.build import BuildOptions
    from expertcut.checkpoints.build import merge as make
    from expertcut.edits.merge_groups import Merge
    from expertcut.models.load import LoadOptions

    if keep is None:
        raise SettingsError("say how many experts each layer has afterwards: --keep N")
    found = read_choosing_profile(profile, threads, truncate, held_out)
    asked = Merge(keep, by.value, router.value, align)
    folder = Place(found, asked.slug, out, plan_only, force).folder
    quiet()
    options = BuildOptions(LoadOptions(dtype, device, trust_remote_code), not no_verify, force)
    _say(found, make(found, asked, folder, options, is_plan=plan_only), is_plan=plan_only)
    print(f"written to {folder}")


def _say(profile: "Profile", merged: "Merged", *, is_plan: bool) -> None:
    from expertcut.reporting.edit_tables import (
        groups_table,
        merging_sentences,
        proof_sentences,
        proof_tables,
    )

    print_tables([groups_table(profile, merged)], Format.table)
    if is_plan:
        return
    print_tables(proof_tables(merged.built), Format.table)
    for sentence in (*proof_sentences(merged.built), *merging_sentences(profile, merged)):
        print(sentence)
