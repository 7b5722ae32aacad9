"""SRP, SCH and cache hit rates beside moe-lrc's scripts, on the same trace, in turns.

    python -m benchmarks.against_moe_lrc --moe-lrc FOLDER

FOLDER is a copy of github.com/ljcleo/moe-lrc (Liang et al. 2025); its scripts 30, 31, 41 and 50
are run as they are, one sequence after another in one process. No ratio is printed where a figure
differs by more than 1e-6. moe-lrc counts the first C experts that a cache loads as hits; they are
taken off. Both find every size of a cache, and both draw --draws times for the intervals of SRP:
the fewest that theirs takes, 21, leave little but the numbers. Theirs also has the SRP of each
expert, and goes through files. Seconds are those of the processor. --write FILE makes
tests/profiling/moe_lrc.json instead; --whole times all that `show` prints of a trace, alone.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RUNS, report
from expertcut.profiling import locality
from expertcut.profiling.trace import Sequence, load_trace
from expertcut.profiling.trace_findings import TraceFindings
from expertcut.stats import Array

SEGMENTS = (4, 16)
ROUNDS = 3


def scripts(folder: Path, n_experts: int, top_k: int) -> dict[str, types.ModuleType]:
    """moe-lrc's modules by their number, told of a model with one layer."""
    import pandas as pd

    settings = {"seg_lengths": list(SEGMENTS), "num_bootstrap": 1000, "ci_confidence": 0.95}
    misc: Any = types.ModuleType("misc")
    model = {"type": "causal", "num_layers": 1, "num_experts": n_experts, "top_k": top_k}
    misc.model_config = pd.DataFrame([model], index=["m"])
    misc.get_global_config = settings.get
    misc.print_log = lambda *_: None
    misc.stable_hash = lambda _: 0
    misc.get_model_keys = misc.get_model_key = None
    sys.modules["misc"] = misc
    found = {}
    for name in ("30_srp_calc", "31_srp_refine", "41_sch_calc", "50_chr_calc"):
        spec = importlib.util.spec_from_file_location(f"lrc_{name}", folder / "src" / f"{name}.py")
        assert spec and spec.loader
        found[name[:2]] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name[:2]])
    return found


def their_srp(
    theirs: dict[str, types.ModuleType], experts_STK: Array, n_experts: int, draws: int
) -> Array:
    """SRP and cache size (segments, 2), through the files that the scripts read and write."""
    import pandas as pd
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = torch.from_numpy(experts_STK.astype(np.int64))
        rank = torch.zeros((*experts_STK.shape[:2], n_experts), dtype=torch.int16)
        rank.scatter_(-1, chosen, torch.full(chosen.shape, n_experts, dtype=torch.int16))
        save_file({"d": rank}, folder / "m_00.safetensors")
        (srp := folder / "srp").mkdir()
        theirs["30"].seg_stat(draws, folder, srp, "m")
        theirs["31"].refine(0.95, srp, folder, "m")
        return np.asarray(pd.read_parquet(folder / "m_mg.parquet")[["best_f1", "best_m"]], float)


def their_hits(theirs: dict[str, types.ModuleType], experts_STK: Array, n_experts: int) -> Array:
    """Hits (S, policies, E) of caches of 1 to E experts, as whole numbers."""
    import torch

    lru, lfu, belady = (getattr(theirs["50"], f"calc_{n}") for n in ("lru", "lfu", "beladi"))
    hits = []
    for experts_TK in torch.from_numpy(experts_STK.astype(np.int64)):
        rates = [calc(experts_TK, n_experts) for calc in (lru, lfu, belady)]
        rates += [theirs["41"].calc_fsf(experts_TK, n_experts, m) for m in SEGMENTS]
        free_E = np.minimum(np.arange(n_experts) + 1, len(experts_TK.unique()))
        hits.append(np.rint(torch.stack(rates).numpy() * experts_TK.numel()) - free_E)
    return np.stack(hits).astype(int)


def our_srp(experts_STK: Array, n_experts: int) -> Array:
    """The same, by ours."""
    sequences = [Sequence(e[:, None], np.zeros(len(e))) for e in experts_STK]
    found = []
    for uses_SM, uses_LM in locality.segment_uses(sequences, [n_experts], SEGMENTS):
        found.append(locality.best_f1(uses_LM[0]))
        locality.interval(lambda w_DS, of=uses_SM: locality.best_f1(w_DS @ of)[0], len(uses_SM))
    return np.array(found)


def our_hits(experts_STK: Array, n_experts: int) -> Array:
    """Hits (S, policies, E), by ours."""
    sequences = [Sequence(e[:, None], np.zeros(len(e))) for e in experts_STK]
    policies, sizes_E1 = (*locality.POLICIES, *SEGMENTS), np.arange(1, n_experts + 1)[:, None]
    hits_PCSL = locality.cache_hits(sequences, [n_experts], policies, sizes_E1)
    return hits_PCSL[..., 0].transpose(2, 0, 1)


def sticky(
    rng: np.random.Generator, shape: tuple[int, int, int], n_experts: int, p: float
) -> Array:
    """Experts (S, T, K): a token keeps each choice of the one before with probability p."""
    n_sequences, n_tokens, top_k = shape
    experts_STK = np.empty(shape, int)
    for s in range(n_sequences):
        chosen_K = rng.permutation(n_experts)[:top_k]
        for t in range(n_tokens):
            kept_K = chosen_K[rng.random(top_k) < p]
            rest = rng.permutation(np.setdiff1d(np.arange(n_experts), kept_K))
            chosen_K = rng.permutation([*kept_K, *rest[: top_k - len(kept_K)]])
            experts_STK[s, t] = chosen_K
    return experts_STK


