"""A Hub on loopback: real HTTP, as much of the API as downloads and uploads ask for.

    with LocalHub() as hub:
        hub.add("models", "owner/name", folder)
        subprocess.run(..., env=hub.environment(hf_home))
    assert "/api/models/owner/name" in hub.asked

What is not there is answered as the Hub does: 404 and an `X-Error-Code`, from which
huggingface_hub makes its exceptions.
"""

import hashlib
import os
import re
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.fake_hub.answers import Answer, NotAllowedError, json_answer
from tests.support.fake_hub.repositories import MAIN, Kind, NotOnHubError, Repository, Snapshot
from tests.support.fake_hub.uploads import Fault, Request, Uploads

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_HUGGING_FACE = ("HF_", "HUGGING", "TRANSFORMERS_")  # no token, cache or offline switch goes on


class LocalHub:
    """The server; it runs while the `with` lasts. `asked` lists the path of every request.

    `faults` come instead of answers, each as often as it says.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.faults: list[Fault] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploads = Uploads(self.repositories)
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
        repository = Repository(kind, id, {MAIN: Snapshot.of(folder, commit)})
        self.repositories[kind, id] = repository
        return repository

    def files(self, id: str, revision: str = MAIN) -> Mapping[str, bytes]:
        """What a model's repository holds."""
        return self.repositories["models", id].at(revision).files

    def commit(self, id: str, revision: str = MAIN) -> str:
        """The commit of a model's branch."""
        return self.repositories["models", id].at(revision).commit

    def find(self, kind: str, id: str, request: Request) -> Repository:
        """The repository.

        Raises:
            NotOnHubError: it is not here, or private and the token is not the right one.
        """
        repository = self.repositories.get((kind, id))
        if repository is None or (repository.is_private and not request.is_known):
            raise NotOnHubError("RepoNotFound", "Repository not found")
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

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a connection that a fault cut."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for an acknowledgement
    wbufsize = 1 << 16
    server: _Server

    def _respond(self) -> None:
        path = urlsplit(self.path).path
        hub = self.server.hub
        hub.asked.append(unquote(path))
        n_bytes = int(self.headers.get("Content-Length") or 0)
        fault = next((f for f in hub.faults if f.is_due(self.command, path)), None)
        if fault is not None and fault.status is None:  # the connection breaks on the way
            self.rfile.read(n_bytes // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        request = Request(
            self.command, path, self.rfile.read(n_bytes), self.headers.get("Authorization")
        )
        self._send(self._answer(request) if fault is None else fault.answer())

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    def _answer(self, request: Request) -> Answer:
        hub = self.server.hub
        try:
            changed = hub.uploads.answer(request, hub.url)
            return changed or self._resolved(request) or self._told(request)
        except NotOnHubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            return Answer(b"", headers, 404)
        except NotAllowedError as error:
            return Answer(b"", {"X-Error-Message": str(error)}, error.status)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _resolved(self, request: Request) -> Answer | None:
        """The file that a `resolve` address asks for, None for another address."""
        match = _RESOLVE.fullmatch(request.path)
        if match is None:
            return None
        prefix, id, revision, file = (unquote(part or "") for part in match.groups())
        kind = "datasets" if prefix else "models"
        return self._file(self.server.hub.find(kind, id, request).at(revision), file)

    def _told(self, request: Request) -> Answer:
        """What the API says of a repository."""
        match = _API.fullmatch(request.path)
        if match is None:
            raise NotOnHubError("NotFound", f"the local hub does not know {request.path}")
        kind, id, what, revision, place = (unquote(part or "") for part in match.groups())
        repository = self.server.hub.find(kind, id, request)
        at = repository.at(revision or MAIN)
        if what in ("", "revision"):
            return json_answer(repository.info(revision or MAIN))
        if what == "tree":
            is_recursive = "recursive=true" in urlsplit(self.path).query.lower()
            return json_answer(list(at.tree(place, is_recursive=is_recursive)))
        if what == "paths-info":
            paths = parse_qs(request.body.decode()).get("paths", [])
            return json_answer([entry for asked in paths for entry in at.entries(asked)])
        raise NotOnHubError("NotFound", f"the local hub does not know {request.path}")

    def _file(self, at: Snapshot, path: str) -> Answer:
        content = at.read(path)
        headers = {
            "ETag": f'"{at.blobs[path]}"',
            "X-Repo-Commit": at.commit,
            "Accept-Ranges": "bytes",
        }
        if path in at.lfs:
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
        part = _RANGE.fullmatch(self.headers.get("Range", ""))
        if part is None:
            return Answer(content, headers)
        first, last = int(part[1]), int(part[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Answer(content[first : last + 1], headers, 206)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `LocalHub.asked` is the log."""
