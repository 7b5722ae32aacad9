"""What uploads ask of the Hub: create, validate, preupload, LFS batch, put, commit; and faults."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import yaml

from tests.support.fake_hub.answers import Answer, NotAllowedError, json_answer
from tests.support.fake_hub.repositories import MAIN, NotOnHubError, Repository, Snapshot

TOKEN = "hf_secretsecretsecretsecretsecret"
OWNERS = ("birds", "clocks")  # whose repositories the token may write
NEW = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
_CARD = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
_STEPS = {
    "create": r"POST /api/repos/create",
    "validate": r"POST /api/validate-yaml",
    "look": r"GET /api/models/[^/]+/[^/]+",
    "branch": r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)",
    "preupload": r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)",
    "batch": r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "put": r"PUT /storage/([0-9a-f]{64})",
    "commit": r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)",
}
_COUNTING = threading.Lock()
STEPS = {name: re.compile(pattern) for name, pattern in _STEPS.items()}


@dataclass(frozen=True)
class Request:
    """One request; `is_known` says whether it carries the right token."""

    method: str
    path: str
    body: bytes
    authorization: str | None

    @property
    def is_known(self) -> bool:
        return self.authorization == f"Bearer {TOKEN}"


@dataclass
class Fault:
    """A step that fails so many times: with a status, or, without one, by a cut connection.

    The first `after` requests of that step go well.
    """

    step: str
    status: int | None = None
    times: int = 1
    message: str = ""
    after: int = 0

    def is_due(self, method: str, path: str) -> bool:
        if STEPS[self.step].fullmatch(f"{method} {path}") is None:
            return False
        with _COUNTING:
            is_it = self.after <= 0 < self.times
            self.after -= 1
            self.times -= is_it
        return is_it

    def answer(self) -> Answer:
        assert self.status is not None
        return json_answer({"error": self.message} if self.message else {}, self.status)


@dataclass
class Uploads:
    """The writing half of the Hub; `storage` keeps large files by SHA-256, committed or not."""

    repositories: dict[tuple[str, str], Repository]
    storage: dict[str, bytes] = field(default_factory=dict)
    bytes_put: int = 0

    def answer(self, request: Request, url: str) -> Answer | None:
        """What a writing request gets, None for one that is not of this half.

        Raises:
            NotAllowedError: it may not do that.
            NotOnHubError: there is nothing of that name.
        """
        ways: dict[str, Callable[..., Answer]] = {
            "create": self._create,
            "validate": self._validate,
            "branch": self._branch,
            "preupload": self._preupload,
            "batch": self._batch,
            "put": self._put,
            "commit": self._commit,
        }
        for step, way in ways.items():
            if found := STEPS[step].fullmatch(f"{request.method} {request.path}"):
                if not request.is_known and step not in ("put", "validate"):
                    raise NotAllowedError(401, "Invalid credentials in Authorization header")
                return way(request, url, *map(unquote, found.groups()))
        return None

    def _create(self, request: Request, url: str) -> Answer:
        asked = json.loads(request.body)
        id = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in OWNERS:
            raise NotAllowedError(403, f"You don't have the rights to create a model under {id}")
        if ("models", id) in self.repositories:
            return json_answer({"error": "You already created this model repo"}, 409)
        is_private = asked.get("visibility") == "private"
        made = Repository("models", id, {MAIN: Snapshot(NEW)}, is_private)
        self.repositories["models", id] = made
        return json_answer({"url": f"{url}/{id}", "name": id})

    def _validate(self, request: Request, url: str) -> Answer:
        """The part of the Hub's own rules that a card of ours could break."""
        errors = list(card_faults(json.loads(request.body)["content"]))
        told = {"errors": [{"message": e} for e in errors], "warnings": []}
        return json_answer(told, 400 if errors else 200)

    def _branch(self, request: Request, url: str, id: str, branch: str) -> Answer:
        repository = self._writable(id)
        start = json.loads(request.body or b"{}").get("startingPoint", MAIN)
        if branch in repository.branches:
            raise NotAllowedError(409, "Reference already exists")
        repository.branches[branch] = repository.at(start)
        return json_answer({})

    def _preupload(self, request: Request, url: str, id: str, revision: str) -> Answer:
        at, told = self._writable(id).at(revision), []
        ignored = at.files.get(".gitignore", b"").decode().split()
        for file in json.loads(request.body)["files"]:
            path = file["path"]
            is_large = path.endswith(".safetensors")
            content = at.files.get(path)
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if is_large else at.blobs[path]
            mode = "lfs" if is_large else "regular"
            told.append(
                {"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, "oid": oid}
            )
        return json_answer({"files": told})

    def _batch(self, request: Request, url: str, id: str) -> Answer:
        self._writable(id)
        told: list[dict[str, Any]] = []
        for asked in json.loads(request.body)["objects"]:
            upload = {"href": f"{url}/storage/{asked['oid']}"}
            there = asked["oid"] in self.storage
            told.append({**asked, **({} if there else {"actions": {"upload": upload}})})
        return json_answer({"transfer": "basic", "objects": told})

    def _put(self, request: Request, url: str, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise NotAllowedError(400, "these are other bytes")
        self.bytes_put += len(request.body)
        self.storage[oid] = request.body
        return Answer(b"", {})

    def _commit(self, request: Request, url: str, id: str, revision: str) -> Answer:
        repository = self._writable(id)
        lines = [json.loads(line) for line in request.body.splitlines()]
        head, changes = lines[0]["value"], [(line["key"], line["value"]) for line in lines[1:]]
        before = repository.at(revision)
        if head.get("parentCommit", before.commit) != before.commit:
            raise NotAllowedError(412, "A commit has happened since. Please refresh and try again.")
        files, lfs = dict(before.files), set(before.lfs)
        for key, value in changes:
            if key == "deletedFile":
                files.pop(value["path"])
                lfs.discard(value["path"])
                continue
            is_large = key == "lfsFile"
            if is_large and value["oid"] not in self.storage:
                raise NotAllowedError(400, f"{value['path']} was not uploaded")
            content = self.storage[value["oid"]] if is_large else base64.b64decode(value["content"])
            files[value["path"]] = content
            (lfs.add if is_large else lfs.discard)(value["path"])
        repository.advance(revision, Snapshot(files, frozenset(lfs)))
        oid = repository.at(revision).commit
        done = {"success": True, "commitOid": oid, "commitUrl": f"{url}/{id}/commit/{oid}"}
        return json_answer(done)

    def _writable(self, id: str) -> Repository:
        if ("models", id) not in self.repositories:
            raise NotOnHubError("RepoNotFound", "Repository not found")
        if id.split("/")[0] not in OWNERS:
            raise NotAllowedError(403, f"You have no write access to {id}")
        return self.repositories["models", id]


def card_faults(content: str) -> list[str]:
    """What the Hub would find wrong with a card's metadata."""
    head = _CARD.search(content)
    try:
        data = yaml.safe_load(head[2]) if head else {}
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    results = [r for model in data.get("model-index", ()) for r in model["results"]]
    found = {
        '"license" must be a string': not isinstance(data.get("license", "mit"), str),
        '"base_model_relation" must be one of the known ones': data.get(
            "base_model_relation", "finetune"
        )
        not in RELATIONS,
        '"model-index[0].name" is required': not all(
            model.get("name") for model in data.get("model-index", ())
        ),
        '"model-index[0].results" lacks a part': not all(
            r["task"]["type"] and r["dataset"]["type"] and r["dataset"]["name"] and r["metrics"]
            for r in results
        ),
    }
    return [fault for fault, is_there in found.items() if is_there]
