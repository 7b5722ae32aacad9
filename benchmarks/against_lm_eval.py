"""expertcut eval and expertcut profile beside lm-evaluation-harness: same model, same questions.

    python -m benchmarks.against_lm_eval --quiz DATA/mmlu --tokenizer DATA/olmoe

A random OLMoE of 261M parameters in float32 answers the whole test sets of five subjects of MMLU.
lm-evaluation-harness runs at its best batch size of 1, 8 and 32, found on the first questions of
each subject. Every run is a process of its own, one after another. Scoring only is what is left
without starting Python and loading the model. No ratio is printed where a prediction differs or a
log-probability by more than 1e-4.

With --texts, rolling log-likelihoods beside `eval --text`, three rounds in turns: of documents that
fill the context, and of questions as texts of 50 to 300 tokens. lm-evaluation-harness runs at its
default batch size, 1, and at its best, found on a few of the documents.
"""

import argparse
import json
import math
import random
import re
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tests.support.harness import GROUP, Asked, read_output, write_data_set, write_tasks

from benchmarks.common import SUBJECTS, Took, parser, random_olmoe, report, text_rows, timed

BATCH_SIZES = (1, 8, 32)
TOLERANCE = 1e-4
FULL_TOKENS = 4096  # the context of the model
# By kind of documents, how many are tried, and batch sizes: two full rows need 5 GB for logits.
ROLLING_SIZES = {"full": (2, (1, 2)), "short": (20, (1, 8, 32))}
TEXT_TOLERANCE = 1e-5  # of the mean loss, which is the relative error of the perplexity
# lm_eval's command line, with a clock around what scores.
TIMED_LM_EVAL = """
import sys, time
from lm_eval.models.huggingface import HFLM
score = HFLM.loglikelihood
def clocked(self, *args, **kwargs):
    started = time.perf_counter()
    try:
        return score(self, *args, **kwargs)
    finally:
        print(f"SCORING {time.perf_counter() - started:.3f} s", flush=True)
HFLM.loglikelihood = clocked
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", *sys.argv[1:]]
cli_evaluate()
"""


# lm_eval's rolling log-likelihoods of documents, as its perplexity tasks ask for them.
TIMED_ROLLING = """
import json, sys, time
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model, documents, batch_size = sys.argv[1:]
with open(documents, encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=int(batch_size))
asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
started = time.perf_counter()
loglikelihoods = lm.loglikelihood_rolling(asked, disable_tqdm=True)
scoring_s = time.perf_counter() - started
tokens = [len(lm.tok_encode(text)) for text in texts]
with open("rolling.json", "w") as file:
    json.dump({"scoring_s": scoring_s, "loglikelihoods": loglikelihoods, "tokens": tokens,
               "prefix": lm.prefix_token_id, "max_length": lm.max_length}, file)
"""


@dataclass(frozen=True)
class Rolling:
    """One run of a tool over documents; `loss` is the mean −log p of their tokens."""

    tool: str
    tokens: int
    scoring_s: float
    took: Took
    loss: float


@dataclass(frozen=True)
class Run:
    """One run of a tool: its process, the seconds that it scored, log p of the choices (N, C)."""

    tool: str
    took: Took
    scoring_s: float
    logprob_NC: "np.ndarray"


def lm_eval(model: Path, asked: Asked, folder: Path, batch_size: int, threads: int) -> Run:
    """lm-evaluation-harness as its users run it, offline."""
    folder.mkdir()
    write_data_set(asked, folder / "cais/mmlu")
    write_tasks(asked, folder / "cais/mmlu", folder / "tasks")
    command = [
        *(sys.executable, "-c", TIMED_LM_EVAL, "--tasks", GROUP, "--include_path", "tasks"),
        *("--model", "hf", "--model_args", f"pretrained={model},dtype=float32"),
        *("--num_fewshot", asked.shots, "--log_samples", "--output_path", "out"),
        *("--device", "cpu", "--batch_size", batch_size),
        *(("--limit", asked.limit) if asked.limit else ()),
    ]
    took = timed(command, threads, folder / "log", folder)
    found = read_output(folder / "out", asked.subjects)
    logprob_NC = np.concatenate([found.logprob_NC(subject) for subject in asked.subjects])
    scoring = re.findall(r"^SCORING ([0-9.]+) s", (folder / "log").read_text(), re.M)
    return Run(f"lm_eval, batch size {batch_size}", took, sum(map(float, scoring)), logprob_NC)


