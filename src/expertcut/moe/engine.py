"""The scoring engine: log-probabilities of a chunk's choices, no token run twice, none a pad.

Three ways, one result (within 1e-4 in float32):

    packed  the shared prefix once, its KV cache read by all questions, packed in rows
    padded  right-padded rows without sharing: sliding windows, recurrent layers
    single  one prompt at a time: a RoPE that depends on the prompt's length, or a failed check
"""

import logging
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.data import Question, Quiz
from expertcut.moe.context import Context
from expertcut.moe.gate_laws import check_gate, verifying
from expertcut.moe.kernels import attention
from expertcut.moe.kernels.last_block import last_decoder_layer
from expertcut.moe.loading import MoeModel
from expertcut.moe.loading.checks.tokenizer import check_ids
from expertcut.moe.nonfinite import first_unanswered, not_finite
from expertcut.moe.packing import Encoded, encode
from expertcut.moe.passes import Attention, How, OnPass, Run, Watch, ignore
from expertcut.moe.ways import Way, suitable_way

logger = logging.getLogger(__name__)

CHECKED_QUESTIONS = 4


class Engine:
    """Scores chunks of one model; `is_trusted` and `attention` are found by `check`."""

    def __init__(self, moe: MoeModel, batch_tokens: int) -> None:
        self.moe = moe
        self.batch_tokens = batch_tokens
        self.context = Context(moe)
        self.is_trusted = True
        is_split = attention.is_there(moe.model, moe.device)
        self.attention: Attention = "split" if is_split else "masked"
        self.last_layer = last_decoder_layer(moe.model, moe.blocks)

    def encode(self, quiz: Quiz, subject: str, questions: Sequence[Question]) -> Encoded:
        """Questions of one subject as this model takes them.

        Raises:
            ModelError: a prompt is longer than the context, and the quiz does not have it cut.
        """
        shots = quiz.shots_by_subject[subject]
        return self.context.fit(encode(self.moe.tokenizer, questions, shots), quiz)

    def encode_all(self, quiz: Quiz) -> Iterator[Encoded]:
        """A whole quiz, subject by subject, where no prompt is too long; says how many were cut."""
        self.context.check(quiz)
        n_cut = 0
        for subject, questions in quiz.questions.items():
            encoded = self.encode(quiz, subject, questions)
            n_cut += encoded.n_cut
            yield encoded
        if n_cut:
            logger.warning(
                "%d of %d %s prompts lost tokens on their left: the context of %s has %d",
                *(n_cut, len(quiz), quiz.split, self.moe.source.id, self.context.length),
            )

    def check(self, encoded: Encoded) -> None:
        """Scores four questions both ways; where they differ, all go one by one from now on.

        The first one's prompt is also what every block's gate is held against once more.

        Raises:
            ContractError: a block that breaks a law of `gate_laws` on it.
        """
        few = encoded.part(slice(CHECKED_QUESTIONS))
        way = self.way(few)
        model_type = str(self.moe.model.config.model_type)
        with verifying(self.moe.blocks, model_type, check_gate):
            alone = few.part(slice(1)) if way == "single" else few
            one_by_one_NC = self._score(alone, self._how("single"), Watch())
        if way == "single":
            return
        tolerance = 1e-4 if self.moe.dtype.itemsize >= 4 else 5e-2
        while True:
            together_NC = self._score(few, self._how(way, trims=True), Watch())
            difference = (together_NC - one_by_one_NC).nan_to_num(0).abs().max()
            if difference <= tolerance:
                return
            if self.attention == "masked" or way != "packed":
                break
            self.attention = "masked"
            # Only slower, so no warning: rounding in half precision can bring it about.
            logger.info(
                "attention in two parts is off by %.2g on %d questions (at most %g allowed): "
                "using a mask instead, which is slower",
                *(float(difference), len(few), tolerance),
            )
        self.is_trusted = False
        logger.warning(
            "%s scoring is off by %.2g on %d questions (at most %g allowed): "
            "scoring one prompt at a time instead",
            *(way, float(difference), len(few), tolerance),
        )

    def way(self, encoded: Encoded) -> Way:
        """How a chunk is scored: a function of the chunk and the model alone."""
        if not self.is_trusted:
            return "single"
        return suitable_way(self.moe.model.config, encoded.longest)

    def score(
        self, encoded: Encoded, on_pass: OnPass = ignore, watch: Watch | None = None
    ) -> Tensor:
        """Log p of each choice (N, C) float32; −inf where a question has fewer choices.

        `on_pass` is told of each forward pass before it starts, and all of it runs; a `watch`
        listens more closely.

        Raises:
            ModelError: an answer that is no finite number, or too little memory.
        """
        how = self._how(self.way(encoded), trims=watch is not None)
        return self._score(encoded, how, watch or Watch(begin=on_pass))

    def _how(self, way: Way, *, trims: bool = False) -> How:
        last_layer = self.last_layer if trims and way != "single" else None
        return How(way, self.batch_tokens, self.attention, last_layer)

    @torch.inference_mode()
    def _score(self, encoded: Encoded, how: How, watch: Watch) -> Tensor:
        n_embeddings = len(self.moe.model.get_input_embeddings().weight)
        for ids in (*encoded.prompts, *encoded.choice_ids):
            check_ids(self.moe.source.path, ids, n_embeddings)
        most = max(map(len, encoded.choice_ids))
        padded = [[*ids, *[-1] * (most - len(ids))] for ids in encoded.choice_ids]
        choice_NC = torch.tensor(padded, device=self.moe.device)
        logprob_NC = torch.full(choice_NC.shape, -torch.inf, device=self.moe.device)
        for done, logits_NV in Run(self.moe, encoded, how, watch).passes():
            at_N = torch.tensor(done.questions, device=logits_NV.device)
            logprob_NV = logits_NV.float().log_softmax(dim=-1)
            ids_NC = choice_NC.to(logits_NV.device)[at_N]
            found_NC = logprob_NV.gather(1, ids_NC.clamp(min=0)).where(ids_NC >= 0, -torch.inf)
            logprob_NC[at_N.to(logprob_NC.device)] = found_NC.to(logprob_NC.device)
        logprob_NC = logprob_NC.cpu()
        if (bad := first_unanswered(logprob_NC, encoded)) is not None:
            alone = encoded.part(slice(bad, bad + 1))
            single = Run(self.moe, alone, self._how("single"), Watch(begin=watch.begin))
            raise not_finite(self.moe, encoded.name(bad), lambda: list(single.passes()))
        return logprob_NC


def ask(engine: Engine, quiz: Quiz, on_pass: OnPass = ignore) -> Tensor:
    """Log p of each choice (N, C) for a whole quiz, subject by subject."""
    scores = [engine.score(encoded, on_pass) for encoded in engine.encode_all(quiz)]
    most = max(score_NC.shape[1] for score_NC in scores)
    return torch.cat([F.pad(s, (0, most - s.shape[1]), value=-torch.inf) for s in scores])
