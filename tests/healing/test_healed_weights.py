"""Adapters of a healed model as weights on disk, family by family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from expertcut.checkpoints.shards import read_tensor
from expertcut.errors import ModelError
from expertcut.healing.adapters import adapted, deltas, write_adapter, write_merged
from expertcut.healing.heal_settings import HealSettings, Target
from expertcut.models.load import MoeModel
from expertcut.models.safetensors_index import read_headers
from tests.conftest import FAMILIES, STORAGE_FORMS, make_checkpoint, open_model, slow_but

Checkpoints = Callable[..., Path]
TARGETS: tuple[Target, ...] = get_args(Target)
TOKENS = torch.arange(2, 42)[None]


def trained(moe: MoeModel, targets: tuple[Target, ...] = TARGETS) -> Any:
    """Adapters that change something, as after some steps."""
    model = adapted(moe, HealSettings(rank=2, alpha=4, targets=targets))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    return model.eval()


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


# Each form of storage, latent attention, recurrent layers, and a shared expert.
@pytest.mark.parametrize(
    "family", slow_but((*STORAGE_FORMS, "deepseek_v3", "jamba", "qwen2_moe"), FAMILIES)
)
def test_the_written_checkpoint_is_the_model_with_its_adapters(
    checkpoint: Checkpoints, tmp_path: Path, family: str
) -> None:
    path = checkpoint(family)
    moe = open_model(path)
    before = logits(moe.model)
    model = trained(moe)
    with_adapters = logits(moe.model)
    assert (with_adapters - before).abs().max() > 0.05
    write_merged(moe.source, model, tmp_path / "healed")
    again = open_model(tmp_path / "healed")
    assert (logits(again.model) - with_adapters).abs().max() < 2e-4
    theirs, ours = read_headers(path), read_headers(tmp_path / "healed")
    assert {n: (t.shape, t.dtype) for n, t in theirs.items()} == {
        n: (t.shape, t.dtype) for n, t in ours.items()
    }
    changed = [n for n in theirs if not read_tensor(theirs[n]).equal(read_tensor(ours[n]))]
    assert 0 < len(changed) < len(theirs)
    assert any("expert" in name or "put_linear" in name for name in changed)  # Granite
    assert not [name for name in changed if "norm" in name or "embed" in name]


@pytest.mark.parametrize("targets", [("attention",), ("experts",), ("gate",)])
def test_only_what_is_named_changes(
    checkpoint: Checkpoints, tmp_path: Path, targets: tuple[Target, ...]
) -> None:
    path = checkpoint("olmoe")
    moe = open_model(path)
    write_merged(moe.source, trained(moe, targets), tmp_path / "healed")
    theirs, ours = (load_file(p / "model.safetensors") for p in (path, tmp_path / "healed"))
    mark = {"attention": "self_attn", "experts": ".experts.", "gate": "mlp.gate.weight"}[targets[0]]
    changed = {name for name in theirs if not theirs[name].equal(ours[name])}
    assert changed == {n for n in theirs if mark in n and "norm" not in n} != set()


def test_adapters_change_nothing_before_they_are_trained(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("olmoe"))
    before = logits(moe.model)
    model = adapted(moe, HealSettings(rank=2, alpha=4, targets=TARGETS))
    assert (logits(moe.model) - before).abs().max() < 1e-6
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert names and all("lora_" in name for name in names)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.1.self_attn.q_proj.weight", None),
        ("model.layers.1.mlp.gate.weight", None),
        ("model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_half_precision_is_rounded_once(
    half: Path, tmp_path: Path, name: str, place: str | None
) -> None:
    moe = open_model(half, dtype="bfloat16")
    model = trained(moe)
    write_merged(moe.source, model, tmp_path / "healed")
    added = dict(deltas(model))[place or name]()
    factors = lora_factors(model, place or name)
    assert torch.allclose(added.double(), factors, rtol=1e-5, atol=1e-8)
    assert factors.abs().max() > 0.01
    stored, healed = (load_file(p / "model.safetensors")[name] for p in (half, tmp_path / "healed"))
    assert stored.dtype == healed.dtype == torch.bfloat16
    own = added[3] if place else added
    assert healed.equal((stored.float() + own).bfloat16()) and not healed.equal(stored)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("half") / "half", "olmoe")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    return path


def lora_factors(model: Any, parameter: str) -> Tensor:
    """B·A times the scale, in float64, of a linear layer or of each expert."""
    layer, _, last = parameter.rpartition(".")
    found = [m for n, m in model.named_modules() if is_adapter_of(n, m, layer, last)]
    (module,) = found
    a, b = (f["default"].weight.double() for f in (module.lora_A, module.lora_B))
    n = getattr(module, "num_experts", 1)
    of_each = torch.stack([b[:, i::n] @ a.view(n, -1, a.shape[1])[i] for i in range(n)])
    return (of_each * module.scaling["default"]).squeeze(0)


def is_adapter_of(name: str, module: nn.Module, layer: str, parameter: str) -> bool:
    is_of_layer = name.removeprefix("base_model.model.").replace(".base_layer", "") == layer
    own = getattr(module, "parameter_name", "weight")
    return is_of_layer and hasattr(module, "lora_A") and own == parameter


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_an_adapter_loads_with_peft_on_plain_transformers(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    from peft import PeftModel

    path = checkpoint("olmoe")
    moe = open_model(path)
    model = trained(moe)
    write_adapter(moe.source, model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(path)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert (logits(loaded) - logits(moe.model)).abs().max() < 2e-4
    assert not list((tmp_path / "adapter").glob("*.bin"))
    # Peft keeps sets, whose order differs in each process.
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for names in ("target_modules", "target_parameters"):
        assert isinstance(getattr(model.peft_config["default"], names), list)
        assert config[names] == sorted(config[names]) != []


def test_what_cannot_be_adapted_is_refused(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("olmoe"))
    for layer in moe.model.model.layers:
        del layer.self_attn
    with pytest.raises(ModelError, match="no linear layers in its attention"):
        adapted(moe, HealSettings(targets=("attention",)))
