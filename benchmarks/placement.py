"""`expertcut place` beside EPLB's packing and ExFlow's integer program, on one trace.

    python -m benchmarks.placement --trace TRACE --devices 4 --eplb eplb.py

TRACE is a folder of `expertcut trace`; eplb.py is a copy of that file of
github.com/deepseek-ai/EPLB, which is run as it is. Loads are those of the half of the trace that
chooses. EPLB's largest load is compared with the most even packing that is found here, with and
without redundant experts; ExFlow's objective (arXiv 2401.08383: steps to another device, equally
many experts a layer on each, no bound of loads) with our placement without a bound: its program
with a variable for each pair of experts and device, solved by HiGHS from scipy for --seconds, as a
whole and by halves of the devices, as ExFlow splits it. Both are scored on the half that chooses
and on the other.
"""

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from benchmarks.common import RUNS, report
from expertcut.edits.placement import Devices, place, stay
from expertcut.edits.replicas import replicate, smallest_load
from expertcut.profiling.expert_load import transition_counts, use_counts
from expertcut.profiling.trace import Trace, load_trace
from expertcut.stats import Array


def eplb_loads(file: Path, loads: Sequence[Array], devices: int, redundant: int) -> list[float]:
    """The largest load over the mean of each layer, by EPLB's `rebalance_experts`."""
    import torch

    spec = importlib.util.spec_from_file_location("eplb", file)
    assert spec and spec.loader
    eplb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(eplb)
    load_LE = torch.tensor(np.stack(loads))
    n_places = load_LE.shape[1] + redundant
    expert_LP, _, count_LE = eplb.rebalance_experts(load_LE, n_places, 1, 1, devices)
    load_LP = (load_LE / count_LE).gather(1, expert_LP)
    load_LD = load_LP.reshape(len(load_LE), devices, -1).sum(2)
    return (load_LD.max(1).values / load_LD.mean(1)).tolist()


