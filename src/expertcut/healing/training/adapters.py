"""Low-rank adapters on attention, on the experts' fused matrices and, if asked, on the gates."""

import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.errors import ModelError, SettingsError
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock

TARGETS = ("attention", "experts", "gate")
ADAPTER = "default"
_ATTENTION = re.compile(r"attn|attention")


@dataclass(frozen=True)
class Lora:
    """Rank, scale (`alpha` / rank) and what is adapted."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    seed: int = 0


def adapted(moe: MoeModel, lora: Lora) -> Any:
    """The model with adapters that change nothing yet, the only weights with gradients.

    The blocks of `moe` stay valid: their modules are wrapped, not replaced.

    Raises:
        ModelError: nothing there to adapt.
        SettingsError: an unknown target.
    """
    from peft import LoraConfig, get_peft_model

    modules, parameters = _targets(moe, lora.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,  # cannot be had for fused experts
        target_modules=modules or None,
        target_parameters=parameters or None,
    )
    torch.manual_seed(lora.seed)
    with _unwarned():
        return get_peft_model(moe.model, config, adapter_name=ADAPTER)


def put_on(moe: MoeModel, folder: Path) -> None:
    """Puts adapters that were written on a model."""
    from peft import PeftModel

    with _unwarned():
        PeftModel.from_pretrained(moe.model, folder)


def load_weights(model: Any, folder: Path) -> None:
    """Puts written weights in the adapters that a model has."""
    with _unwarned():
        model.load_adapter(str(folder), ADAPTER)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Peft asks transformers for a name that it gave up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def deltas(model: Any) -> Iterator[tuple[str, Any]]:
    """What adapters add, by the name of the parameter: a function of nothing for each."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            own = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            yield f"{name.replace('.base_layer', '')}.{own}", _Delta(module, own)


@dataclass(frozen=True)
class _Delta:
    module: Any
    parameter: str

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        parameter: Tensor = getattr(self.module.get_base_layer(), self.parameter)
        return parameter.shape

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """In float32, of the parameter's shape; peft's own is rounded to the parameter's dtype."""
        a_RI, b_OR = (
            factors[ADAPTER].weight.float().cpu()
            for factors in (self.module.lora_A, self.module.lora_B)
        )
        n_experts = getattr(self.module, "num_experts", 1)
        a_ERI = a_RI.reshape(n_experts, -1, a_RI.shape[-1])
        b_ORE = b_OR.reshape(b_OR.shape[0], -1, n_experts)
        added_EOI = torch.einsum("o r e, e r i -> e o i", b_ORE, a_ERI)
        if getattr(self.module.get_base_layer(), "is_transposed", False):  # as GPT-OSS has them
            added_EOI = added_EOI.transpose(1, 2)
        scaled: Tensor = added_EOI * self.module.scaling[ADAPTER]
        return scaled.reshape(self.shape)


def _targets(moe: MoeModel, asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of linear layers, and of parameters, as short as they are unambiguous."""
    if unknown := [target for target in asked if target not in TARGETS]:
        raise SettingsError(f"--targets {unknown[0]} is unknown: it can be {', '.join(TARGETS)}")
    modules, parameters = list[str](), list[str]()
    if "attention" in asked:
        modules = _attention(moe)
    if "experts" in asked:
        parameters += [name for block in moe.blocks for name in _experts(block)]
    if "gate" in asked:
        parameters += [name for block in moe.blocks for name in _gate(block)]
    linear = [n for n, m in moe.model.named_modules() if isinstance(m, nn.Linear)]
    known = [name for name, _ in moe.model.named_parameters()]
    return _short(modules, linear, 1), _short(parameters, known, 3)


def _attention(moe: MoeModel) -> list[str]:
    inside = tuple(f"{block.name}." for block in moe.blocks)
    found = [
        name
        for name, module in moe.model.named_modules()
        if isinstance(module, nn.Linear) and _ATTENTION.search(name) and not name.startswith(inside)
    ]
    if not found:
        raise ModelError(f"{moe.source.id} has no linear layers in its attention to adapt")
    return found


def _experts(block: MoeBlock) -> list[str]:
    names = [name for name, weight in block.experts.named_parameters() if weight.ndim == 3]
    if not names:
        raise ModelError(f"{block.name} has no fused experts to adapt")
    return [f"{block.name}.experts.{name}" for name in names]


def _gate(block: MoeBlock) -> list[str]:
    own = next(name for name, module in block.module.named_children() if module is block.router)
    found = [n for n, w in block.router.named_parameters() if w.ndim == 2 and n.endswith("weight")]
    return [f"{block.name}.{own}.{name}" for name in found]


def _short(wanted: list[str], known: Collection[str], n_parts: int) -> list[str]:
    """Endings of so many parts where they name just what is wanted, else full names."""
    endings = sorted({".".join(name.split(".")[-n_parts:]) for name in wanted})
    meant = [name for name in known if any(f".{name}".endswith(f".{end}") for end in endings)]
    return endings if sorted(meant) == sorted(wanted) else sorted(wanted)
