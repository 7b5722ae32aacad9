"""A quiz through a model, its routers heard at every distinct token that is not a pad."""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from expertcut.data import Quiz
from expertcut.models.hooks import Routing, observe_routers
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import Pass

Hear = Callable[[Routing, Tensor], None]


def listen(engine: Engine, quiz: Quiz, layers: Collection[int], hear: Hear) -> None:
    """Tells what a router did and which of its T tokens are answer positions, pass by pass.

    Tensors come on the CPU. Tokens that the questions of a chunk share come once.
    """
    current: list[Pass] = []

    def see(routing: Routing) -> None:
        step = current[-1]
        is_answer_T = torch.zeros(len(routing.input_TD), dtype=torch.bool)
        is_answer_T[step.answers_N] = True
        valid_T = slice(None) if step.valid_T is None else step.valid_T
        tensors = {
            name: getattr(routing, name).cpu()[valid_T]
            for name in ("input_TD", "logits_TE", "weights_TK", "experts_TK")
        }
        hear(replace(routing, **tensors), is_answer_T[valid_T])

    blocks = [block for block in engine.moe.blocks if block.layer in layers]
    with observe_routers(blocks, see):
        ask(engine, quiz, lambda step: current.__setitem__(slice(None), [step]))
