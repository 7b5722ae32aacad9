"""What transformers, tokenizers and safetensors raise, in the words of this tool."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertcut.errors import ExpertcutError, ModelError

BRINGS_CODE = "brings code of its own: read that, then --trust-remote-code"
_MAX_REASON = 300


@contextmanager
def refusals_of(name: str, file: Path) -> Iterator[None]:
    """Whatever a class of transformers raises on a stranger's files is the fault of the files.

    It raises nearly every class of error there is, so that no list would be whole.

    Raises:
        ModelError: it was raised.
    """
    try:
        yield
    except ExpertcutError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            error = ValueError(f"it {BRINGS_CODE}")
        if "provide an `offload_folder`" in str(error):
            error = ValueError("it fits in no memory: name a folder for the rest with --offload")
        reason = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        raise ModelError(f"{file} cannot be loaded by {name}: {reason}") from error
