"""Next-token distributions: the vocabulary projection by chunks, and how two distributions differ.

N or M are positions, V the vocabulary, R the likeliest tokens that are kept of a base model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertcut.models.hooks import replaced_forward
from expertcut.models.load import MoeModel

# Logits of one chunk in float32. On a CPU just below 32 MiB: glibc reuses the memory of smaller
# chunks, and gets larger ones from the system anew, page by page.
_CHUNK_BYTES = {"cpu": 30 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 256 * 2**20
Run = Callable[..., Any]  # the model, bare or wrapped by peft and accelerate


@dataclass(frozen=True)
class TopLogprobs:
    """A teacher's R most likely tokens at M positions."""

    ids_MR: Tensor
    logprob_MR: Tensor

    def __getitem__(self, at: slice) -> "TopLogprobs":
        return TopLogprobs(self.ids_MR[at], self.logprob_MR[at])


def top_logprobs(logits_MV: Tensor, n: int) -> TopLogprobs:
    """The R = min(n, V) most likely tokens and their log p."""
    top = logits_MV.float().log_softmax(dim=-1).topk(min(n, logits_MV.shape[1]), dim=-1)
    return TopLogprobs(top.indices, top.values)


def kl_divergence(logprob_MV: Tensor, base: TopLogprobs) -> Tensor:
    """KL(base ‖ other) in nats by position (M); the other's log p (M, V) is whole.

    Tokens beyond the base's top R count as one: a lower bound, exact if R = V.
    """
    other_MR, base_MR = logprob_MV.gather(1, base.ids_MR), base.logprob_MR.float()
    kl_M = (base_MR.exp() * (base_MR - other_MR)).sum(dim=-1)
    if base.ids_MR.shape[1] < logprob_MV.shape[1]:
        base_rest_M, other_rest_M = _log_rest(base_MR), _log_rest(other_MR)
        kl_M = kl_M + base_rest_M.exp() * (base_rest_M - other_rest_M)
    return kl_M


def acceptance(logprob_MV: Tensor, base: TopLogprobs) -> Tensor:
    """Σ min(p, q) by position (M): what speculative decoding would accept (arXiv:2211.17192).

    Tokens beyond the base's top R count as one: an upper bound, exact if R = V.
    """
    other_MR, base_MR = logprob_MV.gather(1, base.ids_MR), base.logprob_MR.float()
    shared_M = torch.minimum(base_MR, other_MR).exp().sum(dim=-1)
    if base.ids_MR.shape[1] < logprob_MV.shape[1]:
        shared_M = shared_M + torch.minimum(_log_rest(base_MR), _log_rest(other_MR)).exp()
    return shared_M.clamp(max=1.0)


def _log_rest(logprob_MR: Tensor) -> Tensor:
    """Log probability of all other tokens (M), kept above 0 after rounding."""
    return torch.expm1(logprob_MR.logsumexp(dim=-1).clamp(max=-1e-7)).neg().log()


class Projection:
    """A model's forward pass in two halves: hidden states of all tokens, logits of some.

    Both halves call the model's own forward, so scaled and capped logits are right; the second one
    replaces the decoder's output. A probe on a few tokens tests whether the halves give the same
    logits; otherwise `hidden` returns logits of all tokens.
    """

    def __init__(self, moe: MoeModel) -> None:
        self.causal, self.device = moe.model, moe.device
        self.chunk_bytes = _CHUNK_BYTES.get(self.device.type, _CHUNK_BYTES_ELSEWHERE)
        self.decoder: Any = getattr(self.causal, "base_model", self.causal)
        self.n_logits: int = self.causal.config.get_text_config().vocab_size
        self.is_split = self.decoder is not self.causal and self._is_exact()

    def hidden(
        self, run: Run, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        """Last hidden states (B, S, H), the input of the vocabulary projection."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        given |= others
        if not self.is_split:
            logits_BSV: Tensor = run(**given).logits
            return logits_BSV
        kept: list[Any] = []

        def keep(_module: Any, _given: Any, output: Any) -> Any:
            kept.append(output)
            return type(output)(last_hidden_state=output.last_hidden_state[:, :1])

        with self.decoder.register_forward_hook(keep):
            run(**given)
        self.output = type(kept[0])
        hidden_BSH: Tensor = kept[0].last_hidden_state
        return hidden_BSH

    def logits(self, run: Run, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V) of hidden states."""
        if not self.is_split:
            return hidden_NH
        ids_1N = torch.zeros(1, len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
        output = self.output(last_hidden_state=hidden_NH[None])
        with replaced_forward(self.decoder, lambda *_, **__: output):
            logits_1NV: Tensor = run(input_ids=ids_1N, use_cache=False).logits
        return logits_1NV[0]

    def chunks(self, n_positions: int) -> Iterator[slice]:
        """Slices of positions, each one chunk."""
        size = max(1, self.chunk_bytes // (4 * self.n_logits))
        for begin in range(0, n_positions, size):
            yield slice(begin, min(begin + size, n_positions))

    @torch.no_grad()
    def _is_exact(self) -> bool:
        ids_BS = torch.arange(6, device=self.device).reshape(2, 3) % self.n_logits
        was_training = self.causal.training
        self.causal.eval()  # without noise and dropout
        self.is_split = True
        try:
            whole_NV = self.causal(input_ids=ids_BS, use_cache=False).logits.flatten(0, 1)
            halves_NV = self.logits(self.causal, self.hidden(self.causal, ids_BS).flatten(0, 1))
        except (AttributeError, TypeError, ValueError, IndexError):
            return False
        finally:
            self.causal.train(was_training)
        if whole_NV.shape != halves_NV.shape:
            return False
        tolerance = 16 * torch.finfo(whole_NV.dtype).eps
        return bool(torch.allclose(halves_NV, whole_NV, rtol=tolerance, atol=tolerance))
