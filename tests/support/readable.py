"""Files of every kind that somebody might write, and what became of reading them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from rich.console import Console

from expertcut.edits.plan import BlockEdit, ChosenOn, PlanFile, PlanModel
from expertcut.errors import ExpertcutError
from expertcut.profiling.schema import ProfileInfo, Settings, SubjectInfo
from expertcut.reporting.tables import as_csv, as_markdown, as_rich
from expertcut.reporting.views import find_shown
from tests.support.hand_made import block, profile_info

T = TypeVar("T")
FEW = settings(
    derandomize=True,  # the same examples every time
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXTS = st.text(min_size=1, max_size=20)
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
FILLED = WORDS.filter(str.strip)
NUMBERS = st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
FINITE = st.floats(-100, 100)


def read_or_refused(read: Callable[[], T]) -> T | None:
    """What came of reading, or None where it was refused in words; anything else is a fault."""
    try:
        return read()
    except ExpertcutError as error:
        assert str(error).strip()
        return None


def shown_or_refused(file: Path) -> bool:
    """Whether `show` takes a document, in every form that it prints."""
    shown = read_or_refused(lambda: find_shown(file))
    if shown is None:
        return False
    tables = read_or_refused(shown.tables)
    for table in tables or ():
        as_markdown(table)
        Console(file=io.StringIO(), width=200).print(as_rich(table))
    read_or_refused(lambda: as_csv(shown.flat()))
    read_or_refused(lambda: json.dumps(shown.json(), allow_nan=False))
    return tables is not None


@st.composite
def edits(draw: st.DrawFn, n_experts: int = 8, n_kept: int | None = None) -> BlockEdit:
    """Any cut of a block, tilts of those that stay."""
    least, most = (1, n_experts) if n_kept is None else (n_kept, n_kept)
    experts = st.sets(st.integers(0, n_experts - 1), min_size=least, max_size=most)
    keep = tuple(sorted(draw(experts)))
    of_kept = st.dictionaries(st.sampled_from(keep), FINITE, max_size=3)
    return BlockEdit(keep=keep, bias=draw(of_kept), scale=draw(of_kept))


@st.composite
def plans(draw: st.DrawFn) -> PlanFile:
    """Any plan that holds together."""
    blocks = draw(st.dictionaries(FILLED, edits(), min_size=1, max_size=4))
    layout = draw(st.sampled_from(["stock", "exact"]))
    return PlanFile(
        model=PlanModel(id=draw(WORDS), revision=None, fingerprint=draw(WORDS)),
        action=draw(WORDS),
        criterion=draw(WORDS),
        positions=draw(st.sampled_from(["answer", "all"])),
        removal="reroute" if layout == "stock" else "constant",
        layout=layout,
        chosen_on=ChosenOn(
            quiz=draw(WORDS), split="test", questions=draw(st.integers(0, 99)), sha256="0" * 64
        ),
        proof=draw(st.dictionaries(WORDS, JSON, max_size=3)),
        blocks=blocks,
    )


@st.composite
def profiles(draw: st.DrawFn) -> ProfileInfo:
    """Any description of a profile that holds together."""
    counts = st.integers(1, 10_000)
    blocks = [block(i, draw(st.integers(2, 64))) for i in range(draw(st.integers(1, 4)))]
    subjects = draw(st.dictionaries(FILLED, counts, min_size=1, max_size=4))
    info = profile_info(blocks, subjects, id=draw(WORDS), shots=draw(st.integers(0, 9)))
    more = {"threads": draw(st.integers(1, 64)), "torch": draw(WORDS)}
    assert isinstance(info.settings, Settings)
    assert all(isinstance(s, SubjectInfo) for s in info.quiz.subjects.values())
    return info.model_copy(update={"settings": info.settings.model_copy(update=more)})


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """JSON with one place of it taken out, put twice, or holding anything else."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    holder, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["replace", "remove", "more"]))
    if kind == "replace":
        holder[key] = draw(JSON | st.sampled_from([-1, 0, 1 << 40, "", "../..", True, None, 1.5]))
    elif kind == "remove":
        del holder[key]
    elif isinstance(holder, dict):
        holder[draw(WORDS)] = draw(JSON)
    else:
        holder.append(draw(JSON))
    return value


def _places(value: Any) -> Any:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield value, key
        yield from _places(inner)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are flipped, taken out, put in or cut off."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(found) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "remove", "insert", "cut", "overwrite"]))
        some = draw(st.binary(min_size=1, max_size=9))
        if kind == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "remove":
            del found[at : at + len(some)]
        elif kind == "insert":
            found[at:at] = some
        elif kind == "cut":
            del found[at:]
        else:
            found[at : at + len(some)] = some
    return bytes(found)


def written(file: Path, content: bytes | str) -> Path:
    """The file, holding this."""
    file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return file
