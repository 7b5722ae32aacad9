"""One attempt to break a reader, and what every refusal must be."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.running import Ended, contents
from tests.hostile.world import World

Spoil = Callable[[World], list[str]]


@dataclass(frozen=True)
class Case:
    """`spoil` changes the world and gives the command line to try there.

    The one line of the refusal must hold each of `says`, regular expressions: the file and its
    fault.
    """

    spoil: Spoil
    says: tuple[str, ...]
    keeps: str | None = None  # finished before, so it stays, and was told of on stdout


class Corpus(dict[str, Case]):
    """Cases by name, `<kind>: <fault>`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def case(self, fault: str, *says: str) -> Callable[[Spoil], Spoil]:
        """Registers the function below as the case of this fault."""

        def register(spoil: Spoil) -> Spoil:
            self.add(fault, spoil, *says)
            return spoil

        return register

    def add(self, fault: str, spoil: Spoil, *says: str, keeps: str | None = None) -> None:
        """Registers `spoil`; a case that asks nothing of the refusal would prove nothing."""
        name = f"{self.kind}: {fault}"
        assert name not in self, f"two cases are called {name}"
        assert len(says) >= 2, f"{name}: says neither file nor fault"
        self[name] = Case(spoil, says, keeps)


def check_refusal(case: Case, world: World, run: Callable[..., Ended]) -> Ended:
    """Spoils `world`, runs the command there, and asserts all that a refusal promises."""
    words = case.spoil(world)
    before = contents(world.root)
    ended = run(world.root, words)
    said = ended.stderr
    assert ended.status == 2, f"status {ended.status}: {said[-2000:]}"
    assert said.startswith("expertcut: ") and said.count("\n") == 1 and said.endswith("\n"), said
    assert len(said) < 1500, f"a line of {len(said)} characters"
    assert case.keeps or ended.stdout == ""
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", said.rstrip("\n")) is None, ascii(said)
    for pattern in case.says:
        assert re.search(pattern, said), f"{pattern!r} is not in: {said}"
    after = contents(world.root)
    if case.keeps:
        after = {n: c for n, c in after.items() if Path(n).parts[0] != case.keeps}
    assert after == before, f"written: {sorted(set(after) ^ set(before)) or 'changed bytes'}"
    return ended
