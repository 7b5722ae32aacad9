"""Safetensors shards written without a model: kept bytes are copied, one tensor is in memory."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertcut.checkpoints.output_dir import sync_folder
from expertcut.errors import ModelError, OutputError
from expertcut.files import advance
from expertcut.models import safetensors_index
from expertcut.models.safetensors_index import DTYPES, INDEX_FILE, SINGLE_FILE, Stored, StoredTensor
from expertcut.scoring.packing import cut_packs

Range = tuple[int, int]  # first byte, number of bytes

_STEP_BYTES = 64 << 20  # so that Ctrl-C is answered
_BUFFER_BYTES = 4 << 20
_ANNOUNCED_BYTES = 16 << 20  # of one range
_CANNOT = {
    *(errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EBADF),
    *(errno.EPERM, errno.ETXTBSY, errno.ENOTSOCK),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8  # before the header
_ALIGNMENT_BYTES = 64  # the format asks for 8; at 64, weights that are mapped compute as copies do
_PADDING_BYTES = 128  # length field, braces, alignment
MAX_SHARD_BYTES = 5_000_000_000
_AHEAD = 8  # tensors that the disk fetches while others are written
# By the names of the system calls, which `os` may lack.
_MOVES: Mapping[str, Callable[[int, int, int, int], int]] = {
    "copy_file_range": lambda old, new, begin, n: os.copy_file_range(old, new, n, begin),
    "sendfile": lambda old, new, begin, n: os.sendfile(new, old, begin, n),
}


def copy_ranges(source: FileIO, target: FileIO, ranges: Iterable[Range]) -> None:
    """Appends byte ranges of `source` to `target`."""
    for begin, size_bytes in ranges:
        end = begin + size_bytes
        for name, move in _MOVES.items():
            begin += _move(move, source, target, begin, end) if hasattr(os, name) else 0
        source.seek(begin)
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, end - begin)))
        for at in range(begin, end, _BUFFER_BYTES):
            part = buffer[: end - at]
            _read_into(source, part)
            write_all(target, part)


def read_ranges(source: FileIO, ranges: Iterable[Range]) -> bytearray:
    """The bytes of the ranges, one after another."""
    ranges = list(ranges)
    content = bytearray(sum(size_bytes for _, size_bytes in ranges))
    rest = memoryview(content)
    for begin, size_bytes in ranges:
        source.seek(begin)
        _read_into(source, rest[:size_bytes])
        rest = rest[size_bytes:]
    return content


def write_all(target: FileIO, content: memoryview) -> None:
    """Writes every byte: one call of the system moves 2 GB at most."""
    while content:
        content = content[target.write(content) :]


def _move(
    move: Callable[[int, int, int, int], int], source: FileIO, target: FileIO, begin: int, end: int
) -> int:
    """The bytes that a system call copied before it gave up."""
    done = 0
    try:
        while begin + done < end:
            step = min(_STEP_BYTES, end - begin - done)
            moved = move(source.fileno(), target.fileno(), begin + done, step)
            if moved == 0:
                break
            done += moved
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    return done


def _read_into(source: FileIO, content: memoryview) -> None:
    while content:
        n = source.readinto(content)
        if not n:
            raise ModelError(f"{source.name!s} became shorter while it was read: export it again")
        content = content[n:]


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor; its dtype stays. Bytes are copied without `apply` and `make`."""

    shape: tuple[int, ...]  # of the new values
    apply: Callable[[Tensor], Tensor] | None = None  # from what was read, which it may overwrite
    rows: tuple[int, ...] | None = None  # all that is read of axis 0, in this order; None: all
    # Reads by itself and gives the rows of axis 0 part by part, so that one part is in memory.
    make: Callable[[], Iterator[Tensor]] | None = None


@dataclass(frozen=True)
class Made:
    """One of the tensors that take the place of a tensor; `make` gives its values."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass
class Rewrite:
    """What becomes of each tensor of a checkpoint, by its name there; others are copied."""

    removed: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)  # to new names, also of changed tensors
    changed: dict[str, Change] = field(default_factory=dict)
    # By the tensor whose place they take, by final name; made one at a time.
    made: dict[str, Mapping[str, Made]] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)  # by final name, after all others


@dataclass(frozen=True)
class Piece:
    """One tensor of the new checkpoint, and where its values come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: Tensor | StoredTensor
    change: Change | Made | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def ranges(self) -> list[Range]:
        """The bytes of the source that it is read from."""
        rows = self.change.rows if isinstance(self.change, Change) else None
        return [] if isinstance(self.origin, Tensor) else _ranges(self.origin, rows)

    def entry(self, begin: int) -> dict[str, object]:
        """Its entry in the header of a file."""
        offsets = [begin, begin + self.size_bytes]
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": offsets}


