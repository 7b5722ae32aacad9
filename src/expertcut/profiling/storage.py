"""A profile on disk: `profile.json`, one safetensors file per chunk, and `run.json`."""

import hashlib
import json
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import fields, replace
from functools import cached_property, partial, reduce, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from expertcut.data import Quiz, Truncate
from expertcut.data.sources import is_held_out
from expertcut.errors import ProfileError
from expertcut.files import parse_json, read_file, write_atomically
from expertcut.profiling.schema import (
    NO_CHOICE,
    AnyProfileInfo,
    MeasuredInfo,
    ProfileInfo,
    TextProfileInfo,
    arrays_faults,
    text_arrays_faults,
)
from expertcut.profiling.statistics import (
    Answers,
    LayerStatistics,
    NextTokenStatistics,
    OverTokens,
    TextLayer,
    TextScore,
    layers_of,
)
from expertcut.stats import Array

Arrays = dict[str, Array]

_METADATA_KEY = "expertcut"  # a single key: several would be written in random order
_MAX_BYTES = 1 << 30  # five times 256 questions, 1,024 experts and 200 layers
_DTYPES = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
CUT = "cut_N"  # tokens that each prompt lost on the left; only if one did
_PADDING = {"choice_logprob_NC": -np.inf, "order_NC": NO_CHOICE}
CALIBRATION = "calibration"  # prefix of sums over the questions that are not held out
IN_CALIBRATION = "calibration_N"
DOCUMENT = "document_N"  # the place in its source of the document that a row is of
NEAR_TIE = 1e-5  # a K/K+1 gap below this may flip under rounding
Options = ParamSpec("Options")
Derived = TypeVar("Derived")


def write_chunk(path: Path, arrays: Arrays, of: str = "", scratch: Path | None = None) -> None:
    """Writes a chunk atomically, by way of `scratch`; equal arrays and `of` give equal bytes."""
    described = json.dumps(_description(arrays, of), sort_keys=True, separators=(",", ":"))
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, save(contiguous, metadata={_METADATA_KEY: described}), scratch)


def read_chunk(path: Path, of: str = "", noun: str = "profile") -> Arrays:
    """The arrays of a chunk; ProfileError if truncated, altered or of another profile."""
    arrays = chunk_or_fault(path, of)
    if isinstance(arrays, str):
        raise ProfileError(f"{path} is damaged ({arrays}): {noun} again to redo it")
    return arrays


