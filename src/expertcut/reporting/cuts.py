"""What `prune` says before it writes: who stays, and what goes with those that do not."""

import logging
from collections.abc import Sequence

from expertcut.edits.plan import ExpertIds, expert_ids, ids_text
from expertcut.edits.prune import Pruning, RemovedTraffic
from expertcut.errors import ProfileError
from expertcut.profiling.storage import Profile
from expertcut.reporting.tables import Cell, Column, Table

logger = logging.getLogger(__name__)

_WHY = " to make one count for all layers"


def pruning_sentences(pruning: Pruning) -> list[str]:
    """What stays and what goes, per block, and the idle experts that stay."""
    sentences, numbers = [], pruning.draft.numbers or ExpertIds()
    for name, edit in pruning.draft.edits.items():
        fillers = ids_text(numbers.kept(name, pruning.fillers[name]))
        text = f"{name}: keeps {len(edit.keep)} experts, {pruning.n_active[name]} were active"
        if fillers:
            why = "" if pruning.draft.criterion != "activations" else _WHY
            text += f"; never activated but kept{why}: {fillers}"
        if spared := ids_text(numbers.kept(name, pruning.spared.get(name, ()))):
            text += f"; stay only because they are protected: {spared}"
        sentences.append(f"{text}.")
    return sentences


def rows_tables(profile: Profile) -> list[Table]:
    """What the experts of a model that was cut before were called, for its tables count rows.

    Where the model is not there, that is logged.
    """
    try:
        numbers = expert_ids(profile)
    except ProfileError as error:
        logger.warning("the tables call experts by rows of the routers: %s", error)
        return []
    rows: list[list[Cell]] = [
        [layer, ids_text(numbers.rows[block.name])]
        for layer, block in enumerate(profile.info.model.blocks)
        if block.name in numbers.rows
    ]
    note = "The tables above count rows from 0; --boost, --suppress and --scale take the numbers."
    columns = (Column("layer"), Column("numbers of its rows, in order"))
    title = "This model was cut before: its experts' numbers"
    return [Table(title, columns, rows, note)] if rows else []


def touched_table(found: Sequence[RemovedTraffic]) -> Table:
    """How much of what was profiled went through the experts that go."""
    rows: list[list[Cell]] = [
        [t.block, t.n_removed, t.n_used, t.mass, t.n_questions] for t in found
    ]
    columns = (
        Column("block"),
        Column("removed"),
        Column("chosen by some token"),
        Column("share of all gate weight", ".2%"),
        Column("questions that chose one to answer", ",d"),
    )
    return Table("What the cut touches, in the profile", columns, rows)


def touched_sentences(pruning: Pruning, found: Sequence[RemovedTraffic]) -> list[str]:
    """Whether other tokens use what goes: the paper's rule looks at the answer position alone."""
    n_used = [t.n_used for t in found if t.n_used is not None]
    if not n_used:
        return ["The profile holds no all-token statistics: whether other tokens use what goes is "
                "not known."]  # fmt: skip
    if pruning.draft.positions == "all" or not sum(n_used):
        return []
    return [
        f"{sum(n_used)} of the {sum(t.n_removed for t in found)} removed experts are used by other "
        "tokens of the prompts; --keep-active --positions all would keep them."
    ]
