"""From a command to the bytes that it copies and to the sums that it makes: as documented."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expertcut.checkpoints import shards
from expertcut.profiling.recorder import TokenSums
from expertcut.scoring.passes import Run
from tests.conftest import Commands

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SRC = ROOT / "src" / "expertcut"


def documented(name: str) -> list[str]:
    """The functions of a call path in docs/architecture.md."""
    match = re.search(rf"<!-- call path: {name} -->\n(.*?)<!-- end of call path -->", PAGE, re.S)
    assert match is not None
    return re.findall(r"^\d+\. `([\w.]+)`", match[1], re.M)


def calls_until(
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    run: Callable[[], object],
    under: str = "",
) -> list[str]:
    """Our functions on the stack when `owner.name` is first called, the command's run first.

    Calls that are not made under the function `under` do not count.
    """
    found: list[str] = []
    original = getattr(owner, name)

    def watched(*args: object, **kwargs: object) -> object:
        stack = [f"{original.__module__.removeprefix('expertcut.')}.{original.__qualname__}"]
        frame = sys._getframe(1)
        while frame is not None and not found:
            path = Path(frame.f_code.co_filename).resolve()
            if path.is_relative_to(SRC):
                module = ".".join(path.relative_to(SRC).with_suffix("").parts)
                stack.append(f"{module.removesuffix('.__init__')}.{frame.f_code.co_qualname}")
            frame = frame.f_back
        if not found and any(call.endswith(under) for call in stack):
            found.extend(stack)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    run()
    monkeypatch.undo()
    start = next(i for i, call in enumerate(found) if re.fullmatch(r"commands\.\w+\.run", call))
    return found[start::-1]


def is_in_order(some: list[str], calls: list[str]) -> bool:
    left = iter(calls)
    return all(call in left for call in some)


@pytest.fixture
def profiled(
    expertcut: Commands, checkpoint: Callable[..., Path], quiz_folder: Path
) -> Callable[[], str]:
    words = ("profile", checkpoint("olmoe"), "--quiz", quiz_folder, "--shots", 1)
    return lambda: expertcut(*words, "--split", "val", "--out", "p")


def test_from_prune_to_the_copy_of_bytes_are_at_most_eight_calls(
    profiled: Callable[[], str], expertcut: Commands, monkeypatch: pytest.MonkeyPatch
):
    profiled()
    prune = lambda: expertcut("prune", "--profile", "p", "--keep-active", "--out", "o")  # noqa: E731
    calls = calls_until(monkeypatch, shards, "copy_ranges", prune)
    assert len(calls) <= 8, calls
    assert calls == documented("prune")


def test_from_profile_to_the_forward_pass_are_at_most_twelve_calls(
    profiled: Callable[[], str], monkeypatch: pytest.MonkeyPatch
):
    calls = calls_until(monkeypatch, Run, "_forward", profiled, "Measurement.measure")
    assert len(calls) <= 12, calls
    own = [call for call in calls if not call.startswith("cli.")]  # progress on the terminal
    assert own == [call for call in documented("profile") if call in own]
    assert documented("profile")[: len(own)] == own


def test_from_profile_to_a_sum(profiled: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    calls = calls_until(monkeypatch, TokenSums, "_add", profiled, "Measurement.measure")
    assert is_in_order(documented("profile"), calls), calls
    assert documented("profile")[-1] == calls[-1] == "profiling.recorder.TokenSums._add"