def chunk_or_fault(path: Path, of: str) -> Arrays | str:
    """The arrays of a chunk, or why it is invalid."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return f"it has more than {_MAX_BYTES >> 20} MiB"
        with safe_open(path, framework="numpy") as file:
            described = parse_json((file.metadata() or {})[_METADATA_KEY].encode())
            names = list(file.keys())
            if not {file.get_slice(name).get_dtype() for name in names} <= _DTYPES:
                return "it holds numbers of a type that numpy lacks"
            arrays = {name: file.get_tensor(name) for name in names}
        expected = _description(arrays, of)
        if described == expected:
            return arrays
        if {**described, "of": of} == expected:
            return "it belongs to another profile, subject or place"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return "its checksum does not hold"


def _description(arrays: Arrays, of: str) -> dict[str, object]:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return {"format": 1, "of": of, "sha256": digest.hexdigest()}


class MeasuredFolder:
    """A profile or a trace: its description and its chunks."""

    info: MeasuredInfo

    def __init__(self, path: Path, info: MeasuredInfo) -> None:
        self.path = path
        self.info = info

    @property
    def missing(self) -> list[str]:
        """Chunks that are not measured yet."""
        folder = self.path / "chunks"
        return [name for name, _, _ in self.info.chunks() if not (folder / name).is_file()]

    @property
    def finished_at(self) -> float | None:
        """Seconds since the epoch; None while chunks are missing."""
        try:
            run = parse_json(read_file(self.path / "run.json"))
            return None if self.missing else float(run["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def check_whole(self) -> None:
        """Raises a ProfileError if chunks are missing."""
        if missing := self.missing:
            n_chunks = len(list(self.info.chunks()))
            raise ProfileError(
                f"{self.path} is not finished: {len(missing)} of {n_chunks} chunks are missing: "
                f"run the same `expertcut {self.info.noun}` again to finish it"
            )

    def read_chunks(self) -> Iterator[Arrays]:
        """All chunks in order; ProfileError if one is missing or damaged."""
        self.check_whole()
        noun = self.info.noun
        for name, subject, n in self.info.chunks():
            path = self.path / "chunks" / name
            arrays = read_chunk(path, self.info.chunk_hash(name, subject), noun)
            if reason := next(self._faults(arrays, n), ""):
                raise ProfileError(f"{path} is damaged ({reason}): {noun} again to redo it")
            yield arrays

    def _faults(self, arrays: Arrays, n: int) -> Iterator[str]:
        raise NotImplementedError


class Profile(MeasuredFolder):
    """A profile folder; chunks are read and validated on first use."""

    info: AnyProfileInfo
    holds_out = True  # some of the tuning questions are held out if no other split can be
    trust_remote_code = False  # of the profiled checkpoint's tokenizer, where texts are read again

    def __init__(self, path: Path, info: AnyProfileInfo, truncate: Truncate | None = None) -> None:
        super().__init__(path, info)
        self.truncate = truncate or info.settings.truncate  # for further prompts
        self.derived: dict[Hashable, Any] = {}  # results of `once_per_profile`

    @property
    def parts(self) -> "tuple[Profile, ...]":
        """The profiles that it blends, the heaviest first; itself, if it is one profile."""
        return (self,)

    @cached_property
    def chunks(self) -> list[Arrays]:
        """All chunks in order; ProfileError if one is missing or damaged."""
        return list(self.read_chunks())

    def _faults(self, arrays: Arrays, n: int) -> Iterator[str]:
        assert isinstance(self.info, ProfileInfo), "texts are of another class"
        return arrays_faults(arrays, self.info, n)

    def array(self, name: str) -> Array:
        """A per-question array (first axis N) of all chunks; ProfileError if it was not kept."""
        chunks = [chunk[name] for chunk in self.chunks if name in chunk]
        if len(chunks) < len(self.chunks):
            raise ProfileError(
                f"{self.path} holds no {name}, it keeps answers alone as `expertcut eval` writes "
                "them: use a folder that `expertcut profile` made"
            )
        if name in _PADDING:  # questions differ in their number of choices
            most = max(chunk.shape[1] for chunk in chunks)
            pad = partial(np.pad, constant_values=_PADDING[name])
            chunks = [pad(chunk, ((0, 0), (0, most - chunk.shape[1]))) for chunk in chunks]
        return np.concatenate(chunks)

    @cached_property
    def answers(self) -> Answers:
        """The model's answers; ties go to the first choice."""
        logprob_NC, answer_N = self.array("choice_logprob_NC"), self.array("answer_N")
        n_cut = None
        if self.info.settings.truncate:
            n_cut = sum(int((chunk[CUT] > 0).sum()) for chunk in self.chunks if CUT in chunk)
        return Answers(logprob_NC, answer_N, logprob_NC.argmax(axis=1) == answer_N, n_cut)

    @cached_property
    def layers(self) -> list[LayerStatistics]:
        """Every MoE block's statistics, in layer order."""
        blocks, is_correct_N = self.info.model.blocks, self.answers.is_correct_N
        alpha_NLE, chosen_NLK = self.array("alpha_NLE"), self.array("chosen_NLK")
        weight_NLK = self.array("weight_NLK").astype(np.float64)
        over_tokens_L, layers = self.over_tokens(), []
        for i, layer in enumerate(layers_of(blocks, alpha_NLE, chosen_NLK, is_correct_N)):
            n = layer.n_experts
            # −1, an empty place, goes into a column behind the last.
            column_A = chosen_NLK[:, i].ravel().astype(np.int64) % (n + 1)
            weight_X = np.bincount(column_A, weight_NLK[:, i].ravel(), minlength=n + 1)
            layers.append(replace(layer, weight_E=weight_X[:n], over_tokens=over_tokens_L[i]))
        return layers

    def over_tokens(self) -> list[OverTokens | None]:
        """The all-token sums of every MoE block; None where the profile holds none."""
        blocks = self.info.model.blocks
        sums = {f.name: self.token_sum(f.name.removesuffix("_E")) for f in fields(OverTokens)}
        if sums["tokens_E"] is None:
            return [None] * len(blocks)
        by_layer = [_of_layer(sums, i, block.experts) for i, block in enumerate(blocks)]
        return [OverTokens(**own) for own in by_layer]

    def near_ties(self) -> list[dict[str, Any]]:
        """Questions with a token, shots included, whose routing depends on a gap below 1e-5."""
        owns, rows, subjects = self.array("gap_N"), self.array("row_N"), self.subjects()
        names = ("gap_N", "prefix_gap", "unread_gap_N", "unread_prefix_gap")
        gaps = [reduce(np.minimum, [c[name] for name in names if name in c]) for c in self.chunks]
        return [
            {"subject": subjects[i], "row": int(rows[i]), "in_shots": bool(owns[i] >= NEAR_TIE)}
            for i in np.flatnonzero(np.concatenate(gaps) < NEAR_TIE).tolist()
        ]

    def subjects(self) -> list[str]:
        """The subject of each question."""
        return [s for _, subject, n in self.info.chunks() for s in [subject] * n]

    def token_sum(self, name: str) -> Array | None:
        """An all-token sum (L, E) as if every prompt had run alone; None if a chunk lacks it."""
        if not all(f"question_{name}_LE" in chunk for chunk in self.chunks):
            return None
        sums = [
            len(c["row_N"]) * c[f"prefix_{name}_LE"] + c[f"question_{name}_LE"] for c in self.chunks
        ]
        return np.asarray(np.sum(sums, axis=0))


