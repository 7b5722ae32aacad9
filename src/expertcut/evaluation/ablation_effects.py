"""The effect of one expert on held-out questions or texts, replayed from its layer."""

import hashlib
import logging
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from expertcut import stats
from expertcut.checkpoints.held_out_check import NOT_REACHED
from expertcut.checkpoints.text_check import KEPT_TOKENS, MIN_TOKENS, JudgedRows
from expertcut.data import Quiz
from expertcut.data.corpus import CalibrationSet, Corpus
from expertcut.edits.reweight_select import right
from expertcut.errors import ContractError
from expertcut.evaluation import search_results as schema
from expertcut.evaluation.reweight_search import CachedScorer
from expertcut.evaluation.sweep_judges import compared, pooled, within_context
from expertcut.evaluation.text_eval import judged_texts
from expertcut.scoring.engine import Engine
from expertcut.scoring.passes import OnPass, Replay, ignore
from expertcut.stats import Array

logger = logging.getLogger(__name__)

KEPT_BYTES = 2 << 30  # of layer outputs
_MIN_GATE_SHARE = 0.01  # of a gate weight; less may be lost in rounding
Change = AbstractContextManager[OnPass]


class Ablations(Protocol):
    """The unedited model on what is held out, and the same without one expert."""

    def unedited(self) -> dict[str, Any]:
        """The fields of an audit that the unedited model gives."""

    def effect(
        self, expert: schema.SampledExpert, change: Change, *, is_masked: bool
    ) -> schema.Effect:
        """What the change does; a ContractError if it must change something and did not.

        `is_masked` says that the expert's tokens go to others.
        """


def ablations_of(engine: Engine, data: CalibrationSet) -> Ablations:
    """The runs of a model that is loaded, of which the first is the unedited one."""
    return TextAblations(engine, data) if isinstance(data, Corpus) else QuizAblations(engine, data)


def request_of(engine: Engine, data: CalibrationSet) -> dict[str, Any]:
    """What the request of an audit says of the questions or texts."""
    found = {"quiz": data.id, "questions": len(data), "split": data.split}
    if isinstance(data, Corpus):
        corpus = within_context(data, engine.moe)
        vocabulary = int(engine.moe.model.config.get_text_config().vocab_size)
        text = judged_texts(corpus, min(KEPT_TOKENS, vocabulary), vocabulary, {})
        content = "\n".join(document.content_hash for document in data)
        found |= {"shots": 0, "text": text}
    else:
        content = "\n".join(f"{q.content_hash} {q.answer}" for q in data)
        found |= {"shots": data.shots, "truncate": data.truncate}
    return found | {"asked": hashlib.sha256(content.encode()).hexdigest()}


