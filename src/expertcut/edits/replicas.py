"""Copies of experts and their packing by loads alone: EPLB's rules, and placements to compare with.

EPLB is the load balancer of DeepSeek-V3 (github.com/deepseek-ai/EPLB). E are experts of a layer,
D devices, P places of all devices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from expertcut.stats import Array

RANDOM_DRAWS = 20
_NEAR = 1e-3  # of the smallest possible load that is not looked for
_NODES = 200
_SWAPS = 10_000


def replicate(load_E: Array, n_places: int, devices: int) -> Array:
    """Copies (E,) of each expert: the largest load of a copy gets another, as EPLB replicates.

    Unlike there no expert has more copies than there are devices: two on one device even nothing.
    """
    copies_E: Array = np.ones(len(load_E), int)
    for _ in range(n_places - len(load_E)):
        each_E = np.where(copies_E < devices, load_E / copies_E, -1.0)
        copies_E[each_E.argmax()] += 1
    return copies_E


def peers(
    loads: Sequence[Array], devices: int, replicas: Sequence[Array]
) -> dict[str, tuple[Array, ...]]:
    """Copies (E, D) by layer of placements that know no transitions."""
    makers = {"contiguous": contiguous, "round robin": round_robin}
    made = {
        name: tuple(
            make(len(load_E), int(n_E.sum()), devices)
            for load_E, n_E in zip(loads, replicas, strict=True)
        )
        for name, make in makers.items()
    }
    greedy = (
        eplb_greedy(load_E, int(n_E.sum()), devices)
        for load_E, n_E in zip(loads, replicas, strict=True)
    )
    return made | {"EPLB greedy": tuple(greedy)}


def contiguous(n_experts: int, n_places: int, devices: int) -> Array:
    """Experts in their order, redundant places with the first ones again, as engines begin."""
    return dealt(np.arange(n_places) % n_experts, n_experts, devices)


def round_robin(n_experts: int, n_places: int, devices: int) -> Array:
    """Experts dealt to the devices one by one."""
    expert_P = np.arange(n_places) % n_experts
    return dealt(expert_P.reshape(-1, devices).T.ravel(), n_experts, devices)


def at_random(n_experts: int, n_places: int, devices: int, rng: np.random.Generator) -> Array:
    """The places of `contiguous` in a random order."""
    return dealt(rng.permutation(np.arange(n_places) % n_experts), n_experts, devices)


def dealt(expert_P: Array, n_experts: int, devices: int) -> Array:
    """Copies (E, D) of a list of places, whose parts are the devices."""
    copies_ED: Array = np.zeros((n_experts, devices), int)
    device_P = np.arange(len(expert_P)) // (len(expert_P) // devices)
    np.add.at(copies_ED, (expert_P, device_P), 1)
    return copies_ED


def eplb_greedy(load_E: Array, n_places: int, devices: int) -> Array:
    """EPLB's global policy: copies by load, the heaviest first to the lightest device with room."""
    copies_E: Array = np.ones(len(load_E), int)
    expert_P = list(range(len(load_E)))
    for _ in range(n_places - len(load_E)):
        expert = int((load_E / copies_E).argmax())
        copies_E[expert] += 1
        expert_P.append(expert)
    load_P = (load_E / copies_E)[expert_P]
    copies_ED: Array = np.zeros((len(load_E), devices), int)
    load_D, room_D = np.zeros(devices), np.full(devices, n_places // devices)
    for place in np.argsort(-load_P, kind="stable"):
        device = int(np.where(room_D > 0, load_D, np.inf).argmin())
        copies_ED[expert_P[place], device] += 1
        load_D[device] += load_P[place]
        room_D[device] -= 1
    return copies_ED


def balanced(load_E: Array, copies_E: Array, devices: int, cap: float = 0.0) -> Array:
    """Copies (E, D) of a small largest load, no two copies of an expert on one device.

    Greedy, then swaps, then an integer program in a bounded tree; a load within `cap` times the
    mean, or within 0.1 % of a lower bound, is small enough.
    """
    each_E = load_E / copies_E
    lowest = max(float(load_E.sum()) / devices, float(each_E.max()))
    enough = max(lowest * (1 + _NEAR), cap * float(load_E.sum()) / devices)
    found_ED = _swapped(each_E, _packed(each_E, copies_E, devices), enough)
    if (each_E @ found_ED).max() <= enough:
        return found_ED
    better_ED = _least_load(each_E, copies_E, devices)
    options = [copies_ED for copies_ED in (found_ED, better_ED) if copies_ED is not None]
    return min(options, key=lambda copies_ED: float((each_E @ copies_ED).max()))


def smallest_load(load_E: Array, copies_E: Array, devices: int) -> float:
    """The largest load of a device over the mean in the most even packing that was found."""
    copies_ED = balanced(load_E, copies_E, devices)
    return float((load_E / copies_E @ copies_ED).max() / max(load_E.sum() / devices, 1e-300))


def _packed(each_E: Array, copies_E: Array, devices: int) -> Array:
    """The heaviest copies first, each expert's to as many of the lightest devices with room.

    Where the last copies find too few devices with room, all are dealt in turn.
    """
    copies_ED: Array = np.zeros((len(each_E), devices), int)
    load_D, room_D = np.zeros(devices), np.full(devices, int(copies_E.sum()) // devices)
    for expert in np.argsort(-each_E, kind="stable"):
        order_D = np.argsort(np.where(room_D > 0, load_D, np.inf), kind="stable")
        chosen = order_D[: copies_E[expert]]
        if (room_D[chosen] == 0).any():
            expert_P = np.repeat(np.arange(len(each_E)), copies_E)
            return dealt(expert_P.reshape(-1, devices).T.ravel(), len(each_E), devices)
        copies_ED[expert, chosen] = 1
        load_D[chosen] += each_E[expert]
        room_D[chosen] -= 1
    return copies_ED


def _swapped(each_E: Array, copies_ED: Array, enough: float) -> Array:
    """Swaps of a copy on the heaviest device with a lighter one elsewhere, while these help."""
    copies_ED = copies_ED.copy()
    for _ in range(_SWAPS):
        load_D = each_E @ copies_ED
        heaviest = int(load_D.argmax())
        if load_D[heaviest] <= enough:
            break
        best = (float(load_D[heaviest]) * (1 - 1e-12), -1, -1, -1)
        for other in range(len(load_D)):
            mine = np.flatnonzero((copies_ED[:, heaviest] > 0) & (copies_ED[:, other] == 0))
            theirs = np.flatnonzero((copies_ED[:, other] > 0) & (copies_ED[:, heaviest] == 0))
            if not len(mine) or not len(theirs):
                continue
            moved = each_E[mine][:, None] - each_E[theirs]
            most = np.maximum(load_D[heaviest] - moved, load_D[other] + moved)
            i, j = np.unravel_index(int(most.argmin()), most.shape)
            if most[i, j] < best[0]:
                best = (float(most[i, j]), other, int(mine[i]), int(theirs[j]))
        _, other, given, taken = best
        if other < 0:
            break
        copies_ED[given, [heaviest, other]] = 0, 1
        copies_ED[taken, [heaviest, other]] = 1, 0
    return copies_ED


def program_rows(load_E: Array, devices: int) -> tuple[Any, Any]:
    """Sparse rows over (E, D): copies by expert, then by device; and the loads of the devices."""
    eye: Any = sparse.eye_array
    kron: Any = sparse.kron
    by_expert = kron(eye(len(load_E)), np.ones((1, devices)))
    by_device = kron(np.ones((1, len(load_E))), eye(devices))
    equal = sparse.csr_array(sparse.vstack([by_expert, by_device]))
    return equal, sparse.csr_array(kron(load_E[None], eye(devices)))


def _least_load(each_E: Array, copies_E: Array, devices: int) -> Array | None:
    """The packing of least largest load, as an integer program: the last variable is that load."""
    n_variables = len(each_E) * devices + 1
    hstack: Any = sparse.hstack
    equal, loads = program_rows(each_E / max(float(each_E.sum()) / devices, 1e-300), devices)
    exact = np.concatenate([copies_E, np.full(devices, int(copies_E.sum()) // devices)])
    options: Any = {"mip_rel_gap": _NEAR, "node_limit": _NODES}
    found = milp(
        np.eye(1, n_variables, n_variables - 1)[0],
        constraints=[
            LinearConstraint(hstack([equal, np.zeros((len(exact), 1))]), exact, exact),
            LinearConstraint(hstack([loads, -np.ones((devices, 1))]), ub=0),
        ],
        integrality=np.r_[np.ones(n_variables - 1, int), 0],
        bounds=Bounds(0, np.r_[np.ones(n_variables - 1), np.inf]),
        options=options,
    )
    if found.x is None:
        return None
    return np.asarray(found.x[:-1].round().reshape(len(each_E), devices).astype(int))
