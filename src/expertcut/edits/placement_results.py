"""`placement.json`: a placement, and how it and its peers do on the half that did not choose it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from expertcut.documents import Format1, Record
from expertcut.edits.placement import (
    Devices,
    Placed,
    device_loads,
    place,
    served,
    stay,
)
from expertcut.edits.plan import Expert, ExpertIds, PlanModel
from expertcut.edits.replicas import RANDOM_DRAWS, at_random, peers, replicate, smallest_load
from expertcut.errors import OutputError, PlanError, SettingsError
from expertcut.profiling import trace
from expertcut.profiling.expert_load import transition_counts, use_counts
from expertcut.profiling.schema import BlockInfo
from expertcut.stats import Array, Share, document_ci95

PLACEMENT_FILE = "placement.json"
DEFAULT_CAP = 1.05
RANDOM = f"random ×{RANDOM_DRAWS}"
_Ids = tuple[Expert, ...]
_Load = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=1, le=1 << 16)]


class PlacedLayer(Record):
    """One layer: the device of each expert, ascending by id, and the ids on each device.

    Of an expert with several copies `device` is the first that has one.
    """

    device: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    slots: tuple[_Ids, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        ids = sorted({expert for own in self.slots for expert in own})
        if len({len(own) for own in self.slots}) > 1:
            raise ValueError("devices hold different numbers of experts")
        if any(len({*own}) < len(own) for own in self.slots):
            raise ValueError("a device holds two copies of one expert")
        first = {expert: d for d, own in reversed([*enumerate(self.slots)]) for expert in own}
        if tuple(first[expert] for expert in ids) != self.device:
            raise ValueError("device and slots are different placements")
        return self


class PlacementScore(Record):
    """Shares of steps from layer to layer that stay, and the largest load over the mean by layer.

    `ci95` is that of `same_device`, a bootstrap over sequences; None of random placements, whose
    figures are means. `same_node` is None without nodes, both are None of a single layer.
    """

    same_device: Share | None
    ci95: tuple[Share, Share] | None
    same_node: Share | None
    largest_load: tuple[_Load, ...] = Field(min_length=1)


class PlacementScores(PlacementScore):
    """Those of the placement on the half of the sequences that did not choose it, and of peers."""

    sequences: _Count
    tokens: int = Field(ge=1)
    peers: dict[str, PlacementScore]


class PlacementSolver(Record):
    """What the search did on the half that chose, in shares of all steps; loads over the mean.

    `objective` counts a step within a node as half. No placement has more than `bound`.
    `smallest_load` is the most even packing that was found, by layer.
    """

    sequences: _Count
    rounds: int = Field(ge=0)
    starts: _Count
    objective: Share | None
    bound: Share | None
    largest_load: tuple[_Load, ...]
    smallest_load: tuple[_Load, ...]


class PlacementFile(Record):
    """`placement.json`; experts by their ids in the model before any cut.

    `trace` is the SHA-256 of the trace; `load_cap` is None if each layer had the larger of 1.05
    and its smallest load.
    """

    format: Format1 = 1
    model: PlanModel
    trace: str = Field(pattern="^[0-9a-f]{64}$")
    devices: _Count
    nodes: _Count
    redundant: int = Field(ge=0)
    load_cap: _Load | None
    layers: dict[str, PlacedLayer] = Field(min_length=1)
    scored: PlacementScores
    solver: PlacementSolver

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.devices % self.nodes:
            raise ValueError(f"{self.devices} devices do not lie in {self.nodes} nodes")
        for name, layer in self.layers.items():
            if len(layer.slots) != self.devices:
                raise ValueError(f"{name} lies on {len(layer.slots)} devices, not {self.devices}")
            if sum(map(len, layer.slots)) != len(layer.device) + self.redundant:
                raise ValueError(f"{name} does not have {self.redundant} redundant experts")
        loads = [self.scored.largest_load, self.solver.largest_load, self.solver.smallest_load]
        loads += [peer.largest_load for peer in self.scored.peers.values()]
        if any(len(load) != len(self.layers) for load in loads):
            raise ValueError("a load is not of each layer")
        return self

    @property
    def order(self) -> list[list[int]]:
        """The ids of each layer in the order of the devices."""
        return [[e for own in layer.slots for e in own] for layer in self.layers.values()]


def load_placement(path: Path) -> PlacementFile:
    """`placement.json` from its file or folder; an OutputError where it is missing or not valid."""
    file = path / PLACEMENT_FILE if path.is_dir() else path
    return PlacementFile.load(file, OutputError, "is not a valid placement")


@dataclass(frozen=True)
class PlacementRequest:
    """What is asked of a placement; `keeps_groups` deals a router's groups as wholes."""

    devices: Devices
    redundant: int = 0
    load_cap: float | None = None
    seed: int = 0
    keeps_groups: bool = False

    def check(self, blocks: Sequence[BlockInfo]) -> None:
        """Refuses experts that the devices cannot hold equally."""
        n = self.devices.count
        if n % self.devices.nodes:
            raise SettingsError(f"--nodes {self.devices.nodes} does not divide --devices {n}")
        for block in blocks:
            if (block.experts + self.redundant) % n:
                given = f"{block.experts} experts"
                given += f" and --redundant {self.redundant}" if self.redundant else ""
                needed = -block.experts % n
                raise SettingsError(
                    f"{block.name}: {given} are not a multiple of --devices {n}, as each holds "
                    f"equally many: give --redundant {needed}, or a multiple of {n} more"
                )
            if self.redundant > block.experts * (n - 1):
                raise SettingsError(
                    f"--redundant {self.redundant} is more than a copy of each of the "
                    f"{block.experts} experts of {block.name} on every device"
                )
            if self.keeps_groups and block.groups > 1 and block.groups % n:
                raise PlanError(
                    f"{block.name} routes in {block.groups} groups, which --write keeps whole, and "
                    f"they do not divide over --devices {n}: give a divisor of {block.groups}, or "
                    "leave --write out"
                )


