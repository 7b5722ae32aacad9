"""Tasks of lm-evaluation-harness, judged document by document; samples made elsewhere too."""

import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertcut import api
from expertcut.cli import app
from expertcut.evaluation.results import Results, load_results
from expertcut.evaluation.samples import read_samples
from expertcut.stats import bootstrap_ci95, compare
from tests.conftest import WORDS, Commands, make_checkpoint

N = 12  # documents of each task
CHOICES = ["A", "B", "C"]
NEW_TOKENS = 2
close = pytest.approx


@dataclass(frozen=True)
class World:
    """Two models, three tasks of different kinds on local documents, and one run of them."""

    folder: Path
    models: tuple[Path, Path]
    documents: list[dict[str, Any]]
    results: Results

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks"

    def samples(self, model: int) -> Path:
        (found,) = self.folder.glob(f"results.chunks/{self.models[model].name}-tasks-*")
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("tasks")
    base = make_checkpoint(folder / "base", "olmoe")
    other = make_checkpoint(folder / "other", "olmoe", seed=1)
    plain, chance = Plain(base), random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(2, 7))) for _ in range(N)]
    answers = [plain.written(text) for text in texts]  # every other one is the base's own
    documents = [
        {"text": text, "gold": chance.randrange(3), "answer": answer if i % 2 else "never"}
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "d.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    write_task(
        tasks, "pick", output_type="multiple_choice", doc_to_choice=CHOICES, doc_to_target="gold",
        metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    write_task(
        tasks, "say", output_type="generate_until", doc_to_target="{{answer}}",
        generation_kwargs={"until": ["<eos>"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    write_task(
        tasks, "read", output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    write_task(
        tasks, "count", output_type="generate_until", doc_to_target="{{answer}}",
        generation_kwargs={"until": ["<eos>"], "max_gen_toks": 1, "do_sample": False},
        metric_list=[{"metric": "ter"}],
    )  # fmt: skip
    out = folder / "results.json"
    words = ["eval", base, other, "--tasks", "pick,say,read", "--include-path", tasks, "--out", out]
    app([str(word) for word in words], standalone_mode=False)
    return World(folder, (base, other), documents, load_results(out))


def write_task(folder: Path, name: str, **keys: Any) -> None:
    where = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/d.jsonl"}},
    }
    task = {"task": name, **where, "test_split": "test", "doc_to_text": "{{text}}:", **keys}
    (folder / f"{name}.yaml").write_text(json.dumps(task))


class Plain:
    """A model as transformers alone runs it, one row at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprobs(self, context: list[int], rest: list[int]) -> float:
        logits_TV = self.model(torch.tensor([context + rest])).logits[0].log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(rest) - 1)
        return sum(float(logits_TV[t, token]) for t, token in zip(places, rest, strict=True))

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text)["input_ids"]
        return found

    @torch.no_grad()
    def written(self, text: str) -> str:
        tokens = self.ids(f"{text}:")
        start = len(tokens)
        for _ in range(NEW_TOKENS):
            tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return str(self.tokenizer.decode(tokens[start:]))

    def outcomes(self, documents: list[dict[str, Any]]) -> dict[str, Any]:
        """By task: right choices, exact matches, log p of the texts; (N,) each."""
        letters = [self.ids(f" {choice}") for choice in CHOICES]
        ids = [self.ids(f"{d['text']}:") for d in documents]
        picked = [int(np.argmax([self.logprobs(t, letter) for letter in letters])) for t in ids]
        prefix = [self.tokenizer.bos_token_id]
        return {
            "pick": np.array([p == d["gold"] for p, d in zip(picked, documents, strict=True)]),
            "say": np.array([self.written(d["text"]) == d["answer"] for d in documents]),
            "read": np.array([self.logprobs(prefix, self.ids(d["text"])) for d in documents]),
        }


def test_outcomes_of_three_kinds_of_tasks_are_those_of_plain_forward_passes(world: World):
    base, other = (Plain(model).outcomes(world.documents) for model in world.models)
    assert base["say"].sum() == N // 2 != other["say"].sum()
    assert base["pick"].any() and (base["pick"] != other["pick"]).any()
    (compared,) = world.results.comparisons
    assert compared.tasks is not None
    for task in ("pick", "say"):
        for model, own in zip(world.results.models, (base, other), strict=True):
            assert model.tasks is not None
            assert model.tasks[task].value == own[task].mean()
        expected, found = compare(base[task], other[task]), compared.tasks[task]
        assert found.delta == expected.delta
        assert (found.gained, found.lost) == (expected.gained, expected.lost)
        assert (found.mcnemar_p, found.ci95) == (expected.mcnemar_p, expected.ci95)
        assert found.unpaired_p is not None and found.unpaired_p > 0
    words_N = np.array([len(re.split(r"\s+", d["text"])) for d in world.documents])
    for model, own in zip(world.results.models, (base, other), strict=True):
        assert model.tasks is not None
        value = math.exp(-own["read"].sum() / words_N.sum())
        assert model.tasks["read"].value == close(value, rel=1e-4)
    read, change_N = compared.tasks["read"], base["read"] - other["read"]
    assert read.delta == close(change_N.sum() / words_N.sum(), abs=1e-4)
    assert read.ci95 == close(bootstrap_ci95(change_N, words_N), abs=1e-4)
    assert read.ci95[0] < read.delta < read.ci95[1] and read.gained is None


def test_values_and_errors_are_those_of_the_harness(world: World):
    from lm_eval.api.metrics import mean_stderr

    for i, model in enumerate(world.results.models):
        (file,) = world.samples(i).rglob("results_*.json")
        theirs = json.loads(file.read_text())["results"]
        assert model.tasks is not None and len(model.tasks) == 3
        for task, own in model.tasks.items():
            assert theirs[task][own.metric] == close(own.value, rel=1e-12)
        for name, found in read_samples(world.samples(i)).items():
            assert model.tasks[name].documents == N
            if not found.is_loss:
                assert model.tasks[name].stderr == close(mean_stderr(found.value_N.tolist()))


def test_samples_made_elsewhere_give_the_same_and_a_model_equals_itself(
    world: World, expertcut: Commands
):
    printed = expertcut("eval", "--samples", world.samples(0), world.samples(1), "--out", "r.json")
    assert "McNemar" in printed
    found = load_results(Path("r.json"))
    assert found.comparisons[0].tasks == world.results.comparisons[0].tasks
    assert [m.tasks for m in found.models] == [m.tasks for m in world.results.models]

    (file,) = world.samples(1).rglob("samples_say_*")
    expertcut("eval", "--samples", file, file, "--out", "same.json")
    (compared,) = load_results(Path("same.json")).comparisons
    assert compared.tasks is not None
    (same,) = compared.tasks.values()
    assert (same.delta, same.mcnemar_p, same.gained, same.lost) == (0, 1, 0, 0)
    assert same.ci95[0] < 0 < same.ci95[1]  # no change in few documents proves little
    rows = expertcut("show", "r.json", "--format", "csv").splitlines()
    assert len(rows) == 1 + 2 * 3
    assert json.loads(expertcut("show", "r.json", "--format", "json"))["quiz"] is None
    expertcut("report", "r.json", "--out", "page.html")
    assert "word_perplexity" in Path("page.html").read_text()


def test_a_finished_model_is_not_asked_again(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", None)
    found = api.evaluate(
        world.models,
        tasks=["pick", "say", "read"],
        include_path=world.tasks,
        out=world.folder / "results.json",
    )
    assert found.results == world.results
    assert found.tasks.delta.notna().sum() == 3


def spoiled(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        change(records)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoiled(lambda r: r.pop(3)), "document 3 of pick is not in"),
        (spoiled(lambda r: r[4].update(doc_hash="0")), r":5: another text \(doc_hash\) than .*:5"),
        (spoiled(lambda r: r[4].update(prompt_hash="0")), r":5: another prompt \(prompt_hash\)"),
        (spoiled(lambda r: r[1].update(doc_id=0)), r":2: document 0 stands at .*:1 too"),
        (spoiled(lambda r: r[2].pop("doc_id")), ":3: not a sample of lm-evaluation-harness"),
        (spoiled(lambda r: r[2].update(acc=[1, 2])), "no metric that averages one number"),
        (spoiled(lambda r: r[2].update(acc=1 - r[2]["acc"])), "no metric that averages"),
        (lambda file: file.write_text("{]\n"), ":1: not JSON"),
        (lambda file: file.write_text(""), "holds no samples"),
        (lambda file: shutil.copy(file, file.with_name("samples_pick.jsonl")), "a second file"),
    ],
)
def test_samples_that_do_not_match_are_refused_in_one_line(
    world: World, expertcut: Commands, spoil: Callable[[Path], None], says: str
):
    shutil.copytree(world.samples(1), "other")
    for other in ("say", "read"):
        next(Path("other").rglob(f"samples_{other}_*")).unlink()
    (file,) = Path("other").rglob("samples_pick_*")
    (base,) = world.samples(0).rglob("samples_pick_*")
    spoil(file)
    told = expertcut("eval", "--samples", base, "other", status=2)
    assert re.search(says, told) and len(told.strip().splitlines()) == 1
    assert not Path("results.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--tasks pic", "no such task: did you mean pick?"),
        ("--tasks count", "no metric that averages one number a document"),
        ("--tasks broken", "--tasks broken: "),
        ("--tasks code", "runs code that the model writes"),
        ("--tasks pick --backend local-completions", "--base-url"),
        ("--tasks pick --base-url http://127.0.0.1:9", "--base-url"),
        ("--tasks pick --samples", "--samples judges files"),
        ("--tasks pick --backend vllm", "needs vllm"),
        ("--backend hf --apply-chat-template", "is for --tasks"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    world: World, expertcut: Commands, monkeypatch: pytest.MonkeyPatch, words: str, says: str
):
    tasks = Path(shutil.copytree(world.tasks, "tasks"))
    write_task(tasks, "broken", dataset_kwargs={"data_files": {"test": "absent.jsonl"}})
    write_task(tasks, "code", output_type="generate_until", doc_to_target="0", unsafe_code=True)
    # The stock tasks take seconds to index.
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex._iter_yaml_files", only(tasks))
    own = [] if "--tasks" not in words else ["--include-path", tasks]
    told = expertcut("eval", *world.models, *words.split(), *own, status=2)
    assert says in told and len(told.strip().splitlines()) == 1
    assert not Path("results.json").exists()


def test_the_metric_of_code_runs_only_where_that_is_confirmed(
    world: World, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
):
    tasks = Path(shutil.copytree(world.tasks, "tasks"))
    write_task(tasks, "program", output_type="generate_until", doc_to_target="0", unsafe_code=True)
    yaml = (tasks / "program.yaml").read_text().removesuffix("}")
    yaml += ', "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 1},'
    yaml += ' "metric_list": [{"metric": !function code.passes, "aggregation": mean}]}'
    (tasks / "program.yaml").write_text(yaml)
    asks = 'import os\nif os.environ.get("HF_ALLOW_CODE_EVAL") != "1":\n'  # as code_eval does
    asks += '    raise ValueError("set HF_ALLOW_CODE_EVAL")\n'
    (tasks / "code.py").write_text(f"{asks}def passes(**asked): return 1.0\n")
    monkeypatch.setattr("lm_eval.tasks.manager.TaskIndex._iter_yaml_files", only(tasks))
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    words = ("eval", *world.models, "--tasks", "program", "--include-path", tasks)
    told = expertcut(*words, status=2)
    assert "runs code that the model writes" in told and len(told.strip().splitlines()) == 1
    assert f"on {N} documents" in expertcut(*words, "--confirm-run-unsafe-code")
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


def only(folder: Path) -> Any:
    return staticmethod(lambda root: sorted(folder.glob("*.yaml")) if root == folder else [])


def test_a_missing_extra_is_named(
    world: World, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("expertcut.evaluation.tasks.find_spec", lambda name: None)
    told = expertcut("eval", *world.models, "--tasks", "pick", status=2)
    assert "pip install 'expertcut[tasks]'" in told


def test_the_bootstrap_is_that_of_a_ratio(world: World):
    rng = np.random.default_rng(1)
    weight_N = rng.integers(5, 50, 400).astype(float)
    sum_N = weight_N * rng.normal(0.1, 1.0, 400)
    low, high = bootstrap_ci95(sum_N, weight_N)
    ratio = sum_N.sum() / weight_N.sum()
    stderr = (sum_N - ratio * weight_N).std() * math.sqrt(400) / weight_N.sum()
    assert (low, high) == close((ratio - 1.96 * stderr, ratio + 1.96 * stderr), abs=0.1 * stderr)
    assert bootstrap_ci95(sum_N, weight_N) == (low, high)
    assert bootstrap_ci95(weight_N, weight_N) == (1, 1)
