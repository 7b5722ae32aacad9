"""The stage behind `publish`: check, write the card, upload to a repository on the Hub."""

import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from expertcut.edits.plan import PLAN_FILE, PlanFile, load_plan, plan_text
from expertcut.errors import HubError, PlanError, SettingsError
from expertcut.files import HIDDEN, advance, without_secrets, write_atomically
from expertcut.hub.card import Place, card_text, is_edited
from expertcut.hub.provenance import CARD_FILE, Checkpoint, Evaluated, evaluations, origin, verified
from expertcut.reporting.tables import one_line

logger = logging.getLogger(__name__)

_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
# The base error of the HTTP library, which differs between versions of huggingface_hub.
TransportError: type[Exception] = errors.HfHubHTTPError.__bases__[0]

AGAIN = "run the same command again: what is uploaded already stays"
_BEARER = re.compile(r"(?i:bearer)\s+\S+")
_MOST_CHARACTERS = 200
# By HTTP status.
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
_OF_THE_HUB = frozenset({".gitattributes"})
# Files of a repository that was created by hand on the Hub.
_OF_A_NEW_ONE = frozenset({"README.md", "LICENSE", ".gitignore"}) | _OF_THE_HUB
# Files that decide which weights are loaded; old ones must not stay beside new weights.
_DECIDING = (".safetensors", ".bin", ".index.json", ".py", ".pt", ".pth")
Content = Path | bytes


def _reason(error: BaseException, repo: str) -> str:
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        # 401 also means that it does not exist, or is private and belongs to others.
        is_missing = status == 401 and isinstance(error, errors.RepositoryNotFoundError)
        is_credential = error.response.headers.get("X-Error-Message", "").startswith("Invalid cred")
        if is_missing and not is_credential:
            meaning = _MEANINGS[404] + "; if it exists, the token is wrong: `hf auth login`"
        elif status >= 500:
            meaning = f"the Hub has an internal error: {AGAIN}"
        else:
            meaning = _MEANINGS.get(status, f"the Hub refuses it: {AGAIN}")
        said = _short(error.server_message or "")
        meaning = meaning.replace("{repo}", repo).replace("{owner}", repo.split("/")[0])
        return f"{status}{f' ({said})' if said else ''}: {meaning}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to reach the Hub"
    if isinstance(error, errors.HFValidationError):
        return f"{repo} is not a valid name on the Hub: {_short(str(error))}"
    if isinstance(error, json.JSONDecodeError):
        return f"the Hub's answer is not valid JSON: {AGAIN}"
    if isinstance(error, ValueError):
        return f"the Hub refused it: {_short(str(error))}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read: {error.strerror}"
    return f"the connection broke ({type(error).__name__}): {AGAIN}"


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"


@dataclass(frozen=True)
class Remote:
    """State of a repository: commit, files, and its plan if valid."""

    commit: str
    files: frozenset[str]
    is_private: bool
    plan: PlanFile | None


