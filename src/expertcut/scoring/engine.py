"""The scoring engine: log-probabilities of the choices of a chunk of questions.

Three modes with one result (within 1e-4 in float32):

    packed  the shared prefix once, its KV cache read by all questions, packed in rows
    padded  right-padded rows without sharing: sliding windows, recurrent layers
    single  one prompt at a time: RoPE that depends on the prompt's length, or a failed check

Prompts beyond the context are refused, or truncated on the left as lm-evaluation-harness 0.4.13
does (`HFLM._loglikelihood_tokens`): a prompt keeps its last tokens, as many as the context has
places, loses a BOS, and its positions start at 0.

A non-finite log-probability stops the run, because it would count as a wrong answer. Then the
prompt runs again to find the first module with a non-finite output.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from os.path import commonprefix
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertcut.data import Question, Quiz, prompt
from expertcut.data.corpus import CalibrationSet, Corpus, chunk_rows
from expertcut.errors import ModelError, SettingsError
from expertcut.files import advance
from expertcut.models.gate_laws import check_gate, verifying
from expertcut.models.hooks import replaced_forward
from expertcut.models.load import MoeModel
from expertcut.models.validate import check_ids
from expertcut.scoring import attention, passes
from expertcut.scoring.contrast import Contrast, contrasted
from expertcut.scoring.packing import Encoded, EncodedRows, Pass, encode, encode_rows
from expertcut.scoring.passes import Layer, OnPass, PassObserver, Run, ScoringMode, ignore
from expertcut.scoring.projection import Projection

logger = logging.getLogger(__name__)

CHECKED_QUESTIONS = 4


def context_length(config: Any, tokenizer: Any) -> int | None:
    """The context length as lm-evaluation-harness reads it; None if unknown."""
    text = config.get_text_config(decoder=True)
    places = ("n_positions", "max_position_embeddings", "n_ctx")
    found = next((n for n in (getattr(text, name, None) for name in places) if n), None)
    length = found or getattr(tokenizer, "model_max_length", None)
    return int(length) if length and length < 10**12 else None  # those without a length say 1e30


def _not_finite(moe: MoeModel, question: str, seen: list[str]) -> ModelError:
    """The error for a non-finite answer; `seen` names the modules with non-finite outputs."""
    fault = f"{moe.source.id}: non-finite log-probability for {question}"
    if not seen:
        return ModelError(f"{fault}, but only in a pack with others: try another --batch-tokens")
    layer = re.search(r"\.(\d+)(?:\.|$)", seen[0])
    place = f"layer {layer[1]} ({seen[0]})" if layer else seen[0]
    dtype = str(moe.dtype).removeprefix("torch.")
    return ModelError(
        f"{fault}: {place} is the first module with a non-finite output, in {dtype}: {advice(moe)}"
    )


def advice(moe: MoeModel) -> str:
    """What to do about non-finite numbers."""
    if moe.dtype == torch.float16:
        return "float16 ends at 65,504, so try --dtype bfloat16 or float32"
    return "its weights are damaged or do not belong together, so download it again"


@contextmanager
def _watching(moe: MoeModel) -> Iterator[list[str]]:
    """Collects the names of modules with non-finite output, in the order they end."""
    seen: list[str] = []
    routers = {id(part) for block in moe.blocks for part in block.router.modules()}

    def note(name: str, module: nn.Module, _args: Any, output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else [output]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if id(module) in routers:  # logits of masked experts are −inf
            tensors = [t.nan_to_num(torch.nan, torch.inf, neginf=0.0) for t in tensors]
        if not all(tensor.isfinite().all() for tensor in tensors):
            seen.append(name)

    with ExitStack() as stack:
        for name, module in moe.model.named_modules():
            stack.callback(module.register_forward_hook(partial(note, name)).remove)
            if isinstance(module, nn.ModuleList):
                for layer in module:  # without what a replay puts in their place
                    forward = MethodType(type(layer).forward, layer)
                    stack.enter_context(replaced_forward(layer, forward))
        yield seen


Scores = Callable[[Any, ScoringMode], Tensor]


class Engine:
    """Scores chunks with one model; `check` sets `is_trusted` and `attention`.

    `context` is the length of its context, None if unknown; it `grows` with dynamic RoPE.
    """

    def __init__(self, moe: MoeModel, batch_tokens: int) -> None:
        self.moe, self.batch_tokens = moe, batch_tokens
        self.context = context_length(moe.model.config, moe.tokenizer)
        self.grows = passes.grows_with_prompt(moe.model.config)
        sources = [b.declared.source for b in moe.blocks if b.declared is not None]
        self.is_trusted = not any(source.by_prompt for source in sources)
        self.n_scored = self.n_asked = 0  # of the quiz that `encode_all` gives out
        is_split = attention.is_available(moe.model, moe.device)
        self.attention: passes.Attention = "split" if is_split else "masked"
        has_state = any(block.has_state for block in moe.blocks)  # of all tokens of a pass
        self.last_layer = None if has_state else passes.last_decoder_layer(moe.model, moe.blocks)
        self.contrast: Contrast | None = None
        self.layer: Layer | None = None  # that runs alone, with --layerwise
        self.is_checking = False

    def encode(self, quiz: Quiz, subject: str, questions: Sequence[Question]) -> Encoded:
        """Tokenizes questions of one subject; truncates too long prompts or refuses them."""
        most, shots = self.context, quiz.shots_by_subject[subject]
        encoded = encode(self.moe.tokenizer, questions, shots)
        lengths_N = [len(ids) for ids in encoded.prompts]
        if most is None or max(lengths_N) <= most or (self.grows and not quiz.truncate):
            return encoded
        if not quiz.truncate:
            raise self._too_long([n for n in lengths_N if n > most], len(encoded))
        cut_N = tuple(max(n - most, 0) for n in lengths_N)
        prompts = tuple(ids[-most:] for ids in encoded.prompts)
        return replace(encoded, prompts=prompts, cut_N=cut_N)

    def check_lengths(self, quiz: Quiz) -> None:
        """Refuses a quiz with prompts beyond the context, unless it truncates."""
        most = self.context
        if most is None or quiz.truncate or self.grows:
            return
        if too_long := [n for n in self.possible_lengths(quiz, most) if n > most]:
            raise self._too_long(too_long, len(quiz))

    def possible_lengths(self, quiz: Quiz, limit: int) -> Iterator[int]:
        """Lengths of the prompts that may exceed the limit: by bytes, and only these tokenized."""
        tokenizer = self.moe.tokenizer
        for subject, questions in quiz.questions.items():
            shots = quiz.shots_by_subject[subject]
            texts = [prompt(question, shots) for question in questions]
            before = commonprefix(texts)  # noqa: RUF071 - of texts, not paths
            n_before = len(tokenizer(before)["input_ids"])
            for text in texts:
                # A text cut in two may have some more tokens.
                if n_before + len(text[len(before) :].encode()) + 16 > limit:
                    yield len(tokenizer(text)["input_ids"])

    def _too_long(self, lengths: Sequence[int], n_all: int) -> ModelError:
        return ModelError(
            f"{len(lengths)} of {n_all} prompts have more tokens than the {self.context} of the "
            f"context of {self.moe.source.id}, the longest {max(lengths)}: ask with fewer --shots, "
            "or with --truncate left, which cuts them as lm-evaluation-harness does"
        )

    def encode_all(self, quiz: CalibrationSet) -> Iterator[Encoded]:
        """Chunks of a quiz, subject by subject, or of texts; warns of truncated prompts."""
        if isinstance(quiz, Corpus):
            for rows in quiz.rows.values():
                yield from map(encode_rows, chunk_rows(rows))
            return
        self.check_lengths(quiz)
        n_cut, self.n_scored, self.n_asked = 0, 0, len(quiz)
        for subject, questions in quiz.questions.items():
            encoded = self.encode(quiz, subject, questions)
            n_cut += encoded.n_cut
            yield encoded
        self.n_asked = 0
        if n_cut:
            text = "%d of %d %s prompts lost tokens on their left: the context of %s has %d"
            logger.warning(text, n_cut, len(quiz), quiz.split, self.moe.source.id, self.context)

    def check(self, encoded: Encoded, scores: Scores | None = None) -> None:
        """Checks the gates, and falls back to mode single if a batch scores questions otherwise.

        In float32 one of them is scored alone, the shortest behind the first: a faulty mask would
        show it tokens of others, or pads. In half precision each is, for rounding differs. `scores`
        gives what is compared, by default log p of the choices.
        """
        self.is_checking = True
        try:
            self._check(encoded, scores or self._choices)
        finally:
            self.is_checking = False

    def _check(self, encoded: Encoded, scores: Scores) -> None:
        few = encoded.part(range(min(CHECKED_QUESTIONS, len(encoded))))
        mode, is_half, places = self.mode(few), self.moe.dtype.itemsize < 4, range(len(few))
        shortest = min(places[1:] or places, key=lambda q: len(few.prompts[q]))
        asked = [*places] if is_half and mode != "single" else [shortest]
        with verifying(self.moe.blocks, str(self.moe.model.config.model_type), check_gate):
            alone_NC = scores(few.part(asked), "single")
        if mode == "single":
            return
        tolerance = 5e-2 if is_half else 1e-4
        while True:
            together_NC = scores(few, mode)
            difference_NC = together_NC[asked, : alone_NC.shape[1]] - alone_NC
            differences = difference_NC.nan_to_num(0).abs().flatten().tolist()
            difference = max(differences, default=0.0)  # nothing is scored of rows of one token
            if difference <= tolerance:
                return
            off = f"off by {difference:.2g} (at most {tolerance:g} allowed)"
            # Only slower, so no warning: rounding in half precision can cause it.
            if self.attention != "masked" and mode == "packed":
                self.attention = "masked"
                logger.info("attention in two parts is %s: using a mask instead", off)
            elif self.last_layer is not None:  # Inkling-2: a convolution reads the last block
                self.last_layer = None
                logger.info("the last block at the answers alone is %s: running it whole", off)
            else:
                break
        self.is_trusted = False
        logger.warning("%s scoring is %s: scoring one prompt at a time instead", mode, off)

    def _choices(self, encoded: Encoded, mode: ScoringMode) -> Tensor:
        """Log p of each choice (N, C)."""
        return self._score(self._run(encoded, mode, PassObserver(), may_trim=mode != "single"))

    def mode(self, encoded: Encoded) -> ScoringMode:
        """The mode of a chunk: a function of chunk and model alone."""
        config, longest = self.moe.model.config, encoded.longest
        return passes.scoring_mode(config, longest) if self.is_trusted else "single"

    def score(
        self, encoded: Encoded, on_pass: OnPass = ignore, watch: PassObserver | None = None
    ) -> Tensor:
        """Log p of each choice (N, C) float32; −inf behind the last choice of a question.

        `on_pass` is called before each forward pass. A `watch` instead sees more of it, and which
        rows of the last block count: only then may that block run on the answers alone.
        """
        observer = watch or PassObserver(begin=on_pass)
        mode, may_trim = self.mode(encoded), watch is not None
        return self._score(self._run(encoded, mode, observer, may_trim=may_trim))

    def _run(
        self, encoded: Encoded, mode: ScoringMode, watch: PassObserver, *, may_trim: bool
    ) -> Run:
        last_layer = self.last_layer if may_trim and mode != "single" else None
        if self.layer is not None:  # its inputs are stored by pass
            watch = replace(watch, undo=ignore)
        elif self.moe.layers is not None and not self.is_checking:
            raise SettingsError(
                "--layerwise has one layer in memory, and this needs the whole model: run it "
                "without, with --device-map auto --offload FOLDER"
            )
        return Run(self.moe, encoded, watch, mode, self.batch_tokens, self.attention, last_layer)

    @torch.inference_mode()
    def run(self, encoded: Encoded, on_pass: OnPass = ignore) -> None:
        """Runs the passes of a chunk for what hooks see of them, and scores nothing."""
        observer, mode = PassObserver(begin=on_pass), self.mode(encoded)
        self._check_ids(encoded.prompts)
        for done, _ in self._run(encoded, mode, observer, may_trim=False).passes():
            self._report(done)

    def _check_ids(self, rows: Iterable[Sequence[int]]) -> None:
        n_embeddings = len(self.moe.model.get_input_embeddings().weight)
        for ids in rows:
            check_ids(self.moe.source.path, ids, n_embeddings)

    def _report(self, done: Pass) -> None:
        if self.n_asked:
            self.n_scored += len(done.questions)
            advance(f"running {self.moe.source.name}", self.n_scored, self.n_asked, "questions")

    @torch.inference_mode()
    def _score(self, run: Run) -> Tensor:
        encoded = run.encoded
        self._check_ids((*encoded.prompts, *encoded.choice_ids))
        most = max(map(len, encoded.choice_ids))
        padded = [[*ids, *[-1] * (most - len(ids))] for ids in encoded.choice_ids]
        choice_NC = torch.tensor(padded, dtype=torch.long, device=self.moe.device)
        logprob_NC = torch.full(choice_NC.shape, -torch.inf, device=self.moe.device)
        contrast = self.contrast
        weak_NV = None if contrast is None else contrast.weak_logprobs(run)
        for done, logits_NV in run.passes():
            if self.ends_early:
                continue
            at_N = torch.tensor(done.questions, device=logits_NV.device)
            logprob_NV = logits_NV.float().log_softmax(dim=-1)
            if contrast is not None and weak_NV is not None:
                logprob_NV = contrasted(logprob_NV, weak_NV[at_N], contrast.beta)
            ids_NC = choice_NC.to(logits_NV.device)[at_N]
            found_NC = logprob_NV.gather(1, ids_NC.clamp(min=0)).where(ids_NC >= 0, -torch.inf)
            logprob_NC[at_N.to(logprob_NC.device)] = found_NC.to(logprob_NC.device)
            self._report(done)
        is_bad_N = ((choice_NC >= 0) & ~logprob_NC.isfinite()).any(dim=1)
        if bool(is_bad_N.any()) and not self.ends_early:
            raise self.not_finite(encoded, int(is_bad_N.int().argmax()), run.watch.begin)
        return logprob_NC.cpu()

    @property
    def ends_early(self) -> bool:
        """Whether passes end before the last layer, so what they give is not the model's."""
        return self.layer is not None and not self.layer.is_last

    def not_finite(self, encoded: Encoded, bad: int, begin: OnPass) -> ModelError:
        """Runs one prompt again and names the first module with a non-finite output."""
        if self.layer is not None:  # the layers before are gone
            return _not_finite(self.moe, encoded.names[bad], [self.layer.bad or "the last layer"])
        alone = self._run(encoded.part([bad]), "single", PassObserver(begin=begin), may_trim=False)
        with _watching(self.moe) as seen:
            list(alone.passes())
        return _not_finite(self.moe, encoded.names[bad], seen)

    @cached_property
    def projection(self) -> Projection:
        """The model in two halves, for the logits of all tokens."""
        return Projection(self.moe)

    def hidden_states(
        self, rows: EncodedRows, watch: PassObserver, mode: ScoringMode | None = None
    ) -> Iterator[tuple[Pass, Tensor]]:
        """Each pass over the rows, and its last hidden states (T, H) as `projection` needs them."""
        self._check_ids(rows.prompts)
        run = self._run(rows, mode or self.mode(rows), watch, may_trim=False)
        for step in replace(run, projection=self.projection).passes():
            if not self.ends_early:
                yield step


def ask(engine: Engine, quiz: CalibrationSet, on_pass: OnPass = ignore) -> Tensor:
    """Log p of each choice (N, C) for a whole quiz, subject by subject; C is 0 for texts."""
    return stack_scores([engine.score(encoded, on_pass) for encoded in engine.encode_all(quiz)])


def stack_scores(scores: Sequence[Tensor]) -> Tensor:
    """Log p (N, C) of several chunks, −∞ where a question has fewer choices."""
    most = max(score_NC.shape[1] for score_NC in scores)
    return torch.cat([F.pad(s, (0, most - s.shape[1]), value=-torch.inf) for s in scores])