def expertcut(verb: str, model: Path, asked: Asked, folder: Path, threads: int) -> Run:
    """`expertcut eval`, or `expertcut profile` at the answer positions or at all tokens."""
    from expertcut.profiling.storage import load_profile

    folder.mkdir()
    name, _, stats = verb.partition(" ")
    command = [
        *(sys.executable, "-m", "expertcut", name, model, "--quiz", asked.quiz.resolve()),
        *("--subjects", ",".join(asked.subjects), "--shots", asked.shots, "--threads", threads),
        *(("--limit", asked.limit) if asked.limit else ()),
        *(("--stats", stats) if stats else ()),
        *("--out", folder / ("p" if stats else "results.json")),
    ]
    took = timed(command, threads, folder / "log", folder)
    place = folder / "p" if stats else next((folder / "results.chunks").iterdir())
    profile = load_profile(place)
    order = np.argsort([asked.subjects.index(s) for s in profile.subjects()], kind="stable")
    run = json.loads((place / "run.json").read_text())
    return Run(
        f"expertcut {verb}", took, run["elapsed_s"], profile.array("choice_logprob_NC")[order]
    )


def fault(theirs: Run, ours: Run) -> str | None:
    """Why two runs must not be compared, None if they may."""
    moved = np.abs(theirs.logprob_NC - ours.logprob_NC).max()
    differ = (theirs.logprob_NC.argmax(1) != ours.logprob_NC.argmax(1)).sum()
    if differ or moved > TOLERANCE:
        return f"{differ} predictions differ, largest |Δ log p| {moved:.2g}: no ratio"
    return None


def measured(model: Path, shots: int, args: argparse.Namespace, place: Path) -> list[list[object]]:
    """One row per run; ratios are of lm_eval's time by ours."""
    few = Asked(args.quiz, SUBJECTS, shots, args.tuning_limit)
    tried = {
        size: lm_eval(model, few, place / f"try{size}", size, args.threads).scoring_s
        for size in BATCH_SIZES
    }
    best = min(tried, key=lambda size: tried[size])
    print(f"{shots} shots, seconds by batch size of lm_eval: {tried}", flush=True)
    asked = Asked(args.quiz, SUBJECTS, shots, args.limit)
    theirs = lm_eval(model, asked, place / "lm_eval", best, args.threads)
    runs = [theirs]
    for number, verb in enumerate(("eval", "profile answer", "profile all")):
        runs.append(expertcut(verb, model, asked, place / f"ours{number}", args.threads))
    rows: list[list[object]] = []
    for run in runs:
        wrong = fault(theirs, run)
        ratios = [theirs.scoring_s / run.scoring_s, theirs.took.elapsed_s / run.took.elapsed_s]
        times = [run.scoring_s, run.took.elapsed_s, run.took.cpu_s, run.took.peak_mb]
        moved = float(np.abs(theirs.logprob_NC - run.logprob_NC).max())
        counts = "/".join(map(str, np.bincount(run.logprob_NC.argmax(1), minlength=4)))
        shown = [None, None] if wrong else ratios
        rows.append([shots, run.tool, len(run.logprob_NC), *times, *shown, moved, counts])
        if wrong:
            print(f"{run.tool}: {wrong}", file=sys.stderr)
    return rows


def documents(args: argparse.Namespace) -> dict[str, list[str]]:
    """Real texts by kind: four that fill the context, and 60 questions of a quiz."""
    from transformers import AutoTokenizer

    from expertcut.data import Selection, load_quiz

    encode = AutoTokenizer.from_pretrained(args.tokenizer)
    full = text_rows(args.quiz, args.tokenizer, (FULL_TOKENS,) * 4)
    questions = load_quiz(Selection(str(args.quiz), shots=0))
    texts = ["\n".join((question.text, *question.choices)) for question in questions]
    random.Random(0).shuffle(texts)
    short = (text for text in texts if 50 <= len(encode(text).input_ids) <= 300)
    return {"full": [row["text"] for row in full], "short": list(islice(short, 60))}


def lm_eval_rolling(model: Path, file: Path, folder: Path, batch: int, threads: int) -> Rolling:
    """Rolling log-likelihoods of lm-evaluation-harness."""
    folder.mkdir()
    words = [sys.executable, "-c", TIMED_ROLLING, model, file, batch]
    took = timed(words, threads, folder / "log", folder)
    found = json.loads((folder / "rolling.json").read_text())
    tokens = sum(found["tokens"])
    loss = -sum(found["loglikelihoods"]) / tokens
    return Rolling(f"lm_eval, batch size {batch}", tokens, found["scoring_s"], took, loss)


