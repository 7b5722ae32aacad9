"""`expertcut audit`: ablate experts one at a time and compare the damage with each criterion."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expertcut.commands import OUTPUT, UI, ProfiledSettings, SilentUI, choosing_profile
from expertcut.edits import edit_settings
from expertcut.settings import FilePath, option

if TYPE_CHECKING:
    from expertcut.evaluation.search_results import Audit


class AuditSettings(ProfiledSettings, edit_settings.AuditSettings):
    """Ablate experts one at a time and score how well each criterion predicts the damage."""

    examples: ClassVar = (
        "expertcut audit --sample 64",
        "expertcut audit --by reap,frequency --questions 512 --layout exact",
    )

    out: FilePath | None = option(
        None, "Output folder; an audit started there is resumed.  [default: in audits/]",
        panel=OUTPUT,
    )  # fmt: skip


def run(settings: AuditSettings, ui: UI | None = None) -> "Audit":
    """Ablates the experts, and writes the audit, its table and its figure."""
    ui = ui or SilentUI()
    from expertcut.evaluation.search_results import read_criteria, read_fractions

    read_criteria(settings.by)  # refused before the profile is read
    read_fractions(settings.fractions, "--fractions")
    from expertcut.evaluation.ablation import Auditing

    profile = choosing_profile(settings, ui)
    ui.quiet()
    auditing = Auditing(profile, settings, settings.load_as())
    folder: Path = settings.out or Path("audits") / profile.path.resolve().name
    ui.watch(lambda see: auditing.run(folder, see), "auditing", auditing.n_questions, folder)
    _save(auditing.found, folder, ui)
    return auditing.found


def _save(found: "Audit", folder: Path, ui: UI) -> None:
    from expertcut.files import write_atomically
    from expertcut.reporting.eval_tables import (
        audit_csv,
        audit_figure,
        audit_sentences,
        audit_tables,
    )
    from expertcut.reporting.tables import as_csv

    files = {"audit.csv": as_csv(audit_csv(found)).encode(), **audit_figure(found)}
    for name, content in files.items():
        write_atomically(folder / name, content)
    ui.say(audit_tables(found), [*audit_sentences(found), f"written to {folder}"])
