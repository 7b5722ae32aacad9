"""Which experts lie on which device: layer by layer an integer program, its neighbours as they are.

The objective is that of ExFlow (arXiv 2401.08383): a token that moves on to an expert of the next
layer stays on its device, or with half the weight on its node, with as many experts on each device
and here also with bounded loads. E are experts of a layer, F those of the next, D devices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, linprog, milp

from expertcut.edits.replicas import balanced, peers, program_rows
from expertcut.errors import SettingsError
from expertcut.stats import Array

NODE_WEIGHT = 0.5  # of a step to another device of the same node
ROUNDS, STARTS = 4, 8
_GAP = 1e-3  # of a layer's optimum that its program may miss, where it is large
_NODES = 50  # of the tree of one program: a limit in seconds would differ from run to run
_SMALL = 64  # variables of a program that is solved to the end
_LARGE = 256  # of one that is never solved as a whole
_FREE = 512  # variables that are placed again behind the linear program
_SWAPS = 1000
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Devices:
    """Devices, in nodes of equally many."""

    count: int
    nodes: int = 1

    @property
    def near_DD(self) -> Array:
        """What a step from device to device counts: 1 on the same, ½ within a node, else 0."""
        node_D = np.arange(self.count) // (self.count // self.nodes)
        same_DD = node_D[:, None] == node_D
        return np.where(np.eye(self.count, dtype=bool), 1.0, NODE_WEIGHT * same_DD * self.is_nested)

    @property
    def is_nested(self) -> bool:
        """Whether nodes are told apart, and hold several devices."""
        return 1 < self.nodes < self.count


@dataclass(frozen=True)
class Placed:
    """A placement: `copies` (E, D) of each layer count the copies of an expert on a device.

    `objective` and `bound` are shares of all transitions; `bound` is what each expert would keep
    with its best neighbours for itself, which no placement exceeds. None with a single layer.
    """

    copies: tuple[Array, ...]
    objective: float | None
    bound: float | None
    rounds: int
    starts: int

    @property
    def device_LE(self) -> list[Array]:
        """The device of each expert's first copy, by layer."""
        return [copies_ED.argmax(axis=1) for copies_ED in self.copies]


def place(
    counts: Sequence[Array],
    loads: Sequence[Array],
    devices: Devices,
    caps: Sequence[float],
    *,
    replicas: Sequence[Array] | None = None,
    starts: int = STARTS,
    seed: int = 0,
    on_start: Callable[[int], None] = lambda done: None,
) -> Placed:
    """The best of several local optima; no layer alone can be placed better.

    `counts` are transitions (E, F) between neighbouring layers, `loads` (E,) those of each layer,
    `caps` the largest load of a device over the mean, `replicas` (E,) copies of each expert. A
    token is served by each copy of its expert equally often. Starts are the peers and random
    placements; a layer changes only for the better, so no peer within the caps is better.

    Raises SettingsError: a cap cannot be met.
    """
    replicas = [np.ones(len(load_E), int) for load_E in loads] if replicas is None else replicas
    search = _Search(counts, loads, devices, caps, replicas)
    rng = np.random.default_rng(seed)
    best, best_value, most_rounds = None, -np.inf, 0
    known = [p for p in peers(loads, devices.count, replicas).values() if search.is_start(p)]
    for start in range(starts):
        layers = list(known[start]) if start < len(known) else search.forward(rng)
        rounds = search.improve(layers)
        value = stay(counts, layers, devices.near_DD)
        most_rounds = max(most_rounds, rounds)
        if value > best_value + _ROUNDING * abs(value):
            best, best_value = layers, value
        on_start(start + 1)
    assert best is not None
    most_rounds = max(most_rounds, search.improve(best, is_thorough=True))
    best_value = stay(counts, best, devices.near_DD)
    total = sum(float(count_EF.sum()) for count_EF in counts)
    return Placed(
        copies=tuple(copies_ED.astype(int) for copies_ED in best),
        objective=best_value / total if total else None,
        bound=bound(counts, devices, replicas) / total if total else None,
        rounds=most_rounds,
        starts=starts,
    )


def stay(counts: Sequence[Array], layers: Sequence[Array], near_DD: Array) -> float:
    """Transitions that stay, each weighed by how near the two devices are."""
    shares = [served(copies_ED) for copies_ED in layers]
    return sum(
        float((count_EF * (a_ED @ near_DD @ b_FD.T)).sum())
        for count_EF, (a_ED, b_FD) in zip(counts, pairwise(shares), strict=True)
    )


