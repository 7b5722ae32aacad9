"""The three commands of the paper, as they stand, against a Hub on loopback with tiny stand-ins."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertcut.cli import main
from expertcut.data.sources import MMLU_REVISION
from tests.conftest import WORDS, make_checkpoint
from tests.support.fake_hub import LocalHub

MODEL_ID = "allenai/OLMoE-1B-7B-0125-Instruct"
QUIZ_ID = "cais/mmlu"
SUBJECTS = ("anatomy", "astronomy")
COUNTS = {"dev": 5, "validation": 20, "test": 12}
PAPER = (["profile"], ["prune", "--keep-active"], ["reweight", "--boost", "12"])
CUT, TILTED = (f"OLMoE-1B-7B-0125-Instruct-{what}" for what in ("keep-active", "boost-1.12"))
GATE = "model.layers.1.mlp.gate.weight"
FEATURES = [
    {"name": "question", "dtype": "string"},
    {"name": "subject", "dtype": "string"},
    {"name": "choices", "sequence": "string"},
    {"name": "answer", "dtype": {"class_label": {"names": {str(i): "ABCD"[i] for i in range(4)}}}},
]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Paper:
    """The three commands, run in an empty folder, and what they asked the Hub for."""

    hub: LocalHub
    hf_home: Path
    folder: Path
    done: Sequence[Done]
    asked: Sequence[str]

    @property
    def profile(self) -> Path:
        (folder,) = (self.folder / "profiles").iterdir()
        return folder


def expertcut(arguments: Sequence[str], folder: Path, environment: dict[str, str]) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "expertcut", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def write_mmlu(folder: Path, *, has_all: bool) -> Path:
    """A data set in the form of cais/mmlu, with or without the configuration of all subjects."""
    chance = random.Random(0)
    configs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for subject in SUBJECTS:
        for split, n_questions in COUNTS.items():
            rows = [_row(chance, subject) for _ in range(n_questions)]
            configs.setdefault(subject, {})[split] = rows
    if has_all:
        every = {split: [r for s in SUBJECTS for r in configs[s][split]] for split in COUNTS}
        auxiliary = [{**_row(chance, "all"), "subject": ""}]
        configs["all"] = {**every, "auxiliary_train": auxiliary}
        configs["auxiliary_train"] = {"train": auxiliary}
    for config, splits in configs.items():
        (folder / config).mkdir(parents=True)
        for split, rows in splits.items():
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(_card(configs))}---\n# MMLU\n")
    return folder


def _row(chance: random.Random, subject: str) -> dict[str, Any]:
    words = " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))
    return {
        "question": f"{chance.randrange(10**6)}: {words}?",
        "subject": subject,
        "choices": chance.sample(WORDS, 4),
        "answer": chance.randrange(4),
    }


def _card(configs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    files = {
        config: [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        for config, splits in configs.items()
    }
    counts = {
        config: [{"name": s, "num_bytes": 0, "num_examples": len(r)} for s, r in splits.items()]
        for config, splits in configs.items()
    }
    return {
        "license": "mit",
        "dataset_info": [
            {"config_name": config, "features": FEATURES, "splits": counts[config]}
            for config in configs
        ],
        "configs": [{"config_name": config, "data_files": files[config]} for config in configs],
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in whose expert 12 of the last layer is left out on average."""
    folder = tmp_path_factory.mktemp("model") / "olmoe"
    return make_checkpoint(folder, "olmoe", num_experts=16, num_experts_per_tok=4)


