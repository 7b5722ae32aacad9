"""Heavy libraries are imported where they are used: not to print help or refuse an argument."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expertcut.cli import main
from expertcut.edits.criteria import CRITERIA

HEAVY = ("torch", "transformers", "numpy", "datasets", "scipy")
CODE = """
import sys
from expertcut.cli import main
try:
    main(sys.argv[1:]) if main.__code__.co_argcount else main()
except SystemExit as ending:
    print("STATUS", ending.code)
print("LOADED", *(name for name in {heavy} if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["profile", "--help"], 0),
        (["--version"], 0),
        (["profile", "--shots", "many"], 2),
        (["nothing"], 2),
        (["prune", "--no-such-option"], 2),
    ],
)
def test_help_and_bad_arguments_need_no_heavy_library(words: list[str], status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(heavy=HEAVY), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert f"STATUS {status}" in lines, done.stderr
    assert lines[-1] == "LOADED"


@pytest.fixture
def offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], list[str]]:
    """What the shell offers for the last word of a line, in a folder with a few outputs."""
    for folder, file in {
        **{f"profiles/{name}": "profile.json" for name in ("b", "a", "$(rm)", "a b")},
        **{"profiles/unfinished": "other", "checkpoints/half": "config.json"},
        **{"checkpoints/quiz": "test.csv", "elsewhere/model": "config.json"},
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["expertcut"])
    monkeypatch.setenv("_EXPERTCUT_COMPLETE", "complete_bash")

    def ask(line: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", f"expertcut {line}")
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" "))))
        with pytest.raises(SystemExit) as ending:
            main()
        assert ending.value.code == 0
        return capsys.readouterr().out.split()

    return ask


def test_the_shell_completes_choices_criteria_profiles_and_checkpoints(
    offered: Callable[[str], list[str]],
) -> None:
    assert offered("re") == ["reweight", "report"]
    assert offered("prune --layout ") == ["stock", "exact"]
    assert offered("merge --router m") == ["mean"]
    for command in ("prune", "sweep", "audit"):
        assert offered(f"{command} --by ") == list(CRITERIA)
    assert offered("sweep 0.5 --by reap,re") == ["reap,reconstruction"]
    for command in ("prune", "merge --keep 4", "reweight", "sweep", "audit"):
        assert offered(f"{command} --profile ") == ["profiles/a", "profiles/b"]
    for line in ("eval ", "eval base ", "heal ", "publish ", "profile che"):
        assert offered(line) == ["checkpoints/half"]
    assert offered("prune --swe") == offered("heal el") == offered("prune --out ") == []


def test_completion_needs_no_torch() -> None:
    words = {"COMP_WORDS": "expertcut prune --by re", "COMP_CWORD": "3"}
    code = "import sys; sys.argv[0] = 'expertcut'" + CODE.format(heavy=("torch", "transformers"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **words, "_EXPERTCUT_COMPLETE": "complete_bash"},
    )
    assert done.stdout.split() == ["reap", "reconstruction", "STATUS", "0", "LOADED"]
