"""A model without weights, from config.json: which parameter each tensor on disk becomes.

transformers renames and stacks tensors in loading. On the meta device it does so with names and
shapes alone, so a checkpoint can be tested before it is written.
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
from expertcut.models.find_blocks import experts_per_token, routers
from expertcut.models.validate import (
    auto_class,
    expert_count,
    family_config,
    lost_weights,
    text_model,
    with_expert_count,
)

# Raised by transformers if a config or tensors do not fit.
_FAULTS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)


def expert_axes(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The parameters with an axis of experts, and that axis, by name on disk.

    It grows with the number of experts in config.json. Tensors that loading stacks are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    n_experts = expert_count(dict(config)) or 0
    try:
        with _meta_model(config) as model:
            if model is None:
                return {}
            conversions, before = get_model_conversion_mapping(model), model.state_dict()
            renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
            converters = [c for c in conversions if isinstance(c, WeightConverter)]
            rules = (renamings, converters, model.base_model_prefix, before)
            renamed = {name: rename_source_key(name, *rules) for name in names}
        with _meta_model(with_expert_count(config, n_experts, 2 * n_experts)) as larger:
            after = {} if larger is None else larger.state_dict()
    except _FAULTS:
        return {}
    axis_of = {}
    for name, (parameter, pattern) in renamed.items():
        if pattern is not None:  # stacked with others
            continue
        shapes = (getattr(state.get(parameter), "shape", ()) for state in (before, after))
        axes = [i for i, (a, b) in enumerate(zip(*shapes, strict=False)) if a != b]
        if len(axes) == 1:
            axis_of[name] = (parameter, axes[0])
    return axis_of


def router_widths(config: Mapping[str, Any]) -> list[int]:
    """Experts per token of each router, by config.json; none if transformers has no code for it."""
    with _meta_model(config) as model:
        found: Iterable[Any] = () if model is None else routers(text_model(model))
        return [experts_per_token(router) for router in found]


def check_loads(config: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str) -> None:
    """Checks that tensors on the meta device load completely, if transformers knows the model."""
    try:
        with _meta_model(config) as model:
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
        reason = " ".join(str(error).split())[:300]
        raise ContractError(
            f"{what} could not be loaded: {reason}: this form is not supported"
        ) from None
    if lost := lost_weights(info, "would have"):
        raise ContractError(
            f"{what} would lack {len(lost)} of the model's weights, first {lost[0]}: this form is "
            "not supported"
        )


@contextmanager
def _meta_model(config: Mapping[str, Any]) -> Iterator[Any]:
    """The model on the meta device, and no output; None if transformers has no code for it."""
    from transformers import AutoConfig
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        made = model = None
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(family_config(config))
            (Path(folder) / "config.json").write_text(text, encoding="utf-8")
            try:
                made = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            except ValueError as error:
                if "trust_remote_code" not in str(error):
                    raise
        if made is not None and (auto := auto_class(made)) is not None:
            with torch.device("meta"):
                model = auto.from_config(made, trust_remote_code=False)
        yield model
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
