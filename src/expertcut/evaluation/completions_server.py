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
class Server:
    """An address; with `is_shared` several models of one run are asked there, each by its name."""

    url: str  # in any of the usual spellings
    is_shared: bool = False

    @property
    def api(self) -> str:
        """The address up to /v1; else a SettingsError."""
        try:
            parts = urlsplit(self.url)
            is_web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_web = False
        if not is_web or parts.query or parts.fragment:
            raise SettingsError(
                f"--base-url {without_secrets(self.url)[:200]!a} is no address of a server: give "
                "it as http://localhost:8000/v1"
            )
        base = self.url.rstrip("/").removesuffix("/completions")
        return base if base.endswith("/v1") else f"{base}/v1"

    def model_name(self, names: Sequence[str]) -> str:
        """The served model that has one of the names, else the only one."""
        models: Any = _ask(f"{self.api}/models").get("data")
        entries = [m for m in models if isinstance(m, dict)] if isinstance(models, list) else []
        served: list[str] = [m["id"] for m in entries if isinstance(m.get("id"), str)]
        if found := next((name for name in names if name in served), None):
            return found
        if len(served) == 1 and not self.is_shared:
            return served[0]
        raise ModelError(
            f"{without_secrets(self.api)} serves {', '.join(served)[:200] or 'no model'}, not "
            f"{names[0]}: give the --base-url of a server of this model"
        )


@dataclass(frozen=True)
class CompletionsServer:
    """One model of a server; `model` is its name there."""

    server: Server
    model: str
    max_new_tokens: int
    temperature: float
    encode: Encode

    @property
    def runs_as(self) -> dict[str, str | int | None]:
        """Where the outputs come from; the server says no more."""
        return {"url": without_secrets(self.server.api), "model": self.model}

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
        answer = _ask(f"{self.server.api}/completions", body)
        try:
            by_index = {c["index"]: (c["text"], c["finish_reason"]) for c in answer["choices"]}
            found = [by_index[i] for i in range(len(prompts))]
            if not all(isinstance(text, str) and isinstance(end, str) for text, end in found):
                raise TypeError
        except (KeyError, TypeError):
            raise ModelError(
                f"{without_secrets(self.server.api)} answers without index, text and finish_reason "
                f"for each of the {len(prompts)} prompts: it must speak OpenAI's /v1/completions"
            ) from None
        return [Output(tuple(self.encode(text)), text, end != "length") for text, end in found]


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
