"""What transformers, tokenizers and safetensors raise, in the words of this tool."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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
        with _panics_as_errors():
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


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic in Rust, which is no Exception, becomes a ValueError, without its lines on stderr.

    Whatever else is written there comes when the block ends.
    """
    with tempfile.TemporaryFile() as said:
        own = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # pyo3 has no name to import it by
                raise
            said.truncate(0)
            raise ValueError(str(error)) from None
        finally:
            os.dup2(own, 2)
            os.close(own)
            said.seek(0)
            with suppress(OSError):  # what cannot be said stops nothing
                os.write(2, said.read())


def check_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """That transformers knows how the weights are quantized; else it takes them as they are.

    Raises:
        ModelError: it does not.
    """
    quantized = config.get("quantization_config")
    if quantized is None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # takes a while

    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"{folder / 'config.json'} says quantization_config with the unknown method "
            f"{str(method)[:50]}: take the bf16, f16 or f32 weights instead"
        )
