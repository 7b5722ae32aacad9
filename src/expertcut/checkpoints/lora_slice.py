"""A LoRA adapter of the unpruned model, cut and written with the checkpoint.

With delta_e = B_e·A_e for each expert, rows and columns of kept experts are taken in the order of
the plan. If the plan or gate rescaling scales an expert's output, the delta of its last projection
is scaled too.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.checkpoints.lora import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    Base,
    Place,
    places,
    read_adapter,
)
from expertcut.checkpoints.shards import (
    Change,
    Rewrite,
    Shard,
    check_space,
    check_written,
    lay_out,
    write_shards,
)
from expertcut.checkpoints.tensor_names import blocks_of
from expertcut.edits.layouts import LAYOUTS
from expertcut.edits.plan import BlockEdit, EditPlan, PlanAdapter, PlanFile
from expertcut.errors import ModelError, OutputError
from expertcut.files import write_atomically
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import Source
from expertcut.models.validate import check_values

_NUMBERED = re.compile(r"experts\W+\d")  # an expert's number in a pattern of the config
_PATTERNS = (
    *("rank_pattern", "alpha_pattern", "target_parameters"),
    *("target_modules", "exclude_modules"),
)
Folds = Mapping[int, np.ndarray[Any, Any]]
Keep = tuple[int, ...]  # experts, in the order of the plan
Factors = Mapping[int, Sequence[float]]  # of the outputs of kept experts, by new number
ADAPTER_FOLDER = "adapter"  # in the checkpoint's


def _columns(b: Tensor, keep: Keep, n_experts: int, scaled: Factors) -> Tensor:
    """The columns (out, r·E) of kept experts; an expert's r columns lie E apart."""
    by_expert: Tensor = b.unflatten(1, (-1, n_experts))[..., list(keep)]
    for position, factors in scaled.items():
        by_expert[..., position] = _multiplied(by_expert[..., position], factors)
    return by_expert.flatten(1)


def _multiplied(b: Tensor, factors: Sequence[float]) -> Tensor:
    made = b.double()
    for factor in factors:
        made = made * factor
    return made.to(b.dtype)


def _output_factors(edit: BlockEdit, folds_E: np.ndarray[Any, Any] | None) -> Factors:
    """The factors of each kept expert's output, one after another, by its new number."""
    factors = {}
    for position, expert in enumerate(edit.keep):
        both = (edit.scale.get(expert, 1.0), 1.0 if folds_E is None else float(folds_E[position]))
        if own := tuple(factor for factor in both if factor != 1.0):
            factors[position] = own
    return factors


