"""The page's sections of edits, evaluations, searches and provenance, and their parts."""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from expertcut.checkpoints import export
from expertcut.edits.plan import PlanFile, Point, base_folder
from expertcut.edits.selection import RemovedTraffic, removed_traffic
from expertcut.edits.splits import read_scored_split
from expertcut.evaluation.dispatch_results import DispatchResult
from expertcut.evaluation.results import QuizModelResult, QuizResults, Results
from expertcut.evaluation.search_results import Audit, Sweep, SweepCell, SweptModel
from expertcut.profiling.findings import Findings
from expertcut.profiling.schema import AnyProfileInfo, QuizInfo, TextInfo
from expertcut.profiling.trace import RoutesTraceInfo
from expertcut.reporting import (
    compress_tables,
    dispatch_tables,
    edit_tables,
    eval_tables,
    text_search_tables,
    text_tables,
    views,
)
from expertcut.reporting import route_tables as routing
from expertcut.reporting.balance_tables import balance_parts
from expertcut.reporting.edit_tables import change_text, percent, verdict_text
from expertcut.reporting.eval_tables import size_text
from expertcut.reporting.plots import Curves, Heat, Series, series_of
from expertcut.reporting.profile_tables import headline_facts
from expertcut.reporting.tables import Cell, Column, Table, columns
from expertcut.reporting.text_profile_tables import profile_facts, texts_line
from expertcut.reporting.views import NamedDocument, Run
from expertcut.stats import MARGIN, Comparison, verdict, wilson_interval

_HEADLINES = 3  # of one evaluation
Rows = list[tuple[str, str | None]]
T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """A table of few columns, which is never wider than a phone."""

    table: Table


@dataclass(frozen=True)
class Facts:
    """Names and their values, one per line; None is left out."""

    rows: Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class Lines:
    """The lines of a file."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Parts that are shown when their title is opened, and on paper unless they are lines."""

    title: str
    parts: "Sequence[Part]"


@dataclass(frozen=True)
class Explorer:
    """Linked maps of all experts, with `data` for the page's script and a table of all experts."""

    key: str
    maps: tuple[Heat, ...]
    data: dict[str, Any]
    table: Table


@dataclass(frozen=True)
class Pair:
    """Two texts side by side by the lines that are equal, and the lines from where they differ."""

    title: str
    above: Sequence[str]  # lines of what both go on from
    sides: Sequence[tuple[str, Sequence[str], Sequence[str]]]  # name, equal, different


# A str is a paragraph.
Part = str | Summary | Facts | Lines | Table | Heat | Curves | Folded | Explorer | Pair


@dataclass(frozen=True)
class Section:
    """A heading and its parts; `key` is its anchor in the page."""

    key: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Headline:
    """A finding on each model with its figures, on which questions, and when."""

    findings: Sequence[tuple[str, str]]
    context: str = ""
    table: Table | None = None


def headlines(run: Run) -> Iterator[Headline]:
    """One for each evaluation; without any one for each checkpoint, or else each profile."""
    for document in run.results:
        results = document.content
        if not isinstance(results, QuizResults):
            yield parts_headline(results)
            continue
        (_, context), *_ = _quiz(results, results.quiz)
        chunks = document.file.with_suffix(".chunks").glob(f"*/{views.RUN_FILE}")
        on = max((_finished(views.notes_in(file)) for file in chunks), default="")[:10]
        yield results_headline(results, f"{context}{f'; measured on {on}' if on else ''}")
    checkpoints = [*filter(None, map(checkpoint_headline, () if run.results else run.plans))]
    yield from checkpoints
    for profile in () if run.results or checkpoints else run.profiles:
        facts = headline_facts(profile.content)
        n_answer, _, others = facts["experts"].partition(", ")
        right = (f"{facts['accuracy']} right", facts["questions"])
        yield Headline([right, (f"Experts: {n_answer}", others)])
    for text in () if run.results or checkpoints else run.texts:
        (_, what), *scores = profile_facts(text.content)
        yield Headline([(score.capitalize(), what) for _, score in scores] or [(what, "")])


