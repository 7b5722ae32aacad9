"""The one modelling file that checkpoints of layout `exact` carry, and how it is known again.

What is byte for byte the file of this package, or of an earlier version of it, is our own code and
no stranger's, so it runs without `--trust-remote-code`.
"""

import hashlib
from pathlib import Path
from typing import Any

from expertcut.errors import ModelError
from expertcut.moe.stored.headers import INDEX_FILE, SINGLE_FILE

MODELLING_FILE = "modeling_exact.py"
# SHA-256 of the files in checkpoints whose constants are called `experts.<id>.approx_value`.
_EARLIER_FILES = frozenset(
    {
        "315247a9829be5c0b9698b9adeeba7f970089367f5862d97fe38a41d04a01ace",
        "4305f98b4a520ff0b5be793cfda7755250bb42668f257c682e42d17e7d502108",
    }
)
_WEIGHTS = "transformers_weights"  # names the file of the weights, in transformers 5
_IMPLEMENTATIONS = (
    *("attn_implementation", "_attn_implementation"),
    *("experts_implementation", "_experts_implementation"),
)


def modelling_code() -> bytes:
    """The file that goes into the checkpoint."""
    return Path(__file__).with_name(MODELLING_FILE).read_bytes()


def runs_our_code_only(folder: Path, config: dict[str, Any]) -> bool:
    """Whether all code that config.json asks for is a modelling file of this package."""
    named = config.get("auto_map")
    if not isinstance(named, dict) or not named:
        return False
    module = MODELLING_FILE.removesuffix(".py")
    # A name with `--` before it is a class of another repository.
    if any(not isinstance(c, str) or c.rpartition(".")[0] != module for c in named.values()):
        return False
    file = folder / MODELLING_FILE
    if not file.is_file():
        return False
    content = file.read_bytes()
    return content == modelling_code() or hashlib.sha256(content).hexdigest() in _EARLIER_FILES


def check_named(folder: Path, config: dict[str, Any]) -> None:
    """That config.json names no other weights than those that are checked, and no kernels.

    Kernels are code that transformers would fetch from the Hub and run without being asked.

    Raises:
        ModelError: it does.
    """
    file, weights = folder / "config.json", config.get(_WEIGHTS)
    if weights not in (None, SINGLE_FILE, INDEX_FILE):
        raise ModelError(f"{file} says {_WEIGHTS} {str(weights)[:100]!r}: must be {SINGLE_FILE}")
    for part in (config, config.get("text_config")):
        for name in _IMPLEMENTATIONS:
            named = part.get(name) if isinstance(part, dict) else None
            for value in named.values() if isinstance(named, dict) else (named,):
                if value is not None and not (isinstance(value, str) and value.isidentifier()):
                    raise ModelError(
                        f"{file} says {name} {str(value)[:100]!r}, which is code of others: "
                        "take that line out"
                    )
