"""Heavy libraries are imported where they are used: not to print help or refuse an argument."""

import subprocess
import sys

import pytest

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