def results_headline(results: QuizResults, context: str = "") -> Headline:
    """The size and the verdict of the first models compared, or the accuracy of the only one."""
    base, names = results.models[0], eval_tables.model_names(results)
    findings, n = [], base.questions
    for c in results.comparisons[:_HEADLINES]:
        size = size_text(results.models[c.other].bytes, base.bytes)
        figures = f"{names[c.other]} against {names[0]}: {change_text(c)}"
        shares = {names[i]: results.models[i].accuracy for i in (0, c.other)}
        text = f"{size}, {_verdict_text(c, n)}{_asked_of(results.models[c.other])}"
        text += edit_tables.guessing_text(shares, n, results.chance)
        findings.append((text, figures))
    text = f"{size_text(base.bytes)}, {percent(base.accuracy)} right{_asked_of(base)}"
    text += edit_tables.guess_clause(base.accuracy, n, results.chance)
    return Headline(findings or [(text, names[0])], context)


def parts_headline(results: Results) -> Headline:
    """The first findings of an evaluation without a quiz; texts come first."""
    return Headline(eval_tables.part_findings(results)[:_HEADLINES])


def _asked_of(model: QuizModelResult) -> str:
    used = model.chosen_on.overlap if model.chosen_on else 0
    return _asked(model.questions, used, bool(model.healed_from))


def _asked(n: int, used: int | None, is_healed: bool) -> str:
    how = "had a part in it" if is_healed else "chose the experts"
    return f", on {n:,} questions{f', {used:,} of which {how}' if used else ''}"


def checkpoint_headline(document: NamedDocument[PlanFile]) -> Headline | None:
    """The same of a checkpoint by its held-out check, with a table; None of a plan alone."""
    plan, folder = document.content, document.file.parent
    if not (size := _weight_bytes(folder)):
        return None
    name, base_at = views.compared_with(plan, folder)
    base_size, edited_size = map(_weight_bytes, (base_at, base_folder(plan.model, folder)))
    if (folder / "adapter_config.json").is_file():  # of `heal --adapter`
        size += edited_size
    scored_on = read_scored_split(plan, folder)
    n = scored_on.questions
    base: list[Cell] = [name, size_text(base_size)]
    own: list[Cell] = [document.name, size_text(size)]
    words, figures = "not evaluated yet", f"{document.name} against {name}"
    if changes := plan.proof.text:
        finding = f"{size_text(size, base_size)}, {text_tables.held_out_finding(changes)}"
        return Headline([(finding, figures)], scored_on.title, text_tables.held_out_table(changes))
    asked = _asked(n, scored_on.used, bool(plan.proof.held_out_used))
    if answered := plan.proof.answered:
        c = answered.change
        words, figures = _verdict_text(c, n) + asked, f"{figures}: {change_text(c)}"
        shares = {name: answered.base, document.name: answered.base + c.delta}
        words += edit_tables.guessing_text(shares, n, plan.proof.chance)
        base.append(answered.base)
        own += [answered.base + c.delta, change_text(c, ""), verdict(c.gained, c.lost, n, MARGIN)]
    elif plan.proof.outcomes:  # of healed checkpoints, and of those of earlier versions
        own.append(accuracy := plan.proof.outcomes[-1].accuracy)
        words = f"{percent(accuracy)} right{asked}"
        words += edit_tables.guess_clause(accuracy, n, plan.proof.chance)
    heads = columns(f"model; size; accuracy::.2%; {edit_tables.CHANGE}; verdict")
    rows = [base, own]
    if plan.proof.held_out_used and answered:  # healed
        before = [form.accuracy for form in plan.proof.outcomes[1:2]]
        rows.insert(1, [plan.model.label, size_text(edited_size), *before])
    rows = [[*row, *[None] * (len(heads) - len(row))] for row in rows]
    finding = f"{size_text(size, base_size)}, {words}"
    title = scored_on.title if own[2:] else "Evaluate it with expertcut eval"
    return Headline([(finding, figures)], title, Table(title, heads, rows))


def _weight_bytes(folder: Path | None) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0


def _verdict_text(change: Comparison, n: int) -> str:
    return verdict_text(change, n, MARGIN).partition(";")[0]


def figures_of(parts: Sequence[Part]) -> Iterator[Heat | Curves]:
    """Every figure, also in explorers and folded parts."""
    for part in parts:
        if isinstance(part, Heat | Curves):
            yield part
        elif isinstance(part, Explorer):
            yield from part.maps
        elif isinstance(part, Folded):
            yield from figures_of(part.parts)