def vectors(folder: Path) -> list[dict[str, Any]]:
    """50 traces in five groups, and what moe-lrc says of them."""
    rng, groups = np.random.default_rng(0), []
    for n_experts, top_k, n_tokens, p in (
        (6, 1, 40, 0.8), (8, 2, 36, 0.0), (12, 3, 30, 0.9), (16, 4, 24, 0.6), (10, 4, 30, 0.95),
    ):  # fmt: skip
        theirs = scripts(folder, n_experts, top_k)
        experts_STK = sticky(rng, (10, n_tokens, top_k), n_experts, p)
        srp = their_srp(theirs, experts_STK, n_experts, locality.DRAWS)
        hits = their_hits(theirs, experts_STK, n_experts)
        own = {"experts": experts_STK, "srp": srp, "hits": hits}
        groups.append({"n_experts": n_experts, **{k: v.tolist() for k, v in own.items()}})
    return groups


def whole() -> None:
    """Seconds of every number of `show` on a made trace of 64,000 tokens, 16 layers, 8 of 64."""
    rng, names = np.random.default_rng(0), tuple(f"layer {layer}" for layer in range(16))
    layers = [sticky(rng, (125, 512, 8), 64, 0.8) for _ in names]
    rows = [Sequence(e, rng.zipf(1.3, 512) % 50_000) for e in np.stack(layers, 2)]
    halves = (rows[::2], rows[1::2])
    made: Any = types.SimpleNamespace(
        halves=lambda: halves, n_experts_L=np.full(16, 64), block_names=names
    )
    findings = TraceFindings(made)
    parts = ("locality", "predictability", "load", "drops", "information_nats")
    took = []
    for part in parts:
        started = time.process_time()
        getattr(findings, part)
        took.append([part, time.process_time() - started])
    took.append(["all", sum(seconds for _, seconds in took)])
    heads = {"part": "", "processor seconds": ".1f"}
    report(RUNS / "trace_findings.json", "show, 64,000 tokens, 16 layers, 8 of 64", heads, took)


def clocked(call: Callable[..., Array], *arguments: Any) -> tuple[Array, float]:
    """What a call returns, and its seconds of the processor: others may use the machine."""
    started = time.process_time()
    return call(*arguments), time.process_time() - started


def main() -> None:
    """Both in turns, or the vectors."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--moe-lrc", type=Path, help="a copy of its repository")
    options.add_argument("--sequences", type=int, default=128)
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--tokens", type=int, default=512, help="of a sequence")
    options.add_argument("--draws", type=int, default=locality.DRAWS, help="of a bootstrap")
    options.add_argument("--experts", type=int, nargs=2, default=(64, 8), metavar=("E", "K"))
    options.add_argument("--trace", type=Path, help="sequences of a trace, its layers as more")
    options.add_argument("--whole", action="store_true", help="time every number of show instead")
    options.add_argument("--write", type=Path, help="write the vectors of the tests here")
    options.add_argument("--out", type=Path, default=RUNS / "against_moe_lrc.json")
    asked = options.parse_args()
    if asked.whole:
        whole()
        return
    if asked.moe_lrc is None:
        options.error("--moe-lrc names a copy of github.com/ljcleo/moe-lrc")
    if asked.write:
        asked.write.write_text(json.dumps(vectors(asked.moe_lrc), separators=(",", ":")) + "\n")
        return
    n_experts, top_k = asked.experts
    if asked.trace:
        trace = load_trace(asked.trace)
        long = [s.experts_TLK[: asked.tokens] for s in trace.sequences() if len(s) >= asked.tokens]
        experts_STK = np.concatenate(np.stack(long[: asked.sequences]).transpose(2, 0, 1, 3))
        n_experts, top_k = int(trace.n_experts_L[0]), experts_STK.shape[2]
    else:
        shape = (asked.sequences, asked.tokens, top_k)
        experts_STK = sticky(np.random.default_rng(0), shape, n_experts, 0.8)
    shape = experts_STK.shape
    theirs, rows = scripts(asked.moe_lrc, n_experts, top_k), list[list[Any]]()
    locality.DRAWS = asked.draws
    for turn in range(asked.rounds):
        of = (experts_STK, n_experts)
        their_f1, their_srp_s = clocked(their_srp, theirs, *of, asked.draws)
        our_f1, our_srp_s = clocked(our_srp, *of)
        hits, their_hits_s = clocked(their_hits, theirs, *of)
        own_hits, our_hits_s = clocked(our_hits, *of)
        assert np.abs(their_f1 - our_f1[: len(their_f1)]).max() <= 1e-6
        assert (hits == own_hits).all()
        for kind, their_s, our_s in (
            (f"SRP, {asked.draws:,} draws", their_srp_s, our_srp_s),
            ("LRU, LFU, Belady, SCH 4 and 16, every size", their_hits_s, our_hits_s),
        ):
            rows.append([f"round {turn + 1}: {kind}", their_s, our_s, their_s / our_s])
    title = f"moe-lrc beside expertcut: {shape[0]} sequences of {shape[1]} tokens, one layer, "
    heads = {"what": "", "moe-lrc, s": ".3f", "expertcut, s": ".3f", "ratio": ".1f"}
    report(asked.out, f"{title}{top_k} of {n_experts} experts", heads, rows)


if __name__ == "__main__":
    main()
