"""Placements: equal counts, bounded loads, no peer better, groups found, replicas even loads."""

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from scipy.optimize import linprog

from expertcut.edits.placement import (
    Devices,
    LayerProgram,
    bound,
    device_loads,
    place,
    served,
    stay,
)
from expertcut.edits.replicas import (
    balanced,
    contiguous,
    eplb_greedy,
    peers,
    replicate,
    round_robin,
    smallest_load,
)
from expertcut.errors import SettingsError
from expertcut.stats import Array

World = tuple[list[Array], list[Array]]


def drawn(seed: int, experts: Sequence[int], steep: float = 1.0) -> World:
    """Transitions of a model whose experts have kinds, and the loads that they add up to."""
    rng = np.random.default_rng(seed)
    kinds = [rng.normal(size=(n, 3)) for n in experts]
    counts = [rng.poisson(20 * np.exp(steep * a @ b.T)).astype(float) for a, b in pairwise(kinds)]
    return counts, [counts[0].sum(1), *(count_EF.sum(0) for count_EF in counts)]


def ones(loads: Sequence[Array]) -> list[Array]:
    return [np.ones(len(load_E), int) for load_E in loads]


def caps(loads: Sequence[Array], devices: int, cap: float) -> list[float]:
    return [
        max(cap, smallest_load(load_E, n_E, devices))
        for load_E, n_E in zip(loads, ones(loads), strict=True)
    ]


