"""A causal model's pass in two halves: hidden states of all tokens, logits of some at a time.

Logits of a whole batch are by far the largest tensors of training where the vocabulary is large. So
the loss is taken over chunks of positions: each chunk is projected, its loss and the gradient for
its hidden states are computed, and its logits are gone before the next one comes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expertcut.models.load import MoeModel

# Logits of one chunk in float32. On a CPU just below the 32 MiB up to which glibc gives the memory
# of the last chunk to the next one; what is larger comes from the system anew, page by page.
_CHUNK_BYTES = {"cpu": 30 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 256 * 2**20
_PROBE = (2, 3)  # rows and tokens

Run = Callable[..., Any]
"""The model as it is called: bare, or wrapped by peft and accelerate."""
LossOf = Callable[[Tensor, slice], Tensor]
"""From logits (N, V) and the positions that they stand at to a loss, summed."""


class Projection:
    """The two halves, by the model's own forward: nothing here knows a family.

    Scaled and capped logits are what the model makes of them: its forward is called with a decoder
    that gives the hidden states asked for. A model that cannot be cut so gives logits of all tokens
    in place of hidden states, as a probe on a few tokens finds out.
    """

    def __init__(self, moe: MoeModel) -> None:
        self.causal, self.device = moe.model, moe.device
        self.decoder: Any = getattr(self.causal, "base_model", self.causal)
        config = self.causal.config.get_text_config()
        self.n_logits: int = config.vocab_size
        self.is_split = self.decoder is not self.causal and self._is_exact()

    def hidden(self, run: Run, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, S, H) that the vocabulary is projected from."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if not self.is_split:
            logits_BSV: Tensor = run(**given).logits
            return logits_BSV
        kept: list[Any] = []

        def keep(_module: Any, _given: Any, output: Any) -> Any:
            kept.append(output)
            return type(output)(last_hidden_state=output.last_hidden_state[:, :1])

        handle = self.decoder.register_forward_hook(keep)
        try:
            run(**given)
        finally:
            handle.remove()
        (output,) = kept
        self.output = type(output)
        hidden_BSH: Tensor = output.last_hidden_state
        return hidden_BSH

    def logits(self, run: Run, hidden_NH: Tensor) -> Tensor:
        """Logits (N, V) of such hidden states."""
        if not self.is_split:
            return hidden_NH
        ids_1N = torch.zeros(1, len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
        with self._giving(hidden_NH[None]):
            logits_1NV: Tensor = run(input_ids=ids_1N, use_cache=False).logits
        return logits_1NV[0]

    @property
    def chunk_bytes(self) -> int:
        """Logits of one chunk in float32."""
        return _CHUNK_BYTES.get(self.device.type, _CHUNK_BYTES_ELSEWHERE)

    def chunks(self, n_positions: int) -> Iterator[slice]:
        """Positions that are projected at once."""
        size = max(1, self.chunk_bytes // (4 * self.n_logits))
        for begin in range(0, n_positions, size):
            yield slice(begin, min(begin + size, n_positions))

    @contextmanager
    def _giving(self, hidden_1NH: Tensor) -> Iterator[None]:
        """The decoder gives these hidden states, whatever it is given."""
        own = vars(self.decoder).get("forward")
        self.decoder.forward = lambda *_, **__: self.output(last_hidden_state=hidden_1NH)
        try:
            yield
        finally:
            if own is None:
                del self.decoder.forward
            else:
                self.decoder.forward = own

    @torch.no_grad()
    def _is_exact(self) -> bool:
        """Whether both halves together give the logits of the whole."""
        ids_BS = torch.arange(_PROBE[0] * _PROBE[1], device=self.device).reshape(_PROBE)
        ids_BS = ids_BS % self.n_logits
        was_training = self.causal.training
        self.causal.eval()  # without noise and dropout
        self.is_split = True
        try:
            whole_BSV = self.causal(input_ids=ids_BS, use_cache=False).logits
            halves_NV = self.logits(self.causal, self.hidden(self.causal, ids_BS).flatten(0, 1))
        except (AttributeError, TypeError, ValueError, IndexError):
            return False
        finally:
            self.causal.train(was_training)
        whole_NV = whole_BSV.flatten(0, 1)
        if whole_NV.shape != halves_NV.shape:
            return False
        tolerance = 16 * torch.finfo(whole_NV.dtype).eps
        return bool(torch.allclose(halves_NV, whole_NV, rtol=tolerance, atol=tolerance))


def chunked_loss(projection: Projection, run: Run, hidden_MH: Tensor, loss_of: LossOf) -> Tensor:
    """The sum of `loss_of` over chunks of positions, in float64.

    The gradient reaches the hidden states, and through them what is trained; the vocabulary
    projection itself is not trained.
    """

    def of_chunk(hidden_NH: Tensor, at: slice) -> Tensor:
        return loss_of(projection.logits(run, hidden_NH), at)

    apply: Any = _ChunkedSum.apply
    found: Tensor = apply(hidden_MH, of_chunk, list(projection.chunks(len(hidden_MH))))
    return found


class _ChunkedSum(torch.autograd.Function):
    """A sum whose gradient is computed chunk by chunk along with it."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, of_chunk: Any, chunks: list[slice]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden_MH.device)
        if not ctx.needs_input_grad[0]:
            for at in chunks:
                total += of_chunk(hidden_MH[at], at)
            return total
        gradient_MH = torch.zeros_like(hidden_MH)
        for at in chunks:
            with torch.enable_grad():
                hidden_NH = hidden_MH[at].detach().requires_grad_()
                loss = of_chunk(hidden_NH, at)
            (gradient_MH[at],) = torch.autograd.grad(loss, hidden_NH)
            total += loss.detach()
        ctx.save_for_backward(gradient_MH)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_MH,) = ctx.saved_tensors
        return gradient_MH * gradients[0].to(gradient_MH.dtype), None, None
