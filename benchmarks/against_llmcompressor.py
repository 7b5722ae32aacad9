"""REAP by expertcut and by llm-compressor: the same rows of text, saliencies, experts kept, speed.

    python -m benchmarks.against_llmcompressor --quiz DATA/mmlu --tokenizer DATA/olmoe --python PATH

PATH is made by `python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1`,
ENV/bin/python (torch from the index that `make venv` takes it from, else it brings CUDA).
llm-compressor needs an environment of its own, for it allows no transformers above 5.17. Its
`oneshot` calibrates a random OLMoE of 261M parameters in float32 with `REAPPruningModifier`, each
layer behind the ones that it has cut (`--sequential` here), and once with `propagate_error=False`,
behind uncut layers, as a profile does. It runs by its defaults, which its examples keep (one row at
a time, every expert on every token), and at its fastest: as its modifier advises, each token
through its own experts only (`moe_calibrate_all_experts=False`), at the best of `--batch-sizes`.
Rows have the same length, so that it pads and truncates none.

Every run is a process of its own; the tools take turns. Seconds are of calibration: theirs from the
first hook to the last layer cut, without tracing the model; ours of a profile's chunks, and of
ranking layer after layer, alone and with the profile that it starts from; both without starting
Python and loading the model. No ratio is printed where a saliency differs by more than 1e-4 of its
value, or an expert that is kept.

In float32 the tools round differently, and a token at a near-tie between experts may go to another
one, which moves every layer behind it. `--dtype float64` runs both in double precision, at its
fastest way only: what differs then is not rounding.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.common import Took, parser, random_olmoe, report, text_rows, timed

TOLERANCE = 1e-4
WORKER = Path(__file__).parent / "llmcompressor_worker.py"
# expertcut's command line, with a clock around what ranks layer after layer; its scores are kept.
TIMED_PRUNE = """
import json, sys, time
from expertcut.checkpoints import size
rank = size.rank_sequentially
def clocked(*args, **kwargs):
    started = time.perf_counter()
    ranking = rank(*args, **kwargs)
    found = {"calibration_s": time.perf_counter() - started,
             "saliency_LE": [score_E.tolist() for score_E in ranking.scores]}
    with open("found.json", "w") as file:
        json.dump(found, file)
    return ranking