class TextProfile(Profile):
    """A profile of texts: sums over tokens, and losses by row, without answers."""

    info: TextProfileInfo

    def _faults(self, arrays: Arrays, n: int) -> Iterator[str]:
        return text_arrays_faults(arrays, self.info, n)

    def array(self, name: str) -> Array:
        """An array by row (first axis N) of all chunks; ProfileError if it was not kept."""
        if name not in self.chunks[0]:
            raise ProfileError(
                f"{self.path} is a profile of texts, which hold no answers ({name}): profile a "
                "quiz for this"
            )
        return super().array(name)

    def token_sum(self, name: str) -> Array | None:
        """A sum (L, E) over all tokens; None if it was not kept."""
        if f"{name}_LE" not in self.chunks[0]:
            return None
        return np.asarray(np.sum([c[f"{name}_LE"] for c in self.chunks], axis=0))

    @cached_property
    def layers(self) -> list[TextLayer]:  # type: ignore[override]  # without answers
        """Every MoE block's statistics, in layer order."""
        following = {f.name: self.token_sum(f.name[:-2]) for f in fields(NextTokenStatistics)}
        alpha_LE, moments_2LX = self.token_sum("probability"), None
        if self.info.settings.stats == "routes":
            blocks = self.info.model.blocks
            alpha_LE = np.full((len(blocks), max(b.experts for b in blocks)), np.nan)
        elif alpha_LE is None:
            raise ProfileError(f"{self.path} keeps losses alone, as `expertcut eval` writes them")
        else:
            moments_2LX = np.sum([chunk["moments_2LX"] for chunk in self.chunks], axis=0)
        n_tokens = sum(int(chunk["tokens_N"].sum()) for chunk in self.chunks)
        layers = []
        for i, (block, over_tokens) in enumerate(
            zip(self.info.model.blocks, self.over_tokens(), strict=True)
        ):
            assert over_tokens is not None, "kept with alpha"
            after = _of_layer(following, i, block.experts)
            layers.append(
                TextLayer(
                    layer=i,
                    block=block.name,
                    n_experts=block.experts,
                    top_k=block.n_places,
                    alpha_mean_E=alpha_LE[i, : block.experts] / max(n_tokens, 1),
                    n_tokens=n_tokens,
                    over_tokens=over_tokens,
                    moments_2X=None if moments_2LX is None else moments_2LX[:, i],
                    next=NextTokenStatistics(**after) if self.info.text.has_loss else None,
                )
            )
        return layers

    def by_source(self) -> dict[str, Profile]:
        """The profile of each source alone."""
        parts = list(zip(self.info.chunks(), self.chunks, strict=True))
        found: dict[str, Profile] = {}
        for name in self.info.text.sources:
            found[name] = TextProfile(self.path, self.info, self.truncate)
            own = [chunk for (_, source, _), chunk in parts if source == name]
            found[name].__dict__["chunks"] = own  # what the cached property would read
        return found

    @cached_property
    def scores(self) -> dict[str, TextScore]:
        """What was predicted of each source; empty without losses."""
        names = self.info.text.sources if self.info.text.has_loss else ()
        return {name: self._score({name}) for name in names}

    @property
    def score(self) -> TextScore:
        """What was predicted of all sources."""
        return self._score({*self.info.text.sources})

    def _score(self, sources: Collection[str]) -> TextScore:
        numbers = {source: i for i, source in enumerate(self.info.text.sources)}
        parts = zip(self.info.chunks(), self.chunks, strict=True)
        own = [(numbers[source], chunk) for (_, source, _), chunk in parts if source in sources]
        document_N = np.concatenate([(i << 32) + c[DOCUMENT].astype(np.int64) for i, c in own])
        _, at_N = np.unique(document_N, return_inverse=True)
        loss_D, scored_D, right_D = (
            np.bincount(at_N, np.concatenate([c[name] for _, c in own]).astype(np.float64))
            for name in ("loss_N", "scored_N", "right_N")
        )
        return TextScore(loss_D, scored_D, right_D)


