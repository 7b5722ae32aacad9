"""Models that are whole and sound but of a kind that is not supported, refused with the reason."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expertcut.errors import ContractError, ModelError

_ZERO_EXPERTS = "zero_expert_num"  # of LongCat
_NO_WEIGHTS = "not supported: has experts without weights (zero-computation experts)"
# By config.model_type, beside `expertcut.moe.contract.REFUSED`.
_UNSUPPORTED = {
    "longcat_flash": _NO_WEIGHTS,  # 256 of them where config.json does not say
    "zaya": f"{_NO_WEIGHTS}: its router can skip all experts",
    "doge": "not supported: its experts are rows of an embedding, not modules",
}
_OTHER_SENSES = ("vision_config", "audio_config")
_THINKER = "thinker_config"  # of the Omni models


def check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    """That config.json is not of a model whose experts are of an unsupported kind.

    Raises:
        ContractError: it is.
    """
    file, family = folder / "config.json", str(config.get("model_type"))[:50]
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        n_zero = part.get(_ZERO_EXPERTS)
        if isinstance(n_zero, int) and n_zero > 0:
            raise ContractError(f"{file}: {family} is {_NO_WEIGHTS}: {_ZERO_EXPERTS} {n_zero}")
    if config.get(_ZERO_EXPERTS) is None and family in _UNSUPPORTED:
        raise ContractError(f"{file}: {family} is {_UNSUPPORTED[family]}")


def check_text_model(folder: Path, config: Any) -> None:
    """That transformers has a text model for this config, as it reads it.

    Raises:
        ModelError: it has none, as of most vision-language models.
    """
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise not_a_text_model(folder, config.to_dict())


def not_a_text_model(folder: Path, config: Mapping[str, Any]) -> ModelError:
    """Says of what kind a model is that cannot be loaded as a text model."""
    family, senses = str(config.get("model_type"))[:50], set(_senses(config))
    kind = "a vision-language model" if senses == {"vision_config"} else "a multimodal model"
    what = kind if senses else "no text model that transformers can load (AutoModelForCausalLM)"
    return ModelError(
        f"{folder / 'config.json'}: {family} is {what}, not supported: take a text model"
    )


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes more than text."""
    return any(True for _ in _senses(config))


def _senses(config: Mapping[str, Any]) -> Iterator[str]:
    thinker = config.get(_THINKER)
    for part in (config, thinker if isinstance(thinker, dict) else {}):
        yield from (name for name in _OTHER_SENSES if isinstance(part.get(name), dict))
