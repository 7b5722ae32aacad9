"""The one modelling file that checkpoints of layout `exact` carry, and how it is known again.

What is byte for byte the file of this package is our own code and no stranger's, so it runs
without `--trust-remote-code`.
"""

from pathlib import Path
from typing import Any

MODELLING_FILE = "modeling_exact.py"


def modelling_code() -> bytes:
    """The file that goes into the checkpoint."""
    return Path(__file__).with_name(MODELLING_FILE).read_bytes()


def runs_our_code_only(folder: Path, config: dict[str, Any]) -> bool:
    """Whether all code that config.json asks for is the modelling file of this package."""
    named = config.get("auto_map")
    if not isinstance(named, dict) or not named:
        return False
    module = MODELLING_FILE.removesuffix(".py")
    # A name with `--` before it is a class of another repository.
    if any(not isinstance(c, str) or c.rpartition(".")[0] != module for c in named.values()):
        return False
    file = folder / MODELLING_FILE
    return file.is_file() and file.read_bytes() == modelling_code()
