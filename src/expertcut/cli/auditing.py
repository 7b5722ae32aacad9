"""The command `audit`: experts removed one at a time, and which criterion foretold the harm."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from expertcut.cli.options import (
    Device,
    Dtype,
    Format,
    Layout,
    LayoutOption,
    PositionsOption,
    ProfileDir,
    Threads,
    TruncateMore,
    TrustRemoteCode,
    option,
    value,
)
from expertcut.cli.output import print_tables, quiet
from expertcut.cli.reading import read_choosing_profile
from expertcut.cli.running import watched
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.evaluation.search_results import Audit


def audit(
    profile: ProfileDir = None,
    sample: Annotated[int, option("Experts to remove, one at a time.", min=1)] = 64,
    by: Annotated[str, option("Criteria to judge, separated by commas, or all.")] = "all",
    fractions: Annotated[
        str, option("Shares that stay at the budgets of the regrets.")
    ] = "0.75,0.5,0.25",
    questions: Annotated[int, option("Held-out questions at most.", min=2)] = 256,
    positions: PositionsOption = None,
    layout: LayoutOption = Layout.stock,
    seed: Annotated[int, option("Seed of the sample, of --by random and of intervals.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    truncate: TruncateMore = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, option("Folder; an audit begun there is resumed.")] = None,
) -> None:
    """Remove experts one by one, and say who foretold what that does."""
    from expertcut.edits.criteria import CRITERIA
    from expertcut.edits.ranking import Way
    from expertcut.evaluation.ablation import Auditing, AuditOptions
    from expertcut.evaluation.search_results import ALL, read_criteria, read_fractions
    from expertcut.models.load import LoadOptions

    if seed < 0:
        raise SettingsError(f"--seed {seed} must be at least 0")
    names = read_criteria(by, CRITERIA)
    shares = read_fractions(fractions, "--fractions")
    found = read_choosing_profile(profile, threads, truncate)
    way = Way(names[0], value(positions), layout.value, seed=seed)
    load_as = LoadOptions(dtype, device, trust_remote_code)
    quiet()
    options = AuditOptions(names, shares, way, load_as, sample, questions, by == ALL)
    auditing = Auditing(found, options)
    folder = out or Path("audits") / found.path.resolve().name
    watched(lambda see: auditing.run(folder, see), "auditing", auditing.n_questions, folder)
    _save(auditing.found, folder)


def _save(found: "Audit", folder: Path) -> None:
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
    print_tables(audit_tables(found), Format.table)
    for sentence in audit_sentences(found):
        print(sentence)
    print(f"written to {folder}")
