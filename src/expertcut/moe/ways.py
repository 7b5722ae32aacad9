"""Which way of scoring suits a model and the lengths of its prompts."""

from collections.abc import Iterator
from typing import Any, Literal

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Way = Literal["packed", "padded", "single"]


def suitable_way(config: Any, longest: int) -> Way:
    """How prompts of at most this length are scored: a function of them and the model alone."""
    if _rope_depends_on_length(config, longest) or _attention_is_sparse(config, longest):
        return "single"
    return "packed" if _sees_everything(config, longest) else "padded"


def _attention_is_sparse(config: Any, longest: int) -> bool:
    """Whether an index picks the tokens that are attended to (DeepSeek-V3.2, GLM-5, ...).

    Pads and neighbours would be among those that it picks from.
    """
    most = getattr(config.get_text_config(decoder=True), "index_topk", None)
    return most is not None and longest > most


def _sees_everything(config: Any, longest: int) -> bool:
    """True where every layer attends to all tokens before it, and positions can restart."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "alibi", False) or getattr(text, "attention_chunk_size", None):
        return False
    return all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= longest)
        for layer in DynamicCache(config=config).layers
    )


def _rope_depends_on_length(config: Any, longest: int) -> bool:
    if grows_with_prompt(config):
        return True
    text = config.get_text_config(decoder=True)
    long = [rope for rope in _ropes(text) if "longrope" in rope["rope_type"]]
    limits = [
        rope.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for rope in long
    ]
    return any(longest > limit for limit in limits)


def grows_with_prompt(config: Any) -> bool:
    """Whether positions are scaled to whatever length a prompt has: the context has no end."""
    text = config.get_text_config(decoder=True)
    return any("dynamic" in rope["rope_type"] for rope in _ropes(text))


def _ropes(text: Any) -> list[dict[str, Any]]:
    return list(_rope_settings(getattr(text, "rope_parameters", None) or {}))


def _rope_settings(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One mapping per kind of layer where a model has several, else the one."""
    if "rope_type" in parameters:
        yield parameters
    for value in parameters.values():
        if isinstance(value, dict):
            yield from _rope_settings(value)


def reset_rope(model: Any) -> None:
    """Back to the frequencies of a fresh model: a dynamic RoPE remembers the longest prompt."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "max_seq_len_cached"):
            module.inv_freq = module.original_inv_freq
            module.max_seq_len_cached = module.original_max_seq_len