def _of_layer(sums: Mapping[str, Array | None], layer: int, n_experts: int) -> dict[str, Any]:
    return {k: None if v is None else v[layer, :n_experts] for k, v in sums.items()}


def once_per_profile(
    derive: Callable[Concatenate[Profile, Options], Derived], /
) -> Callable[Concatenate[Profile, Options], Derived]:
    """A function of a profile, computed once per profile object and other arguments."""

    @wraps(derive)
    def cached(profile: Profile, /, *args: Options.args, **kwargs: Options.kwargs) -> Derived:
        key = (derive, args, *sorted(kwargs.items()))
        if key not in profile.derived:
            profile.derived[key] = derive(profile, *args, **kwargs)
        result: Derived = profile.derived[key]
        return result

    return cached


def load_profile(path: Path, truncate: Truncate | None = None) -> Profile:
    """Loads a profile, its chunks later; ProfileError without a valid profile.json."""
    return profile_of(path, ProfileInfo.load_from(path), truncate)


def profile_of(path: Path, info: AnyProfileInfo, truncate: Truncate | None = None) -> Profile:
    """The profile of this kind in a folder."""
    kind = TextProfile if isinstance(info, TextProfileInfo) else Profile
    return kind(path, info, truncate)


def newest_profile(root: Path = Path("profiles"), truncate: Truncate | None = None) -> Profile:
    """The profile in `root` that was finished last; ProfileError without one."""
    profiles = [load_profile(file.parent, truncate) for file in root.glob("*/profile.json")]
    finished = [(at, p) for p in profiles if (at := p.finished_at) is not None]
    if not finished:
        state = f"holds {len(profiles)} unfinished" if profiles else "holds no"
        raise ProfileError(f"{root}/ {state} profile: run `expertcut profile` or name --profile")
    return max(finished, key=lambda pair: pair[0])[1]


def unfinished_after(profile: Profile) -> list[Profile]:
    """Unfinished profiles in the same folder that were worked on after this one was finished."""
    finished, others = profile.finished_at or 0.0, profile.path.parent.glob("*/profile.json")
    newer = (
        load_profile(file.parent)
        for file in sorted(others)
        if any(p.stat().st_mtime > finished for p in (file, *file.parent.glob("chunks")))
    )
    return [other for other in newer if other.finished_at is None]