def key_of(name: str, used: Collection[str]) -> str:
    """An unused name of plain letters for files and anchors."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "run"
    keys = [plain, *(f"{plain}-{n}" for n in range(2, len(used) + 3))]
    return next(key for key in keys if key not in used)


def accuracies(name: str, scored: Sequence[QuizModelResult | SweepCell | Point | None]) -> Series:
    """Accuracy with its interval, one value each."""
    ends = [(None, None) if each is None else each.ci95 for each in scored]
    return series_of(name, [None if each is None else each.accuracy for each in scored], ends)


def one_each(
    title: str,
    documents: Iterable[NamedDocument[T]],
    prefix: str,
    parts: Callable[[NamedDocument[T], str], list[Part]],
) -> list[Section]:
    """One for each document, under a key of its own."""
    sections: list[Section] = []
    for document in documents:
        key = key_of(f"{prefix}{document.name}", [section.key for section in sections])
        sections.append(Section(key, f"{title}: {document.name}", parts(document, key)))
    return sections


def change_sections(run: Run) -> list[Section]:
    """One for each plan, and for each proof without one; first of all what went with cuts."""
    planned = {plan.file.parent for plan in run.plans}
    alone = [proof for proof in run.proofs if proof.file.parent not in planned]
    plans = one_each("What was changed", run.plans, "plan-", partial(_plan_parts, run))
    return plans + one_each("Proof", alone, "proof-", lambda proof, _: _proof_parts(proof.content))


def _proof_parts(proof: views.Proof) -> list[Part]:
    return [proof.sentence, routing.proof_table(proof)]


def _plan_parts(run: Run, document: NamedDocument[PlanFile], key: str) -> list[Part]:
    plan, profile = document.content, run.profile_of(document.content)
    parts: list[Part] = [_in_words(plan, profile), *balance_parts(plan.balance)]
    found = None if run.results else checkpoint_headline(document)
    parts += [Summary(found.table)] if found and found.table else []
    if profile and (edits := views.edits_of(plan, profile.content)) is not None:
        traffic = removed_traffic(profile.content.profile, edits)
        if any(block.n_removed for block in traffic):
            parts.append(edit_tables.touched_table(traffic))
            if all(block.mass is not None for block in traffic):
                parts.append(_traffic(traffic, key))
    if compression := views.compression_in(document.file.parent, plan):
        parts += compress_tables.tables(compression, plan.blocks)
    if plan.tuning:
        tries = edit_tables.curve_table(plan.tuning)
        parts += [_curve(plan.tuning, key), Folded("Every try", [tries])]
    if plan.proof.held_out:
        title = read_scored_split(plan, document.file.parent).title
        parts.append(edit_tables.shifts_table(f"{title}: answers moved", plan.proof.held_out))
    for proof in run.proofs:
        if proof.file.parent == document.file.parent:
            parts += _proof_parts(proof.content)
    return [*parts, Folded("Every block of the plan", [eval_tables.plan_table(plan)])]


def _in_words(plan: PlanFile, profile: NamedDocument[Findings] | None) -> str:
    blocks = profile.content.profile.info.model.blocks if profile else []
    is_first = not any(edit.rows for edit in plan.blocks.values())  # else of an edited model
    n_experts = blocks[0].experts if blocks and is_first else None
    described = [s for edit in export.edits_of(plan) for s in edit.describe(n_experts)]
    first = f"{plan.action}: layout {plan.layout}."
    return " ".join([first, *described, f"{eval_tables.made_on(plan)}."])


def _traffic(traffic: Sequence[RemovedTraffic], key: str) -> Curves:
    title = "Gate weight that went through the removed experts"
    note = "Share of all gate weight of the profiled prompts, every token counted."
    layers = tuple(map(str, range(len(traffic))))
    series = Series("share", tuple(block.mass for block in traffic))
    column = Column("share of gate weight", ".1%")
    return Curves(f"{key}-traffic", title, note, "layer", layers, (series,), column, zero=0.0)


def _curve(tuning: Sequence[Point], key: str) -> Curves:
    """Strength against accuracy, a series for each number of experts."""
    base, tried = tuning[0], tuning[1:]
    strengths = sorted({point.strength for point in tried})
    series = []
    for n_experts in sorted({point.experts for point in tried}):
        at = {point.strength: point for point in tried if point.experts == n_experts}
        points = [at.get(strength) for strength in strengths]
        series.append(accuracies(f"{n_experts} expert{'s' if n_experts > 1 else ''}", points))
    series.append(Series("unedited", (base.accuracy,) * len(strengths), is_reference=True))
    title, note = "The search for a strength", edit_tables.curve_table(tuning).note
    names = tuple(f"{strength:.4g}" for strength in strengths)
    across, column = "strength (logits)", Column("accuracy", ".1%")
    return Curves(f"{key}-tuning", title, note, across, names, tuple(series), column)


def outcome_sections(run: Run) -> list[Section]:
    """One for each evaluation."""
    sections = one_each("Results", run.results, "", lambda f, key: _results_parts(f.content, key))
    return [replace(s, title="Results") for s in sections] if len(sections) == 1 else sections


def dispatch_sections(run: Run) -> list[Section]:
    """One for each dispatch: what choosing gains, and which model answers what."""

    def parts(document: NamedDocument[DispatchResult], _key: str) -> list[Part]:
        facts = dispatch_tables.dispatch_facts(document.content)
        return [*(text for _, text in facts), *dispatch_tables.dispatch_tables(document.content)]

    return one_each("Dispatch", run.dispatches, "dispatch-", parts)


def _change(base: QuizModelResult, model: QuizModelResult, subject: str) -> float | None:
    """Points of accuracy in a subject above the base's; None where it was not scored."""
    scored = model.subjects.get(subject)
    return None if scored is None else 100 * (scored.accuracy - base.subjects[subject].accuracy)