def splits(load_E: Array, cap: float) -> list[Array]:
    """Every way to put half of the experts on each of two devices, within the cap."""
    n = len(load_E)
    found = []
    for first in combinations(range(n), n // 2):
        copies_ED = np.tile([0, 1], (n, 1))
        copies_ED[[*first]] = 1, 0
        if device_loads(load_E, copies_ED).max() <= cap * (1 + 1e-9):
            found.append(copies_ED)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_two_layers_of_six_experts_on_two_devices_are_placed_as_by_brute_force(seed: int) -> None:
    counts, loads = drawn(seed, (6, 6))
    own = caps(loads, 2, 1.1)
    every = [splits(load_E, cap) for load_E, cap in zip(loads, own, strict=True)]
    near_DD = np.eye(2)
    best = max(stay(counts, pair, near_DD) for pair in ((a, b) for a in every[0] for b in every[1]))
    found = place(counts, loads, Devices(2), own)
    assert found.objective == pytest.approx(best / counts[0].sum(), abs=1e-12)
    # One layer, its neighbour as it is: the program itself.
    gain_ED = counts[0].T @ every[0][0]
    program = LayerProgram(gain_ED, loads[1], np.ones(6, int), 3, own[1] * loads[1].sum() / 2)
    alone_ED = program.solve(every[1][0])
    assert (gain_ED * alone_ED).sum() == max((gain_ED * b).sum() for b in every[1])


@pytest.mark.parametrize(
    ("experts", "devices", "nodes", "cap"),
    [((32, 32, 32), 4, 1, 1.05), ((24, 24), 8, 2, 1.1), ((16, 8, 16), 4, 1, 1.2)],
)
def test_devices_hold_equally_many_within_the_cap_and_no_peer_is_better(
    experts: tuple[int, ...], devices: int, nodes: int, cap: float
) -> None:
    counts, loads = drawn(3, experts, steep=0.6)
    own, near_DD = caps(loads, devices, cap), Devices(devices, nodes).near_DD
    found = place(counts, loads, Devices(devices, nodes), own, starts=3)
    total = sum(count_EF.sum() for count_EF in counts)
    for load_E, copies_ED, most in zip(loads, found.copies, own, strict=True):
        assert (copies_ED.sum(axis=1) == 1).all()
        assert (copies_ED.sum(axis=0) == len(load_E) // devices).all()
        assert device_loads(load_E, copies_ED).max() <= most * (1 + 1e-6)
    assert found.objective is not None and found.bound is not None
    assert found.objective == pytest.approx(stay(counts, found.copies, near_DD) / total)
    for name, layers in peers(loads, devices, ones(loads)).items():
        assert found.objective >= stay(counts, layers, near_DD) / total, name
    assert found.objective <= found.bound <= 1
    again = place(counts, loads, Devices(devices, nodes), own, starts=3)
    assert all((a == b).all() for a, b in zip(found.copies, again.copies, strict=True))


def test_a_large_layer_is_within_a_percent_of_its_linear_program() -> None:
    counts, loads = drawn(5, (64, 64), steep=0.6)
    gain_ED = counts[0].T @ round_robin(64, 64, 8)
    even_ED = balanced(loads[1], np.ones(64, int), 8)
    limit = 1.03 * loads[1].sum() / 8
    most = linprog(
        -gain_ED.ravel(),
        A_ub=np.kron(loads[1], np.eye(8)),
        b_ub=np.full(8, limit),
        A_eq=np.vstack([np.kron(np.eye(64), np.ones(8)), np.kron(np.ones(64), np.eye(8))]),
        b_eq=np.r_[np.ones(64), np.full(8, 8)],
        bounds=(0, 1),
    )
    for is_thorough, share in ((False, 0.98), (True, 0.99)):
        program = LayerProgram(gain_ED, loads[1], np.ones(64, int), 8, limit, is_thorough)
        copies_ED = program.solve(even_ED)
        assert (copies_ED.sum(0) == 8).all() and (copies_ED.sum(1) == 1).all()
        assert (loads[1] @ copies_ED).max() <= limit * (1 + 1e-9)
        assert share * -most.fun <= (gain_ED * copies_ED).sum() <= -most.fun * (1 + 1e-9)
    assert (gain_ED * even_ED).sum() < 0.9 * -most.fun


def test_groups_that_tokens_never_leave_are_found() -> None:
    rng, n, devices = np.random.default_rng(0), 16, 4
    group_LE = np.stack([rng.permutation(n) % devices for _ in range(4)])
    counts = [
        (a[:, None] == b) * rng.integers(5, 20, (n, n)).astype(float) for a, b in pairwise(group_LE)
    ]
    loads = [counts[0].sum(1), *(count_EF.sum(0) for count_EF in counts)]
    found = place(counts, loads, Devices(devices), caps(loads, devices, 1.3))
    assert found.objective == found.bound == 1.0
    for device_E, group_E in zip(found.device_LE, group_LE, strict=True):
        assert len({*zip(device_E.tolist(), group_E.tolist(), strict=True)}) == devices
    unknowing = stay(counts, [contiguous(n, n, devices)] * 4, np.eye(devices))
    assert unknowing < 0.5 * sum(count_EF.sum() for count_EF in counts)


def test_a_node_counts_half_and_keeps_what_a_device_cannot() -> None:
    near_DD = Devices(4, 2).near_DD
    assert near_DD.tolist() == [[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0.5, 1]]
    assert (Devices(4, 4).near_DD == np.eye(4)).all() and (Devices(4).near_DD == np.eye(4)).all()
    counts, loads = drawn(2, (16, 16))
    own = caps(loads, 4, 1.2)
    with_nodes = place(counts, loads, Devices(4, 2), own)
    without = place(counts, loads, Devices(4), own)
    assert with_nodes.objective >= stay(counts, without.copies, near_DD) / counts[0].sum() - 1e-12
    assert without.objective >= stay(counts, with_nodes.copies, np.eye(4)) / counts[0].sum() - 1e-12


def test_a_replica_evens_an_expert_of_three_times_the_load() -> None:
    load_E = np.array([3.0, *[1.0] * 9])
    alone = smallest_load(load_E, np.ones(10, int), 2)
    assert alone == pytest.approx(7 / 6)
    copies_E = replicate(load_E, 12, 2)
    assert copies_E.tolist() == [2, 2, *[1] * 8]
    assert smallest_load(load_E, copies_E, 2) == pytest.approx(1)
    copies_ED = balanced(load_E, copies_E, 2)
    assert copies_ED.max() == 1 and (copies_ED.sum(0) == 6).all()
    counts = [np.outer(load_E, load_E)]
    found = place(counts, [load_E, load_E], Devices(2), [1.05] * 2, replicas=[copies_E] * 2)
    for own_ED in found.copies:
        assert own_ED.max() == 1 and (own_ED.sum(1) == copies_E).all()
        assert device_loads(load_E, own_ED).max() <= 1.05
    with pytest.raises(SettingsError, match=r"layer 0: the smallest load found there is 1\.167"):
        place(counts, [load_E, load_E], Devices(2), [1.05] * 2)


def test_copies_are_served_equally_often_and_the_bound_holds_for_them() -> None:
    counts, loads = drawn(7, (12, 12), steep=0.7)
    replicas = [replicate(load_E, 16, 4) for load_E in loads]
    own = [max(1.1, smallest_load(a, n, 4)) for a, n in zip(loads, replicas, strict=True)]
    found = place(counts, loads, Devices(4), own, replicas=replicas)
    assert found.objective is not None and found.bound is not None
    assert served(found.copies[0]).sum(1) == pytest.approx(1)
    assert 0 < found.objective <= found.bound
    drawn_ED = [balanced(load_E, n_E, 4) for load_E, n_E in zip(loads, replicas, strict=True)]
    assert found.objective >= stay(counts, drawn_ED, np.eye(4)) / counts[0].sum()
    assert bound(counts, Devices(4), replicas) >= stay(counts, drawn_ED, np.eye(4))


@pytest.mark.parametrize("seed", range(2))
def test_the_smallest_load_is_never_above_that_of_eplb(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for n, devices in ((32, 4), (64, 8), (48, 16)):
        load_E = rng.dirichlet(np.full(n, 2.0))
        greedy = device_loads(load_E, eplb_greedy(load_E, n, devices)).max()
        assert 1 <= smallest_load(load_E, np.ones(n, int), devices) <= greedy + 1e-12


def test_peers_deal_every_expert_equally() -> None:
    assert contiguous(4, 4, 2).argmax(1).tolist() == [0, 0, 1, 1]
    assert round_robin(4, 4, 2).argmax(1).tolist() == [0, 1, 0, 1]
    assert contiguous(4, 6, 2).tolist() == [[1, 1], [1, 1], [1, 0], [0, 1]]
    greedy_ED = eplb_greedy(np.array([4.0, 3, 2, 1]), 4, 2)
    assert greedy_ED.argmax(1).tolist() == [0, 1, 1, 0]
    assert eplb_greedy(np.array([4.0, 1, 1]), 4, 2).sum(1).tolist() == [2, 1, 1]
    loads = [np.arange(8.0) + 1] * 2
    for layers in peers(loads, 4, [replicate(loads[0], 12, 4)] * 2).values():
        assert all(
            (copies_ED.sum(0) == 3).all() and (copies_ED.sum(1) > 0).all() for copies_ED in layers
        )


def test_one_layer_has_loads_alone() -> None:
    found = place([], [np.arange(8.0) + 1], Devices(4), [1.01])
    assert found.objective is None and found.bound is None
    assert device_loads(np.arange(8.0) + 1, found.copies[0]).max() == 1
