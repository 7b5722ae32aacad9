"""What `show` prints for a path, and what a report finds in the folder of a run."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel

from expertcut.edits import plan as plans
from expertcut.edits.cache_plan import CACHE_FILE, CacheFile, load_cache
from expertcut.edits.compression import COMPRESSION_FILE, CompressionFile, load_compression
from expertcut.edits.criteria import compare
from expertcut.edits.placement_results import PLACEMENT_FILE, PlacementFile, load_placement
from expertcut.edits.plan import HOLDING_FILE, PLAN_FILE, PROOF_FILE, PlanFile, load_plan
from expertcut.edits.splits import read_scored_split
from expertcut.errors import ModelError, OutputError, PlanError, SettingsError
from expertcut.evaluation import search_results as searches
from expertcut.evaluation.cross_fit import CrossFitResult, load_cross_fit
from expertcut.evaluation.dispatch_results import DISPATCH_FILE, DispatchResult, load_dispatch
from expertcut.evaluation.holding import HoldingResult, load_holding
from expertcut.evaluation.results import Results, load_results
from expertcut.evaluation.route_results import (
    ORACLE_FILE,
    ROUTE_FILE,
    OracleResult,
    RouteSweep,
    load_oracle,
    load_route_sweep,
)
from expertcut.evaluation.search_results import (
    AUDIT_FILE,
    COMPRESSION_SWEEP_FILE,
    SWEEP_FILE,
    Audit,
    CompressionSweep,
    Sweep,
)
from expertcut.files import parse_json, read_file
from expertcut.profiling.findings import Findings, find, findings_json, text_json
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import TextProfile, load_profile
from expertcut.profiling.trace import TRACE_FILE, Trace, load_trace
from expertcut.profiling.trace_findings import CACHES, SEGMENTS, TraceFindings
from expertcut.reporting import (
    compress_tables,
    dispatch_tables,
    edit_tables,
    eval_tables,
    place_tables,
    profile_tables,
    route_tables,
    text_profile_tables,
    trace_tables,
)
from expertcut.reporting.balance_tables import balance_sentences, balance_table
from expertcut.reporting.tables import Cell, Table, columns, labelled, next_lines
from expertcut.stats import MARGIN

PROFILE_FILE = "profile.json"
RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.json"
RECIPE_FILE = "recipe.yaml"
RESULTS = "results*.json"
Proof = CrossFitResult | HoldingResult
PROOFS: dict[str, Callable[[Path], Proof]] = {
    PROOF_FILE: load_cross_fit,
    HOLDING_FILE: load_holding,
}
KINDS = (
    *(PROFILE_FILE, TRACE_FILE, PLAN_FILE, *PROOFS),
    *(SWEEP_FILE, ROUTE_FILE, ORACLE_FILE, AUDIT_FILE, COMPRESSION_SWEEP_FILE),
    *(PLACEMENT_FILE, CACHE_FILE),
)
_WITH_CHUNKS = {PROFILE_FILE, TRACE_FILE, SWEEP_FILE, ROUTE_FILE, ORACLE_FILE, AUDIT_FILE}
_WITH_CHUNKS |= {COMPRESSION_SWEEP_FILE}
T = TypeVar("T")
Document = TypeVar("Document", bound=BaseModel)


@dataclass(frozen=True)
class NamedDocument(Generic[T]):
    """A file of a run, its name in the page, and its content."""

    file: Path
    name: str
    content: T


@dataclass(frozen=True)
class Run:
    """All documents under a path, sorted by name."""

    path: Path
    profiles: list[NamedDocument[Findings]]
    texts: list[NamedDocument[TextProfile]]
    plans: list[NamedDocument[PlanFile]]
    proofs: list[NamedDocument[Proof]]
    results: list[NamedDocument[Results]]
    sweeps: list[NamedDocument[Sweep]]
    routes: list[NamedDocument[RouteSweep]]
    oracles: list[NamedDocument[OracleResult]]
    sizes: list[NamedDocument[CompressionSweep]]
    audits: list[NamedDocument[Audit]]
    dispatches: list[NamedDocument[DispatchResult]]
    traces: list[NamedDocument[Trace]]
    placements: list[NamedDocument[PlacementFile]]
    caches: list[NamedDocument[CacheFile]]

    def profile_of(self, plan: PlanFile) -> NamedDocument[Findings] | None:
        """The profile that a plan was chosen on, or another of its model."""
        infos = [(found, found.content.profile.info) for found in self.profiles]
        same = [(f, i.quiz) for f, i in infos if i.model.fingerprint == plan.model.fingerprint]
        chosen = (plan.chosen_on.quiz, plan.chosen_on.split)
        same.sort(key=lambda pair: (pair[1].id, pair[1].split) != chosen)
        return same[0][0] if same else None


def gather(path: Path) -> Run:
    """Reads all documents of a folder, or one file; a checkpoint may hold a plan and a proof."""
    files = list(_files(path))
    if not files:
        raise OutputError(
            f"nothing to report on in {path}: name a folder that holds a profile, a plan, a "
            "checkpoint with one, or results.json"
        )

    def read(kind: str, load: Callable[[Path], T]) -> list[NamedDocument[T]]:
        return [NamedDocument(f, _name(f, path), load(f)) for f in files if _kind(f) == kind]

    profiles = read(PROFILE_FILE, lambda file: load_profile(file.parent))
    return Run(
        path=path,
        profiles=[
            NamedDocument(found.file, found.name, find(found.content))
            for found in profiles
            if not isinstance(found.content, TextProfile)
        ],
        texts=[
            NamedDocument(found.file, found.name, found.content)
            for found in profiles
            if isinstance(found.content, TextProfile)
        ],
        plans=read(PLAN_FILE, load_plan),
        proofs=[
            proof
            for kind in PROOFS
            for proof in read(kind, lambda file: PROOFS[file.name](file.parent))
        ],
        results=read(RESULTS, load_results),
        sweeps=read(SWEEP_FILE, searches.load_sweep),
        routes=read(ROUTE_FILE, load_route_sweep),
        oracles=read(ORACLE_FILE, load_oracle),
        sizes=read(COMPRESSION_SWEEP_FILE, searches.load_compression_sweep),
        audits=read(AUDIT_FILE, searches.load_audit),
        dispatches=read(DISPATCH_FILE, load_dispatch),
        traces=read(TRACE_FILE, lambda file: load_trace(file.parent)),
        placements=read(PLACEMENT_FILE, load_placement),
        caches=read(CACHE_FILE, load_cache),
    )


def compression_in(folder: Path, plan: PlanFile) -> CompressionFile | None:
    """The errors that a plan's options were chosen by, if they lie there; PlanError for others."""
    file = folder / COMPRESSION_FILE
    if plan.compression is None or not file.is_file():
        return None
    found = load_compression(file)
    n_units, errors = Counter(found.layers), found.block_error
    own = {name: [*(edit.options or {}).values()] for name, edit in plan.blocks.items()}
    sums = [*([errors.sum, errors.measured or errors.sum] if errors else [])]
    is_right = [*n_units] == [*own] and all(len(part) == len(own) for part in sums)
    for name, options in own.items():
        is_right &= len(options) in (1, n_units[name]) and {*options} <= {*found.options}
    if not is_right:
        raise PlanError(f"{file} is not of the {PLAN_FILE} beside it: take it away, or put it back")
    return found