@dataclass(frozen=True)
class Repository:
    """A repository and revision on the Hub, and the account that writes to it."""

    api: HfApi
    id: str
    revision: str | None

    @contextmanager
    def in_words(self, step: str) -> Iterator[None]:
        """Turns errors of the Hub and of the connection into a HubError of one line."""
        try:
            yield
        except (errors.HfHubHTTPError, TransportError, OSError, ValueError, RuntimeError) as error:
            # A fault while a file goes up comes wrapped, and a fault of ours does not.
            cause: BaseException = error
            if isinstance(error, RuntimeError):
                if not isinstance(error.__cause__, (TransportError, OSError)):
                    raise
                cause = error.__cause__
            text = f"{step} {self.id} failed: {_reason(cause, self.id)}"
            text = without_secrets(text.replace(str(self.api.token), HIDDEN))
            raise HubError(_BEARER.sub(HIDDEN, text)) from None

    def look(self, revision: str | None = None) -> Remote | None:
        """Its state, None if the repository or revision does not exist."""
        with self.in_words("looking at"):
            try:
                info = self.api.model_info(self.id, revision=revision)
            except errors.RevisionNotFoundError:
                return None
            except errors.RepositoryNotFoundError as error:
                if error.response.status_code != 404:
                    raise
                return None
            files = frozenset(sibling.rfilename for sibling in info.siblings or ())
            commit, plan = str(info.sha), None
            if PLAN_FILE in files:
                with tempfile.TemporaryDirectory() as folder, suppress(PlanError):
                    self.api.hf_hub_download(self.id, PLAN_FILE, revision=commit, local_dir=folder)
                    plan = load_plan(Path(folder))
        return Remote(commit, files, bool(info.private), plan)

    def commit(
        self, files: Mapping[str, Content], gone: Sequence[str], parent: str, message: str
    ) -> str:
        """Uploads missing files and changes the repository in one commit; returns its id.

        Without changes that is the id of the previous commit. After an error the repository is
        unchanged; uploaded files stay for the next attempt.
        """
        advance(f"uploading to {self.id}", 0, 0)
        with self.in_words("uploading to"):
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name, is_folder=False) for name in gone),
            ]
            done = self.api.create_commit(
                self.id,
                operations,
                commit_message=message,
                revision=self.revision,
                parent_commit=parent,
            )
        return str(done.oid)

    def check_there(self, commit: str, files: Mapping[str, Content]) -> None:
        """Checks that a commit holds the files: the Hub drops those in its `.gitignore`."""
        remote = self.look(commit)
        if missing := sorted(set(files) - (remote.files if remote else frozenset())):
            raise HubError(
                f"{self.id} does not hold {', '.join(missing[:3])} after the upload: remove it "
                "from the repository's .gitignore, then run the same command again"
            )


def check_ours(remote: Remote, plan: PlanFile, repo: str, *, is_new_branch: bool) -> None:
    """Checks that a repository holds no other model than this checkpoint."""
    do = "name another repository, or replace what it holds with --force"
    if remote.files <= _OF_A_NEW_ONE:
        return
    if remote.plan is None:
        some = ", ".join(sorted(remote.files - _OF_A_NEW_ONE)[:3])
        raise HubError(f"{repo} holds something else ({some}) and no {PLAN_FILE} of ours: {do}")
    if remote.plan.model.fingerprint != plan.model.fingerprint:
        raise HubError(
            f"{repo} holds {remote.plan.action} of another base ({remote.plan.model.id}): {do}"
        )
    there, here = (
        (p.layout, p.removed, p.fold, p.apply_at, p.routing, p.blocks) for p in (remote.plan, plan)
    )
    if not is_new_branch and there != here:
        raise HubError(
            f"{repo} holds another checkpoint of this base ({remote.plan.action}), this is "
            f"{plan.action}: {do}, or give this one a --revision of its own"
        )


def stale(remote: Remote, kept: Mapping[str, Content], *, is_replacing: bool) -> tuple[str, ...]:
    """Files to delete: all others if replacing, else those that decide what is loaded."""
    others = sorted(remote.files - set(kept) - _OF_THE_HUB)
    return tuple(f for f in others if is_replacing or f.endswith(_DECIDING))


@dataclass(frozen=True)
class Published:
    """The result."""

    repo: str
    url: str
    card: Path
    is_card_kept: bool  # it was edited by hand and stays
    results: tuple[Path, ...]
    files: Mapping[str, int]  # by name, their sizes in bytes
    left_out: tuple[str, ...]  # files of the folder that do not belong to the checkpoint
    commit: str | None = None  # None in a dry run
    is_changed: bool = False
    gone: tuple[str, ...] = ()  # files deleted from the repository


