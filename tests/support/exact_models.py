"""Exact checkpoints of tiny models, as a stranger would find them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from expertcut.checkpoints.exact import ExactWriter, exact_config
from expertcut.checkpoints.export import rewrite_of
from expertcut.checkpoints.shards import write_checkpoint
from expertcut.edits.calibrate import Constants
from expertcut.edits.plan import BlockEdit, EditPlan
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.kernels import Linear
from expertcut.models.load import MODELLING_FILE, MoeModel, find_source, modelling_code
from expertcut.models.validate import expert_count
from tests.conftest import FAMILIES, make_tokenizer
from tests.support.rewrites import Fitted, fitted_edits, zero_outputs

SMALL = FAMILIES["olmoe"]
EXACT_FAMILIES = {name: FAMILIES[name] for name in ("olmoe", "qwen3_moe", "qwen2_moe", "flex_olmo")}
TOKENS = torch.arange(2, 42)[None]
# Expert 0 is among them, and the counts differ.
REMOVED = {"model.layers.0.mlp": (0, 3, 4, 6), "model.layers.1.mlp": (5,)}


def make_base(folder: Path, family: str, **changes: object) -> Path:
    """A random model of a family that layout exact knows."""
    torch.manual_seed(0)
    dtype = changes.pop("dtype", torch.float32)
    config = AutoConfig.for_model(family, **{**EXACT_FAMILIES[family], **changes})
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_exact(
    base: Path, folder: Path, constants: Constants, biases: Mapping[str, Tensor] | None = None
) -> Path:
    """The exact checkpoint of a base, written as export writes it."""
    source, edits = find_source(str(base)), {}
    n_experts = expert_count(read_config(base)) or 0
    ExactWriter().check(source, is_cutting=bool(constants))
    for name in {**constants, **(biases or {})}:
        # A constant may have a bias too, so none goes by `keep`.
        bias = dict(enumerate(biases[name].tolist())) if biases and name in biases else {}
        edits[name] = BlockEdit(keep=tuple(range(n_experts)), bias=bias)
    if biases:
        ExactWriter().check_biases(source, edits)
    plan = EditPlan("a", "by hand", "activations", "answer", edits, "exact", is_cut=True)
    rewrite = rewrite_of("exact", source, edits, fitted_edits(plan, Fitted(constants=constants)))
    write_checkpoint(source.stored, folder, rewrite)
    config = ExactWriter().config(source, rewrite, n_experts)
    names = {rewrite.blocks[name].name: ids for name, ids in constants.items()}
    config = exact_config(config, names)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MODELLING_FILE).write_bytes(modelling_code())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(base / name, folder / name)
    return folder


def declared(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The removed experts that a config declares, by decoder layer."""
    compression = config.get("compression_config", {"transform_config": {}})
    found = compression["transform_config"].get("expert_substitution", {"targets": {}})["targets"]
    return {p.split(".")[2]: list(map(int, t["replacements"])) for p, t in found.items()}


def as_written_before(folder: Path, earlier: Path) -> Path:
    """The same exact checkpoint as expertcut wrote it before its constants had names of their own.

    The modelling file is the one that such checkpoints carry, to the byte.
    """
    shutil.copytree(folder, earlier)
    config = json.loads((folder / "config.json").read_text())
    config["approximate_experts"] = declared(config)
    config.pop("compression_config", None)
    (earlier / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    renamed = {n.replace(".constant_experts.", ".experts."): t for n, t in tensors.items()}
    save_file(renamed, earlier / "model.safetensors", metadata={"format": "pt"})
    code = Path(__file__).with_name("earlier_form") / f"{MODELLING_FILE}.txt"
    (earlier / MODELLING_FILE).write_bytes(code.read_bytes())
    return earlier


def constants_for(
    removed: Mapping[str, Sequence[int]], *, is_zero: bool, seed: int = 1
) -> dict[str, dict[int, Tensor]]:
    """Zeros, or numbers as large as an expert's output."""
    torch.manual_seed(seed)
    zeros = zero_outputs(removed, int(str(SMALL["hidden_size"])))
    if is_zero:
        return zeros
    return {b: {e: torch.randn_like(v) for e, v in own.items()} for b, own in zeros.items()}


def load_exact(folder: Path, experts: str = "eager", **options: Any) -> Any:
    """As any user of transformers loads it; at aligned addresses, so that bits can be compared."""
    auto = next(name for name in read_config(folder)["auto_map"] if name != "AutoConfig")
    family: Any = getattr(transformers, auto)
    model = family.from_pretrained(folder, trust_remote_code=True, **options)
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:  # of a mapped file
            parameter.data = parameter.data.clone()
    model.set_experts_implementation(experts)
    return model.eval()


def as_transformers_runs_it(moe: MoeModel) -> MoeModel:
    """Without our products and our loop over experts, so that bits can be compared."""
    moe.model.set_experts_implementation("eager")
    for module in moe.model.modules():
        if type(module) is Linear:
            module.__class__ = torch.nn.Linear
    return moe


@torch.inference_mode()
def logprobs(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """Log p of the whole vocabulary at each position."""
    result: Tensor = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(dim=-1)
    return result