def proofs_in(folder: Path) -> dict[str, Proof]:
    """The proofs of a procedure that lie in a folder, by file name."""
    return {name: load(folder) for name, load in PROOFS.items() if (folder / name).is_file()}


def notes_in(file: Path) -> dict[str, Any]:
    """A JSON object, as a profile's `run.json` or a manifest; empty if it cannot be read."""
    notes = None
    with suppress(OSError, ValueError):
        notes = parse_json(read_file(file))
    return notes if isinstance(notes, dict) else {}


def recipe_in(folder: Path) -> list[str]:
    """The lines of a run's recipe; empty if there is none."""
    with suppress(OSError, ValueError):
        return read_file(folder / RECIPE_FILE).decode("utf-8").splitlines()
    return []


def _files(path: Path) -> Iterator[Path]:
    """Every document by its file name, those of a folder before those of its subfolders."""
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise OutputError(f"{path} is not there: name the folder of a run")
    for folder, subfolders, names in os.walk(path):
        # Chunks of `eval` are no profiles of the run, nor is anything inside a profile or search.
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and not name.endswith(".chunks")
        )
        here = Path(folder)
        if not _WITH_CHUNKS.isdisjoint(names):
            subfolders.clear()
        yield from (here / n for n in KINDS if n in names)
        yield from (here / n for n in sorted(names) if Path(n).match(RESULTS))
        yield from (here / n for n in sorted(names) if n.endswith(DISPATCH_FILE))


