"""The scoring engine: log-probabilities of a chunk's choices, no token run twice, none a pad.

Prompts and the model's context: those that do not fit are refused, or lose tokens on the left. What
is cut is what lm-evaluation-harness 0.4.13 cuts (`HFLM._loglikelihood_tokens`): the last tokens of
prompt and choice stay, as many as the context has places and one more, which is the choice and is
not run. So a prompt keeps as many tokens as there are places, loses its first ones, a BOS among
them, and its positions start at 0.

Where a model's numbers stop being finite: looked for once an answer is no number, never before. An
answer that is no number would be counted as a wrong one, so it stops the run.

Three ways, one result (within 1e-4 in float32):

    packed  the shared prefix once, its KV cache read by all questions, packed in rows
    padded  right-padded rows without sharing: sliding windows, recurrent layers
    single  one prompt at a time: a RoPE that depends on the prompt's length, or a failed check
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os.path import commonprefix
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertcut.data import Question, Quiz, prompt
from expertcut.errors import ModelError
from expertcut.models.gate_laws import check_gate, verifying
from expertcut.models.hooks import replaced_forward
from expertcut.models.load import MoeModel
from expertcut.models.validate import check_ids
from expertcut.scoring import attention
from expertcut.scoring.packing import Encoded, encode
from expertcut.scoring.passes import (
    Attention,
    How,
    OnPass,
    Run,
    ScoringMode,
    Watch,
    grows_with_prompt,
    ignore,
    last_decoder_layer,
    scoring_mode,
)

# In the order in which lm-evaluation-harness looks at them.
_PLACES = ("n_positions", "max_position_embeddings", "n_ctx")
_UNSET = 10**12  # tokenizers that know no length say 1e30
_SEAM = 16  # tokens that a text may have more when it is cut in two
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")
logger = logging.getLogger(__name__)

CHECKED_QUESTIONS = 4


def context_length(config: Any, tokenizer: Any) -> int | None:
    """How many tokens a model takes, as lm-evaluation-harness reads it; None where nothing says."""
    text = config.get_text_config(decoder=True)
    found = next((n for n in (getattr(text, name, None) for name in _PLACES) if n), None)
    length = found or getattr(tokenizer, "model_max_length", None)
    return int(length) if length and length < _UNSET else None


class Context:
    """One model's context: its `length`, None where nothing says, and whether it `takes_more`."""

    def __init__(self, moe: MoeModel) -> None:
        self.moe = moe
        self.length = context_length(moe.model.config, moe.tokenizer)
        self.takes_more = grows_with_prompt(moe.model.config)

    def fit(self, encoded: Encoded, quiz: Quiz) -> Encoded:
        """A chunk of the quiz with its prompts cut where the quiz says so.

        Raises:
            ModelError: the quiz says nothing, and a prompt is longer than the context.
        """
        if self.length is None or encoded.longest <= self.length:
            return encoded
        if quiz.truncate == "left":
            return encoded.cut_left(self.length)
        if self.takes_more:
            return encoded
        n_long = sum(len(ids) > self.length for ids in encoded.prompts)
        raise self._too_long(n_long, len(encoded), encoded.longest)

    def check(self, quiz: Quiz) -> None:
        """Refuses a quiz with a prompt that is too long, unless it says how such are cut.

        Only prompts that might be are made into tokens.

        Raises:
            ModelError: with how many there are, and how long the longest is.
        """
        if self.length is None or quiz.truncate or self.takes_more:
            return
        lengths = [n for n in self.possible(quiz, self.length) if n > self.length]
        if lengths:
            raise self._too_long(len(lengths), len(quiz), max(lengths))

    def possible(self, quiz: Quiz, limit: int) -> Iterator[int]:
        """Tokens of each prompt that may have more than the limit.

        A text has at most as many tokens as bytes, and what stands before a subject's questions is
        the same for all of them.
        """
        tokenizer = self.moe.tokenizer
        for subject, questions in quiz.questions.items():
            shots = quiz.shots_by_subject[subject]
            texts = [prompt(question, shots) for question in questions]
            before = commonprefix(texts)  # noqa: RUF071 - of texts, as it is meant here
            n_before = len(tokenizer(before)["input_ids"])
            for text in texts:
                if n_before + len(text[len(before) :].encode()) + _SEAM > limit:
                    yield len(tokenizer(text)["input_ids"])

    def _too_long(self, n_long: int, n_all: int, longest: int) -> ModelError:
        return ModelError(
            f"{n_long} of {n_all} prompts have more tokens than the {self.length} of the context "
            f"of {self.moe.source.id}, the longest {longest}: ask with fewer --shots, or with "
            "--truncate left, which cuts them as lm-evaluation-harness does"
        )


