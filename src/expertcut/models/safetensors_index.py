"""The tensors of a checkpoint, from the headers of its safetensors files and their index."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expertcut.errors import ModelError
from expertcut.models.checkpoint_dir import check_size, parse, parts_of, read_config

if TYPE_CHECKING:
    from expertcut.models.modeling_packed import Packing

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TAKE_PLAIN = "take the bf16, f16 or f32 weights instead"
DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16},
    **{"U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64},
    **{"U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F32": torch.float32, "F64": torch.float64},
}
_QUANTIZED_BITS = {
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: bytes `begin` to `end` of `file`; `dtype` as in safetensors."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Stored:
    """All tensors of a checkpoint in file order, and `__metadata__`."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def weights_file(folder: Path) -> Path:
    """The index, or the single weights file."""
    index = folder / INDEX_FILE
    return index if index.exists() else folder / SINGLE_FILE


def read_headers(folder: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a checkpoint folder by name, in file order."""
    return read_stored(folder).tensors


def read_stored(folder: Path) -> Stored:
    """All tensors and metadata of a checkpoint folder; the first file's metadata win."""
    stored = read_even_quantized(folder)
    refuse_quantized(folder, stored)
    return stored


def refuse_quantized(folder: Path, stored: Stored) -> None:
    """Refuses a checkpoint whose config.json or tensors are quantized; a packed one is not."""
    config = read_config(folder) if (folder / "config.json").exists() else {}
    if read_packing(folder, config, stored) is not None:
        return
    for part in parts_of(config):
        if quantized := part.get("quantization_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise ModelError(f"{folder} is quantized ({method}): {TAKE_PLAIN}")
    for name, tensor in stored.tensors.items():
        packed = ("_blocks", "_scales", ".weight_scale_inv")  # MXFP4; block-wise fp8
        if tensor.dtype in _QUANTIZED_BITS or name.endswith(packed):
            raise ModelError(f"{tensor.file} is quantized ({name} is {tensor.dtype}): {TAKE_PLAIN}")


def read_packing(folder: Path, config: Mapping[str, Any], stored: Stored) -> "Packing | None":
    """How weights are packed, in our own form or in that of vLLM; None for plain or other weights.

    Raises ModelError for tensors that are not what config.json says.
    """
    tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.tensors.items()}
    try:
        packing = packing_of(config, tensors)
        if packing is not None:
            packing.matrices(tensors)
    except ValueError as error:
        raise ModelError(f"{weights_file(folder)} is damaged: {str(error)[:300]}") from None
    return packing


def packing_of(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> "Packing | None":
    """How a config says that tensors (dtype, shape) are packed; ValueError for a form of ours.

    Of compressed-tensors `pack-quantized` with symmetric groups of one size. The width of a matrix
    is that among the config's which its shapes have: targets may be any regular expression.
    """
    from expertcut.models.modeling_packed import PACKING_KEY, Packing

    if PACKING_KEY in config:
        return Packing.of(config[PACKING_KEY])
    if (widths := _widths(config.get("quantization_config"))) is None:
        return None
    (group_size,) = {size for _, size in widths}
    modules: dict[str, str] = {}
    for name, (_, shape) in tensors.items():
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            scale = tensors.get(f"{module}.weight_scale", ("", ()))[1]
            n_columns = scale[-1] * group_size if scale else 0
            fitting = [b for b, _ in widths if shape[1:] == (-(-n_columns * b // 32),)]
            if len(fitting) != 1:
                raise ValueError(
                    f"{name} has shape {list(shape)} beside {list(scale)} scales, which fits "
                    f"{len(fitting)} of the widths that config.json says: must fit one"
                )
            modules[module] = str(fitting[0])
    return Packing(group_size, {}, modules)


def _widths(quantized: Any) -> set[tuple[int, int]] | None:
    """The bits and group size of each config group; None unless all are packed symmetric groups."""
    if not isinstance(quantized, dict) or quantized.get("quant_method") != "compressed-tensors":
        return None
    groups, found = quantized.get("config_groups"), set[tuple[int, int]]()
    formats = [quantized.get("format")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or group.get("input_activations"):
            return None
        formats.append(group.get("format") or formats[0])
        bits, size = weights.get("num_bits"), weights.get("group_size")
        is_group = weights.get("strategy") == "group" and weights.get("symmetric") is True
        is_plain = weights.get("actorder") in (None, False, "static", "weight")
        if not (is_group and is_plain and weights.get("type") == "int"):
            return None
        if type(bits) is not int or type(size) is not int or not 1 <= bits <= 8 or size < 1:
            return None
        found.add((bits, size))
    is_packed = set(formats) == {"pack-quantized"} and not quantized.get("kv_cache_scheme")
    return found if is_packed and len({size for _, size in found}) == 1 else None


def dense(packing: "Packing | None", stored: Stored) -> Stored:
    """The tensors as they would be unpacked."""
    if packing is None:
        return stored
    tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.tensors.items()}
    first = {}
    for weight, matrix in packing.matrices(tensors).items():
        n_bytes = math.prod(matrix.shape) * DTYPES[matrix.dtype].itemsize
        for part in matrix.parts.values():
            first[part] = (weight, matrix, n_bytes)
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.tensors.items():
        if name in first:
            weight, matrix, n_bytes = first[name]
            found[weight] = StoredTensor(tensor.file, matrix.dtype, matrix.shape, 0, n_bytes)
        elif not name.endswith(".approx_scale"):
            found[name] = tensor
    return replace(stored, tensors=found)


def read_even_quantized(folder: Path) -> Stored:
    """As `read_stored`, quantized weights included: they can be run, not edited."""
    index = read_index(folder)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(index.values())) or [SINGLE_FILE]:
        stored = read_file(folder / name)
        if index:
            wanted = {tensor for tensor, file in index.items() if file == name}
            for tensor in sorted(wanted - set(stored.tensors)):
                raise _damaged(folder / name, f"it lacks {tensor}, which the index says it holds")
            for tensor in sorted(set(stored.tensors) - wanted):
                raise _damaged(folder / name, f"it holds {tensor}, which the index does not say")
        tensors |= stored.tensors
        metadata = {**stored.metadata, **metadata}
    if not tensors:
        raise ModelError(f"{folder} holds no tensors: download it again")
    return Stored(tensors, metadata)


def read_index(folder: Path) -> dict[str, str]:
    """File names by tensor; empty for a single file."""
    file = folder / INDEX_FILE
    if not file.exists():
        if not (folder / SINGLE_FILE).exists():
            raise ModelError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: download it again, or "
                "save it as safetensors"
            )
        return {}
    try:
        check_size(file, 50_000_000)
        content = parse(file.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(file, f"it is no JSON object ({error})") from None
    if not isinstance(metadata := content.get("metadata"), dict):
        # transformers fails without it, and blames other files.
        raise ModelError(
            f"{file}: its metadata is {json.dumps(metadata)[:50]}, must be an object, or "
            'transformers cannot load the weights: write "metadata": {} there'
            if "metadata" in content
            else f"{file} has no metadata, without which transformers cannot load the weights: "
            'write "metadata": {} beside its weight_map'
        )
    index = content.get("weight_map")
    if not isinstance(index, dict) or not index:
        raise _damaged(file, "it has no weight_map")
    for tensor, name in index.items():
        is_text = isinstance(name, str) and name.endswith(".safetensors")
        if not is_text or len(name) > 255 or set("/\\:\0") & set(name):
            raise _damaged(file, f"{tensor} lies in {name!r}, must be a .safetensors file here")
    if (folder / SINGLE_FILE).exists() and set(index.values()) != {SINGLE_FILE}:
        raise ModelError(f"{folder} holds {SINGLE_FILE} and an index of other files: remove one")
    # Files of the same series; a `consolidated.safetensors` is fine.
    indexed = set(index.values())
    found = (re.search(r"-of-\d+\.safetensors$", name) for name in indexed)
    for ending in {series[0] for series in found if series}:
        for file in sorted(folder.glob(f"*{ending}")):
            if file.name not in indexed:
                raise _damaged(file, "the index does not name it")
    return index


def read_file(file: Path) -> Stored:
    """The tensors and metadata of one safetensors file."""
    try:
        with file.open("rb") as stream:
            size_bytes = stream.seek(0, 2)
            stream.seek(0)
            n = int.from_bytes(stream.read(8), "little")
            if size_bytes < 8 or n > size_bytes - 8:
                raise _damaged(file, f"a header of {n} bytes cannot lie in {size_bytes} bytes")
            if n > 25_000_000:  # 200,000 tensors need less; the 100 MB of the format fill memory
                raise _damaged(file, f"a header of {n:,} bytes is more than any model needs")
            header = parse(stream.read(n))
    except FileNotFoundError:
        raise ModelError(f"{file} is missing, but the index names it: download it again") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise _damaged(file, f"its header is no JSON object ({error})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "its __metadata__ is not text by name")
    tensors = {name: _tensor(file, name, entry, 8 + n) for name, entry in header.items()}
    placed = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    begin = 8 + n
    for name, tensor in placed.items():
        if tensor.begin != begin:
            fault = "overlaps the tensor before it" if tensor.begin < begin else "follows a gap"
            raise _damaged(file, f"{name} {fault}")
        begin = tensor.end
    if begin != size_bytes:
        raise _damaged(file, f"its tensors end at byte {begin}, the file at {size_bytes}")
    return Stored(placed, metadata)


def _tensor(file: Path, name: str, entry: Any, data_begin: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        # The product of more axes would take hours.
        is_valid = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= 16
        is_valid &= all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise _damaged(file, f"{name} has no dtype, shape and data_offsets")
    bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _QUANTIZED_BITS.get(dtype)
    if bits is None:
        raise _damaged(file, f"{name} has the unknown dtype {dtype}")
    size_bytes = -(-math.prod(shape) * bits // 8)
    if end - begin != size_bytes:
        raise _damaged(file, f"{name} has {end - begin} bytes, its shape needs {size_bytes}")
    return StoredTensor(file, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _damaged(file: Path, fault: str) -> ModelError:
    fault = fault if len(fault) <= 300 else f"{fault[:300]}…"  # names can fill a header
    return ModelError(f"{file} is damaged: {fault}: download it again")