def _results_parts(results: Results, key: str) -> list[Part]:
    """The quiz with its figures, and the tables and sentences of the other parts."""
    is_quiz = isinstance(results, QuizResults)
    parts = _quiz_parts(results, key) if isinstance(results, QuizResults) else []
    for table in eval_tables.evaluation_tables(results)[is_quiz:]:
        parts += [
            Summary(table.narrow(unless=False)),
            Folded(f"All figures: {table.title}", [table]),
        ]
    names = eval_tables.model_names(results)
    said = [text for _, text in text_tables.judged_facts(results, names)]
    said += text_tables.checked_sentences(results.text)
    return [*parts, *(f"{text}." for text in said)]


def _quiz_parts(results: QuizResults, key: str) -> list[Part]:
    table, models = eval_tables.results_table(results), results.models
    names, series = eval_tables.model_names(results), [accuracies("accuracy", models)]
    if (chance := results.chance) is not None and len(models) > 1:  # a line from row to row
        level = (chance,) * len(models)
        series.append(Series(f"guessing {100 * chance:.3g} %", level, is_reference=True))
    note = (
        "Bars are 95 % intervals (Wilson), the line is the base. The interval of a difference, in "
        "the table, is narrower: the questions are the same."
    )
    figure = Curves(
        f"{key}-accuracy", "Accuracy of every variant", note, "model", tuple(names), tuple(series),
        Column("accuracy", ".1%"), is_flat=True, zero=models[0].accuracy,
    )  # fmt: skip
    return [
        Summary(table.narrow(unless=False)),
        *eval_tables.verdict_sentences(results),
        *eval_tables.result_sentences(results),
        figure,
        *([_differences(results, key)] if len(results.models) > 1 else []),
        Folded("All figures of the evaluation", [table]),
        Folded("Accuracy of every subject", [subjects_table(results)]),
    ]


def _differences(results: QuizResults, key: str) -> Curves:
    base, subjects = results.models[0], tuple(results.models[0].subjects)
    others = list(zip(eval_tables.model_names(results), results.models, strict=True))[1:]
    changes = ((name, (_change(base, model, s) for s in subjects)) for name, model in others)
    series = tuple(Series(name, tuple(values)) for name, values in changes)
    title = "Difference to the base, subject by subject"
    note = "On the same questions. Single subjects are not tested: with so few questions each, "
    note += "chance alone moves them."
    return Curves(
        f"{key}-subjects", title, note, "subject", subjects, series,
        Column("Δ accuracy, points", "+.1f"), is_flat=True, zero=0.0,
    )  # fmt: skip


def subjects_table(results: QuizResults) -> Table:
    """Accuracy of every subject and model, with intervals and changes."""
    base, names = results.models[0], eval_tables.model_names(results)
    rows: list[list[Cell]] = []
    for subject, of_base in base.subjects.items():
        row: list[Cell] = [subject, of_base.questions]
        for model in results.models:
            if (scored := model.subjects.get(subject)) is None:
                row += [None, None]
                continue
            ends = wilson_interval(scored.accuracy, scored.questions)
            row += [scored.accuracy, edit_tables.interval_text(ends, places=1)]
        rows.append([*row, *(_change(base, model, subject) for model in results.models[1:])])
    heads = [*columns("subject; questions::,d")]
    for name in names:
        heads += [Column(name, ".1%"), Column("95 % interval")]
    heads += [Column(f"Δ {name}, points", "+.1f") for name in names[1:]]
    return Table("Subjects", tuple(heads), rows, "Intervals are Wilson's, of each model alone.")


