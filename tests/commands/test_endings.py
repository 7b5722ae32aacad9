"""How every command ends in a terminal of 80 columns: its last ten lines, as recorded.

`python -m tests.commands.test_endings` records them anew in `endings/`: read the difference.
"""

import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from expertcut.cli import main
from tests.conftest import make_checkpoint, write_quiz

QUICKSTART = Path(__file__).parents[2] / "checkpoints" / "quickstart"
ENDINGS = Path(__file__).parent / "endings"
N_LINES, N_COLUMNS, MOST_LINES = 10, 80, 40
NUMBER = re.compile(r"[-+−]?\d[\d.,]*(?:e[-+]?\d+)?")
ASKED = "--quiz quiz --split val --shots 1"
LINES = (
    f"profile model {ASKED} --out p",
    "show p",
    "audit --profile p --sample 2 --questions 8 --by reap,random --out a",
    "prune --profile p --keep {half} --by reap --out cut",
    "merge --profile p --keep {half} --out merged",
    "reweight --profile p --boost 1:1=0.5 --out boosted",
    "reweight --profile p --boost-best 1 --by accuracy --cross-fit --out tuned",
    "show tuned",
    f"heal cut {ASKED} --limit 2 --steps 2 --batch 2 --out healed",
    "sweep 0.5 --profile p --by reap,random --limit 1 --out s",
    "eval model cut healed --quiz quiz --shots 1 --limit 4",
    "show results.json",
    "show cut",
    "report .",
    "publish cut me/cut --dry-run",
    "run recipe.yaml --out run",
    "show run",
)
RECIPE = {
    "model": "model",
    "quiz": "quiz",
    "shots": 0,
    "threads": 1,
    "variants": [{"name": "half", "prune": {"sparsity": 0.5, "verify": False}}],
}


class Terminal(io.StringIO):
    """What is printed to it is kept; it says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def bundled(root: Path) -> int:
    """The bundled model and a dozen questions of three of its subjects."""
    (root / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(QUICKSTART / name, root / "model" / name)
    for file in (QUICKSTART / "quiz").glob("*/[ace]*.csv"):
        few = root / "quiz" / file.parent.name / file.name
        few.parent.mkdir(parents=True, exist_ok=True)
        few.write_text("".join(file.read_text().splitlines(keepends=True)[:12]))
    return 16


def large(root: Path) -> int:
    """A random model of 48 layers of 128 experts."""
    sizes = {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8}
    make_checkpoint(root / "model", "olmoe", **sizes)
    write_quiz(root / "quiz")
    return 64


WORLDS: dict[str, Callable[[Path], int]] = {"bundled": bundled, "large": large}


def printed(root: Path, line: str) -> str:
    """What a command that succeeds prints to a terminal, from `root`."""
    out = Terminal()
    with (
        chdir(root),
        patch.dict(os.environ, {"COLUMNS": str(N_COLUMNS)}),
        patch.object(sys, "argv", ["expertcut", *line.split()]),
        patch.object(sys, "stdout", out),
        pytest.raises(SystemExit) as stopped,
    ):
        main()
    torch.set_num_threads(1)
    text = re.sub(r"\x1b\[\d*m", "", out.getvalue())  # bold
    assert not stopped.value.code, f"{line}: {text}"
    return text.replace(str(root), "")


def outputs(world: str, root: Path) -> dict[str, str]:
    """What each command prints, in turn."""
    half = WORLDS[world](root)
    (root / "recipe.yaml").write_text(json.dumps(RECIPE))
    # Cross-fitting is the longest, and ends alike on every model.
    lines = [line for line in LINES if world == "large" or "tuned" not in line]
    return {line: printed(root, line.format(half=half)) for line in lines}


def ending(text: str) -> str:
    """The last lines, with every number as 0 and every run of spaces or of a frame as one."""
    last = text.rstrip("\n").splitlines()[-N_LINES:]
    return "\n".join(re.sub(r"([ ─━═])\1+", r"\1", NUMBER.sub("0", line)) for line in last)


def recorded(found: dict[str, str]) -> str:
    return "".join(f"$ expertcut {line}\n{ending(out)}\n\n" for line, out in found.items())


@pytest.mark.parametrize("world", ["bundled", pytest.param("large", marks=pytest.mark.slow)])
def test_every_command_ends_as_recorded(world: str, tmp_path: Path) -> None:
    found = outputs(world, tmp_path)
    for line, out in found.items():
        lines = out.splitlines()
        assert max(map(len, lines)) <= N_COLUMNS, line
        assert len(lines) <= MOST_LINES or line.startswith("show"), line
    assert recorded(found) == (ENDINGS / f"{world}.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    ENDINGS.mkdir(exist_ok=True)
    for name in sys.argv[1:] or WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            text = recorded(outputs(name, Path(folder).resolve()))
        (ENDINGS / f"{name}.txt").write_text(text, encoding="utf-8")
