"""lm-evaluation-harness as its users run it: a process of its own, offline, its stock mmlu tasks.

A Hendrycks CSV folder becomes the data set that those tasks read (`cais/mmlu` in the working
directory). A subject that is not MMLU's gets a task made from the stock template, with nothing
changed but the data set and the subject's name.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

GROUP = "asked"
_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}  # ours, and the data set's name
_DATA_SET = Path("cais/mmlu")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # tests share the cores
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}
# What `python -m lm_eval` does, for several command lines. Of its 13,000 stock tasks only those of
# MMLU are read: to read all takes three times as long as to answer.
_IN_TURN = """
import json, os, sys
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks._index import TaskIndex
every = TaskIndex._iter_yaml_files
mmlu = lambda root: root / "mmlu" if (root / "mmlu").is_dir() else root
TaskIndex._iter_yaml_files = staticmethod(lambda root: every(mmlu(root)))
for folder, *arguments in json.loads(sys.argv[1]):
    os.chdir(folder)
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
"""


@dataclass(frozen=True)
class Sample:
    """One question as lm_eval logged it."""

    prompt: str
    continuations: tuple[str, ...]
    logprobs: tuple[float, ...]
    target: int
    is_correct: bool

    @property
    def prediction(self) -> int:
        return int(np.argmax(self.logprobs))


@dataclass(frozen=True)
class Harnessed:
    """What lm_eval wrote: samples per subject in the order asked, and `results_*.json`."""

    samples: dict[str, list[Sample]]
    results: dict[str, Any]

    def accuracy(self, subject: str) -> float:
        found: float = self.results["results"][task_name(subject)]["acc,none"]
        return found

    @property
    def pooled(self) -> tuple[float, float]:
        """Accuracy over all questions and its pooled standard error."""
        found = self.results["groups"][GROUP]
        return found["acc,none"], found["acc_stderr,none"]

    def logprob_NC(self, subject: str) -> "np.ndarray[Any, Any]":
        return np.array([sample.logprobs for sample in self.samples[subject]])


@dataclass(frozen=True)
class Asked:
    """What is asked of lm_eval: subjects of a Hendrycks folder's test split."""

    quiz: Path
    subjects: tuple[str, ...]
    shots: int
    limit: int | None = None


def task_name(subject: str) -> str:
    """The stock task of a subject of MMLU, else the one that `write_tasks` makes."""
    return f"mmlu_{subject}" if _is_stock(subject) else f"quiz_{subject}"


def harness(runs: Sequence[tuple[Path | None, Asked, Path]]) -> list[Harnessed]:
    """Runs lm_eval once for each model, in a new folder each; no model is a dummy's.

    All in one process, one command line after another: to start it takes longer than to ask. What
    it prints goes to `lm_eval.log` in the first folder.
    """
    lines = []
    for model, asked, folder in runs:
        write_data_set(asked, folder / _DATA_SET)
        write_tasks(asked, folder / _DATA_SET, folder / "tasks")
        lines.append([str(folder.resolve()), *_arguments(model, asked)])
    first = runs[0][2]
    environment = {**os.environ, **_ENVIRONMENT, "HF_HOME": str(first / "hf_home")}
    with (first / "lm_eval.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", _IN_TURN, json.dumps(lines)],
            env=environment,
            stdout=log,
            stderr=log,
            check=False,
        )
    if done.returncode:
        raise AssertionError(f"lm_eval failed:\n{(first / 'lm_eval.log').read_text()[-4000:]}")
    return [read_output(folder / "out", asked.subjects) for _, asked, folder in runs]


def _arguments(model: Path | None, asked: Asked) -> list[str]:
    of = f"pretrained={model.resolve()},dtype=float32" if model else ""
    return [
        *("--tasks", GROUP, "--include_path", "tasks"),
        *(("--model", "hf", "--model_args", of) if model else ("--model", "dummy")),
        *("--num_fewshot", str(asked.shots), "--log_samples", "--output_path", "out"),
        *("--device", "cpu", *(("--limit", str(asked.limit)) if asked.limit else ())),
    ]


def write_data_set(asked: Asked, folder: Path) -> None:
    """Parquet files in the form of the hub's `cais/mmlu`, listed in the header of its README."""
    configs = []
    for subject in asked.subjects:
        (folder / subject).mkdir(parents=True)
        for split, name in _SPLITS.items():
            path = asked.quiz / split / f"{subject}_{split}.csv"
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))
            table = pa.table(
                {
                    "question": [row[0] for row in rows],
                    "subject": [subject] * len(rows),
                    "choices": [row[1:5] for row in rows],
                    "answer": ["ABCD".index(row[5]) for row in rows],
                }
            )
            parquet.write_table(table, folder / subject / f"{name}-00000-of-00001.parquet")
        files = [{"split": n, "path": f"{subject}/{n}-*"} for n in _SPLITS.values()]
        configs.append({"config_name": subject, "data_files": files})
    # JSON is YAML.
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


def write_tasks(asked: Asked, data_set: Path, folder: Path) -> None:
    """A task per subject that MMLU lacks, and a group of all, which lm_eval pools."""
    folder.mkdir()
    for subject in asked.subjects:
        if _is_stock(subject):
            continue
        topic = subject.replace("_", " ")
        task = {
            "task": task_name(subject),
            "include": str(_stock_tasks() / "_default_template_yaml"),
            "dataset_path": str(data_set),
            "dataset_name": subject,
            "description": "The following are multiple choice questions (with answers) about "
            f"{topic}.\n\n",
        }
        (folder / f"{subject}.yaml").write_text(json.dumps(task))
    group = {
        "group": GROUP,
        "task": [task_name(subject) for subject in asked.subjects],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / f"_{GROUP}.yaml").write_text(json.dumps(group))


def _stock_tasks() -> Path:
    # Not imported: only the process that runs it does that.
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tasks" / "mmlu" / "default"


def _is_stock(subject: str) -> bool:
    return (_stock_tasks() / f"mmlu_{subject}.yaml").is_file()


def read_output(out: Path, subjects: Sequence[str]) -> Harnessed:
    (results,) = out.glob("*/results_*.json")
    samples = {}
    for subject in subjects:
        (file,) = out.glob(f"*/samples_{task_name(subject)}_*.jsonl")
        lines = file.read_text(encoding="utf-8").split("\n")  # a text may hold U+2028
        records = [json.loads(line) for line in lines if line]
        samples[subject] = [_sample(r) for r in sorted(records, key=lambda r: r["doc_id"])]
    return Harnessed(samples, json.loads(results.read_text()))


def _sample(record: dict[str, Any]) -> Sample:
    arguments = list(record["arguments"].values())
    prompts = {argument["arg_0"] for argument in arguments}
    assert len(prompts) == 1  # one prompt, four continuations
    return Sample(
        prompt=prompts.pop(),
        continuations=tuple(argument["arg_1"] for argument in arguments),
        logprobs=tuple(float(logprob) for logprob, _ in record["filtered_resps"]),
        target=int(record["target"]),
        is_correct=record["acc"] == 1.0,
    )
