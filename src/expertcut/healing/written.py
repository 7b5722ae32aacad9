"""Adapters become weights: of the same layout, in the same names, other tensors copied."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertcut.checkpoints.exact import constants_on_disk, exact_config, has_earlier_names
from expertcut.checkpoints.export import companions
from expertcut.checkpoints.output_dir import system_errors
from expertcut.checkpoints.shards import Change, Rewrite, write_checkpoint
from expertcut.checkpoints.tensor_names import earlier_constants
from expertcut.errors import ContractError
from expertcut.files import share, write_atomically
from expertcut.healing.training.adapters import ADAPTER, deltas
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import MODELLING_FILE, Source, modelling_code
from expertcut.models.safetensors_index import read_stored

_NEIGHBOURS = 4  # parameters whose tensors lie mixed with one another on disk


@dataclass(frozen=True)
class _Place:
    """Where on disk a part of what is added to one parameter goes."""

    parameter: str
    shape: tuple[int, ...]


def write_merged(source: Source, model: Any, folder: Path) -> None:
    """Adds what the adapters of a peft model add to the weights on disk, rounded once.

    Tensors are added to one at a time, in float32. Constants of layout exact that have names of
    before are given those of today.

    Raises:
        ContractError: a family whose names on disk cannot be told from those of the model.
        OutputError: too little space.
    """
    write_checkpoint(source.path, folder, merged_rewrite(source, model))
    for file in companions(source.path):
        write_atomically(folder / file.name, file.read_bytes())
    content = (source.path / "config.json").read_bytes()
    if has_earlier_names(config := read_config(source.path)):
        constants = constants_on_disk(read_stored(source.path).tensors)
        config = exact_config(config, {}, earlier=constants)
        content = (json.dumps(config, indent=2) + "\n").encode()
        write_atomically(folder / MODELLING_FILE, modelling_code())
    write_atomically(folder / "config.json", content)


def merged_rewrite(source: Source, model: Any) -> Rewrite:
    """What becomes of each tensor on disk."""
    base, added = model.get_base_model(), dict(deltas(model))
    stored = read_stored(source.path).tensors
    places = dict(_places(base, {name: delta.shape for name, delta in added.items()}))
    for name, place in places.items():
        if name not in stored or stored[name].shape != place.shape:
            raise ContractError(
                f"{source.id}: what is added to {place.parameter} would go to {name} "
                f"{list(place.shape)}, which is not there: keep the adapter, with --adapter"
            )

    @lru_cache(maxsize=_NEIGHBOURS)
    def parts(parameter: str) -> dict[str, Tensor]:
        return _on_disk(base, parameter, added[parameter]())

    changed = {
        name: Change(place.shape, partial(_plus, name, partial(parts, place.parameter)))
        for name, place in places.items()
    }
    return Rewrite(renamed=earlier_constants(stored), changed=changed)


def _places(base: Any, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, _Place]]:
    for parameter, shape in shapes.items():
        nothing = torch.empty(shape, device="meta")
        for name, part in _on_disk(base, parameter, nothing).items():
            yield name, _Place(parameter, tuple(part.shape))


def _on_disk(base: Any, parameter: str, values: Tensor) -> dict[str, Tensor]:
    """A parameter under the names that the checkpoint has: by what transformers saves it with.

    Those conversions cut, turn and stack, so that sums go through them unchanged.
    """
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(base, {parameter: values})
    return found


def _plus(name: str, parts: Callable[[], dict[str, Tensor]], before: Tensor) -> Tensor:
    return (before.float() + parts()[name]).to(before.dtype)


def write_adapter(source: Source, model: Any, folder: Path) -> None:
    """The adapters of a peft model in peft's own form; they name the checkpoint as their base."""
    model.peft_config[ADAPTER].base_model_name_or_path = source.id
    with system_errors(folder):
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form that peft leaves to be filled in
    for file in folder.iterdir():
        share(file)  # safetensors writes for the owner only
