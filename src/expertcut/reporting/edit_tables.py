"""Tables and sentences on cuts, merges, reweighting and healing."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from expertcut import stats
from expertcut.edits.criteria import CRITERIA
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, EditPlan, ExpertIds, Point, expert_ids, ids_text
from expertcut.edits.router_edits import RouterEdit
from expertcut.edits.selection import Pruning, RemovedTraffic, removed_share
from expertcut.errors import ProfileError
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.storage import Profile, TextProfile
from expertcut.reporting import text_tables
from expertcut.reporting.tables import Cell, Column, Table, columns, labelled, printable, signed
from expertcut.stats import MARGIN, ExpertShares

if TYPE_CHECKING:  # with torch, which `show` does without
    from expertcut.checkpoints.build import Built
    from expertcut.edits.plan import PlanFile
    from expertcut.evaluation.cross_fit import CrossFitResult
    from expertcut.evaluation.reweight_search import TuningResult
    from expertcut.healing.data import Dropped
    from expertcut.healing.recovery import Healed

logger = logging.getLogger(__name__)

_NAMED = 10
CHANGE = "Δ in points (95 %)"


def pruning_sentences(pruning: Pruning) -> list[str]:
    """Per block: kept experts, and idle or protected ones among them."""
    sentences, numbers = [], pruning.draft.numbers or ExpertIds()
    for name, edit in pruning.draft.edits.items():
        text = f"{name}: keeps {len(edit.keep)} experts, {pruning.n_active[name]} were active"
        if fillers := ids_text(numbers.kept(name, pruning.fillers[name])):
            is_counted = pruning.draft.criterion == "activations"
            why = " to make one count for all layers" if is_counted else ""
            text += f"; never activated but kept{why}: {fillers}"
        if spared := ids_text(numbers.kept(name, pruning.spared.get(name, ()))):
            text += f"; stay only because they are protected: {spared}"
        sentences.append(f"{text}.")
    return sentences


def profile_line(profile: Profile, unfinished: Sequence[Profile] | None) -> str:
    """The profile, its questions and accuracy; `unfinished` ones, where the newest was taken."""
    whole = getattr(profile, "whole", profile)
    newest = "" if unfinished is None else "newest; "
    if isinstance(whole, TextProfile):
        text = f"{profile.path} ({newest}{whole.info.text.n_tokens:,} tokens"
        text += f", perplexity {whole.score.perplexity:.3f})" if whole.info.text.has_loss else ")"
    else:
        answers = whole.answers
        text = f"{profile.path} ({newest}{len(answers.answer_N):,} questions"
        text += f", accuracy {percent(answers.accuracy)})"
    if unfinished:
        more = f" and {len(unfinished) - 1} more" if len(unfinished) > 1 else ""
        text += f"; newer but not finished: {unfinished[0].path}{more}"
    return labelled("profile", text)


def cut_line(pruning: Pruning, blocks: Sequence[BlockInfo], *, is_text: bool) -> str:
    """How many experts stay and by which criterion; idle and protected ones among them."""
    draft, numbers = pruning.draft, pruning.draft.numbers or ExpertIds()
    n_keeps, n_blocks = [len(edit.keep) for edit in draft.edits.values()], len(blocks)
    if len({*n_keeps}) == len({block.experts for block in blocks}) == 1:
        text = f"{n_keeps[0]} of {blocks[0].experts} experts stay in each of {n_blocks} layers"
    else:
        n_experts = sum(block.experts for block in blocks)
        text = f"{sum(n_keeps):,} of {n_experts:,} experts stay in {n_blocks} layers, "
        text += f"{min(n_keeps)} to {max(n_keeps)} in each"
    text += f", by {draft.criterion}"
    if draft.criterion in CRITERIA and CRITERIA[draft.criterion].positions:
        text += " over all tokens" if draft.positions == "all" else " at answer positions"
    if n_idle := sum(len(numbers.kept(name, ids)) for name, ids in pruning.fillers.items()):
        is_any = is_text or (draft.criterion, draft.positions) == ("activations", "all")
        text += f"; {n_idle:,} of those were never chosen{'' if is_any else ' to answer'}"
    spared = [
        f"{layer}:{expert}"
        for layer, name in enumerate(draft.edits)
        for expert in numbers.kept(name, pruning.spared.get(name, ()))
    ]
    if spared:
        more = f" and {len(spared) - _NAMED} more" if len(spared) > _NAMED else ""
        text += f"; stay only because they are protected: {', '.join(spared[:_NAMED])}{more}"
    return labelled("cut", text)


def merged_line(profile: Profile, plan: EditPlan) -> str:
    """How many experts became how many, and the largest group."""
    blocks, edits = profile.info.model.blocks, list(plan.edits.values())
    most = max((len(g) for edit in edits for g in (edit.merged or {}).values()), default=1)
    text = f"{blocks[0].experts} experts into {len(edits[0].keep)} in each of {len(blocks)} layers"
    return labelled("merged", f"{text}, by {plan.criterion}; at most {most} in one")


def traffic_line(profile: Profile, edits: Mapping[str, BlockEdit], experts: str) -> str:
    """What the experts that do not stay had in the profile."""
    n_removed, n_questions, share = removed_share(profile, edits)
    had = "" if share is None else f"had {percent(share)} of all gate weight and "
    tokens_LE = profile.token_sum("tokens")
    if share is None and n_questions is None and tokens_LE is not None:  # of given routes
        by_block = zip(profile.info.model.blocks, tokens_LE, strict=True)
        n_chose = sum(own_E[list(edits[b.name].removed(b.experts))].sum() for b, own_E in by_block)
        had = f"had {percent(n_chose / tokens_LE.sum())} of all choices and "
    if n_questions is None:
        return labelled("traffic", f"the {n_removed:,} {experts} {had.removesuffix(' and ')}")
    chose = f"were chosen to answer by {n_questions:,} of {len(profile.subjects()):,} questions"
    return labelled("traffic", f"the {n_removed:,} {experts} {had}{chose}")


def size_line(before: tuple[int, int] | None, after: tuple[int, int]) -> str:
    """What a checkpoint weighs; `before` and `after` are parameters and bytes."""
    size, parameters = unit(after[1], "B"), f"{unit(after[0])} parameters"
    if before is not None:
        change = signed(after[1] / before[1] - 1, "+.0%").replace("%", " %")
        size += f", was {unit(before[1], 'B')} ({change})"
        parameters += f", were {unit(before[0])}"
    return labelled("size", f"{size}; {parameters}")


def outcome_lines(
    built: "Built", before: tuple[int, int] | None, after: tuple[int, int], margin: float = MARGIN
) -> list[str]:
    """Size, accuracy, verdict and distance; `before` and `after` are parameters and bytes."""
    lines, sentences = [size_line(before, after)], held_out_sentences(built)
    if not (built.proof and built.scored_on):
        return [*lines, labelled("accuracy", sentences[0])]
    if built.proof.text:
        return lines + text_tables.text_change_lines(built.proof.text)
    answered, scored_on, chance = built.proof.answered, built.scored_on, built.proof.chance
    where, n = scored_on.clause, scored_on.questions
    if scored_on.used == 0:
        where = f"{n:,} held-out questions ({scored_on.split})"
    shares = {outcome.form: outcome.accuracy for outcome in built.proof.outcomes}
    forms = "; ".join(f"{form} {percent(share)}" for form, share in shares.items())
    if answered is not None and n:
        if not built.proof.held_out_used:  # else of a healed checkpoint
            own = answered.base + answered.change.delta
            shares = {"the base": answered.base, "the checkpoint": own}
            forms = "{1}, was {0}".format(*map(percent, shares.values()))
        text = f"{forms} on {where}: {change_text(answered.change)}"
        text += guessing_text(shares, n, chance)
        judged = verdict_text(answered.change, n, margin, answered.base, chance)
        lines += [labelled("accuracy", text), labelled("verdict", judged)]
    elif forms:
        lines.append(labelled("accuracy", f"{forms} on {where}"))
    shifts = "; ".join(
        f"{shift.against}: median {shift.median_abs_logprob_diff:.4f}, largest "
        f"{shift.max_abs_logprob_diff:.4f}, {shift.flipped:,} answers flipped"
        for shift in built.proof.held_out
    )
    lines += [labelled("distance", f"|Δ log p| against {shifts}")]
    return lines + [labelled("", sentence) for sentence in sentences]


def verdict_text(
    change: stats.Comparison, n: int, margin: float, base: float = 1, chance: float | None = None
) -> str:
    """The verdict on a change from the accuracy `base`; how many would decide; if both guess."""
    both = guess_clause(base, n, chance) and guess_clause(base + change.delta, n, chance)
    within, end = margin_text(margin), "; both only guess here" if both else ""
    word = stats.verdict(change.gained, change.lost, n, margin)
    if word == "undecided":
        needed = stats.questions_to_hold(change.gained, change.lost, n, margin)
        return (
            f"undecided at a margin of {within}: could be {points(-change.ci95[0])[1:]} points "
            f"worse; about {needed:,} questions would decide{end}"
        )
    if word != "holds":
        return f"{word} than the base{end}"
    is_worse = ", yet is measurably worse" if change.ci95[1] < 0 else ""
    return f"holds within {within} of the base{is_worse}{end}"


def margin_text(margin: float) -> str:
    """A margin in points."""
    return f"{margin * 100:g} point{'' if margin == 0.01 else 's'}"


def percent(share: float) -> str:
    """A share as `41.2 %`."""
    return f"{100 * share:.1f} %"


def accuracy_text(share: float, n: int, chance: float | None) -> str:
    """An accuracy with its interval, and a clause if that does not lie above guessing."""
    low, high = stats.wilson_interval(share, n)
    return f"{percent(share)} ({percent(low)} … {percent(high)}){guess_clause(share, n, chance)}"


def guess_clause(share: float, n: int, chance: float | None) -> str:
    """A clause if the 95 % interval of an accuracy does not lie above guessing, else empty."""
    if chance is None or stats.wilson_interval(share, n)[0] > chance:
        return ""
    return f", no better than guessing ({100 * chance:.3g} %)"


def guessing_text(shares: Mapping[str, float], n: int, chance: float | None) -> str:
    """A clause that names the models that are no better than guessing, by their accuracies."""
    clauses = {name: guess_clause(share, n, chance) for name, share in shares.items()}
    if not (names := [name for name, clause in clauses.items() if clause]):
        return ""
    who = "both" if len(names) == len(shares) == 2 else listed(names)
    return f"; {who} {'are' if len(names) > 1 else 'is'}{clauses[names[0]][1:]}"


def listed(names: Sequence[str]) -> str:
    """Names as `a`, `a, b and c` or, of more than three, `a, b and 2 others`."""
    *first, last = names if len(names) < 4 else [*names[:2], f"{len(names) - 2} others"]
    return f"{', '.join(first)} and {last}" if first else last


def points(change: float) -> str:
    """A change of accuracy as `−0.8`, in points."""
    return signed(100 * change, "+.1f")


def span(ends: Sequence[float]) -> str:
    """An interval of changes of accuracy, in points."""
    return " … ".join(map(points, ends))


def change_text(change: stats.Comparison, noun: str = " points") -> str:
    """A change of accuracy with its interval, as `−0.8 points (−3.1 … +1.6)`."""
    if not change.gained + change.lost:
        return "same answers"
    return f"{points(change.delta)}{noun} ({span(change.ci95)})"


def unit(number: float, name: str = "") -> str:
    """A number as `33.1 M` or, of bytes, `13.8 GB`."""
    for size, prefix in ((1e9, "G" if name else "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {prefix}{name}"
    return f"{number:.0f} {name}".strip()


def known_ids(profile: Profile) -> ExpertIds:
    """Numbers of the experts before any cut; a missing model is logged, and rows are numbers."""
    try:
        return expert_ids(profile)
    except ProfileError as error:
        logger.warning("the tables call experts by rows of the routers: %s", error)
        return ExpertIds()


def rows_tables(profile: Profile) -> list[Table]:
    """Expert numbers of a model that was cut or put in another order before."""
    numbers = known_ids(profile)
    rows: list[list[Cell]] = [
        [layer, ids_text(numbers.rows[block.name])]
        for layer, block in enumerate(profile.info.model.blocks)
        if block.name in numbers.rows
    ]
    note = "The tables above count rows from 0; --boost, --suppress and --scale take the numbers."
    heads = columns("layer; numbers of its rows, in order")
    is_cut = any(max(own) >= len(own) for own in numbers.rows.values())
    what = "was cut" if is_cut else "was put in another order"
    title = f"This model {what} before: its experts' numbers"
    return [Table(title, heads, rows, note)] if rows else []


def touched_table(traffic: Sequence[RemovedTraffic]) -> Table:
    """Traffic of the removed experts in the profile."""
    heads = columns(
        "block; removed; chosen by some token; share of all gate weight::.2%; "
        "questions that chose one to answer::,d"
    )
    rows = [[t.block, t.n_removed, t.n_used, t.mass, t.n_questions] for t in traffic]
    return Table("What the cut touches, in the profile", heads, rows)


def touched_sentences(pruning: Pruning, traffic: Sequence[RemovedTraffic]) -> list[str]:
    """Whether other tokens use removed experts: the paper's rule looks at answer positions only."""
    n_used = [t.n_used for t in traffic if t.n_used is not None]
    if not n_used:
        return ["The profile holds no all-token statistics: whether other tokens use what goes is "
                "not known."]  # fmt: skip
    if pruning.draft.positions == "all" or not sum(n_used):
        return []
    return [
        f"{sum(n_used)} of the {sum(t.n_removed for t in traffic)} removed experts are used by "
        "other tokens of the prompts; --keep-active --tokens all would keep them."
    ]


