"""Attention of packed questions without a mask: to the shared prefix and to themselves.

A mask over T tokens behind a prefix of P has T * (P + T) entries, most of them wasted, and every
pack needs a copy of the prefix's keys. Here the two parts are computed separately and joined by
their log-sum-exps (FlashAttention-2, arXiv:2307.08691; cascade inference). CPU only.

With the legend of `models`: H heads, S places of the longest question of a group, d width of a
head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

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


class Group(NamedTuple):
    """Questions of a pack whose lengths differ by less than a factor of two.

    `places_NS` are their tokens among the T of the pack; `is_own_NS` is false for padding.
    """

    places_NS: Tensor
    is_own_NS: Tensor


def groups(lengths_N: Tensor) -> list[Group]:
    """Groups the consecutive questions of a pack by length."""
    starts_N, size_N = lengths_N.cumsum(0) - lengths_N, lengths_N.log2().long()
    found = []
    for size in size_N.unique().tolist():
        lengths_M, starts_M1 = lengths_N[size_N == size], starts_N[size_N == size][:, None]
        place_S = torch.arange(int(lengths_M.max()))
        is_own_MS = place_S < lengths_M[:, None]
        found.append(Group((starts_M1 + place_S).where(is_own_MS, starts_M1), is_own_MS))
    return found


class Split:
    """The attention function of one pass: of the shared prefix, which it keeps, or of a pack.

    In the layer `last` only `answers_N` are needed, and the rest is zero unless `keeps_all`.
    Answers are computed separately in both cases, so the rest changes none of their bits.
    """

    def __init__(
        self,
        prefix: Prefix,
        lengths_N: Tensor,
        last: int | None,
        answers_N: Tensor,
        *,
        keeps_all: bool,
    ) -> None:
        self.prefix, self.groups = prefix, groups(lengths_N)
        self.last, self.answers_N, self.keeps_all = last, answers_N, keeps_all

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Outputs (1, T, H, d) of queries, keys and values (1, H, T, d)."""
        if not self.groups:
            self.prefix[module.layer_idx] = key, value
        parts = _Parts(self, module, (query, key, value), options.get("scaling"))
        if module.layer_idx != self.last or self.keeps_all:
            result = parts.at(None)
        else:
            result = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
        if module.layer_idx == self.last and len(self.answers_N):
            result[:, self.answers_N] = parts.at(self.answers_N)
        return result, None


class _Parts:
    """Queries, keys and values of one layer in one pass."""

    def __init__(
        self, split: Split, module: Any, states: tuple[Tensor, ...], scale: float | None
    ) -> None:
        self.split, self.scale = split, scale
        self.query, self.key, self.value = states
        self.before = split.prefix.get(module.layer_idx) if split.groups else None

    def at(self, rows_N: Tensor | None) -> Tensor:
        if not self.split.groups:
            return self._flash(self.query, self.key, self.value, is_causal=True)[0]
        own, own_weight = self._own
        query = self.query
        if rows_N is not None:
            own, own_weight, query = own[:, rows_N], own_weight[:, rows_N], query[:, :, rows_N]
        if self.before is None:
            return own
        shared, shared_weight = self._flash(query, *self.before)
        # The weights are log-sum-exps.
        share = (own_weight - shared_weight).sigmoid().to(own.dtype)
        return torch.lerp(shared, own, share[..., None])

    @cached_property
    def _own(self) -> tuple[Tensor, Tensor]:
        # Tokens first: the heads of a token are contiguous.
        states = [s.transpose(1, 2)[0] for s in (self.query, self.key, self.value)]
        n_tokens, n_heads = states[0].shape[:2]
        out = self.query.new_empty(1, n_tokens, n_heads, states[2].shape[-1])
        weight_dtype = torch.promote_types(self.query.dtype, torch.float32)
        weight = self.query.new_empty(1, n_tokens, n_heads, dtype=weight_dtype)
        for group in self.split.groups:
            query, key, value = (s[group.places_NS].transpose(1, 2) for s in states)
            own, own_weight = self._flash(query, key, value, is_causal=True)
            own_T = group.places_NS[group.is_own_NS]
            out[0, own_T] = own[group.is_own_NS]
            weight[0, own_T] = own_weight[group.is_own_NS]
        return out, weight

    def _flash(
        self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Outputs (N, T, H, d) and their log-sum-exps (N, T, H)."""
        width = value.shape[-1]
        widest = max(width, query.shape[-1])  # latent attention has narrower values
        query, key, value = (_widened(s, widest) for s in (query, key, value))
        if not _SUPPORTS_GROUPED_QUERIES:
            n_sharing = query.shape[1] // key.shape[1]
            key, value = (s.repeat_interleave(n_sharing, dim=1) for s in (key, value))
        scale = self.scale or self.query.shape[-1] ** -0.5
        flash = getattr(torch.ops.aten, _FLASH)
        out, weight = flash(query, key, value, 0.0, is_causal, scale=scale)
        return out.transpose(1, 2)[..., :width], weight.transpose(1, 2)


def _widened(states: Tensor, width: int) -> Tensor:
    return states if states.shape[-1] == width else F.pad(states, (0, width - states.shape[-1]))
