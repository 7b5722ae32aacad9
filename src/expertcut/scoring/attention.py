"""Attention of packed questions without a mask: to the shared prefix and to themselves.

A mask over T tokens behind a prefix of P has T * (P + T) entries, most of them wasted, and every
pack needs a copy of the prefix's keys. Here the two parts are computed separately and joined by
their log-sum-exps (FlashAttention-2, arXiv:2307.08691; cascade inference). CPU only.

Further axes: H heads, S places of the longest question of a group, d width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SPLIT = "split"
_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
# Earlier kernels read out of bounds with grouped-query attention.
_SUPPORTS_GROUPED_QUERIES = TorchVersion(torch.__version__) >= "2.9"
Prefix = dict[int, tuple[Tensor, Tensor]]  # keys and values (1, H, P, d) by layer
Group = tuple[Tensor, Tensor]  # tokens of M questions among the T of a pack; False for padding


def is_available(model: Any, device: torch.device) -> bool:
    """Whether the model can use split attention: on a CPU alone, with `sdpa`."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    is_on_cpu = device.type == "cpu" and places <= {"cpu", "disk"}
    takes_sdpa = model.config._attn_implementation == "sdpa"
    return is_on_cpu and takes_sdpa and hasattr(torch.ops.aten, _FLASH)


@contextmanager
def attending(model: Any, attend: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Replaces the attention function of all layers in the context."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[SPLIT] = attend
    config._attn_implementation = SPLIT
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[SPLIT]


def groups(lengths_N: Tensor) -> list[Group]:
    """Questions of a pack by length: within a group it differs by less than a factor of two."""
    starts_N, size_N = lengths_N.cumsum(0) - lengths_N, lengths_N.log2().long()
    found = []
    for size in size_N.unique().tolist():
        lengths_M, starts_M1 = lengths_N[size_N == size], starts_N[size_N == size][:, None]
        place_S = torch.arange(int(lengths_M.max()))
        is_own_MS = place_S < lengths_M[:, None]
        found.append(((starts_M1 + place_S).where(is_own_MS, starts_M1), is_own_MS))
    return found


@dataclass(frozen=True)
class Split:
    """The attention function of one pass: of the shared prefix, which it keeps, or of a pack."""

    prefix: Prefix
    groups: Sequence[Group]
    last: int | None  # the layer where only answers are needed
    answers_N: Tensor  # computed separately there, so that the rest changes none of their bits
    keeps_all: bool  # else the rest is zero there

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Outputs (1, T, H, d) of queries, keys and values (1, H, T, d)."""
        layer, scale = module.layer_idx, options.get("scaling") or query.shape[-1] ** -0.5
        is_whole = layer != self.last or self.keeps_all
        shape = (1, query.shape[2], query.shape[1], value.shape[-1])
        if not self.groups:
            self.prefix[layer] = key, value
            return _flash(query, key, value, scale)[0] if is_whole else query.new_zeros(shape), None
        own, own_weight = self._own(query, key, value, scale)

        def joined(rows: Tensor | slice) -> Tensor:
            if layer not in self.prefix:
                return own[:, rows]
            prefix = self.prefix[layer]
            shared, shared_weight = _flash(query[:, :, rows], *prefix, scale, is_causal=False)
            # The weights are log-sum-exps.
            share = (own_weight[:, rows] - shared_weight).sigmoid().to(own.dtype)
            return torch.lerp(shared, own[:, rows], share[..., None])

        result = joined(slice(None)) if is_whole else query.new_zeros(shape)
        if layer == self.last:
            result[:, self.answers_N] = joined(self.answers_N)
        return result, None

    def _own(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Outputs of each question's attention to itself (1, T, H, d), and log-sum-exps."""
        # Tokens first: the heads of a token are contiguous.
        states = [s.transpose(1, 2)[0] for s in (query, key, value)]
        n_tokens, n_heads = states[0].shape[:2]
        out = query.new_empty(1, n_tokens, n_heads, value.shape[-1])
        weight_dtype = torch.promote_types(query.dtype, torch.float32)
        weight = query.new_empty(1, n_tokens, n_heads, dtype=weight_dtype)
        for places_MS, is_own_MS in self.groups:
            query, key, value = (s[places_MS].transpose(1, 2) for s in states)
            own, own_weight = _flash(query, key, value, scale)
            own_T = places_MS[is_own_MS]
            out[0, own_T], weight[0, own_T] = own[is_own_MS], own_weight[is_own_MS]
        return out, weight


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Outputs (N, T, H, d) and their log-sum-exps (N, T, H)."""
    width = value.shape[-1]
    widest = max(width, query.shape[-1])  # latent attention has narrower values
    query, key, value = (
        s if s.shape[-1] == widest else F.pad(s, (0, widest - s.shape[-1]))
        for s in (query, key, value)
    )
    if not _SUPPORTS_GROUPED_QUERIES:
        n_sharing = query.shape[1] // key.shape[1]
        key, value = (s.repeat_interleave(n_sharing, dim=1) for s in (key, value))
    out, weight = getattr(torch.ops.aten, _FLASH)(query, key, value, 0.0, is_causal, scale=scale)
    return out.transpose(1, 2)[..., :width], weight.transpose(1, 2)
