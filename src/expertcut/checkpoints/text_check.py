"""What an edit does to held-out texts, read by both models; the result goes into the plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from expertcut import stats
from expertcut.checkpoints.edit import Edit, RunEdited, simulated
from expertcut.checkpoints.held_out_check import NOT_REACHED, NOT_REROUTED, reference_name
from expertcut.data.corpus import Corpus, by_document, chunk_rows, rows_to_judge
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import EditPlan, removed_experts
from expertcut.errors import ContractError
from expertcut.models.hooks import Routing, observe_routers
from expertcut.profiling.storage import Arrays
from expertcut.scoring.engine import Engine
from expertcut.scoring.next_tokens import Predictions, RowSums, predict
from expertcut.scoring.packing import EncodedRows, Pass, encode_rows
from expertcut.scoring.passes import OnPass, PassObserver, ignore
from expertcut.scoring.rerouting import ExpertCounts
from expertcut.stats import Array

KEPT_TOKENS = 64  # of the unedited model, likeliest first, at each position
_MIN_GATE_SHARE = 0.01  # of a token's gate weight; less may be lost in rounding
MIN_TOKENS = 8  # that use an expert, so that some loss must change without it
ChunkSums = Mapping[str, Sequence[Arrays]]
"""By source the sums by row of each chunk, with the predictions of a base."""
DocumentSums = Mapping[str, Mapping[str, Array]]
"""Sums by document (D,) of one form of a model, by source and name."""


class JudgedRows:
    """The rows of held-out texts in chunks, to be read by any form of a model."""

    def __init__(self, engine: Engine, corpus: Corpus) -> None:
        self.engine, self.corpus = engine, corpus
        _ = engine.projection  # tried out on tokens of its own, which nobody is to observe
        self.rows, _ = rows_to_judge(corpus, engine.moe.tokenizer)
        self.chunks = {
            name: [encode_rows(chunk) for chunk in chunk_rows(rows)]
            for name, rows in self.rows.items()
        }

    def read(
        self,
        begin: OnPass = ignore,
        base: ChunkSums | None = None,
        on_chunk: Callable[[EncodedRows], None] = ignore,
    ) -> ChunkSums:
        """Sums by row; of the model as a base with its predictions, else beside those of one."""
        found: dict[str, list[Arrays]] = {}
        for name, chunks in self.chunks.items():
            found[name] = []
            for place, chunk in enumerate(chunks):
                on_chunk(chunk)
                found[name].append(
                    self.read_chunk(chunk, begin, base[name][place] if base else None)
                )
        return found

    def read_chunk(self, chunk: EncodedRows, begin: OnPass, base: Arrays | None) -> Arrays:
        """The same of one chunk."""
        n_top = min(KEPT_TOKENS, self.engine.projection.n_logits) if base is None else 0
        base_of = None if base is None else Predictions(base)
        sums, observer = RowSums(chunk, n_top), PassObserver(begin=begin)
        for _, found in predict(self.engine, chunk, observer, n_top=n_top, base_of=base_of):
            sums.add(found)
        return sums.arrays()

    def read_base(self) -> tuple[ChunkSums, Array]:
        """Sums of the unedited model, and how many scored tokens use each expert (L, E)."""
        blocks = self.engine.moe.blocks
        n_used_LE = np.zeros((len(blocks), max(block.n_experts for block in blocks)))
        current: list[EncodedRows] = []
        is_scored_T = torch.zeros(0)

        def begin(step: Pass) -> None:
            nonlocal is_scored_T
            is_scored_T = current[-1].of_pass(step)[0] >= 0

        def see(routing: Routing) -> None:
            share_TK = routing.weights_TK.float().abs()
            counts_TK = share_TK > _MIN_GATE_SHARE * share_TK.sum(dim=-1, keepdim=True)
            counts_TK &= is_scored_T.to(counts_TK.device)[:, None]
            used_E = torch.bincount(routing.experts_TK[counts_TK].cpu(), minlength=1).numpy()
            n_used_LE[routing.layer, : len(used_E)] += used_E

        with observe_routers(blocks, see):
            return self.read(begin, on_chunk=current.append), n_used_LE

    def by_document(self, found: ChunkSums) -> dict[str, dict[str, Array]]:
        """Sums by document (D,) of each source."""
        joined = {
            name: {
                key: np.concatenate([arrays[key] for arrays in own])
                for key in own[0]
                if key.endswith("_N")
            }
            for name, own in found.items()
        }
        return by_document(self.corpus, self.rows, joined)


@dataclass(frozen=True)
class BaseTexts:
    """All that the unedited model predicts."""

    base: ChunkSums
    reference_name: str
    reference: ChunkSums | None = None  # with the edits applied at run time
    run_edited: RunEdited | None = None  # in its place: how the edited model runs as the reference
    experts_per_token: float | None = None  # the mean with the edits at run time


def score_base_texts(
    engine: Engine, corpus: Corpus, plan: EditPlan, edits: Sequence[Edit]
) -> BaseTexts:
    """Everything that needs the unedited model, so that one model is in memory at a time."""
    texts, name = JudgedRows(engine, corpus), reference_name(edits)
    base, n_used_LE = texts.read_base()
    if not name:
        return BaseTexts(base, name)
    for edit in edits:
        if run_edited := edit.reference_of_edited(engine.moe):
            return BaseTexts(base, name, run_edited=run_edited)
    most = max(len(chunk) for chunks in texts.chunks.values() for chunk in chunks)
    counts = ExpertCounts(engine.moe.blocks, most)
    with simulated(engine.moe, edits, is_as_written=False) as begin_edited, counts.listening():

        def begin(step: Pass) -> None:
            begin_edited(step)
            counts.begin(step)

        reference = texts.read(begin)
    removed = removed_experts(plan.edits, n_used_LE.shape[1])
    n_hit = sum(n_used_LE[b.layer, list(removed.get(b.name, ()))].sum() for b in engine.moe.blocks)
    must_change = not LAYOUTS[plan.layout].keeps_rows and n_hit >= MIN_TOKENS
    is_rerouted = plan.routing is not None and counts.per_token != engine.moe.blocks[0].top_k
    if (must_change or is_rerouted) and _are_equal(base, reference):
        raise ContractError((NOT_REROUTED if is_rerouted else NOT_REACHED).format(name))
    return BaseTexts(base, name, reference, experts_per_token=counts.per_token)


def _are_equal(a: ChunkSums, b: ChunkSums) -> bool:
    pairs = ((x, y) for name in a for x, y in zip(a[name], b[name], strict=True))
    return all(np.array_equal(x["loss_N"], y["loss_N"]) for x, y in pairs)


def score_edited_texts(engine: Engine, corpus: Corpus, before: BaseTexts) -> stats.HeldOutResult:
    """The checkpoint compared with the unedited model, as it is and with the plan at run time."""
    texts, reference = JudgedRows(engine, corpus), before.reference
    if before.run_edited is not None:
        with before.run_edited(engine.moe.blocks):
            reference = texts.read()
    changes: list[stats.TextChange] = []
    named = {"the unedited base": before.base, before.reference_name: reference}
    for name, base in named.items():
        if base is not None:
            pairs = (texts.by_document(base), texts.by_document(texts.read(base=base)))
            changes += [_change(name, source, *(own[source] for own in pairs)) for source in base]
    has_bounds = int(engine.moe.model.config.get_text_config().vocab_size) > KEPT_TOKENS
    return stats.HeldOutResult(
        held_out_split=corpus.split,
        held_out_hashes=tuple(sorted(document.hash_line for document in corpus)),
        text=tuple(change.model_copy(update={"has_bounds": has_bounds}) for change in changes),
    )


def _change(
    against: str, source: str, base: Mapping[str, Array], edited: Mapping[str, Array]
) -> stats.TextChange:
    scored_D, lost_D = base["scored"], edited["loss"] - base["loss"]
    n = scored_D.sum()
    return stats.TextChange(
        against=against,
        source=source,
        documents=len(scored_D),
        tokens=int(n),
        perplexity=float(np.exp(edited["loss"].sum() / n)),
        base_perplexity=float(np.exp(base["loss"].sum() / n)),
        kl=max(0.0, float(edited["kl"].sum() / n)),  # rounding may leave less than nothing
        top1_agreement=float(edited["agrees"].sum() / n),
        acceptance=float(edited["accepted"].sum() / n),
        delta_loss=float(lost_D.sum() / n),
        ci95=stats.document_ci95(lost_D, scored_D),
    )