def search_sections(run: Run) -> list[Section]:
    """One for each sweep, of cuts or of routing rules, and each oracle and audit."""
    sweeps = one_each("Sweep", run.sweeps, "sweep-", lambda f, key: _sweep(f.content, key))
    sweeps += _figures(
        "Routing rules", run.routes, "route-", routing.sweep_table, routing.sweep_facts
    )
    sweeps += _figures("Oracle", run.oracles, "oracle-", routing.oracle_table, routing.oracle_facts)
    sizes = (compress_tables.sweep_table, compress_tables.sweep_facts)
    sweeps += _figures("Sizes", run.sizes, "sizes-", *sizes)
    return sweeps + one_each("Audit", run.audits, "audit-", lambda f, key: _audit(f.content, key))


def _figures(
    title: str, documents: Sequence[NamedDocument[T]], prefix: str,
    table_of: Callable[[T], Table], facts_of: Callable[[T], list[tuple[str, str]]],
) -> list[Section]:  # fmt: skip
    def parts(document: NamedDocument[T], _key: str) -> list[Part]:
        table, facts = table_of(document.content), facts_of(document.content)
        return [Summary(table.narrow(unless=False)), Facts(facts), Folded("All figures", [table])]

    return one_each(title, documents, prefix, parts)


def _sweep(sweep: Sweep, key: str) -> list[Part]:
    table, sentences = eval_tables.sweep_table(sweep), eval_tables.sweep_sentences(sweep)
    parts: list[Part] = [Summary(table.narrow(unless=False)), *sentences]
    parts.append(Folded("All figures of the sweep", [table]))
    curves = text_search_tables.sweep_curves if sweep.of_texts else _curves
    return [*parts, curves(sweep, key)] if sweep.cells else parts


def _curves(sweep: Sweep, key: str) -> Curves:
    fractions = sorted(sweep.asked.fractions, reverse=True)
    cells = {(c.by, c.fraction): c for c in sweep.of_quiz}
    series = [accuracies(by, [cells.get((by, f)) for f in fractions]) for by in sweep.asked.by]
    if isinstance(sweep.base, SweptModel):
        level = (sweep.base.accuracy,) * len(fractions)
        series.append(Series("unedited", level, is_reference=True))
    title = "Accuracy against the share of experts that stays"
    note = "Bars are 95 % intervals (Wilson); the questions are the same for every cut."
    shares, column = tuple(f"{fraction:g}" for fraction in fractions), Column("accuracy", ".1%")
    across = "share that stays"
    return Curves(f"{key}-accuracy", title, note, across, shares, tuple(series), column)


def _audit(audit: Audit, key: str) -> list[Part]:
    tables, order = eval_tables.audit_tables(audit), eval_tables.ranked(audit)
    if not order:
        return [*tables]
    names = tuple(found.by for found in order)
    by_criterion = partial(Curves, across="criterion", categories=names, is_flat=True, zero=0.0)
    ends = [found.within.ci95 or (None, None) for found in order]
    rhos = series_of("ρ within layers", [found.within.rho for found in order], ends)
    correlations = by_criterion(
        key=f"{key}-correlations",
        title="How well each criterion foretold the harm",
        note="Spearman's ρ of score and harm within layers, with 95 % intervals.",
        series=(rhos,),
        column=Column("ρ", "+.2f"),
    )
    regrets = by_criterion(
        key=f"{key}-regrets",
        title="Regret of each criterion",
        note="How much more mean log p its removals cost, one by one, than the least harmful.",
        series=tuple(eval_tables.regret_series(audit)),
        column=Column("regret, nats", ".3f"),
    )
    return [*(text for _, text in eval_tables.audit_facts(audit)), *tables, correlations, regrets]


