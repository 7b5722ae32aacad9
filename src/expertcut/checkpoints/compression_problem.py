"""What the experts of a checkpoint may become, how large that is, and the choice under a budget.

No model is loaded. U units are the experts of all layers, G groups of units that share an option (a
layer's, or each alone), O options.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from expertcut.checkpoints import serving
from expertcut.checkpoints.build import profiled_source
from expertcut.checkpoints.compress_edit import CompressEdit
from expertcut.checkpoints.edit import Calibration, TensorChanges
from expertcut.checkpoints.export import WRITERS, rewrite_of
from expertcut.checkpoints.packed import quantization_config
from expertcut.checkpoints.shards import lay_out
from expertcut.checkpoints.tensor_names import PROJECTIONS, blocks_of
from expertcut.edits import allocation
from expertcut.edits.compression import (
    COMPRESSION_FILE,
    BlockErrors,
    CompressionFile,
    Grain,
    Option,
    Projection,
    Solver,
    load_compression,
)
from expertcut.edits.edit_settings import CompressSettings
from expertcut.edits.plan import BlockEdit, Compression, EditPlan, expert_ids
from expertcut.edits.splits import questions_for
from expertcut.errors import ContractError, ProfileError, SettingsError
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine
from expertcut.stats import Array

GRAINS: Mapping[Grain, str] = {"layer": "one option a layer", "expert": "per expert"}
_TRIES = 8  # of a smaller budget, where headers push the files over it


@dataclass(frozen=True)
class Options:
    """The option of each unit, how it was found, and the bytes of the files."""

    option_U: Array
    found: allocation.Allocation
    size_bytes: int


class CompressionProblem:
    """The experts of a profiled checkpoint, what each may become, and how large that is."""

    def __init__(
        self, profile: Profile, settings: CompressSettings, menu: Sequence[Option], group_size: int
    ) -> None:
        self.profile, self.settings = profile, settings
        self.menu, self.group_size = tuple(menu), group_size
        self.source, self.blocks = profiled_source(profile), profile.info.model.blocks
        WRITERS["packed"].check(self.source, is_cutting=False)
        headers, names = self.source.headers, [block.name for block in self.blocks]
        self.on_disk = blocks_of(headers, names)
        counts = [block.experts for block in self.blocks]
        self.layer_U = np.repeat(np.arange(len(names)), counts)
        self.expert_U = np.concatenate([np.arange(n) for n in counts])
        self.units = tuple(
            f"{block.name}:{expert}" for block in self.blocks for expert in range(block.experts)
        )
        sizes_LO2 = np.array([self._sizes(name) for name in names])
        self.bytes_UO = np.repeat(sizes_LO2[..., 0], counts, axis=0).astype(np.int64)
        self.bits_UO = np.repeat(sizes_LO2[..., 1], counts, axis=0)
        self.n_weights = sum(
            n * math.prod(headers[own].shape)
            for name, n in zip(names, counts, strict=True)
            for own in self.tensors(name, 0).values()
        )

    def tensors(self, block: str, expert: int) -> dict[Projection, str]:
        """The tensor on disk of each projection of an expert."""
        own = self.on_disk[block].by_expert[expert]
        if unknown := [name for part, name in own.items() if part not in PROJECTIONS]:
            raise ContractError(
                f"{unknown[0]} is not known as a projection of an expert: this form cannot be "
                "compressed"
            )
        return {PROJECTIONS[part]: name for part, name in own.items()}

    @cached_property
    def dtype(self) -> str:
        """The dtype of the experts' weights on disk."""
        first = next(iter(self.tensors(self.blocks[0].name, 0).values()))
        return self.source.headers[first].dtype

    def _sizes(self, block: str) -> list[tuple[float, float]]:
        """Bytes of an expert of a block under each option, and bits without scales."""
        headers = self.source.headers
        found: list[tuple[float, float]] = []
        shapes: dict[str, Any] = {n: headers[n].shape for n in self.tensors(block, 0).values()}
        width = headers[self.on_disk[block].router_weight].shape[1]
        n_weights = sum(map(math.prod, shapes.values()))
        for option in self.menu:
            if self.settings.loader == "llama.cpp":
                n_bytes = option.gguf_bytes(shapes, self.dtype)
            else:
                n_bytes = option.expert_bytes(shapes, self.dtype, width, self.group_size)
            bits = option.bits * n_weights if option.kind == "bits" else 8 * n_bytes
            found.append((n_bytes, bits))
        return found

    def draft(self, option_U: Array, size_bytes: int, gap: float | None) -> EditPlan:
        """The options as a plan; of one for all experts of a layer it names one."""
        settings, edits = self.settings, {}
        names = [str(option) for option in self.menu]
        for layer, block in enumerate(self.blocks):
            own = [names[o] for o in option_U[self.layer_U == layer]]
            options = {str(expert): name for expert, name in enumerate(own)}
            if len({*own}) == 1:
                options = {"*": own[0]}
            edits[block.name] = BlockEdit(keep=tuple(range(block.experts)), options=options)
        figures = {
            "for": settings.loader,
            "grain": settings.grain_taken,
            "by": settings.by,
            "group_size": self.group_size,
            "budget_bytes": settings.sizes[0] if settings.max_bytes else None,
            "bytes": size_bytes,
            "bits": self.mean_bits(option_U),
            "gap": gap,
        }
        words = (settings.slug, settings.action, settings.by)
        is_packed = settings.loader != "llama.cpp"
        return EditPlan(
            *words, "all", edits,
            layout="packed" if is_packed else "stock",
            compression=Compression.model_validate(figures),
            is_calibrated=True,
            numbers=expert_ids(self.profile),
        )  # fmt: skip

    def mean_bits(self, option_U: Array) -> float:
        """Bits of a weight of the experts, without scales."""
        return float(self.bits_UO[np.arange(len(option_U)), option_U].sum() / self.n_weights)

    def size_of(self, option_U: Array) -> int:
        """Bytes of the safetensors files, headers included; for llama.cpp of a GGUF's tensors."""
        if self.settings.loader == "llama.cpp":
            own = self.bytes_UO[np.arange(len(option_U)), option_U]
            return self._rest_bytes + int(own.sum())
        shards = lay_out(self.source.stored, self._rewrite(option_U))
        return sum(shard.size_bytes for shard in shards)

    def _rewrite(self, option_U: Array) -> TensorChanges:
        """What becomes of each tensor; sizes are right, fitted values are not."""
        edit = self._unfitted(option_U)
        return rewrite_of("packed", self.source, edit.blocks, [edit])

    def _unfitted(self, option_U: Array) -> CompressEdit:
        draft = self.draft(option_U, 0, None)
        assert draft.compression is not None, "of these options"
        return CompressEdit(draft.edits, draft.compression)

    @property
    def _rest(self) -> Option:
        """The option of all other matrices in a GGUF file."""
        return Option("bits", bits=self.settings.rest) if self.settings.rest else Option("whole")

    @cached_property
    def _rest_bytes(self) -> int:
        """Bytes of all other tensors in a GGUF file."""
        first = {block.name: self.menu[0] for block in self.blocks}
        whole = serving.gguf_bytes(self.source.headers, self.on_disk, first, self._rest)
        return whole - int(self.bytes_UO[:, 0].sum())

    def check_budget(self) -> None:
        """Refuses a budget below the smallest size, before a model is loaded."""
        nothing_UO = np.zeros(self.bytes_UO.shape)
        for budget in self.settings.sizes or (None,):
            self.choose(nothing_UO, budget)

    def choose(
        self, error_UO: Array, budget: int | None, *, by: str = "", grain: Grain | None = None
    ) -> Options:
        """The options of least error within so many bytes, or without any within `--bits`."""
        by, grain = by or self.settings.by, grain or self.settings.grain_taken
        if budget is None:
            limit = int(self._limit_bits * self.n_weights)
            found = self._solve(error_UO, self.bits_UO.astype(np.int64), limit, 0, by, grain)
            return Options(found.choice_U, found, self.size_of(found.choice_U))
        cheapest_U = self.bytes_UO.argmin(axis=1)
        fixed = self.size_of(cheapest_U) - int(self.bytes_UO.min(axis=1).sum())
        limit = budget
        for _ in range(_TRIES):
            found = self._solve(error_UO, self.bytes_UO, limit, fixed, by, grain)
            if (over := (size_bytes := self.size_of(found.choice_U)) - budget) <= 0:
                return Options(found.choice_U, found, size_bytes)
            limit -= over
        raise SettingsError(
            f"no choice of options was found whose files have {budget:,} bytes or less: raise the "
            "budget"
        )

    @property
    def _limit_bits(self) -> float:
        assert self.settings.bits is not None, "checked"
        return self.settings.bits

    def _solve(
        self, error_UO: Array, size_UO: Array, limit: int, fixed: int, by: str, grain: Grain
    ) -> allocation.Allocation:
        if by == "pmq":
            found_sums = (self.profile.token_sum(name) for name in ("tokens", "weight"))
            sums = [sum_LE for sum_LE in found_sums if sum_LE is not None]
            if len(sums) < 2:
                raise ProfileError(
                    f"{self.profile.path} holds no all-token statistics (--stats answer), which "
                    "--by pmq counts: profile with --stats all"
                )
            tokens_U, weight_U = (own[self.layer_U, self.expert_U] for own in sums)
            return allocation.pmq(
                error_UO, size_UO, limit, layer_U=self.layer_U,
                tokens_U=tokens_U, weight_U=weight_U, fixed=fixed,
            )  # fmt: skip
        group_U = self.layer_U if grain == "layer" else np.arange(len(error_UO))
        error_GO, size_GO = (_summed(own, group_U) for own in (error_UO, size_UO))
        if by == "uniform":
            found = allocation.uniform(error_GO, size_GO, limit, fixed=fixed)
        else:
            found = allocation.allocate(error_GO, size_GO, limit, fixed=fixed)
        if by == "random":
            found = allocation.shuffled(found.choice_U, error_GO, size_GO, self.settings.seed)
        return _of_units(found, group_U)

    def peers(self, error_UO: Array, budget: int | None, chosen: Options) -> dict[str, Options]:
        """The choice beside others under the same budget, by name."""
        grain, by = self.settings.grain_taken, self.settings.by
        found = {f"this ({GRAINS[grain] if by == 'error' else by})": chosen}
        others: list[tuple[str, str, Grain]] = [
            (GRAINS[other], "error", other) for other in GRAINS if (by, other) != ("error", grain)
        ]
        if by != "pmq" and len(self.menu) > 1 and all(o.kind == "bits" for o in self.menu):
            others.append(("by pmq (the paper's score)", "pmq", "expert"))
        if by != "random":
            others.append(("the same options, shuffled", "shuffled", grain))
        if by != "uniform":
            others.append(("one option for all", "uniform", grain))
        for name, how, other_grain in others:
            try:
                if how == "shuffled":
                    found[name] = self._shuffled(chosen, error_UO, grain)
                else:
                    found[name] = self.choose(error_UO, budget, by=how, grain=other_grain)
            except (SettingsError, ProfileError):  # none fits, or the profile has no such sums
                continue
        if "one option for all" in found:
            option = self.menu[found["one option for all"].option_U[0]]
            found[f"{option} for all"] = found.pop("one option for all")
        return found

    def _shuffled(self, chosen: Options, error_UO: Array, grain: Grain) -> Options:
        group_U = self.layer_U if grain == "layer" else np.arange(len(error_UO))
        _, first_G = np.unique(group_U, return_index=True)
        error_GO, size_GO = (_summed(own, group_U) for own in (error_UO, self.bytes_UO))
        own = (chosen.option_U[first_G], error_GO, size_GO, self.settings.seed)
        found = _of_units(allocation.shuffled(*own), group_U)
        return Options(found.choice_U, found, self.size_of(found.choice_U))

    def serving_files(self, chosen: Options) -> dict[str, bytes]:
        """What the loader's own tools read: types for llama-quantize, or a recipe of GPTQ."""
        if self.settings.loader == "llama.cpp":
            own = (self.source.headers, self.on_disk, self._by_block(chosen), self._rest)
            return {serving.TENSOR_TYPES: serving.tensor_types(*own)}
        if self.settings.loader == "vllm":
            config = quantization_config(self._rewrite(chosen.option_U))
            return {serving.RECIPE: serving.quantisation_recipe(config)}
        return {}

    def commands(self, chosen: Options, folder: Path) -> list[str]:
        """What makes the GGUF of a checkpoint for llama.cpp."""
        if self.settings.loader != "llama.cpp":
            return []
        given = (str(folder), self.source.headers, self.on_disk, self._by_block(chosen))
        return [*serving.llama_cpp_commands(*given)]

    def _by_block(self, chosen: Options) -> dict[str, Option]:
        """The one option of each block."""
        first = [int((self.layer_U == layer).argmax()) for layer in range(len(self.blocks))]
        own = zip(self.blocks, chosen.option_U[first], strict=True)
        return {block.name: self.menu[option] for block, option in own}

    def edit(self, option_U: Array, engine: Engine | None) -> CompressEdit:
        """The options as a fitted edit, which the model runs with."""
        return self._unfitted(option_U).fit(engine, self.calibration)

    @cached_property
    def calibration(self) -> Calibration:
        """The questions that measure, and those that judge."""
        return Calibration(self.profile, questions_for(self.profile, is_fitting=True), self.source)


