"""Layout `packed`: every expert stays, stored in fewer bytes as the plan's options say.

For transformers experts have the tensors that `modeling_packed.py` lists and unpacks; it lies
beside the weights, and `config.json` says how each expert is stored. `model_type` and
`architectures` have names of their own: a loader that knows the family only would make up the
experts, so it must refuse the checkpoint. For vLLM the files are those that llm-compressor 0.14
writes (compressed-tensors, `pack-quantized`), under the family's own names.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from expertcut.checkpoints.edit import TensorChanges
from expertcut.checkpoints.exact import is_exact
from expertcut.checkpoints.routed import class_names, tokenizer_files
from expertcut.checkpoints.stock import StockWriter
from expertcut.checkpoints.tensor_names import DiskBlock, find_disk_blocks
from expertcut.edits.calibrate import Constants
from expertcut.edits.layouts import Positions
from expertcut.edits.plan import BlockEdit
from expertcut.errors import ContractError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.expert_routing import ROUTING_KEY
from expertcut.models.load import MODELLING_FILE, PACKED_FILE, Source, modelling_code
from expertcut.models.modeling_packed import PACKING_KEY, TYPE_PREFIX
from expertcut.scoring.rerouting import Rerouting

_VERSION = "0.19.0"  # of compressed-tensors, whose files were compared with these


class PackedWriter(StockWriter):
    """Every expert stays with its router's row; tensors are packed by `CompressEdit`."""

    def check(self, source: Source, *, is_cutting: bool) -> None:
        config = read_config(source.path)
        source.refuse_packed("packed again")
        for is_there, what in (
            (is_exact(config), "has layout exact"),
            (ROUTING_KEY in config, "has a routing rule"),
            ("auto_map" in config, "brings code of its own"),
        ):
            if is_there:
                raise ContractError(
                    f"{source.id} {what}, beside which experts cannot be packed: compress the "
                    "model that it was made from"
                )
        class_names(config)
        for block in find_disk_blocks(source.headers).values():
            if not block.by_expert:
                raise ContractError(
                    f"{block.name} has no tensors of its own for each expert on disk, which layout "
                    "packed needs: save the model in its original format"
                )

    def check_routing(self, source: Source, routing: Rerouting) -> None:
        raise ContractError("layout packed has no place for a routing rule: route the result")

    def remove_experts(self, tensors: TensorChanges, constants: Constants) -> None:
        """None goes."""

    def add_biases(
        self, tensors: TensorChanges, directions: Mapping[int, Any], apply_at: Positions
    ) -> None:
        raise ContractError("layout packed has no place for biases: reweight the result")

    def config(self, source: Source, tensors: TensorChanges, n_experts: int) -> dict[str, Any]:
        config, compression = read_config(source.path), tensors.compression
        if compression is None:  # as it is, for a size
            return config
        if compression.loader == "vllm":
            return {**config, "quantization_config": quantization_config(tensors)}
        names, module = class_names(config), PACKED_FILE.removesuffix(".py")
        options = {
            tensors.blocks[name].name: dict(edit.options)
            for name, edit in tensors.edits.items()
            if edit.options is not None
        }
        return {
            **config,
            "architectures": [f"Packed{names['AutoModelForCausalLM']}"],
            "model_type": f"{TYPE_PREFIX}{config['model_type']}",
            "auto_map": {auto: f"{module}.Packed{name}" for auto, name in names.items()},
            PACKING_KEY: {"group_size": compression.group_size, "options": options},
        }

    def files(self, source: Source, tensors: TensorChanges) -> Mapping[str, bytes]:
        if tensors.compression is None or tensors.compression.loader == "vllm":
            return {}
        code = {name: modelling_code(name) for name in (PACKED_FILE, MODELLING_FILE)}
        return {**code, **tokenizer_files(source)}


def quantization_config(tensors: TensorChanges) -> dict[str, Any]:
    """As llm-compressor 0.14 writes it: one config group for each width, by decoder layers."""
    assert tensors.compression is not None
    by_width: dict[int, list[DiskBlock]] = {}
    packed: set[str] = set()
    for name, edit in tensors.edits.items():
        option, block = layer_option(name, edit), tensors.blocks[name]
        if option.isdecimal():
            by_width.setdefault(int(option), []).append(block)
            packed |= {name for own in block.by_expert for name in own.values()}
    groups = {
        f"group_{i}": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": sorted(_targets(blocks)),
            "weights": _weights(bits, tensors.compression.group_size),
        }
        for i, (bits, blocks) in enumerate(sorted(by_width.items()))
    }
    linear = [
        name.removesuffix(".weight")
        for name, tensor in tensors.headers.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
        if name not in packed and "embed" not in name
    ]
    return {
        "config_groups": groups,
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": list(dict.fromkeys((*linear, "lm_head"))),  # the head may be tied, and not there
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": _VERSION,
    }


def layer_option(name: str, edit: BlockEdit) -> str:
    """The one option of a block's experts; ContractError for several, which vLLM cannot load."""
    options = {*(edit.options or {"*": "whole"}).values()}
    if len(options) != 1:
        raise ContractError(
            f"{name} has options {', '.join(sorted(options))}: vLLM loads one for all experts of "
            "a layer, so take --grain layer or --for transformers"
        )
    return options.pop()


def _targets(blocks: Iterable[DiskBlock]) -> Iterable[str]:
    """Regular expressions of all projections of the experts of blocks."""
    numbers: dict[tuple[str, str, str], list[int]] = {}
    for block in blocks:
        of = re.fullmatch(r"(.*\.)?(?P<list>\w+)\.(?P<number>\d+)\.(?P<rest>.+)", block.name)
        assert of is not None, "a block names its layer"
        ends = {part.removesuffix(".weight") for own in block.by_expert for part in own}
        ending = ".*_proj" if all(end.endswith("_proj") for end in ends) else r".*\.w[123]"
        numbers.setdefault((of["list"], of["rest"], ending), []).append(int(of["number"]))
    for (layers, rest, ending), own in numbers.items():
        which = "|".join(map(str, sorted(own)))
        yield rf"re:.*{layers}\.({which})\.{re.escape(rest)}\.experts\.{ending}$"


def _weights(bits: int, group_size: int) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group_size,
        "num_bits": bits,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": "group",
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }
