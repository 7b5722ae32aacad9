"""The tensors of a checkpoint, from the headers of its safetensors files and their index."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertcut.errors import ModelError
from expertcut.models.checkpoint_dir import check_size, parse, read_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
_QUANTIZED_NAMES = ("_blocks", "_scales", ".weight_scale_inv")  # MXFP4; block-wise fp8
_SERIES = re.compile(r"-of-\d+\.safetensors$")
# The format allows 100 MB, which would fill the memory; 200,000 tensors need less.
_MAX_HEADER_BYTES = 25_000_000
_MAX_INDEX_BYTES = 50_000_000
_MAX_AXES = 16
_MAX_LENGTH = 2**63 - 1  # of an axis
_MAX_NAME = 255  # of a file, on every system
_MAX_LINE = 300  # names can be as long as the header


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
    """The tensors of a checkpoint folder by name, in file order; errors as `read_stored`."""
    return read_stored(folder).tensors


def read_stored(folder: Path) -> Stored:
    """The tensors and metadata of a checkpoint folder; the first file's metadata take precedence.

    Raises:
        ModelError: an invalid header or index, or quantized weights.
    """
    stored = read_even_quantized(folder)
    refuse_quantized(folder, stored)
    return stored


def refuse_quantized(folder: Path, stored: Stored) -> None:
    """Refuses a checkpoint whose config.json or tensors are quantized.

    Raises:
        ModelError: it is quantized.
    """
    config = read_config(folder) if (folder / "config.json").exists() else {}
    for part in (config, config.get("text_config")):
        quantized = part.get("quantization_config") if isinstance(part, dict) else None
        if quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise ModelError(
                f"{folder} is quantized ({method}): take the bf16, f16 or f32 weights instead"
            )
    for name, tensor in stored.tensors.items():
        if tensor.dtype in _QUANTIZED_BITS or name.endswith(_QUANTIZED_NAMES):
            raise ModelError(
                f"{tensor.file} is quantized ({name} is {tensor.dtype}): "
                "take the bf16, f16 or f32 weights instead"
            )


def read_even_quantized(folder: Path) -> Stored:
    """As `read_stored`, quantized weights included: they can be run, not edited.

    Raises:
        ModelError: an invalid header or index.
    """
    index = read_index(folder)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(index.values())) or [SINGLE_FILE]:
        stored = read_file(folder / name)
        if index:
            _check_against_index(folder / name, set(stored.tensors), index)
        tensors |= stored.tensors
        metadata = {**stored.metadata, **metadata}
    if not tensors:
        raise ModelError(f"{folder} holds no tensors: download it again")
    return Stored(tensors, metadata)


def read_index(folder: Path) -> dict[str, str]:
    """File names by tensor; empty for a single file.

    Raises:
        ModelError: no weights, or an invalid index.
    """
    file = folder / INDEX_FILE
    if not file.exists():
        if not (folder / SINGLE_FILE).exists():
            raise ModelError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: download it again, or "
                "save it as safetensors"
            )
        return {}
    try:
        check_size(file, _MAX_INDEX_BYTES)
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
        if not _is_file_name(name):
            raise _damaged(file, f"{tensor} lies in {name!r}, must be a .safetensors file here")
    if (folder / SINGLE_FILE).exists() and set(index.values()) != {SINGLE_FILE}:
        raise ModelError(f"{folder} holds {SINGLE_FILE} and an index of other files: remove one")
    _refuse_forgotten_files(folder, set(index.values()))
    return index


def _refuse_forgotten_files(folder: Path, indexed: set[str]) -> None:
    """Refuses files of the same series that the index lacks; `consolidated.safetensors` is fine."""
    for ending in {found[0] for name in indexed if (found := _SERIES.search(name))}:
        for file in sorted(folder.glob(f"*{ending}")):
            if file.name not in indexed:
                raise _damaged(file, "the index does not name it")


def _is_file_name(name: object) -> bool:
    is_text = isinstance(name, str) and name.endswith(".safetensors")
    return is_text and len(str(name)) <= _MAX_NAME and not set("/\\:\0") & set(str(name))


def _check_against_index(file: Path, found: set[str], index: Mapping[str, str]) -> None:
    wanted = {tensor for tensor, name in index.items() if name == file.name}
    for tensor in sorted(wanted - found):
        raise _damaged(file, f"it lacks {tensor}, which the index says it holds")
    for tensor in sorted(found - wanted):
        raise _damaged(file, f"it holds {tensor}, which the index does not say")


def read_file(file: Path) -> Stored:
    """The tensors and metadata of one safetensors file.

    Raises:
        ModelError: an invalid header.
    """
    try:
        with file.open("rb") as stream:
            size_bytes = stream.seek(0, 2)
            stream.seek(0)
            n = int.from_bytes(stream.read(8), "little")
            if size_bytes < 8 or n > size_bytes - 8:
                raise _damaged(file, f"a header of {n} bytes cannot lie in {size_bytes} bytes")
            if n > _MAX_HEADER_BYTES:
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
    _check_places(file, placed, 8 + n, size_bytes)
    return Stored(placed, metadata)


def _tensor(file: Path, name: str, entry: object, data_begin: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = _fields(entry)
    except (KeyError, TypeError, ValueError):
        raise _damaged(file, f"{name} has no dtype, shape and data_offsets") from None
    bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _QUANTIZED_BITS.get(dtype)
    if bits is None:
        raise _damaged(file, f"{name} has the unknown dtype {dtype}")
    size_bytes = -(-math.prod(shape) * bits // 8)
    if end - begin != size_bytes:
        raise _damaged(file, f"{name} has {end - begin} bytes, its shape needs {size_bytes}")
    return StoredTensor(file, dtype, shape, data_begin + begin, data_begin + end)


def _fields(entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry["dtype"], str):
        raise TypeError
    begin, end = _counts(entry["data_offsets"])
    shape = tuple(_counts(entry["shape"]))
    if len(shape) > _MAX_AXES:  # their product would take hours
        raise ValueError
    return entry["dtype"], shape, (begin, end)


def _counts(values: list[Any]) -> Iterator[int]:
    if not isinstance(values, list):
        raise TypeError
    for value in values:
        if type(value) is not int or not 0 <= value <= _MAX_LENGTH:
            raise ValueError
        yield value


def _check_places(file: Path, placed: Mapping[str, StoredTensor], begin: int, end: int) -> None:
    """Checks that the tensors fill the file after its header without gap or overlap."""
    for name, tensor in placed.items():
        if tensor.begin != begin:
            fault = "overlaps the tensor before it" if tensor.begin < begin else "follows a gap"
            raise _damaged(file, f"{name} {fault}")
        begin = tensor.end
    if begin != end:
        raise _damaged(file, f"its tensors end at byte {begin}, the file at {end}")


def _damaged(file: Path, fault: str) -> ModelError:
    fault = fault if len(fault) <= _MAX_LINE else f"{fault[:_MAX_LINE]}…"
    return ModelError(f"{file} is damaged: {fault}: download it again")