def _kind(file: Path) -> str:
    if file.name.endswith(DISPATCH_FILE):
        return DISPATCH_FILE
    return file.name if file.name in KINDS else RESULTS


def _name(file: Path, root: Path) -> str:
    """A document's folder within the run; for results the file, as a folder may hold many."""
    is_one_of_many = _kind(file) in (RESULTS, DISPATCH_FILE)
    place = file.with_suffix("") if is_one_of_many else file.parent
    if file == root or place == root:
        return place.resolve().name
    return place.relative_to(root).as_posix()


@dataclass(frozen=True)
class Shown:
    """Tables for people, one flat table for data frames, and JSON, each made on demand."""

    tables: Callable[[], list[Table]]
    flat: Callable[[], Table]
    json: Callable[[], dict[str, Any]]
    sentences: Callable[[], list[str]] = list
    headline: Callable[[], list[str]] = list  # printed instead of the tables


def find_shown(
    path: Path,
    by_subject: bool = False,
    by_criteria: bool = False,
    margin: float = MARGIN,
    *,
    segments: Sequence[int] = (),
    caches: Sequence[float] = (),
) -> Shown:
    """The view of a profile, trace, plan, results or other document, with verdicts.

    With `by_subject`, tables of a profile's subjects follow, and the flat table has a row per
    expert and subject. With `by_criteria`, only the criteria are shown. A trace is measured in
    segments of so many tokens, and for caches of so many times the experts of a token.
    """
    if by_subject and by_criteria:
        raise SettingsError("--subjects and --criteria show different tables: give one of them")
    if (path / PROFILE_FILE).is_file() or path.name == PROFILE_FILE:
        profile = load_profile(path if path.is_dir() else path.parent)
        if isinstance(profile, TextProfile) and not by_criteria:
            return _text_profile(profile, by_subject)
        if not by_criteria:
            return _profile(find(profile), by_subject)
        ranked = compare(profile)
        return Shown(
            partial(profile_tables.criteria_tables, ranked),
            partial(profile_tables.criteria_csv, ranked),
            partial(profile_tables.criteria_json, ranked),
        )
    if by_subject or by_criteria:
        option = "--subjects" if by_subject else "--criteria"
        raise SettingsError(f"{option}: {path} is not a profile: name one or omit the option")
    if (path / TRACE_FILE).is_file() or path.name == TRACE_FILE:
        return _trace(path if path.is_dir() else path.parent, segments, caches)
    if segments or caches:
        option = "--segments" if segments else "--cache"
        raise SettingsError(f"{option}: {path} is not a trace: name one or omit the option")
    return _document(path, margin)


def _document(path: Path, margin: float) -> Shown:
    for name in _VIEWS:
        if (path / name).is_file():
            return _VIEWS[name](path, margin)
    if path.name in (PROOF_FILE, MANIFEST_FILE):
        return _VIEWS[path.name](path.parent, margin)
    if path.is_file():
        try:
            content = parse_json(read_file(path))
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise OutputError(f"{path} cannot be read as JSON: {error}") from None
        keys = content if isinstance(content, dict) else {}
        by_key = {"otherwise": DISPATCH_FILE, "models": RESULTS, "base_experts": ROUTE_FILE}
        by_key |= {"cells": SWEEP_FILE, "harms": AUDIT_FILE, "noise_gain": ORACLE_FILE}
        by_key |= {"same_questions": HOLDING_FILE}
        asked = keys.get("asked")
        if isinstance(asked, dict) and "sizes" in asked:
            by_key["cells"] = COMPRESSION_SWEEP_FILE
        by_key |= {"devices": PLACEMENT_FILE, "rates": CACHE_FILE}
        kind = next((kind for key, kind in by_key.items() if key in keys), PLAN_FILE)
        return _VIEWS[kind](path, margin)
    raise OutputError(
        f"nothing to show in {path}: no profile, plan, results, sweep, audit or run, and no "
        "checkpoint with a plan: name a part of a run's folder, or make its page with report"
    )


