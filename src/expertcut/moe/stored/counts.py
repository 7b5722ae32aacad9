"""The counts of config.json against the tensors on disk, before memory is taken for any of them."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expertcut.errors import ModelError
from expertcut.moe.stored.headers import Stored, StoredTensor, weights_file

EXPERT_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k")
_COUNT_FIELDS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"),
    *(*EXPERT_COUNT_FIELDS, *_TOP_K_FIELDS),
)
_EXPERT_COUNT = re.compile(r"(n|num)_(\w+_)?experts")
_NUMBER = re.compile(r"\.(\d{1,9})\.")
_OF_ONE_EXPERT = re.compile(
    r"(?P<block>.+)\.(constant_)?experts\.(?P<expert>\d{1,9})\.(?P<part>.+)"
)
_CONSTANT = {"approx_value"}  # all that is left of a removed expert of layout exact


def check_counts(folder: Path, config: Mapping[str, Any], stored: Stored) -> None:
    """That config.json states counts, and no more layers and experts than the weights hold.

    Raises:
        ModelError: it does not, or a layer lacks experts that another has.
    """
    file = folder / "config.json"
    text = config.get("text_config")
    fields = {**(text if isinstance(text, dict) else {}), **config}
    for name in _COUNT_FIELDS:
        value = fields.get(name)
        if value is not None and (type(value) is not int or value < 1):
            said = str(value)[:50]
            raise ModelError(f"{file} says {name} {said}, must be a whole number above 0")
    n_experts = expert_count(dict(config)) or 0
    for name in _TOP_K_FIELDS:
        if (fields.get(name) or 0) > n_experts:
            raise ModelError(f"{file} routes each token to {fields[name]} of {n_experts} experts")
    numbers = [int(n[1]) for name in stored.tensors if (n := _NUMBER.search(f".{name}"))]
    n_layers = max(numbers, default=-1) + 1
    if (fields.get("num_hidden_layers") or 0) > n_layers:
        raise ModelError(
            f"{file} says {fields['num_hidden_layers']} layers, the weights hold {n_layers}"
        )
    for block, n_found in _experts_one_by_one(folder, stored):
        if n_found != n_experts:
            raise ModelError(f"{file} says {n_experts} experts, {block} holds {n_found}")


def check_count_types(folder: Path, config: Mapping[str, Any]) -> None:
    """That numbers of experts are numbers: `"8"` would be read as no number of experts at all.

    Raises:
        ModelError: one is text, a list or a fraction.
    """
    text = config.get("text_config")
    fields = {**(text if isinstance(text, dict) else {}), **config}
    for name, value in fields.items():
        is_count = name in EXPERT_COUNT_FIELDS or _EXPERT_COUNT.fullmatch(name)
        if is_count and isinstance(value, str | float | list):
            raise ModelError(
                f"{folder / 'config.json'} says {name[:50]} {str(value)[:50]!r}, must be a whole "
                "number above 0"
            )


def with_expert_count(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """The config with the expert count changed, under every name it goes by."""
    edited: dict[str, Any] = {
        key: with_expert_count(value, before, after)
        if key == "text_config" and isinstance(value, dict)
        else value
        for key, value in config.items()
    }
    return edited | {f: after for f in EXPERT_COUNT_FIELDS if edited.get(f) == before}


def expert_count(config: dict[str, Any]) -> int | None:
    """E as config.json states it, None for a model without experts."""
    text = config.get("text_config")
    fields = {**(text if isinstance(text, dict) else {}), **config}
    counts = [fields.get(field) for field in EXPERT_COUNT_FIELDS]
    return next((n for n in counts if isinstance(n, int) and n > 1), None)


def _experts_one_by_one(folder: Path, stored: Stored) -> Iterator[tuple[str, int]]:
    """Blocks whose experts have tensors of their own, and how many experts each has."""
    blocks: dict[str, dict[int, dict[str, StoredTensor]]] = {}
    for name, tensor in stored.tensors.items():
        if found := _OF_ONE_EXPERT.fullmatch(name):
            experts = blocks.setdefault(f"{found['block']}.experts", {})
            experts.setdefault(int(found["expert"]), {})[found["part"]] = tensor
    for block, experts in blocks.items():
        _check_alike(folder, block, experts)
        yield block, len(experts)


def _check_alike(folder: Path, block: str, experts: dict[int, dict[str, StoredTensor]]) -> None:
    """That experts are numbered from 0 and have the same tensors, but for those made constants."""
    own = {e: parts for e, parts in experts.items() if set(parts) != _CONSTANT}
    first, wanted = min(own.items(), default=(0, {}))
    wanted = {part: t for parts in own.values() for part, t in parts.items()} | wanted
    for expert in range(len(experts)):
        parts = experts.get(expert, {})
        if set(parts) == _CONSTANT:
            continue
        for part in sorted(wanted):
            name = f"{block}.{expert}.{part}"
            if part not in parts:
                # The headers were found to be whole, so it is not the download that lacks it.
                raise ModelError(
                    f"{weights_file(folder)} lacks {name}, which other experts there have: experts "
                    "that are not alike are not supported"
                )
            if parts[part].shape != wanted[part].shape:
                raise ModelError(
                    f"{parts[part].file} is damaged: {name} has shape "
                    f"{list(parts[part].shape)}, that of expert {first} {list(wanted[part].shape)}"
                )
