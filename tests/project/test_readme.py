"""README, docs and --help say the same, and are true."""

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import TypeAdapter

import expertcut
from expertcut import cli
from expertcut.cli import main
from expertcut.commands.merge import MergeSettings
from expertcut.commands.prune import PruneSettings
from expertcut.commands.reweight import ReweightSettings
from expertcut.edits.criteria import CRITERIA
from expertcut.models.routing_rule import RULE_KINDS
from expertcut.recipes.recipe_schema import (
    EvalSection,
    HealSection,
    ProfileSection,
    ProveSection,
    PublishSection,
    Recipe,
)
from expertcut.settings import flag_of, option_details
from tests.conftest import help_of
from tests.project.test_architecture import ORDER

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GROUPS = {
    "Start": ("demo",),
    "Measure": ("profile", "trace", "show", "audit"),
    "Change": ("prune", "merge", "compress", "reweight", "route", "heal", "place"),
    "Judge": ("sweep", "eval", "dispatch"),
    "Share": ("report", "publish", "run"),
}
COMMANDS = tuple(command for group in GROUPS.values() for command in group)
PAPER = {"profile", "prune --keep-active", "reweight --boost 12"}  # run by test_paper_commands.py
DEMO = {"demo"}  # run by test_demo.py
NUMBER = re.compile(r"[-+−]?\d[\d.,]*(?:e[-+]?\d+)?")
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKING = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "checkpoints/quickstart")),
    *PAGES,
)
EARLIER_OPTIONS = {"--positions", "--prove", "--keep-fraction"}  # hidden, named as such
# Not of expertcut.
OPTIONS_OF_OTHERS = {"--rounds", "--section", "--seconds", "--seeds", "--worlds"}
OPTIONS_OF_OTHERS |= {"--init-expert-location", "--ep-num-redundant-experts"}
OPTIONS_OF_OTHERS |= {"--output", "--moments", "--only", "--override-kv"}
MAX_README_LINES = 135
MAX_PAGES = 21  # beside log.md


def blocks(text: str) -> list[list[str]]:
    """Lines of every fenced block."""
    return [block.strip("\n").splitlines() for block in text.split("```")[1::2]]


def commands(text: str) -> list[str]:
    """What follows `expertcut` wherever a block has it, comments aside."""
    lines = [line.removeprefix("$ ") for block in blocks(text) for line in block]
    return [
        line.partition("#")[0].removeprefix("expertcut").strip()
        for line in lines
        if line.startswith("expertcut ")
    ]


