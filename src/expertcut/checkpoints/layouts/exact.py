"""Layout `exact`: removed experts become constants, a bias stays a bias, and nothing else changes.

The files are those of vLLM's constant-expert substitution (0.33 and later): kept experts keep ids
and names, a removed one leaves `<block>.experts.<id>.approx_value` (D,), `config.json` lists the
removed ids by layer, and `modeling_exact.py` beside it runs them in transformers.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertcut.checkpoints.headers import DTYPES, StoredTensor
from expertcut.checkpoints.names import DiskBlock, find_disk_blocks
from expertcut.checkpoints.shards import Rewrite
from expertcut.errors import ContractError, PlanError
from expertcut.interventions.plan import Edit
from expertcut.moe.contract import MoeBlock
from expertcut.moe.engine import Engine, ask
from expertcut.moe.loading import expert_count
from expertcut.moe.observers import ExpertCall, _replaced_forward, observe_experts
from expertcut.moe.packing import Pass
from expertcut.quiz import Quiz

MODELLING_FILE = "modeling_exact.py"
# By config.model_type, the name before `ForCausalLM`: those that the modelling file knows.
FAMILIES = {
    "flex_olmo": "FlexOlmo",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}

# What a removed expert gives instead of its output (D,), by block name and expert id.
Constants = Mapping[str, Mapping[int, Tensor]]
Removed = Mapping[str, Collection[int]]


def modelling_code() -> bytes:
    """The file that goes into the checkpoint as `modeling_exact.py`."""
    return Path(__file__).with_name(MODELLING_FILE).read_bytes()


def check_exact(config: Mapping[str, Any]) -> None:
    """That the layout can carry an edit of this model.

    Raises:
        ContractError: a family that it does not know, or a model that is `exact` already.
    """
    model_type = config.get("model_type")
    if "approximate_experts" in config or "biased_gates" in config:
        raise ContractError("the model has layout exact already: change the one it was made from")
    if model_type not in FAMILIES:
        raise ContractError(
            f"layout exact does not support {model_type} models, only "
            f"{', '.join(sorted(FAMILIES))}: use --layout stock"
        )


def removed_experts(edits: Mapping[str, Edit], n_experts: int) -> dict[str, tuple[int, ...]]:
    """The experts that each block's edit does not keep; blocks that keep all are left out."""
    removed = {
        block: tuple(e for e in range(n_experts) if e not in edit.keep)
        for block, edit in edits.items()
    }
    return {block: experts for block, experts in removed.items() if experts}


def exact_config(
    config: Mapping[str, Any], removed: Removed, biased: Collection[str] = ()
) -> dict[str, Any]:
    """The original config and what the modelling file must know; `biased` are block names.

    Where only experts are removed, `architectures` and `model_type` stay the family's, by which
    vLLM reads the checkpoint. It has no place for a gate's bias, and neither have the family's
    classes in transformers, so that with one both names change and both refuse it.

    Raises:
        ContractError: as `check_exact`.
        PlanError: a block without an expert left, or an expert that it does not have.
    """
    check_exact(config)
    family = FAMILIES[config["model_type"]]
    auto_map = {"AutoModelForCausalLM": f"modeling_exact.Exact{family}ForCausalLM"}
    n_experts = expert_count(dict(config)) or 0
    for block, experts in removed.items():
        _check_removed(block, experts, n_experts)
    by_layer = {layer_number(block): sorted(ids) for block, ids in removed.items() if ids}
    edited = {
        **config,
        "auto_map": auto_map,
        "approximate_experts": {str(layer): by_layer[layer] for layer in sorted(by_layer)},
    }
    if biased:
        auto_map["AutoConfig"] = f"modeling_exact.Exact{family}Config"
        edited["architectures"] = [f"Exact{family}ForCausalLM"]
        edited["model_type"] = f"exact_{config['model_type']}"
        edited["biased_gates"] = sorted(map(layer_number, biased))
    return edited


def _check_removed(block: str, experts: Collection[int], n_experts: int) -> None:
    outside = sorted(e for e in experts if not 0 <= e < n_experts)
    if outside or len(set(experts)) < len(experts):
        raise PlanError(
            f"{block}: removes experts {sorted(experts)}, must be different ones of 0 to "
            f"{n_experts - 1}"
        )
    if len(experts) == n_experts:
        raise PlanError(f"{block} keeps none of its {n_experts} experts: keep at least 1")


def layer_number(block: str) -> int:
    """The decoder layer of a block: `model.layers.3.mlp` is in layer 3, dense layers counted.

    Raises:
        ContractError: the name holds no number, or several.
    """
    numbers = [int(part) for part in block.split(".") if re.fullmatch(r"\d+", part)]
    if len(numbers) != 1:
        raise ContractError(f"{block} must have one layer number in its name, has {len(numbers)}")
    return numbers[0]


