"""What an edit does to held-out texts, read by both models; the result goes into the plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from expertcut import stats
from expertcut.checkpoints.edit import Edit, RunEdited, simulated
from expertcut.checkpoints.held_out_check import NOT_REACHED, reference_name
from expertcut.data.corpus import Corpus, Row, chunk_rows, rows_to_judge
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, EditPlan
from expertcut.errors import ContractError
from expertcut.models.hooks import Routing, observe_routers
from expertcut.scoring.engine import Engine
from expertcut.scoring.next_tokens import NextTokens, predict
from expertcut.scoring.packing import Pass, encode_rows
from expertcut.scoring.passes import OnPass, PassObserver, ignore
from expertcut.scoring.projection import TopLogprobs
from expertcut.stats import Array

KEPT_TOKENS = 128  # of the base, likeliest first, at each position
_MIN_GATE_SHARE = 0.01  # of a token's gate weight; less may be lost in rounding


class TextScores:
    """Loss of every scored token (M,) of a corpus, by source; with a `base`, the distance from it.

    The kept tokens of a base take some 1.5 kB a token.
    """

    def __init__(
        self,
        engine: Engine,
        corpus: Corpus,
        base: "TextScores | None" = None,
        on_pass: OnPass = ignore,
        *,
        is_base: bool = False,
        edits: Mapping[str, BlockEdit] | None = None,
    ) -> None:
        self.engine, self.on_pass = engine, on_pass
        self.found: dict[str, list[NextTokens]] = {}
        self._tops: dict[str, TopLogprobs] = {}
        self.rows, _ = rows_to_judge(corpus, engine.moe.tokenizer)
        self.depends_on_removed = False
        blocks = engine.moe.blocks
        removed = {b.layer: edits[b.name].removed(b.n_experts) for b in blocks} if edits else {}
        self._removed = {layer: gone for layer, gone in removed.items() if gone}
        with observe_routers([b for b in blocks if b.layer in self._removed], self._see):
            for name, rows in self.rows.items():
                self.found[name] = list(self._read(name, rows, base, is_base=is_base))

    def _read(
        self, name: str, rows: Sequence[Row], base: "TextScores | None", *, is_base: bool
    ) -> Iterator[NextTokens]:
        done = 0  # scored tokens of earlier chunks
        for chunk in chunk_rows(rows):
            encoded = encode_rows(chunk)
            n_scored_N = np.array([int((row.next_T >= 0).sum()) for row in chunk])
            begins_N = done + np.concatenate([[0], n_scored_N.cumsum()])
            done = int(begins_N[-1])

            def base_of(row_M: torch.Tensor, begins_N: Array = begins_N) -> TopLogprobs:
                assert base is not None, "only then it is asked"
                first, last = int(row_M.min()), int(row_M.max())
                return base.top(name)[slice(int(begins_N[first]), int(begins_N[last + 1]))]

            observer = PassObserver(begin=self._begin)
            passes = predict(
                self.engine,
                encoded,
                observer,
                n_top=KEPT_TOKENS if is_base else 0,
                base_of=None if base is None else base_of,
            )
            for _, found in passes:
                yield found

    def top(self, name: str) -> TopLogprobs:
        """The likeliest tokens (M, R) at all scored positions of a source."""
        if name not in self._tops:
            kept = [found.top for found in self.found[name] if found.top is not None]
            self._tops[name] = TopLogprobs(
                torch.cat([top.ids_MR for top in kept]), torch.cat([t.logprob_MR for t in kept])
            )
        return self._tops[name]

    def _begin(self, step: Pass) -> None:
        self._step = step
        self.on_pass(step)

    def _see(self, routing: Routing) -> None:
        gone = self._removed[routing.layer]
        is_removed_TK = torch.isin(routing.experts_TK, routing.experts_TK.new_tensor(gone))
        share_TK = routing.weights_TK.float().abs()
        share_TK = share_TK / share_TK.sum(dim=-1, keepdim=True)
        counts_T = (is_removed_TK & (share_TK > _MIN_GATE_SHARE)).any(dim=1).cpu()
        own = slice(None) if self._step.valid_T is None else self._step.valid_T
        # The last token of a row may predict nothing.
        self.depends_on_removed |= int(counts_T[own].sum()) > len(self._step.questions)

    def loss_M(self, name: str) -> torch.Tensor:
        """−log p (M,) float64 of every scored token of a source."""
        return torch.cat([found.loss_M for found in self.found[name]]).double()

    def equals(self, other: "TextScores") -> bool:
        """Whether no loss differs by a bit."""
        return all(torch.equal(self.loss_M(name), other.loss_M(name)) for name in self.found)

    def change(self, name: str, base: "TextScores", against: str) -> stats.TextChange:
        """This model beside the base that it was compared with."""
        own_M, base_M = self.loss_M(name), base.loss_M(name)
        changes = [found.change for found in self.found[name] if found.change is not None]
        kl_M, agrees_M, shared_M = (
            torch.cat([getattr(c, field) for c in changes]).double()
            for field in ("kl_M", "agrees_M", "acceptance_M")
        )
        places: dict[int, int] = {}  # of documents in turn: draws must not depend on addresses
        of_document_N = [places.setdefault(id(r.document), len(places)) for r in self.rows[name]]
        n_scored_N = [int((row.next_T >= 0).sum()) for row in self.rows[name]]
        of_document_M = np.repeat(of_document_N, n_scored_N)
        delta_D = np.bincount(of_document_M, (own_M - base_M).numpy())
        weight_D = np.bincount(of_document_M)
        return stats.TextChange(
            against=against,
            source=name,
            documents=len(places),
            tokens=len(own_M),
            perplexity=float(own_M.mean().exp()),
            base_perplexity=float(base_M.mean().exp()),
            kl=max(0.0, float(kl_M.mean())),  # rounding may leave less than nothing
            top1_agreement=float(agrees_M.mean()),
            acceptance=float(shared_M.mean()),
            delta_loss=float((own_M - base_M).mean()),
            ci95=stats.bootstrap_ci95(delta_D, weight_D),
        )


@dataclass(frozen=True)
class BaseTextScores:
    """All that the unedited model predicts."""

    base: TextScores
    reference_name: str
    reference: TextScores | None = None  # with the edits applied at run time
    run_edited: RunEdited | None = None  # in its place: how the edited model runs as the reference


def score_base_texts(
    engine: Engine, corpus: Corpus, plan: EditPlan, edits: Sequence[Edit]
) -> BaseTextScores:
    """Everything that needs the unedited model, so that one model is in memory at a time."""
    base, name = TextScores(engine, corpus, is_base=True, edits=plan.edits), reference_name(edits)
    for edit in edits:
        if run_edited := edit.reference_of_edited(engine.moe):
            return BaseTextScores(base, name, run_edited=run_edited)
    with simulated(engine.moe, edits, is_as_written=False) as begin:
        reference = TextScores(engine, corpus, base, begin, is_base=True)
    must_change = not LAYOUTS[plan.layout].keeps_rows and base.depends_on_removed
    if must_change and base.equals(reference):
        raise ContractError(NOT_REACHED.format(name))
    return BaseTextScores(base, name, reference)


def score_edited_texts(
    engine: Engine, corpus: Corpus, before: BaseTextScores
) -> stats.HeldOutResult:
    """The checkpoint compared with the unedited model, as it is and with the plan at run time."""
    against = [(before.base, "the unedited base")]
    if before.run_edited is not None:
        with before.run_edited(engine.moe.blocks):
            against.append((TextScores(engine, corpus, is_base=True), before.reference_name))
    elif before.reference is not None:
        against.append((before.reference, before.reference_name))
    changes = []
    for base, name in against:
        edited = TextScores(engine, corpus, base)
        changes += [edited.change(source, base, name) for source in edited.found]
    return stats.HeldOutResult(
        held_out_split=corpus.split,
        held_out_hashes=tuple(sorted(document.hash_line for document in corpus)),
        text=tuple(changes),
    )
