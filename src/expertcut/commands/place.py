"""`expertcut place`: which experts lie on which device, or stay in fast memory, from a trace."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from expertcut.commands import SILENT, UI, ModelSettings, output_option
from expertcut.errors import OutputError, SettingsError
from expertcut.settings import Count, FilePath, option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expertcut.edits.cache_plan import CacheFile
    from expertcut.edits.placement_results import PlacementFile
    from expertcut.profiling.storage import Profile
    from expertcut.profiling.trace import Trace

device_option = partial(option, panel="Devices")
cache_option = partial(option, panel="Cache")


class PlaceSettings(ModelSettings):
    """Place the experts of a trace on devices, or in a cache."""

    examples: ClassVar = (
        "expertcut place traces/mine --devices 8",
        "expertcut place traces/mine --devices 8 --nodes 2 --redundant 16",
        "expertcut place traces/mine --cache 24 --hits 0.9 --csv",
    )

    trace: FilePath = option(
        ..., "Trace of the model, as `expertcut trace` writes it.", is_argument=True
    )
    devices: Count | None = device_option(
        None, "Devices that hold equally many experts of each layer.", metavar="N", le=1 << 12
    )
    nodes: Count = device_option(
        1, "Nodes of equally many devices: a step within a node counts as half.", metavar="M"
    )
    redundant: int = device_option(
        0, "Copies of the most loaded experts, in each layer.", metavar="R", ge=0, le=1 << 15
    )
    load: float | None = device_option(
        None,
        "Largest load of a device over the mean.  [default: 1.05, or the smallest that a layer "
        "allows]",
        metavar="X", ge=1, le=1 << 12,
    )  # fmt: skip
    seed: int = device_option(0, "Seed of the starts, and of the random placements.", ge=0)
    write: bool = device_option(
        False, "Write the checkpoint with its experts in that order too, in PATH/checkpoint.",
        in_recipe=False,
    )  # fmt: skip
    verify: bool = device_option(
        True, "Do not score that checkpoint on held-out questions.", flags=("--no-verify",),
        in_recipe=False,
    )  # fmt: skip
    cache: Count | None = cache_option(
        None, "Experts of each layer that stay in fast memory.", metavar="C"
    )
    hits: float = cache_option(
        0.9, "Share of choices to hit: the smallest cache that does is printed.",
        metavar="F", gt=0, le=1,
    )  # fmt: skip
    csv: bool = cache_option(False, "Write the list as layer,expert,count too.")
    out: FilePath | None = output_option(
        None, "Output folder; must be absent or empty.  [default: in placements/]"
    )
    force: bool = output_option(False, "Replace the output folder once the new one is complete.")

    def check(self) -> None:
        """Refuses options that do not go together."""
        if (self.devices is None) == (self.cache is None):
            raise SettingsError(
                "place deals experts to devices or to a cache: give --devices N or --cache C"
            )
        of_other = ("hits", "csv") if self.cache is None else _OF_DEVICES
        needed = "--cache" if self.cache is None else "--devices"
        for name in of_other:
            if getattr(self, name) != type(self).model_fields[name].default:
                flag = "--no-verify" if name == "verify" else f"--{name}"
                raise SettingsError(f"{flag} is an option of {needed}: add it, or leave {flag} out")
        if self.write and self.redundant:
            raise SettingsError(
                "--write keeps each expert once, and --redundant copies experts: leave one out, "
                "or load the placement in an engine"
            )
        if not self.verify and not self.write:
            raise SettingsError("--no-verify is for --write: add it, or leave --no-verify out")

    @property
    def slug(self) -> str:
        """Names the output."""
        if self.cache is not None:
            return f"cache-{self.cache}"
        nodes = f"-{self.nodes}-nodes" if self.nodes > 1 else ""
        redundant = f"-{self.redundant}-redundant" if self.redundant else ""
        return f"{self.devices}-devices{nodes}{redundant}"


_OF_DEVICES = ("nodes", "redundant", "load", "write", "verify")


def run(settings: PlaceSettings, ui: UI = SILENT) -> "PlacementFile | CacheFile":
    """Places the experts, and writes the placement or cache plan into a folder."""
    settings.check()
    if not settings.trace.exists():  # refused before anything heavy is imported
        raise OutputError(f"{settings.trace} is not there: name a trace of `expertcut trace`")
    from expertcut.checkpoints.output_dir import check_writable
    from expertcut.profiling.trace import load_trace

    found = load_trace(settings.trace)
    found.check_whole()
    folder = settings.out or Path("placements", f"{found.path.resolve().name}-{settings.slug}")
    check_writable(folder, is_forced=settings.force, inputs=(found.path,))
    if settings.cache is None:
        return _place(settings, found, folder, ui)
    return _plan_cache(settings, settings.cache, found, folder, ui)


def _place(settings: PlaceSettings, found: "Trace", folder: Path, ui: UI) -> "PlacementFile":
    import numpy as np

    from expertcut.checkpoints import serving
    from expertcut.checkpoints.build import profiled_source
    from expertcut.checkpoints.output_dir import atomic_dir
    from expertcut.edits import placement_results as placements
    from expertcut.edits.placement import STARTS, Devices
    from expertcut.edits.plan import expert_ids
    from expertcut.files import write_atomically
    from expertcut.reporting import place_tables as tables

    assert settings.devices is not None, "checked"
    asked = placements.PlacementRequest(
        Devices(settings.devices, settings.nodes),
        settings.redundant,
        settings.load,
        settings.seed,
        keeps_groups=settings.write,
    )
    asked.check(found.info.model.blocks)
    profile = _model_of(found)
    if settings.write:
        ui.quiet()
        profiled_source(profile)  # of this model
    with ui.parts("placing", folder) as report:
        file, copies = placements.place_trace(
            found, asked, expert_ids(profile), lambda done: report(done, STARTS)
        )
    rows = {
        name: [np.flatnonzero(own_E).tolist() for own_E in copies_ED.T]
        for name, copies_ED in zip(found.block_names, copies, strict=True)
    }
    files = serving.serving_files(rows, _n_layers(profile))
    with atomic_dir(folder, is_forced=settings.force) as temporary:
        file.save(temporary / placements.PLACEMENT_FILE)
        for name, content in files.items():
            write_atomically(temporary / name, content)
        if settings.write:
            same = _write_checkpoint(settings, found, file.order, temporary / "checkpoint")
    ui.say([tables.placement_table(file)], [])
    facts = tables.placement_facts(file)
    if not files:
        facts.append(("engines", "no engine's file: they ask for one number of experts a layer"))
    names = [placements.PLACEMENT_FILE, *files, *(["checkpoint/"] if settings.write else [])]
    facts.append(("files", ", ".join(names)))
    if settings.write and same:
        facts.append(("choices", same))
    ui.end(facts, folder, ["report", str(folder)])
    return file


def _write_checkpoint(
    settings: PlaceSettings, found: "Trace", order: "Sequence[Sequence[int]]", folder: Path
) -> str:
    """Writes the experts in this order, and says how many choices differ on held-out questions."""
    from expertcut.checkpoints.build import BuildOptions, permute_checkpoint
    from expertcut.checkpoints.permute_edit import moved_sentence
    from expertcut.edits.splits import traced_profile

    options = BuildOptions(settings.load_as(), settings.verify)
    action = f"place --devices {settings.devices}"
    built = permute_checkpoint(traced_profile(found), order, folder, options, action=action)
    return moved_sentence(built.proof) if built.proof else ""


def _plan_cache(
    settings: PlaceSettings, experts: int, found: "Trace", folder: Path, ui: UI
) -> "CacheFile":
    from expertcut.checkpoints.output_dir import atomic_dir
    from expertcut.edits.cache_plan import CACHE_FILE, plan_cache
    from expertcut.edits.plan import expert_ids
    from expertcut.files import write_atomically
    from expertcut.reporting import place_tables as tables
    from expertcut.reporting.tables import as_csv

    profile = _model_of(found)
    numbers = expert_ids(profile)
    file = plan_cache(found, experts, settings.hits, numbers, _expert_bytes(profile))
    with atomic_dir(folder, is_forced=settings.force) as temporary:
        file.save(temporary / CACHE_FILE)
        if settings.csv:
            content = as_csv(tables.cache_list(file, numbers)).encode()
            write_atomically(temporary / "cache.csv", content)
    ui.say([tables.cache_table(file)], [])
    names = [CACHE_FILE, *(["cache.csv"] if settings.csv else [])]
    facts = [*tables.cache_facts(file), ("files", ", ".join(names))]
    ui.end(facts, folder, ["report", str(folder)])
    return file


def _model_of(found: "Trace") -> "Profile":
    """The traced model, as a profile that is asked for nothing else."""
    from expertcut.profiling.storage import Profile

    info: Any = found.info
    return Profile(found.path, info)


def _n_layers(profile: "Profile") -> int | None:
    """Layers of the model by its config, if that is still there."""
    from expertcut.checkpoints.build import found_source
    from expertcut.errors import ModelError
    from expertcut.models.checkpoint_dir import read_config

    try:
        config = read_config(found_source(profile).path)
    except (ModelError, OSError):
        return None
    own = config.get("text_config", config)
    n_layers = own.get("num_hidden_layers") if isinstance(own, dict) else None
    return n_layers if isinstance(n_layers, int) else None


def _expert_bytes(profile: "Profile") -> list[int] | None:
    """Bytes of an expert of each block; None where the model is gone or is another one now."""
    from expertcut.checkpoints.build import profiled_source
    from expertcut.checkpoints.shared_experts import expert_pieces
    from expertcut.errors import ModelError, ProfileError

    try:
        pieces = expert_pieces(profiled_source(profile))
    except (ModelError, ProfileError, OSError):
        return None
    sizes = {block: size for _, block, _, size in pieces}
    blocks = profile.info.model.blocks
    found = [sizes.get(block.name) for block in blocks]
    return [size for size in found if size is not None] if None not in found else None
