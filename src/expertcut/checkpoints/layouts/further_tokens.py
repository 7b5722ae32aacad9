"""What config.json says of layers that predict further tokens (MTP), once a cut left them out."""

import re
from collections.abc import Mapping
from typing import Any

# num_nextn_predict_layers, num_mtp_layers, mtp_num_hidden_layers, num_mtp_modules, mtp_num_layers
_COUNT = re.compile(r"(num_|n_)(\w+_)?(mtp|nextn)(_\w+)?|(mtp|nextn)_num_\w+")
_SWITCHES = {"use_mtp"}
_PARTS = ("text_config", "mtp_config")
_DEFAULT = "num_nextn_predict_layers"  # 1 in several families whose config.json does not say
_NOT_BY_LAYER = re.compile(r".*(token_id|token_ids|architectures)")


def without_further_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose layers that predict further tokens are gone.

    Their count becomes 0 under every name it goes by, and lists with an entry for every layer lose
    those of theirs.
    """
    text = config.get("text_config")
    fields = {**config, **(text if isinstance(text, dict) else {})}
    n_layers, n_further = fields.get("num_hidden_layers"), max(_counts(fields), default=0)
    length = n_layers + n_further if isinstance(n_layers, int) and n_further else None
    edited = _edited(config, length, n_further)
    if not any(map(_COUNT.fullmatch, (*fields, *_nested(fields)))):
        (edited["text_config"] if isinstance(text, dict) else edited)[_DEFAULT] = 0
    return edited


def _counts(fields: Mapping[str, Any]) -> list[int]:
    both = (*fields.items(), *_nested(fields).items())
    return [value for key, value in both if _COUNT.fullmatch(key) and type(value) is int]


def _nested(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    found = fields.get("mtp_config")
    return found if isinstance(found, dict) else {}


def _edited(config: Mapping[str, Any], length: int | None, n_further: int) -> dict[str, Any]:
    edited: dict[str, Any] = {}
    for key, value in config.items():
        if key in _PARTS and isinstance(value, dict):
            edited[key] = _edited(value, length, n_further)
        elif _COUNT.fullmatch(key) and type(value) in (int, type(None)):
            edited[key] = 0
        elif key in _SWITCHES:
            edited[key] = False
        elif isinstance(value, list) and len(value) == length and not _NOT_BY_LAYER.fullmatch(key):
            edited[key] = value[:-n_further]
        else:
            edited[key] = value
    return edited