@dataclass(frozen=True)
class Shard:
    """One file of the new checkpoint: its header, with the length before it, and its tensors."""

    name: str
    header: bytes
    pieces: Sequence[Piece]

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(piece.size_bytes for piece in self.pieces)


def lay_out(
    stored: Stored, rewrite: Rewrite, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """The new files; none is larger than the limit unless one tensor alone is."""
    pieces = list(_pieces(stored, rewrite))
    assert len({p.name for p in pieces}) == len(pieces), "two new tensors have the same name"
    metadata = {"format": "pt", **stored.metadata}
    # A piece takes its values and its entry in the header.
    sizes = [p.size_bytes + len(_json({p.name: p.entry(10**15)})) for p in pieces]
    most = max_shard_bytes - _PADDING_BYTES - len(_json(metadata))
    parts = list(cut_packs(sizes, most)) or [()]
    shards = []
    for i, part in enumerate(parts, start=1):
        # As in safetensors' own writer: wide types first, so that each value is aligned.
        ordered = [pieces[at] for at in part]
        ordered.sort(key=lambda piece: -DTYPES[piece.dtype].itemsize)
        name = f"model-{i:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else SINGLE_FILE
        header: dict[str, object] = {"__metadata__": metadata}
        begin = 0
        for piece in ordered:
            header[piece.name] = piece.entry(begin)
            begin += piece.size_bytes
        content = _json(header)
        content += b" " * (-(_LENGTH_BYTES + len(content)) % _ALIGNMENT_BYTES)
        length = len(content).to_bytes(_LENGTH_BYTES, "little")
        shards.append(Shard(name, length + content, ordered))
    return shards


def index_bytes(shards: Sequence[Shard]) -> bytes:
    """`model.safetensors.index.json` as transformers writes it, empty for a single file."""
    if len(shards) == 1:
        return b""
    pieces = [piece for shard in shards for piece in shard.pieces]
    metadata = {
        "total_parameters": sum(math.prod(piece.shape) for piece in pieces),
        "total_size": sum(piece.size_bytes for piece in pieces),
    }
    weight_map = {piece.name: shard.name for shard in shards for piece in shard.pieces}
    content = {"metadata": metadata, "weight_map": weight_map}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _pieces(stored: Stored, rewrite: Rewrite) -> Iterator[Piece]:
    kept = set(stored.tensors) - rewrite.removed
    assert rewrite.removed <= set(stored.tensors), "what is removed must be there"
    assert {*rewrite.renamed, *rewrite.changed} <= kept, "what is renamed or changed must stay"
    assert set(rewrite.made) <= kept - {*rewrite.changed}, "what is made anew must stay unchanged"
    for name, tensor in stored.tensors.items():
        if name in rewrite.made:
            for new, made in rewrite.made[name].items():
                yield Piece(new, made.dtype, made.shape, tensor, made)
        elif name not in rewrite.removed:
            change = rewrite.changed.get(name)
            shape = change.shape if change else tensor.shape
            yield Piece(rewrite.renamed.get(name, name), tensor.dtype, shape, tensor, change)
    for name, added in rewrite.added.items():
        yield Piece(name, _DTYPE_NAMES[added.dtype], tuple(added.shape), added)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def write_checkpoint(
    stored: Stored, folder: Path, rewrite: Rewrite, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes the safetensors files of a folder, and their index; synced, and read back.

    No file is larger than `max_shard_bytes`, unless one tensor alone is. Bytes of removed tensors
    and rows are never read. Raises ModelError: the source became shorter; OutputError: too little
    space, found before the first byte, or a disk that lost what was written.
    """
    shards = lay_out(stored, rewrite, max_shard_bytes)
    check_space(folder, total_bytes(shards))
    write_shards(folder, shards)
    check_written(folder, shards)


def check_written(folder: Path, shards: Sequence[Shard]) -> None:
    """Raises OutputError unless safetensors' reader finds the tensors with shapes and dtypes."""
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
        try:
            index = safetensors_index.read_index(folder)
        except ModelError as error:
            raise OutputError(f"{folder / INDEX_FILE} was not written whole: {error}") from None
        if index != {piece.name: shard.name for shard in shards for piece in shard.pieces}:
            raise OutputError(f"{folder / INDEX_FILE} does not name the tensors that were written")


def check_space(folder: Path, size_bytes: int) -> None:
    """Raises OutputError unless so many bytes are free where a folder is or will be."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < size_bytes:
        raise OutputError(
            f"{folder} needs {size_bytes:,} bytes but {free_bytes:,} are free there: "
            "make room or name another --out"
        )


def total_bytes(shards: Sequence[Shard]) -> int:
    """Bytes of all files, the index included."""
    return sum(shard.size_bytes for shard in shards) + len(index_bytes(shards))


def write_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes files as they are laid out, and their index; synced, whole or with an error."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as closing:
        origins = {piece.origin for shard in shards for piece in shard.pieces}
        files = {origin.file for origin in origins if isinstance(origin, StoredTensor)}
        sources = {file: closing.enter_context(FileIO(file)) for file in files}
        targets = [closing.enter_context(FileIO(folder / shard.name, "w")) for shard in shards]
        soon = chain((p for shard in shards for p in shard.pieces), [None] * _AHEAD)
        for piece in islice(soon, _AHEAD):
            _announce(piece, sources)
        n_done, n_bytes = 0, sum(piece.size_bytes for shard in shards for piece in shard.pieces)
        for shard, target in zip(shards, targets, strict=True):
            write_all(target, memoryview(shard.header))
            for piece, later in zip(shard.pieces, soon, strict=False):
                _announce(later, sources)
                _write_piece(piece, sources, target)
                n_done += piece.size_bytes
                advance("writing weights", n_done, n_bytes, "B")
        if index := index_bytes(shards):
            targets.append(closing.enter_context(FileIO(folder / INDEX_FILE, "w")))
            write_all(targets[-1], memoryview(index))
        for target in targets:
            os.fsync(target.fileno())
    sync_folder(folder)


def _announce(piece: Piece | None, sources: dict[Path, FileIO]) -> None:
    """Lets the system fetch what will be read soon, as far as it wants to; returns at once."""
    if piece is None or isinstance(piece.origin, Tensor) or not hasattr(os, "posix_fadvise"):
        return
    source = sources[piece.origin.file].fileno()
    for begin, size_bytes in piece.ranges:
        size_bytes = min(size_bytes, _ANNOUNCED_BYTES)
        os.posix_fadvise(source, begin, size_bytes, os.POSIX_FADV_WILLNEED)


def _write_piece(piece: Piece, sources: dict[Path, FileIO], target: FileIO) -> None:
    if isinstance(piece.origin, Tensor):
        write_all(target, _bytes(piece.origin))
        return
    if isinstance(piece.change, Made):
        tensor = piece.change.make()
        found = (_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert found == (piece.dtype, piece.shape), f"{piece.name} came out wrong"
        write_all(target, _bytes(tensor))
        return
    if piece.change is not None and piece.change.make is not None:
        n_bytes = 0
        for part in piece.change.make():
            assert part.dtype == DTYPES[piece.dtype], f"{piece.name} came out wrong"
            content = _bytes(part)
            write_all(target, content)
            n_bytes += len(content)
        assert n_bytes == piece.size_bytes, f"{piece.name} came out wrong"
        return
    source, ranges = sources[piece.origin.file], piece.ranges
    if piece.change is None or piece.change.apply is None:
        copy_ranges(source, target, ranges)
        return
    read = torch.frombuffer(read_ranges(source, ranges), dtype=DTYPES[piece.dtype])
    rows, shape = piece.change.rows, piece.origin.shape
    made = piece.change.apply(read.view(shape if rows is None else (len(rows), *shape[1:])))
    assert (made.dtype, made.shape) == (read.dtype, piece.shape), f"{piece.name} came out wrong"
    write_all(target, _bytes(made))


def read_tensor(tensor: StoredTensor, row: int | None = None) -> Tensor:
    """A tensor from its file, or one row of its axis 0."""
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
