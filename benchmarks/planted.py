"""Plants a truth in the bundled model, and shows whether `reweight` finds it and what it repairs.

    OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000 python -m benchmarks.planted --place DIR

(a) one expert's output is noise: `--suppress-worst 1 --tune --prove`; (b) the only expert that
knows three subjects is starved: `--boost L:E --tune --prove`; both are judged on the test split.
(c) shuffled answers: how often the verdict is "no evidence". `--section` takes one of them. Prints
tables and writes DIR/planted.json.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.planting import (
    BUNDLED,
    LAST,
    QUIZ,
    bundled_weights,
    copied,
    cost,
    sabotaged,
    saboteur,
)
from benchmarks.teaching import EXPERT, drawn, learn, lesson, margin, taught, write_turned_quiz
from expertcut.data import Selection, load_quiz
from expertcut.edits.reweight_select import Chooser
from expertcut.edits.router_edits import Procedure
from expertcut.evaluation.cross_fit import cross_fit, cross_fit_result, load_cross_fit
from expertcut.evaluation.results import load_results
from expertcut.evaluation.reweight_search import CachedScorer
from expertcut.models.load import LoadOptions, MoeModel, find_source, load
from expertcut.profiling.measure import DEFAULT_BATCH_TOKENS
from expertcut.profiling.storage import load_profile
from expertcut.reporting.tables import Column, Table, as_markdown
from expertcut.scoring.engine import Engine

Found = dict[str, Any]
STARVED = 0.03  # of the questions still choose the expert


@dataclass(frozen=True)
class Bench:
    """Where things are made, and how much is asked."""

    place: Path
    limit: int | None
    shots: int
    draws: int
    seed: int

    def run(self, *words: object) -> None:
        """One command, its output shown."""
        told = [str(word) for word in words]
        print("\n$ expertcut", " ".join(told), flush=True)
        command = [sys.executable, "-m", "expertcut", *told, "--threads", "1"]
        subprocess.run([*command, "--trust-remote-code"], check=True)

    def profile(self, model: Path, quiz: Path, shots: int) -> Path:
        """A profile of val."""
        out = self.place / f"{model.name}-val"
        limit = () if self.limit is None else ("--limit", self.limit)
        asked = ("--quiz", quiz, "--split", "val", "--shots", shots, *limit)
        self.run("profile", model, *asked, "--out", out)
        return out

    def judged(self, made: dict[str, Path], quiz: Path, shots: int) -> Found:
        """The healthy, the harmed and the repaired one on test."""
        out = self.place / f"{made['harmed'].name}.json"
        asked = ("--quiz", quiz, "--split", "test", "--shots", shots)
        self.run("eval", *made.values(), *asked, "--out", out)
        results = load_results(out)
        accuracy = dict(zip(made, (model.accuracy for model in results.models), strict=True))
        lost = accuracy["healthy"] - accuracy["harmed"]
        proof = load_cross_fit(made["repaired"])
        return {
            "questions": results.models[0].questions,
            **{f"{name}_pct": 100 * value for name, value in accuracy.items()},
            "recovered_pct": 100 * (accuracy["repaired"] - accuracy["harmed"]) / lost,
            "biases": [fold.biases for fold in proof.folds],
            "cross_fitted": proof.cross_fitted.model_dump(),
            "p_random": proof.random.p,
            "verdict": proof.verdict,
        }


def opened(model: Path) -> MoeModel:
    """As the commands load it."""
    return load(find_source(str(model)), LoadOptions())


def asked(moe: MoeModel, quiz: Path, shots: int, limit: int | None = None) -> CachedScorer:
    """The questions of val."""
    selection = Selection(str(quiz), "val", shots, limit=limit)
    return CachedScorer(Engine(moe, DEFAULT_BATCH_TOKENS), load_quiz(selection))


def appears(profile: Path, expert: int) -> float:
    """The share of questions, in percent, that choose an expert of the last layer."""
    chosen_NK = load_profile(profile).array("chosen_NLK")[:, LAST]
    return float(100 * (chosen_NK == expert).any(axis=1).mean())


def section_a(bench: Bench) -> Found:
    """One expert of the last layer gives noise."""
    healthy = asked(opened(BUNDLED), QUIZ, bench.shots)
    expert = saboteur(healthy)
    weights = sabotaged(bundled_weights(), expert, bench.seed)
    harmed = copied(weights, bench.place / "sabotaged")
    profile, repaired = bench.profile(harmed, QUIZ, bench.shots), bench.place / "repaired"
    how = ("--tune", "--prove", "--draws", bench.draws)
    bench.run("reweight", "--profile", profile, "--suppress-worst", 1, *how, "--out", repaired)
    made = {"healthy": BUNDLED, "harmed": harmed, "repaired": repaired}
    known = {"expert": expert, "appears_pct": appears(profile, expert)}
    known |= {"masking_costs_pct": 100 * cost(healthy, expert)}
    return known | bench.judged(made, QUIZ, bench.shots)


def section_b(bench: Bench) -> Found:
    """The one expert that knows three subjects is starved; all without shots."""
    quiz, moe = write_turned_quiz(bench.place / "turned-quiz"), opened(BUNDLED)
    pupil = learn(moe, lesson(moe, drawn(400, bench.seed)), 50, bench.seed)
    healthy = copied(taught(bundled_weights(), pupil), bench.place / "taught")
    rescorer = asked(opened(healthy), quiz, 0)
    known = {"masking_costs_pct": 100 * cost(rescorer, EXPERT)}
    known |= {"shift": -margin(rescorer.records.alpha_NLE[:, LAST], STARVED)}
    harmed, repaired = bench.place / "starved", bench.place / "fed"
    profile, exact = bench.profile(healthy, quiz, 0), ("--layout", "exact")
    down = f"{LAST}:{EXPERT}={-known['shift']:.4f}"
    bench.run("reweight", "--profile", profile, "--suppress", down, *exact, "--out", harmed)
    starved = bench.profile(harmed, quiz, 0)
    known |= {"expert": EXPERT, "appears_pct": appears(starved, EXPERT)}
    how = ("--tune", "--prove", "--draws", bench.draws, *exact)
    up = ("--boost", f"{LAST}:{EXPERT}")
    bench.run("reweight", "--profile", starved, *up, *how, "--out", repaired)
    return known | bench.judged(
        {"healthy": healthy, "harmed": harmed, "repaired": repaired}, quiz, 0
    )


def section_c(bench: Bench) -> Found:
    """Answers are shuffled a hundred times; log-probabilities do not depend on them."""
    rescorer = asked(opened(BUNDLED), QUIZ, bench.shots, bench.limit)
    chooser = Chooser(boost_best=1, suppress_worst=1, layers=(LAST,))
    verdicts: Counter[str] = Counter()
    for seed in range(100):
        answer_N = np.random.default_rng(seed).permutation(rescorer.records.answer_N)
        records = replace(rescorer.records, answer_N=answer_N)
        procedure = Procedure(chooser=chooser, is_tuned=True)
        outcome = cross_fit(records, procedure, rescorer.ask, bench.draws, seed)
        found = cross_fit_result(outcome, "-", quiz=str(QUIZ), split="val", seed=seed)
        verdicts[found.verdict] += 1
    return {"questions": len(rescorer.records), "runs": len(rescorer.known), **verdicts}


SECTIONS: dict[str, Callable[[Bench], Found]] = {"a": section_a, "b": section_b, "c": section_c}


def main() -> None:
    """Reads the command line, plants, repairs, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", choices=SECTIONS, action="append")
    parser.add_argument("--place", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--limit", type=int, help="tuning questions of each subject; all without")
    parser.add_argument("--shots", type=int, default=5, help="of a and c; b has none")
    parser.add_argument("--draws", type=int, default=99)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.place.mkdir(parents=True)
    bench = Bench(args.place, args.limit, args.shots, args.draws, args.seed)
    found = {name: SECTIONS[name](bench) for name in args.section or SECTIONS}
    (args.place / "planted.json").write_text(json.dumps(found, indent=1))
    for name, values in found.items():
        shown = [[key, v] for key, v in values.items() if isinstance(v, int | str)]
        shown += [[key, f"{v:.4g}"] for key, v in values.items() if isinstance(v, float)]
        print(as_markdown(Table(name, (Column("what"), Column("")), shown)))


if __name__ == "__main__":
    main()
