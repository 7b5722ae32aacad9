"""What choosing a model by subject gains at equal bytes, and how often chance alone shows a gain.

    python -m benchmarks.dispatch cuts         the 36 cuts of a sweep of the bundled model
    python -m benchmarks.dispatch chance       planted models that are equally good everywhere
    python -m benchmarks.dispatch recruits --symbolic-moe recruit_agents.py

`cuts` profiles split val, sweeps all criteria on split test (four minutes; kept in
`benchmarks/runs/dispatch`) and asks, for each size, for the best single cut and for the best set of
cuts within as many bytes. `recruits` gives the same answers to the functions of Symbolic-MoE
(github.com/dinobby/Symbolic-MoE), read from their script: shares of 100,000 draws against the
expected shares of `--as symbolic`, and accuracy of votes of their draws of three.
"""

import argparse
import ast
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RUNS, report, timed
from benchmarks.fold import BUNDLED
from expertcut.data import Selection, load_quiz
from expertcut.evaluation.dispatch_results import verdict
from expertcut.evaluation.dispatching import (
    Answered,
    Routes,
    SelectionOptions,
    cross_fit_routes,
    fit,
    folds_of,
    most_right,
    oracle_null,
    recruit,
)
from expertcut.evaluation.search_results import load_sweep
from expertcut.profiling.storage import load_profile
from expertcut.reporting.edit_tables import change_text, percent
from expertcut.reporting.tables import Cell
from expertcut.stats import Array, Comparison, compare

ROOT, PLACE = Path(__file__).parents[1], RUNS / "dispatch"
WORLDS = ((2, 2, 400), (2, 8, 240), (3, 8, 960), (3, 57, 5700), (10, 11, 2750), (20, 57, 5700))
DRAWS = 100_000


def swept(threads: int) -> tuple[list[str], Answered]:
    """The answers of every cut of the sweep, and of the model itself; cuts that are made stay."""
    PLACE.mkdir(parents=True, exist_ok=True)
    profile, sweep = PLACE / "profile", PLACE / "sweep"
    model = BUNDLED.relative_to(ROOT)
    quiz = ("--quiz", model / "quiz", "--split", "val", "--threads", threads)
    for words in (
        ("profile", model, *quiz, "--out", profile),
        ("sweep", "0.75,0.5,0.25", "--by", "all", "--profile", profile, "--out", sweep),
    ):
        command = [sys.executable, "-m", "expertcut", *words]
        timed(command, threads, PLACE / f"{words[0]}.log", ROOT)
    found = load_sweep(sweep)
    names, sizes, logprobs = ["(base)"], [found.base.bytes], [_answers(sweep / "cells" / "base")]
    for cell in found.cells:
        by = "random-0" if cell.by == "random" else cell.by  # with its seed
        (folder,) = (sweep / "cells").glob(f"keep-{cell.kept}-{by}-????????")
        names.append(f"{cell.by} {cell.fraction:.0%}")
        sizes.append(cell.bytes)
        logprobs.append(_answers(folder))
    asked = [*load_quiz(Selection(str(BUNDLED / "quiz"), "test", 5))]
    answered = Answered(
        logprob_MNC=np.stack(logprobs),
        answer_N=np.array([q.answer for q in asked]),
        subject_N=np.array([q.subject for q in asked]),
        group_N=np.array([q.overlap_hash for q in asked]),
        size_M=np.array(sizes),
    )
    return names, answered


def _answers(folder: Path) -> Array:
    logprob_NC = load_profile(folder).answers.logprob_NC.astype(np.float64)
    return np.asarray(logprob_NC - np.logaddexp.reduce(logprob_NC, axis=1, keepdims=True))


def by_subject(answered: Answered) -> Array:
    """One column for each subject."""
    return 1.0 * (answered.subject_N[:, None] == np.unique(answered.subject_N))


def learned(answered: Answered, options: SelectionOptions) -> Routes:
    """The routes of all questions."""
    seen = answered.right_MN, by_subject(answered)
    return fit(*seen, answered.size_M, options, answered.chance)


