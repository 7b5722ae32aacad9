"""Merged experts: the groups, and what their router rows carry."""

from typing import TYPE_CHECKING

from expertcut.edits.plan import Edit
from expertcut.profiling.storage import Profile
from expertcut.reporting.tables import Cell, Column, Table

if TYPE_CHECKING:  # with torch, which `show` does without
    from expertcut.checkpoints.build import Merged


def groups_table(profile: Profile, merged: "Merged") -> Table:
    """One row per block: how many groups of several, the largest, and what went through them."""
    tokens_LE = profile.token_sum("tokens")
    quality = {q.layer: q.quality for q in merged.qualities}
    rows: list[list[Cell]] = []
    for layer, block in enumerate(profile.info.model.blocks):
        edit = merged.draft.edits[block.name]
        groups = list((edit.merged or {}).values())
        joined = [e for members in groups for e in members if e not in edit.keep]
        share = None
        if tokens_LE is not None:
            share = float(tokens_LE[layer, joined].sum() / tokens_LE[layer].sum())
        sizes = [len(edit.keep), len(groups), max(map(len, groups), default=1)]
        rows.append([block.name, *sizes, share, quality.get(layer)])
    columns = (
        Column("block"),
        Column("experts"),
        Column("made of several"),
        Column("of how many at most"),
        Column("choices of an expert that joined another", ".2%"),
        Column("router rows", ".4f"),
    )
    proof = merged.built.proof
    noun = "questions that judge" if proof is None else proof.judged.noun
    note = (
        "router rows: 1 − Σ error² / Σ spread² of merged experts' logits against the one that "
        f"keeps their members' mass, on {noun}; 1 is exact."
    )
    return Table(f"Groups ({merged.draft.criterion})", columns, rows, note)


def merging_sentences(profile: Profile, merged: "Merged") -> list[str]:
    """What no checkpoint of this form can keep."""
    blocks = profile.info.model.blocks
    n_joined = sum(b.experts - len(merged.draft.edits[b.name].keep) for b in blocks)
    if not n_joined:
        return ["No expert joined another: the checkpoint is the base model again."]
    return [
        f"{n_joined} of {sum(b.experts for b in blocks)} experts joined another. Tokens that chose "
        f"two of one group now choose it once, and one expert more to make {blocks[0].top_k}."
    ]


def merged_text(edit: Edit) -> str | None:
    """Who joined whom: `3 ← 5, 9`."""
    groups = [
        f"{expert} ← {', '.join(str(m) for m in members if m != expert)}"
        for expert, members in (edit.merged or {}).items()
    ]
    return "; ".join(groups) or None
