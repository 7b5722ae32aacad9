"""A quiz that wants to be more than text, from its file through every command to page and card."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fake_hub import TOKEN
from tests.support.published import HOSTILE, REPO, run


def write_quiz(file: Path) -> Path:
    """Each hostile text as a subject, a question and a choice, four times."""
    rows = [
        {
            "subject": f"{subject} {HOSTILE[0]}",
            "question": f"{text} {number}",
            "choices": [text, "b", "c", "d"],
            "answer": number,
        }
        for subject, text in zip(HOSTILE, reversed(HOSTILE), strict=True)
        for number in range(4)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_a_hostile_quiz_changes_neither_page_nor_card_nor_terminal(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model, quiz = checkpoint("olmoe"), write_quiz(tmp_path / "quiz.jsonl")
    asked = ("--quiz", quiz, "--shots", 0, "--threads", 1)
    profile, cut = tmp_path / "run/profile", tmp_path / "run/cut"
    results = tmp_path / "run/results.json"
    said = ""
    for words in (
        ("profile", model, *asked, "--out", profile),
        ("show", profile, "--subjects"),
        ("prune", "--profile", profile, "--keep", 5, "--out", cut),
        ("eval", model, cut, *asked, "--out", results),
        ("show", results),
        ("report", tmp_path / "run"),
        ("publish", cut, REPO, "--results", results, "--dry-run"),
    ):
        done = run(monkeypatch, capsys, *words)
        assert done.status == 0, done.err
        said += done.out + done.err
    assert "alert(1)" in said  # the subjects are shown, as text
    assert all(char.isprintable() or char == "\n" for char in said)

    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 20 and not any(TOKEN.encode() in content for content in written)
    assert TOKEN not in said

    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "alert(1)" in page
    assert not re.search(r"<script>\s*alert|<img src=x|href=.?javascript:", page)
    card = (cut / "README.md").read_text(encoding="utf-8")
    assert card.count("\n---\n") == 1 and "license: evil" not in card.split("\n---\n")[0]
    assert "<script" not in card and "](javascript:" not in card
    assert all(char.isprintable() or char == "\n" for char in card)
