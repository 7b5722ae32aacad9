"""`python -m tests.soak.fuzz --minutes 10`: spoiled files without end, for every reader.

Files of weights, their index, plans, profiles and chunks are changed in their JSON, byte by byte
and in length. Each must be read or refused in words; what else happens is counted as a crash and
printed with the smallest example of it. `--seed` makes another run; the status is 1 after a crash.
"""

import argparse
import json
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from expertcut.edits.plan import load_plan, plan_text
from expertcut.models.safetensors_index import read_stored
from expertcut.profiling.storage import load_profile, read_chunk, write_chunk
from tests.hostile.test_shown import DOCUMENTS
from tests.hostile.world import make_world
from tests.support.hand_made import block, profile_info, random_chunk
from tests.support.readable import (
    changed,
    damaged,
    plans,
    profiles,
    read_or_refused,
    shown_or_refused,
    written,
)

BATCH = 200
SETTINGS = settings(
    max_examples=BATCH,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.target, Phase.shrink],
)
NAMES = [f"model.layers.{i}.mlp.experts.{e}.down_proj.weight" for i in range(2) for e in range(3)]
Attempt = Callable[[Path, st.DataObject], bool]


@dataclass
class Tally:
    """What a reader was given, how much of it was read, and what broke it."""

    tried: int = 0
    read: int = 0
    crashes: Counter[str] = field(default_factory=Counter)


def weights(folder: Path, data: st.DataObject) -> bool:
    """A file of weights whose header, length or bytes are others."""
    tensors = {name: np.ones((2, 3), np.float32) for name in NAMES}
    content = save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(data.draw(_weights(content)))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return _stored(folder)


def index(folder: Path, data: st.DataObject) -> bool:
    """Two files of weights whose index says something else."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(files):
        own = {n: np.ones((2, 3), np.float32) for n in NAMES[i * 3 : i * 3 + 3]}
        (folder / name).write_bytes(save(own, metadata={"format": "pt"}))
    found = {"metadata": {}, "weight_map": {n: files[i // 3] for i, n in enumerate(NAMES)}}
    text = json.dumps(data.draw(changed(found))).encode()
    text = data.draw(st.sampled_from([text, data.draw(damaged(json.dumps(found).encode()))]))
    written(folder / "model.safetensors.index.json", text)
    return _stored(folder)


def plan(folder: Path, data: st.DataObject) -> bool:
    """A plan with JSON or bytes that are others; what is read comes back as it went."""
    text = plan_text(data.draw(plans()))
    file = written(folder / "plan.json", _json(text, data))
    found = read_or_refused(lambda: load_plan(file))
    if found is not None:
        assert load_plan(written(file, plan_text(found))) == found
    return found is not None


def profile(folder: Path, data: st.DataObject) -> bool:
    """A profile's description."""
    written(folder / "profile.json", _json(data.draw(profiles()).model_dump_json(), data))
    found = read_or_refused(lambda: load_profile(folder))
    if found is not None:
        read_or_refused(lambda: found.chunks)
    return found is not None


def chunk(folder: Path, data: st.DataObject) -> bool:
    """A chunk whose header, length or bytes are others."""
    info = profile_info([block(0)], {"birds": 4})
    name, subject, n = next(info.chunks())
    write_chunk(
        folder / "chunks" / name, random_chunk(0, n, [block(0)]), info.chunk_hash(name, subject)
    )
    (folder / "profile.json").write_text(info.model_dump_json())
    file = folder / "chunks" / name
    file.write_bytes(data.draw(_weights(file.read_bytes())))
    assert read_or_refused(lambda: read_chunk(file, "another place")) is None
    return read_or_refused(lambda: load_profile(folder).chunks) is not None


def shown(folder: Path, data: st.DataObject) -> bool:
    """Results, a sweep, an audit or a plan, printed in every form."""
    value = data.draw(st.sampled_from(_documents()))
    for _ in range(data.draw(st.integers(1, 3))):
        value = data.draw(changed(value)) if value else value
    return shown_or_refused(written(folder / "document.json", json.dumps(value)))


READERS: dict[str, Attempt] = {
    attempt.__name__: attempt for attempt in (weights, index, plan, profile, chunk, shown)
}


@cache
def _documents() -> list[Any]:
    """As the commands write them."""
    with tempfile.TemporaryDirectory() as root:
        world = make_world(Path(root) / "world")
        return [json.loads((world / name).read_text()) for name in DOCUMENTS]


@st.composite
def _weights(draw: st.DrawFn, content: bytes) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = draw(st.sampled_from(["header", "length", "bytes", "end"]))
    if kind == "header":
        for _ in range(draw(st.integers(1, 2))):
            header = draw(changed(header)) if header else header
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data
    if kind == "length":
        length = draw(st.integers(0, (1 << 64) - 1) | st.integers(size - 9, size + 9))
        return struct.pack("<Q", length) + content[8:]
    if kind == "end":
        return content + draw(st.binary(min_size=1, max_size=20))
    return draw(damaged(content))


def _stored(folder: Path) -> bool:
    stored = read_or_refused(lambda: read_stored(folder))
    if stored is None:
        return False
    for file in {tensor.file for tensor in stored.tensors.values()}:
        with safe_open(file, framework="pt") as opened:  # what is let in can be loaded
            for name in opened.keys():  # noqa: SIM118
                shape = stored.tensors[name].shape
                assert tuple(opened.get_tensor(name).shape) == shape
    return True


def _json(text: str, data: st.DataObject) -> bytes:
    value = json.dumps(data.draw(changed(json.loads(text)))).encode()
    return data.draw(st.sampled_from([value, data.draw(damaged(text.encode()))]))


def attempt(name: str, number: int, tally: Tally, folder: Path) -> None:
    """One batch of a reader; its first crash ends it, made as small as it gets."""

    @seed(number)
    @SETTINGS
    @given(st.data())
    def batch(data: st.DataObject) -> None:
        tally.tried += 1
        tally.read += READERS[name](folder, data)

    try:
        batch()
    except Exception as error:  # the point of it all: whatever it is, it is counted
        several = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
        for one in several:
            _count(name, one, tally)


def _count(name: str, error: Exception, tally: Tally) -> None:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    tally.crashes[place] += 1
    if tally.crashes[place] == 1:
        example = "\n".join(getattr(error, "__notes__", ()))
        print(f"{name}: {place}: {error}\n{example}", flush=True)


def main() -> int:
    """Batches of all readers in turn, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    _documents()  # before the time begins
    tallies = {name: Tally() for name in READERS}
    end = time.monotonic() + asked.minutes * 60
    with tempfile.TemporaryDirectory() as root:
        for number, name in zip(count(asked.seed * 1_000_000), cycle(READERS), strict=False):
            folder = Path(root) / name
            folder.mkdir(exist_ok=True)
            attempt(name, number, tallies[name], folder)
            if time.monotonic() > end:
                break
    for name, tally in tallies.items():
        n_crashes = sum(tally.crashes.values())
        print(f"{name:8} {tally.tried:>8,} tried {tally.read:>7,} read {n_crashes:>4} crashes")
        for place, times in tally.crashes.items():
            print(f"         {times} × {place}")
    total = sum(tally.tried for tally in tallies.values())
    print(f"{total:,} examples in {asked.minutes:g} minutes, seed {asked.seed}")
    return 1 if any(tally.crashes for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
