"""`make advisories` tells «none known» from «nobody could be asked», which pip-audit does not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "advisories.py"
CLEAN: dict[str, Any] = {"name": "numpy", "version": "2.4.6", "vulns": []}
FAULTY = CLEAN | {"name": "jinja2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.6"]}]}
SKIPPED = {"name": "rich", "skip_reason": "Dependency not found on PyPI and could not be audited"}


def advisories(folder: Path, *answers: str) -> tuple[int, str, str]:
    """The script with a `uv` whose pip-audit says one thing after the other."""
    for place, answer in enumerate(answers):
        (folder / str(place)).write_text(answer)
    uv = folder / "uv"
    uv.write_text(
        f'#!/bin/sh\ncd {folder}\nn=$(cat n 2>/dev/null || echo 0)\necho $((n+1)) > n\ncat "$n"\n'
        'echo "$@" >> asked\n'
    )
    uv.chmod(0o755)
    command = [sys.executable, str(SCRIPT), str(uv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return done.returncode, done.stdout, done.stderr


def said(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_known_vulnerability_fails_and_is_named(tmp_path: Path) -> None:
    status, out, err = advisories(tmp_path, said(CLEAN, FAULTY, SKIPPED))
    assert (status, err) == (1, "")
    assert "jinja2 2.4.6: PYSEC-1, mended in 3.1.6\n" in out
    assert "1 known vulnerabilities in 2 of 3 packages (pypi" in out


def test_none_known_is_said_with_how_many_were_asked(tmp_path: Path) -> None:
    status, out, err = advisories(tmp_path, said(CLEAN, SKIPPED))
    assert (status, err) == (0, "")
    assert out.startswith("0 known vulnerabilities in 1 of 2 packages (pypi")


@pytest.mark.parametrize("first", [said(SKIPPED, SKIPPED), "", "no JSON", "{}"])
def test_where_all_were_skipped_the_next_service_is_asked(tmp_path: Path, first: str) -> None:
    status, out, err = advisories(tmp_path, first, said(FAULTY))
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("advisories of pypi: ") and "(osv" in out
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split("--vulnerability-service ")[1][:4].strip() for line in asked] == [
        "pypi",
        "osv",
    ]


def test_a_network_without_either_is_no_fault_and_no_all_clear(tmp_path: Path) -> None:
    status, out, err = advisories(tmp_path, said(SKIPPED), "")
    assert (status, out) == (0, "")
    assert err.splitlines()[-1].startswith("no advisory data can be reached")
