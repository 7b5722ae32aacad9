"""Tokens and passwords, found in text and left out of whatever is shown, logged or given away."""

import os
import re

_SECRET = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"  # tokens of the Hub
    r"|(?<=://)[^\s/@:\"'<>]*:[^\s/@\"'<>]+(?=@)"  # name and password in an address
)
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHORTEST = 8  # a value below would hide words
HIDDEN = "***"


def without_secrets(text: str) -> str:
    """The text with `***` where a token or a password stands."""
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    return _SECRET.sub(HIDDEN, text)


def line_with_secret(text: str) -> int | None:
    """The number of the first line that holds one, from 1; None where there is none."""
    for number, line in enumerate(text.splitlines(), start=1):
        if without_secrets(line) != line:
            return number
    return None
