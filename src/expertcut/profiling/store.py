"""A profile on disk: `profile.json`, one safetensors file per chunk, and `run.json`."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.data import Truncate
from expertcut.documents import load_record
from expertcut.errors import ProfileError
from expertcut.files import parse_json, read_file
from expertcut.profiling.chunks import Arrays, read_chunk
from expertcut.profiling.info import ProfileInfo
from expertcut.profiling.sound import NO_CHOICE, Expected, arrays_fault

CUT = "cut_N"  # tokens that prompts lost on their left, in a chunk where one did
_PADDING = {"choice_logprob_NC": -np.inf, "order_NC": NO_CHOICE}


class Profile:
    """A profile's folder; arrays are read when asked for, every chunk checked.

    `truncate` is for prompts of what is asked from here on: as the profile's, unless given. With
    `holds_out` a part of the questions that fit judges where no other split does.
    """

    holds_out = True

    def __init__(self, path: Path, info: ProfileInfo, truncate: Truncate | None = None) -> None:
        self.path = path
        self.info = info
        self.truncate = truncate or info.settings.truncate

    @property
    def missing(self) -> list[str]:
        """Chunks that are still to be measured."""
        return [name for name, _, _ in self.info.chunks() if not self.chunk_path(name).is_file()]

    @property
    def finished_at(self) -> float | None:
        """Seconds since the epoch, None while chunks are missing."""
        try:
            run = parse_json(read_file(self.path / "run.json"))
            return None if self.missing else float(run["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def chunk_path(self, name: str) -> Path:
        """Where a chunk lies."""
        return self.path / "chunks" / name

    @cached_property
    def chunks(self) -> list[Arrays]:
        """All chunks in order.

        Raises:
            ProfileError: one is missing or damaged.
        """
        if self.missing:
            total = sum(1 for _ in self.info.chunks())
            raise ProfileError(
                f"{self.path} is not finished: {len(self.missing)} of {total} chunks are missing: "
                "run the same `expertcut profile` again to finish it"
            )
        return [self._chunk(*chunk) for chunk in self.info.chunks()]

    def _chunk(self, name: str, subject: str, n_questions: int) -> Arrays:
        path, blocks = self.chunk_path(name), self.info.model.blocks
        arrays = read_chunk(path, self.info.place(name, subject))
        experts = tuple(block.experts for block in blocks)
        expected = Expected(n_questions, experts, blocks[0].top_k, self.info.settings.stats)
        if (found := arrays_fault(arrays, expected)) is not None:
            raise ProfileError(f"{path} is damaged ({found}): profile again to redo it")
        return arrays

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A per-question array (first axis N) over all chunks.

        Raises:
            ProfileError: only answers were kept.
        """
        chunks = [chunk[name] for chunk in self.chunks if name in chunk]
        if len(chunks) < len(self.chunks):
            raise ProfileError(
                f"{self.path} holds no {name}, it keeps answers alone as `expertcut eval` writes "
                "them: use a folder that `expertcut profile` made"
            )
        if name in _PADDING:  # questions may differ in their number of choices
            most = max(chunk.shape[1] for chunk in chunks)
            widths = [((0, 0), (0, most - chunk.shape[1])) for chunk in chunks]
            pairs = zip(chunks, widths, strict=True)
            chunks = [np.pad(c, w, constant_values=_PADDING[name]) for c, w in pairs]
        return np.concatenate(chunks)

    @property
    def n_cut(self) -> int | None:
        """Questions whose prompts lost tokens on their left; None where none may."""
        found = sum(int((chunk[CUT] > 0).sum()) for chunk in self.chunks if CUT in chunk)
        return found if self.info.settings.truncate else None

    def subjects(self) -> list[str]:
        """The subject of each question."""
        return [s for _, subject, n in self.info.chunks() for s in [subject] * n]

    def token_sum(self, name: str) -> np.ndarray[Any, Any] | None:
        """An all-token sum (L, E) as if every prompt had run alone; None where a chunk lacks it."""
        if not all(f"question_{name}_LE" in chunk for chunk in self.chunks):
            return None
        sums = [
            len(c["row_N"]) * c[f"prefix_{name}_LE"] + c[f"question_{name}_LE"] for c in self.chunks
        ]
        return np.asarray(np.sum(sums, axis=0))


def load_profile(path: Path, truncate: Truncate | None = None) -> Profile:
    """A profile's description.

    Raises:
        ProfileError: no profile there, or its description does not hold.
    """
    file = path / "profile.json"
    if not file.exists():
        raise ProfileError(f"no profile in {path}: it has no profile.json")
    info = load_record(file, ProfileInfo, ProfileError, "is no profile")
    return Profile(path, info, truncate)


def newest_profile(root: Path = Path("profiles"), truncate: Truncate | None = None) -> Profile:
    """The profile in `root` that was finished last.

    Raises:
        ProfileError: none is finished.
    """
    found = [load_profile(file.parent, truncate) for file in root.glob("*/profile.json")]
    finished = [(at, p) for p in found if (at := p.finished_at) is not None]
    if not finished:
        state = f"holds {len(found)} unfinished" if found else "holds no"
        raise ProfileError(f"{root}/ {state} profile: run `expertcut profile` or name --profile")
    return max(finished, key=lambda pair: pair[0])[1]