def groups_table(profile: Profile, plan: EditPlan, built: "Built | None") -> Table:
    """One row per block: groups of several experts, the largest, and their traffic."""
    tokens_LE = profile.token_sum("tokens")
    quality = {row["layer"]: row["quality"] for row in (built.plan.proof.rows if built else ())}
    rows: list[list[Cell]] = []
    for layer, block in enumerate(profile.info.model.blocks):
        edit = plan.edits[block.name]
        groups = list((edit.merged or {}).values())
        joined = [e for members in groups for e in members if e not in edit.keep]
        share = None
        if tokens_LE is not None:
            share = float(tokens_LE[layer, joined].sum() / tokens_LE[layer].sum())
        sizes = [len(edit.keep), len(groups), max(map(len, groups), default=1)]
        rows.append([block.name, *sizes, share, quality.get(layer)])
    heads = columns(
        "block; experts; made of several; of how many at most; "
        "choices of an expert that joined another::.2%; router rows::.4f"
    )
    noun = built.scored_on.noun if built and built.scored_on else "questions that judge"
    note = (
        "router rows: 1 − Σ error² / Σ spread² of merged experts' logits against the one that "
        f"keeps their members' mass, on {noun}; 1 is exact."
    )
    return Table(f"Groups ({plan.criterion})", heads, rows, note)