size.rank_sequentially = clocked
from expertcut.cli import main
sys.argv = ["expertcut", *sys.argv[1:]]
main()
"""


@dataclass(frozen=True)
class Run:
    """One calibration: its process, seconds, saliencies (L, E) and the experts kept (L, K)."""

    tool: str
    took: Took
    calibration_s: float
    saliency_LE: "np.ndarray"
    kept_LK: "np.ndarray"


@dataclass(frozen=True)
class Task:
    """What both tools are given: `rows` is a file of JSON lines with text and input_ids."""

    model: Path
    rows: Path
    row_tokens: int
    keep: int
    n_experts: int
    threads: int
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        lines = self.rows.read_text(encoding="utf-8").splitlines()
        return sum(len(json.loads(line)["input_ids"]) for line in lines)


def llm_compressor(task: Task, python: Path, folder: Path, batch: int, *flags: str) -> Run:
    """llm-compressor in its environment."""
    from safetensors.numpy import load_file

    folder.mkdir(parents=True)
    # Its count is int(experts × sparsity): half an expert more, or rounding down loses one.
    sparsity = (task.n_experts - task.keep + 0.5) / task.n_experts
    command = [python, WORKER, task.model, task.rows, folder, "--sparsity", sparsity]
    command += ["--batch-size", batch, "--dtype", task.dtype, *flags]
    took = timed(command, task.threads, folder / "log", folder)
    found = load_file(folder / "found.safetensors")
    calibration_s = json.loads((folder / "found.json").read_text())["calibration_s"]
    name = " ".join((f"llm-compressor, batch size {batch}", *flags))
    return Run(name, took, calibration_s, found["saliency_LE"], found["kept_LK"])


def profile(task: Task, folder: Path) -> Run:
    """`expertcut profile --text`, and the cut by its saliencies."""
    from expertcut.edits.criteria import ranked
    from expertcut.profiling.storage import load_profile

    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "expertcut", "profile", task.model, "--text", task.rows]
    command += ["--max-tokens", task.row_tokens, "--no-loss"]
    command += ["--threads", task.threads, "--dtype", task.dtype, "--out", folder / "profile"]
    took = timed(command, task.threads, folder / "log", folder)
    found = load_profile(folder / "profile")
    tokens_LE, sum_LE = found.token_sum("tokens"), found.token_sum("weighted_norm")
    assert tokens_LE is not None and sum_LE is not None
    assert tokens_LE.sum(axis=1).max() == task.tokens * found.info.model.blocks[0].top_k
    saliency_LE = sum_LE / np.maximum(tokens_LE, 1)
    order_LE = [ranked(score_E, score_E) for score_E in saliency_LE]
    kept_LK = np.array([sorted(order_E[: task.keep]) for order_E in order_LE])
    elapsed_s = json.loads((folder / "profile/run.json").read_text())["elapsed_s"]
    return Run("expertcut profile --text", took, elapsed_s, saliency_LE, kept_LK)


def sequential(task: Task, folder: Path) -> Run:
    """`expertcut prune --sequential` from the profile that came before."""
    command = [sys.executable, "-c", TIMED_PRUNE, "prune", "--sequential"]
    command += ["--profile", folder / "profile", "--keep", task.keep, "--by", "reap"]
    command += ["--protect", "none", "--rescale-gates", "off", "--held-out", 0]
    command += ["--threads", task.threads, "--dtype", task.dtype]
    command += ["--plan-only", "--out", folder / "cut"]
    took = timed(command, task.threads, folder / "prune.log", folder)
    ranked = json.loads((folder / "found.json").read_text())
    plan = json.loads((folder / "cut/plan.json").read_text())
    kept_LK = np.array([block["keep"] for block in plan["blocks"].values()])
    saliency_LE = np.array(ranked["saliency_LE"])
    tool = "expertcut prune --sequential"
    return Run(tool, took, ranked["calibration_s"], saliency_LE, kept_LK)


def both(profiled: Run, ranked: Run) -> Run:
    """A profile and the sequential ranking from it as one run, which starts from nothing."""
    took = Took(
        profiled.took.elapsed_s + ranked.took.elapsed_s,
        profiled.took.cpu_s + ranked.took.cpu_s,
        max(profiled.took.peak_mb, ranked.took.peak_mb),
    )
    calibration_s = profiled.calibration_s + ranked.calibration_s
    tool = "expertcut profile, prune --sequential"
    return replace(ranked, tool=tool, took=took, calibration_s=calibration_s)


def difference(theirs: Run, ours: Run) -> "np.ndarray":
    """Largest relative difference of a saliency by layer (L,); experts without tokens have 0."""
    largest_LE = np.maximum(theirs.saliency_LE, ours.saliency_LE)
    apart_LE = np.abs(theirs.saliency_LE - ours.saliency_LE)
    return (apart_LE / np.where(largest_LE > 0, largest_LE, 1)).max(axis=1)


def fault(theirs: Run, ours: Run, n_layers: int | None = None) -> str | None:
    """Why two runs must not be compared by their first layers, or all; None if they may."""
    apart_L = difference(theirs, ours)[:n_layers]
    differ = (theirs.kept_LK != ours.kept_LK).any(axis=1)[:n_layers]
    if (apart_L > TOLERANCE).any() or differ.any():
        return f"{ours.tool}: saliencies differ by {apart_L}, experts kept in {differ.sum()} layers"
    return None


def in_turns(
    task: Task, python: Path, place: Path, batch: int, rounds: int
) -> dict[str, list[Run]]:
    """Runs by what is measured; the tools take turns."""
    found: dict[str, list[Run]] = {}
    for number in range(rounds):
        folder = place / f"round{number}"
        folder.mkdir()
        steps: dict[str, Callable[[], Run]] = {
            "their default": lambda f=folder: llm_compressor(
                task, python, f / "default", 1, "--every-expert"
            ),
            "their sequential": lambda f=folder: llm_compressor(task, python, f / "theirs", batch),
            "our profile": lambda f=folder: profile(task, f / "ours"),
            "our sequential": lambda f=folder: sequential(task, f / "ours"),
            "ours from nothing": lambda: both(
                found["our profile"][-1], found["our sequential"][-1]
            ),
            "their uncut": lambda f=folder: llm_compressor(
                task, python, f / "uncut", batch, "--uncut"
            ),
        }
        if task.dtype == "float64":
            del steps["their default"]
        for name, step in steps.items():
            found.setdefault(name, []).append(step())
            run = found[name][-1]
            print(f"{run.tool}: {task.tokens / run.calibration_s:,.0f} tokens/s", flush=True)
    return found


def table(task: Task, found: dict[str, list[Run]]) -> list[list[object]]:
    """A row for each tool and way, medians over the rounds; ratios are within each round."""
    rows: list[list[object]] = []
    # Behind cut layers a profile's saliencies are others: only the first layer is the same.
    ways = [("uncut", "our profile", None), ("default", "our profile", 1)]
    ours_cut = ("our sequential", "ours from nothing")
    ways += [(way, ours, None) for way in ("sequential", "default") for ours in ours_cut]
    for way, ours, n_layers in (w for w in ways if f"their {w[0]}" in found):
        pairs = list(zip(found[f"their {way}"], found[ours], strict=True))
        wrong = [text for theirs, own in pairs if (text := fault(theirs, own, n_layers))]
        print(*wrong, sep="\n", file=sys.stderr)
        faster = [theirs.calibration_s / own.calibration_s for theirs, own in pairs]
        first, apart = (
            max(float(f(difference(theirs, own))) for theirs, own in pairs)
            for f in (lambda apart_L: apart_L[0], np.max)
        )
        for runs, is_ours in (([a for a, _ in pairs], False), ([b for _, b in pairs], True)):
            seconds = statistics.median(run.calibration_s for run in runs)
            row: list[object] = [way, runs[0].tool, task.tokens, seconds, task.tokens / seconds]
            row += [statistics.median(run.took.elapsed_s for run in runs)]
            row += [statistics.median(run.took.cpu_s for run in runs)]
            row += [max(run.took.peak_mb for run in runs)]
            shown = is_ours and not wrong
            row += [statistics.median(faster), min(faster)] if shown else [None, None]
            rows.append([*row, *((first, apart) if is_ours else (None, None))])
    return rows


def best_batch(task: Task, args: argparse.Namespace, place: Path, lines: list[str]) -> int:
    """The batch size of llm-compressor with which a few rows take least."""
    few = place / "few.jsonl"
    few.write_text("".join(lines[: args.tuning_rows]), encoding="utf-8")
    tried = {
        size: llm_compressor(
            replace(task, rows=few), args.python, place / f"try{size}", size
        ).calibration_s
        for size in args.batch_sizes
    }
    print(f"{args.tuning_rows} rows, seconds by batch size of llm-compressor: {tried}", flush=True)
    return min(tried, key=lambda size: tried[size])


def main() -> None:
    """Reads the command line, measures, reports; exit status 1 where what is found differs."""
    options = parser(__doc__, "against_llmcompressor")
    options.add_argument("--python", type=Path, required=True, help="of llm-compressor")
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--row-tokens", type=int, default=512)
    options.add_argument("--keep", type=int, default=32, help="of 64 experts")
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    options.add_argument("--tuning-rows", type=int, default=8, help="to find the batch size with")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options.add_argument("--place", type=Path, help="a folder to keep all runs in")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = (args.place or Path(folder)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        model = random_olmoe(place / "olmoe", args.tokenizer)
        rows = text_rows(args.quiz, args.tokenizer, [args.row_tokens] * args.rows)
        lines = [json.dumps(row) + "\n" for row in rows]
        (place / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        task = Task(
            *(model, place / "rows.jsonl", args.row_tokens, args.keep, 64, args.threads, args.dtype)
        )
        sizes = args.batch_sizes
        batch = best_batch(task, args, place, lines) if len(sizes) > 1 else sizes[0]
        found = in_turns(task, args.python, place, batch, args.rounds)
        made = table(task, found)
    columns = {"their way": "", "run": "", "tokens": ",d", "calibration s": ".1f"}
    columns |= {"tokens/s": ",.0f", "process s": ".1f", "CPU s": ".1f", "peak MB": ".0f"}
    columns |= {"× faster": ".1f", "least": ".1f"}
    columns |= {"first layer, largest relative difference": ".1e", "any layer": ".1e"}
    title = f"{args.rows} rows of {args.row_tokens} tokens, {args.dtype}, {args.threads} threads"
    report(args.out, title, columns, made)
    sys.exit(any(row[8] is None for row in made if str(row[1]).startswith("expertcut")))


if __name__ == "__main__":
    main()
