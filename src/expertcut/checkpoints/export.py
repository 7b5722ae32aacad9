"""A plan becomes a checkpoint folder, in the original names; no model is instantiated."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expertcut.checkpoints.headers import read_headers
from expertcut.checkpoints.stock import Fitted
from expertcut.checkpoints.stock_rewrite import stock_rewrite
from expertcut.checkpoints.streaming import write_checkpoint
from expertcut.errors import OutputError
from expertcut.interventions.plan import PLAN_FILE, QUESTIONS_FILE, Plan
from expertcut.moe.loading import EXPERT_COUNT_FIELDS, Source, read_config
from expertcut.profiling.chunks import write_atomically
from expertcut.profiling.store import Profile

_NOT_COPIED = {"config.json", PLAN_FILE, QUESTIONS_FILE, "README.md"}
_COPIED_ENDINGS = {".json", ".txt", ".model", ".jinja"}
_COPIED_NAMES = ("LICENSE", "NOTICE")


def export(
    source: Source,
    profile: Profile,
    plan: Plan,
    fitted: Fitted,
    folder: Path,
) -> None:
    """Writes the checkpoint that a plan describes into an empty folder, without the plan.

    Tensors are copied from file to file; only those that the plan edits are read and changed.
    """
    rewrite = stock_rewrite(read_headers(source.path), plan.blocks, fitted)
    write_checkpoint(source.path, folder, rewrite)
    for file in _companions(source.path):
        shutil.copyfile(file, folder / file.name)
    config = edited_config(read_config(source.path), profile, plan)
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def edited_config(config: dict[str, Any], profile: Profile, plan: Plan) -> dict[str, Any]:
    """The original config with the expert count changed, under every name it goes by."""
    before = profile.info.model.blocks[0].experts
    after = len(next(iter(plan.blocks.values())).keep)
    edited: dict[str, Any] = {
        key: edited_config(value, profile, plan) if key == "text_config" else value
        for key, value in config.items()
    }
    for field in EXPERT_COUNT_FIELDS:
        if edited.get(field) == before:
            edited[field] = after
    return edited


def _companions(folder: Path) -> Iterator[Path]:
    """Tokenizer, generation config, chat template and licence; no weights, no index."""
    for file in sorted(folder.iterdir()):
        is_wanted = file.suffix in _COPIED_ENDINGS or file.name.startswith(_COPIED_NAMES)
        if is_wanted and file.name not in _NOT_COPIED and ".index." not in file.name:
            yield file


def check_free(folder: Path) -> None:
    """That a folder may be written: absent or empty.

    Raises:
        OutputError: something is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is not empty: remove it or name another --out")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling that takes the folder's name when the block ends well, else is removed.

    Raises:
        OutputError: the place cannot be written, or was taken meanwhile.
    """
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