def merging_sentences(profile: Profile, plan: EditPlan) -> list[str]:
    """What a merged checkpoint cannot reproduce."""
    blocks = profile.info.model.blocks
    n_joined = sum(b.experts - len(plan.edits[b.name].keep) for b in blocks)
    if not n_joined:
        return ["No expert joined another: the checkpoint is the base model again."]
    return [
        f"{n_joined} of {sum(b.experts for b in blocks)} experts joined another. Tokens that chose "
        f"two of one group now choose it once, and one expert more to make {blocks[0].top_k}."
    ]


def healing_tables(healed: "Healed") -> list[Table]:
    """Answers of the base, before and after healing, and how the questions were used."""
    scored = healed.plan.proof
    if not scored.held_out:
        return []
    first = scored.held_out[0]
    title = f"Questions that {scored.held_out_used} ({scored.held_out_split})"
    note = (
        f"Healed against {first.against}: largest |Δ log p| {first.max_abs_logprob_diff:.4f}, "
        f"median {first.median_abs_logprob_diff:.4f}."
    )
    return [_forms_table(title, scored, f"answers unlike {scored.outcomes[0].form}", note)]


def healing_facts(
    healed: "Healed", before: "PlanFile | None", checkpoint: str, margin: float
) -> list[tuple[str, str]]:
    """The cut, training and dropped data, accuracy, and the verdict against the base."""
    made = f": {before.action} of {before.model.label}, by {before.criterion}" if before else ""
    read, curve = healed.data, healed.curve
    texts = f" and {read.n_texts:,} texts" if read.n_texts else ""
    by_step = dict(curve.held_out)
    first = f"{curve.losses[0]:.4f}" if curve.losses else "?"
    text = (
        f"{healed.trained:,} weights of adapters beside {healed.parameters:,}, by "
        f"{healed.objective} on {read.n_questions:,} questions{texts}: {curve.steps} steps, the "
        f"loss from {first} to {curve.losses[-1]:.4f}; kept is step {curve.best_step}, where it "
        f"was {by_step[curve.best_step]:.4f} on {len(read.held_out)} untrained rows"
    )
    dropped = [("dropped", dropped_sentence(group)) for group in read.dropped]
    facts = [("cut", f"{checkpoint}{made}"), ("trained", text), *dropped]
    scored = healed.plan.proof
    if not scored.outcomes:
        return [*facts, ("accuracy", "the new checkpoint was not scored on any question")]
    forms = ", ".join(f"{percent(o.accuracy)} {o.form}" for o in scored.outcomes)
    n, judged = scored.outcomes[0].questions, "none, for the unedited base is not available"
    if scored.answered is not None:
        change, base = scored.answered.change, scored.answered.base
        judged = f"{verdict_text(change, n, margin, base, scored.chance)}. {change_text(change)}"
    where = f"{n:,} {scored.held_out_split} questions that {scored.held_out_used}"
    where += guessing_text({o.form: o.accuracy for o in scored.outcomes}, n, scored.chance)
    return [*facts, ("accuracy", f"{forms}, on {where}"), ("verdict", judged)]