def place_trace(
    found: trace.Trace,
    asked: PlacementRequest,
    numbers: ExpertIds,
    on_start: Callable[[int], None] = lambda done: None,
) -> tuple[PlacementFile, list[Array]]:
    """Places the experts by one half of a trace, and scores that and its peers on the other.

    Returns the copies (E, D) of each layer too, by rows of the router.
    """
    asked.check(found.info.model.blocks)
    chosen_by, scored_by = found.halves()
    if not chosen_by or not scored_by:
        raise OutputError(
            f"{found.path} has one sequence: a placement is scored on others, trace more"
        )
    loads = _loads(chosen_by, found.n_experts_L.tolist())
    replicas = [
        replicate(load_E, len(load_E) + asked.redundant, asked.devices.count) for load_E in loads
    ]
    copies, placed, least = _chosen(found, asked, loads, replicas, on_start)
    names, model = found.block_names, found.info.model
    file = PlacementFile(
        model=PlanModel(id=model.id, revision=model.revision, fingerprint=model.fingerprint),
        trace=trace_hash(found),
        devices=asked.devices.count,
        nodes=asked.devices.nodes,
        redundant=asked.redundant,
        load_cap=asked.load_cap,
        layers={n: _layer(own, numbers, n) for n, own in zip(names, copies, strict=True)},
        scored=_scores(scored_by, copies, asked, loads, replicas),
        solver=PlacementSolver(
            sequences=len(chosen_by),
            rounds=placed.rounds,
            starts=placed.starts,
            objective=placed.objective,
            bound=None if placed.bound is None else min(1.0, placed.bound),
            largest_load=_largest(loads, copies),
            smallest_load=tuple(least),
        ),
    )
    return file, copies


