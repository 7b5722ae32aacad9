"""One loaded model asked the same questions again and again, each time with other gates."""

import logging
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.data import Quiz
from expertcut.edits.reweight_select import Array, QuestionOutcomes
from expertcut.edits.reweight_tune import Shift
from expertcut.profiling.measure import model_info
from expertcut.profiling.recorder import Recorder
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Encoded
from expertcut.scoring.passes import OnPass
from expertcut.scoring.replay import Replay
from expertcut.scoring.router_bias import ApplyAt, Tilts, tilted

logger = logging.getLogger(__name__)
KEPT_BYTES = 2 << 30  # of what layers gave, so that runs can start at a later one


class Rescorer:
    """Log p of a quiz's choices under any shifts; what was asked once is remembered.

    The first run records what the unedited model does; later ones start at the first block that
    is tilted, with the same bits as a whole run.
    """

    def __init__(self, engine: Engine, quiz: Quiz, kept_bytes: int = KEPT_BYTES) -> None:
        self.engine = engine
        self.quiz = quiz
        self.chunks = list(engine.encode_all(quiz))
        blocks, model = engine.moe.blocks, engine.moe.model
        self.replay = Replay(model, blocks, sum(map(self._n_tokens, self.chunks)), kept_bytes)
        self.known: dict[tuple[tuple[Shift, ...], ApplyAt], Array] = {}
        self.n_runs = 0
        self.records = self._first_run()
        if not self._replays_exactly():
            logger.warning("what layers gave does not give the same bits again: all of them run")
            self.replay.forget()

    def ask(self, shifts: tuple[Shift, ...], apply_at: ApplyAt = "all") -> Array:
        """Log p (N, C) of the quiz's questions, −inf where one has fewer choices."""
        if not shifts:
            return self.records.logprob_NC
        key = (tuple(sorted(shifts)), apply_at)
        if key not in self.known:
            self.known[key] = self._run(shifts, apply_at)
            self.n_runs += 1
        return self.known[key]

    @property
    def n_cut(self) -> int | None:
        """Prompts that lost tokens on their left; None where none may."""
        return sum(c.n_cut for c in self.chunks) if self.quiz.truncate else None

    def _n_tokens(self, chunk: Encoded) -> int:
        n_all = sum(map(len, chunk.prompts))
        is_shared = self.engine.way(chunk) == "packed"
        return n_all - (len(chunk) - 1) * chunk.shared_prefix() if is_shared else n_all

    def _first_run(self) -> QuestionOutcomes:
        blocks = self.engine.moe.blocks
        scores, recorders = [], []
        with self.replay.recording():
            for chunk in self.chunks:
                recorder = Recorder(blocks, len(chunk), "answer")
                with recorder.listening():
                    scores.append(self.engine.score(chunk, recorder.begin))
                recorders.append(recorder.arrays())
        return QuestionOutcomes(
            blocks=model_info(self.engine.moe).blocks,
            subject_N=np.array([q.subject for q in self.quiz]),
            hash_N=np.array([q.overlap_hash for q in self.quiz]),
            answer_N=np.array([q.answer for q in self.quiz]),
            logprob_NC=_stacked(scores),
            alpha_NLE=np.concatenate([arrays["alpha_NLE"] for arrays in recorders]),
            chosen_NLK=np.concatenate([arrays["chosen_NLK"] for arrays in recorders]),
            selection_of=self._selection,
            line_N=np.array([q.hash_line for q in self.quiz]),
        )

    def _selection(self, layer: int) -> Array | None:
        bias_E = self.engine.moe.blocks[layer].selection_bias()
        return None if bias_E is None else np.asarray(bias_E.detach().double().cpu())

    def _run(self, shifts: tuple[Shift, ...], apply_at: ApplyAt) -> Array:
        n_experts = {b.layer: b.n_experts for b in self.engine.moe.blocks}
        biases = {s.layer: torch.zeros(n_experts[s.layer]) for s in shifts}
        for shift in shifts:
            biases[shift.layer][shift.expert] += shift.bias
        tilts = Tilts(biases, apply_at=apply_at)
        return self.changed(min(biases), tilted(self.engine.moe.blocks, tilts))

    def changed(self, layer: int, change: AbstractContextManager[OnPass]) -> Array:
        """Log p (N, C) with a change of this MoE block, and of later ones, in place."""
        with self.replay.starting_at(layer), change as begin:
            return _stacked([self.engine.score(chunk, begin) for chunk in self.chunks])

    def _replays_exactly(self) -> bool:
        """Whether the first subject comes out with the same bits from every layer that was kept."""
        first = self.records.logprob_NC[: len(self.chunks[0])]
        for layer, number in self.replay.decoder_of.items():
            if number in self.replay.starts:
                with self.replay.starting_at(layer):
                    again = _stacked([self.engine.score(self.chunks[0])])
                if not np.array_equal(again, first[:, : again.shape[1]]):
                    return False
        return True


def _stacked(scores: list[Tensor]) -> Array:
    most = max(score_NC.shape[1] for score_NC in scores)
    padded = [F.pad(s, (0, most - s.shape[1]), value=-torch.inf) for s in scores]
    stacked: Array = torch.cat(padded).numpy()
    return stacked
