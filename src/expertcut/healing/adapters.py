"""Low-rank adapters in training, and their merge into the weights of the checkpoint."""

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertcut.checkpoints.exact import constants_on_disk, exact_config, has_earlier_names
from expertcut.checkpoints.export import companions
from expertcut.checkpoints.output_dir import system_errors
from expertcut.checkpoints.shards import Change, Rewrite, write_checkpoint
from expertcut.checkpoints.tensor_names import earlier_constants
from expertcut.errors import ContractError, ModelError
from expertcut.files import share, write_atomically
from expertcut.healing.heal_settings import HealSettings, Target
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import MODELLING_FILE, MoeModel, Source, modelling_code

ADAPTER = "default"
OnDisk = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def adapted(moe: MoeModel, settings: HealSettings) -> Any:
    """A peft model with adapters that change nothing yet and are all that is trained."""
    from peft import LoraConfig, get_peft_model

    modules, parameters = _targets(moe, settings.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        lora_dropout=0.0,  # not supported for fused experts
        target_modules=modules or None,
        target_parameters=parameters or None,
    )
    torch.manual_seed(settings.seed)
    with without_warning():
        return get_peft_model(moe.model, config, adapter_name=ADAPTER)


# peft uses a deprecated name of transformers.
without_warning = partial(warnings.catch_warnings, action="ignore", category=FutureWarning)


def deltas(model: Any) -> Iterator[tuple[str, Any]]:
    """The change of each adapted parameter by name, as a function that computes it."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            shape = getattr(module.get_base_layer(), parameter).shape
            yield f"{name.replace('.base_layer', '')}.{parameter}", _Delta(module, shape)


@dataclass(frozen=True)
class _Delta:
    module: Any
    shape: torch.Size

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The change in float32; peft rounds it to the parameter's dtype."""
        a_RI = self.module.lora_A[ADAPTER].weight.float().cpu()
        b_OR = self.module.lora_B[ADAPTER].weight.float().cpu()
        n_experts = getattr(self.module, "num_experts", 1)
        a_ERI = a_RI.reshape(n_experts, -1, a_RI.shape[-1])
        b_ORE = b_OR.reshape(b_OR.shape[0], -1, n_experts)
        added_EOI = torch.einsum("o r e, e r i -> e o i", b_ORE, a_ERI)
        if getattr(self.module.get_base_layer(), "is_transposed", False):  # as in GPT-OSS
            added_EOI = added_EOI.transpose(1, 2)
        scaled: Tensor = added_EOI * self.module.scaling[ADAPTER]
        return scaled.reshape(self.shape)


def _targets(moe: MoeModel, targets: tuple[Target, ...]) -> tuple[list[str], list[str]]:
    """Names of linear layers and of parameters, as short as unambiguous."""
    linear = [name for name, m in moe.model.named_modules() if isinstance(m, nn.Linear)]
    modules, parameters = [], []
    if "attention" in targets:
        moe_blocks = tuple(f"{block.name}." for block in moe.blocks)
        outside = [name for name in linear if not name.startswith(moe_blocks)]
        modules = [name for name in outside if re.search(r"attn|attention", name)]
        if not modules:
            raise ModelError(f"{moe.source.id} has no linear layers in its attention to adapt")
    for block in moe.blocks if "experts" in targets else ():
        names = [name for name, weight in block.experts.named_parameters() if weight.ndim == 3]
        if not names:
            raise ModelError(f"{block.name} has no fused experts to adapt")
        parameters += [f"{block.name}.experts.{name}" for name in names]
    for block in moe.blocks if "gate" in targets else ():
        router = next(n for n, module in block.module.named_children() if module is block.router)
        matrices = (name for name, weight in block.router.named_parameters() if weight.ndim == 2)
        parameters += [f"{block.name}.{router}.{n}" for n in matrices if n.endswith("weight")]
    known = [name for name, _ in moe.model.named_parameters()]
    return _short(modules, linear, 1), _short(parameters, known, 3)


def _short(wanted: list[str], known: Collection[str], n_parts: int) -> list[str]:
    """Endings of `n_parts` parts if they name exactly the wanted ones, else full names."""
    endings = sorted({".".join(name.split(".")[-n_parts:]) for name in wanted})
    meant = [name for name in known if any(f".{name}".endswith(f".{end}") for end in endings)]
    return endings if sorted(meant) == sorted(wanted) else sorted(wanted)


def write_merged(source: Source, model: Any, folder: Path) -> None:
    """Writes the checkpoint with the adapters merged, tensor by tensor in float32, rounded once."""
    from transformers.core_model_loading import revert_weight_conversion

    added, stored = dict(deltas(model)), source.headers
    # A parameter under its names on disk; the conversions only slice, transpose and stack.
    on_disk: OnDisk = partial(revert_weight_conversion, model.get_base_model())

    @lru_cache(maxsize=4)  # parameters whose tensors alternate on disk
    def parts(parameter: str) -> dict[str, Tensor]:
        return on_disk({parameter: added[parameter]()})

    def plus(parameter: str, name: str, before: Tensor) -> Tensor:
        return (before.float() + parts(parameter)[name]).to(before.dtype)

    changed: dict[str, Change] = {}
    for parameter, delta in added.items():
        nothing = torch.empty(delta.shape, device="meta")
        for name, part in on_disk({parameter: nothing}).items():
            shape = tuple(part.shape)
            if name not in stored or stored[name].shape != shape:
                raise ContractError(
                    f"{source.id}: the change of {parameter} belongs to {name} {list(shape)}, "
                    "which does not exist: keep the adapter, with --adapter"
                )
            changed[name] = Change(shape, partial(plus, parameter, name))
    rewrite = Rewrite(renamed=earlier_constants(stored), changed=changed)
    write_checkpoint(source.stored, folder, rewrite)
    for file in companions(source.path):
        write_atomically(folder / file.name, file.read_bytes())
    content = (source.path / "config.json").read_bytes()
    if has_earlier_names(config := read_config(source.path)):
        config = exact_config(config, constants_on_disk(source.headers))
        content = (json.dumps(config, indent=2) + "\n").encode()
        write_atomically(folder / MODELLING_FILE, modelling_code())
    write_atomically(folder / "config.json", content)


def write_adapter(source: Source, model: Any, folder: Path) -> None:
    """Writes the adapters in peft's format, with the checkpoint as their base model."""
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = source.id
    for names in ("target_modules", "target_parameters"):
        if targets := getattr(config, names):
            setattr(config, names, sorted(targets))  # a set has another order in each process
    with system_errors(folder):
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty form
    for file in folder.iterdir():
        share(file)  # safetensors writes for the owner only
