"""README and --help say the same, and both are true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = ("profile", "show", "prune", "reweight", "audit", "eval", "report", "publish")


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


def test_python_m_and_the_console_script_are_the_same() -> None:
    script = Path(sys.executable).with_name("expertcut")
    assert subprocess.check_output([script, "--version"], text=True) == run("--version")
