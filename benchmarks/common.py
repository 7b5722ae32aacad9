"""What benchmarks share: a random OLMoE, processes that are timed, the machine, the report."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertcut.reporting.tables import Cell, Column, Table, as_markdown

RUNS = Path(__file__).parent / "runs"
SUBJECTS = (
    "astronomy",
    "us_foreign_policy",
    "abstract_algebra",
    "virology",
    "world_religions",
)
LETTER_IDS = (329, 378, 330, 399)  # " A" to " D" in OLMoE's tokenizer
LETTER_SEED = 1640
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "pad_token_id": 1,
    "eos_token_id": 50279,
}


@dataclass(frozen=True)
class Took:
    """A process from its start to its end; `peak_mb` is its largest resident memory."""

    elapsed_s: float
    cpu_s: float
    peak_mb: float


def random_olmoe(folder: Path, tokenizer: Path, **changes: object) -> Path:
    """Writes an OLMoE of 261,505,536 random parameters with the real vocabulary and tokenizer.

    As transformers draws them, with the rows of the four letters in the vocabulary projection drawn
    again: else one letter is the answer to everything, and agreement says nothing. This seed gives
    four answers their share, and differences far above rounding. (Sharper attention does so too,
    but makes near-ties between experts matter: 6e-4 in log p against lm-evaluation-harness.)
    """
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = OlmoeConfig(**{**SIZES, **changes})
    model = OlmoeForCausalLM(config)
    letters = torch.empty(len(LETTER_IDS), config.hidden_size)
    letters.normal_(0, 0.02, generator=torch.Generator().manual_seed(LETTER_SEED))
    model.lm_head.weight.data[list(LETTER_IDS)] = letters
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    return folder


def timed(command: Sequence[object], threads: int, log: Path, folder: Path | None = None) -> Took:
    """Runs a command to its end, its output in a file.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=folder, env=environment, stdout=file, stderr=file
        )
        peak: list[float] = [0.0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        elapsed_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{log.read_text()[-3000:]}")
    return Took(elapsed_s, usage.ru_utime + usage.ru_stime, peak[0])


def _watch(pid: int, peak: list[float]) -> None:
    # Not ru_maxrss: that starts from the peak of the process that started this one.
    status = Path(f"/proc/{pid}/status")
    while True:
        try:
            words = status.read_text().split()
            peak[0] = max(peak[0], int(words[words.index("VmHWM:") + 1]) / 1000)
        except (OSError, ValueError):  # it has ended
            return
        time.sleep(0.05)


def machine() -> str:
    """The machine in words, and how busy it is."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")
    return (
        f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quiz", type=Path, required=True, help="a folder of Hendrycks CSV files")
    made.add_argument("--tokenizer", type=Path, required=True, help="a folder with OLMoE's")
    made.add_argument("--out", type=Path, default=RUNS / f"{name}.json")
    made.add_argument("--threads", type=int, default=os.cpu_count())
    return made


def report(
    out: Path,
    title: str,
    columns: Mapping[str, str],
    rows: Sequence[Sequence[Cell]],
    **more: object,
) -> None:
    """Prints a table, `columns` being formats by head, and writes it with more as JSON."""
    heads = tuple(Column(head, spec) for head, spec in columns.items())
    print(as_markdown(Table(title, heads, [list(row) for row in rows])), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "machine": machine(), "columns": list(columns), "rows": rows, **more}
    out.write_text(json.dumps(content, indent=1, default=str) + "\n")


def text_rows(quiz: Path, tokenizer: Path, lengths: Iterable[int]) -> list[dict[str, Any]]:
    """Real text in documents of so many tokens each: `{"text", "input_ids"}`, none twice.

    The questions of a quiz one after another, read as prose. A text whose tokens would change by
    reading it again (a word cut in two) starts at a later question.
    """
    from transformers import AutoTokenizer

    from expertcut.data import Selection, load_quiz

    encode = AutoTokenizer.from_pretrained(tokenizer)
    questions = iter(load_quiz(Selection(str(quiz), shots=0)))
    rows = []
    for n_tokens in lengths:
        ids: list[int] = []
        while not ids or encode(encode.decode(ids)).input_ids != ids:
            text = ""
            while len(ids := encode(text).input_ids[:n_tokens]) < n_tokens:
                question = next(questions)
                text += "\n".join((question.text, *question.choices)) + "\n\n"
        rows.append({"text": encode.decode(ids), "input_ids": ids})
    return rows
