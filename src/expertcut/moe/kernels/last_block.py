"""The last MoE block where only answers are read: no work for tokens whose output nobody reads."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expertcut.moe.contract import MoeBlock
from expertcut.moe.observers import own_forward, replaced_forward

OnRows = Callable[[Tensor, bool], None]
_NUMBERED = re.compile(r"(?P<list>.+)\.(?P<number>\d+)\.[^.]+")


def last_decoder_layer(model: Any, blocks: Sequence[MoeBlock]) -> int | None:
    """The number of the last decoder layer, if its last part is the last MoE block."""
    match = _NUMBERED.fullmatch(blocks[-1].name)
    if match is None:
        return None
    number = int(match["number"])
    return number if number == len(model.get_submodule(match["list"])) - 1 else None


@contextmanager
def reading_answers(
    block: MoeBlock, answers_N: Tensor, n_tokens: int, on_rows: OnRows, *, keeps_all: bool
) -> Iterator[None]:
    """The block gets the answer positions only; what it gives elsewhere is zero.

    Where it `keeps_all`, the other tokens run after them, for those who watch. `on_rows` is told
    before each of the two which tokens they are, and whether their output is read.
    """
    forward = own_forward(block.module)

    def run(x_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        answers = answers_N.to(x_TD.device)
        on_rows(answers, True)
        found = forward(x_TD[answers][None], *args, **kwargs)
        is_pair = isinstance(found, tuple)  # some give router scores beside
        y_TD = torch.zeros_like(x_TD)
        y_TD[answers] = (found[0] if is_pair else found)[0]
        if keeps_all:
            others = others_M.to(x_TD.device)
            on_rows(others, False)
            forward(x_TD[others][None], *args, **kwargs)
        y_BTD = y_TD.view_as(x_BTD)
        return (y_BTD, *found[1:]) if is_pair else y_BTD

    others_M = _others(answers_N, n_tokens) if keeps_all else answers_N
    with replaced_forward(block.module, run):
        yield


def _others(answers_N: Tensor, n_tokens: int) -> Tensor:
    is_other_T = torch.ones(n_tokens, dtype=torch.bool)
    is_other_T[answers_N] = False
    return is_other_T.nonzero()[:, 0]