class QuizAblations:
    """Answers to a quiz."""

    def __init__(self, engine: Engine, quiz: Quiz) -> None:
        self.scorer = CachedScorer(engine, quiz, KEPT_BYTES)

    def unedited(self) -> dict[str, Any]:
        """Accuracy, and log p of the right answers."""
        base = self.scorer.records
        return {
            "cut": self.scorer.n_cut,
            "accuracy": float(base.is_correct_N.mean()),
            "right_logprob": float(_right(base.logprob_NC, base.answer_N).mean()),
        }

    def effect(
        self, expert: schema.SampledExpert, change: Change, *, is_masked: bool
    ) -> schema.AblationEffect:
        """Log p without one expert, compared with the unedited model."""
        base = self.scorer.records
        logprob_NC = self.scorer.changed(expert.layer, change)
        is_chosen_N = (base.chosen_NLK[:, expert.layer] == expert.row).any(axis=1)
        if is_masked and is_chosen_N.any() and np.array_equal(base.logprob_NC, logprob_NC):
            # Some answer must change where the expert has a gate weight that counts.
            alpha_NE = base.alpha_NLE[is_chosen_N, expert.layer]
            if (alpha_NE[:, expert.row] > _MIN_GATE_SHARE * alpha_NE.sum(axis=1)).any():
                raise _not_reached(expert)
        lost_N = _right(base.logprob_NC, base.answer_N) - _right(logprob_NC, base.answer_N)
        gained, lost = stats.gained_lost(base.is_correct_N, right(logprob_NC, base.answer_N))
        n = len(lost_N)
        return schema.AblationEffect(
            layer=expert.layer,
            expert=expert.expert,
            logprob=float(lost_N.mean()),
            stderr=float(lost_N.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
            accuracy=(lost - gained) / n,
            gained=gained,
            lost=lost,
            mcnemar_p=stats.mcnemar(gained, lost),
            largest=stats.logprob_shift(base.logprob_NC, logprob_NC)[0],
        )


class TextAblations:
    """Losses of next tokens, replayed from the layer that changes."""

    def __init__(self, engine: Engine, corpus: Corpus, kept_bytes: int = KEPT_BYTES) -> None:
        self.texts = JudgedRows(engine, within_context(corpus, engine.moe))
        blocks, model = engine.moe.blocks, engine.moe.model
        n_tokens = sum(len(row.ids) for rows in self.texts.rows.values() for row in rows)
        self.replay = Replay(model, blocks, n_tokens, kept_bytes)
        with self.replay.recording():
            self.first, self.n_used_LE = self.texts.read_base()
        self.base = self.texts.by_document(self.first)
        if not self._replays_exactly():
            logger.warning("replay does not reproduce the same bits: every run starts at layer 0")
            self.replay.starts, self.replay.outputs = (), {}

    def _replays_exactly(self) -> bool:
        """Whether the first chunk has the same losses from every kept layer."""
        name = next(iter(self.first))
        chunk, known = self.texts.chunks[name][0], self.first[name][0]
        for layer, number in self.replay.decoder_of.items():
            if number in self.replay.starts:
                with self.replay.starting_at(layer):
                    again = self.texts.read_chunk(chunk, ignore, known)
                if not np.array_equal(again["loss_N"], known["loss_N"]):
                    return False
        return True

    def unedited(self) -> dict[str, Any]:
        """Next-token accuracy, and log p of next tokens."""
        base = pooled(self.base)
        n = base["scored"].sum()
        return {
            "accuracy": float(base["right"].sum() / n),
            "right_logprob": float(-base["loss"].sum() / n),
        }

    def effect(
        self, expert: schema.SampledExpert, change: Change, *, is_masked: bool
    ) -> schema.TextEffect:
        """Losses without one expert, compared with the unedited model by documents."""
        with self.replay.starting_at(expert.layer), change as begin:
            sums = self.texts.by_document(self.texts.read(begin, self.first))
        base, other = pooled(self.base), pooled(sums)
        is_used = self.n_used_LE[expert.layer, expert.row] >= MIN_TOKENS
        if is_masked and is_used and np.array_equal(base["loss"], other["loss"]):
            raise _not_reached(expert)
        lost_D, scored_D = other["loss"] - base["loss"], base["scored"]
        return schema.TextEffect(
            layer=expert.layer,
            expert=expert.expert,
            logprob=float(lost_D.sum() / scored_D.sum()),
            stderr=ratio_stderr(lost_D, scored_D),
            accuracy=float((base["right"] - other["right"]).sum() / scored_D.sum()),
            text={name: compared(self.base[name], own) for name, own in sums.items()},
        )


def ratio_stderr(sum_D: Array, weight_D: Array) -> float:
    """Standard error of Σ sum / Σ weight over D documents, linearised; 0 of a single one."""
    n, total = len(sum_D), weight_D.sum()
    if n < 2:
        return 0.0
    rest_D = sum_D - sum_D.sum() / total * weight_D
    return float(np.sqrt(n / (n - 1) * (rest_D**2).sum()) / total)


def _not_reached(expert: schema.SampledExpert) -> ContractError:
    return ContractError(NOT_REACHED.format(f"without expert {expert.layer}:{expert.expert}"))


def _right(logprob_NC: Array, answer_N: Array) -> Array:
    return np.asarray(stats.right_logprobs(logprob_NC, answer_N), np.float64)
