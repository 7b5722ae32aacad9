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

    def call(rows_M: Tensor, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block on these tokens, each argument of the rank that the model gives it."""
        shape = x.shape[:-1]
        picked = {name: _rows(value, shape, rows_M) for name, value in kwargs.items()}
        return forward(*(_rows(value, shape, rows_M) for value in (x, *args)), **picked)

    def run(x_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        answers = answers_N.to(x_TD.device)
        on_rows(answers, True)
        found = call(answers, x_BTD, args, kwargs)
        is_pair = isinstance(found, tuple)  # some give router scores beside
        y_TD = torch.zeros_like(x_TD)
        y_TD[answers] = (found[0] if is_pair else found).reshape(-1, x_TD.shape[-1])
        if keeps_all:
            others = others_M.to(x_TD.device)
            on_rows(others, False)
            call(others, x_BTD, args, kwargs)
        y_BTD = y_TD.view_as(x_BTD)
        return (y_BTD, *found[1:]) if is_pair else y_BTD

    others_M = _others(answers_N, n_tokens) if keeps_all else answers_N
    with replaced_forward(block.module, run):
        yield


def _rows(value: Any, shape: torch.Size, rows_M: Tensor) -> Any:
    """The rows of an argument that has one entry for each token, else the argument."""
    if not isinstance(value, Tensor) or value.shape[: len(shape)] != shape:
        return value
    own_M = value.reshape(shape.numel(), *value.shape[len(shape) :])[rows_M.to(value.device)]
    return own_M.reshape(*[1] * (len(shape) - 1), *own_M.shape)


def _others(answers_N: Tensor, n_tokens: int) -> Tensor:
    is_other_T = torch.ones(n_tokens, dtype=torch.bool)
    is_other_T[answers_N] = False
    return is_other_T.nonzero()[:, 0]
