"""What the Hub, or the way to it, refuses, in one line each: what, found, do; never a token."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from expertcut.errors import HubError
from expertcut.files import HIDDEN, without_secrets
from expertcut.publishing.card.markup import printable

# The base of all errors of the HTTP library below, which is another in other versions.
TransportError: type[Exception] = HfHubHTTPError.__bases__[0]

AGAIN = "run the same command again: what is uploaded already stays"
_BEARER = re.compile(r"(?i:bearer)\s+\S+")
_MOST_CHARACTERS = 200
# By HTTP status; what is not here is said with its number alone.
_MEANINGS = {
    401: "the Hub does not know the token: log in with `hf auth login`, or set HF_TOKEN",
    402: "the Hub wants to be paid for this: see the storage and plan of {owner}",
    403: "the token may not do this: take one that may write to {repo}, or another owner",
    404: "there is no {repo} that this token may see: check owner, name and --revision",
    409: f"{{repo}} is being changed by someone else: {AGAIN}",
    412: f"{{repo}} was changed by someone else meanwhile: {AGAIN}",
    413: "a file is larger than the Hub takes: export smaller shards, or ask the Hub for more room",
    429: f"too many requests: wait some minutes, then {AGAIN}",
}


@contextmanager
def in_words(step: str, repo: str, token: str | None = None) -> Iterator[None]:
    """Errors of the Hub become one line that begins with the step.

    Raises:
        HubError: the Hub, or the way to it, refused.
    """
    try:
        yield
    except (HfHubHTTPError, TransportError, OSError, ValueError, RuntimeError) as error:
        # A fault while a file goes up comes wrapped, and a fault of ours does not.
        cause: BaseException = error
        if isinstance(error, RuntimeError):
            if not isinstance(error.__cause__, (TransportError, OSError)):
                raise
            cause = error.__cause__
        text = f"{step} failed: {_said(cause, repo)}"
        raise HubError(_without_token(text, token)) from None


def _said(error: BaseException, repo: str) -> str:
    if isinstance(error, HfHubHTTPError):
        return _of_status(error, repo)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked: unset it"
    if isinstance(error, HFValidationError):
        return f"{repo} is no name that the Hub takes: {_short(str(error))}"
    if isinstance(error, json.JSONDecodeError):
        return f"the Hub answered something that is no JSON: {AGAIN}"
    if isinstance(error, ValueError):
        return f"the Hub refused it: {_short(str(error))}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read: {error.strerror}"
    return f"the connection broke ({type(error).__name__}): {AGAIN}"


def _of_status(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    # 401 is also the answer for what does not exist, or is private and of others.
    is_credential = error.response.headers.get("X-Error-Message", "").startswith("Invalid cred")
    if isinstance(error, RepositoryNotFoundError) and status == 401 and not is_credential:
        meaning = _MEANINGS[404] + "; if it exists, the token is wrong: `hf auth login`"
    elif status >= 500:
        meaning = f"the Hub has a fault of its own: {AGAIN}"
    else:
        meaning = _MEANINGS.get(status, f"the Hub refuses it: {AGAIN}")
    said = _short(error.server_message or "")
    meaning = meaning.replace("{repo}", repo).replace("{owner}", repo.split("/")[0])
    return f"{status}{f' ({said})' if said else ''}: {meaning}"


def _short(text: str) -> str:
    """A server's words in one printable line."""
    line = printable(text)
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"


def _without_token(text: str, token: str | None) -> str:
    return _BEARER.sub(HIDDEN, without_secrets(text.replace(token, HIDDEN) if token else text))


@contextmanager
def warnings_kept() -> Iterator[list[Any]]:
    """What `huggingface_hub` warns of while the block runs, for saying it afterwards."""
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        yield kept