def served(copies_ED: Array) -> Array:
    """The share of an expert's tokens that each device serves."""
    return np.asarray(copies_ED / copies_ED.sum(axis=1, keepdims=True))


def device_loads(load_E: Array, copies_ED: Array) -> Array:
    """Loads of the devices over their mean."""
    load_D = load_E @ served(copies_ED)
    return np.asarray(load_D / max(load_D.mean(), 1e-300))


def bound(counts: Sequence[Array], devices: Devices, replicas: Sequence[Array]) -> float:
    """Transitions that would stay if each expert had its best neighbours for itself."""
    total = 0.0
    for count_EF, (before_E, after_F) in zip(counts, pairwise(replicas), strict=True):
        forth = _most(count_EF / after_F, int(after_F.sum()), devices)
        back = _most(count_EF.T / before_E, int(before_E.sum()), devices)
        total += min(forth, back)
    return total


def _most(count_EF: Array, n_slots: int, devices: Devices) -> float:
    slots = n_slots // devices.count
    per_node = slots * devices.count // devices.nodes if devices.is_nested else slots
    sorted_EF = -np.sort(-count_EF, axis=1)
    near = sorted_EF[:, :slots].sum() + NODE_WEIGHT * sorted_EF[:, slots:per_node].sum()
    return float(near)


