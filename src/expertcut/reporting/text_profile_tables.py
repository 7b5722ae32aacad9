"""A profile of texts as tables: its sources, its experts, the paper's tables over all tokens."""

import math
from collections.abc import Sequence

from expertcut.profiling.schema import TextInfo
from expertcut.profiling.statistics import TextLayer, TextScore, text_experts
from expertcut.profiling.storage import Profile, TextProfile
from expertcut.reporting.edit_tables import interval_text, rows_tables
from expertcut.reporting.profile_tables import (
    ENTROPY_HEADS,
    FROM_0,
    gate_text,
    hashed_note,
    next_commands,
    ranked_contributions,
)
from expertcut.reporting.tables import Cell, Column, Table, columns, labelled

MIN_TOKENS = 0.01  # the paper's tables list experts in at least 1 % of questions: here, of tokens
_KINDS = ("top", "all")
_OVER_DOCUMENTS = (
    "Intervals: 95 %, a bootstrap over documents; none below 10 of them. Experts have none: their "
    "sums are not kept by document, and tokens of one document depend on each other."
)


def texts_line(text: TextInfo) -> str:
    """How much was read, and of what."""
    shares = ", ".join(
        f"{name} {100 * source.tokens / text.n_tokens:.0f} %"
        for name, source in text.sources.items()
    )
    whose = " of the assistant" if text.assistant_only else ""
    of = shares if len(text.sources) > 1 else next(iter(text.sources))
    return f"{text.n_tokens:,} tokens{whose} in {text.n_documents:,} documents: {of}"


def profile_facts(profile: Profile) -> list[tuple[str, str]]:
    """The headline of a profile of texts."""
    assert isinstance(profile, TextProfile), "a quiz has another headline"
    facts = [("text", texts_line(profile.info.text))]
    if profile.info.text.has_loss:
        facts.append(("predicts", score_text(profile.score)))
    return facts


def score_text(score: TextScore) -> str:
    """Perplexity and accuracy with their intervals over documents, where there are enough."""
    if not score.scored:
        return "nothing: no document has two tokens that count, so no next token is scored"
    text, right = f"perplexity {score.perplexity:.3f}", f"{score.accuracy:.2%}"
    if score.perplexity_ci95 is not None and score.accuracy_ci95 is not None:
        low, high = score.perplexity_ci95
        text += f" ({low:.3f} … {high:.3f})"
        right += f" ({interval_text(score.accuracy_ci95)})"
    return f"{text}, next token right {right} of {score.scored:,}"


def expert_facts(profile: TextProfile) -> list[tuple[str, str]]:
    """Experts by their part in the output, and the gate."""
    layers = profile.layers
    is_of_routes = layers[0].moments_2X is None
    n_experts, n_used = sum(x.n_experts for x in layers), sum(x.n_activated for x in layers)
    sums = [x.over_tokens.weighted_norm_E for x in layers]
    if is_of_routes:
        sums = [x.over_tokens.tokens_E for x in layers]
    listed = ranked_contributions(profile, sums)
    what = "choices" if is_of_routes else "gate weight·‖f(x)‖"
    where = f"in {len(layers)} layers of {profile.info.model.label}"
    facts = [
        ("experts", f"{n_used:,} of {n_experts:,} are chosen by any token, {where}"),
        ("most", f"{', '.join(listed[:5])} of the {what} of their layers"),
        ("least", f"{', '.join(listed[:-6:-1])}, of experts that are chosen at all"),
    ]
    if is_of_routes:
        return facts
    numbers = [layer.routing_json() for layer in layers]
    flat_L = [
        found["entropy_all_mean"] / math.log(max(layer.n_experts, 2))
        for found, layer in zip(numbers, layers, strict=True)
    ]
    return [*facts, ("gate", gate_text(flat_L))]


def headline(profile: TextProfile) -> list[str]:
    """All facts, with the profile's folder and what to do next."""
    (_, text), *others = profile_facts(profile)
    facts = [("profile", f"{profile.path}: {text}"), *others, *expert_facts(profile)]
    lines = next_commands(profile, next_criterion(profile))
    return [*(labelled(*fact) for fact in facts), *lines]


def next_criterion(profile: Profile) -> tuple[str, ...]:
    """The criterion of the command that is suggested: of routes the default, which counts."""
    return () if profile.info.settings.stats == "routes" else ("--by", "reap")