def expertcut_rolling(model: Path, file: Path, folder: Path, threads: int) -> Rolling:
    """`expertcut eval --text`."""
    folder.mkdir()
    words = [sys.executable, "-m", "expertcut", "eval", model, "--text", file]
    words += ["--max-tokens", FULL_TOKENS, "--threads", threads]
    took = timed(words, threads, folder / "log", folder)
    (store,) = (folder / "results.chunks").iterdir()
    scoring_s = json.loads((store / "run.json").read_text())["elapsed_s"]
    (own,) = json.loads((folder / "results.json").read_text())["models"][0]["text"].values()
    loss = math.log(own["perplexity"])
    return Rolling("expertcut eval --text", own["tokens"], scoring_s, took, loss)


def rolling(
    model: Path, kind: str, texts: list[str], args: argparse.Namespace, place: Path
) -> list[list[object]]:
    """One row per run in turns; ratios are of lm_eval's time by that of ours behind it."""
    n_few, sizes = ROLLING_SIZES[kind]
    few, file = place / f"{kind}-few.jsonl", place / f"{kind}.jsonl"
    for path, own in ((few, texts[:n_few]), (file, texts)):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    tried = {
        n: lm_eval_rolling(model, few, place / f"{kind}-try{n}", n, args.threads).scoring_s
        for n in sizes
    }
    best = min(tried, key=lambda size: tried[size])
    print(f"{kind} documents, seconds by batch size of lm_eval: {tried}", flush=True)
    rows: list[list[object]] = []
    for number in range(args.rounds):
        theirs = [
            lm_eval_rolling(model, file, place / f"{kind}{number}-{size}", size, args.threads)
            for size in dict.fromkeys((1, best))
        ]
        ours = expertcut_rolling(model, file, place / f"{kind}{number}", args.threads)
        for run in (*theirs, ours):
            times = [run.scoring_s, run.took.elapsed_s, run.took.cpu_s]
            ratios = [run.scoring_s / ours.scoring_s, run.took.elapsed_s / ours.took.elapsed_s]
            rows.append([kind, run.tool, run.tokens, *times, *ratios, run.loss])
    return rows


def main() -> None:
    """Reads the command line, measures, reports; exit status 1 where answers differ."""
    options = parser(__doc__, "against_lm_eval")
    options.add_argument("--shots", type=int, nargs="+", default=[5, 0])
    options.add_argument("--limit", type=int, help="questions of each subject")
    options.add_argument("--tuning-limit", type=int, default=8, help="to find the batch size with")
    options.add_argument("--texts", action="store_true", help="rolling log-likelihoods instead")
    options.add_argument("--rounds", type=int, default=3, help="of --texts")
    args = options.parse_args()
    rows: list[list[object]] = []
    if args.texts:
        with tempfile.TemporaryDirectory() as folder:
            model = random_olmoe(Path(folder) / "olmoe", args.tokenizer)
            for kind, texts in documents(args).items():
                rows += rolling(model, kind, texts, args, Path(folder))
        columns = {"documents": "", "run": "", "tokens": ",d", "scoring s": ".1f"}
        columns |= {"process s": ".1f", "CPU s": ".1f", "× scoring": ".2f", "× process": ".2f"}
        report(args.out, "rolling", columns | {"mean loss": ".7f"}, rows)
        losses = {kind: [row[-1] for row in rows if row[0] == kind] for kind in ROLLING_SIZES}
        sys.exit(any(max(own) - min(own) > TEXT_TOLERANCE for own in losses.values()))
    with tempfile.TemporaryDirectory() as folder:
        model = random_olmoe(Path(folder) / "olmoe", args.tokenizer)
        for shots in args.shots:
            place = Path(folder) / f"{shots}"
            place.mkdir()
            rows += measured(model, shots, args, place)
    columns = {"shots": "", "run": "", "questions": ",d", "scoring s": ".1f", "process s": ".1f"}
    columns |= {"CPU s": ".1f", "peak MB": ".0f", "× scoring": ".1f", "× process": ".1f"}
    columns |= {"largest |Δ log p|": ".1e", "answers A/B/C/D": ""}
    report(args.out, f"{args.threads} threads", columns, rows)
    sys.exit(any(row[7] is None for row in rows))


if __name__ == "__main__":
    main()