class _Search:
    """Placements of all layers, each changed for the better while the others stand still."""

    def __init__(
        self,
        counts: Sequence[Array],
        loads: Sequence[Array],
        devices: Devices,
        caps: Sequence[float],
        replicas: Sequence[Array],
    ) -> None:
        self.counts, self.near_DD, self.replicas = counts, devices.near_DD, replicas
        self.loads = [load_E / n_E for load_E, n_E in zip(loads, replicas, strict=True)]  # a copy's
        self.limits = [
            cap * float(load_E.sum()) / devices.count
            for cap, load_E in zip(caps, loads, strict=True)
        ]
        self.slots = [int(n_E.sum()) // devices.count for n_E in replicas]
        self.feasible = []
        for layer, limit in enumerate(self.limits):
            copies_ED = balanced(loads[layer], replicas[layer], devices.count, caps[layer])
            most = float((self.loads[layer] @ copies_ED).max())
            if most > limit * (1 + _ROUNDING):
                least = most / limit * caps[layer]
                raise SettingsError(
                    f"--load {caps[layer]:g} cannot be met in layer {layer}: the smallest load "
                    f"found there is {least:.3f} times the mean: give that, or --redundant experts"
                )
            self.feasible.append(copies_ED)

    def is_start(self, layers: Sequence[Array]) -> bool:
        """Whether a placement has these copies, on a device each, within the caps."""
        return all(
            (copies_ED <= 1).all()
            and (copies_ED.sum(axis=1) == n_E).all()
            and (load_E @ copies_ED).max() <= limit * (1 + _ROUNDING)
            for copies_ED, n_E, load_E, limit in zip(
                layers, self.replicas, self.loads, self.limits, strict=True
            )
        )

    def forward(self, rng: np.random.Generator) -> list[Array]:
        """A random first layer, and each other one as the one before asks."""
        layers = list(self.feasible)
        n_devices = len(self.near_DD)
        for layer in range(len(layers)):
            if layer:
                gain_ED = self._gain(layers, layer, is_forward=True)
            else:
                gain_ED = rng.random((len(self.loads[0]), n_devices))
            layers[layer] = self._best(layer, gain_ED, self.feasible[layer])
        return layers

    def improve(self, layers: list[Array], *, is_thorough: bool = False) -> int:
        """Sweeps forward and back until no layer gets better; returns the rounds."""
        order = [*range(len(layers)), *range(len(layers) - 2, -1, -1)]
        for done in range(ROUNDS):
            if not any([self._improve_layer(layers, layer, is_thorough) for layer in order]):
                return done
        return ROUNDS

    def _improve_layer(self, layers: list[Array], layer: int, is_thorough: bool) -> bool:
        gain_ED = self._gain(layers, layer)
        new_ED = self._best(layer, gain_ED, layers[layer], is_thorough=is_thorough)
        before, after = ((gain_ED * copies_ED).sum() for copies_ED in (layers[layer], new_ED))
        if after <= before + _ROUNDING * np.abs(gain_ED).sum():
            return False
        layers[layer] = new_ED
        return True

    def _gain(self, layers: Sequence[Array], layer: int, *, is_forward: bool = False) -> Array:
        """What a copy of each expert adds to the objective on each device."""
        gain_ED = np.zeros(layers[layer].shape)
        if layer:
            gain_ED += self.counts[layer - 1].T @ served(layers[layer - 1]) @ self.near_DD
        if layer < len(layers) - 1 and not is_forward:
            gain_ED += self.counts[layer] @ served(layers[layer + 1]) @ self.near_DD
        return np.asarray(gain_ED / self.replicas[layer][:, None])

    def _best(
        self, layer: int, gain_ED: Array, known_ED: Array, *, is_thorough: bool = False
    ) -> Array:
        program = LayerProgram(
            gain_ED,
            self.loads[layer],
            self.replicas[layer],
            self.slots[layer],
            self.limits[layer] * (1 + _ROUNDING),
            is_thorough,
        )
        return program.solve(known_ED)


@dataclass(frozen=True)
class LayerProgram:
    """One layer: `copies_E` of each expert, on `slots` places of each device, up to a load limit.

    `gain_ED` is to be maximised, `load_E` to be limited, both of one copy.
    """

    gain_ED: Array
    load_E: Array
    copies_E: Array
    slots: int
    limit: float
    is_thorough: bool = False

    def solve(self, known_ED: Array) -> Array:
        """Copies (E, D), 0 or 1, at least as good as `known_ED`, which the limit allows.

        Exact where the limit does not bind or the program is small. Else the linear program is
        rounded, brought within the limit, and pairs are swapped; if `is_thorough`, the integer
        program is solved to 0.1 %, of a large one for the experts on the edge between devices.
        """
        free_ED = self._transported(self.gain_ED)
        if (self.load_E @ free_ED).max() <= self.limit:
            return free_ED
        size = self.gain_ED.size
        options: list[Array | None] = [known_ED]
        if size <= _SMALL:
            options.append(self._integer(0.0))
        else:
            options += self._rounded()
        if self.is_thorough and _SMALL < size <= _LARGE:
            options.append(self._integer(_GAP))
        swapped = [self._swapped(copies_ED) for copies_ED in options if copies_ED is not None]
        return max(swapped, key=lambda copies_ED: float((self.gain_ED * copies_ED).sum()))

    def _swapped(self, copies_ED: Array) -> Array:
        """Swaps of two copies, first those that bring loads within the limit, then those that gain.

        Of the first the one that costs least by what it mends.
        """
        copies_ED = copies_ED.copy()
        expert_P, device_P = np.nonzero(copies_ED)
        gain_PD, load_P = self.gain_ED[expert_P], self.load_E[expert_P]
        least = _ROUNDING * max(float(np.abs(self.gain_ED).sum()), 1e-300)
        for _ in range(_SWAPS):
            load_D = self.load_E @ copies_ED
            moved_PQ = gain_PD[:, device_P] - gain_PD[np.arange(len(device_P)), device_P][:, None]
            delta_PQ = moved_PQ + moved_PQ.T
            over_P = np.maximum(load_D - self.limit, 0)[device_P]
            over_PQ = load_D[device_P][:, None] - load_P[:, None] + load_P - self.limit
            over_PQ = np.maximum(over_PQ, 0)  # of the device of P, with Q instead
            mended_PQ = over_P[:, None] + over_P - over_PQ - over_PQ.T
            is_held_PQ = copies_ED[expert_P][:, device_P] > 0
            is_barred_PQ = is_held_PQ | is_held_PQ.T
            if over_P.any():
                is_barred_PQ |= mended_PQ <= _ROUNDING * self.limit
                delta_PQ = (delta_PQ - least - delta_PQ.max()) / np.maximum(mended_PQ, 1e-300)
            else:
                is_barred_PQ |= (over_PQ + over_PQ.T > 0) | (delta_PQ <= least)
            if is_barred_PQ.all():
                break
            delta_PQ[is_barred_PQ] = -np.inf
            p, q = np.unravel_index(int(delta_PQ.argmax()), delta_PQ.shape)
            copies_ED[expert_P[[p, q]], device_P[[p, q]]] = 0
            device_P[[p, q]] = device_P[[q, p]]
            copies_ED[expert_P[[p, q]], device_P[[p, q]]] = 1
        return copies_ED

    def _transported(self, value_ED: Array) -> Array:
        """The copies of most value without a limit of loads: a transport problem."""
        n_devices = self.gain_ED.shape[1]
        copies_ED: Array = np.zeros(self.gain_ED.shape)
        if (self.copies_E == 1).all():
            place_D = np.repeat(np.arange(n_devices), self.slots)
            expert_E, place_E = linear_sum_assignment(value_ED[:, place_D], maximize=True)
            copies_ED[expert_E, place_D[place_E]] = 1
            return copies_ED
        equal, _ = program_rows(self.load_E, self.gain_ED.shape[1])
        exact = np.concatenate([self.copies_E, np.full(n_devices, self.slots)])
        scale = max(float(np.abs(value_ED).max()), 1e-300)
        found: Any = linprog(  # a vertex, which is whole
            -value_ED.ravel() / scale, A_eq=equal, b_eq=exact, bounds=(0, 1), method="highs-ds"
        )
        return np.asarray(found.x.round().reshape(self.gain_ED.shape))

    def _rounded(self) -> list[Array]:
        """The linear program to the nearest whole placement, whose loads may be above the limit.

        If `is_thorough`, also the experts that it splits and those near it as an integer program:
        a transport program has whole solutions, and each limit that binds splits one expert.
        """
        n_devices = self.gain_ED.shape[1]
        equal, most = program_rows(self.load_E, self.gain_ED.shape[1])
        scale = max(float(np.abs(self.gain_ED).max()), 1e-300)
        relaxed: Any = linprog(
            -self.gain_ED.ravel() / scale,
            A_ub=most,
            b_ub=np.full(n_devices, self.limit),
            A_eq=equal,
            b_eq=np.concatenate([self.copies_E, np.full(n_devices, self.slots)]),
            bounds=(0, 1),
            method="highs",
        )
        if relaxed.x is None:
            return []
        x_ED = relaxed.x.reshape(self.gain_ED.shape)
        options = [self._transported(x_ED)]
        if self.is_thorough and self.gain_ED.size > _LARGE:
            duals = relaxed.eqlin.marginals[len(x_ED) :], relaxed.ineqlin.marginals
            profit_ED = -self.gain_ED / scale - duals[0] - self.load_E[:, None] * duals[1]
            part = self._free_part(x_ED, profit_ED, _GAP * -relaxed.fun * scale)
            options += [] if part is None else [part]
        return options

    def _free_part(self, x_ED: Array, profit_ED: Array, gap: float) -> Array | None:
        """Experts that are split, or lose least on another device, placed again as integers."""
        is_split_E = (np.abs(x_ED - x_ED.round()) > 1e-6).any(axis=1)
        n_experts, n_devices = x_ED.shape
        sorted_ED = np.sort(profit_ED, axis=1)
        edge_E, rows_E = np.minimum(self.copies_E, n_devices - 1), np.arange(n_experts)
        regret_E = sorted_ED[rows_E, edge_E] - sorted_ED[rows_E, edge_E - 1]
        n_free = max(int(is_split_E.sum()), _FREE // n_devices)
        free_E = np.lexsort((regret_E, ~is_split_E))[:n_free]
        copies_ED = x_ED.round()
        copies_ED[free_E] = 0
        slots_D = self.slots - copies_ED.sum(axis=0)
        room_D = self.limit - self.load_E @ copies_ED
        if (slots_D < 0).any() or (room_D < 0).any():
            return None
        gain_ED, load_E, copies_E = (a[free_E] for a in (self.gain_ED, self.load_E, self.copies_E))
        part = LayerProgram(gain_ED, load_E, copies_E, 0, 0.0)
        gap /= max(float(np.abs(gain_ED).max(axis=1).sum()), 1e-300)
        if (found_ED := part.solved(slots_D, room_D, gap)) is None:
            return None
        copies_ED[free_E] = found_ED
        return copies_ED

    def _integer(self, gap: float) -> Array | None:
        n_devices = self.gain_ED.shape[1]
        return self.solved(np.full(n_devices, self.slots), np.full(n_devices, self.limit), gap)

    def solved(self, slots_D: Array, room_D: Array, gap: float) -> Array | None:
        """The integer program by HiGHS, with slots and room for loads of each device."""
        equal, most = program_rows(self.load_E, self.gain_ED.shape[1])
        exact = np.concatenate([self.copies_E, slots_D])
        scale = max(float(np.abs(self.gain_ED).max()), 1e-300)
        options: Any = {"mip_rel_gap": gap} | ({"node_limit": _NODES} if gap else {})
        found = milp(
            -self.gain_ED.ravel() / scale,
            constraints=[LinearConstraint(equal, exact, exact), LinearConstraint(most, ub=room_D)],
            integrality=np.ones(self.gain_ED.size, int),
            bounds=Bounds(0, 1),
            options=options,
        )
        return None if found.x is None else np.asarray(found.x.round().reshape(self.gain_ED.shape))
