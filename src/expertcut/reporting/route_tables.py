"""Tables, sentences and figures of routing rules: sweeps, `--tune` and oracles."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from expertcut.evaluation.cross_fit import CrossFitResult
from expertcut.evaluation.holding import HoldingResult
from expertcut.evaluation.route_results import OracleResult, RouteCell, RouteSweep, RouteTextCell
from expertcut.evaluation.search_results import SweptModel, SweptTexts
from expertcut.reporting import edit_tables as edits
from expertcut.reporting.plots import Series, draw_lines, series_of
from expertcut.reporting.tables import Cell, Table, columns, signed
from expertcut.reporting.text_search_tables import texts_note
from expertcut.reporting.text_tables import judged_note
from expertcut.reporting.text_tables import span as text_span
from expertcut.stats import LEVEL, MARGIN, interval_verdict, verdict

if TYPE_CHECKING:  # with torch
    from expertcut.evaluation.route_tuning import RouteTuning


class _Figure(NamedTuple):
    """A column of a sweep: its cell of a setting, of the model as it is, and of all draws."""

    heading: str
    cell: Callable[[Any], Cell]
    base: Callable[[Any], Cell] = lambda _: None
    draws: Callable[[Any], Cell] = lambda _: None


def _averaged(heading: str, of: Callable[[Any], Any], *, is_of_base: bool = False) -> _Figure:
    """A number of every setting, of draws the mean."""
    base = of if is_of_base else lambda _: None
    return _Figure(heading, of, base, lambda draws: _mean(of(c) or 0.0 for c in draws))


def _fixed(heading: str, of: Callable[[Any], Cell]) -> _Figure:
    """A number that all draws share."""
    return _Figure(heading, of, of, lambda draws: of(draws[0]))


def _quiz_figures(margin: float) -> list[_Figure]:
    def changed(draws: Sequence[RouteCell]) -> str:
        deltas = [c.change.delta for c in draws]
        return f"{edits.points(_mean(deltas))} ({edits.span(_range(deltas))})"

    def own_interval(model: SweptModel) -> str:
        return edits.interval_text(model.ci95)

    def interval(draws: Sequence[RouteCell]) -> str:
        return edits.interval_text(_range([c.accuracy for c in draws]))

    def held(c: RouteCell) -> str:
        return verdict(c.change.gained, c.change.lost, c.questions, margin)

    return [
        _averaged("accuracy::.2%", lambda c: c.accuracy, is_of_base=True),
        _Figure(edits.CHANGE, lambda c: edits.change_cells(c.change)[0], draws=changed),
        _Figure("verdict", held),
        _Figure("flipped", lambda c: c.flipped, draws=lambda d: round(_mean(c.flipped for c in d))),
        _Figure("95 % interval", own_interval, own_interval, interval),
        _Figure("gained", lambda c: c.change.gained),
        _Figure("lost", lambda c: c.change.lost),
        _Figure("McNemar p::.3g", lambda c: edits.change_cells(c.change)[-1]),
        _averaged("log p right::.4f", lambda c: c.right_logprob, is_of_base=True),
        _Figure("most experts", lambda c: _extremes(c.experts_by_subject)[0]),
        _Figure("fewest experts", lambda c: _extremes(c.experts_by_subject)[1]),
        _Figure("ρ with errors::+.2f", lambda c: c.difficulty.rho),
        _fixed("active parameters::,d", lambda c: c.active_parameters),
    ]


def _text_figures() -> list[_Figure]:
    def spread(draws: Sequence[RouteTextCell]) -> str | None:
        return text_span(_range([c.delta_loss for c in draws]), "+.3f")

    return [
        _averaged("perplexity::.3f", lambda c: c.total.perplexity, is_of_base=True),
        _averaged("Δ loss::+.3f", lambda c: c.delta_loss),
        _Figure("95 % interval", lambda c: text_span(c.change.ci95, "+.3f"), draws=spread),
        _Figure("verdict", _text_verdict),
        _averaged("KL::.3f", lambda c: c.change.kl),
        _averaged("same top token::.1%", lambda c: c.change.top1_agreement),
        _Figure("acceptance::.1%", lambda c: c.change.acceptance),
        _fixed("tokens::,d", lambda c: c.total.tokens),
        _fixed("documents::,d", lambda c: c.total.documents),
        _fixed("active parameters::,d", lambda c: c.active_parameters),
    ]


def sweep_table(sweep: RouteSweep, margin: float = MARGIN) -> Table:
    """The model as it is, every finished setting, and the random controls in one row."""
    text, quiz = sweep.asked.text, sweep.asked.scored.quiz
    figures, n_narrow = (_text_figures(), 4) if text is not None else (_quiz_figures(margin), 3)
    rows: list[list[Cell]] = []
    if sweep.base is not None:
        base: list[Cell] = ["(base)", sweep.base_experts]
        rows.append(base + [own.base(sweep.base) for own in figures])

    def add_draws(name: str, draws: Sequence[RouteCell | RouteTextCell]) -> None:
        if draws:
            row: list[Cell] = [f"{name}, {_counted(len(draws), 'draw')}"]
            row.append(_mean(c.experts_per_token for c in draws))
            rows.append(row + [own.draws(draws) for own in figures])

    cells: list[RouteCell | RouteTextCell] = [*sweep.of_quiz, *sweep.of_texts]
    for c in cells:
        row: list[Cell] = [_name(c), c.experts_per_token]
        rows.append(row + [own.cell(c) for own in figures])
        add_draws(_name(c), sweep.matched(c.setting))
    add_draws("random", sweep.controls)
    names = [own.heading for own in figures]
    narrow = "; ".join(["rule", "experts::.2f", *names[:n_narrow]])
    if text is not None:
        note = f"{texts_note(text)}. {judged_note(text)}"
    else:
        note = f"{sweep.n_questions:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots."
    note += " Experts: the mean of a token in a layer."
    if any(setting.is_matched for setting in sweep.asked.settings):
        note += " Draws of a setting leave out as many experts of each token, but random ones."
    if not sweep.is_complete:
        n_all = len(sweep.asked.settings)
        note += f" {len(sweep.cells)} of {n_all} settings: the same command does the rest."
    heads = columns(f"{narrow} | {'; '.join(names[n_narrow:])}")
    return Table(f"Routing rules in {sweep.asked.scored.model.label}", heads, rows, note)


def _text_verdict(cell: RouteTextCell) -> str | None:
    """Whether the loss is shown to change; of fewer than 10 documents nothing is."""
    if cell.change.ci95 is None:
        return None
    low, high = cell.change.ci95
    return interval_verdict((-high, -low), None)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The range of 95 % of some draws."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _extremes(by_subject: dict[str, float]) -> tuple[str | None, str | None]:
    """The subjects whose tokens use most and fewest experts, if these differ."""
    most = max(by_subject, key=lambda s: by_subject[s])
    fewest = min(by_subject, key=lambda s: by_subject[s])
    if by_subject[most] - by_subject[fewest] < 1e-9:
        return None, None
    return f"{most} {by_subject[most]:.2f}", f"{fewest} {by_subject[fewest]:.2f}"


_QUIZ_CSV = (
    "questions; accuracy; ci95_low; ci95_high; right_logprob; delta; delta_low; delta_high; "
    "gained; lost; mcnemar_p; smallest_effect"
)
_TEXT_CSV = (
    "perplexity; delta_loss; delta_low; delta_high; kl; top1_agreement; acceptance; tokens; "
    "documents"
)


def sweep_csv(sweep: RouteSweep) -> Table:
    """One row per setting and control, in full precision; the model as it is has no rule."""
    keys = ["rule", "at", "experts", "draw"]
    if any(setting.beta is not None for setting in sweep.asked.settings):
        keys.append("beta")
    rows: list[list[Cell]] = []
    if (base := sweep.base) is not None:
        rows.append([*[None] * len(keys), sweep.base_experts, *_csv_figures(base)])
    for c in sweep.cells:
        own: list[Cell] = [getattr(c.setting, key) for key in keys]
        rows.append([*own, c.experts_per_token, *_csv_figures(c)])
    figures = _QUIZ_CSV if sweep.asked.text is None else _TEXT_CSV
    sizes = "parameters; active_parameters; bytes"
    heads = "; ".join([*keys, "experts_per_token", figures, sizes])
    return Table("route", columns(heads), rows)


def _csv_figures(model: SweptModel | SweptTexts) -> list[Cell]:
    sizes: list[Cell] = [model.parameters, model.active_parameters, model.bytes]
    change: list[Cell]
    if isinstance(model, SweptModel):
        own: list[Cell] = [model.questions, model.accuracy, *model.ci95, model.right_logprob]
        change = [None] * 7
        if isinstance(model, RouteCell):
            c = model.change
            change = [c.delta, *c.ci95, c.gained, c.lost, c.mcnemar_p, c.smallest_effect]
        return [*own, *change, *sizes]
    change = [None] * 6
    if isinstance(model, RouteTextCell):
        t = model.change
        change = [t.delta_loss, *(t.ci95 or (None, None)), t.kl, t.top1_agreement, t.acceptance]
    return [model.total.perplexity, *change, model.total.tokens, model.total.documents, *sizes]


def sweep_facts(sweep: RouteSweep, margin: float = MARGIN) -> list[tuple[str, str]]:
    """What holds with the fewest experts, what the control says, and leakage, with labels."""
    overlap, n = sweep.chosen_on.overlap, sweep.n_questions
    things = "documents" if sweep.asked.text is not None else "questions"
    if sweep.asked.text is not None:
        n = sum(source.documents for source in sweep.asked.text.sources.values())
    leak = f"none of the {n:,} {things} scored calibrated a threshold"
    if overlap:
        leak = f"{overlap:,} of the {n:,} {things} scored were profiled or calibrated thresholds"
    facts = [("quiz" if things == "questions" else "text", leak)]
    if things == "questions":
        return facts + _quiz_facts(sweep, margin) + _matched_facts(sweep)
    return facts + _text_facts(sweep) + _matched_facts(sweep)


def _matched_facts(sweep: RouteSweep) -> list[tuple[str, str]]:
    """In how many settings it matters which experts are left out."""
    cells = [c for c in sweep.cells if not c.setting.is_control]
    p_values, n = [], 0
    for cell in cells:
        if draws := sweep.matched(cell.setting):
            n = len(draws)
            as_good = sum(_quality(draw) >= _quality(cell) for draw in draws)
            p_values.append((1 + as_good) / (1 + n))
    if not p_values:
        return []
    shown = sum(p < LEVEL for p in p_values)
    text = f"as many random experts left out do worse in {shown} of "
    text += f"{_counted(len(p_values), 'setting')} (p < {LEVEL:g} each, {_counted(n, 'draw')})"
    few = f"; p cannot fall below {1 / (1 + n):.2g}" if 1 / (1 + n) >= LEVEL else ""
    return [("left out", text + few)]


def _quality(cell: RouteCell | RouteTextCell) -> float:
    return cell.accuracy if isinstance(cell, RouteCell) else -cell.delta_loss


def _quiz_facts(sweep: RouteSweep, margin: float) -> list[tuple[str, str]]:
    cells, facts = sweep.of_quiz, []
    held = [
        c
        for c in cells
        if verdict(c.change.gained, c.change.lost, c.questions, margin) in ("holds", "better")
    ]
    if held:
        best = min(held, key=lambda c: c.experts_per_token)
        text = f"{_name(best)}: {best.experts_per_token:.2f} experts a token, "
        text += f"{edits.change_text(best.change)}, "
        text += edits.verdict_text(best.change, best.questions, margin)
        if len(cells) > 1:
            text += f"; chance flatters the best of {len(cells)} settings"
        facts.append(("fewest", text))
    elif cells:
        effect = max(c.change.smallest_effect for c in cells)
        text = f"no setting holds within {edits.margin_text(margin)}; "
        facts.append(("fewest", f"{text}changes of {100 * effect:.1f} points could be shown"))
    controls = [c for c in sweep.controls if isinstance(c, RouteCell)]
    if controls:
        shares = [c.accuracy for c in controls]
        text = f"random experts with the router's weights: {edits.percent(_mean(shares))} "
        text += f"({edits.interval_text(_range(shares))} in {_counted(len(shares), 'draw')})"
        facts.append(("control", text))
    ranked = [c for c in cells if c.difficulty.ci95 is not None and c.difficulty.rho]
    if ranked:
        facts.append(("subjects", _difficulty(ranked)))
    return facts


def _difficulty(cells: Sequence[RouteCell]) -> str:
    """Whether harder subjects use more experts, by the largest ρ of several settings."""
    cell = max(cells, key=lambda c: c.difficulty.rho or 0.0)
    found, n = cell.difficulty, len(cell.experts_by_subject)
    assert found.rho is not None and found.ci95 is not None and found.p is not None, "defined"
    p = min(1.0, found.p * len(cells))
    word = "harder ones use more experts" if p < LEVEL else "no clear relation to difficulty"
    text = (
        f"{word}: ρ {signed(found.rho, '+.2f')} ({text_span(found.ci95, '+.2f')}) between experts"
    )
    text += f" a token and wrong answers over {n} subjects, {_name(cell)}"
    several = f", the largest of {len(cells)} settings" if len(cells) > 1 else ""
    return f"{text}{several}; p = {p:.2g}{' (Bonferroni)' if several else ''}"


def _text_facts(sweep: RouteSweep) -> list[tuple[str, str]]:
    cells, facts = sweep.of_texts, []
    unharmed = [c for c in cells if _text_verdict(c) in ("better", "undecided")]
    if unharmed:
        best = min(unharmed, key=lambda c: c.experts_per_token)
        text = f"{_name(best)}: {best.experts_per_token:.2f} experts a token, "
        text += f"{signed(best.delta_loss, '+.4f')} nats a token, not shown to lose"
        facts.append(("fewest", text))
    controls = [c for c in sweep.controls if isinstance(c, RouteTextCell)]
    if controls:
        losses = [c.delta_loss for c in controls]
        mean = signed(_mean(losses), "+.3f")
        text = f"random experts with the router's weights: {mean} nats a token "
        facts.append(("control", f"{text}({text_span(_range(losses), '+.3f')})"))
    return facts


def _name(cell: RouteCell | RouteTextCell) -> str:
    return f"{cell.setting.rule} {cell.setting.label}".strip()


def sweep_figure(sweep: RouteSweep) -> dict[str, bytes]:
    """`route.png` and `route.svg`: accuracy or perplexity against experts a token."""
    rules = dict.fromkeys(setting.rule for setting in sweep.asked.settings)
    is_text = sweep.asked.text is not None
    series = []
    for rule in rules:
        own = [c for c in sweep.cells if c.setting.rule == rule and not c.setting.is_matched]
        own.sort(key=lambda c: c.experts_per_token)
        if own and rule == "random":
            series.append(_control_series(f"random ({len(own)})", [own]))
        elif own:
            series.append(_series(rule, own))
            if points := [draws for c in own if (draws := sweep.matched(c.setting))]:
                series.append(_control_series(f"{rule}, random ones", points))
    base = None
    if sweep.base is not None and sweep.base_experts is not None:
        value, ends = _value(sweep.base)
        base = series_of("as it is", [value], [ends], (sweep.base_experts,))
    quiz = sweep.asked.scored.quiz
    label = "perplexity" if is_text else f"accuracy on {quiz.split} (%)"
    return draw_lines("route", series, base, ("experts a token", label))


def _series(rule: str, cells: Sequence[RouteCell | RouteTextCell]) -> Series:
    values = [_value(cell) for cell in cells]
    x = tuple(cell.experts_per_token for cell in cells)
    return series_of(rule, [value for value, _ in values], [ends for _, ends in values], x)


def _control_series(name: str, points: Sequence[Sequence[RouteCell | RouteTextCell]]) -> Series:
    """All draws of a control as one point, with the range of 95 % of them."""
    values = [[_value(cell)[0] for cell in cells] for cells in points]
    x = tuple(_mean(cell.experts_per_token for cell in cells) for cells in points)
    return series_of(name, [_mean(own) for own in values], [_range(own) for own in values], x)


def _value(model: SweptModel | SweptTexts) -> tuple[float, tuple[float, float]]:
    if isinstance(model, SweptModel):
        return 100 * model.accuracy, (100 * model.ci95[0], 100 * model.ci95[1])
    value = model.total.perplexity
    return value, model.total.ci95 or (value, value)


def tried_table(tuned: "RouteTuning", margin: float) -> Table:
    """Every mean that `--tune` tried, judged on the tuning questions that choose."""
    n = sum(len(own) for own in tuned.tuning.questions.values())
    rows: list[list[Cell]] = []
    for mean, c in sorted(tuned.tried.items(), reverse=True):
        change, *counts = edits.change_cells(c)
        is_chosen = tuned.chosen is not None and tuned.chosen.experts == mean
        word = verdict(c.gained, c.lost, n, margin)
        rows.append([mean, change, word, "chosen" if is_chosen else None, *counts])
    heads = f"experts a token::.1f; {edits.CHANGE}; verdict; choice | gained; lost; McNemar p::.3g"
    note = f"{n:,} {tuned.tuning.split} questions, on which the rule is calibrated and chosen."
    return Table(f"Rule {tuned.rule}, from the most experts on", columns(heads), rows, note)


def holding_table(proof: HoldingResult) -> Table:
    """The cross-fitted change, the same on all questions, and random experts left out."""
    rows: list[list[Cell]] = []
    for name, c in (("cross-fitted", proof.cross_fitted), ("same", proof.same_questions)):
        change, *counts = edits.change_cells(c)
        rows.append([name, change, *counts])
    if proof.random is not None:
        r = proof.random
        text = f"{edits.points(r.delta_mean)} ({edits.span(r.range95)})"
        rows.append([f"random ({_counted(r.draws, 'draw')})", text, None, None, r.p])
    means = ", ".join("K" if f.experts is None else f"{f.experts:g}" for f in proof.folds)
    note = f"Chosen in the folds: {means} experts a token."
    heads = columns(f"questions; {edits.CHANGE}; gained; lost; p::.3g")
    return Table(f"Cross-fit of {proof.procedure}", heads, rows, note)


def proof_table(proof: CrossFitResult | HoldingResult) -> Table:
    """The estimates of either proof."""
    if isinstance(proof, HoldingResult):
        return holding_table(proof)
    return edits.cross_fit_table(proof)


def holding_csv(proof: HoldingResult) -> Table:
    """One row per estimate, in full precision."""
    rows: list[list[Cell]] = []
    for name, c in (("cross_fitted", proof.cross_fitted), ("same", proof.same_questions)):
        rows.append([name, c.delta, *c.ci95, c.gained, c.lost, c.mcnemar_p])
    if (r := proof.random) is not None:
        rows.append(["random", r.delta_mean, *r.range95, None, None, r.p])
    heads = columns("estimate; delta; low; high; gained; lost; p")
    return Table("holding", heads, rows)


def oracle_table(oracle: OracleResult) -> Table:
    """Every setting alone, the best per question, noise variants, and a reader beforehand."""
    rows: list[list[Cell]] = []
    for one in oracle.settings:
        name = f"{one.setting.rule} {one.setting.label}".strip()
        share = oracle.base_accuracy + one.change.delta
        rows.append([name, share, edits.change_text(one.change, ""), one.flips, one.noise_flips])
    span = f" ({edits.span(oracle.range95)})"
    rows.append(["best per question", oracle.accuracy, edits.points(oracle.gain), None, None])
    noise = oracle.base_accuracy + oracle.noise_gain
    text = edits.points(oracle.noise_gain) + span
    variants = f"of noise variants ({_counted(oracle.sets, 'set')})"
    rows.append([variants, noise, text, None, None])
    read = oracle.base_accuracy + oracle.reader.delta
    rows.append(["chosen beforehand", read, edits.change_text(oracle.reader, ""), None, None])
    heads = f"setting; accuracy::.2%; {edits.CHANGE}; flipped | flipped by variants::.1f"
    quiz = oracle.scored.quiz
    note = (
        f"{oracle.questions:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots, base "
        f"{oracle.base_accuracy:.2%}. Variants leave experts out at random, so many that "
        "as many answers flip. A logistic reader of gate entropies and margin chooses beforehand, "
        "cross-fitted."
    )
    return Table(f"Oracle of {oracle.scored.model.label}", columns(heads), rows, note)


def oracle_facts(oracle: OracleResult) -> list[tuple[str, str]]:
    """Whether the best per question gains more than chance, and what could be used of it."""
    low, high = edits.points(oracle.ci95[0]), edits.points(oracle.ci95[1])
    n = len(oracle.settings)
    text = (
        f"{oracle.verdict}: the best of {_counted(n, 'setting')} per question gains "
        f"{edits.points(oracle.gain)} points, of as many noise variants "
        f"{edits.points(oracle.noise_gain)}; {edits.points(oracle.excess)} beyond them "
        f"({low} … {high}), p = {oracle.p:.2g}"
    )
    reader = edits.change_text(oracle.reader)
    return [
        ("oracle", text),
        ("reader", f"chooses beforehand by gate entropy and margin: {reader}"),
    ]


def oracle_csv(oracle: OracleResult) -> Table:
    """One row per setting, then those of the oracle, in full precision."""
    rows: list[list[Cell]] = []
    for one in oracle.settings:
        s, c = one.setting, one.change
        row: list[Cell] = [s.rule, s.at, s.experts, oracle.base_accuracy + c.delta, c.delta]
        rows.append([*row, *c.ci95, one.flips, one.noise_flips])
    base, reader, noise = oracle.base_accuracy, oracle.reader, oracle.noise_gain
    others: list[list[Cell]] = [
        ["best per question", None, None, oracle.accuracy, oracle.gain, None, None],
        ["noise variants", None, None, base + noise, noise, *oracle.range95],
        ["beyond noise", None, None, None, oracle.excess, *oracle.ci95],
        ["chosen beforehand", None, None, base + reader.delta, reader.delta, *reader.ci95],
    ]
    rows += [[*row, None, None] for row in others]
    heads = "rule; at; experts; accuracy; delta; delta_low; delta_high; flips; noise_flips"
    return Table("oracle", columns(heads), rows)
