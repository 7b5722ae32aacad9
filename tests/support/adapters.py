"""LoRA adapters of tiny models as peft writes them, and what base and adapter answer together."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertcut.checkpoints.lora import adapter_cut
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import BlockEdit, ChosenOn, EditPlan, PlanFile, PlanModel, removed_experts
from expertcut.models.load import find_source
from tests.conftest import make_tokenizer
from tests.support.rewrites import Fitted, export, zero_outputs

TOKENS = torch.arange(2, 42)[None]
N_EXPERTS, WIDTH, RANK = 8, 32, 4
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ROUTERS = ["mlp.gate.weight", "router.weight"]
# Attention of all families, and what recurrent layers and shared experts have.
LINEAR = ["q_proj", "o_proj", "kv_b_proj", "in_proj", "out_proj", "shared_expert_gate"]
_PLAN = PlanFile(
    model=PlanModel(id="model", revision=None, fingerprint=""),
    action="a cut",
    criterion="activations",
    positions="answer",
    removal="reroute",
    layout="stock",
    chosen_on=ChosenOn(quiz="quiz", split="val", questions=1, sha256=""),
    blocks={"model.layers.0.mlp": BlockEdit(keep=(0,))},
)


def opened(folder: Path) -> Any:
    """A model in float64, where the order of sums makes no difference worth a mention."""
    options = {"trust_remote_code": True} if (folder / "modeling_exact.py").exists() else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def peft_quietly(call: Any, *arguments: Any, **options: Any) -> Any:
    """peft asks transformers for a property that warns, and takes parameters for no modules."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", ".*did not match any targeted module.*", RuntimeWarning)
        return call(*arguments, **options)


def make_adapter(base: Path, folder: Path, parameters: list[str] | None, **options: Any) -> Path:
    """An adapter whose deltas are as large as the weights: as peft begins, they would be zero."""
    torch.manual_seed(1)
    how = {"r": RANK, "lora_alpha": 8, "target_modules": LINEAR, **options}
    config = LoraConfig(init_lora_weights=False, target_parameters=parameters, **how)
    peft_quietly(get_peft_model, opened(base), config).save_pretrained(folder)
    return folder


def one_by_one(adapter: Path, folder: Path) -> Path:
    """An adapter of all experts as transformers 4 would have it: linear layers of each expert.

    Gate and up projection have ranks of their own there; here each takes the part of the fused B
    that is its.
    """
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] += ["gate", "gate_proj", "up_proj", "down_proj"]
    config["target_parameters"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found: dict[str, Tensor] = {}
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        module = name.removesuffix(".lora_A.weight")
        if ".experts" not in name:
            found[name] = a
        elif module != name:
            b = tensors[f"{module}.lora_B.weight"]
            found |= _of_each(module, a.unflatten(0, (N_EXPERTS, -1)), b)
    save_file(found, folder / "adapter_model.safetensors")
    return folder


def _of_each(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    by_expert = b.unflatten(1, (-1, N_EXPERTS))
    is_first = module.endswith(".base_layer")
    parts = dict(zip(("gate_proj", "up_proj"), by_expert.chunk(2), strict=True))
    for part, own in (parts if is_first else {"down_proj": by_expert}).items():
        for expert in range(N_EXPERTS):
            name = f"{module.removesuffix('.base_layer')}.{expert}.{part}"
            made[f"{name}.lora_A.weight"] = a[expert].clone()
            made[f"{name}.lora_B.weight"] = own[..., expert].clone()
    return made


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """The base with the adapter added to its weights, by peft."""
    return saved(with_adapter(base, adapter).merge_and_unload(), folder)


def with_adapter(base: Path, adapter: Path) -> Any:
    return peft_quietly(PeftModel.from_pretrained, opened(base), adapter).eval()


def cut(
    base: Path,
    edits: Mapping[str, BlockEdit],
    folder: Path,
    layout: Layout = "stock",
    *,
    adapter: Path | None = None,
    folds: Mapping[int, Any] | None = None,
) -> Path:
    """What `prune` writes of a plan, the adapter with it."""
    source = find_source(str(base))
    draft = EditPlan("cut", "a cut", "activations", "answer", edits, layout, is_cut=True)
    carries = adapter_cut(adapter, source, draft, folder)
    constants = zero_outputs(removed_experts(edits, N_EXPERTS), WIDTH)
    folder.mkdir()
    gathered = Fitted(folds or {}, {}, constants if layout == "exact" else {})
    export(source, draft, N_EXPERTS, gathered, folder)
    if carries is not None:
        carries.write(folder, _PLAN, folds or {})
    return folder


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    """Of the whole vocabulary at each position."""
    found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found
