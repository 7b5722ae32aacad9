"""Rows in memory at once: as set, as recorded, or chosen from the free memory.

Loss and gradient depend on them by rounding only; a resumed run takes the recorded number.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from pydantic import PositiveInt
from torch import Tensor

from expertcut.documents import Record
from expertcut.errors import ModelError, OutputError, SettingsError
from expertcut.files import write_atomically
from expertcut.healing.data import Rows, TrainingData
from expertcut.healing.heal_settings import HealSettings
from expertcut.healing.state import random_states, set_random_states
from expertcut.models.devices import free_bytes, give_back, unless_out_of_memory
from expertcut.models.load import MoeModel
from expertcut.scoring.projection import Projection

logger = logging.getLogger(__name__)

MICRO_BATCH_FILE = "micro_batch.json"
# More tokens in a pass make a step hardly faster.
_PASS_TOKENS_ON_CPU, _PASS_TOKENS = 4096, 16384
_CPU_PASS_BYTES = 0.75e9  # more only for one row alone: others use the CPU too
_FREE_SHARE = 0.5  # of the free memory, for a new run; a recorded number may take all of it
_SLACK = 2.0  # bytes of a pass per byte that autograd keeps: gradients, copies, gaps
_LOOKED_AT = 512  # training rows searched for the longest
_SHORT = 8  # tokens of the pass that measures the fixed part
_ADAPTER_COPIES = 3  # gradients and Adam's two moments
_CHUNK_COPIES = 6  # logits of a chunk, softmax, gradients


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a training pass: a fixed part, and one per row of `longest` tokens."""

    fixed_bytes: int
    row_bytes: int
    longest: int

    def rows_within(self, n_bytes: float) -> int:
        """Rows that fit into `n_bytes`."""
        return int(max(0.0, n_bytes - self.fixed_bytes) // max(1, self.row_bytes))


class _Recorded(Record):
    rows: PositiveInt


@dataclass
class MicroBatch:
    """Rows of one process in memory at once, and the reason for their number; kept in a file."""

    rows: int
    why: str
    file: Path

    def save(self) -> None:
        """Records the number for a resumed run."""
        if PartialState().is_main_process:
            content = _Recorded(rows=self.rows).model_dump_json() + "\n"
            write_atomically(self.file, content.encode())

    def halve(self, moe: MoeModel, n_tokens: int) -> None:
        """Halves the rows after memory ran out."""
        if self.rows == 1:
            raise ModelError(
                f"{moe.source.id}: not enough memory to train on one row of {n_tokens:,} tokens: "
                "free memory, add --gradient-checkpointing or lower --max-tokens; the same command "
                "resumes from the last state"
            )
        before, self.rows = self.rows, self.rows // 2
        logger.warning(
            "not enough memory for %d rows at once: the step is repeated with %d", before,
            self.rows,
        )  # fmt: skip
        give_back()
        self.save()


def share_of_process(batch: int, micro_batch: int | None) -> int:
    """Rows of a step in each process."""
    n_processes: int = PartialState().num_processes
    if batch % (n_processes * (micro_batch or 1)):  # so that all processes have as many rows
        micro = f"--micro-batch-size {micro_batch} times " if micro_batch else ""
        raise SettingsError(
            f"--batch-size {batch} must be a multiple of {micro}the {n_processes} processes"
        )
    return batch // n_processes


def choose_micro_batch(
    moe: MoeModel,
    run: Any,
    projection: Projection,
    data: TrainingData,
    settings: HealSettings,
    folder: Path,
) -> MicroBatch:
    """The number of rows: as set, else as recorded in the folder, else as memory allows."""
    file = folder / MICRO_BATCH_FILE
    share = share_of_process(settings.batch, settings.micro_batch)
    recorded = None
    if file.is_file():
        try:
            recorded = _Recorded.load(file, OutputError, "is not a micro-batch").rows
        except OutputError as error:
            logger.warning("%s: the micro-batch is chosen again", error)
    if settings.micro_batch is not None:
        chosen = MicroBatch(settings.micro_batch, "--micro-batch-size", file)
    else:
        first = Rows(data.parts, min(settings.steps * settings.batch, _LOOKED_AT))
        rows = [*data.held_out, *(first[at][1] for at in range(len(first)))]
        needs = estimate_memory(moe, run, projection, max(len(row.ids) for row in rows), settings)
        chosen = MicroBatch(*_chosen(needs, share, moe.device, recorded), file)
        chosen.rows = min(gather_object([chosen.rows]))
    if recorded not in (None, chosen.rows):
        logger.warning(
            "%d rows at once, %d before the interruption: the last digits of losses may differ "
            "from those of an uninterrupted run", chosen.rows, recorded,
        )  # fmt: skip
    chosen.save()
    return chosen


def _chosen(
    needs: MemoryEstimate | None, share: int, device: torch.device, recorded: int | None
) -> tuple[int, str]:
    if needs is None:
        return 1, "one row needed more than the free memory"
    # Processes of one host share its memory; GPUs are each process's own.
    n_sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    free = free_bytes(device) / n_sharing
    if recorded is not None and recorded <= min(share, max(1, needs.rows_within(free))):
        return recorded, "as before the interruption"
    most_tokens = _PASS_TOKENS_ON_CPU if device.type == "cpu" else _PASS_TOKENS
    most: float = min(most_tokens // needs.longest, needs.rows_within(free * _FREE_SHARE))
    if device.type == "cpu":
        most = min(most, _CPU_PASS_BYTES // max(1, needs.row_bytes))
    return max(n for n in range(1, share + 1) if share % n == 0 and n <= max(1, most)), (
        f"{free / 1e9:.1f} GB are free, a row of {needs.longest:,} tokens takes about "
        f"{needs.row_bytes / 1e9:.2f} GB"
    )


def estimate_memory(
    moe: MoeModel, run: Any, projection: Projection, longest: int, settings: HealSettings
) -> MemoryEstimate | None:
    """Measured on passes over one short and one long row; None if memory runs out."""
    kept = unless_out_of_memory(
        lambda: [_kept_bytes(moe, run, projection, n) for n in (_SHORT, longest)]
    )
    give_back()
    if kept is None:
        return None
    short, long = kept
    row = max(0, long - short)
    if settings.save_memory:  # autograd keeps one layer's part and the inputs of all layers
        config = moe.model.config.get_text_config()
        inputs = config.num_hidden_layers * longest * config.hidden_size * moe.dtype.itemsize
        short, row = short // config.num_hidden_layers, row // config.num_hidden_layers + inputs
    adapters = sum(p.numel() * p.element_size() for p in run.parameters() if p.requires_grad)
    fixed = int(_SLACK * short) + _ADAPTER_COPIES * adapters
    fixed += _CHUNK_COPIES * projection.chunk_bytes
    return MemoryEstimate(fixed, int(_SLACK * row), longest)


def _kept_bytes(moe: MoeModel, run: Any, projection: Projection, n_tokens: int) -> int:
    """Bytes that autograd keeps of one row, without weights."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids_1S = torch.arange(n_tokens, device=moe.device)[None] % projection.n_logits
    run.train()
    before = random_states()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_1SH = projection.hidden(run, ids_1S, torch.ones_like(ids_1S))
    set_random_states(before)
    for weight in run.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    del hidden_1SH  # until now no address was given out twice
    return sum(kept.values())
