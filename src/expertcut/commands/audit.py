"""`expertcut audit`: ablate experts one at a time and compare the damage with each criterion."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import SILENT, UI, ModelFirstSettings, output_option
from expertcut.commands.profile import ParallelSettings, profiled_first
from expertcut.edits import edit_settings
from expertcut.reporting.tables import save_table
from expertcut.settings import FilePath

if TYPE_CHECKING:
    from expertcut.evaluation.search_results import Audit


class AuditSettings(ModelFirstSettings, edit_settings.AuditSettings, ParallelSettings):
    """Ablate single experts and compare the damage with criteria."""

    examples: ClassVar = (
        "expertcut audit --sample 64",
        "expertcut audit --by reap,frequency --questions 512 --layout exact",
        "expertcut audit --sample 128 --seed 1 --out audits/mine",
    )

    out: FilePath | None = output_option(
        None, "Output folder; an audit started there is resumed.  [default: in audits/]"
    )


def run(settings: AuditSettings, ui: UI = SILENT) -> "Audit":
    """Ablates the experts, and writes the audit, its table and its figure."""
    edit_settings.read_fractions(settings.fractions, "--fractions")  # refused before all imports
    settings.check_one_group("audit")
    from expertcut.edits.criteria import read_criteria

    read_criteria(settings.by)  # refused before the profile is read
    settings = settings.updated(**profiled_first(settings, ui))
    profile = settings.choosing_profile(ui)
    from expertcut.evaluation.ablation import AuditRun  # torch, not to refuse options
    from expertcut.reporting import eval_tables as tables

    ui.quiet()
    auditing = AuditRun(profile, settings, settings.load_as())
    folder: Path = settings.out or Path("audits") / profile.path.resolve().name
    ui.watch(
        lambda see: auditing.run(folder, see),
        "auditing",
        auditing.n_questions,
        folder,
        auditing.unit,
    )
    audit = auditing.audit
    if not ui.is_first:
        return audit
    settings.say_profile(profile, ui)
    save_table(folder / "audit.csv", tables.audit_csv(audit), tables.audit_figure(audit))
    shown = tables.audit_tables(audit, settings.margin / 100)
    settings.say(ui, shown if settings.wide else shown[:1])
    ui.end(tables.audit_facts(audit, settings.margin / 100), folder, ["show", str(folder)])
    return audit
