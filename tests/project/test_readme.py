"""README and --help say the same, and both are true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from expertcut.cli import main
from expertcut.commands.merge import MergeSettings
from expertcut.commands.prune import PruneSettings
from expertcut.commands.reweight import ReweightSettings
from expertcut.recipes.recipe_schema import (
    HealSection,
    ProfileSection,
    ProveSection,
    PublishSection,
    Recipe,
)
from expertcut.settings import shown

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (
    "profile",
    "show",
    "prune",
    "merge",
    "reweight",
    "heal",
    "audit",
    "eval",
    "report",
    "publish",
    "run",
)
PAPER = {"profile", "prune --keep-active", "reweight --boost 12"}  # run by test_paper_commands.py
NUMBER = re.compile(r"[-+−]?\d[\d.,]*(?:e[-+]?\d+)?")


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
    return {command: run(command, "--help") for command in COMMANDS}


def test_help_lists_exactly_the_commands_that_the_readme_describes() -> None:
    listed = re.findall(r"^  ([a-z]+) {2,}\S", run("--help").split("Commands:")[1], re.M)
    assert tuple(listed) == COMMANDS
    described = re.findall(r"^\| `([a-z]+)", README, re.M)
    assert tuple(dict.fromkeys(described)) == COMMANDS


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
    for line in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines():
        asked = re.search(r"expertcut profile([^#]*)", line)
        for option in re.findall(r"--[a-z-]+", asked[1] if asked else ""):
            assert option in help_texts["profile"], line
            found += 1
    assert found > 4


def test_every_option_says_what_it_does(help_texts: dict[str, str]) -> None:
    for command, text in help_texts.items():
        options = re.findall(r"^  (--[a-z-]+)[^\n]*?(?:\n {10,}| {2,})(\S+)", text, re.M)
        assert len(options) >= 2, command
        assert all(explained for _, explained in options)


def test_what_the_readme_runs_and_links_to_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z]+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) >= 3
    assert all((ROOT / link).exists() for link in links)


def test_every_source_file_stands_in_the_tree_of_the_readme() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    for file in (ROOT / "src" / "expertcut").rglob("*.py"):
        name = file.parent.name if file.name == "__init__.py" else file.name
        if name not in ("expertcut", "__main__.py") and file.parent.name not in (
            "cli",
            "reporting",
        ):
            assert name in tree, file


def test_every_command_in_the_readme_is_run_by_a_test() -> None:
    toured = {command for command, _ in tour()}
    recipes = [c for c in commands(README + read("docs/recipes.md")) if c.startswith("run ")]
    assert len(toured) >= 3 and len(recipes) >= 4
    assert all((ROOT / command.split()[1]).is_file() for command in recipes)
    assert PAPER <= set(commands(README)) <= toured | set(recipes) | PAPER


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_tour_of_the_readme_prints_what_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "quickstart").symlink_to(ROOT / "checkpoints" / "quickstart")
    monkeypatch.chdir(tmp_path)
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
    assert n_lines > 12


def test_recipes_in_the_readme_and_the_docs_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(README + read("docs/recipes.md")):
        if command.startswith("run "):
            words = [*shlex.split(command), "--dry-run", "--out", str(tmp_path / "run")]
            monkeypatch.setattr(sys, "argv", ["expertcut", *words])
            with pytest.raises(SystemExit) as ending:
                main()
            printed = capsys.readouterr().out
            assert ending.value.code == 0, printed
            assert "would run" in printed


def test_every_key_of_a_recipe_stands_in_the_docs() -> None:
    text = read("docs/recipes.md")
    edits = (PruneSettings, MergeSettings, ReweightSettings, HealSection)
    parts = (ProfileSection, *edits, ProveSection, PublishSection)
    own = {key for part in parts for key in part.model_fields if shown(part, key)["in_recipe"]}
    keys = {*Recipe.model_fields, *own}
    assert len(keys) > 30
    assert [key for key in sorted(keys) if f"`{key}`" not in text and f"`{key}:" not in text] == []


def test_python_m_and_the_console_script_are_the_same() -> None:
    script = Path(sys.executable).with_name("expertcut")
    assert subprocess.check_output([script, "--version"], text=True) == run("--version")
