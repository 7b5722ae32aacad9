"""Faults that any JSON document may have, each met by one command after another."""

from collections.abc import Callable
from pathlib import Path

from tests.hostile.case import Corpus
from tests.hostile.spoiling import (
    as_device,
    as_folder,
    as_huge,
    as_pipe,
    cut_short,
    edit,
    emptied,
    put,
    replaced,
    spoiled,
    taken,
)
from tests.hostile.world import AUDITED, SWEPT, World

CASES = Corpus("documents")
OF = ["--profile", World.profile]
PUBLISH = ["publish", World.cut, "owner/name", "--dry-run"]
PROFILE_COMMANDS = {
    "show": ["show", World.profile],
    "show --criteria": ["show", World.profile, "--criteria"],
    "prune": ["prune", *OF, "--keep", "4", "--out", "new"],
    "reweight": ["reweight", *OF, "--boost", "1=1", "--out", "new"],
    "merge": ["merge", *OF, "--keep", "4", "--out", "new"],
    "audit": ["audit", *OF, *AUDITED, "--out", "new"],
    "sweep": ["prune", *OF, *SWEPT, "--out", "new"],
    "report": ["report", World.profile, "--out", "new.html"],
}
CUT_PROFILE = ["prune", "--profile", World.cut_profile, "--keep", "3", "--out", "new"]
EVAL = ["eval", World.model, World.cut, "--quiz", World.quiz, "--shots", "0", "--out", "new.json"]
TRACE_COMMANDS = {
    "show": ["show", World.trace],
    "place": ["place", World.trace, "--devices", "2", "--out", "new"],
    "place --cache": ["place", World.trace, "--cache", "4", "--out", "new"],
    "report": ["report", World.trace, "--out", "new.html"],
}
DOCUMENTS: dict[str, dict[str, list[str]]] = {
    f"{World.profile}/profile.json": PROFILE_COMMANDS,
    f"{World.cut}/plan.json": {
        "show": ["show", f"{World.cut}/plan.json"],
        "publish": PUBLISH,
        "prune": CUT_PROFILE,
        "eval": EVAL,
        "report": ["report", f"{World.cut}/plan.json", "--out", "new.html"],
    },
    World.results: {
        "show": ["show", World.results],
        "report": ["report", World.results, "--out", "new.html"],
        "publish": [*PUBLISH, "--results", World.results],
    },
    f"{World.sweep}/sweep.json": {
        "show": ["show", f"{World.sweep}/sweep.json"],
        "sweep": ["prune", *OF, *SWEPT, "--out", World.sweep],
    },
    f"{World.audit}/audit.json": {
        "show": ["show", f"{World.audit}/audit.json"],
        "audit": ["audit", *OF, *AUDITED, "--out", World.audit],
    },
    f"{World.trace}/trace.json": TRACE_COMMANDS,
    f"{World.run}/manifest.json": {"run": ["run", World.recipe, "--out", World.run]},
}


def _again(text: str) -> Callable[[Path], None]:
    """The first name of the object stands in it twice."""
    return replaced("{", "{" + text)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "of no bytes": (emptied, "JSON"),
    "cut short": (cut_short, "JSON"),
    "not UTF-8": (lambda file: file.write_bytes(b'{"format": "\xff"}'), "utf-8|JSON"),
    "a byte order mark": (lambda f: f.write_bytes(b"\xef\xbb\xbf" + f.read_bytes()), "JSON"),
    "UTF-16": (lambda f: f.write_bytes(f.read_text().encode("utf-16")), "utf-8|JSON"),
    "a list": (lambda file: file.write_text("[]"), "is no |is not |holds no |must be"),
    "nothing": (lambda file: file.write_text("null"), "is no |is not |holds no |must be"),
    "nested 100,000 times": (lambda file: file.write_text("[" * 100_000), "levels|JSON"),
    "nested 150 times": (
        lambda file: edit(file, put("more", value=_nested(150))),
        "levels",
    ),
    "a name that stands in it twice": (_again('"format": 1,"format": 1,'), "'format'.* twice"),
    "a later version": (lambda file: edit(file, put("format", value=2)), "format: "),
    "a version that is text": (lambda file: edit(file, put("format", value="1")), "format: "),
    "a version that is true": (lambda file: edit(file, put("format", value=True)), "format: "),
    "an unknown key": (lambda file: edit(file, put("__reduce__", value=1)), "__reduce__"),
    "a number that is none": (_again('"more": NaN,'), "NaN"),
    "a number without end": (_again('"more": -Infinity,'), "Infinity"),
    "a number of 10^999": (_again('"more": 1e999,'), "1e999"),
    "a number of 10,000 digits": (_again(f'"more": {"9" * 10_000},'), "64 bits"),
    "a lone surrogate": (_again('"more": "\\ud800",'), "surrogate|hex escape"),
    "a folder in its place": (as_folder, "."),
    "a pipe in its place": (as_pipe, "."),
    "a device in its place": (as_device, "."),
    "40 MiB": (as_huge, "More than 32768 KiB"),
}


def _nested(levels: int) -> list[object]:
    value: list[object] = []
    for _ in range(levels):
        value = [value]
    return value


def _name(file: str) -> str:
    return file.rsplit("/", 1)[-1].removesuffix(".json")


# A fault and a command take turns: every fault meets every document, every command several faults.
for number, (file, commands) in enumerate(DOCUMENTS.items()):
    for turn, (fault, (spoil, says)) in enumerate(FAULTS.items()):
        command = list(commands)[(turn + number) % len(commands)]
        CASES.add(
            f"{_name(file)} with {fault}, met by {command}",
            spoiled(file, spoil, *commands[command]),
            rf"{file.rsplit('/', 1)[0]}",
            says,
        )

for command, words in PROFILE_COMMANDS.items():
    profile = f"{World.profile}/profile.json"
    CASES.add(
        f"profile without a model, met by {command}",
        spoiled(profile, lambda file: edit(file, taken("model")), *words),
        "profile.json is not a valid profile",
        "model: Field required",
    )