def dropped_sentence(dropped: "Dropped") -> str:
    """How many questions or texts were dropped, which, and why."""
    named = ", ".join(dropped.names[:_NAMED])
    more = f" and {len(dropped.names) - _NAMED} more" if len(dropped.names) > _NAMED else ""
    why = f"stand in split {dropped.split}"
    if dropped.longest is not None:
        why = f"have more than {dropped.longest:,} tokens"
    return printable(
        f"{len(dropped.names)} of {dropped.total:,} of {dropped.source} {why} and were left out: "
        f"{named}{more}."
    )


def curve_table(curve: Sequence[Point]) -> Table:
    """Strength against accuracy, in the order of the search."""
    rows: list[list[Cell]] = []
    for point in curve:
        experts = ", ".join(f"{layer}:{e}" for layer, e, _ in point.biases) or None
        interval = interval_text(point.ci95)
        rows.append([point.strength, experts, point.accuracy, interval, point.questions])
    heads = columns("strength::.4g; experts; accuracy::.2%; 95 % interval; questions::,d")
    note = "Accuracy on the questions that the strength was chosen on, so the best of it flatters."
    return Table("Strength (logits) against accuracy", heads, rows, note)


def cross_fit_table(proof: "CrossFitResult") -> Table:
    """Cross-fitted, same questions and random experts side by side."""
    random = proof.random
    name = f"random experts ({random.draws} draws, {random.distinct} distinct)"
    rows: list[list[Cell]] = [
        ["cross-fitted", *change_cells(proof.cross_fitted)],
        ["chosen and scored on the same questions", *change_cells(proof.same_questions)],
        [name, f"{points(random.delta_mean)} ({span(random.range95)})", *[None] * 3],
    ]
    heads = (
        Column(f"{proof.questions:,} questions of {proof.split}"),
        *columns(f"{CHANGE}; gained; lost; McNemar p::.3g"),
    )
    note = f"Unedited accuracy {proof.base_accuracy:.2%}; p against random experts {random.p:.3g}."
    return Table(f"Proof: {proof.procedure}", heads, rows, note)


