"""Checkpoints of modeling_declared.py, and what their own code does with each token."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertcut.models.contract_check import read_contract
from expertcut.models.load import LoadOptions, MoeModel, find_source, load
from tests.conftest import make_tokenizer
from tests.support import modeling_declared
from tests.support.families import EIGHT

CONTRACTS = Path(__file__).resolve().parents[2] / "contracts"
FILE = Path(modeling_declared.__file__)
SHAPES: dict[str, dict[str, object]] = {
    "deepseek": {"norm_topk_prob": False},
    "top_p": {"top_p_threshold": 0.7},
    "dropping": {"router_capacity_factor_eval": 0.5},
    "grouped": {},
    "recurrent": {"router_width": 8},
    "iterated": {"inner_iter": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "plus_plus": {
        **{"num_experts": [10], "moe_use_mixtral_gating": False, "moe_use_logits_norm": False},
        **{"moe_feature_no_mul_topk": False, "moe_gate_norm_std": 1.0},
    },
}
TRUSTED = LoadOptions(trust_remote_code=True)


def contract_of(shape: str) -> Path:
    """The shipped contract."""
    own = {"iterated": "iterated.py", "grouped": "grouped.py"}
    return CONTRACTS / own.get(shape, "module_list.py")


def make_declared(folder: Path, shape: str) -> Path:
    """A random checkpoint of a shape, with its modelling file."""
    torch.manual_seed(0)
    config = modeling_declared.DeclaredConfig(**{**EIGHT, **SHAPES[shape], "shape": shape})
    modeling_declared.DeclaredForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    shutil.copy(FILE, folder)
    classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "ForCausalLM"}
    auto_map = {auto: f"{FILE.stem}.Declared{own}" for auto, own in classes.items()}
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"auto_map": auto_map}))
    return folder


def open_declared(folder: Path, contract: Path) -> MoeModel:
    """The model by a contract."""
    return load(find_source(str(folder), None, read_contract(contract)), TRUSTED)


def open_raw(folder: Path) -> Any:
    """The model by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.inference_mode()
def own_sums(model: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Sums (L, E) over all tokens of prompts that run alone, by the code of the model itself."""
    code = sys.modules[type(model).__module__]
    chosen_sum: Callable[..., Tensor] = code.chosen_sum
    rows: list[dict[str, Tensor]] = []

    def noted(block: Any, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        n_experts, found = len(block.experts), {}
        sums = {
            name: torch.zeros(n_experts).double()
            for name in ("tokens", "weight", "norm", "weighted_norm")
        }
        for expert in range(n_experts):
            is_own_TK = (experts_TK == expert) & ((weights_TK > 0) | (n_experts == 10))
            tokens_M, places_M = torch.where(is_own_TK)
            norm_M = block.experts[expert](x_TD[tokens_M]).norm(dim=-1).double()
            weight_M = weights_TK[tokens_M, places_M].double()
            found = {"tokens": torch.ones_like(norm_M), "weight": weight_M, "norm": norm_M}
            for name, value_M in (found | {"weighted_norm": weight_M * norm_M}).items():
                sums[name][expert] = value_M.sum()
        rows.append(sums)
        return chosen_sum(block, x_TD, weights_TK, experts_TK)

    code.chosen_sum = noted
    try:
        for ids in prompts:
            model(input_ids=torch.tensor([ids]))
    finally:
        code.chosen_sum = chosen_sum
    n_layers = len(rows) // len(prompts)
    return {
        name: torch.stack(
            [
                sum((row[name] for row in rows[i::n_layers]), torch.zeros(()))
                for i in range(n_layers)
            ]
        )
        for name in rows[0]
    }