def _summed(value_UO: Array, group_U: Array) -> Array:
    """Sums (G, O) over the units of a group; nothing is summed where each is alone."""
    _, first_G, of_U = np.unique(group_U, return_index=True, return_inverse=True)
    sum_GO = np.zeros((len(first_G), value_UO.shape[1]), dtype=value_UO.dtype)
    np.add.at(sum_GO, of_U, value_UO)
    return sum_GO


def _of_units(found: allocation.Allocation, group_U: Array) -> allocation.Allocation:
    _, of_U = np.unique(group_U, return_inverse=True)
    return replace(found, choice_U=found.choice_U[of_U])


def start(
    profile: Profile, settings: CompressSettings
) -> tuple[CompressionFile | None, CompressionProblem]:
    """The problem, and with `--from` the errors that were measured; no model is loaded."""
    if settings.earlier is None:
        return None, CompressionProblem(profile, settings, settings.menu, settings.group_size)
    path = settings.earlier
    file = load_compression(path / COMPRESSION_FILE if path.is_dir() else path)
    menu = settings.menu if settings.options else file.menu
    if unknown := [str(option) for option in menu if str(option) not in file.options]:
        raise SettingsError(
            f"--from {path} has no error of option {unknown[0]}: name some of "
            f"{','.join(file.options)}, or measure anew without --from"
        )
    if file.asked.is_ggml != (settings.loader == "llama.cpp"):
        which = "the types of llama.cpp" if file.asked.is_ggml else "our own rounding"
        raise SettingsError(
            f"--from {path} has errors of {which}, not of --for {settings.loader}: measure anew "
            "without --from"
        )
    settings.check_options(menu, file.asked.group_size)
    problem = CompressionProblem(profile, settings, menu, file.asked.group_size)
    if (file.asked.fingerprint, file.units) != (problem.source.fingerprint, problem.units):
        raise SettingsError(
            f"--from {path} has errors of another model ({file.asked.fingerprint[:8]}) than "
            f"{profile.path} ({problem.source.fingerprint[:8]}): name its --profile"
        )
    return file, problem


