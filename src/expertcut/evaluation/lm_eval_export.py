"""Results for other programs: lm-evaluation-harness's file, and `predictions.parquet`.

One results file for each model, as lm-evaluation-harness 0.4.13 writes it (`--output_path`). Keys
that only that tool can know are null: its version, its hashes of prompts.
"""

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from expertcut import __version__
from expertcut.data import Quiz
from expertcut.data.questions import LETTERS, header
from expertcut.data.sources import MMLU_HUB_ID
from expertcut.evaluation.results import QuizModelResult, Scored, Scoring
from expertcut.files import parse_json, read_file
from expertcut.stats import pooled_stderr

_TASK_VERSION = 1.0  # of the stock task with these prompts
_SILENT = (
    *("system_instruction", "system_instruction_sha", "fewshot_as_multiturn"),
    *("chat_template", "chat_template_sha", "total_evaluation_time_seconds"),
)
_UNKNOWN = "N/A"  # the harness's word where there is no standard error


def harness_paths(file: Path, scored: Sequence[Scored]) -> list[Path]:
    """The file itself for one model; for several, one numbered file each."""
    if len(scored) == 1:
        return [file]
    suffix = file.suffix or ".json"
    return [
        file.with_name(f"{file.stem}-{i}-{one.source.name}{suffix}") for i, one in enumerate(scored)
    ]


def is_harness_file(file: Path) -> bool:
    """Whether a file holds results of the harness, by its keys."""
    try:
        content = parse_json(read_file(file))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"results", "configs"} <= content.keys()


def harness_bytes(scoring: Scoring, scored: Scored, result: QuizModelResult) -> bytes:
    """The file of one model: a task for each subject, and a group of all."""
    quiz = scoring.quiz
    name = Path(quiz.id).name.removesuffix(".jsonl").removesuffix(".csv")
    group = "mmlu" if quiz.id == MMLU_HUB_ID else name
    tasks = {f"{group}_{subject}": subject for subject in quiz.questions}
    of_group = _metrics(group, result.accuracy, result.stderr, result.questions)
    of_group["sample_count"] = {"acc,none": result.questions}
    names, model, settings, limit = (group, *tasks), scored.source, scored.settings, scoring.limit
    loaded = {"pretrained": model.id, "dtype": settings.dtype}
    of_tasks, n_samples = {}, {}
    for task, subject in tasks.items():
        share, n = result.subjects[subject].accuracy, result.subjects[subject].questions
        of_tasks[task] = _metrics(task, share, pooled_stderr([(share, n)]), n)
        n_samples[task] = {"original": n if limit is None else None, "effective": n}
    results = {
        "results": {**of_tasks, group: of_group},
        "groups": {group: of_group},
        "group_subtasks": {group: list(tasks)},
        "configs": {t: _config(t, s, quiz, loaded) for t, s in tasks.items()},
        "versions": {group: _UNKNOWN, **dict.fromkeys(tasks, _TASK_VERSION)},
        "n-shot": dict.fromkeys(names, quiz.shots),
        "higher_is_better": {name: {"acc": True} for name in names},
        "n-samples": n_samples,
        "config": {
            "model": "expertcut",
            "model_args": loaded,
            "model_num_parameters": result.parameters,
            "model_dtype": f"torch.{settings.dtype}",
            "model_revision": model.revision or "main",
            "model_sha": model.revision or "",
            "batch_size": None,
            "batch_sizes": [],
            "device": settings.device_type,
            "use_cache": None,
            "limit": limit,
            "bootstrap_iters": 0,
            "gen_kwargs": {},
            **dict.fromkeys(("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")),
        },
        "git_hash": None,
        "date": time.time(),
        "pretty_env_info": f"expertcut {__version__}, torch {settings.torch}",
        "transformers_version": transformers.__version__,
        "lm_eval_version": None,
        "upper_git_hash": None,
        **scored.special_tokens,
        "task_hashes": {},
        "model_source": "expertcut",
        "model_name": model.id,
        "model_name_sanitized": "".join(c if c.isalnum() or c in "-." else "_" for c in model.id),
        **dict.fromkeys(_SILENT),
    }
    return json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False).encode()


def _metrics(name: str, share: float, stderr: float | None, n: int) -> dict[str, Any]:
    return {
        **{"name": name, "alias": name, "sample_len": n, "acc,none": share},
        "acc_stderr,none": _UNKNOWN if stderr is None else stderr,
    }


def _config(task: str, subject: str, quiz: Quiz, loaded: dict[str, str]) -> dict[str, Any]:
    letters = list(LETTERS[: max(len(q.choices) for q in quiz.questions[subject])])
    lines = [f"{letter}. {{{{choices[{i}]}}}}\n" for i, letter in enumerate(letters)]
    prompt = {
        "doc_to_text": f"{{{{question.strip()}}}}\n{''.join(lines)}Answer:",
        "doc_to_choice": letters,
        "doc_to_target": "answer",
        "fewshot_delimiter": "\n\n",
        "target_delimiter": " ",
    }
    return {
        "task": task,
        "dataset_path": quiz.id,
        "dataset_name": subject,
        "test_split": "validation" if quiz.split == "val" else quiz.split,
        "fewshot_split": "dev",
        "unsafe_code": False,
        "description": header(subject),
        **prompt,
        "fewshot_config": {
            "sampler": "first_n",
            "split": "dev",
            **dict.fromkeys(("process_docs", "fewshot_indices", "samples", "gen_prefix")),
            **prompt,
        },
        "num_fewshot": quiz.shots,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "output_type": "multiple_choice",
        "repeats": 1,
        "should_decontaminate": False,
        "metadata": {"version": _TASK_VERSION, **loaded},
    }


def predictions_bytes(quiz: Quiz, scored: Sequence[Scored]) -> bytes:
    """The file's bytes; its columns are those of docs/formats.md."""
    import pyarrow as pa
    from pyarrow import parquet

    tables, letters = [], np.array(list(LETTERS))
    for answers, model in ((one.answers, one.source.id) for one in scored):
        columns: dict[str, Any] = {
            "model": pa.array([model] * len(quiz)).dictionary_encode(),
            "subject": pa.array([q.subject for q in quiz]).dictionary_encode(),
            "row": pa.array([q.row for q in quiz], pa.int32()),
            "answer": letters[answers.answer_N],
            "prediction": letters[answers.logprob_NC.argmax(axis=1)],
            "is_correct": answers.is_correct_N,
        }
        for letter, logprob_N in zip(LETTERS, answers.logprob_NC.T, strict=False):
            # A question with fewer choices has −∞ there, which is written as null.
            columns[f"logprob_{letter}"] = pa.array(logprob_N, mask=~np.isfinite(logprob_N))
        tables.append(pa.table(columns))
    stream = io.BytesIO()
    parquet.write_table(pa.concat_tables(tables), stream)
    return stream.getvalue()
