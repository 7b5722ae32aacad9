"""Layer by layer: the bytes of an ordinary run, every weight read once, few of them in memory."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertcut.data import Selection, load_quiz
from expertcut.data.corpus import TextSelection, load_corpus
from expertcut.errors import ContractError, ModelError
from expertcut.models import layerwise
from expertcut.models.load import LoadOptions, MoeModel, find_source, load
from expertcut.models.safetensors_index import StoredTensor
from expertcut.profiling.measure import ChunkedRun, Measurement, MeasureOptions
from expertcut.profiling.measure_text import TextMeasurement
from tests.conftest import FAMILIES
from tests.support.families import MORE

Checkpoints = Callable[..., Path]
WORDS = ["owl", "crow", "heron", "ibis", "wren", "kite", "swift", "rook"]
OPTIONS = MeasureOptions(batch_tokens=256, threads=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file, chance = tmp_path_factory.mktemp("text") / "birds.jsonl", random.Random(0)
    texts = (" ".join(chance.choices(WORDS, k=chance.randint(5, 40))) for _ in range(20))
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    return file


def of_quiz(model: Path, quiz: Path, **options: object) -> Measurement:
    return Measurement(
        opened(model, **options), load_quiz(Selection(str(quiz), limit=2)), 2, OPTIONS
    )


def of_text(model: Path, text: Path, **options: object) -> TextMeasurement:
    moe = opened(model, **options)
    return TextMeasurement(moe, load_corpus(TextSelection((str(text),)), moe.tokenizer), OPTIONS)


def opened(model: Path, **options: object) -> MoeModel:
    return load(find_source(str(model)), replace(LoadOptions(layerwise=True), **options))  # type: ignore[arg-type]


def passing(
    run: ChunkedRun, folder: Path, on_pass: Callable[[object], object] = lambda _: None
) -> dict[str, bytes]:
    """The bytes of a finished run."""
    steps = list(run.run(folder, on_pass))  # type: ignore[arg-type]
    assert steps[-1].done == steps[-1].total
    found = [folder / "profile.json", *folder.glob("chunks/*")]
    return {file.name: file.read_bytes() for file in found}


def test_a_layerwise_profile_has_the_bytes_of_an_ordinary_one(
    checkpoint: Checkpoints,
    quiz_folder: Path,
    text: Path,
    tmp_path: Path,
    family: str = "olmoe",
) -> None:
    model = checkpoint(family)
    for name, make, what in (("quiz", of_quiz, quiz_folder), ("text", of_text, text)):
        usual = passing(make(model, what, layerwise=False), tmp_path / f"{name}-usual")  # type: ignore[operator]
        run = make(model, what, layerwise=True)  # type: ignore[operator]
        assert run.moe.layers is not None
        assert passing(run, tmp_path / name) == usual


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE}))
def test_so_it_is_in_every_family(
    family: str, checkpoint: Checkpoints, quiz_folder: Path, text: Path, tmp_path: Path
) -> None:
    test_a_layerwise_profile_has_the_bytes_of_an_ordinary_one(
        checkpoint, quiz_folder, text, tmp_path, family
    )


def test_a_run_that_is_killed_at_any_pass_and_resumed_ends_with_the_same_bytes(
    checkpoint: Checkpoints,
    quiz_folder: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EXPERTCUT_CACHE", str(tmp_path / "cache"))  # checks are remembered
    model = checkpoint("olmoe")
    for make, what, at in ((of_quiz, quiz_folder, 0.5), (of_text, text, 0.1), (of_text, text, 0.9)):
        steps, out = list[object](), tmp_path / "out"
        whole = passing(make(model, what), out, steps.append)  # type: ignore[operator]
        shutil.rmtree(out)
        kept, left = tmp_path / "kept", [None] * round(at * len(steps))
        with pytest.raises(IndexError):
            passing(make(model, what, hidden_states=kept), out, lambda _, left=left: left.pop())  # type: ignore[operator, misc]
        run, loaded = make(model, what, hidden_states=kept), list[int]()  # type: ignore[operator]
        run.moe.layers.loaded = noting(run.moe.layers.loaded, loaded)
        assert passing(run, out) == whole
        assert not list(kept.rglob("*.safetensors"))
        assert loaded == ([0, 1] if at < 0.5 else [1])  # finished layers are not loaded again
        shutil.rmtree(out)


def noting(call: Callable[[int], object], numbers: list[int]) -> Callable[[int], object]:
    def noted(number: int) -> object:
        numbers.append(number)
        return call(number)

    return noted


def test_each_weight_is_read_once_and_at_most_two_layers_are_in_memory(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("olmoe", num_hidden_layers=4)
    read, read_tensor = list[StoredTensor](), layerwise.read_tensor

    def note(stored: StoredTensor) -> torch.Tensor:
        read.append(stored)
        return read_tensor(stored)

    monkeypatch.setattr(layerwise, "read_tensor", note)
    run = of_quiz(model, quiz_folder)
    layers, most = run.moe.layers, 0
    assert layers is not None
    n_of_decoders = sum(map(len, layers.names.values())) - len(layers.names[None])
    assert len(read) == len(layers.names[None]) < n_of_decoders

    def count(_step: object) -> None:
        nonlocal most
        is_held = [layer.mlp.experts.down_proj.device.type != "meta" for layer in layers.layers]
        most = max(most, sum(is_held))

    list(run.run(tmp_path / "p", count))
    assert most == 1
    assert sorted(s.begin for s in read) == sorted(s.begin for s in run.moe.source.headers.values())


def damaged(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_bad_weight_is_named_when_its_layer_is_loaded(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    model = checkpoint("olmoe")
    nan = damaged(model, tmp_path / "nan", lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(ModelError, match=f"holds NaN or infinity, 1024 of .* of {name}"):
        list(of_quiz(nan, quiz_folder).run(tmp_path / "a"))
    without = damaged(model, tmp_path / "without", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"lacks 1 of the model's weights, first {name}"):
        list(of_quiz(without, quiz_folder).run(tmp_path / "b"))


def test_layers_that_read_the_keys_of_others_are_refused_by_name(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source(str(checkpoint("olmoe")))
    config = load(source, LoadOptions()).model.config
    config.num_kv_shared_layers = 1
    monkeypatch.setattr("expertcut.models.load._checked_config", lambda *_: (config, False))
    with pytest.raises(ContractError, match="layers of olmoe read the keys of others"):
        load(source, LoadOptions(layerwise=True))


def test_eval_layerwise_has_the_results_of_eval(
    checkpoint: Checkpoints,
    quiz_folder: Path,
    text: Path,
    tmp_path: Path,
    expertcut: Callable[..., str],
) -> None:
    models = [checkpoint("olmoe"), checkpoint("olmoe", seed=1)]
    asked = ["eval", *models, "--quiz", quiz_folder, "--shots", 1, "--limit", 2, "--text", text]
    expertcut(*asked, "--out", "usual.json", "--threads", 1)
    layered = [*asked, "--threads", 1, "--layerwise"]
    expertcut(*layered, "--out", "layers.json")
    usual, layers = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("usual", "layers"))
    assert layers == usual
    chunks = [
        sorted(file.read_bytes() for file in (tmp_path / f"{name}.chunks").rglob("*.safetensors"))
        for name in ("usual", "layers")
    ]
    assert chunks[0] == chunks[1] != []


def test_a_checkpoint_checked_layer_by_layer_has_the_same_proof(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path, expertcut: Callable[..., str]
) -> None:
    quiz = ("--quiz", quiz_folder, "--shots", 1, "--split", "val", "--threads", 1)
    expertcut("profile", checkpoint("olmoe"), *quiz, "--out", "p")
    edits = {
        "prune": ("--keep", 4, "--layout", "stock"),
        "reweight": ("--boost", "0:1", "--layout", "exact"),
    }
    for command, words in edits.items():
        told = [command, "--profile", "p", *words, "--out"]
        expertcut(*told, f"{command}-usual")
        expertcut(*told, f"{command}-layers", "--layerwise", "--hidden-states", "h")
        usual, layers = (
            json.loads((tmp_path / f"{command}-{way}" / "plan.json").read_text())
            for way in ("usual", "layers")
        )
        assert layers == usual
        assert usual["proof"]["held_out"][0]["questions"] > 0
    cut = ("prune", "--profile", "p", "--keep", 4, "--layerwise", "--out", "s")
    told = expertcut(*cut, "--by", "reap", "--sequential", status=2)
    assert "needs the whole model" in told


def test_what_does_not_go_with_layerwise_is_refused(
    checkpoint: Checkpoints, quiz_folder: Path, expertcut: Callable[..., str]
) -> None:
    model = checkpoint("olmoe")
    profile = ["profile", model, "--quiz", quiz_folder, "--shots", 1]
    assert "--layerwise: add" in expertcut(*profile, "--hidden-states", "h", status=2)
    layered = [*profile, "--layerwise"]
    assert "give one of them" in expertcut(*layered, "--device-map", "auto", status=2)
    assert "--perturb asks" in expertcut(*layered, "--perturb", "shuffle-choices", status=2)
    told = expertcut("eval", model, "--tasks", "arc", "--layerwise", status=2)
    assert "run --tasks and --generate without it" in told
