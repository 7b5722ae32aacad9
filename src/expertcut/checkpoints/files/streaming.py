"""A changed checkpoint written without its model: kept tensors go over as bytes, file to file.

No more of the weights is in memory than the one tensor that is being changed.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertcut.checkpoints.files.copying import (
    Range,
    announce_ranges,
    copy_ranges,
    read_ranges,
    write_all,
)
from expertcut.checkpoints.files.folders import failed, sync_folder
from expertcut.checkpoints.files.shards import Piece, Rewrite, Shard, index_bytes, lay_out
from expertcut.errors import ModelError, OutputError
from expertcut.models.safetensors_index import (
    DTYPES,
    INDEX_FILE,
    Stored,
    StoredTensor,
    read_index,
    read_stored,
)

MAX_SHARD_BYTES = 5_000_000_000
_AHEAD = 8  # tensors that the disk fetches while others are written


def write_checkpoint(
    source: Path, folder: Path, rewrite: Rewrite, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes the safetensors files, and their index if they are several, into a folder; synced.

    Then opens them as any reader does and looks whether each tensor is there as it must be.
    No file is larger than `max_shard_bytes`, unless one tensor alone is. Bytes of removed tensors
    and rows are never read.

    Raises:
        ModelError: the source is damaged or quantized.
        OutputError: too little space, found before the first byte, or a place that cannot be
            written.
    """
    shards = lay_out(read_stored(source), rewrite, max_shard_bytes)
    check_space(folder, _total_bytes(shards))
    try:
        write_shards(folder, shards)
    except EOFError:
        raise ModelError(f"{source} became shorter while it was read: export it again") from None
    except OSError as error:
        raise failed(error, folder) from None
    check_written(folder, shards)


def check_written(folder: Path, shards: Sequence[Shard]) -> None:
    """That safetensors' own reader finds every tensor, with its shape and dtype, and no other.

    Raises:
        OutputError: naming the first that it does not.
    """
    for shard in shards:
        wanted = {piece.name: (piece.shape, piece.dtype) for piece in shard.pieces}
        try:
            with safe_open(folder / shard.name, framework="pt") as written:
                slices = {name: written.get_slice(name) for name in written.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{folder / shard.name} was not written whole: {error}") from None
        found = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise OutputError(
                    f"{folder / shard.name}: {name} is {found.get(name, 'not there')}, must be "
                    f"{wanted.get(name, 'absent')}: the disk did not keep what was written"
                )
    if len(shards) > 1:
        _check_index(folder, {p.name: s.name for s in shards for p in s.pieces})


def _check_index(folder: Path, wanted: Mapping[str, str]) -> None:
    try:
        is_right = read_index(folder) == wanted
    except ModelError as error:
        raise OutputError(f"{folder / INDEX_FILE} was not written whole: {error}") from None
    if not is_right:
        raise OutputError(f"{folder / INDEX_FILE} does not name the tensors that were written")


def needed_bytes(stored: Stored, rewrite: Rewrite, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """How many bytes `write_checkpoint` will write."""
    return _total_bytes(lay_out(stored, rewrite, max_shard_bytes))


def check_space(folder: Path, size_bytes: int) -> None:
    """That so many bytes fit where a folder is or will be.

    Raises:
        OutputError: they do not.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < size_bytes:
        raise OutputError(
            f"{folder} needs {size_bytes:,} bytes but {free_bytes:,} are free there: "
            "make room or name another --out"
        )


def _total_bytes(shards: Sequence[Shard]) -> int:
    return sum(shard.size_bytes for shard in shards) + len(index_bytes(shards))


def write_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes files as they are laid out, and their index; synced, whole or with an error.

    Raises:
        EOFError: a file that tensors come from ends too early.
        OSError: as reading and writing raise it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as closing:
        origins = {piece.origin for shard in shards for piece in shard.pieces}
        files = {origin.file for origin in origins if isinstance(origin, StoredTensor)}
        sources = {file: closing.enter_context(FileIO(file)) for file in files}
        targets = [closing.enter_context(FileIO(folder / shard.name, "w")) for shard in shards]
        soon = chain((p for shard in shards for p in shard.pieces), [None] * _AHEAD)
        for piece in islice(soon, _AHEAD):
            _announce(piece, sources)
        for shard, target in zip(shards, targets, strict=True):
            write_all(target, memoryview(shard.header))
            for piece, later in zip(shard.pieces, soon, strict=False):
                _announce(later, sources)
                _write_piece(piece, sources, target)
        if index := index_bytes(shards):
            targets.append(closing.enter_context(FileIO(folder / INDEX_FILE, "w")))
            write_all(targets[-1], memoryview(index))
        for target in targets:
            os.fsync(target.fileno())
    sync_folder(folder)


def _announce(piece: Piece | None, sources: dict[Path, FileIO]) -> None:
    if piece is not None and isinstance(piece.origin, StoredTensor):
        ranges = _ranges(piece.origin, piece.change.rows if piece.change else None)
        announce_ranges(sources[piece.origin.file], ranges)


def _write_piece(piece: Piece, sources: dict[Path, FileIO], target: FileIO) -> None:
    if isinstance(piece.origin, Tensor):
        write_all(target, _bytes(piece.origin))
        return
    if piece.change is not None and piece.change.make is not None:
        _write_parts(piece, piece.change.make(), target)
        return
    source = sources[piece.origin.file]
    ranges = _ranges(piece.origin, piece.change.rows if piece.change else None)
    if piece.change is None or piece.change.apply is None:
        copy_ranges(source, target, ranges)
        return
    read = torch.frombuffer(read_ranges(source, ranges), dtype=DTYPES[piece.dtype])
    rows, shape = piece.change.rows, piece.origin.shape
    made = piece.change.apply(read.view(shape if rows is None else (len(rows), *shape[1:])))
    assert (made.dtype, made.shape) == (read.dtype, piece.shape), f"{piece.name} came out wrong"
    write_all(target, _bytes(made))


def _write_parts(piece: Piece, parts: Iterator[Tensor], target: FileIO) -> None:
    size_bytes = 0
    for part in parts:
        assert part.dtype == DTYPES[piece.dtype], f"{piece.name} came out wrong"
        content = _bytes(part)
        write_all(target, content)
        size_bytes += len(content)
    assert size_bytes == piece.size_bytes, f"{piece.name} came out wrong"


def read_tensor(tensor: StoredTensor, row: int | None = None) -> Tensor:
    """A tensor from its file, or one row of its axis 0.

    Raises:
        EOFError: the file ends too early.
        OSError: as reading raises it.
    """
    with FileIO(tensor.file) as source:
        content = read_ranges(source, _ranges(tensor, None if row is None else (row,)))
    shape = tensor.shape if row is None else tensor.shape[1:]
    return torch.frombuffer(content, dtype=DTYPES[tensor.dtype]).view(shape)


def _ranges(tensor: StoredTensor, rows: tuple[int, ...] | None) -> list[Range]:
    """The bytes of some rows, neighbours in one range."""
    if rows is None:
        return [(tensor.begin, tensor.end - tensor.begin)]
    row_bytes = (tensor.end - tensor.begin) // tensor.shape[0]
    ranges: list[Range] = []
    for begin in (tensor.begin + row * row_bytes for row in rows):
        if ranges and sum(ranges[-1]) == begin:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + row_bytes)
        else:
            ranges.append((begin, row_bytes))
    return ranges


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