def _profile(findings: Findings, by_subject: bool) -> Shown:
    def tables() -> list[Table]:
        return [
            *profile_tables.profile_tables(findings.profile, findings.layers),
            *profile_tables.constants_tables(findings.profile),
            profile_tables.suspects_table(findings),
            profile_tables.margins_table(findings),
            *profile_tables.perturbation_tables(findings),
            *(profile_tables.subject_tables(findings) if by_subject else []),
            *edit_tables.rows_tables(findings.profile),
        ]

    flat = profile_tables.subjects_csv if by_subject else profile_tables.experts_csv
    headline, as_json = partial(profile_tables.headline, findings), partial(findings_json, findings)
    return Shown(tables, partial(flat, findings), as_json, headline=headline)


def _text_profile(profile: TextProfile, by_subject: bool) -> Shown:
    if by_subject:
        raise SettingsError(
            f"--subjects: {profile.path} is a profile of texts, which have no subjects: leave the "
            "option out, --tables shows each source"
        )
    return Shown(
        partial(text_profile_tables.text_tables, profile),
        partial(text_profile_tables.text_experts_csv, profile),
        partial(text_json, profile),
        headline=partial(text_profile_tables.headline, profile),
    )


def _trace(path: Path, segments: Sequence[int], caches: Sequence[float]) -> Shown:
    trace = load_trace(path)
    trace.check_whole()
    findings = TraceFindings(trace, segments or SEGMENTS, caches or CACHES)
    facts = trace_tables.trace_facts(trace)
    return Shown(
        partial(trace_tables.finding_tables, findings),
        partial(trace_tables.layers_csv, findings),
        partial(trace_tables.trace_json, findings),
        lambda: [
            *(labelled(*fact) for fact in facts),
            *(labelled("", text) for text in trace_tables.finding_sentences(findings)),
        ],
    )


def _shown(
    found: Document, tables: list[Table], flat: Callable[[Document], Table], *said: str
) -> Shown:
    as_json = partial(found.model_dump, mode="json")
    return Shown(lambda: tables, partial(flat, found), as_json, lambda: [*said])


def _plan(path: Path, margin: float) -> Shown:
    plan, folder = load_plan(path), path if path.is_dir() else path.parent
    tables = [eval_tables.plan_table(plan)]
    tables += [edit_tables.curve_table(plan.tuning)] if plan.tuning else []
    facts: list[tuple[str, str]] = []
    if plan.compression and (found := compression_in(folder, plan)):
        tables = [*compress_tables.tables(found, plan.blocks), *tables]
        was_loaded = bool(plan.proof.held_out or plan.proof.text)
        how = (plan.compression, found, plan.blocks)
        facts = compress_tables.facts(*how, was_loaded=was_loaded)
    proofs = proofs_in(path)
    tables += [route_tables.proof_table(proof) for proof in proofs.values()]
    said = [proof.sentence for proof in proofs.values()]
    said += [labelled(*fact) for fact in facts]
    tables += [balance_table(plan.balance)] if plan.balance else []
    said += balance_sentences(plan.balance) if plan.balance else []
    shown = _shown(plan, tables, eval_tables.plan_csv)
    return replace(shown, sentences=lambda: said + _checkpoint_lines(plan, folder, margin))


