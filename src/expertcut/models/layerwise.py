"""Loads a model without its decoder layers, and these one after the other (`--layerwise`).

Each byte of the weights is read once and about two layers are in memory. Until the first layer is
loaded, small stand-ins are in the places of the weights: random values that layers and experts
share. On them the model's code is examined, as it is on the weights of a model that fits in memory.
"""

import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from expertcut.errors import ContractError, ModelError
from expertcut.models import validate
from expertcut.models.devices import free_bytes, trim
from expertcut.models.find_blocks import routers
from expertcut.models.safetensors_index import DTYPES, Stored, StoredTensor, weights_file

Held = tuple[nn.Module, str, Tensor]  # a module, and the name and value of a tensor of its own


class Checkpoint(Protocol):
    """The checkpoint of a model, as `models.load.Source`."""

    @property
    def id(self) -> str:
        """As it was given."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def stored(self) -> Stored:
        """The headers."""

    @property
    def weight_files(self) -> list[Path]:
        """The files."""


def read_tensor(stored: StoredTensor) -> Tensor:
    """The values of a tensor, in memory of its own that returns to the system with it.

    A mapped file would count as resident, and what malloc frees would stay: two layers more.
    """
    size_bytes = stored.end - stored.begin
    if not size_bytes:
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    memory = mmap(-1, size_bytes)
    left = memoryview(memory)
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.begin)
            while len(left):
                if not (n_read := file.readinto(left) or 0):
                    raise ModelError(f"{stored.file} ends too early: download it again")
                left = left[n_read:]
    except OSError as error:
        raise ModelError(f"{stored.file} cannot be read: {error.strerror}") from None
    return torch.frombuffer(memory, dtype=DTYPES[stored.dtype]).reshape(stored.shape)


class _Lazy:
    """A tensor for transformers, which reads it by `[...]`: from those read ahead, or its file."""

    def __init__(self, name: str, stored: StoredTensor, ahead: dict[str, Tensor]) -> None:
        self.name, self.stored, self.ahead = name, stored, ahead

    def __getitem__(self, _all: Any) -> Tensor:
        values = self.ahead.pop(self.name, None)
        return read_tensor(self.stored) if values is None else values


def opened(
    source: Checkpoint, config: Any, auto: Any, *, is_trusted: bool, dtype: Any
) -> "LayerWeights":
    """A model with all weights but those of its decoder layers, which wait on disk."""
    from accelerate import init_empty_weights

    if dtype == "auto":
        stored = (DTYPES[tensor.dtype] for tensor in source.stored.tensors.values())
        first = next(own for own in stored if own.is_floating_point)
        dtype = getattr(config, "dtype", None) or first
    config = copy.deepcopy(config)
    with init_empty_weights(include_buffers=False):  # those that no checkpoint holds are computed
        model = auto.from_config(config, trust_remote_code=is_trusted, dtype=dtype)
    config = model.config
    config.name_or_path = str(source.path)
    if getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", None):
        raise ContractError(
            f"{source.id}: layers of {config.model_type} read the keys of others, so --layerwise "
            "cannot run them alone: take --device-map auto --offload FOLDER"
        )
    layers = LayerWeights(source, model, dtype)
    layers.open()
    return layers


class LayerWeights:
    """The weights of a model: those of its decoder layers are loaded layer by layer."""

    def __init__(self, source: Checkpoint, model: Any, dtype: torch.dtype) -> None:
        self.source, self.model, self.dtype = source, model, dtype
        self.stored = source.stored.tensors
        self.list_name, self.layers = _decoder_list(model)
        # Left out where transformers has no place for them, as of multi-token prediction.
        self.names: dict[int | None, list[str]] = {None: [], **{n: [] for n in range(len(self))}}
        self.mapping: list[Any] = _mapping(model)
        for name, parameter in self._parameters_of_names().items():
            layer = parameter.removeprefix(f"{self.list_name}.").partition(".")[0]
            is_of_layer = parameter.startswith(f"{self.list_name}.") and layer.isdecimal()
            self.names[int(layer) if is_of_layer else None].append(name)
        self.routers = {id(part) for router in routers(model) for part in router.modules()}
        self.stands_in = True
        self.is_probed = False  # with its weights
        self.reader = ThreadPoolExecutor(1, "read-ahead")
        self.ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __len__(self) -> int:
        return len(self.layers)

    def number_of(self, block: str) -> int:
        """The decoder layer of a MoE block, by its name."""
        return int(block.removeprefix(f"{self.list_name}.").partition(".")[0])

    def name(self, number: int) -> str:
        """The name of a decoder layer."""
        return f"{self.list_name}.{number}"

    def _parameters_of_names(self) -> dict[str, str]:
        """The parameter that each tensor on disk becomes, or becomes a part of."""
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        renamings = [rule for rule in self.mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self.mapping if isinstance(rule, WeightConverter)]
        found = {}
        for name in self.stored:
            parameter, _ = rename_source_key(name, renamings, converters, prefix, state)
            if parameter not in state and name in state:
                parameter, _ = rename_source_key(name, [], [], prefix, state)
            if parameter in state:
                found[name] = parameter
        return found

    def open(self) -> None:
        """Loads all but the decoder layers, for which stand-ins are put in place."""
        info = self._convert(self.names[None], {})
        self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        held = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(f"{self.list_name}.")
        }
        self._check(held, [n for n, tensor in held.items() if tensor.device.type == "meta"], info)
        self._put_stand_ins()

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """A decoder layer with its weights; behind the context only its router has them."""
        layer = self.layers[number]
        info = self._convert(self.names[number], self._read(number))
        held = {f"{self.name(number)}.{n}": tensor for n, tensor in layer.state_dict().items()}
        self._check(held, sorted(held.keys() & info.missing_keys), info)
        del held
        trim()
        layer.requires_grad_(False)
        names = self.names.get(number + 1, [])
        # Beside it there must be room for what a pass computes.
        if names and free_bytes(torch.device("cpu")) > 2 * self._size_bytes(names):
            self.ahead = number + 1, self.reader.submit(self._read_all, names)
        try:
            yield
        finally:
            self._free(layer)
            trim()

    def free(self) -> None:
        """Takes the stand-ins out."""
        self.stands_in = False
        for layer in self.layers:
            self._free(layer)
        trim()

    def _size_bytes(self, names: Sequence[str]) -> int:
        return sum(self.stored[name].end - self.stored[name].begin for name in names)

    def _read_all(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: read_tensor(self.stored[name]) for name in names}

    def _read(self, number: int) -> dict[str, Tensor]:
        (of, future), self.ahead = self.ahead or (None, None), None
        if future is None or of != number:
            return {}
        return future.result()

    def _convert(self, names: Sequence[str], ahead: dict[str, Tensor]) -> Any:
        """Puts tensors in their places, as transformers stacks and renames them."""
        # "disk": it then takes tensors one after the other, so that few are there twice.
        places = {"": "cpu", "-": "disk"}
        config = LoadStateDictConfig(
            device_map=places,
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self.mapping,
        )
        state = {name: _Lazy(name, self.stored[name], ahead) for name in names}
        has_bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(self.model, state, config)
        finally:
            if has_bar:
                logging.enable_progress_bar()
        if info.conversion_errors:
            name, error = min(info.conversion_errors.items())
            reason = error.strip().splitlines()[-1][:300]
            raise ModelError(f"{weights_file(self.source.path)} does not load: {name}: {reason}")
        return info

    def _check(self, held: Mapping[str, Tensor], missing: Sequence[str], info: Any) -> None:
        """Refuses missing, misshapen and non-finite weights."""
        file = weights_file(self.source.path)
        found = {"missing_keys": missing, "mismatched_keys": info.mismatched_keys}
        if lost := validate.lost_weights(found):
            raise ModelError(f"{file} lacks {len(lost)} of the model's weights, first {lost[0]}")
        for name, tensor in held.items():
            if not validate.is_finite(tensor):
                for weights in self.source.weight_files:
                    validate.check_values(weights)
                raise ModelError(
                    f"{file} holds values that do not fit in {self.dtype}, in {name}: "
                    "take another --dtype"
                )

    def _free(self, layer: nn.Module) -> None:
        for module in layer.modules():
            if id(module) not in self.routers:  # small, and asked between two runs
                for _, name, tensor in _held(module):
                    _put(module, name, torch.empty_like(tensor, device="meta"))

    def _put_stand_ins(self) -> None:
        made: dict[tuple[str, Any], Tensor] = {}
        random = torch.Generator().manual_seed(0)
        n_experts = validate.expert_count(self.model.config.to_dict()) or 1
        for number, layer in enumerate(self.layers):
            for path, module in layer.named_modules():
                for _, name, tensor in list(_held(module)):
                    if tensor.device.type != "meta" and tensor.any():
                        continue  # a buffer that the code computes
                    key = f"{path}.{name}", (tensor.shape, tensor.dtype)
                    if key not in made:
                        made[key] = _stand_in(tensor, random, len(self), n_experts)
                    _put(module, name, _view(made[key], tensor, number))


def _mapping(model: Any) -> list[Any]:
    """How transformers renames and stacks tensors; in layout exact its modelling file says it."""
    files = (sys.modules.get(base.__module__) for base in type(model).__mro__)
    own = (getattr(file, "_conversions", None) for file in files if hasattr(file, "ExactModel"))
    found: list[Any] = (next(filter(None, own), None) or get_model_conversion_mapping)(model)
    return found


def _decoder_list(model: Any) -> tuple[str, list[nn.Module]]:
    """Name and modules of the list of decoder layers, which is that of the MoE blocks."""
    names = [
        n for n, m in model.named_modules() if isinstance(getattr(m, "experts", None), nn.Module)
    ]
    lists = {match[1] for name in names if (match := re.match(r"(.+?)\.\d+(\.|$)", name))}
    if len(lists) != 1:
        raise ContractError(
            f"the MoE blocks of {model.config.model_type} are not in one list of decoder layers, "
            "so --layerwise cannot run them: take --device-map auto --offload FOLDER"
        )
    name = lists.pop()
    return name, list(model.get_submodule(name).children())


def _held(module: nn.Module) -> Iterator[Held]:
    """The parameters and persistent buffers of a module itself: what a checkpoint holds of it."""
    for name, tensor in module._parameters.items():
        if tensor is not None:
            yield module, name, tensor
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield module, name, buffer


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = values
    else:
        module._parameters[name] = nn.Parameter(values, requires_grad=False)


# Values between the stand-ins of two layers, whose blocks may not own the same experts, aligned.
_APART = 64


def _stand_in(tensor: Tensor, random: torch.Generator, n_layers: int, n_experts: int) -> Tensor:
    """Random values for a tensor of any layer; of a stack of matrices those of one."""
    if not tensor.is_floating_point():  # a table of K experts for each token
        row = torch.arange(tensor.shape[-1] if tensor.ndim else 1) % n_experts
        return row.to(tensor.dtype).expand(tensor.shape)
    if tensor.ndim < 2:  # norms, biases, factors
        ones = torch.ones(tensor.shape)
        return (ones + 0.1 * torch.randn(tensor.shape, generator=random)).to(tensor.dtype)
    shape = tensor.shape[1:] if tensor.ndim > 2 else tensor.shape
    scale: float = shape[-1] ** -0.5
    return (torch.randn(shape.numel() + _APART * n_layers, generator=random) * scale).to(
        tensor.dtype
    )


def _view(values: Tensor, tensor: Tensor, number: int) -> Tensor:
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return values.view(tensor.shape)
    shape = tensor.shape[1:] if tensor.ndim > 2 else tensor.shape
    return values[_APART * number :][: shape.numel()].view(shape).expand(tensor.shape)