def at_equal_bytes(names: list[str], answered: Answered) -> list[list[Cell]]:
    """Best single cut against dispatch within as many bytes, by accuracy and as Symbolic-MoE."""
    largest, *cuts = np.unique(answered.size_M)[::-1].tolist()
    quarter, half, most = sorted(cuts)
    sizes = (quarter, half, 2 * quarter, most, quarter + half, largest, 3 * quarter, 2 * half)
    rows: list[list[Cell]] = []
    for max_bytes in sorted({*sizes, quarter + most, 2 * most, 3 * most}):
        options = SelectionOptions(max_bytes=max_bytes)
        crossed = cross_fit_routes(answered, by_subject(answered), options)
        routes = learned(answered, options)
        change = compare(crossed.single_N, crossed.chosen_N)
        word = verdict(change, crossed.chosen_N.sum(), most_right(answered, routes))
        moe = SelectionOptions("symbolic", max_bytes=max_bytes)
        symbolic_N = cross_fit_routes(answered, by_subject(answered), moe).chosen_N
        oracle = answered.right_MN[routes.fits_M].any(axis=0).mean()
        low, high = oracle_null(answered, routes)
        held = [name for name, is_held in zip(names, routes.is_held_M, strict=True) if is_held]
        rows.append(
            [
                *(max_bytes / 1e6, names[routes.single], crossed.single_N.mean(), ", ".join(held)),
                *(crossed.chosen_N.mean(), change_text(change, ""), word),
                change_text(compare(crossed.single_N, symbolic_N), ""),
                *(oracle, f"{percent(low)} … {percent(high)}"),
            ]
        )
    return rows


def cuts(args: argparse.Namespace) -> None:
    """The table of sizes."""
    names, answered = swept(args.threads)
    columns = {"MB": ".2f", "best single": "", "accuracy": ".2%", "held": "", "by subject": ".2%"}
    columns |= {"Δ (95 %)": "", "verdict": "", "as symbolic, Δ": "", "oracle": ".1%", "null": ""}
    n = answered.right_MN.shape
    title = f"{n[0] - 1} cuts and the base, {n[1]:,} questions"
    report(args.out, title, columns, at_equal_bytes(names, answered))


def equally_good(seed: int, n_models: int, n_subjects: int, n: int) -> Answered:
    """Models of one accuracy in each subject; subjects are not equally hard."""
    rng = np.random.default_rng(seed)
    subject_N, hard_S = np.arange(n) % n_subjects, rng.uniform(0.3, 0.95, n_subjects)
    right_MN = rng.random((n_models, n)) < hard_S[subject_N]
    answer_N = rng.integers(4, size=n)
    said_MN = (answer_N + np.where(right_MN, 0, rng.integers(1, 4, (n_models, n)))) % 4
    logprob_MNC = np.where(said_MN[..., None] == np.arange(4), np.log(0.7), np.log(0.1))
    groups = np.array([f"{i:016x}" for i in range(n)])
    return Answered(logprob_MNC, answer_N, subject_N.astype(str), groups, np.ones(n_models))


def chance(args: argparse.Namespace) -> None:
    """How often models that are equally good everywhere seem to gain by being chosen."""
    rows: list[list[Cell]] = []
    for world in [WORLDS[i] for i in args.worlds]:
        found: dict[float | None, list[Comparison]] = {None: [], 0.0: []}
        helped = 0
        for seed in range(args.seeds):
            answered = equally_good(seed, *world)
            for kappa, changes in found.items():
                options = SelectionOptions(kappa=kappa)
                crossed = cross_fit_routes(answered, by_subject(answered), options, seed)
                changes.append(compare(crossed.single_N, crossed.chosen_N))
                if kappa is None:
                    bar = most_right(answered, learned(answered, options))
                    helped += verdict(changes[-1], crossed.chosen_N.sum(), bar) == "helps"
        shares = [float(np.mean([c.is_significant for c in own])) for own in found.values()]
        rows.append([*world, args.seeds, shares[0], helped / args.seeds, shares[1]])
    columns = {"models": "", "subjects": "", "questions": ",d", "seeds": ""}
    columns |= {"significant": ".1%", "helps": ".1%", "significant with κ = 0": ".1%"}
    report(args.out, "Models that are equally good in every subject", columns, rows)


