"""A Hub on loopback: real HTTP, as much of the API as downloads ask for, folders as repositories.

    with LocalHub() as hub:
        hub.add("models", "owner/name", folder)
        subprocess.run(..., env=hub.environment(hf_home))
    assert "/api/models/owner/name" in hub.asked

A repository has one revision, its commit, also called main. What is not there is answered as the
Hub does: 404 and an `X-Error-Code`, from which huggingface_hub makes its exceptions.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["models", "datasets"]

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_HUGGING_FACE = ("HF_", "HUGGING", "TRANSFORMERS_")  # no token, cache or offline switch goes on


class NotOnHubError(Exception):
    """What the Hub would answer with 404; `code` is its X-Error-Code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; a HEAD request gets it without its body."""

    body: bytes
    headers: dict[str, str]
    status: int = 200


@dataclass(frozen=True)
class Repository:
    """A folder under an id; its commit is a hash of what it holds, where none is given."""

    kind: Kind
    id: str
    folder: Path
    given_commit: str | None = None

    @cached_property
    def commit(self) -> str:
        return self.given_commit or _sha1(json.dumps(self.blobs, sort_keys=True).encode())

    @cached_property
    def blobs(self) -> dict[str, str]:
        """The git object id of every file, by path."""
        files = sorted(p for p in self.folder.rglob("*") if p.is_file())
        return {p.relative_to(self.folder).as_posix(): _blob_id(p.read_bytes()) for p in files}

    def check(self, revision: str) -> None:
        if revision not in ("main", self.commit):
            raise NotOnHubError("RevisionNotFound", f"Invalid rev id: {revision}")

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in self.blobs]
        return {"id": self.id, "sha": self.commit, "private": False, "siblings": siblings}

    def entries(self, path: str) -> list[dict[str, Any]]:
        """The file or folder itself, as in `paths-info`; none where nothing is there."""
        place = self.folder / path
        if path in self.blobs:
            size = place.stat().st_size
            return [{"type": "file", "path": path, "size": size, "oid": self.blobs[path]}]
        if place.is_dir():
            return [{"type": "directory", "path": path, "size": 0, "oid": _sha1(path.encode())}]
        return []

    def tree(self, path: str, *, is_recursive: bool) -> Iterator[dict[str, Any]]:
        """What lies in a folder, as in `tree`.

        Raises:
            NotOnHubError: it is no folder.
        """
        place = self.folder / path
        if not place.is_dir():
            raise NotOnHubError("EntryNotFound", f"{path} does not exist")
        for found in sorted(place.rglob("*") if is_recursive else place.iterdir()):
            yield from self.entries(found.relative_to(self.folder).as_posix())

    def read(self, path: str) -> bytes:
        """A file's content.

        Raises:
            NotOnHubError: it is no file.
        """
        if path not in self.blobs:
            raise NotOnHubError("EntryNotFound", f"{path} does not exist")
        return (self.folder / path).read_bytes()


class LocalHub:
    """The server; it runs while the `with` lasts. `asked` lists the path of every request."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, kind: Kind, id: str, folder: Path, commit: str | None = None) -> Repository:
        """Serves a folder as it is now, in place of what had the id before."""
        repository = Repository(kind, id, folder, commit)
        self._repositories[kind, id] = repository
        return repository

    def find(self, kind: str, id: str, revision: str) -> Repository:
        """The repository.

        Raises:
            NotOnHubError: it is not here, or not in this revision.
        """
        if (kind, id) not in self._repositories:
            raise NotOnHubError("RepoNotFound", "Repository not found")
        repository = self._repositories[kind, id]
        repository.check(revision)
        return repository

    def environment(self, hf_home: Path, *, is_offline: bool = False) -> dict[str, str]:
        """A process's environment in which this is the Hub and `hf_home` the only cache."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_HUGGING_FACE)}
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(hf_home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if is_offline else {}),
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client may leave its connection open
    hub: LocalHub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _respond(self) -> None:
        path = urlsplit(self.path).path
        self.server.hub.asked.append(unquote(path))
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            answer = self._resolved(path) or self._told(path, parse_qs(sent.decode()))
        except NotOnHubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            answer = Answer(b"", headers, 404)
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = _respond

    def _resolved(self, path: str) -> Answer | None:
        """The file that a `resolve` address asks for, None for another address."""
        match = _RESOLVE.fullmatch(path)
        if match is None:
            return None
        prefix, id, revision, file = (unquote(part or "") for part in match.groups())
        kind = "datasets" if prefix else "models"
        return self._file(self.server.hub.find(kind, id, revision), file)

    def _told(self, path: str, sent: dict[str, list[str]]) -> Answer:
        """What the API says of a repository."""
        match = _API.fullmatch(path)
        if match is None:
            raise NotOnHubError("NotFound", f"the local hub does not know {path}")
        kind, id, what, revision, place = (unquote(part or "") for part in match.groups())
        repository = self.server.hub.find(kind, id, revision or "main")
        if what in ("", "revision"):
            return _json(repository.info())
        if what == "tree":
            is_recursive = "recursive=true" in urlsplit(self.path).query.lower()
            return _json(list(repository.tree(place, is_recursive=is_recursive)))
        if what == "paths-info":
            return _json([e for asked in sent.get("paths", []) for e in repository.entries(asked)])
        raise NotOnHubError("NotFound", f"the local hub does not know {path}")

    def _file(self, repository: Repository, path: str) -> Answer:
        content = repository.read(path)
        headers = {
            "ETag": f'"{repository.blobs[path]}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        part = _RANGE.fullmatch(self.headers.get("Range", ""))
        if part is None:
            return Answer(content, headers)
        first, last = int(part[1]), int(part[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Answer(content[first : last + 1], headers, 206)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `LocalHub.asked` is the log."""


def _json(content: object) -> Answer:
    return Answer(json.dumps(content).encode(), {"Content-Type": "application/json"})


def _blob_id(content: bytes) -> str:
    return _sha1(b"blob %d\0" % len(content) + content)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
