"""A profile as the paper's Tables 1 to 7 (arXiv 2502.17187)."""

import math
from pathlib import Path

from expertcut.profiling.statistics import (
    Answers,
    LayerStatistics,
    expert_json,
    layer_statistics,
    near_ties,
)
from expertcut.profiling.storage import Profile
from expertcut.reporting.tables import Column, Table

MIN_APPEARANCES = 0.01  # the paper's tables list experts that appear in at least 1 % of questions
_COUNTED = "Layers are MoE layers, counted from 0."

_LAYER = Column("layer")
_EXPERT_COLUMNS = (
    Column("expert"),
    Column("appearances", ".1%"),
    Column("accuracy", ".1%"),
    Column("weighted accuracy", ".1%"),
    Column("contribution, %", ".2f"),
    Column("tokens", ",d"),
)


def answered_sentence(folder: Path, found: Answers) -> str:
    """What a profile was made of, and how the model did."""
    asked = f"{len(found.answer_N):,} questions, accuracy {found.accuracy:.2%}"
    return f"{folder}: {asked}{cut_text(found.n_cut)}"


def cut_text(n_cut: int | None) -> str:
    """How many prompts were cut, as the end of a sentence; nothing where none may be."""
    return "" if n_cut is None else f", {n_cut:,} prompts cut from the left to fit the context"


def profile_tables(profile: Profile, layers: list[LayerStatistics] | None = None) -> list[Table]:
    """Tables 1–2, 3, 4, 5 and 6–7, in the paper's order, of `layers` where they are known."""
    layers = layers or layer_statistics(profile)
    return [
        _activated(profile, layers),
        _ranks(layers[-1]),
        *[_experts(layers[i]) for i in dict.fromkeys((0, len(layers) - 1))],
        _entropy_all(layers),
    ]


def _activated(profile: Profile, layers: list[LayerStatistics]) -> Table:
    quiz = profile.info.quiz
    ties = near_ties(profile, profile.subjects())
    own = sum(not tie["in_shots"] for tie in ties)
    n_questions = len(profile.array("answer_N"))
    note = (
        f"{n_questions:,} {quiz.split} questions of {quiz.id} at {quiz.shots} shots"
        f"{cut_text(profile.n_cut)}. {_COUNTED} "
        f"Near-ties: {own:,} questions have a token of their own whose choice of experts hangs "
        f"on a gap below 1e-5, {len(ties) - own:,} more have one in their shots."
        f"{hash_text(profile)}"
    )
    rows = [
        [
            layer.layer,
            layer.n_activated,
            layer.n_experts,
            float(layer.entropy_top_N.mean()),
            float(layer.entropy_top_N.std()),
            math.log(layer.top_k),
        ]
        for layer in layers
    ]
    columns = (
        _LAYER,
        Column("activated experts"),
        Column("of"),
        Column("entropy, mean", ".4f"),
        Column("entropy, std", ".4f"),
        Column("at most", ".4f"),
    )
    top_k = layers[0].top_k
    return Table(f"Tables 1–2: activated experts, entropy of the top {top_k}", columns, rows, note)


def hash_text(profile: Profile) -> str:
    """Which layers choose experts by a table of token ids, as a sentence; nothing where none do."""
    layers = [i for i, block in enumerate(profile.info.model.blocks) if block.is_hashed]
    if not layers:
        return ""
    return (
        f" Hash-routed: layers {', '.join(map(str, layers))} choose their experts by a table of "
        "token ids; they are measured, and none of their experts can be removed or boosted."
    )


def _ranks(layer: LayerStatistics) -> Table:
    mean_K, std_K = layer.rank_probability_NK.mean(axis=0), layer.rank_probability_NK.std(axis=0)
    rows = [[k + 1, float(mean_K[k]), float(std_K[k])] for k in range(layer.top_k)]
    columns = (Column("rank"), Column("mean", ".4f"), Column("std", ".4f"))
    title = f"Table 3: normalised probability of each rank in the last layer ({layer.layer})"
    return Table(title, columns, rows)


def _experts(layer: LayerStatistics) -> Table:
    rows = [
        list(expert_json(layer, expert).values())
        for expert in range(layer.n_experts)
        if layer.appearances_E[expert] >= MIN_APPEARANCES
    ]
    number, which = ("4", "first") if layer.layer == 0 else ("5", "last")
    title = (
        f"Table {number}: experts of the {which} layer ({layer.layer}) in at least 1 % of questions"
    )
    return Table(title, _EXPERT_COLUMNS, rows, "Tokens count every prompt token, shots included.")


def _entropy_all(layers: list[LayerStatistics]) -> Table:
    rows = [
        [
            layer.layer,
            float(layer.entropy_all_N.mean()),
            float(layer.entropy_all_N.std()),
            math.log(layer.n_experts),
        ]
        for layer in layers
    ]
    columns = (
        _LAYER,
        Column("entropy, mean", ".4f"),
        Column("entropy, std", ".4f"),
        Column("at most", ".4f"),
    )
    return Table("Tables 6–7: entropy over all experts", columns, rows, _COUNTED)
