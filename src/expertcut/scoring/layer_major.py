"""Runs chunks layer by layer (`--layerwise`): every weight is read once, whatever is to be read.

The passes of a chunk come in the same order each time. So for each decoder layer they are run again
from its stored inputs up to its outputs, with the kernels and on the rows of an ordinary run: what
hooks see of a layer has the same bits. What comes before the first layer runs again with each.
"""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from expertcut.errors import ContractError, ModelError, OutputError
from expertcut.files import advance
from expertcut.models import validate
from expertcut.models.find_blocks import probe_again, probe_ids
from expertcut.models.hooks import registered
from expertcut.models.layerwise import LayerWeights, read_tensor
from expertcut.models.safetensors_index import read_file
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Encoded
from expertcut.scoring.passes import Decoders, Layer
from expertcut.stats import Array

Arrays = Mapping[str, Array]
PROBE = "probe"
_KEY = "expertcut"
# Of a block as its code on stand-ins shows it; the profile says these before a layer is loaded.
_SHOWN = ("scoring", "inflates", "selection", "n_groups", "top_groups", "most")


@dataclass(frozen=True)
class State:
    """A chunk between two layers: the next layer, its inputs pass by pass, arrays so far."""

    number: int = 0
    inputs: Sequence[Any] = ()
    arrays: Arrays = field(default_factory=dict)
    bad: str = ""  # the first decoder layer with a non-finite output


class HiddenStates:
    """States of chunks, in memory or in a folder: one file each, which `of` tells from others."""

    def __init__(self, folder: Path | None, of: Mapping[str, str]) -> None:
        self.folder, self.of = folder, of
        self.held: dict[str, State] = {}

    def number(self, name: str) -> int:
        """The layer that a chunk runs next."""
        if self.folder is None:
            return self.held.get(name, State()).number
        try:
            described = json.loads(read_file(self._file(name)).metadata[_KEY])
        except (ModelError, ValueError, KeyError):
            return 0
        return int(described["layer"]) if described["of"] == self.of[name] else 0

    def get(self, name: str) -> State:
        """The state of a chunk."""
        if self.folder is None:
            return self.held.get(name, State())
        if not self.number(name):
            return State()
        stored = read_file(self._file(name))
        described = json.loads(stored.metadata[_KEY])
        read = {key: read_tensor(tensor) for key, tensor in stored.tensors.items()}
        arrays = {k[2:]: tensor.numpy() for k, tensor in read.items() if k.startswith("a.")}
        inputs = [_joined(form, f"p.{i}", read) for i, form in enumerate(described["forms"])]
        return State(described["layer"], inputs, arrays, described["bad"])

    def put(self, name: str, state: State) -> None:
        """Keeps the state of a chunk in place of the one before."""
        if self.folder is None:
            self.held[name] = state
            return
        tensors: dict[str, Tensor] = {}
        forms = [_parted(value, f"p.{i}", tensors) for i, value in enumerate(state.inputs)]
        for key, array in state.arrays.items():
            tensors[f"a.{key}"] = torch.from_numpy(np.ascontiguousarray(array))
        described = {"of": self.of[name], "layer": state.number, "forms": forms, "bad": state.bad}
        file = self._file(name)
        part = file.with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, metadata={_KEY: json.dumps(described)})
            part.replace(file)
        except OSError as error:
            raise OutputError(f"{file} cannot be written: {error.strerror}") from None

    def drop(self, name: str) -> None:
        """Forgets a chunk."""
        self.held.pop(name, None)
        if self.folder is not None:
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        assert self.folder is not None, "states are in memory"
        return self.folder / f"{name.removesuffix('.safetensors')}.safetensors"