def bisected(counts: Sequence[Array], devices: int, seconds: float) -> list[Array] | None:
    """As ExFlow solves it by default: into halves, then each half alone; the device of experts."""
    n_experts = len(counts[0])
    if devices == 1:
        return [np.zeros(n_experts, int)] * (len(counts) + 1)
    side_LE = devices_of(exflow(counts, n_experts, 2, seconds), len(counts) + 1, n_experts, 2)
    if side_LE is None:
        return None
    device_LE = np.zeros(side_LE.shape, int)
    for side in (0, 1):
        own = [np.flatnonzero(side_E == side) for side_E in side_LE]
        part = [c[np.ix_(a, b)] for c, a, b in zip(counts, own, own[1:], strict=False)]
        inner = bisected(part, devices // 2, seconds)
        if inner is None:
            return None
        for layer, (rows, device_E) in enumerate(zip(own, inner, strict=True)):
            device_LE[layer, rows] = side * devices // 2 + device_E
    return [*device_LE]


def devices_of(found: Any, n_layers: int, n_experts: int, devices: int) -> Array | None:
    """The device (L, E) of each expert in what was found of ExFlow's program, if anything was."""
    if found.x is None:
        return None
    x_LED = found.x[: n_layers * n_experts * devices].reshape(n_layers, n_experts, devices)
    return np.asarray(x_LED.argmax(axis=2))


def exflow(counts: Sequence[Array], n_experts: int, devices: int, seconds: float) -> Any:
    """ExFlow's program: x of expert and device, y of a step that stays on a device, y ≤ both x."""
    n_layers = len(counts) + 1
    n_x, n_pairs = n_layers * n_experts * devices, n_experts * n_experts * devices
    n_all = n_x + len(counts) * n_pairs
    eye_E, eye_D = sparse.eye_array(n_experts), sparse.eye_array(devices)
    ones_E, ones_D = np.ones((1, n_experts)), np.ones((1, devices))
    one_device = sparse.kron(sparse.eye_array(n_layers), sparse.kron(eye_E, ones_D))
    equal = sparse.kron(sparse.eye_array(n_layers), sparse.kron(ones_E, eye_D))
    # Row (e, f, d): y − x of the expert before, and of the one behind.
    before = sparse.kron(eye_E, sparse.kron(ones_E.T, eye_D))
    behind = sparse.kron(ones_E.T, sparse.kron(eye_E, eye_D))
    blocks = []
    for layer in range(len(counts)):
        y = sparse.kron(np.eye(1, len(counts), layer), sparse.eye_array(n_pairs))
        for rows, at in ((before, layer), (behind, layer + 1)):
            blocks.append(sparse.hstack([sparse.kron(np.eye(1, n_layers, at), -rows), y]))
    fixed = sparse.vstack([one_device, equal])
    wide = sparse.hstack([fixed, sparse.csr_array((fixed.shape[0], n_all - n_x))])
    exact = np.r_[np.ones(n_layers * n_experts), np.full(n_layers * devices, n_experts // devices)]
    gain = np.concatenate([np.zeros(n_x), *(np.repeat(c.ravel(), devices) for c in counts)])
    total = sum(float(count_EF.sum()) for count_EF in counts)
    integrality = np.r_[np.ones(n_x, int), np.zeros(n_all - n_x, int)]
    return milp(
        -gain / total,
        constraints=[
            LinearConstraint(sparse.csr_array(wide), exact, exact),
            LinearConstraint(sparse.csr_array(sparse.vstack(blocks)), ub=0),
        ],
        integrality=integrality,
        bounds=Bounds(0, 1),
        options={"time_limit": seconds},
    )


def exflow_rows(
    trace: Trace, loads: Sequence[Array], devices: int, seconds: float
) -> list[list[Any]]:
    """Ours and ExFlow's as a whole and by halves: steps that stay, with both halves of a trace."""
    n_experts, n_pairs = len(loads[0]), len(loads) - 1
    halves = [
        transition_counts(half, trace.n_experts_L.tolist())[:n_pairs] for half in trace.halves()
    ]

    def stays(device_LE: Sequence[Array] | None) -> str:
        if device_LE is None:
            return "no placement"
        layers = [np.eye(devices)[device_E] for device_E in device_LE]
        shares = [stay(c, layers, np.eye(devices)) / sum(float(n.sum()) for n in c) for c in halves]
        return f"{shares[0]:.2%}, other half {shares[1]:.2%}"

    started = time.perf_counter()
    placed = place(halves[0], loads, Devices(devices), [float(devices)] * len(loads))
    took = time.perf_counter() - started
    ours = f"{stays(placed.device_LE)}, bound {placed.bound:.2%}"
    found = exflow(halves[0], n_experts, devices, seconds)
    whole = stays(devices_of(found, len(loads), n_experts, devices))
    whole += f", bound {-found.mip_dual_bound:.2%}"
    by_halves = bisected(halves[0], devices, seconds) if devices > 2 else None
    what = "steps that stay, no bound of loads"
    rows = [[f"{what}, ExFlow as a whole", ours, whole, "", took]]
    if devices > 2:
        rows.append([f"{what}, ExFlow by halves", ours, stays(by_halves), "", took])
    return rows


def main() -> None:
    """Measures, prints and writes the comparison."""
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--trace", type=Path, required=True)
    asked.add_argument("--devices", type=int, required=True)
    asked.add_argument("--eplb", type=Path, help="EPLB's eplb.py")
    asked.add_argument("--redundant", type=int, nargs="*", default=[0, 4, 8])
    asked.add_argument("--seconds", type=float, default=60, help="for ExFlow's program (0: none)")
    asked.add_argument("--layers", type=int, help="only the first layers")
    asked.add_argument("--out", type=Path, default=RUNS / "placement.json")
    options = asked.parse_args()
    trace, devices = load_trace(options.trace), options.devices
    sequences, counts_of = trace.halves()[0], trace.n_experts_L.tolist()[: options.layers]
    uses_LE = use_counts(sequences, len(trace.n_experts_L), max(trace.n_experts_L))
    loads = [uses_E[:n].astype(float) for uses_E, n in zip(uses_LE, counts_of, strict=False)]
    rows: list[list[Any]] = []
    for redundant in options.redundant if options.eplb else []:
        started = time.perf_counter()
        ours = [
            smallest_load(load_E, replicate(load_E, len(load_E) + redundant, devices), devices)
            for load_E in loads
        ]
        took = time.perf_counter() - started
        theirs = eplb_loads(options.eplb, loads, devices, redundant)
        worse = sum(a > b + 1e-9 for a, b in zip(ours, theirs, strict=True))
        what = f"largest load, {redundant} redundant"
        rows.append([what, f"{max(ours):.4f}", f"{max(theirs):.4f}", f"{worse} layers", took])
    if options.seconds:
        rows += exflow_rows(trace, loads, devices, options.seconds)
    heads = {"what": "", "ours": "", "EPLB, or ExFlow by HiGHS": "", "ours worse": ""}
    heads |= {"ours, s": ".1f"}
    report(options.out, f"Placement on {devices} devices", heads, rows)


if __name__ == "__main__":
    main()
