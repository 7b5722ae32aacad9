"""The stage behind `publish`: check, write the card, upload."""

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from expertcut.edits.plan import PLAN_FILE, plan_text
from expertcut.errors import HubError, SettingsError
from expertcut.files import without_secrets, write_atomically
from expertcut.hub.card import Place, card_text, is_edited
from expertcut.hub.provenance import CARD_FILE, Checkpoint, Evaluated, evaluations, origin, verified
from expertcut.hub.repository import Content, Repository, check_ours, stale
from expertcut.reporting.tables import one_line

logger = logging.getLogger(__name__)

_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class PublishOptions:
    """How to publish; `results` are files of `eval`, `is_dry` writes only the card."""

    is_private: bool = False
    is_dry: bool = False
    is_forced: bool = False
    revision: str | None = None
    results: tuple[Path, ...] = ()


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
    n_results: int
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    commit: str | None = None
    is_changed: bool = False
    gone: tuple[str, ...] = ()


def publish(checkpoint: Path, repo: str, options: PublishOptions) -> Published:
    """Writes the card into the checkpoint's folder and uploads both; a second call resumes."""
    _check_names(repo, options.revision)
    api = HfApi()
    place = Place(repo, options.revision, api.endpoint)
    found = verified(checkpoint)
    evaluated = evaluations(found, options.results)
    card, is_kept = _write_card(found, evaluated, place)
    files = _files(found, card, evaluated)
    prepared = Published(
        repo=repo,
        url=f"{api.endpoint}/{repo}" + (f"/tree/{options.revision}" if options.revision else ""),
        card=card,
        is_card_kept=is_kept,
        n_results=len(evaluated),
        files={
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in files.items()
        },
        left_out=found.left_out,
    )
    if options.is_dry:
        return prepared
    return _upload(prepared, found, files, options)


def _check_names(repo: str, revision: str | None) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        what = f"{repo!a} is not a valid name on the Hub: {error}"
        raise SettingsError(one_line(what)) from None
    if repo.count("/") != 1:
        raise SettingsError(f"{repo} must name owner and repository: OWNER/NAME")
    if revision is not None and not _REVISION.fullmatch(revision):
        raise SettingsError(
            f"--revision {one_line(revision)} must be the name of a branch, like v2 or keep-32"
        )


def _write_card(
    found: Checkpoint, evaluated: tuple[Evaluated, ...], place: Place
) -> tuple[Path, bool]:
    """The card's file, and whether it was edited by hand."""
    file = found.folder / CARD_FILE
    if file.is_file() and is_edited(file.read_text(encoding="utf-8", errors="replace")):
        return file, True
    text = without_secrets(card_text(found, origin(found.folder), evaluated, place))
    write_atomically(file, text.encode())
    return file, False


def _files(
    found: Checkpoint, card: Path, evaluated: tuple[Evaluated, ...]
) -> Mapping[str, Content]:
    files: dict[str, Content] = {file.name: file for file in (card, *found.files)}
    model = found.plan.model
    if model.label != model.id:  # local paths are not published
        named = found.plan.model_copy(
            update={"model": model.model_copy(update={"id": model.label or "base"})}
        )
        files[PLAN_FILE] = plan_text(named).encode()
    return {**files, **{one.file: one.results.json_bytes() for one in evaluated}}


def _upload(
    prepared: Published, found: Checkpoint, files: Mapping[str, Content], options: PublishOptions
) -> Published:
    token = get_token()
    if token is None:
        raise SettingsError("no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN")
    repository = Repository(HfApi(token=token), prepared.repo, options.revision, token)
    parent, gone = _prepare(repository, found, files, options)
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        commit = repository.commit(files, gone, parent, f"Publish {found.plan.action}")
        repository.check_there(commit, files)
    for warning in kept:
        logger.warning("%s", " ".join(str(warning.message).split()))
    return replace(prepared, commit=commit, is_changed=commit != parent, gone=gone)


def _prepare(
    repository: Repository,
    found: Checkpoint,
    files: Mapping[str, Content],
    options: PublishOptions,
) -> tuple[str, tuple[str, ...]]:
    """Creates missing repository and revision; returns the parent commit and files to delete."""
    remote, there, is_new = repository.look(), None, False
    if remote is None:
        repository.create(is_private=options.is_private)
        remote = repository.look()
    elif options.is_private and not remote.is_private:
        raise HubError(
            f"{repository.id} is public, which --private does not change: make it private in its "
            "settings, or leave --private out"
        )
    if remote is not None and options.revision is not None:
        there = repository.look(options.revision)
        # A branch that an interrupted run created still equals the main one.
        is_new = there is None or there.commit == remote.commit
        remote = there or remote
    if remote is None:
        raise HubError(
            f"{repository.id} was created, but cannot be seen yet: run the command again"
        )
    if not options.is_forced:
        check_ours(remote, found.plan, repository.id, is_new_branch=is_new)
    if options.revision is not None and there is None:
        repository.branch()
    return remote.commit, stale(remote, files, is_replacing=options.is_forced or is_new)
