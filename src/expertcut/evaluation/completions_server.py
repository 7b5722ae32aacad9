"""A server that speaks OpenAI's `/v1/completions`, such as vLLM's: tokens in, text out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from expertcut.errors import ModelError, SettingsError
from expertcut.evaluation.generation import Encode, Output
from expertcut.files import parse_json, without_secrets

_TIMEOUT_S = 3600.0  # of a batch
_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class CompletionsServer:
    """One model behind a URL; `model` is its name there."""

    url: str  # up to and with /v1
    model: str
    max_new_tokens: int
    temperature: float
    encode: Encode

    @property
    def runs_as(self) -> dict[str, str | int | None]:
        """Where the outputs come from; the server says no more."""
        return {"url": without_secrets(self.url), "model": self.model}

    def batches(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """16 prompts a request; sampled ones go alone, or all would share their random numbers."""
        n_most = 1 if self.temperature else 16
        starts = range(0, len(lengths), n_most)
        return [tuple(range(at, min(at + n_most, len(lengths)))) for at in starts]

    def complete(self, prompts: Sequence[tuple[int, ...]], seed: int) -> list[Output]:
        """An output for each prompt of token ids."""
        body = {
            "model": self.model,
            "prompt": [list(ids) for ids in prompts],
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            **({"seed": seed} if self.temperature else {}),
        }
        answer = _ask(f"{self.url}/completions", body)
        try:
            by_index = {c["index"]: (c["text"], c["finish_reason"]) for c in answer["choices"]}
            found = [by_index[i] for i in range(len(prompts))]
            if not all(isinstance(text, str) and isinstance(end, str) for text, end in found):
                raise TypeError
        except (KeyError, TypeError):
            raise ModelError(
                f"{self.url} answers without index, text and finish_reason for each of the "
                f"{len(prompts)} prompts: it must speak OpenAI's /v1/completions"
            ) from None
        return [Output(tuple(self.encode(text)), text, end != "length") for text, end in found]


def open_server(
    url: str, names: Sequence[str], max_new_tokens: int, temperature: float, encode: Encode
) -> CompletionsServer:
    """Asks a server for its models: the only one, or the one that has one of the names."""
    base = api_url(url)
    models: Any = _ask(f"{base}/models").get("data")
    ids = [
        m.get("id") if isinstance(m, dict) else None
        for m in (models if isinstance(models, list) else ())
    ]
    served = [name for name in ids if isinstance(name, str)]
    model = served[0] if len(served) == 1 else next((n for n in names if n in served), None)
    if model is None:
        raise ModelError(
            f"{base} serves {', '.join(served)[:200] or 'no model'}, not {names[0]}: give the URL "
            "of a server of this model"
        )
    return CompletionsServer(base, model, max_new_tokens, temperature, encode)


def api_url(url: str) -> str:
    """The address up to /v1, from any of the usual spellings; else a SettingsError."""
    try:
        parts = urlsplit(url)
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_web = False
    if not is_web or parts.query or parts.fragment:
        raise SettingsError(
            f"--base-url {without_secrets(url)[:200]!a} is no address of a server: give it as "
            "http://localhost:8000/v1"
        )
    base = url.rstrip("/").removesuffix("/completions")
    return base if base.endswith("/v1") else f"{base}/v1"


def _ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    shown = without_secrets(url)
    try:
        with urlopen(request, timeout=_TIMEOUT_S) as answer:
            content = answer.read(_MOST_BYTES + 1)
        found = parse_json(content)
    except HTTPError as error:
        said = " ".join(error.read(2000).decode(errors="replace").split())[:200]
        raise ModelError(f"{shown} answers {error.code} {error.reason}: {said}") from None
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise ModelError(f"{shown} cannot be reached: {reason}: is the server running?") from None
    except ValueError as error:
        raise ModelError(f"{shown} answers no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{shown} answers a {type(found).__name__}, must be a JSON object")
    return found