def proof_csv(proof: "CrossFitResult") -> Table:
    """One row per estimate, as shares; of random experts the range of draws."""
    random = proof.random
    compared = {"cross_fitted": proof.cross_fitted, "same_questions": proof.same_questions}
    rows: list[list[Cell]] = [
        [name, c.delta, *c.ci95, c.gained, c.lost, c.mcnemar_p, c.smallest_effect, None, None]
        for name, c in compared.items()
    ]
    drawn: list[Cell] = [random.delta_mean, *random.range95, *[None] * 4, random.draws]
    heads = columns(
        "estimate; delta; low; high; gained; lost; mcnemar_p; smallest_effect; draws; p_random"
    )
    return Table("proof", heads, [*rows, ["random", *drawn, random.p]])


def change_cells(change: stats.Comparison | None) -> list[Cell]:
    """Δ in points with its interval, gained, lost and McNemar's p; empty for the base."""
    if change is None:
        return [None] * 4
    p = change.mcnemar_p if change.gained + change.lost else None
    return [change_text(change, ""), change.gained, change.lost, p]


def interval_text(ends: Sequence[float], places: int = 2) -> str:
    """An interval in per cent."""
    return f"{ends[0]:.{places}%} … {ends[1]:.{places}%}"


def decision_tables(decision: "TuningResult") -> list[Table]:
    """The curve of the search, and the cross-fit."""
    tables = [curve_table(decision.curve)] if decision.curve else []
    return [*tables, cross_fit_table(decision.proof)] if decision.proof else tables