def errors_of(file: CompressionFile, problem: CompressionProblem) -> Array:
    """The errors (U, O) of the problem's menu; infinite below `--least` for unchosen experts."""
    places = [file.options.index(str(option)) for option in problem.menu]
    error_UO = np.array(file.error, dtype=np.float64)[:, places]
    if problem.settings.least is not None:
        least = problem.menu.index(Option.parse(problem.settings.least))
        is_unchosen_U1 = np.asarray(error_UO == 0).all(axis=1, keepdims=True)
        is_smaller_UO = problem.bytes_UO < problem.bytes_UO[:, [least]]
        error_UO = np.where(is_unchosen_U1 & is_smaller_UO, np.inf, error_UO)
    return error_UO


def solved(
    file: CompressionFile,
    problem: CompressionProblem,
    chosen: Options,
    measured: Sequence[float] | None,
) -> CompressionFile:
    """The file with a choice: the error of each block as the sum of its experts', and measured."""
    places = [file.options.index(str(option)) for option in problem.menu]
    error_UO = np.array(file.error, dtype=np.float64)[:, places]
    error_U = error_UO[np.arange(len(error_UO)), chosen.option_U]
    sums, found = np.bincount(problem.layer_U, weights=error_U), chosen.found
    asked = file.asked.model_copy(update={"grain": problem.settings.grain_taken})
    figures = {
        "asked": asked,
        "block_error": BlockErrors(sum=tuple(sums.tolist()), measured=tuple(measured or ())),
        "solver": Solver(status=found.status, gap=found.gap, seconds=found.seconds),
        "peers": (),
    }
    return file.model_copy(update=figures)
