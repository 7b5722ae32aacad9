"""From a folder or a hub id to a model whose experts can be watched and whose bytes are known."""

from expertcut.moe.loading.models import LoadOptions, MoeModel, fits_in_memory, load
from expertcut.moe.loading.own_code import MODELLING_FILE, modelling_code
from expertcut.moe.loading.sources import Source, find_source
from expertcut.moe.stored.counts import EXPERT_COUNT_FIELDS, expert_count
from expertcut.moe.stored.objects import read_config

__all__ = [
    "EXPERT_COUNT_FIELDS",
    "MODELLING_FILE",
    "LoadOptions",
    "MoeModel",
    "Source",
    "expert_count",
    "find_source",
    "fits_in_memory",
    "load",
    "modelling_code",
    "read_config",
]