def tour() -> list[tuple[str, list[str]]]:
    """The commands of the README that stand with what they print."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks(README):
        for line in block:
            if line.startswith("$ expertcut "):
                found.append((line.removeprefix("$ expertcut "), []))
            elif found and block[0].startswith("$"):
                found[-1][1].append(line)
    return found


def shape(line: str) -> str:
    """A line whatever its numbers are, and however wide they make its columns."""
    line = re.sub(r"-[0-9a-f]{8}\b", "-HASH", line)
    return re.sub(r"[━─]+", "─", " ".join(NUMBER.sub("#", line).split()))


def run(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "expertcut", *args], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    return {command: help_of(command) for command in COMMANDS}


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return re.split(r"^## ", text.split(f"\n## {heading}\n")[1], flags=re.M)[0]


def test_help_lists_exactly_the_commands_that_the_readme_describes() -> None:
    text = help_of()
    assert text == run("--help")  # in a process of its own
    for panel, named in GROUPS.items():
        listed = text.split(f"\n{panel}:\n")[1].split("\n\n")[0]
        rows = re.findall(r"^  ([a-z]+) +(\S.*(?:\n {5,}.*)*)", listed, re.M)
        assert tuple(command for command, _ in rows) == named
        assert all(re.fullmatch(r"[A-Z][^…]+[a-z]\.", sentence) for _, sentence in rows)
    assert text.count("\n\n") == 2 + len(GROUPS) and "--install-completion" in text
    described = re.findall(r"^\| `([a-z]+)`", section(README, "Commands"), re.M)
    assert tuple(described) == COMMANDS


def test_the_readme_lists_every_criterion() -> None:
    named = set(re.findall(r"`([a-z_]+)`", section(README, "Criteria")))
    assert len(CRITERIA) > 10
    assert [by for by in CRITERIA if by not in named] == []


def test_the_readme_and_the_docs_stay_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES
    assert len([page for page in PAGES if page.name != "log.md"]) <= MAX_PAGES


def test_every_option_in_the_readme_is_one_of_its_command(help_texts: dict[str, str]) -> None:
    found = 0
    for line in README.splitlines():
        match = re.search(r"expertcut ([a-z]+)|^\| `([a-z]+)", line)
        if match and (command := match[1] or match[2]) in help_texts:
            for option in re.findall(r"--[a-z-]+", line):
                assert option in help_texts[command], line
                found += 1
    assert found > 6


def test_every_option_of_profile_in_the_docs_on_scaling_is_one(help_texts: dict[str, str]) -> None:
    found = 0
    for line in (line for block in blocks(read("docs/benchmarks.md")) for line in block):
        words = re.search(r"expertcut profile([^#]*)", line)
        for option in re.findall(r"--[a-z-]+", words[1] if words else ""):
            assert option in help_texts["profile"], line
            found += 1
    assert found > 4


def test_every_option_in_the_docs_is_one_of_a_command(help_texts: dict[str, str]) -> None:
    known = set(re.findall(r"--[a-z-]+", " ".join(help_texts.values())))
    if "--sparsity" not in known:
        pytest.skip("the options have their earlier names yet")
    names = "|".join(COMMANDS)
    unknown = {
        (page.name, option)
        for page in PAGES
        if page.name != "log.md"
        for span in re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))
        if re.match(rf"--[a-z]|(?:expertcut )?(?:{names}) ", span)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)
        if option not in known | EARLIER_OPTIONS | OPTIONS_OF_OTHERS
    }
    assert sorted(unknown) == []


def test_papers_names_commands_options_criteria_and_rules_that_exist() -> None:
    settings = {name: cls for _, name, cls, _ in cli.COMMANDS}
    names = "|".join(COMMANDS)
    spans = re.findall(rf"`((?:{names})(?: [^`\n]+)?)`", read("docs/papers.md"))
    assert len(spans) > 30
    for words in map(shlex.split, spans):
        fields = {
            flag_of(settings[words[0]], name): name for name in settings[words[0]].model_fields
        }
        for flag, value in pairwise([*words[1:], ""]):
            if flag.startswith("--"):
                field = settings[words[0]].model_fields[fields[flag]]
                if flag == "--rule":
                    assert value in RULE_KINDS, words
                elif flag == "--by" and field.metadata:
                    TypeAdapter(Annotated[field.annotation, *field.metadata]).validate_python(value)
                elif flag == "--by":
                    TypeAdapter(field.annotation).validate_python(value)


def test_every_option_says_what_it_does(help_texts: dict[str, str]) -> None:
    for command, text in help_texts.items():
        options = re.findall(r"^  (?:-h, )?(--[a-z-]+)[^\n]*?(?:\n {10,}| {2,})(\S+)", text, re.M)
        assert len(options) >= 2, command
        assert all(explained for _, explained in options)


def test_the_make_targets_of_the_readme_are_there() -> None:
    makefile = read("Makefile")
    targets = re.findall(r"^make ([a-z]+)", README, re.M)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or heading is not there."""
    text = page.read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(f"{page.relative_to(ROOT)}: {link}")
    return broken


