"""A teacher's top tokens on disk: computed once, for any number of runs.

A folder of safetensors files with `ids` (M, R) int32 and `logprob` (M, R) float32: all positions
of a row but the last, row after row. The metadata map the hash of each row to its begin and length.
`teacher.json` names the teacher.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import NonNegativeInt, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from expertcut.errors import OutputError
from expertcut.files import write_atomically
from expertcut.healing import objectives
from expertcut.healing.data import Row
from expertcut.healing.objectives import Batch
from expertcut.scoring.projection import TopLogprobs

_ROWS = TypeAdapter(dict[str, tuple[NonNegativeInt, NonNegativeInt]])


@dataclass(frozen=True)
class CacheKey:
    """What a cache depends on, besides the rows."""

    fingerprint: str
    dtype: str
    likeliest: int


class CachedTeacher:
    """A teacher that reads its outputs from a cache."""

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self.places: dict[str, tuple[Any, int, int]] = {}
        self.files = ExitStack()
        check_cache(folder, key)
        for file in sorted(folder.glob("*.safetensors")):
            try:
                opened: Any = self.files.enter_context(safe_open(file, framework="pt"))
                rows = _ROWS.validate_json((opened.metadata() or {}).get("rows", ""))
                ids, logprob = (opened.get_slice(n).get_shape() for n in ("ids", "logprob"))
                end = max((begin + length for begin, length in rows.values()), default=0)
                if ids != logprob or ids[:1] != [end] or not 1 <= ids[-1] <= key.likeliest:
                    raise ValueError("its rows are elsewhere")
            except (OSError, SafetensorError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise OutputError(
                    f"{file} is damaged ({reason}): remove it, and its rows are computed again"
                ) from None
            self.places |= {name: (opened, *place) for name, place in rows.items()}

    def __call__(self, batch: Batch, at_BS: Tensor) -> TopLogprobs:
        """As LiveTeacher."""
        ids, logprobs = [], []
        lengths_B = batch["attention_mask"].sum(dim=1)
        for ids_S, n, at_S in zip(batch["input_ids"].cpu(), lengths_B, at_BS.cpu(), strict=True):
            file, begin, length = self.places[_digest(ids_S[: int(n)].tolist())]
            rows, at = slice(begin, begin + length), at_S[: int(n) - 1]
            ids.append(file.get_slice("ids")[rows][at])
            logprobs.append(file.get_slice("logprob")[rows][at])
        ids_MR, logprob_MR = torch.cat(ids).long(), torch.cat(logprobs)
        return TopLogprobs(ids_MR.to(at_BS.device), logprob_MR.to(at_BS.device))


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(torch.tensor(ids, dtype=torch.int32).numpy().tobytes()).hexdigest()[:32]


def check_cache(folder: Path, key: CacheKey) -> None:
    """Checks that a folder is a cache with this key; an empty or missing one becomes it."""
    file = folder / "teacher.json"
    content = json.dumps(vars(key), indent=1) + "\n"
    if not file.is_file():
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise OutputError(f"{folder} is not a teacher's cache: name another --teacher-cache")
        write_atomically(file, content.encode())
    elif file.read_text() != content:
        raise OutputError(
            f"{folder} holds outputs of another teacher, or another number of tokens: name another "
            "--teacher-cache"
        )


def fill_cache(
    folder: Path,
    key: CacheKey,
    sources: Sequence[Sequence[tuple[int, Row]]],
    live: Callable[[], objectives.LiveTeacher],
    batch: int,
) -> CachedTeacher:
    """Computes missing rows, in the batches of the training, and returns the cache."""
    processes = PartialState()
    with processes.main_process_first():
        known = CachedTeacher(folder, key)
    batches = [
        [rows[at] for at in range(begin, min(begin + batch, len(rows)))]
        for rows in sources
        for begin in range(0, len(rows), batch)
    ]
    teacher: objectives.LiveTeacher | None = None
    for items in batches[processes.process_index :: processes.num_processes]:
        by_name = {_digest(row.ids): (at, row) for at, row in items}
        missing = {name: item for name, item in by_name.items() if name not in known.places}
        if missing:
            teacher = teacher or live()
            pad_id, device = teacher.moe.tokenizer.pad_token_id or 0, teacher.moe.device
            padded = objectives.Collator(objectives.at_all_tokens, pad_id)([*missing.values()])
            batch_of_rows = {name: tensor.to(device) for name, tensor in padded.items()}
            top = teacher(batch_of_rows, batch_of_rows["labels"] != objectives.IGNORED)
            lengths = [len(row.ids) - 1 for _, row in missing.values()]
            begins = accumulate(lengths, initial=0)
            places = dict(zip(missing, zip(begins, lengths, strict=False), strict=True))
            tensors = {"ids": top.ids_MR.int().cpu(), "logprob": top.logprob_MR.float().cpu()}
            file = hashlib.sha256("".join(sorted(missing)).encode()).hexdigest()[:16]
            content = save(tensors, {"rows": json.dumps(places)})
            write_atomically(folder / f"{file}.safetensors", content)
    known.files.close()
    processes.wait_for_everyone()
    return CachedTeacher(folder, key)