def _checkpoint_lines(plan: PlanFile, folder: Path, margin: float) -> list[str]:
    """What the command that wrote a checkpoint said of it; nothing of a plan without weights."""
    if not any(folder.glob("*.safetensors")):
        return []
    from expertcut.checkpoints.build import Built  # with torch
    from expertcut.checkpoints.size import stored_size
    from expertcut.models.load import Source

    after = before = None
    with suppress(ModelError, OSError):  # the base may lie elsewhere
        after = stored_size(Source(str(folder), folder))
        name, base = compared_with(plan, folder)
        before = stored_size(Source(name, base)) if base else None
    is_scored = plan.proof.held_out or plan.proof.text
    proof, scored_on = plan.proof if is_scored else None, read_scored_split(plan, folder)
    built = Built(folder, plan, [], proof, scored_on=scored_on)
    return [] if after is None else edit_tables.outcome_lines(built, before, after, margin)


def compared_with(plan: PlanFile, folder: Path) -> tuple[str, Path | None]:
    """Name and folder of what a checkpoint is compared with: if healed, the base of all edits."""
    if not (plan.proof.held_out_used and plan.proof.answered):
        return plan.model.label, plans.base_folder(plan.model, folder)
    with suppress(PlanError):  # a step in between holds something else
        *_, (first, base) = plans.lineage(folder)
        if base or first.model.revision:
            return first.model.label, base
    return "the unedited base", None


def rows_of(edit: plans.BlockEdit, block: BlockInfo) -> plans.BlockEdit | None:
    """The edit by rows of a profiled router, None where these are not the ones that it is for."""
    rows = edit.rows or tuple(range(block.experts))
    named = {*edit.keep, *edit.tilted}
    if len(rows) != block.experts or not named <= set(rows):
        return None
    at = {number: row for row, number in enumerate(rows)}
    return plans.BlockEdit(
        keep=tuple(sorted(at[number] for number in edit.keep)),
        bias={at[number]: value for number, value in edit.bias.items()},
        scale={at[number]: value for number, value in edit.scale.items()},
    )


def edits_of(plan: PlanFile, findings: Findings) -> dict[str, plans.BlockEdit] | None:
    """A plan by rows of a profile; None where the profile is of another cut of the model."""
    blocks = findings.profile.info.model.blocks
    by_row = {b.name: rows_of(plan.blocks[b.name], b) for b in blocks if b.name in plan.blocks}
    edits = {name: edit for name, edit in by_row.items() if edit is not None}
    return edits if len(edits) == len(blocks) else None


def _results(path: Path, margin: float) -> Shown:
    results = load_results(path)
    said = [labelled(*fact) for fact in eval_tables.evaluation_facts(results, margin)]
    tables = eval_tables.evaluation_tables(results, margin)
    return _shown(results, tables, eval_tables.evaluation_csv, *said)


def _run(folder: Path, margin: float) -> Shown:
    """The stages of a recipe and what they wrote, and the results of its evaluation."""
    manifest = notes_in(folder / MANIFEST_FILE)
    if not isinstance(records := manifest.get("stages"), dict):
        raise OutputError(f"{folder / MANIFEST_FILE} is not a manifest: name a part of the run")
    names = dict.fromkeys([*stage_names(folder), *records])
    rows = [[name, *_stage(folder, records.get(name))] for name in names]
    table = Table(f"Run {folder}", columns("stage; state; took, s::,.1f; wrote"), rows)
    evaluated = [_results(file, margin) for file in folder.glob("results.json")]
    again = next_lines(["run", str(folder / RECIPE_FILE), "--out", str(folder)])
    said = [sentence for one in evaluated for sentence in one.sentences()]
    said += again if any(row[1] != "done" for row in rows) else []
    tables = [table, *(own for one in evaluated for own in one.tables())]
    return Shown(lambda: tables, lambda: table, lambda: manifest, lambda: said)


