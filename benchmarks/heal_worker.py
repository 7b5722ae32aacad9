"""One of the processes of `benchmarks.heal`: trains a model, a step whenever a line comes in."""

import ctypes
import gc
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertcut.models.load import MoeModel


@dataclass(frozen=True)
class Asked:
    """What is trained on, and how; `rounds` steps after `warm_up` ones that are not counted."""

    quiz: str
    shots: int
    max_tokens: int
    batch: int
    rank: int
    rounds: int
    warm_up: int
    threads: int

    @property
    def steps(self) -> int:
        """All of them."""
        return self.rounds + self.warm_up


def worker(folder: Path, asked: Asked) -> None:
    """Trains as `heal` does, each step when a line comes in; says each by a line, and the last."""
    from expertcut.healing.adapters import adapted
    from expertcut.healing.data import read_data
    from expertcut.healing.heal_settings import HealSettings
    from expertcut.healing.objectives import OBJECTIVES
    from expertcut.healing.trainer import fit

    moe = loaded(folder)
    settings = HealSettings(
        quiz=asked.quiz,
        shots=asked.shots,
        max_tokens=asked.max_tokens,
        rank=asked.rank,
        steps=asked.steps,
        batch=asked.batch,
        check_every=asked.steps,
    )
    read = read_data(settings, moe.tokenizer, asked.max_tokens)
    n_parameters = sum(parameter.numel() for parameter in moe.model.parameters())
    loaded_mb = forgotten_peak_mb()
    model = adapted(moe, settings)
    peak_mb: list[float] = []

    def next_step(done: int, total: int) -> None:
        peak_mb.append(memory_mb("VmHWM"))
        tell_and_wait("done")

    with tempfile.TemporaryDirectory() as place:
        tell_and_wait("ready")
        fit(
            moe, model, read, settings, OBJECTIVES["lm"], None,
            folder=Path(place), report=next_step,
        )  # fmt: skip
    print(
        json.dumps(
            {
                "parameters": n_parameters,
                "trained": model.get_nb_trainable_parameters()[0],
                "peak_mb": peak_mb[-1],
                "above_mb": peak_mb[-1] - loaded_mb,
            }
        ),
        flush=True,
    )


def loaded(folder: Path) -> "MoeModel":
    """As every stage loads it."""
    from expertcut.models.load import LoadOptions, find_source, load

    return load(find_source(str(folder)), LoadOptions())


def tell_and_wait(word: str) -> None:
    """Between steps: the others have their turn."""
    print(word, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("nobody is there to say go")


def forgotten_peak_mb() -> float:
    """What is resident now; from here on the peak is a new one. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def memory_mb(key: str) -> float:
    """A line of this process's status."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(f"{key}:") + 1]) / 1000


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Asked(**json.loads(sys.argv[2])))
