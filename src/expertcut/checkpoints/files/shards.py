"""The files of a changed checkpoint, laid out to the last byte before any of them is written."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from expertcut.models.safetensors_index import DTYPES, SINGLE_FILE, Stored, StoredTensor

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8  # before the header
_ALIGNMENT_BYTES = 64  # the format asks for 8; at 64, weights that are mapped compute as copies do
_PADDING_BYTES = 128  # length field, braces, alignment


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor; its dtype stays.

    Of axis 0 only `rows` are read, and in this order (None: all of it). `apply` makes the new
    values, of the given shape, from what was read; it owns its argument and depends on nothing
    else. `make` reads what it needs itself and gives the new values part by part, the rows of axis
    0 in order, so that no more than a part is in memory. Without either the bytes are copied.
    """

    shape: tuple[int, ...]
    apply: Callable[[Tensor], Tensor] | None = None
    rows: tuple[int, ...] | None = None
    make: Callable[[], Iterator[Tensor]] | None = None


@dataclass(frozen=True)
class Rewrite:
    """What becomes of each tensor of a checkpoint, by its name there.

    What is in none of them is copied. `renamed` maps old names to new ones, also of changed
    tensors; `added` stands under its final names, after all others.
    """

    removed: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, Change] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """One tensor of the new checkpoint, and where its values come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: Tensor | StoredTensor
    change: Change | None = None

    @property
    def size_bytes(self) -> int:
        """Without its entry in the header."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def entry(self, begin: int) -> dict[str, object]:
        """As it stands in the header of a file."""
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
        """Of the whole file."""
        return len(self.header) + sum(piece.size_bytes for piece in self.pieces)


def lay_out(stored: Stored, rewrite: Rewrite, max_shard_bytes: int) -> list[Shard]:
    """The new files; none is larger than the limit unless one tensor alone is."""
    pieces = list(_pieces(stored, rewrite))
    names = {piece.name for piece in pieces}
    assert len(names) == len(pieces), "two tensors of the new checkpoint have the same name"
    metadata = {"format": "pt", **stored.metadata}
    parts = list(_split(pieces, max_shard_bytes - _PADDING_BYTES - len(_json(metadata))))
    shards = []
    for i, part in enumerate(parts, start=1):
        # As in safetensors' own writer: wide types first, so that each value is aligned.
        ordered = sorted(part, key=lambda piece: -DTYPES[piece.dtype].itemsize)
        name = f"model-{i:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else SINGLE_FILE
        shards.append(Shard(name, _header(ordered, metadata), ordered))
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
    for name, tensor in stored.tensors.items():
        if name not in rewrite.removed:
            change = rewrite.changed.get(name)
            shape = change.shape if change else tensor.shape
            new_name = rewrite.renamed.get(name, name)
            yield Piece(new_name, tensor.dtype, shape, tensor, change)
    for name, added in rewrite.added.items():
        yield Piece(name, _DTYPE_NAMES[added.dtype], tuple(added.shape), added)


def _split(pieces: Iterable[Piece], max_bytes: int) -> Iterator[list[Piece]]:
    """Runs of pieces whose bytes, with their entries in the header, stay within the limit."""
    part: list[Piece] = []
    part_bytes = 0
    for piece in pieces:
        size_bytes = piece.size_bytes + len(_json({piece.name: piece.entry(10**15)}))
        if part and part_bytes + size_bytes > max_bytes:
            yield part
            part, part_bytes = [], 0
        part.append(piece)
        part_bytes += size_bytes
    yield part


def _header(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    for piece in pieces:
        header[piece.name] = piece.entry(begin)
        begin += piece.size_bytes
    content = _json(header)
    content += b" " * (-(_LENGTH_BYTES + len(content)) % _ALIGNMENT_BYTES)
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