@pytest.fixture(scope="module")
def hub(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    mmlu = write_mmlu(tmp_path_factory.mktemp("quiz") / "mmlu", has_all=True)
    with LocalHub() as running:
        running.add("models", MODEL_ID, model)
        running.add("datasets", QUIZ_ID, mmlu, commit=MMLU_REVISION)
        yield running


@pytest.fixture(scope="module")
def paper(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Paper:
    hf_home = tmp_path_factory.mktemp("hf")
    folder = tmp_path_factory.mktemp("empty")
    done = [expertcut(command, folder, hub.environment(hf_home)) for command in PAPER]
    return Paper(hub, hf_home, folder, done, tuple(hub.asked))


def show(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["expertcut", "show", str(path), "--format", "json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    return json.loads(capsys.readouterr().out)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_three_commands_of_the_paper_run_as_they_stand(paper: Paper) -> None:
    assert [d.status for d in paper.done] == [0, 0, 0], paper.done
    for done in paper.done:  # at most how far it is
        assert re.fullmatch(r"((profiling|running) \S+ \d+/\d+ questions, .*\n)?", done.stderr)
    profiled, pruned, reweighted = (d.stdout for d in paper.done)
    assert profiled.startswith("quiz      24 test questions of ")
    assert "\nwritten   profiles/OLMoE-1B-7B-0125-Instruct-mmlu-test-5shot-" in profiled
    assert f"\nwritten   checkpoints/{CUT}\n" in pruned
    assert f"\nwritten   checkpoints/{TILTED}\n" in reweighted


def test_they_leave_a_profile_and_two_checkpoints_and_nothing_else(paper: Paper) -> None:
    assert {p.name for p in paper.folder.iterdir()} == {"profiles", "checkpoints"}
    assert {p.name for p in (paper.folder / "checkpoints").iterdir()} == {CUT, TILTED}
    files = {p.relative_to(paper.profile).as_posix() for p in paper.profile.rglob("*.*")}
    chunks = {f"chunks/{subject}-0.safetensors" for subject in SUBJECTS}
    assert files == {"profile.json", "run.json", *chunks}
    for name in (CUT, TILTED):
        files = {p.name for p in (paper.folder / "checkpoints" / name).iterdir()}
        assert files >= {"config.json", "model.safetensors", "tokenizer.json", "plan.json"}


def test_the_profile_says_which_revisions_it_saw(paper: Paper) -> None:
    info = json.loads((paper.profile / "profile.json").read_text())
    assert info["model"]["id"] == MODEL_ID
    assert info["model"]["revision"] == paper.hub.commit(MODEL_ID)
    assert (info["quiz"]["id"], info["quiz"]["revision"]) == (QUIZ_ID, MMLU_REVISION)
    assert (info["quiz"]["split"], info["quiz"]["shots"]) == ("test", 5)
    assert {s: q["questions"] for s, q in info["quiz"]["subjects"].items()} == {
        subject: COUNTS["test"] for subject in SUBJECTS
    }


def test_mmlu_is_asked_for_in_its_pinned_revision_only(paper: Paper) -> None:
    asked = [path for path in paper.asked if f"datasets/{QUIZ_ID}/" in path]
    assert asked
    assert [path for path in asked if MMLU_REVISION not in path] == []


def test_show_reads_all_three(
    paper: Paper, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = show(paper.profile, capsys, monkeypatch)
    assert shown["questions"] == 24
    assert [len(layer["expert"]) for layer in shown["layers"]] == [16, 16]
    most_active = max(layer["activated"] for layer in shown["layers"])
    cut = show(paper.folder / "checkpoints" / CUT, capsys, monkeypatch)
    kept = [block["keep"] for block in cut["blocks"].values()]
    assert [len(keep) for keep in kept] == [most_active, most_active]
    for layer, keep in zip(shown["layers"], kept, strict=True):
        assert {e["expert"] for e in layer["expert"] if e["appearances"]} <= set(keep)
    tilted = show(paper.folder / "checkpoints" / TILTED, capsys, monkeypatch)
    biases = [block["bias"] for block in tilted["blocks"].values()]
    assert biases[0] == {}
    assert list(biases[1]) == ["12"]
    assert biases[1]["12"] > 0


@pytest.mark.parametrize("name", [CUT, TILTED])
def test_the_checkpoints_load_with_plain_transformers(name: str, paper: Paper) -> None:
    folder = paper.folder / "checkpoints" / name
    model = load(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Which one?\nAnswer:", return_tensors="pt")
    logits_TV = model(**ids).logits[0]
    assert logits_TV.isfinite().all()
    plan = json.loads((folder / "plan.json").read_text())
    kept = {len(block["keep"]) for block in plan["blocks"].values()}
    assert kept == {model.config.num_experts}
    assert {len(layer.mlp.gate.weight) for layer in model.model.layers} == kept


def test_the_boost_changes_one_gate_row_and_nothing_else(paper: Paper, model: Path) -> None:
    before = load_file(model / "model.safetensors")
    after = load_file(paper.folder / "checkpoints" / TILTED / "model.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [GATE]
    changed = (before[GATE] != after[GATE]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [12]


def test_the_boosted_expert_serves_more_held_out_questions(paper: Paper) -> None:
    plan = json.loads((paper.folder / "checkpoints" / TILTED / "plan.json").read_text())
    (share,) = plan["proof"]["shares"]
    assert (share["layer"], share["expert"]) == (1, 12)
    assert share["base"] < share["edited"]
    against_base, _ = plan["proof"]["held_out"]
    assert against_base["questions"] > 1
    assert plan["chosen_on"]["fitted_split"] == plan["proof"]["held_out_split"] == "val"
    fitted = plan["chosen_on"]["fitted_questions"]
    assert fitted + against_base["questions"] == len(SUBJECTS) * COUNTS["validation"]
    served = f"it serves {share['edited']:.1%} of held-out questions, before {share['base']:.1%}"
    assert served in " ".join(paper.done[2].stdout.split())


def test_the_boost_says_in_words_what_it_did(paper: Paper) -> None:
    plan = json.loads((paper.folder / "checkpoints" / TILTED / "plan.json").read_text())
    bias = plan["blocks"]["model.layers.1.mlp"]["bias"]["12"]
    (agreement,) = plan["proof"]["agreement"]
    said = " ".join(paper.done[2].stdout.split())
    assert (
        f"Expert 12 of layer 1 is boosted by {bias:+.4f} on its logit (its admission gap)" in said
    )
    assert (
        f"In layer 1 the checkpoint chooses the very experts of the exact bias at "
        f"{agreement['same_answer']:.1%} of answer positions ({agreement['overlap_answer']:.1%} "
        f"of the experts) and at {agreement['same_all']:.1%} of all tokens"
    ) in said
    assert 0 < agreement["same_all"] <= agreement["overlap_all"] <= 1
    forms = ["unedited", *(f"bias {where}" for where in ("at answer positions only", "everywhere"))]
    assert [o["form"] for o in plan["proof"]["outcomes"]] == [*forms, "this checkpoint"]


@pytest.mark.slow
def test_they_give_the_same_bytes_offline_from_the_cache(paper: Paper, tmp_path: Path) -> None:
    folder = tmp_path / "offline"
    folder.mkdir()
    n_asked = len(paper.hub.asked)
    environment = paper.hub.environment(paper.hf_home, is_offline=True)
    done = [expertcut(command, folder, environment) for command in PAPER[:2]]
    assert [d.status for d in done] == [0, 0]
    assert len(paper.hub.asked) == n_asked
    assert [d.stdout for d in done] == [d.stdout for d in paper.done[:2]]
    written = [p for p in folder.rglob("*") if p.is_file() and p.name != "run.json"]
    assert len(written) > 8
    for path in written:
        assert path.read_bytes() == (paper.folder / path.relative_to(folder)).read_bytes(), path


def test_a_hub_without_the_pinned_revision_gives_its_main_one_and_says_so(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with LocalHub() as hub:
        mmlu = hub.add("datasets", QUIZ_ID, write_mmlu(tmp_path / "mmlu", has_all=False)).at("main")
        command = ["profile", str(model), "--shots", "1", "--limit", "2", "--out", "found"]
        done = expertcut(command, folder, hub.environment(tmp_path / "hf"))
        asked = [path for path in hub.asked if f"datasets/{QUIZ_ID}/" in path]
    assert done.status == 0, done.stderr
    assert done.stderr.startswith(f"WARNING: no such quiz: {QUIZ_ID} at revision c30699e8")
    assert done.stderr.endswith("; using its main revision instead\n")
    assert done.stderr.count("\n") == 1
    assert MMLU_REVISION in asked[0]
    assert any(mmlu.commit in path for path in asked)
    quiz = json.loads((folder / "found" / "profile.json").read_text())["quiz"]
    assert {s: q["questions"] for s, q in quiz["subjects"].items()} == dict.fromkeys(SUBJECTS, 2)


def test_a_folder_of_that_name_is_mmlu_without_any_hub(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_mmlu(tmp_path / QUIZ_ID, has_all=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    command = ["profile", str(model), "--shots", "0", "--limit", "2", "--out", "found"]
    monkeypatch.setattr(sys, "argv", ["expertcut", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert "quiz      4 test questions of cais/mmlu" in capsys.readouterr().out
    quiz = json.loads((tmp_path / "found" / "profile.json").read_text())["quiz"]
    assert (quiz["id"], quiz["revision"], tuple(quiz["subjects"])) == (QUIZ_ID, None, SUBJECTS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/where"], "no such model: no/where is not a folder here: "),
        pytest.param(
            *(["{model}", "--quiz", "no/where"], "no such quiz: no/where cannot be read: "),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_the_hub_does_not_have_is_refused_in_one_line(
    arguments: list[str], words: str, model: Path, hub: LocalHub, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    command = ["profile", *(text.format(model=model) for text in arguments)]
    n_asked = len(hub.asked)
    done = expertcut(command, folder, hub.environment(tmp_path / "hf"))
    assert any("no/where" in path for path in hub.asked[n_asked:])
    assert done.status == 2, done.stderr
    assert done.stderr.startswith(f"expertcut: {words}")
    assert done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_a_hub_that_cannot_be_reached_is_named_in_one_line(tmp_path: Path) -> None:
    with LocalHub() as hub:
        environment = hub.environment(tmp_path / "hf")
    done = expertcut(["profile"], tmp_path, environment)
    assert done.status == 2, done.stderr
    assert done.stderr.startswith(
        f"expertcut: no such model: {MODEL_ID} is not a folder here: the Hub"
    )
    assert done.stderr.count("\n") == 1
