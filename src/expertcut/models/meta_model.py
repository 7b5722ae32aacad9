"""A model without weights, made from config.json: what each tensor on disk becomes in it.

transformers renames and stacks the tensors of a checkpoint while it loads them. Here it does the
same with names and shapes alone, so that a checkpoint can be tried before it is written.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertcut.errors import ContractError
from expertcut.models.validate import expert_count, with_expert_count

Shapes = Mapping[str, tuple[int, ...]]
_MAX_REASON = 300
# What transformers raises where a config or tensors do not fit.
_FAULTS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)


def expert_axes(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The parameters with an axis of experts, by the name on disk of each, with that axis.

    It is the axis that grows with the number of experts in config.json. Tensors that are stacked
    with others while loading are left out, as are all where transformers has no code for the model
    or makes none with twice the experts.
    """
    n_experts = expert_count(dict(config)) or 0
    try:
        with _quietly(), _meta_model(config) as model:
            if model is None:
                return {}
            shapes, renamed = _shapes(model), _renamed(model, names)
        with _quietly(), _meta_model(with_expert_count(config, n_experts, 2 * n_experts)) as larger:
            grown = {} if larger is None else _shapes(larger)
    except _FAULTS:
        return {}
    found = {}
    for name, parameter in renamed.items():
        before, after = shapes.get(parameter, ()), grown.get(parameter, ())
        axes = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
        if len(axes) == 1:
            found[name] = (parameter, axes[0])
    return found


def check_loads(config: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str) -> None:
    """That a checkpoint of these tensors, on the meta device, would be loaded whole.

    Nothing is checked where transformers has no code for the model. `what` names the checkpoint.

    Raises:
        ContractError: a parameter of the model would be missing, or have another shape.
    """
    try:
        with _quietly(), _meta_model(config) as model:
            if model is None:
                return
            _, info = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=dict(tensors),
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except _FAULTS as error:
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise ContractError(
            f"{what} could not be loaded: {reason}: this form is not supported"
        ) from None
    lost = sorted(info["missing_keys"])
    lost += sorted(
        f"{name} of shape {list(wanted)} (it would have {list(found)})"
        for name, found, wanted in info["mismatched_keys"]
    )
    if lost:
        raise ContractError(
            f"{what} would lack {len(lost)} of the model's weights, first {lost[0]}: this form is "
            "not supported"
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars and reports of transformers."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


@contextmanager
def _meta_model(config: Mapping[str, Any]) -> Iterator[Any]:
    """The model, None where that would need code of others or transformers knows no such one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            made = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            yield None
            return
    if type(made) not in AutoModelForCausalLM._model_mapping:
        yield None
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    yield model


def _shapes(model: Any) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """By its name on disk, the parameter that a tensor becomes by itself."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state, found = model.state_dict(), {}
    for name in names:
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if pattern is None:
            found[name] = renamed
    return found