def authors_functions(script: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`recruit_agents` and `normalize_to_probability` of their script, without its imports."""
    wanted = ("recruit_agents", "normalize_to_probability")
    tree = ast.parse(script.read_text(encoding="utf-8"))
    body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in wanted]
    names: dict[str, Any] = {"random": random}
    exec(compile(ast.Module(body, []), str(script), "exec"), names)  # a local file, named by hand
    return names["recruit_agents"], names["normalize_to_probability"]


def recruits(args: argparse.Namespace) -> None:
    """Their draws against the expected shares, on the right − wrong answers of the sweep."""
    draw, normalized = authors_functions(args.symbolic_moe)
    names, answered = swept(args.threads)
    lead_MS, subjects = (
        learned(answered, SelectionOptions("symbolic")).lead_MS,
        by_subject(answered),
    )
    strength = dict(zip(names, normalized(lead_MS.sum(axis=1).tolist(), 0.5), strict=True))
    random.seed(args.seed)
    rows: list[list[Cell]] = []
    for s, subject in enumerate(np.unique(answered.subject_N).tolist()):
        own_M = recruit(lead_MS[:, [s]], lead_MS.sum(axis=1), np.ones((len(names), 1), bool))[:, 0]
        drawn = draw(list(zip(names, lead_MS[:, s].tolist(), strict=True)), strength, k=DRAWS)
        theirs_M = np.array([drawn.count(name) for name in names]) / DRAWS
        sigma_M = np.sqrt(own_M * (1 - own_M) / DRAWS)
        z = np.abs(theirs_M - own_M)[sigma_M > 0] / sigma_M[sigma_M > 0]
        is_none = not theirs_M[own_M == 0].any()
        rows.append([subject, (own_M > 0).sum(), z.max(), bool(is_none)])
    columns = {"subject": "", "recruited": "", "largest |z|": ".2f", "no others drawn": ""}
    ours, theirs = _voted(answered, subjects, draw, normalized, args.votes)
    more = {"accuracy as symbolic": ours, "accuracy of their draws of three": theirs}
    report(args.out, f"{DRAWS:,} draws of a model", columns, rows, **more)
    print(f"votes: expected shares {ours:.2%}; their draws of three, {args.votes} seeds: ")
    print(f"{np.mean(theirs):.2%} ({min(theirs):.2%} … {max(theirs):.2%})")


def _voted(
    answered: Answered,
    category_NS: Array,
    draw: Callable[..., Any],
    normalized: Callable[..., Any],
    seeds: int,
) -> tuple[float, list[float]]:
    """Cross-fitted accuracy of votes by expected shares, and by their draws of three."""
    options = SelectionOptions("symbolic")
    ours = cross_fit_routes(answered, category_NS, options).chosen_N.mean()
    fold_N, n_models = folds_of(answered, 0), len(answered.size_M)
    accuracies = []
    for _ in range(seeds):
        weight_MN = np.zeros((n_models, len(fold_N)))
        for fold in range(5):
            seen_N = fold_N != fold
            lead_MS = (2 * answered.right_MN[:, seen_N] - 1) @ category_NS[seen_N]
            strength = dict(enumerate(normalized(lead_MS.sum(axis=1).tolist(), 0.5)))
            for n in np.flatnonzero(~seen_N):
                leads = lead_MS[:, category_NS[n].argmax()].tolist()
                for m in draw(list(enumerate(leads)), strength, k=3):
                    weight_MN[m, n] += 1 / 3
        accuracies.append(float(answered.is_right(weight_MN).mean()))
    return float(ours), accuracies


def main() -> None:
    """Reads the command line, measures, reports."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"cuts": cuts, "chance": chance, "recruits": recruits}
    options.add_argument("part", choices=parts)
    options.add_argument("--symbolic-moe", type=Path, help="their recruit_agents.py")
    options.add_argument("--seeds", type=int, default=200)
    options.add_argument("--worlds", type=int, nargs="+", default=[*range(len(WORLDS))])
    options.add_argument("--votes", type=int, default=10, help="seeds of their draws of three")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    args.out = args.out or PLACE / f"{args.part}.json"
    if args.part == "recruits" and args.symbolic_moe is None:
        options.error("recruits needs --symbolic-moe recruit_agents.py")
    parts[args.part](args)


if __name__ == "__main__":
    main()
