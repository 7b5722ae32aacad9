"""Tables and sentences of placements and cache plans."""

from expertcut.edits.cache_plan import CacheFile
from expertcut.edits.placement_results import PlacementFile, PlacementScore
from expertcut.edits.plan import ExpertIds
from expertcut.profiling.schema import layer_numbers
from expertcut.reporting.edit_tables import percent, unit
from expertcut.reporting.tables import Cell, Table, columns

_SHOWN_LAYERS = 4  # whose loads stand side by side


def placement_facts(found: PlacementFile) -> list[tuple[str, str]]:
    """What was placed, how good it is, and what it was chosen and scored on."""
    scored, solver = found.scored, found.solver
    sizes = sorted({len(layer.slots[0]) for layer in found.layers.values()})
    held = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    text = f"{held} experts of each of {len(found.layers)} layers on each of {found.devices}"
    text += f" devices in {found.nodes} nodes" if found.nodes > 1 else " devices"
    text += f", {found.redundant} of a layer redundant" if found.redundant else ""
    facts = [("placed", text)]
    if solver.objective is not None and solver.bound is not None:
        best = f"the best of {solver.starts} starts, {percent(solver.objective)} on the half of "
        best += f"the sequences that chose; no placement has more than {percent(solver.bound)}"
        facts.append(("optimum", f"a local one: no layer alone can be placed much better; {best}"))
    text = f"at most {max(solver.largest_load):.2f} times the mean where it was chosen; the most "
    text += f"even packing found has {max(solver.smallest_load):.2f}"
    facts.append(("load", text))
    text = f"{scored.sequences:,} sequences with {scored.tokens:,} tokens that did not choose"
    return [*facts, ("scored on", text)]


def placement_table(found: PlacementFile) -> Table:
    """The placement beside its peers, all on the half that did not choose."""
    rows = [_row(name, score, found) for name, score in found.scored.peers.items()]
    rows.append(_row("this", found.scored, found))
    node = "; same node::.1%" if found.nodes > 1 else ""
    heads = columns(f"placement; same device::.1%; 95 %{node}; largest load by layer")
    note = "Steps of a token to the next layer that stay; largest loads over the mean."
    return Table(f"Placement on {found.devices} devices", heads, rows, note)


def _row(name: str, score: PlacementScore, found: PlacementFile) -> list[Cell]:
    interval = _points(*score.ci95) if score.ci95 else None
    node = [score.same_node] if found.nodes > 1 else []
    return [name, score.same_device, interval, *node, loads_text(score.largest_load)]


def _points(low: float, high: float) -> str:
    return f"{100 * low:.1f} … {100 * high:.1f}"


def loads_text(loads: tuple[float, ...]) -> str:
    """The load of every layer, or of many the range and the layer of the largest."""
    if len(loads) <= _SHOWN_LAYERS:
        return " ".join(f"{load:.2f}" for load in loads)
    largest = max(range(len(loads)), key=loads.__getitem__)
    return f"{min(loads):.2f} … {max(loads):.2f} (layer {largest})"


def placement_csv(found: PlacementFile) -> Table:
    """A row for each layer and expert: its devices, first to last."""
    rows: list[list[Cell]] = []
    for name, own in found.layers.items():
        ids = sorted({expert for slots in own.slots for expert in slots})
        for expert in ids:
            devices = [d for d, slots in enumerate(own.slots) if expert in slots]
            rows.append([name, expert, " ".join(map(str, devices))])
    return Table("Placement", columns("layer; expert; devices"), rows)


def cache_facts(found: CacheFile) -> list[tuple[str, str]]:
    """The size of the cache, and which size would hit the target."""
    sizes = {layer.expert_bytes for layer in found.layers.values()}
    text = f"{found.experts} experts of each of {len(found.layers)} layers"
    if None not in sizes:
        total = sum(
            len(layer.experts) * (layer.expert_bytes or 0) for layer in found.layers.values()
        )
        text += f", {unit(total, 'B')}"
    needed = ", ".join(
        f"{policy} {'no size' if n is None else n}" for policy, n in found.smallest.items()
    )
    text_of_target = f"experts a layer that hit {percent(found.target)}: {needed}"
    scored = f"{found.sequences:,} sequences with {found.tokens:,} tokens; static by the other half"
    return [("cache", text), ("smallest", text_of_target), ("scored on", scored)]


def cache_table(found: CacheFile) -> Table:
    """Hit rates by policy, and what is moved for a token."""
    rows: list[list[Cell]] = []
    for policy, own in found.rates.items():
        interval = _points(*own.ci95) if own.ci95 else None
        moved = None if own.moved_bytes is None else unit(round(own.moved_bytes), "B")
        by_layer = _points(min(own.by_layer), max(own.by_layer))
        rows.append([policy, own.hits, interval, by_layer, moved])
    heads = columns("policy; hits::.1%; 95 %; by layer; moved a token")
    note = "belady knows what comes next: no policy hits more."
    return Table(f"Cache of {found.experts} experts a layer", heads, rows, note)


def cache_csv(found: CacheFile) -> Table:
    """A row for each policy."""
    rows: list[list[Cell]] = [
        [policy, own.hits, *(own.ci95 or (None, None)), own.moved_bytes]
        for policy, own in found.rates.items()
    ]
    return Table("Cache", columns("policy; hits; low; high; moved_bytes"), rows)


def cache_list(found: CacheFile, numbers: ExpertIds) -> Table:
    """The list by rows of the checkpoint, as engines number experts, and layers of the model."""
    names = [*found.layers]
    of_model = layer_numbers(names) or range(len(names))
    rows: list[list[Cell]] = []
    for number, (name, layer) in zip(of_model, found.layers.items(), strict=True):
        own = numbers.rows.get(name)
        for expert, uses in zip(layer.experts, layer.uses, strict=True):
            rows.append([number, own.index(expert) if own else expert, uses])
    return Table("Cache", columns("layer; expert; count"), rows)