def test_every_relative_link_and_anchor_exists() -> None:
    assert [link for page in LINKING for link in broken_links(page)] == []
    assert sum(len(re.findall(r"\]\(", page.read_text("utf-8"))) for page in LINKING) > 60


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A, b\n[1](#a-b) [2](#c) [3](no.md) [4](page.md#a-b) [5](https://x.y/z)\n")
    assert broken_links(page) == ["page.md: #c", "page.md: no.md"]


def test_sources_and_recipes_name_pages_that_are_there() -> None:
    folders = ("src", "tests", "recipes", "benchmarks", "docs")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
    text_files = [f for f in files if f.suffix in (".py", ".md", ".yaml", ".sh", ".jinja")]
    named = {
        page
        for file in [*text_files, ROOT / "Makefile", ROOT / "CHANGELOG.md"]
        for page in re.findall(r"docs/[a-z_]+\.md", file.read_text("utf-8"))
    }
    assert len(named) > 5
    assert sorted(page for page in named if not (ROOT / page).is_file()) == []


def test_files_that_the_docs_name_are_there() -> None:
    named = {
        (page.name, path)
        for page in LINKING
        if page.name not in ("log.md", "CHANGELOG.md")
        for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml|sh|jinja))`", page.read_text("utf-8"))
    }
    assert len(named) > 20
    roots = (ROOT, ROOT / "src" / "expertcut", ROOT / "checkpoints" / "quickstart")
    gone = [(page, path) for page, path in named if not any((r / path).exists() for r in roots)]
    assert sorted(gone) == []


def test_the_page_on_architecture_finds_what_it_names() -> None:
    rows = re.findall(r"^\| [^|]*\? \| (.*) \|$", read("docs/architecture.md"), re.M)
    assert len(rows) >= 6
    for row in rows:
        words = re.findall(r"`([^`]+)`", row)
        files = [word for word in words if word.endswith(".py")]
        text = "".join(read(f"src/expertcut/{file}") for file in files)
        for name in (n for word in words if word not in files for n in word.split(".")):
            assert re.search(rf"(?:def|class) {name}\b", text), row


def test_the_page_on_architecture_names_every_package() -> None:
    packages = section(read("docs/architecture.md"), "Packages")
    rows = re.findall(r"^\| `([a-z_]+)", packages, re.M)
    assert [package for package in ORDER if package not in rows] == []


def test_every_command_in_the_readme_is_run_by_a_test() -> None:
    toured = {command for command, _ in tour()}
    recipes = [c for c in commands(README + read("docs/recipes.md")) if c.startswith("run ")]
    assert len(toured) >= 3 and len(recipes) >= 4
    assert all((ROOT / command.split()[1]).is_file() for command in recipes)
    assert PAPER | DEMO <= set(commands(README)) <= toured | set(recipes) | PAPER | DEMO


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to write into, with what README's commands read; a profile is made there once."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "quickstart").symlink_to(ROOT / "checkpoints" / "quickstart")
    return folder


def test_the_tour_of_the_readme_prints_what_stands_there(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    n_lines = 0
    for command, expected in tour():
        monkeypatch.setattr(sys, "argv", ["expertcut", *shlex.split(command)])
        with pytest.raises(SystemExit) as ending:
            main()
        printed = [shape(line) for line in capsys.readouterr().out.splitlines()]
        assert ending.value.code == 0, command
        for line in expected:
            assert line == "…" or shape(line) in printed, command
            n_lines += line != "…"
    assert n_lines >= 5


def python(page: str) -> str:
    """The fenced Python of a page."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", read(page), re.M | re.S))


def test_the_python_of_the_readme_runs(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = python("README.md")
    assert code and code in python("docs/recipes.md")
    if not hasattr(expertcut, "profile"):
        pytest.skip("the Python API is not there yet")
    monkeypatch.chdir(clone)
    short = code.replace("quiz=quiz).comparisons", "quiz=quiz, limit=5).comparisons")
    assert short != code
    exec(compile(short, "README.md", "exec"), {})


def test_recipes_in_the_readme_and_the_docs_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(README + read("docs/recipes.md")):
        if command.startswith("run "):
            words = shlex.split(command.partition(" --out ")[0])
            out = ["--dry-run", "--out", str(tmp_path / "run")]
            monkeypatch.setattr(sys, "argv", ["expertcut", *words, *out])
            with pytest.raises(SystemExit) as ending:
                main()
            printed = capsys.readouterr().out
            assert ending.value.code == 0, printed
            assert "would run" in printed


def test_every_key_of_a_recipe_stands_in_the_docs() -> None:
    text = read("docs/recipes.md")
    edits = (PruneSettings, MergeSettings, ReweightSettings, HealSection)
    parts = (ProfileSection, *edits, ProveSection, EvalSection, PublishSection)
    own = {
        key for part in parts for key in part.model_fields if option_details(part, key)["in_recipe"]
    }
    keys = {*Recipe.model_fields, *own}
    assert len(keys) > 30
    assert [key for key in sorted(keys) if f"`{key}`" not in text and f"`{key}:" not in text] == []


def test_python_m_and_the_console_script_are_the_same() -> None:
    script = Path(sys.executable).with_name("expertcut")
    assert subprocess.check_output([script, "--version"], text=True) == run("--version")
