"""Where a model's numbers stop being finite: looked for once an answer is no number, never before.

An answer that is no number would be counted as a wrong one, so it stops the run.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.errors import ModelError
from expertcut.moe.loading import MoeModel
from expertcut.moe.observers import replaced_forward
from expertcut.moe.packing import Encoded

_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


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