def provenance_sections(run: Run) -> list[Section]:
    """One, with facts on everything that was found."""
    facts: dict[str, Part] = {}
    if stages := _stages(views.notes_in(run.path / views.MANIFEST_FILE)):
        facts["Stages of the run"] = Facts(stages)
    if recipe := views.recipe_in(run.path):
        facts["Recipe"] = Lines(recipe)
    infos: dict[str, tuple[Path, AnyProfileInfo]] = {
        **{f"Profile {p.name}": (p.file, p.content.profile.info) for p in run.profiles},
        **{f"Profile {text.name}": (text.file, text.content.info) for text in run.texts},
    }
    for trace in run.traces:
        if not isinstance(traced := trace.content.info, RoutesTraceInfo):  # whose quiz is not known
            infos[f"Trace {trace.name}"] = (trace.file, traced)
    for title, (file, info) in infos.items():
        notes = views.notes_in(file.parent / views.RUN_FILE)
        read = _quiz(info.quiz, info.quiz.id) if info.text is None else _texts(info.text)
        facts[title] = Facts(_profile(info, notes, read))
    facts |= {f"Plan {plan.name}": Facts(_plan(plan.content)) for plan in run.plans}
    facts |= {f"Results {found.name}": Facts(_results(found.content)) for found in run.results}
    parts = [Folded(title, [part]) for title, part in facts.items()]
    return [Section("provenance", "Where the numbers come from", parts)]


def _profile(info: AnyProfileInfo, notes: Mapping[str, Any], read: Rows) -> Rows:
    hashes = {name: subject.content_hash for name, subject in info.quiz.subjects.items()}
    elapsed_s = notes.get("elapsed_s")  # `run.json` promises nothing
    took = f"{elapsed_s:,.1f} s" if isinstance(elapsed_s, int | float) else None
    versions = [(f"version of {name}", notes.get(name)) for name in ("expertcut", "python")]
    return [
        ("model", info.model.label),
        ("revision", info.model.revision),
        ("fingerprint of config and weights", info.model.fingerprint),
        *read,
        ("hash of the questions" if info.text is None else "hash of the rows", _hash(hashes)),
        ("settings", ", ".join(f"{k} {v}" for k, v in info.settings.model_dump().items() if v)),
        ("finished", _finished(notes) or None),
        ("took", took),
        *((name, version) for name, version in versions if isinstance(version, str)),
    ]


def _plan(plan: PlanFile) -> Rows:
    adapter = plan.adapter
    adapter_text = f"{adapter.path}, {adapter.weights_sha256}" if adapter else None
    return [
        ("made by", plan.action),
        ("model", plan.model.label),
        ("revision", plan.model.revision),
        ("fingerprint of config and weights", plan.model.fingerprint),
        ("chosen on", eval_tables.chosen_text(plan.chosen_on, plan.blend)),
        ("hash of their list", plan.chosen_on.sha256),
        ("adapter that was cut along", adapter_text),
    ]


def _results(results: Results) -> Rows:
    asked: Rows = []
    if isinstance(results, QuizResults):
        asked = [
            *_quiz(results, results.quiz),
            ("hash of the questions", _hash(results.content_hashes)),
        ]
    return [
        *asked,
        *((f"model {i}", model.path) for i, model in enumerate(results.models)),
    ]


def _quiz(quiz: QuizInfo | TextInfo | QuizResults, name: str) -> Rows:
    first = f", the first {quiz.limit} of each subject" if quiz.limit else ""
    questions = f"{name}, split {quiz.split}, {quiz.shots} shots{first}"
    return [("questions", questions), ("revision of the questions", quiz.revision)]


def _texts(text: TextInfo) -> Rows:
    rows: Rows = [("texts", texts_line(text)), ("tokens of a row, at most", f"{text.max_tokens:,}")]
    for name, source in text.sources.items():
        rows += [(f"source {name}", source.spec), (f"revision of {name}", source.revision)]
    return rows


def _stages(manifest: Mapping[str, Any]) -> Rows:
    """When each stage of a recipe was finished, by what, and how long it took."""
    stages = manifest.get("stages")
    rows: Rows = []
    for name, record in stages.items() if isinstance(stages, dict) else ():
        if isinstance(record, dict) and isinstance(record.get("finished"), str):
            elapsed_s, versions = record.get("elapsed_s"), record.get("versions")
            texts = [f"{elapsed_s:,.1f} s"] if isinstance(elapsed_s, int | float) else []
            texts += [f"{k} {v}" for k, v in versions.items()] if isinstance(versions, dict) else []
            rows.append((name, ", ".join([record["finished"], *texts])))
    return rows


def _finished(notes: Mapping[str, Any]) -> str:
    if isinstance(finished := notes.get("finished"), int | float):
        with suppress(ValueError, OverflowError, OSError):  # no year that a calendar has
            return datetime.fromtimestamp(finished, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return ""


def _hash(hashes: Mapping[str, str]) -> str:
    """One for all subjects."""
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in hashes.items()).encode()).hexdigest()