def publish(
    folder: Path,
    repo: str,
    *,
    results: Sequence[Path] = (),
    revision: str | None = None,
    is_private: bool = False,
    is_forced: bool = False,
    is_dry: bool = False,
) -> Published:
    """Writes the card into the checkpoint's folder and uploads both; a second call resumes.

    `results` are files of `eval`; `is_dry` writes only the card.
    """
    _check_names(repo, revision)
    endpoint = HfApi().endpoint
    checkpoint = verified(folder)
    evaluated = evaluations(checkpoint, results)
    card, is_kept = _write_card(checkpoint, evaluated, Place(repo, revision, endpoint))
    files = _files(checkpoint, card, evaluated)
    sizes = {n: len(c) if isinstance(c, bytes) else c.stat().st_size for n, c in files.items()}
    prepared = Published(
        repo=repo,
        url=f"{endpoint}/{repo}" + (f"/tree/{revision}" if revision else ""),
        card=card,
        is_card_kept=is_kept,
        results=tuple(one.source for one in evaluated),
        files=sizes,
        left_out=checkpoint.left_out,
    )
    if is_dry:
        return prepared
    token = get_token()
    if token is None:
        raise SettingsError("no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN")
    repository = Repository(HfApi(token=token), repo, revision)
    parent, gone = _prepare(
        repository, checkpoint.plan, files, is_private=is_private, is_forced=is_forced
    )
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        commit = repository.commit(files, gone, parent, f"Publish {checkpoint.plan.action}")
        repository.check_there(commit, files)
    for warning in kept:
        logger.warning("%s", " ".join(str(warning.message).split()))
    return replace(prepared, commit=commit, is_changed=commit != parent, gone=gone)


def _check_names(repo: str, revision: str | None) -> None:
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise SettingsError(one_line(f"{repo!a} is not a valid name on the Hub: {error}")) from None
    if repo.count("/") != 1:
        raise SettingsError(f"{repo} must name owner and repository: OWNER/NAME")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise SettingsError(
            f"--revision {one_line(revision)} must be the name of a branch, like v2 or keep-32"
        )


def _write_card(
    checkpoint: Checkpoint, evaluated: tuple[Evaluated, ...], place: Place
) -> tuple[Path, bool]:
    """The card's file, and whether it was edited by hand."""
    file = checkpoint.folder / CARD_FILE
    if file.is_file() and is_edited(file.read_text(encoding="utf-8", errors="replace")):
        return file, True
    text = without_secrets(card_text(checkpoint, origin(checkpoint.folder), evaluated, place))
    write_atomically(file, text.encode())
    return file, False


def _files(checkpoint: Checkpoint, card: Path, results: Sequence[Evaluated]) -> dict[str, Content]:
    files: dict[str, Content] = {file.name: file for file in (card, *checkpoint.files)}
    plan, model = checkpoint.plan, checkpoint.plan.model
    if model.label != model.id:  # local paths are not published
        public = model.model_copy(update={"id": model.label or "base"})
        files[PLAN_FILE] = plan_text(plan.model_copy(update={"model": public})).encode()
    return {**files, **{one.file: one.results.json_bytes() for one in results}}


def _prepare(
    repository: Repository,
    plan: PlanFile,
    files: Mapping[str, Content],
    *,
    is_private: bool,
    is_forced: bool,
) -> tuple[str, tuple[str, ...]]:
    """Creates missing repository and revision; returns the parent commit and files to delete."""
    remote, there, is_new = repository.look(), None, False
    if remote is None:
        with repository.in_words("creating"):
            repository.api.create_repo(repository.id, private=is_private or None)
        remote = repository.look()
    elif is_private and not remote.is_private:
        raise HubError(
            f"{repository.id} is public, which --private does not change: make it private in its "
            "settings, or leave --private out"
        )
    if remote is not None and repository.revision is not None:
        there = repository.look(repository.revision)
        # A branch that an interrupted run created still equals the main one.
        is_new = there is None or there.commit == remote.commit
        remote = there or remote
    if remote is None:
        raise HubError(
            f"{repository.id} was created, but cannot be seen yet: run the command again"
        )
    if not is_forced:
        check_ours(remote, plan, repository.id, is_new_branch=is_new)
    if repository.revision is not None and there is None:
        with repository.in_words(f"creating revision {repository.revision} of"):
            repository.api.create_branch(repository.id, branch=repository.revision)
    return remote.commit, stale(remote, files, is_replacing=is_forced or is_new)
