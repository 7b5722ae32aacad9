"""What a run of `heal` leaves behind, what it goes on from, and what it must never destroy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from expertcut.errors import OutputError
from expertcut.healing.asking import Place
from expertcut.healing.heal import Options, heal
from expertcut.moe.loading import LoadOptions
from tests.healed_models import SHORT, asked_for, cut, healed

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def stock(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return cut(checkpoint("olmoe"), quiz_folder, tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("of", ["base", "teacher", "cache", "quiz", "eval_quiz"])
def test_what_is_read_is_never_replaced(
    stock: Path, checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path, of: str
) -> None:
    asked, out = asked_for(quiz_folder), tmp_path / "out"
    (out / "inside").mkdir(parents=True)
    (out / "inside" / "precious").touch()
    if of == "base":
        out = checkpoint("olmoe")
    elif of == "teacher":
        other = checkpoint("olmoe", seed=3)
        asked, out = replace(asked, teacher=str(other)), other
    elif of == "cache":
        asked = replace(asked, cache=out / "inside")
    elif of == "quiz":
        asked = asked_for(out / "inside")
    else:
        asked = replace(asked, data=replace(asked.data, eval_quiz=str(out / "inside")))
    before = sorted(out.rglob("*"))
    with pytest.raises(OutputError, match="so --force spares it"):
        heal(str(stock), asked, Place(out, is_forced=True), Options(LoadOptions()))
    assert sorted(out.rglob("*")) == before != []


def test_an_empty_working_directory_can_be_what_is_written(
    stock: Path, quiz_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    asked = asked_for(quiz_folder, training=replace(SHORT, steps=1))
    healed(stock, asked, Path())
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    monkeypatch.chdir(tmp_path)  # the one that was here is gone
