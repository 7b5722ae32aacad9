"""What a merge was asked for, and the draft that its groups make."""

from collections.abc import Mapping
from dataclasses import dataclass

from expertcut.interventions.lineage import numbers_of
from expertcut.interventions.merging.routing import RouterRow
from expertcut.interventions.plan import Draft, Edit
from expertcut.profiling.storage import Profile

ALIGNED = {"m_smoe": True, "hc_smoe": False}  # as the papers have them


@dataclass(frozen=True)
class Merge:
    """How many experts stay in each layer, what groups them, and how a group becomes one."""

    n_keep: int
    by: str
    router: RouterRow = "fitted"
    aligns: bool | None = None

    @property
    def is_aligned(self) -> bool:
        """Whether neurons are aligned: as asked, else as the method's paper has it."""
        return ALIGNED[self.by] if self.aligns is None else self.aligns

    @property
    def slug(self) -> str:
        """Names the outputs, with what makes them differ from the usual."""
        mark = "" if self.router == "fitted" else f"-{self.router}"
        if self.is_aligned != ALIGNED[self.by]:
            mark += "-aligned" if self.is_aligned else "-unaligned"
        return f"merge-{self.n_keep}-{self.by}{mark}"

    @property
    def action(self) -> str:
        """As it stands in the plan."""
        text = f"merge --keep {self.n_keep} --by {self.by}"
        if self.router != "fitted":
            text += f" --router {self.router}"
        if self.aligns is not None:
            text += " --align" if self.aligns else " --no-align"
        return text

    def draft(self, profile: Profile, edits: Mapping[str, Edit]) -> Draft:
        """The groups as a draft of layout stock, frequencies being over all tokens."""
        return Draft(
            slug=self.slug,
            action=self.action,
            criterion=self.by,
            positions="all",
            edits=edits,
            is_cut=True,
            is_calibrated=True,
            numbers=numbers_of(profile),
        )