def decision_sentences(decision: "TuningResult") -> list[str]:
    """The choice, where its effect comes from, and the verdict."""
    questions = f"{len(decision.tuning):,} {decision.tuning.split} questions"
    first = f"No tilt that was tried beats the unedited model on {questions}."
    if decision.chosen:
        chosen = ", ".join(f"{layer}:{e} by {bias:+.4g}" for layer, e, bias in decision.chosen)
        answer, everywhere = decision.accuracy_at["answer"], decision.accuracy_at["all"]
        first = (
            f"Chosen on {questions}: {chosen} (logits). There accuracy goes from "
            f"{decision.base_accuracy:.2%} to {everywhere:.2%} with the bias at every token, and "
            f"to {answer:.2%} with it at the answer position alone."
        )
    lines = [labelled("tuned", first)]
    return [*lines, labelled("proof", decision.proof.sentence)] if decision.proof else lines


def held_out_tables(built: "Built") -> list[Table]:
    """How well biases are carried, and the held-out check."""
    tables = []
    if built.fits:
        rows: list[list[Cell]] = []
        for f in built.fits:
            at_answer = f"{f.mean_answer:.3f} ± {f.std_answer:.3f}"
            elsewhere = f"{f.mean_elsewhere:.3f} ± {f.std_elsewhere:.3f}"
            rows.append([f.layer, f.quality, f.quality_answer, at_answer, elsewhere])
        fit_heads = columns(
            "layer; fit::.4f; fit, answer positions::.4f; v·h, answer positions; v·h, elsewhere"
        )
        target = "1 at answer positions and 0 elsewhere, both weighing the same"
        noun = built.scored_on.noun if built.scored_on else "held-out questions"
        note = (
            f"fit = 1 − mean((t − v·h)²) on {noun}, where t is "
            f"{target if built.plan.apply_at == 'answer' else '1'}; 1 is a bias carried exactly."
        )
        tables.append(Table("The bias as a gate row", fit_heads, rows, note))
    if built.proof is None or built.scored_on is None:
        return tables
    tables.append(shifts_table(built.scored_on.title, built.proof.held_out))
    if built.proof.outcomes:
        title = f"Where the bias acts ({built.proof.held_out_split})"
        note = "Carried out at run time, in the unedited model, but for the last row."
        tables.append(_forms_table(title, built.proof, "flipped answers", note))
    return tables


def shifts_table(title: str, shifts: Sequence[stats.LogprobShift]) -> Table:
    """How far answers moved, one row per comparison."""
    heads = "against; largest |Δ log p|::.4f; median |Δ log p|::.4f; flipped answers::,d; questions"
    rows: list[list[Cell]] = [
        [d.against, d.max_abs_logprob_diff, d.median_abs_logprob_diff, d.flipped, d.questions]
        for d in shifts
    ]
    return Table(title, columns(f"{heads}::,d"), rows)


def _forms_table(title: str, result: stats.HeldOutResult, flipped: str, note: str) -> Table:
    rows: list[list[Cell]] = [
        [o.form, o.accuracy, o.right_logprob, o.flipped, o.questions] for o in result.outcomes
    ]
    heads = f"form; accuracy::.2%; mean log p of the right choice::.4f; {flipped}; questions"
    return Table(title, columns(heads), rows, note)