def _parted(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The form of a layer's output, whose tensors are added by name."""
    if isinstance(value, tuple | list):
        return [_parted(part, f"{key}.{i}", tensors) for i, part in enumerate(value)]
    if not isinstance(value, Tensor):
        if value is None:
            return None
        raise ContractError(f"a decoder layer gives a {type(value).__name__}: not with --layerwise")
    tensors[key] = value.cpu().contiguous()
    return "tensor"


def _joined(form: Any, key: str, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(form, list):
        return tuple(_joined(part, f"{key}.{i}", tensors) for i, part in enumerate(form))
    return None if form is None else tensors[key]


def merged(before: Arrays, arrays: Arrays) -> dict[str, Array]:
    """Arrays of the layers so far and of one more, which has zeros for all other layers.

    An array by layer (an axis L) that one of them leaves out is left out.
    """
    found = {}
    for name, array in arrays.items():
        is_by_layer = "L" in name.rpartition("_")[2]
        if name in before and is_by_layer:
            found[name] = before[name] + array
        elif name in before and "gap" in name:  # the smallest of all layers
            found[name] = np.minimum(before[name], array)
        elif not (before and is_by_layer):
            found[name] = array
    return {
        **{name: a for name, a in before.items() if "L" not in name.rpartition("_")[2]},
        **found,
    }


def run_layers(
    engine: Engine, names: Sequence[str], measure: Callable[[str], Arrays], kept: HiddenStates
) -> Iterator[tuple[str, Arrays]]:
    """The arrays of each chunk, as soon as it ran through the last layer.

    In the first run the blocks of the engine's model are probed again, on their weights.
    `measure` runs the passes of a chunk, and gives its arrays of the layer that runs.
    """
    layers, name = engine.moe.layers, engine.moe.source.name
    if not names or layers is None:
        return
    decoders = Decoders(engine.moe.model, engine.moe.blocks)
    decoders.modules = layers.layers
    if layers.stands_in:
        _ = engine.projection  # tries the whole model
        layers.free()
    is_probed = layers.is_probed
    first = min(kept.number(chunk) for chunk in ([] if is_probed else [PROBE]) + [*names])
    try:
        for number in range(first, len(layers)):
            advance(f"layers of {name}", number, len(layers), "layers")
            with layers.loaded(number):
                if not is_probed:
                    outputs = _probe(engine, layers, decoders, number, kept.get(PROBE).inputs)
                for chunk in names:
                    if kept.number(chunk) > number:
                        continue  # by an interrupted run
                    before, after = kept.get(chunk), list[Any]()
                    engine.layer = Layer(
                        number, number + 1 == len(layers), before.arrays, before.bad
                    )
                    with _alone(decoders, number, before.inputs, after):
                        arrays = merged(before.arrays, measure(chunk))
                    if engine.layer.is_last:
                        yield chunk, arrays
                        kept.drop(chunk)
                    else:
                        is_sound = all(validate.is_finite(own) for own in _tensors(after))
                        bad = before.bad or ("" if is_sound else layers.name(number))
                        kept.put(chunk, State(number + 1, after, arrays, bad))
                if not is_probed:  # last: who resumes probes it again
                    kept.put(PROBE, State(number + 1, outputs))
        kept.drop(PROBE)
        layers.is_probed = True
    finally:
        engine.layer = None


def score_chunks(
    engine: Engine, chunks: Iterable[Encoded], score: Callable[[str, Encoded], Tensor]
) -> list[Tensor]:
    """What `score` gives for each chunk, told apart by its number; with --layerwise by layer."""
    if engine.moe.layers is None:
        return [score(str(number), chunk) for number, chunk in enumerate(chunks)]
    named = {str(number): chunk for number, chunk in enumerate(chunks)}

    def measure(name: str) -> Arrays:
        return {"scores": score(name, named[name]).numpy()}

    folder = engine.moe.hidden_states and engine.moe.hidden_states / "scores"
    of = dict.fromkeys([PROBE, *named], secrets.token_hex())  # not what another run left
    found = dict(run_layers(engine, [*named], measure, HiddenStates(folder, of)))
    return [torch.from_numpy(found[name]["scores"]) for name in named]


def _alone(
    decoders: Decoders, number: int, inputs: Sequence[Any], outputs: list[Any]
) -> AbstractContextManager[None]:
    """Runs one decoder layer, from its inputs to its outputs, pass by pass."""
    return registered(
        [
            decoders.starting_at(number, inputs),
            decoders.storing(number + 1, outputs),
            decoders.ending_at(number),
        ]
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _probe(
    engine: Engine, layers: LayerWeights, decoders: Decoders, number: int, inputs: Sequence[Any]
) -> list[Any]:
    """Probes the MoE block of a decoder layer on its weights; the layer's outputs."""
    moe, outputs = engine.moe, list[Any]()
    blocks = [block for block in moe.blocks if layers.number_of(block.name) == number]
    run = partial(moe.model, input_ids=probe_ids(moe.model), use_cache=False)
    with _alone(decoders, number, inputs, outputs), torch.inference_mode():
        if not blocks:
            run()
        for block in blocks:
            found = probe_again(moe.model, block, run)
            if any(getattr(found, name) != getattr(block, name) for name in _SHOWN):
                raise ContractError(
                    f"{moe.source.id}: {block.name} has another gate than its code shows on other "
                    "weights, so --layerwise cannot tell it before: take --device-map auto "
                    "--offload FOLDER"
                )
            others = ((found if b.layer == found.layer else b) for b in moe.blocks)
            engine.moe = replace(moe, blocks=tuple(others))
    return outputs[:1]  # the probe runs the layer again
