"""Prompts, answers and accuracies are those of lm-evaluation-harness, in float32 on CPU."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from expertcut.cli import app
from expertcut.data import Quiz, Selection, load_quiz, prompt
from expertcut.evaluation.results import ModelResult, Results, load_results
from expertcut.profiling.storage import load_profile
from tests.conftest import make_checkpoint, make_tokenizer
from tests.support.harness import GROUP, Asked, Harnessed, harness, task_name

Array = np.ndarray[Any, Any]
QUICKSTART = Path(__file__).resolve().parents[2] / "checkpoints" / "quickstart"
TOLERANCE = 1e-4
# Newlines and outer spaces in cells, choices that read "None", and a \r\n among the shots.
AWKWARD_MMLU = ("college_mathematics", "nutrition", "world_religions")
AWKWARD_ROWS = [
    ["  Which one?\n", " first ", "second,\nin two lines", "None", "NA", "C"],
    ["What is {{question}}?", '"quoted"', "{% raw %}", "a, b", "{{choices[0]}}", "A"],
    ["Lines,\r\n\r\nand an empty one", "\ttab", "at the end\r\n", "nan", "0", "D"],
    ["Größe – ∑\u2028½ of 日本?", "é", "e\u0301", "\u00a0x\u00a0", "🙂", "B"],
    ["Answer: A\n\nQuestion", "Answer:", "A.", "\\n", "B. A", "B"],
]
# What tells where a task lies, and not what it asks.
WHERE = ("task", "dataset_path", "metadata")
THEIR_TABLES = """
import json, sys
from lm_eval.utils import make_table
for file in sys.argv[1:]:
    found = json.load(open(file))
    print(make_table(found))
    assert make_table(found, "groups")
"""
PLAIN = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, faults = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(faults.values()), faults
    print(type(model).__name__, model.config.num_experts)
assert "expertcut" not in sys.modules
"""
# Rolling log-likelihoods of each model, whose tokenizer is told to write no BOS itself.
ROLLING = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
models, texts, most = json.loads(sys.argv[1])
asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
found = []
for model in models:
    options = {"dtype": "float32", "device": "cpu", "batch_size": 1, "max_length": most}
    lm = HFLM(pretrained=model, add_bos_token=False, **options)
    found.append(lm.loglikelihood_rolling(asked, disable_tqdm=True))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Evaluated:
    """What `expertcut eval` says of one model; log p of the choices (N, C) by subject."""

    result: ModelResult
    logprobs: dict[str, Array]


@pytest.mark.slow
def test_prompts_and_scores_on_mmlu_are_those_of_lm_eval(
    real_mmlu: Path, real_tokenizer: Path, tmp_path: Path
) -> None:
    model = model_with_real_vocabulary(tmp_path / "olmoe", real_tokenizer)
    both = [Asked(real_mmlu, AWKWARD_MMLU, shots, limit=20) for shots in (0, 5)]
    runs = harness([(model, asked, tmp_path / f"{asked.shots} shots") for asked in both])
    for asked, theirs in zip(both, runs, strict=True):
        _, (ours,) = evaluate([model], asked, tmp_path / f"results-{asked.shots}.json")
        assert ours.result.questions == 60
        assert_agreement(ours, theirs, asked)
        text = theirs.samples["college_mathematics"][8].prompt
        assert "II. P is diagonalizable.\nIII. " in text
        assert "\nA. None\n" in text
        assert ("\r\n" in text) == (asked.shots == 5)


def test_pruned_and_healed_and_reweighted_models_are_stock_models_that_score_as_eval_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    part = ("--quiz", QUICKSTART / "quiz", "--split=val", "--limit=5")
    run("profile", QUICKSTART, *part, "--out=p")
    favourite = load_profile(Path("p")).layers[1].appearances_E.argmax()
    run("prune", "--profile=p", "--keep-active", "--out=pruned")
    run("reweight", "--profile=p", "--boost", f"1:{favourite}=0.5", "--out=reweighted")
    few = ("--steps=4", "--batch=4", "--shots=1", "--no-verify", "--out=healed")
    run("heal", "pruned", *part, *few)
    edited = [tmp_path / "healed", tmp_path / "reweighted"]
    n_healed, n_reweighted = load_without_expertcut(edited)
    assert n_healed < n_reweighted

    asked = smaller_quiz(tmp_path / "quiz")
    results, (base, *ours) = evaluate([QUICKSTART, *edited], asked, tmp_path / "results.json")
    assert base.result.questions == 54
    theirs = harness([(model, asked, model.with_suffix(".lm_eval")) for model in edited])
    predicted = pandas.read_parquet(tmp_path / "predictions.parquet")
    files = sorted(tmp_path.glob("harness-*.json"))
    assert [f.name.split("-")[1] for f in files] == ["0", "1", "2"]
    for evaluated, harnessed, file in zip(ours, theirs, files[1:], strict=True):
        assert_same_file(json.loads(file.read_text()), harnessed, asked)
        assert_same_predictions(predicted, evaluated.result.path, harnessed, asked)
    assert_lm_eval_reads(files)
    for evaluated, harnessed, change in zip(ours, theirs, results.comparisons, strict=True):
        assert_agreement(evaluated, harnessed, asked)
        assert change.max_abs_logprob_diff > 0.05  # else the edit changed nothing