def stage_names(folder: Path) -> list[str]:
    """The stages of a run's recipe, in order; none of a recipe that cannot be read."""
    with suppress(yaml.YAMLError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        recipe = yaml.safe_load("\n".join(recipe_in(folder)))
        named = [variant["name"].strip() for variant in recipe.get("variants") or ()]
        published = ["publish " + section["variant"] for section in recipe.get("publish") or ()]
        order = ["show", *named, "eval", "dispatch", "trace", "place", "report"]
        return ["profile", *(name for name in order if name in (*recipe, *named)), *published]
    return []


def _stage(folder: Path, record: Any) -> list[Cell]:
    """State and seconds of a stage, and what it wrote, from its record in the manifest."""
    if not isinstance(record, dict) or not record.get("output"):
        return ["not finished" if record else "not run yet", None, None]
    files, elapsed_s = record.get("files"), record.get("elapsed_s")
    names = [*files] if isinstance(files, dict) else []
    gone = [f"{name} is gone" for name in names if not os.path.exists(folder / name)]  # noqa: PTH110
    parts = Counter("/".join(n.split("/")[: 1 + n.startswith("variants/")]) for n in names)
    wrote = ", ".join(f"{part} ({n} files)" if n > 1 else part for part, n in parts.items())
    state = gone[0] if gone else "done"
    return [state, elapsed_s if isinstance(elapsed_s, float) else None, wrote]


def _sweep(path: Path, margin: float) -> Shown:
    sweep = searches.load_sweep(path)
    said, table = eval_tables.sweep_sentences(sweep, margin), eval_tables.sweep_table(sweep, margin)
    return _shown(sweep, [table], eval_tables.sweep_csv, *said)


def _route(path: Path, margin: float) -> Shown:
    sweep = load_route_sweep(path)
    said = [labelled(*fact) for fact in route_tables.sweep_facts(sweep, margin)]
    return _shown(sweep, [route_tables.sweep_table(sweep, margin)], route_tables.sweep_csv, *said)


def _sizes(path: Path, margin: float) -> Shown:
    sweep = searches.load_compression_sweep(path)
    said = [labelled(*fact) for fact in compress_tables.sweep_facts(sweep)]
    tables = [compress_tables.sweep_table(sweep, margin)]
    return _shown(sweep, tables, compress_tables.sweep_csv, *said)


def _oracle(path: Path, _margin: float) -> Shown:
    oracle = load_oracle(path)
    said = [labelled(*fact) for fact in route_tables.oracle_facts(oracle)]
    return _shown(oracle, [route_tables.oracle_table(oracle)], route_tables.oracle_csv, *said)


def _holding(path: Path, _margin: float) -> Shown:
    proof = load_holding(path if path.is_dir() else path.parent)
    tables = [route_tables.holding_table(proof)]
    return _shown(proof, tables, route_tables.holding_csv, proof.sentence)


def _audit(path: Path, margin: float) -> Shown:
    audit = searches.load_audit(path)
    said = [labelled(*fact) for fact in eval_tables.audit_facts(audit, margin)]
    tables = eval_tables.audit_tables(audit, margin)
    return _shown(audit, tables, eval_tables.audit_csv, *said)


def _dispatch(path: Path, _margin: float) -> Shown:
    found = load_dispatch(path)
    said = [labelled(*fact) for fact in dispatch_tables.dispatch_facts(found)]
    return _shown(
        found, dispatch_tables.dispatch_tables(found), dispatch_tables.dispatch_csv, *said
    )


def _placement(path: Path, _margin: float) -> Shown:
    found = load_placement(path)
    said = [labelled(*fact) for fact in place_tables.placement_facts(found)]
    tables = [place_tables.placement_table(found)]
    return _shown(found, tables, place_tables.placement_csv, *said)


def _cache(path: Path, _margin: float) -> Shown:
    found = load_cache(path)
    said = [labelled(*fact) for fact in place_tables.cache_facts(found)]
    return _shown(found, [place_tables.cache_table(found)], place_tables.cache_csv, *said)


_VIEWS: dict[str, Callable[[Path, float], Shown]] = {
    PLAN_FILE: _plan,
    PROOF_FILE: lambda path, _: _shown(
        proof := load_cross_fit(path), [edit_tables.cross_fit_table(proof)], edit_tables.proof_csv
    ),
    SWEEP_FILE: _sweep,
    ROUTE_FILE: _route,
    ORACLE_FILE: _oracle,
    COMPRESSION_SWEEP_FILE: _sizes,
    HOLDING_FILE: _holding,
    AUDIT_FILE: _audit,
    PLACEMENT_FILE: _placement,
    CACHE_FILE: _cache,
    RESULTS: _results,
    MANIFEST_FILE: _run,
    DISPATCH_FILE: _dispatch,  # last: a run's folder may hold one too
}
