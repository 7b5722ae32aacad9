"""Profile folders written by hand: arrays drawn at random, no model behind them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.edits.reweight_select import admission_gap
from expertcut.profiling.schema import (
    CHUNK_QUESTIONS,
    BlockInfo,
    ModelInfo,
    ProfileInfo,
    QuizInfo,
    Settings,
    SubjectInfo,
)
from expertcut.profiling.storage import Arrays, Profile, write_chunk

SETTINGS = Settings(
    dtype="float32",
    device_type="cpu",
    threads=1,
    batch_tokens=2048,
    stats="all",
    way="shared",
    experts_implementation="eager",
    attention="sdpa",
    torch="2.13.0",
    cpu_capability="AVX2",
)
SUMS = ("tokens", "weight", "norm", "weighted_norm")


def block(layer: int, experts: int = 8, top_k: int = 2, **more: Any) -> BlockInfo:
    gate = {"scoring": "softmax", "inflates": True, "groups": 1, "top_groups": 1, **more}
    return BlockInfo(name=f"model.layers.{layer}.mlp", experts=experts, top_k=top_k, **gate)


def profile_info(
    blocks: Sequence[BlockInfo], subjects: Mapping[str, int], **quiz: Any
) -> ProfileInfo:
    """`subjects` says how many questions each has; `quiz` changes the quiz's other fields."""
    fields = {"id": "birds", "revision": None, "split": "test", "shots": 5, "limit": None, **quiz}
    counted = {
        name: SubjectInfo(questions=n, content_hash=f"hash of {name}")
        for name, n in subjects.items()
    }
    return ProfileInfo(
        model=ModelInfo(
            id="makers/tiny", revision="main", fingerprint="f" * 64, blocks=tuple(blocks)
        ),
        quiz=QuizInfo(**{"subjects": counted, **fields}),
        settings=SETTINGS,
    )


def random_chunk(seed: int, n: int, blocks: Sequence[BlockInfo], n_idle: int = 2) -> Arrays:
    """A chunk whose last `n_idle` experts of every block are never chosen."""
    rng = np.random.default_rng(seed)
    most, top_k = max(b.experts for b in blocks), blocks[0].top_k
    alpha_NLE = np.zeros((n, len(blocks), most), dtype=np.float32)
    chosen_NLK = np.zeros((n, len(blocks), top_k), dtype=np.int16)
    for layer, its in enumerate(blocks):
        logits_NE = rng.normal(0, 1.5, (n, its.experts))
        logits_NE[:, its.experts - n_idle :] -= 50
        if its.scoring == "sigmoid":
            alpha_NE = 1 / (1 + np.exp(-logits_NE))
        else:
            alpha_NE = np.exp(logits_NE) / np.exp(logits_NE).sum(axis=1, keepdims=True)
        alpha_NLE[:, layer, : its.experts] = alpha_NE
        chosen_NLK[:, layer] = np.argsort(-alpha_NE, axis=1)[:, :top_k]
    chunk = {
        "alpha_NLE": alpha_NLE,
        "chosen_NLK": chosen_NLK,
        "weight_NLK": np.take_along_axis(alpha_NLE, chosen_NLK.astype(np.int64), axis=2),
        "gap_N": rng.uniform(1e-4, 1, n).astype(np.float32),
        "prefix_gap": np.array([0.5], dtype=np.float32),
        "choice_logprob_NC": np.log(rng.dirichlet(np.ones(4), n)).astype(np.float32),
        "answer_N": rng.integers(0, 4, n).astype(np.uint8),
        "row_N": np.arange(n, dtype=np.int32),
    }
    for part in ("prefix", "question"):
        for name in SUMS:
            sums_LE = rng.integers(1, 100, (len(blocks), most)).astype(np.float64)
            chunk[f"{part}_{name}_LE"] = sums_LE
        chunk[f"{part}_largest_LE"] = rng.uniform(0, 9, (len(blocks), most)).astype(np.float32)
    return chunk


def write_profile(folder: Path, info: ProfileInfo, chunks: Sequence[Arrays]) -> Profile:
    """The folder as `profile` would have left it, but for `run.json`."""
    folder.mkdir(parents=True)
    (folder / "profile.json").write_text(info.model_dump_json())
    for (name, subject, _), arrays in zip(info.chunks(), chunks, strict=True):
        write_chunk(folder / "chunks" / name, arrays, info.chunk_hash(name, subject))
    return Profile(folder, info)


def random_profile(folder: Path, info: ProfileInfo, seed: int = 0, n_idle: int = 2) -> Profile:
    """A finished profile of random chunks; rows count on over a subject's chunks."""
    chunks = []
    blocks = info.model.blocks
    for i, (name, _, n) in enumerate(info.chunks()):
        chunk = random_chunk(1000 * seed + i, n, blocks, n_idle)
        k = int(name.removesuffix(".safetensors").rsplit("-", 1)[1])
        chunk["row_N"] = chunk["row_N"] + np.int32(k * CHUNK_QUESTIONS)
        chunks.append(chunk)
    return write_profile(folder, info, chunks)


def gap(profile: Profile, layer: int, expert: int) -> float:
    """The admission gap of an expert in a profile."""
    alpha_NLE, chosen_NLK = profile.array("alpha_NLE"), profile.array("chosen_NLK")
    its = profile.info.model.blocks[layer]
    return admission_gap(its, alpha_NLE[:, layer, : its.experts], chosen_NLK[:, layer], expert)