def test_losses_of_texts_are_its_rolling_log_likelihoods(tmp_path: Path) -> None:
    """Of documents shorter and longer than the context; a BOS is read once, not scored."""
    plain, with_bos = (make_checkpoint(tmp_path / name, "olmoe") for name in ("plain", "bos"))
    written = json.loads((with_bos / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    (with_bos / "tokenizer.json").write_text(json.dumps(written))
    texts = ["One bird.", "Frogs sing of rain " * 5, "x", "A tall tree, an old bird. " * 3]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    models, out = [str(plain), str(with_bos)], tmp_path / "results.json"
    run("eval", *models, "--text", file, "--max-tokens", 24, "--out", out)
    asked = json.dumps([models, texts, 24])
    done = subprocess.run(
        [sys.executable, "-c", ROLLING, asked], capture_output=True, text=True, check=True
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    n_bytes = sum(len(text.encode()) for text in texts)
    n_tokens = sum(map(len, make_tokenizer()(texts)["input_ids"]))
    for model, found in zip(load_results(out).models, theirs, strict=True):
        assert model.text is not None
        own, loss = model.text["texts"], -sum(found)
        assert own.tokens == n_tokens and loss > n_tokens
        assert np.log(own.perplexity) == pytest.approx(loss / n_tokens, abs=1e-5)
        assert own.bits_per_byte == pytest.approx(loss / n_bytes / np.log(2), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 5])
def test_every_prompt_of_mmlu_is_that_of_lm_eval(
    real_mmlu: Path, tmp_path: Path, shots: int
) -> None:
    quiz = load_quiz(Selection(str(real_mmlu), shots=shots))
    assert (len(quiz), len(quiz.questions)) == (14_042, 57)
    every = Asked(real_mmlu, tuple(quiz.questions), shots)
    (theirs,) = harness([(None, every, tmp_path / "lm_eval")])
    for subject in quiz.questions:
        assert [s.prompt for s in theirs.samples[subject]] == prompts(quiz, subject)


def assert_same_file(ours: dict[str, Any], theirs: Harnessed, asked: Asked) -> None:
    """What `--lm-eval-json` wrote has the keys of a real run, and its figures."""
    real, group = theirs.results, asked.quiz.name
    assert set(ours) == set(real)
    assert set(ours["config"]) == set(real["config"])
    tasks = {task_name(subject): f"{group}_{subject}" for subject in asked.subjects}
    for part in ("configs", "n-samples", "n-shot", "higher_is_better", "versions"):
        assert set(ours[part]) - {group} == set(tasks.values())
        for name, own in tasks.items():
            same = {k: v for k, v in as_dict(real[part][name]).items() if k not in WHERE}
            assert same == {k: v for k, v in as_dict(ours[part][own]).items() if k not in WHERE}
    assert {k: sorted(v) for k, v in ours["group_subtasks"].items()} == {
        group: sorted(tasks.values())
    }
    assert ours["groups"][group] == ours["results"][group]
    for name, own in {**tasks, GROUP: group}.items():
        found, expected = ours["results"][own], real["results"][name]
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert key in ("name", "alias") or found[key] == pytest.approx(value, rel=1e-9)


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"": value}


def assert_same_predictions(found: Any, path: str, theirs: Harnessed, asked: Asked) -> None:
    """`predictions.parquet` against the harness's own samples."""
    rows = found[found.model == path]
    assert len(rows) == sum(map(len, theirs.samples.values())) > 50
    for subject in asked.subjects:
        own, samples = rows[rows.subject == subject], theirs.samples[subject]
        assert own.row.tolist() == list(range(len(samples)))
        assert own.answer.tolist() == ["ABCD"[s.target] for s in samples]
        assert own.prediction.tolist() == ["ABCD"[s.prediction] for s in samples]
        assert own.is_correct.tolist() == [s.is_correct for s in samples]
        columns = [f"logprob_{letter}" for letter in "ABCD"]
        assert np.abs(own[columns].to_numpy() - theirs.logprob_NC(subject)).max() < TOLERANCE


def assert_lm_eval_reads(files: list[Path]) -> None:
    """Its own table is made of each file."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THEIR_TABLES, *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("quiz_awkward_cells") == len(files)


def assert_agreement(ours: Evaluated, theirs: Harnessed, asked: Asked) -> None:
    quiz = load_quiz(
        Selection(str(asked.quiz), shots=asked.shots, subjects=asked.subjects, limit=asked.limit)
    )
    assert set(quiz.questions) == set(asked.subjects)
    for subject, questions in quiz.questions.items():
        samples = theirs.samples[subject]
        assert [s.prompt for s in samples] == prompts(quiz, subject)
        assert {s.continuations for s in samples} == {(" A", " B", " C", " D")}
        answers = [q.answer for q in questions]
        assert [s.target for s in samples] == answers
        our_NC, their_NC = ours.logprobs[subject], theirs.logprob_NC(subject)
        assert their_NC.std(axis=0).min() > 10 * TOLERANCE  # else any question would do
        assert their_NC.std(axis=1).min() > 10 * TOLERANCE  # else any choice would do
        assert np.abs(our_NC - their_NC).max() < TOLERANCE
        assert our_NC.argmax(axis=1).tolist() == [s.prediction for s in samples]
        assert (our_NC.argmax(axis=1) == answers).tolist() == [s.is_correct for s in samples]
        assert ours.result.subjects[subject].accuracy == theirs.accuracy(subject)
        assert ours.result.subjects[subject].questions == len(questions)
    assert len({s.prediction for group in theirs.samples.values() for s in group}) > 1
    accuracy, stderr = theirs.pooled
    assert ours.result.accuracy == pytest.approx(accuracy, rel=1e-12)
    assert ours.result.stderr == pytest.approx(stderr, rel=1e-12)
    assert stderr > 0


def evaluate(models: list[Path], asked: Asked, out: Path) -> tuple[Results, list[Evaluated]]:
    """`expertcut eval` on what lm_eval is asked."""
    limit = ("--limit", asked.limit) if asked.limit else ()
    options = ("--subjects", ",".join(asked.subjects), "--shots", asked.shots, *limit)
    harness_file = ("--lm-eval-json", out.with_name("harness.json"))
    run("eval", *models, "--quiz", asked.quiz, *options, *harness_file, "--out", out)
    results = load_results(out)
    return results, [
        Evaluated(result, logprobs(next(out.with_suffix(".chunks").glob(f"{model.name}-*"))))
        for result, model in zip(results.models, models, strict=True)
    ]


def run(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


def logprobs(folder: Path) -> dict[str, Array]:
    profile = load_profile(folder)
    subjects, logprob_NC = np.array(profile.subjects()), profile.array("choice_logprob_NC")
    return {name: logprob_NC[subjects == name] for name in profile.info.quiz.subjects}


def prompts(quiz: Quiz, subject: str) -> list[str]:
    return [prompt(q, quiz.shots_by_subject[subject]) for q in quiz.questions[subject]]


def load_without_expertcut(folders: list[Path]) -> list[int]:
    """Experts of each checkpoint as transformers alone sees it, nothing lost or left over."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *folders], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names, counts = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert set(names) == {"OlmoeForCausalLM"}
    return list(map(int, counts))


def model_with_real_vocabulary(folder: Path, tokenizer: Path) -> Path:
    make_checkpoint(
        folder,
        "olmoe",
        vocab_size=50304,
        hidden_size=64,
        intermediate_size=32,
        num_experts=16,
        num_experts_per_tok=4,
        pad_token_id=1,
        bos_token_id=50279,
        eos_token_id=50279,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def smaller_quiz(folder: Path) -> Asked:
    """Three subjects of the quickstart quiz, cut short, and one with awkward cells."""
    whole = load_quiz(Selection(str(QUICKSTART / "quiz"), shots=0))
    sizes = dict(zip(whole.questions, (13, 16, 20), strict=False))  # the pooled error weighs them
    for split in ("dev", "val", "test"):
        (folder / split).mkdir(parents=True)
        awkward = folder / split / f"awkward_cells_{split}.csv"
        with awkward.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(AWKWARD_ROWS)
        for subject, n_questions in sizes.items():
            name = f"{split}/{subject}_{split}.csv"
            lines = (QUICKSTART / "quiz" / name).read_text().splitlines(keepends=True)
            (folder / name).write_text("".join(lines[:n_questions]))
    return Asked(folder, (*sizes, "awkward_cells"), shots=5)