def sources_table(profile: TextProfile) -> Table:
    """One row per source."""
    info, rows = profile.info.text, []
    for name, known in info.sources.items():
        row: list[Cell] = [name, known.documents, known.tokens]
        if score := profile.scores.get(name):
            low, high = score.perplexity_ci95 or (None, None)
            right = score.accuracy_ci95
            row += [score.perplexity, low, high, score.accuracy]
            row.append(None if right is None else interval_text(right))
        rows.append(row)
    heads = "source; documents::,d; tokens::,d"
    if info.has_loss:
        heads += "; perplexity::.3f; low::.3f; high::.3f; next token right::.2%; 95 % interval"
    note = f"{texts_line(info)}. {_OVER_DOCUMENTS if info.has_loss else ''}".strip()
    return Table("Texts", columns(heads), rows, note)


def text_tables(profile: TextProfile) -> list[Table]:
    """The sources, and Tables 1 to 7 of the paper over all tokens instead of answers."""
    layers = profile.layers
    experts = [_expert_table(layers[i]) for i in dict.fromkeys((0, len(layers) - 1))]
    if layers[0].moments_2X is None:
        counts_L = [(layer.layer, layer.n_activated, layer.n_experts) for layer in layers]
        heads = columns("layer; activated experts; of")
        chosen = Table("Table 1: activated experts", heads, counts_L, f"Of routes. {FROM_0}")
        return [sources_table(profile), chosen, *experts, *rows_tables(profile)]
    numbers = [layer.routing_json() for layer in layers]
    last, top_k = layers[-1], layers[0].top_k
    activated: list[Sequence[Cell]] = []
    entropies: list[Sequence[Cell]] = []
    for layer, found in zip(layers, numbers, strict=True):
        top, every = ([found[f"entropy_{of}_{kind}"] for kind in ("mean", "std")] for of in _KINDS)
        counts = (layer.layer, layer.n_activated, layer.n_experts)
        activated.append([*counts, *top, math.log(layer.top_k)])
        entropies.append([layer.layer, *every, math.log(layer.n_experts)])
    pairs = zip(*(numbers[-1][f"rank_probability_{k}"] for k in ("mean", "std")), strict=True)
    ranks = [[rank, *pair] for rank, pair in enumerate(pairs, start=1)]
    heads = columns(f"layer; activated experts; of; {ENTROPY_HEADS}")
    title = f"Table 3: normalised probability of each rank in the last layer ({last.layer})"
    note = f"Over all tokens that count. {FROM_0}{hashed_note(profile)}"
    return [
        sources_table(profile),
        Table(f"Tables 1–2: activated experts, entropy of the top {top_k}", heads, activated, note),
        Table(title, columns("rank; mean::.4f; std::.4f"), ranks),
        *experts,
        Table(
            "Tables 6–7: entropy over all experts",
            columns(f"layer; {ENTROPY_HEADS}"),
            entropies,
            FROM_0,
        ),
        *rows_tables(profile),
    ]


def _expert_table(layer: TextLayer) -> Table:
    n_tokens = max(layer.n_tokens, 1)
    rows = [
        [*list(row.values())[:2], row["tokens"] / n_tokens, *list(row.values())[2:]]
        for row in text_experts(layer)
        if row["tokens"] >= MIN_TOKENS * n_tokens
    ]
    heads = "expert; tokens::,d; share::.1%"
    if layer.next is not None:
        heads += "; next token right::.1%; weighted accuracy::.1%; mean loss::.3f"
    which = "4: experts of the first" if layer.layer == 0 else "5: experts of the last"
    title = f"Table {which} layer ({layer.layer}) at 1 % of the tokens or more"
    note = "The share of the tokens that chose the expert; the others over those of its tokens "
    note += "whose next token is scored: Σα·1(ŷ = y)/Σα is the paper's weighted accuracy."
    return Table(title, columns(heads), rows, note)


def text_experts_csv(profile: TextProfile) -> Table:
    """Every expert of every layer, one row each, for a data frame."""
    rows = [
        {"layer": layer.layer, "block": layer.block, **row}
        for layer in profile.layers
        for row in text_experts(layer)
    ]
    return Table("experts", tuple(map(Column, rows[0])), [list(row.values()) for row in rows])
