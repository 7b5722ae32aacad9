"""`expertcut show`: print what another command wrote."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from expertcut.commands import SILENT, UI, JudgedSettings, argument
from expertcut.edits.edit_settings import CRITERIA_HERE, Criterion
from expertcut.edits.layouts import Positions
from expertcut.errors import OutputError, SettingsError
from expertcut.reporting.tables import as_csv, as_markdown
from expertcut.settings import Count, FilePath, Text, Texts, flag_of, numbers_in, option, refuse

if TYPE_CHECKING:
    from expertcut.reporting.views import Shown

_MAX_SIZE = 1 << 16


class ShowSettings(JudgedSettings):
    """Print what another command wrote."""

    examples: ClassVar = (
        "expertcut show profiles/mine",
        "expertcut show results.json --format csv",
        "expertcut show profiles/code profiles/chat --overlap --sparsity 0.5",
    )

    path: FilePath = argument(
        ..., "Profile, trace, plan, checkpoint, results, sweep, audit, dispatch or run folder."
    )
    others: Texts = argument([], "Further profiles of the same model, with --overlap.")
    format: Literal["table", "json", "csv", "md"] = option(
        "table", "Output format.", in_recipe=False
    )
    tables: bool = option(
        False, "Print the paper's tables of a profile too; json, csv and md ignore this.",
        in_recipe=False,
    )  # fmt: skip
    subjects: bool = option(False, "Show each subject of a profile too; json always does.")
    criteria: bool = option(
        False, "Show how each criterion ranks a profile's experts, and how far they agree.",
        in_recipe=False,
    )  # fmt: skip
    overlap: bool = option(
        False, "Show how far profiles of one model agree on the experts to keep.",
        in_recipe=False,
    )  # fmt: skip
    by: Criterion = option("reap", f"Criterion of --overlap: {CRITERIA_HERE}.", in_recipe=False)
    positions: Positions | None = option(
        None, "Tokens that the criterion counts, as in prune.", flags=("--tokens",),
        in_recipe=False,
    )  # fmt: skip
    keep: Count | None = option(
        None, "Experts per layer in the cuts of --overlap.", metavar="N", in_recipe=False
    )
    sparsity: float = option(
        0.5, "Share of the experts that they remove, without --keep.", metavar="F", ge=0, lt=1,
        in_recipe=False,
    )  # fmt: skip
    segments: Text | None = option(
        None, "Tokens of a segment, of a trace.  [default: 4,16,64,256]", metavar="N,N,…",
        in_recipe=False,
    )  # fmt: skip
    cache: Text | None = option(
        None, "Experts that a cache holds, as multiples of those of a token, of a trace.  "
        "[default: 1,2,4]", metavar="X,X,…", in_recipe=False,
    )  # fmt: skip

    @model_validator(mode="after")
    def _several_profiles_overlap(self) -> Self:
        if self.overlap and not self.others:
            refuse("--overlap compares profiles of one model: name two or more")
        if self.others and not self.overlap:
            refuse("several paths are shown with --overlap alone: add it, or name one path")
        if not self.overlap:
            for name in ("by", "positions", "keep", "sparsity"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    refuse(f"{flag_of(type(self), name)} is an option of --overlap: add it")
        return self


def run(settings: ShowSettings, ui: UI = SILENT) -> "Shown":
    """Prints the headline and tables of the file or folder."""
    if not settings.path.exists():  # refused before anything heavy is imported
        raise OutputError(f"nothing to show in {settings.path}: it does not exist")
    others = dict.fromkeys((".html", ".htm"), "a page of report: open it in a browser")
    others[".jsonl"] = "a file of questions (JSON lines): show prints profiles, plans and results"
    if kind := others.get(settings.path.suffix.lower()):
        raise OutputError(f"{settings.path} is {kind}")
    from expertcut.reporting.views import find_shown

    margin = settings.margin / 100
    segments = [int(m) for m in _sizes(settings.segments, "--segments", "a whole number of tokens")]
    caches = _sizes(settings.cache, "--cache", "a number")
    if settings.overlap:
        shown = _overlap(settings)
    else:
        shown = find_shown(
            settings.path, settings.subjects, settings.criteria, margin,
            segments=segments, caches=caches,
        )  # fmt: skip
    if settings.format == "table":
        ui.say([], headline := shown.headline())
        is_whole = settings.tables or settings.subjects or not headline
        tables = [t.narrow(unless=settings.wide) for t in (shown.tables() if is_whole else ())]
        ui.say([table for table in tables if table.columns], shown.sentences())
    else:
        ui.text(text_of(shown, settings.format))
    return shown


def _sizes(text: str | None, option: str, what: str) -> list[float]:
    """Segment lengths or cache sizes, smallest first; none without a text."""
    sizes: set[float] = set()
    for part, size in numbers_in(text or "") if text is not None else ():
        if not 1 <= size <= _MAX_SIZE or ("whole" in what and size % 1):
            raise SettingsError(f"{option}: {part[:40]!r} must be {what} from 1 on")
        sizes.add(size)
    return sorted(sizes)


def _overlap(settings: ShowSettings) -> "Shown":
    from expertcut.edits.edit_settings import CutSettings
    from expertcut.edits.selection import overlap, wanted_count
    from expertcut.profiling.blend import Blend
    from expertcut.profiling.storage import load_profile
    from expertcut.reporting.overlap_tables import shown_overlap

    profiles = [load_profile(path) for path in (settings.path, *map(Path, settings.others))]
    blend = Blend(profiles, [1.0] * len(profiles), "sum")
    # Layout exact, in which any number of experts may stay in each routing group.
    cut = CutSettings(by=settings.by, positions=settings.positions, layout="exact")
    fraction = {"keep": settings.keep} if settings.keep else {"sparsity": settings.sparsity}
    cut = cut.updated(**fraction)
    n_keep = wanted_count(cut, blend.info.model.blocks)
    return shown_overlap(overlap(blend, cut), settings.by, cut.at, n_keep)


def text_of(shown: "Shown", form: str) -> str:
    """The tables as `json`, `csv` or `md`."""
    if form == "json":
        return json.dumps(shown.json(), indent=1, allow_nan=False) + "\n"
    return as_csv(shown.flat()) if form == "csv" else "\n".join(map(as_markdown, shown.tables()))
