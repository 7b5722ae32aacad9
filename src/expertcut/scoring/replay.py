"""The same forward passes again, from a later layer on: nothing before a changed gate changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from expertcut.models.hooks import replaced_forward
from expertcut.models.moe_block import MoeBlock

_NUMBERED = re.compile(r"(?P<list>.+)\.(?P<number>\d+)\..+")


class Replay:
    """Keeps what decoder layers gave in a first run, and starts later runs from there.

    Runs must consist of the same passes in the same order. As many layers are kept as fit in
    `budget_bytes`, the deepest first; where none is, `starting_at` runs everything.
    """

    def __init__(
        self, model: Any, blocks: Sequence[MoeBlock], n_tokens: int, budget_bytes: int
    ) -> None:
        self.decoder_of = _decoder_layers(blocks)
        self.decoders = _decoders(model, blocks) if self.decoder_of else []
        self.outputs: dict[int, list[Any]] = {}
        numbers = sorted({n for n in self.decoder_of.values() if n}, reverse=True)
        weight = model.get_input_embeddings().weight
        n_kept = budget_bytes // (n_tokens * weight.shape[1] * weight.element_size())
        self.starts = tuple(numbers[:n_kept])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps what comes into the layers that later runs may start at."""
        with ExitStack() as stack:
            for number in self.starts:
                self.outputs[number] = []
                handle = self.decoders[number - 1].register_forward_hook(
                    lambda _module, _args, output, kept=self.outputs[number]: kept.append(output)
                )
                stack.callback(handle.remove)
            yield

    @contextmanager
    def starting_at(self, layer: int) -> Iterator[None]:
        """Runs from this MoE block's decoder layer on, or from an earlier one that was kept."""
        number = max((n for n in self.starts if n <= self.decoder_of[layer]), default=0)
        kept = _Kept(self.outputs.get(number, []))
        with ExitStack() as stack:
            for module in self.decoders[:number]:
                is_last = module is self.decoders[number - 1]
                forward = kept.next if is_last else kept.peek
                stack.enter_context(replaced_forward(module, forward))
            yield

    def forget(self) -> None:
        """Later runs run everything."""
        self.starts, self.outputs = (), {}


class _Kept:
    """One layer's outputs, pass by pass, in place of a forward."""

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs
        self.position = 0

    def peek(self, *_args: Any, **_kwargs: Any) -> Any:
        """The current pass's; what is not the last layer's is read by nobody."""
        return self.outputs[self.position]

    def next(self, *_args: Any, **_kwargs: Any) -> Any:
        """The current pass's, which ends it."""
        self.position += 1
        return self.outputs[self.position - 1]


def _decoder_layers(blocks: Sequence[MoeBlock]) -> dict[int, int]:
    """The decoder layer of each MoE block; nothing where names do not tell."""
    matches = [_NUMBERED.fullmatch(block.name) for block in blocks]
    lists = {match["list"] for match in matches if match}
    if None in matches or len(lists) != 1:
        return {}
    return {b.layer: int(m["number"]) for b, m in zip(blocks, matches, strict=True) if m}


def _decoders(model: nn.Module, blocks: Sequence[MoeBlock]) -> list[nn.Module]:
    match = _NUMBERED.fullmatch(blocks[0].name)
    assert match is not None
    layers = model.get_submodule(match["list"])
    return [layer for _, layer in sorted(layers.named_children(), key=lambda item: int(item[0]))]