def _chosen(
    found: trace.Trace,
    asked: PlacementRequest,
    loads: Sequence[Array],
    replicas: Sequence[Array],
    on_start: Callable[[int], None],
) -> tuple[list[Array], Placed, list[float]]:
    """Copies by layer, how they were found, and the smallest loads; groups are placed as one."""
    blocks = found.info.model.blocks
    # A router without groups is one group.
    sizes = [b.experts // b.groups if asked.keeps_groups and b.groups > 1 else 1 for b in blocks]
    by_unit = [_by_unit(load_E, size) for load_E, size in zip(loads, sizes, strict=True)]
    copies_of = [n_E[::size] for n_E, size in zip(replicas, sizes, strict=True)]
    n_devices = asked.devices.count
    least = [smallest_load(a, n, n_devices) for a, n in zip(by_unit, copies_of, strict=True)]
    counts = [
        _by_unit(_by_unit(count_EF, before).T, after).T
        for count_EF, (before, after) in zip(
            transition_counts(found.halves()[0], found.n_experts_L.tolist()),
            pairwise(sizes),
            strict=True,
        )
    ]
    placed = place(
        counts,
        by_unit,
        asked.devices,
        [asked.load_cap or max(DEFAULT_CAP, most) for most in least],
        replicas=copies_of,
        seed=asked.seed,
        on_start=on_start,
    )
    copies = [np.repeat(own, size, axis=0) for own, size in zip(placed.copies, sizes, strict=True)]
    return copies, placed, least


def trace_hash(found: trace.Trace) -> str:
    """The SHA-256 of `trace.json` and the chunks, in order."""
    digest = hashlib.sha256((found.path / trace.TRACE_FILE).read_bytes())
    for name, _, _ in found.info.chunks():
        digest.update((found.path / "chunks" / name).read_bytes())
    return digest.hexdigest()


def _loads(sequences: Sequence[trace.Sequence], n_experts_L: Sequence[int]) -> list[Array]:
    counts_LE = use_counts(sequences, len(n_experts_L), max(n_experts_L))
    loads = [count_E[:n].astype(float) for count_E, n in zip(counts_LE, n_experts_L, strict=True)]
    # A layer that a rule leaves without any expert is loaded evenly.
    return [load_E if load_E.any() else np.ones(len(load_E)) for load_E in loads]


def _by_unit(values: Array, size: int) -> Array:
    """Sums over the experts of each unit, along the first axis."""
    return np.asarray(values.reshape(len(values) // size, size, *values.shape[1:]).sum(axis=1))


def _layer(copies_ED: Array, numbers: ExpertIds, name: str) -> PlacedLayer:
    ids = np.array([numbers.number(name, row) for row in range(len(copies_ED))])
    slots = [sorted(ids[own_E > 0].tolist()) for own_E in copies_ED.T]
    return PlacedLayer(
        device=tuple(copies_ED.argmax(axis=1)[np.argsort(ids)].tolist()),
        slots=tuple(map(tuple, slots)),
    )


def _largest(loads: Sequence[Array], copies: Sequence[Array]) -> tuple[float, ...]:
    pairs = zip(loads, copies, strict=True)
    return tuple(float(device_loads(load_E, own_ED).max()) for load_E, own_ED in pairs)


def _scores(
    sequences: Sequence[trace.Sequence],
    copies: Sequence[Array],
    asked: PlacementRequest,
    chosen_loads: Sequence[Array],
    replicas: Sequence[Array],
) -> PlacementScores:
    n_experts_L = [len(own_ED) for own_ED in copies]
    loads, devices = _loads(sequences, n_experts_L), asked.devices
    others: Mapping[str, Sequence[Array]] = peers(chosen_loads, devices.count, replicas)
    scored = {
        name: _score(sequences, layers, devices, loads)
        for name, layers in {"": copies, **others}.items()
    }
    scored[RANDOM] = _random(sequences, asked, loads)
    own = scored.pop("")
    return PlacementScores(
        **dict(own),
        sequences=len(sequences),
        tokens=sum(map(len, sequences)),
        peers=scored,
    )


def _score(
    sequences: Sequence[trace.Sequence],
    layers: Sequence[Array],
    devices: Devices,
    loads: Sequence[Array],
) -> PlacementScore:
    """Steps from each expert of a token to each of the next layer, sequence by sequence."""
    shares = [np.vstack([served(own_ED), np.zeros(devices.count)]) for own_ED in layers]
    sums_S3 = np.array([_steps(s.experts_TLK, shares, devices) for s in sequences])
    same_S, node_S, all_S = sums_S3.T
    total = float(all_S.sum())
    return PlacementScore(
        same_device=float(same_S.sum()) / total if total else None,
        ci95=document_ci95(same_S, all_S) if total else None,
        same_node=float(node_S.sum()) / total if total and devices.is_nested else None,
        largest_load=_largest(loads, layers),
    )


def _steps(
    experts_TLK: Array, shares: Sequence[Array], devices: Devices
) -> tuple[float, float, float]:
    """Expected steps on one device, within one node, and in all."""
    same = node = total = 0.0
    before_TD = None
    for layer, share_ED in enumerate(shares):
        here_TD = share_ED[experts_TLK[:, layer]].sum(axis=1)  # −1 is the last row, of zeros
        if before_TD is not None:
            nodes = [t.reshape(len(t), devices.nodes, -1).sum(2) for t in (before_TD, here_TD)]
            same += float((before_TD * here_TD).sum())
            node += float((nodes[0] * nodes[1]).sum())
            total += float((before_TD.sum(1) * here_TD.sum(1)).sum())
        before_TD = here_TD
    return same, node, total


def _random(
    sequences: Sequence[trace.Sequence], asked: PlacementRequest, loads: Sequence[Array]
) -> PlacementScore:
    """Means over random placements."""
    rng, devices = np.random.default_rng(asked.seed), asked.devices
    counts = transition_counts(sequences, [len(load_E) for load_E in loads])
    total = sum(float(count_EF.sum()) for count_EF in counts)
    node_D = np.arange(devices.count) // (devices.count // devices.nodes)
    same_DD, node_DD = np.eye(devices.count), 1.0 * (node_D[:, None] == node_D)
    same, node, load = [], [], []
    for _ in range(RANDOM_DRAWS):
        layers = [
            at_random(len(load_E), len(load_E) + asked.redundant, devices.count, rng)
            for load_E in loads
        ]
        same.append(stay(counts, layers, same_DD))
        node.append(stay(counts, layers, node_DD))
        load.append(_largest(loads, layers))
    return PlacementScore(
        same_device=float(np.mean(same)) / total if total else None,
        ci95=None,
        same_node=float(np.mean(node)) / total if total and devices.is_nested else None,
        largest_load=tuple(np.mean(load, axis=0).tolist()),
    )