def first_unanswered(logprob_NC: Tensor, encoded: Encoded) -> int | None:
    """The first question with a choice whose log p is not finite, None where all are."""
    n_choices_N = torch.tensor([len(ids) for ids in encoded.choice_ids])
    is_asked_NC = torch.arange(logprob_NC.shape[1]) < n_choices_N[:, None]
    is_bad_N = (is_asked_NC & ~logprob_NC.isfinite()).any(dim=1)
    return int(is_bad_N.int().argmax()) if bool(is_bad_N.any()) else None


def not_finite(moe: MoeModel, question: str, ask_alone: Callable[[], object]) -> ModelError:
    """The error for a question without an answer; its prompt runs once more, watched."""
    with _watching(moe) as seen:
        ask_alone()
    if not seen:
        return ModelError(
            f"{moe.source.id} answers {question} by what is no finite number, but only in a pack "
            "with others: try another --batch-tokens"
        )
    return ModelError(
        f"{moe.source.id} answers {question} by what is no finite number: {_place(seen[0])} is "
        f"the first to give one, in {_name(moe.dtype)}: {advice(moe)}"
    )


def advice(moe: MoeModel) -> str:
    """What to do where numbers are not finite."""
    if moe.dtype == torch.float16:
        return "float16 ends at 65,504, so try --dtype bfloat16 or float32"
    return "its weights are damaged or do not belong together, so download it again"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(module: str) -> str:
    layer = _LAYER.search(module)
    return f"layer {layer[1]} ({module})" if layer else module


@contextmanager
def _watching(moe: MoeModel) -> Iterator[list[str]]:
    """Collects names of modules whose output is not finite, in the order in which they end."""
    seen: list[str] = []
    routers = {id(part) for block in moe.blocks for part in block.router.modules()}
    with ExitStack() as stack:
        for name, module in moe.model.named_modules():
            hook = _hook(name, seen, is_router=id(module) in routers)
            stack.callback(module.register_forward_hook(hook).remove)
            if isinstance(module, nn.ModuleList):
                _run_whole(stack, module)
        yield seen


def _run_whole(stack: ExitStack, layers: nn.ModuleList) -> None:
    """Layers run themselves, also where a replay gives what they gave to other tokens."""
    for layer in layers:
        stack.enter_context(replaced_forward(layer, MethodType(type(layer).forward, layer)))


def _hook(name: str, seen: list[str], *, is_router: bool) -> Callable[..., None]:
    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else [output]
        if any(isinstance(part, Tensor) and _is_bad(part, is_router) for part in parts):
            seen.append(name)

    return note


def _is_bad(tensor: Tensor, is_router: bool) -> bool:
    # Where experts are masked, their logits are −inf, as they should be.
    bad = tensor.isnan() | tensor.isposinf() if is_router else ~tensor.isfinite()
    return bool(bad.any())


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

    def way(self, encoded: Encoded) -> ScoringMode:
        """How a chunk is scored: a function of the chunk and the model alone."""
        if not self.is_trusted:
            return "single"
        return scoring_mode(self.moe.model.config, encoded.longest)

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

    def _how(self, way: ScoringMode, *, trims: bool = False) -> How:
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
    return stack_scores([engine.score(encoded, on_pass) for encoded in engine.encode_all(quiz)])


def stack_scores(scores: Sequence[Tensor]) -> Tensor:
    """Log p (N, C) of several chunks, −∞ where a question has fewer choices."""
    most = max(score_NC.shape[1] for score_NC in scores)
    return torch.cat([F.pad(s, (0, most - s.shape[1]), value=-torch.inf) for s in scores])