def largest_values(profile: Profile) -> list[Array] | None:
    """The largest absolute output (E,) of each expert at any token, per MoE block."""
    if len(profile.parts) > 1:
        of_each = [found for part in profile.parts if (found := largest_values(part)) is not None]
        is_known = len(of_each) == len(profile.parts)
        return [np.max(own, axis=0) for own in zip(*of_each, strict=True)] if is_known else None
    if isinstance(profile, TextProfile):
        if "largest_LE" not in profile.chunks[0]:  # of given routes
            return None
        parts = [chunk["largest_LE"] for chunk in profile.chunks]
    elif "question_largest_LE" not in profile.chunks[0]:
        return None
    else:
        parts = [c[f"{part}_largest_LE"] for c in profile.chunks for part in ("prefix", "question")]
    largest_LE = np.max(parts, axis=0)
    blocks = profile.info.model.blocks
    return [largest_LE[layer, : block.experts] for layer, block in enumerate(blocks)]


class TextPart(TextProfile):
    """A profile of texts without the documents that are held out."""

    is_halved = False  # every other document of a source is held out, instead of a fifth by hash

    def __init__(self, whole: TextProfile) -> None:
        super().__init__(whole.path, whole.info, whole.truncate)
        self.whole = whole

    @cached_property
    def chunks(self) -> list[Arrays]:
        """All chunks in order without the held-out rows; moments are of all."""
        found = []
        for chunk in self.whole.chunks:
            part = {name: chunk[name] for name in ("moments_2LX",) if name in chunk}
            chooses_N = chunk[IN_CALIBRATION].astype(bool)
            for name, array in chunk.items():
                if name.startswith(f"{CALIBRATION}_") and name.endswith("_LE"):
                    part[name.removeprefix(f"{CALIBRATION}_")] = array
                elif name.endswith("_N"):
                    part[name] = array[chooses_N]
            found.append(part)
        return found


class ProfilePart(Profile):
    """A profile without some questions; `held_out` are subjects and rows."""

    def __init__(self, whole: Profile, held_out: Collection[tuple[str, int]]) -> None:
        super().__init__(whole.path, whole.info, whole.truncate)
        self.whole = whole
        self.held_out = frozenset(held_out)

    @cached_property
    def chunks(self) -> list[Arrays]:
        """All chunks in order with the remaining questions; empty ones are left out."""
        found = []
        for (_, subject, _), chunk in zip(self.info.chunks(), self.whole.chunks, strict=True):
            rows = chunk["row_N"].tolist()
            is_left_N = np.array([(subject, row) not in self.held_out for row in rows])
            part = {}
            for name, array in chunk.items():
                kind, _, rest = name.partition("_")
                if kind == "question" and name.endswith("_LE"):
                    part[name] = chunk[f"{CALIBRATION}_{rest}"]
                elif kind != CALIBRATION:
                    is_by_question = name.rpartition("_")[2].startswith("N")
                    part[name] = array[is_left_N] if is_by_question else array
            if is_left_N.any():
                found.append(part)
        return found

    def subjects(self) -> list[str]:
        """The subject of each remaining question."""
        names = zip(self.whole.subjects(), self.whole.array("row_N").tolist(), strict=True)
        return [subject for subject, row in names if (subject, row) not in self.held_out]


def can_hold_out(profile: Profile, quiz: Quiz) -> bool:
    """Whether a profile has separate records of the held-out fifth, also in all-token sums."""
    if profile.info.settings.stats == "answer":
        return True
    in_calibration = {(q.subject, q.row): not is_held_out(q) for q in quiz}
    return all(
        IN_CALIBRATION in chunk
        and chunk[IN_CALIBRATION].astype(bool).tolist()
        == [in_calibration[subject, row] for row in chunk["row_N"].tolist()]
        for (_, subject, _), chunk in zip(profile.info.chunks(), profile.chunks, strict=True)
    )
