"""Checkpoints to publish, the command as it is typed, and the local Hub as this process's Hub."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file

from expertcut.cli import main
from expertcut.edits.plan import PlanModel, load_plan, plan_text
from expertcut.models.safetensors_index import read_headers
from tests.support.fake_hub import TOKEN, LocalHub

REPO = "birds/cut"
HOSTILE = (
    "<script>alert(1)</script>",
    "a|b| \\| c",
    "[click](javascript:alert(1)) ![x](http://evil.example/x.png)",
    "---\nlicense: evil\n---\n# Owned",
    "\x1b[31mred\x07\u202e\u2028next",
    "`code` **bold** <img src=x onerror=alert(1)> {{ 7 * 7 }} {% raw %}",
    "http://evil.example www.evil.example me@evil.example $$x$$ &lt;b&gt; - 1. #",
    "'\"; }: [*] !!python/object/apply:os.system ['true']",
)
Publish = Callable[..., "Done"]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


@contextmanager
def hub_of_this_process(patch: pytest.MonkeyPatch, home: Path) -> Iterator[LocalHub]:
    """A local Hub that huggingface_hub speaks to here, with the right token and no waiting."""
    with LocalHub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(time, "sleep", lambda seconds: None)
        close_session()
        yield hub
        close_session()


def run(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Done:
    """A command as it is typed."""
    patch.setattr(sys, "argv", ["expertcut", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    return Done(int(str(stopped.value.code)), said.out, said.err)


def make_checkpoints(model: Path, quiz: Path, root: Path) -> Path:
    """Profile, two cuts, a tilt and a rule of a model, and the evaluation of the cuts."""
    from expertcut.cli import app

    asked = ("--quiz", quiz, "--shots", 1)
    profile = root / "profile"
    for words in (
        ("profile", model, *asked, "--split", "val", "--out", profile),
        ("prune", "--profile", profile, "--keep", 5, "--out", root / "stock"),
        ("prune", "--profile", profile, "--keep", 5, *EXACT, "--out", root / "exact"),
        ("reweight", "--profile", profile, "--boost", "0:1=1", "--out", root / "tilted"),
        ("route", "--profile", profile, *TUNED, "--out", root / "routed"),
        ("eval", model, root / "stock", root / "exact", *asked, "--out", root / "results.json"),
    ):
        app([str(word) for word in words], standalone_mode=False)
    return root


TUNED = ("--tune", "--cross-fit", "--random-draws", 1, "--margin", 100)
EXACT = ("--layout", "exact", "--removed", "mean", "--no-verify")


def copied(folder: Path, place: Path, base: tuple[str, str | None] | None = None) -> Path:
    """A checkpoint of its own for a test, made from another base if one is named."""
    shutil.copytree(folder, place)
    if base is not None:
        plan = load_plan(place)
        model = PlanModel(id=base[0], revision=base[1], fingerprint=plan.model.fingerprint)
        (place / "plan.json").write_text(plan_text(plan.model_copy(update={"model": model})))
    return place


def in_two_files(folder: Path) -> Path:
    """The same checkpoint, its weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names, half = list(tensors), len(tensors) // 2
    index = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    assert len(read_headers(folder)) == len(names) > 10
    return folder


def said(done: Done) -> str:
    """What it printed, in one line."""
    return " ".join(done.out.split())


def refused(done: Done, *parts: str) -> str:
    """One line, exit status 2."""
    assert (done.status, done.out) == (2, ""), done
    assert done.err.count("\n") == 1 and done.err.startswith("expertcut: ")
    for part in parts:
        assert part in done.err
    return done.err
