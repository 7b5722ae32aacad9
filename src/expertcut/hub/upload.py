"""The stage behind `publish`: check, write the card, upload."""

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from expertcut.edits.plan import PLAN_FILE, PlanFile, plan_text
from expertcut.errors import HubError, SettingsError
from expertcut.files import without_secrets, write_atomically
from expertcut.hub.card import Place, card_text, is_edited
from expertcut.hub.provenance import CARD_FILE, Checkpoint, Evaluated, evaluations, origin, verified
from expertcut.hub.repository import Content, Repository, check_ours, stale
from expertcut.reporting.tables import one_line

logger = logging.getLogger(__name__)

_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class Published:
    """The result; `files` by name with their sizes in bytes, `commit` None in a dry run.

    `is_card_kept`: the card was edited by hand and stays. `gone` are files deleted from the
    repository, `left_out` files of the folder that do not belong to the checkpoint.
    """

    repo: str
    url: str
    card: Path
    is_card_kept: bool
    results: tuple[Path, ...]
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    commit: str | None = None
    is_changed: bool = False
    gone: tuple[str, ...] = ()


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
    repository = Repository(HfApi(token=token), repo, revision, token)
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
    except HFValidationError as error:
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
        repository.create(is_private=is_private)
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
        repository.branch()
    return remote.commit, stale(remote, files, is_replacing=is_forced or is_new)
