"""How a choice becomes a checkpoint or a plan, and what named experts are told of."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from expertcut.cli.options import Format
from expertcut.cli.output import print_tables, quiet

if TYPE_CHECKING:
    from expertcut.checkpoints.build import BuildOptions, Built
    from expertcut.edits.plan import Draft
    from expertcut.edits.reweight import Scaling, Tilt
    from expertcut.profiling.storage import Profile


@dataclass(frozen=True)
class Named:
    """The experts that --boost, --suppress and --scale name."""

    tilts: "list[Tilt]"
    scalings: "list[Scaling]"

    @classmethod
    def of(
        cls,
        profile: "Profile",
        boost: list[str] | None,
        suppress: list[str] | None,
        scale: list[str] | None,
    ) -> Self:
        """As they stand on the command line."""
        from expertcut.edits.reweight import scalings, tilts

        return cls(tilts(profile, boost or [], suppress or []), scalings(profile, scale or []))

    def on(self, draft: "Draft", apply_at: Any) -> "Draft":
        """A draft that tilts them too; the same one where none is named."""
        from expertcut.edits.reweight import with_tilts

        if not (self.tilts or self.scalings or apply_at):
            return draft
        return with_tilts(draft, self.tilts, self.scalings, apply_at)

    def say(self, draft: "Draft", built: "Built | None") -> None:
        """What was done to each, in words."""
        from expertcut.reporting.edit_tables import scale_sentences, tilt_sentences

        for sentence in (
            *tilt_sentences(self.tilts, built, draft.numbers),
            *scale_sentences(self.scalings, built, draft.numbers),
        ):
            print(sentence)


class Place:
    """Where a draft becomes a checkpoint or a plan; refused at once if something is there."""

    def __init__(
        self, profile: "Profile", slug: str, out: Path | None, is_plan: bool, is_forced: bool
    ) -> None:
        from expertcut.checkpoints.build import default_out, found_source, inputs_of
        from expertcut.checkpoints.output_dir import check_writable

        self.profile, self.is_plan, self.is_forced = profile, is_plan, is_forced
        self.folder = out or default_out(profile, slug, is_plan=is_plan)
        check_writable(self.folder, is_forced=is_forced, inputs=inputs_of(profile))
        if not is_plan:  # what it is made from is looked at before anything is said of it
            quiet()
            found_source(profile)

    def keep(self, options: "BuildOptions") -> None:
        """Only what would lie beside a plan, if there is anything."""
        from expertcut.checkpoints.build import write_beside

        if options.beside:
            write_beside(self.profile, self.folder, options)
            print(f"no checkpoint is made; the proof is written to {self.folder}")
        else:
            print("nothing is written")

    def make(self, draft: "Draft", options: "BuildOptions") -> "Built | None":
        """Builds and says what came of it; of a plan alone there is nothing to say."""
        from expertcut.checkpoints.build import build, write_plan
        from expertcut.reporting.edit_tables import adapter_sentences, proof_sentences, proof_tables

        if self.is_plan:
            write_plan(self.profile, draft, self.folder, options)
            print(f"written to {self.folder}")
            return None
        quiet()
        built = build(self.profile, draft, self.folder, options)
        print_tables(proof_tables(built), Format.table)
        for sentence in (*proof_sentences(built), *adapter_sentences(built)):
            print(sentence)
        print(f"written to {self.folder}")
        return built