def exact_rewrite(
    headers: Mapping[str, StoredTensor],
    constants: Constants,
    biases: Mapping[str, Tensor] | None = None,
) -> Rewrite:
    """Which tensors go and which come: constants in their experts' dtype, biases (E,) in float32.

    Raises:
        ContractError: a block whose experts do not lie one by one on disk.
    """
    blocks = find_disk_blocks(headers)
    removed, added = set[str](), dict[str, Tensor]()
    for name, by_expert in constants.items():
        for expert, value_D in sorted(by_expert.items()):
            own = _own_tensors(blocks, name, expert)
            removed.update(own)
            dtype = DTYPES[headers[own[0]].dtype]
            added[f"{name}.experts.{expert}.approx_value"] = value_D.to(dtype)
    for name, bias_E in (biases or {}).items():
        # In bfloat16 a bias of 12.3 would be 12.3125.
        added[f"{name}.gate.bias"] = bias_E.float()
    return Rewrite(removed=frozenset(removed), added=added)


def _own_tensors(blocks: Mapping[str, DiskBlock], name: str, expert: int) -> list[str]:
    if name not in blocks or not blocks[name].by_expert:
        raise ContractError(
            f"{name} has no tensors of its own for each expert on disk, which layout exact needs: "
            "save the model in its original format"
        )
    return sorted(blocks[name].by_expert[expert].values())


def zero_outputs(removed: Removed, width: int) -> dict[str, dict[int, Tensor]]:
    """Zeros (D,) for every removed expert."""
    return {block: {e: torch.zeros(width) for e in ids} for block, ids in removed.items()}


def mean_outputs(engine: Engine, quiz: Quiz, removed: Removed) -> dict[str, dict[int, Tensor]]:
    """Mean output (D,) of each removed expert over the tokens that chose it, zeros where none did.

    It is what the expert gave before its gate weight, summed in float64. All tokens of the quiz's
    prompts count, those that a chunk's questions share once.
    """
    sums = _OutputSums(removed)
    blocks = [block for block in engine.moe.blocks if block.name in removed]
    names = {block.layer: block.name for block in blocks}
    with observe_experts(blocks, lambda call: sums.add(names[call.layer], call)):
        ask(engine, quiz, sums.start)
    width = int(engine.moe.model.config.get_text_config().hidden_size)
    means = zero_outputs(removed, width)
    for (block, expert), (total_D, n_tokens) in sums.by_expert.items():
        means[block][expert] = total_D / n_tokens
    return means


class _OutputSums:
    """Sums of the removed experts' outputs and how many there were; pads are left out."""

    def __init__(self, removed: Removed) -> None:
        self.removed = removed
        self.by_expert: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self.valid_T: Tensor | None = None

    def start(self, step: Pass) -> None:
        """Before each forward pass."""
        self.valid_T = step.valid_T

    def add(self, block: str, call: ExpertCall) -> None:
        """One expert's outputs in that pass."""
        if call.expert not in self.removed[block]:
            return
        output_MD = call.output_MD
        if self.valid_T is not None:
            output_MD = output_MD[self.valid_T.to(output_MD.device)[call.tokens_M]]
        if not len(output_MD):
            return
        total_D, n_tokens = self.by_expert.get((block, call.expert), (torch.zeros(()), 0))
        total_D = total_D + output_MD.double().sum(dim=0).cpu()
        self.by_expert[block, call.expert] = (total_D, n_tokens + len(output_MD))


@contextmanager
def constant_experts(blocks: Sequence[MoeBlock], constants: Constants) -> Iterator[None]:
    """Makes experts of a loaded, unedited model constant: the reference for the layout.

    Routing and gate weights after top-k stay; only the outputs are replaced.
    """
    with ExitStack() as stack:
        for block in blocks:
            if by_expert := constants.get(block.name):
                forward = _with_constants(block.experts.forward, by_expert)
                stack.enter_context(_replaced_forward(block.experts, forward))
        yield


def _with_constants(
    forward: Callable[..., Tensor], by_expert: Mapping[int, Tensor]
) -> Callable[..., Tensor]:
    def run(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        is_removed_TK = torch.isin(experts_TK, torch.tensor([*by_expert]).to(experts_TK))
        y_TD = forward(x_TD, experts_TK, weights_TK.masked_fill(is_removed_TK, 0))
        for expert, value_D in by_expert.items():
            tokens_M, slots_M = (experts_TK == expert).nonzero(as_tuple=True)
            weights_M1 = weights_TK[tokens_M, slots_M, None]
            y_TD = y_TD.index_add(0, tokens_M, (weights_M1 * value_D.to(x_TD)).to(y_TD))
        return y_TD

    return run