@dataclass(frozen=True)
class AdapterCut:
    """An adapter of a model, and the plan that cuts both; `folder` is the new checkpoint."""

    adapter: Adapter
    source: Source
    plan: EditPlan
    folder: Path

    def write(self, temporary: Path, plan: PlanFile, folds: Folds) -> PlanFile:
        """Writes the sliced adapter in peft's format; returns the plan that names it."""
        shard, place = self.laid_out(folds), temporary / ADAPTER_FOLDER
        try:
            write_shards(place, [shard])
        except EOFError:
            raise ModelError(f"{self.adapter.folder} became shorter while it was read") from None
        except OSError as error:
            raise OutputError(f"{place} cannot be written: {error.strerror}") from None
        check_written(place, [shard])
        config = {**self.adapter.config, "revision": None}
        config["base_model_name_or_path"] = str(self.folder.resolve())
        if LAYOUTS[self.plan.layout].keeps_rows:
            config |= {"auto_mapping": None, "task_type": config.get("task_type") or "CAUSAL_LM"}
        write_atomically(place / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
        sums = {}
        for key, name in (("config", CONFIG_FILE), ("weights", WEIGHTS_FILE)):
            with (self.adapter.folder / name).open("rb") as stream:
                sums[f"{key}_sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        record = PlanAdapter(path=str(self.adapter.folder), **sums)
        return plan.model_copy(update={"adapter": record})

    def laid_out(self, folds: Folds) -> Shard:
        """The file of its weights; with empty `folds` only its size is right."""
        headers = self.source.headers
        is_tied = bool(read_config(self.source.path).get("tie_word_embeddings"))
        base = Base(headers, blocks_of(headers, self.plan.edits), is_tied)
        rewrite = self._rewrite(base, folds)
        (shard,) = lay_out(self.adapter.stored, rewrite, max_shard_bytes=1 << 62)
        return replace(shard, name=WEIGHTS_FILE)

    def _rewrite(self, base: Base, folds: Folds) -> Rewrite:
        rewrite, plan = Rewrite(), self.plan
        layers = {name: layer for layer, name in enumerate(plan.edits)}
        targets = self.adapter.settings.target_parameters or ()
        is_router_named = any(t.endswith(("gate.weight", "router.weight")) for t in targets)
        for place in places(self.adapter, base):
            # Linear layers instead of parameters, which peft converts.
            is_linear = place.kind == "one expert" or (
                place.kind == "router" and not is_router_named
            )
            if not self._is_stock and plan.is_biased and is_linear:
                raise self.adapter.refusal(
                    f"{place.names[0]} is as transformers 4 has experts and routers, which peft "
                    "cannot bring to gates with biases: leave out --boost and --suppress, or "
                    "--layout exact"
                )
            edit, n_experts = plan.edits[place.block], base.blocks[place.block].n_experts
            folds_E = folds.get(layers[place.block])
            scaled = _output_factors(edit, folds_E) if place.is_last else {}
            if place.kind == "all experts":
                self._slice_all(rewrite, place, edit.keep, n_experts, scaled)
            elif place.kind == "one expert":
                self._slice_one(rewrite, place, edit.keep, scaled)
            else:
                self._slice_router(rewrite, place, edit, n_experts)
        for key in _PATTERNS if self._is_stock and rewrite.renamed else ():
            value = getattr(self.adapter.settings, key) or ()
            texts = [value] if isinstance(value, str) else value
            if wrong := next((text for text in texts if _NUMBERED.search(text)), None):
                raise ModelError(
                    f"{self.adapter.folder / CONFIG_FILE}: {key} names an expert by its number "
                    f"({wrong}), and numbers change in layout stock: take --layout exact"
                )
        return rewrite

    @property
    def _is_stock(self) -> bool:
        return not LAYOUTS[self.plan.layout].keeps_rows

    def _slice_all(
        self, rewrite: Rewrite, place: Place, keep: Keep, n_experts: int, scaled: Factors
    ) -> None:
        a, b = place.names
        (rows, n_in), (n_out, _) = self.adapter.shape(a), self.adapter.shape(b)
        rank = rows // n_experts
        if len(keep) < n_experts:
            own = tuple(expert * rank + j for expert in keep for j in range(rank))
            rewrite.changed[a] = Change((len(own), n_in), rows=own)
        if len(keep) < n_experts or scaled:
            apply = partial(_columns, keep=keep, n_experts=n_experts, scaled=scaled)
            rewrite.changed[b] = Change((n_out, rank * len(keep)), apply)

    def _slice_one(self, rewrite: Rewrite, place: Place, keep: Keep, scaled: Factors) -> None:
        if place.expert not in keep:
            rewrite.removed |= set(place.names)
            return
        position, (_, b) = keep.index(place.expert), place.names
        if self._is_stock and position != place.expert:
            old, new = f".experts.{place.expert}.", f".experts.{position}."
            rewrite.renamed |= {name: name.replace(old, new) for name in place.names}
        if position in scaled:
            apply = partial(_multiplied, factors=scaled[position])
            rewrite.changed[b] = Change(self.adapter.shape(b), apply)

    def _slice_router(
        self, rewrite: Rewrite, place: Place, edit: BlockEdit, n_experts: int
    ) -> None:
        """Cuts the router's rows, which layout exact keeps."""
        name = place.names[-1]  # lora_B, whose rows are the experts'
        if place.kind == "whole router" and edit.bias:
            raise self.adapter.refusal(
                f"{name} takes the place of a router that --boost or --suppress would change: "
                "leave these out, or train the router by lora_A and lora_B"
            )
        if self._is_stock and len(edit.keep) < n_experts:
            shape = list(self.adapter.shape(name))
            axis = shape.index(n_experts) if place.kind == "whole router" else 0
            shape[axis] = len(edit.keep)
            select = partial(torch.index_select, dim=axis, index=torch.tensor(edit.keep))
            rewrite.changed[name] = Change(tuple(shape), select)


def adapter_cut(
    adapter: Path | None, source: Source, plan: EditPlan, folder: Path
) -> AdapterCut | None:
    """An adapter that fits the model, the plan and the disk; None without an adapter."""
    if adapter is None:
        return None
    found = AdapterCut(read_adapter(adapter), source, plan, folder)
    check_space(folder, found.laid_out({}).size_bytes)
    check_values(adapter / WEIGHTS_FILE)
    return found