def held_out_sentences(built: "Built") -> list[str]:
    """Whether layout exact keeps untouched questions bit-equal, or why nothing was checked."""
    if built.proof is None:
        why = f": {built.why_unscored}" if built.why_unscored else ""
        return [f"The new checkpoint was not scored on any question{why}."]
    alone = built.proof.alone
    if alone is None:
        return []
    if alone.untouched == 0:
        return [
            f"Each of the {alone.questions} questions has tokens that chose a removed expert, so "
            "none must stay as it was."
        ]
    kept = "all of them" if alone.bit_equal == alone.untouched else f"{alone.bit_equal} of them"
    return [
        f"{alone.untouched} of the {alone.questions} questions have no token that chose a removed "
        f"expert; scored alone, {kept} come out bit-equal."
    ]


def adapter_sentences(built: "Built") -> list[str]:
    """That an adapter was cut too, and what was done without it."""
    plan = built.plan
    if plan.adapter is None:
        return []
    is_fitted = plan.fold in ("answer", "all") or plan.removed == "mean"
    if LAYOUTS[plan.layout].fits_biases:
        is_fitted |= any(edit.bias for edit in plan.blocks.values())
    *done, last = [
        "chosen",
        *(["what was fitted is fitted"] if is_fitted else []),
        *([f"{built.scored_on.noun.removeprefix('the ')} asked"] if built.scored_on else []),
    ]
    return [
        f"The adapter {plan.adapter.path} is cut to fit, in {built.folder / 'adapter'}; experts "
        f"were {', '.join(done)}{' and ' if done else ''}{last} without it."
    ]


def tilt_sentences(
    tilts: Sequence[RouterEdit], built: "Built | None", numbers: ExpertIds | None = None
) -> list[str]:
    """The effect of each bias, and how far routing agrees with the exact bias."""
    sentences = []
    for tilt in tilts:
        verb = "boosted" if tilt.bias > 0 else "suppressed"
        number = (numbers or ExpertIds()).number(tilt.block, tilt.expert)
        text = f"Expert {number} of layer {tilt.layer} is {verb} by {tilt.bias:+.4f} on its logit"
        text += f" ({tilt.origin})"
        fits = [] if built is None else built.fits
        if fit := next((fit for fit in fits if fit.layer == tilt.layer), None):
            mean, spread = tilt.bias * fit.mean_answer, abs(tilt.bias) * fit.std_answer
            text += f"; the checkpoint's gate row moves it by {mean:+.4f} ± {spread:.4f}"
            text += " at answer positions"
        if shares := _shares(tilt.layer, number, built):
            noun, share = shares
            text += f"; it serves {share.edited:.1%} of {noun}, before {share.base:.1%}"
            text += f", with the exact bias {share.exact:.1%}"
        sentences.append(f"{text}.")
    return sentences + [
        f"In layer {a.layer} the checkpoint chooses the very experts of the exact bias at "
        f"{a.same_answer:.1%} of answer positions ({a.overlap_answer:.1%} of the experts) and at "
        f"{a.same_all:.1%} of all tokens ({a.overlap_all:.1%})."
        for a in (built.proof.agreement if built and built.proof else ())
    ]


def scale_sentences(
    scaled: Sequence[RouterEdit], built: "Built | None", numbers: ExpertIds | None = None
) -> list[str]:
    """The effect of each gate-weight factor."""
    sentences = []
    for scaling in scaled:
        number = (numbers or ExpertIds()).number(scaling.block, scaling.expert)
        text = f"The gate weight of expert {number} of layer {scaling.layer} is multiplied by "
        text += f"{scaling.scale:g}; routing in its own layer is unchanged"
        if shares := _shares(scaling.layer, number, built):
            noun, share = shares
            text += f", and it serves {share.edited:.1%} of {noun}"
        sentences.append(f"{text}.")
    return sentences


def _shares(layer: int, expert: int, built: "Built | None") -> tuple[str, ExpertShares] | None:
    """What the questions may be called, and the share of them that an expert serves."""
    if built is None or built.proof is None or built.scored_on is None:
        return None
    return built.scored_on.noun, built.proof.share(layer, expert)
