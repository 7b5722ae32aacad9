"""What is expensive to derive is derived once in a command."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from expertcut.cli import app
from expertcut.data import sources
from expertcut.edits import plan
from expertcut.models import safetensors_index
from expertcut.models.load import find_source
from expertcut.profiling import storage
from tests.conftest import write_quiz


@pytest.fixture
def model(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny OLMoE, with a profile of it in the working directory."""
    quiz = write_quiz(tmp_path / "quiz", {"dev": 2, "val": 8, "test": 4})
    monkeypatch.chdir(tmp_path)
    run("profile", checkpoint("olmoe"), "--quiz", quiz, "--split", "test", "--shots", 0)
    return checkpoint("olmoe")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often files are read and layer statistics are computed."""
    found: Counter[str] = Counter()

    def count(module: object, name: str, key: Callable[..., str]) -> None:
        function = getattr(module, name)

        def counted(*args: object, **kwargs: object) -> object:
            found[key(*args)] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(safetensors_index, "read_file", lambda file: f"header of {file}")
    count(storage, "layers_of", lambda *_: "layers")
    count(storage, "read_chunk", lambda file, *_: f"chunk {file}")
    count(plan, "load_plan", lambda *_: "plan")
    count(sources, "_find_source", lambda *_: "quiz")
    return found


def run(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


def test_a_prune_parses_each_header_and_derives_the_layers_once(
    model: Path, counts: Counter[str]
) -> None:
    run("prune", "--keep-fraction", 0.5, "--by", "reap", "--out", "cut")
    assert counts[f"header of {model / 'model.safetensors'}"] == 1
    assert counts["layers"] == 1
    assert {n for name, n in counts.items() if name != "quiz"} == {1}


def test_the_plan_of_a_model_that_was_cut_is_read_once(model: Path, counts: Counter[str]) -> None:
    run("prune", "--keep", 6, "--by", "random", "--no-verify", "--out", "cut")
    run("profile", "cut", "--quiz", "quiz", "--split", "test", "--shots", 0, "--out", "p")
    counts.clear()
    run("prune", "--profile", "p", "--keep", 4, "--by", "reap", "--no-verify", "--out", "again")
    assert counts["plan"] == 1


def test_a_sweep_of_more_cells_reads_no_more(model: Path, counts: Counter[str]) -> None:
    read = []
    for i, fractions in enumerate(("0.5", "0.5,0.75,0.25")):
        counts.clear()
        options = ("--by", "reap", "--quiz", "quiz", "--split", "val", "--shots", 0)
        run("prune", "--sweep", fractions, *options, "--out", f"sweep-{i}")
        read.append({name: n for name, n in counts.items() if "chunk sweep" not in name})
    assert read[0] == read[1]
    assert read[0]["layers"] == 1


def test_headers_of_a_file_that_changed_are_parsed_again(model: Path, tmp_path: Path) -> None:
    source = find_source(str(shutil.copytree(model, tmp_path / "model")))
    before = source.headers
    assert source.headers is before
    tensors = load_file(source.path / "model.safetensors")
    lost, _ = tensors.popitem()
    save_file(tensors, source.path / "model.safetensors", {"format": "pt"})
    assert lost in before
    assert lost not in source.headers
