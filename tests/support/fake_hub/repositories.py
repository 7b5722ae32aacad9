"""Repositories of the local Hub: branches of files, each with a commit that is a hash of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Kind = Literal["models", "datasets"]
MAIN = "main"


class NotOnHubError(Exception):
    """What the Hub would answer with 404; `code` is its X-Error-Code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit; `lfs` are those that lie in large file storage."""

    files: Mapping[str, bytes]
    lfs: frozenset[str] = frozenset()
    given_commit: str | None = None

    @classmethod
    def of(cls, folder: Path, commit: str | None = None) -> "Snapshot":
        """A folder as it is now."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        content = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
        return cls(content, given_commit=commit)

    @cached_property
    def commit(self) -> str:
        return self.given_commit or sha1(json.dumps(self.blobs, sort_keys=True).encode())

    @cached_property
    def blobs(self) -> dict[str, str]:
        """The git object id of every file, by path."""
        return {path: blob_id(content) for path, content in self.files.items()}

    def entries(self, path: str) -> list[dict[str, Any]]:
        """The file or folder itself, as in `paths-info`; none where nothing is there."""
        if path in self.files:
            size = len(self.files[path])
            return [{"type": "file", "path": path, "size": size, "oid": self.blobs[path]}]
        if any(name.startswith(f"{path}/") for name in self.files):
            return [{"type": "directory", "path": path, "size": 0, "oid": sha1(path.encode())}]
        return []

    def tree(self, path: str, *, is_recursive: bool) -> Iterator[dict[str, Any]]:
        """What lies in a folder, as in `tree`.

        Raises:
            NotOnHubError: it is no folder.
        """
        prefix = f"{path}/" if path else ""
        below = [n.removeprefix(prefix).split("/") for n in self.files if n.startswith(prefix)]
        if not below:
            raise NotOnHubError("EntryNotFound", f"{path} does not exist")
        depths = (range(1, len(parts) + 1) if is_recursive else [1] for parts in below)
        found = {
            "/".join(parts[:depth])
            for parts, its in zip(below, depths, strict=True)
            for depth in its
        }
        for name in sorted(found):
            yield from self.entries(prefix + name)

    def read(self, path: str) -> bytes:
        """A file's content.

        Raises:
            NotOnHubError: it is no file.
        """
        if path not in self.files:
            raise NotOnHubError("EntryNotFound", f"{path} does not exist")
        return self.files[path]


@dataclass
class Repository:
    """A name on the Hub, and what its branches and earlier commits hold."""

    kind: Kind
    id: str
    branches: dict[str, Snapshot]
    is_private: bool = False
    earlier: dict[str, Snapshot] = field(default_factory=dict)

    def at(self, revision: str) -> Snapshot:
        """A branch or a commit.

        Raises:
            NotOnHubError: neither.
        """
        commits = {s.commit: s for s in self.branches.values()} | self.earlier
        found = self.branches.get(revision) or commits.get(revision)
        if found is None:
            raise NotOnHubError("RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def advance(self, branch: str, snapshot: Snapshot) -> None:
        """Puts a new commit on a branch."""
        before = self.branches[branch]
        self.earlier[before.commit] = before
        self.branches[branch] = snapshot

    def info(self, revision: str) -> dict[str, Any]:
        at = self.at(revision)
        siblings = [{"rfilename": path} for path in at.files]
        private = self.is_private
        return {"id": self.id, "sha": at.commit, "private": private, "siblings": siblings}


def blob_id(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content)


def sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
