"""The page as a file: it says what `show` says, needs nothing else, and takes text for text."""

import csv
import io
import json
import logging
import math
import re
import xml.etree.ElementTree as ET
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from expertcut.checkpoints import export
from expertcut.cli import HarmlessFormatter, main
from expertcut.edits.plan import (
    BlockEdit,
    ChosenOn,
    PlanFile,
    PlanModel,
    hashes_sha256,
    load_plan,
)
from expertcut.edits.selection import removed_traffic
from expertcut.errors import OutputError, PlanError, ProfileError
from expertcut.evaluation.cross_fit import Comparison, CrossFitResult, RandomResult
from expertcut.evaluation.holding import HoldingFold, HoldingResult
from expertcut.evaluation.results import ChosenOnResult
from expertcut.evaluation.search_results import (
    AUDIT_FILE,
    SWEEP_FILE,
    AblationEffect,
    Audit,
    AuditRequest,
    BudgetRegret,
    Correlation,
    CriterionEvaluation,
    CriterionRank,
    SampledExpert,
    Sweep,
    SweepCell,
    SweepRequest,
    SweptModel,
)
from expertcut.models.checkpoint_dir import fingerprint_of
from expertcut.profiling.findings import find, findings_json
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting.edit_tables import points
from expertcut.reporting.eval_tables import (
    audit_sentences,
    audit_tables,
    result_sentences,
    results_table,
    sweep_sentences,
    sweep_table,
    verdict_sentences,
)
from expertcut.reporting.page import PAGE, write
from expertcut.reporting.page_sections import key_of
from expertcut.reporting.plots import Curves, Heat, Series, draw, span
from expertcut.reporting.profile_tables import experts_csv, headline_facts
from expertcut.reporting.tables import Column, as_csv
from expertcut.reporting.views import edits_of, rows_of
from expertcut.stats import FormResult, HeldOutAccuracy, HeldOutResult, compare
from tests.support.hand_made import block, profile_info, random_chunk, write_profile
from tests.support.pages import (
    HOSTILE,
    is_png,
    make_hostile_run,
    make_plan,
    make_profile,
    make_results,
    make_run,
    text_of,
)

VOID = {"meta", "link", "br", "input", "img"}


class Outline(HTMLParser):
    """Elements, their attributes, and the text of each table cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def data_of(page: Path | str) -> dict[str, Any]:
    """What the page's script reads."""
    text = page if isinstance(page, str) else page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return dict(json.loads(found))


def titles(text: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "a run")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return run / "report.html"


# What it says


def test_the_experts_of_the_page_have_the_numbers_of_show(run: Path, page: Path):
    shown = findings_json(find(load_profile(run / "profile")))
    data = data_of(page)["explorers"]["profile"]
    rows = [expert for layer in shown["layers"] for expert in layer["expert"]]
    assert len(rows) == 24
    for name, values in data["figures"].items():
        for value, row in zip(values, rows, strict=True):
            if name.endswith(("_low", "_high")):
                pair = row[name.rsplit("_", 1)[0]]
                expected = None if pair is None else pair[name.endswith("_high")]
            else:
                expected = row[name]
            assert value == (None if expected is None else pytest.approx(expected, rel=1e-5))
    assert None in data["figures"]["accuracy"] and {0.0} < set(data["figures"]["appearances"])


def test_the_subjects_of_an_expert_are_those_of_show(run: Path, page: Path):
    shown = findings_json(find(load_profile(run / "profile")))["subjects"]
    data = data_of(page)["explorers"]["profile"]["subjects"]
    assert data["names"] == [subject["subject"] for subject in shown]
    for s, subject in enumerate(shown):
        appearances = [a for layer in subject["layers"] for a in layer["appearances"]]
        accuracies = [a for layer in subject["layers"] for a in layer["expert_accuracy"]]
        n, right = data["questions"][s], data["right"][s]
        assert (n, right / n) == (subject["questions"], subject["accuracy"])
        assert [a / n for a in data["activated"][s]] == appearances
        pairs = zip(data["activated_right"][s], data["activated"][s], strict=True)
        assert [y / a if a else None for y, a in pairs] == accuracies
        assert any(0 < a < 1 for a in appearances)


def test_results_stand_there_as_eval_printed_them(run: Path, page: Path):
    results = make_results(run / "results.json")
    text = page.read_text(encoding="utf-8")
    cells, expected = Outline(text).cells, results_table(results).texts()
    starts = [i for i, cell in enumerate(cells) if cell == expected[0][0]]
    flat = [cell for row in expected for cell in row]
    assert any(cells[start : start + len(flat)] == flat for start in starts)
    for sentence in (*result_sentences(results), *verdict_sentences(results)):
        assert sentence in unescape(text)
    # Five columns come first.
    assert cells[:10] == [
        *("base", "16.8 MB", "50.00%", "–", "–"),
        *("cut", "12.6 MB", "47.00%", "−3.0 (−8.0 … +2.0)", "undecided"),
    ]


def test_the_headline_has_size_verdict_models_quiz_and_date(tmp_path: Path):
    make_results(tmp_path / "results.json")
    chunks = tmp_path / "results.chunks"
    for name, finished in (("base", 1_700_000_000), ("cut", 1_700_086_400.5), ("broken", "soon")):
        (chunks / name).mkdir(parents=True)
        (chunks / name / "run.json").write_text(json.dumps({"finished": finished}))
    (head,) = re.findall(r'<div class="headline">(.*?)</div>', text_of(tmp_path), re.S)
    assert re.findall(r">(\S[^<>\n]+)<", head) == [
        "25 % smaller, undecided at a margin of 1 point: could be 8.0 points worse, on 100 "
        "questions",
        "cut against base: −3.0 points (−8.0 … +2.0)",
        "birds, split test, 5 shots; measured on 2023-11-15",
    ]
    results = make_results(tmp_path / "results.json")
    own = results.models[1].model_copy(
        update={"chosen_on": ChosenOnResult(split="test", overlap=80)}
    )
    guessed = {"chance": 0.45, "models": [results.models[0], own]}
    results.model_copy(update=guessed).save(tmp_path / "results.json")
    end = ", on 100 questions, 80 of which chose the experts; both are no better than guessing "
    text = text_of(tmp_path)
    assert f"8.0 points worse{end}(45 %)</strong>" in text
    assert "right, no better than guessing (45 %): the base" in text
    assert "questions would decide; both only guess here" in text
    (figure,) = [f for f in data_of(text)["figures"].values() if f["title"].startswith("Accuracy")]
    assert [its["name"] for its in figure["series"]] == ["accuracy", "guessing 45 %"]
    assert figure["series"][1]["values"] == [0.45] * 2 and figure["series"][1]["reference"]
    compared = [c.model_copy(update={"lost": 0, "gained": 0, "delta": 0.0, "ci95": (-0.009, 0.009)})
                for c in results.comparisons]  # fmt: skip
    models = [m.model_copy(update={"bytes": 1_000}) for m in results.models]
    changes = {"comparisons": compared, "models": models}
    results.model_copy(update=changes).save(tmp_path / "results.json")
    text = text_of(tmp_path)
    assert "same size, undecided" in text and "same answers" in text
    alone = {"comparisons": [], "models": results.models[:1]}
    results.model_copy(update=alone).save(tmp_path / "results.json")
    assert "<strong>16.8 MB, 50.0 % right, on 100 questions</strong>" in text_of(tmp_path)


@pytest.mark.parametrize("known", ["all", "accuracy", "nothing"])
def test_a_checkpoint_alone_shows_its_size_and_accuracy(tmp_path: Path, known: str):
    for name, n_bytes in (("base", 1_000_000), ("cut", 700_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(n_bytes))
    right_N = np.arange(400) < 300
    change = compare(right_N, np.roll(right_N, 2))
    form = {"form": "this", "questions": 400, "accuracy": 0.75, "right_logprob": 0.0, "flipped": 0}
    proof = {"held_out_split": "val", "held_out_hashes": tuple(f"{i:064x}" for i in range(400))}
    proof |= {"answered": HeldOutAccuracy(base=0.75, change=change)} if known == "all" else {}
    proof |= {"chance": 0.74}
    proof |= {"outcomes": (FormResult(**form),)} if known == "accuracy" else {}
    if known == "nothing":
        proof = {}
    model = PlanModel(
        id=str(tmp_path / "base"), revision=None, fingerprint=fingerprint_of(tmp_path / "base")
    )
    profile = make_profile(tmp_path / "p", 1)
    chosen = {"quiz": "birds", "split": "val", "questions": 9, "sha256": hashes_sha256([])}
    changes = {"model": model, "proof": HeldOutResult(**proof), "chosen_on": ChosenOn(**chosen)}
    make_plan(tmp_path / "cut", profile, **changes)
    text = text_of(tmp_path / "cut")
    cells = Outline(text).cells[:10]
    assert cells[1] == "1.0 MB" and cells[6] == "700.0 kB"
    ends = " … ".join(map(points, change.ci95))
    assert (
        cells[7:]
        == {
            "all": ["75.00%", f"+0.0 ({ends})", "undecided"],
            "accuracy": ["75.00%", "–", "–"],
            "nothing": ["–", "–", "–"],
        }[known]
    )
    found = {"all": "undecided", "accuracy": "75.0 % right", "nothing": "not evaluated yet"}[known]
    assert f"<strong>30 % smaller, {found}" in text
    guess = {"all": "; both are", "accuracy": ", on 400 questions,", "nothing": ""}[known]
    assert (f"{guess} no better than guessing (74 %)" in text) == (known != "nothing")
    assert (", on 400 questions" in text) == (known != "nothing")
    assert ("Held-out questions (val)" in text) == (known != "nothing")
    (tmp_path / "cut" / "chosen_on.txt").unlink()  # whether they were used is not known any more
    assert "held-out" not in text_of(tmp_path / "cut").lower()


def test_what_a_cut_touches_and_marks_is_what_prune_said(run: Path, page: Path):
    profile, plan = load_profile(run / "profile"), load_plan(run / "cut")
    gone = removed_traffic(profile, plan.blocks)
    (mark,) = data_of(page)["explorers"]["profile"]["marks"]
    assert (mark["removed"], mark["tilted"]) == ([1, 9, 17], [0, 8, 16])
    traffic = csv_of(run / "report" / "plan-cut-traffic.csv")
    assert [float(row["share of gate weight"]) for row in traffic] == [b.mass for b in gone]
    assert all(0.05 < (b.mass or 0) < 0.3 for b in gone)


def test_a_search_is_a_curve_for_each_number_of_experts(run: Path):
    rows = csv_of(run / "report" / "plan-cut-tuning.csv")
    found = {(r["series"], r["strength (logits)"]): r["accuracy"] for r in rows}
    assert found["1 expert", "0.5"] == "0.52" and found["1 expert", "2"] == "0.4"
    assert found["2 experts", "1"] == "0.55" and found["2 experts", "2"] == ""
    assert {found["unedited", x] for x in ("0.5", "1", "2")} == {"0.5"}


def test_every_figure_is_there_as_png_svg_and_csv(run: Path, page: Path):
    keys = set(data_of(page)["figures"])
    files = {file.name for file in (run / "report").iterdir()}
    assert len(keys) == 12
    endings = ("png", "svg", "csv")
    assert files == {f"{key}.{e}" for key in keys for e in endings} | {"profile-experts.csv"}
    for key in keys:
        assert is_png((run / "report" / f"{key}.png").read_bytes())
        ET.parse(run / "report" / f"{key}.svg")
    hrefs = {v for t, n, v in Outline(page.read_text()).attributes if (t, n) == ("a", "href")}
    assert {f"report/{file}" for file in files} <= hrefs


def test_the_csv_of_a_map_has_every_cell_in_full(run: Path):
    shown = findings_json(find(load_profile(run / "profile")))
    rows = csv_of(run / "report" / "profile-weighted-accuracy.csv")
    experts = [(layer, e) for layer in shown["layers"] for e in layer["expert"]]
    assert len(rows) == len(experts)
    for row, (layer, expert) in zip(rows, experts, strict=True):
        value = expert["weighted_accuracy"]
        assert (row["layer"], row["expert"]) == (str(layer["layer"]), str(expert["expert"]))
        assert row["weighted accuracy"] == ("" if value is None else str(value))
    its = find(load_profile(run / "profile"))
    assert (run / "report" / "profile-experts.csv").read_text() == as_csv(experts_csv(its))


def csv_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))


# What is missing is left out


def test_a_part_that_is_missing_is_left_out(tmp_path: Path):
    profile = make_profile(tmp_path / "p")
    text = text_of(profile.path)
    assert [t.split()[0] for t in titles(text)] == ["Experts", "Suspects", "Routing", "Where"]
    facts = headline_facts(find(profile))  # as `show` begins
    n_answer, others = facts["experts"].split(", ", 1)
    (head,) = re.findall(r'<div class="headline">(.*?)</div>', text, re.S)
    said = [f"{facts['accuracy']} right", facts["questions"], f"Experts: {n_answer}", others]
    assert re.findall(r">(\S[^<>\n]+)<", unescape(head)) == said
    assert all(f"<dt>{name}</dt><dd>{fact}</dd>" in unescape(text) for name, fact in facts.items())
    make_results(tmp_path / "results-2.json")
    page = write(tmp_path / "results-2.json", tmp_path / "r.html")
    assert titles(page.read_text()) == ["Results", "Where the numbers come from"]
    assert (tmp_path / "r").is_dir() and not (tmp_path / "report").exists()
    make_plan(tmp_path / "cut", profile)
    text = text_of(tmp_path / "cut")
    assert titles(text) == ["What was changed: cut", "Where the numbers come from"]
    assert "What the cut touches" not in text  # without the profile nobody knows


def test_several_of_a_kind_are_told_apart(tmp_path: Path):
    for name in ("one", "two"):
        make_profile(tmp_path / name, 1)
        make_results(tmp_path / name / f"results-{name}.json")
    found = titles(text_of(tmp_path))
    assert "Experts: one" in found and "Experts: two" in found
    assert "Results: one/results-one" in found


def test_what_eval_and_perturb_scored_is_no_profile_of_the_run(tmp_path: Path):
    make_profile(tmp_path / "p", 1)
    make_profile(tmp_path / "p" / "perturbed" / "bf16", 1)
    make_profile(tmp_path / "results.chunks" / "base", 1)
    make_profile(tmp_path / ".hidden", 1)
    assert list(data_of(text_of(tmp_path))["explorers"]) == ["p"]


def test_a_recipe_and_its_stages_stand_where_the_numbers_come_from(tmp_path: Path):
    make_results(tmp_path / "results.json")
    stage = {"inputs": {}, "finished": "2026-11-22T17:00:00Z", "elapsed_s": 5.57,
             "versions": {"expertcut": "0.1.0", "torch": "2.13.0"}}  # fmt: skip
    begun = {"inputs": {}, "finished": None}
    manifest = {"format": 1, "stages": {"eval <b>": stage, "report": begun}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "recipe.yaml").write_text("model: <i>tiny\n  a: 1\n")
    text = text_of(tmp_path)
    said = "2026-11-22T17:00:00Z, 5.6 s, expertcut 0.1.0, torch 2.13.0"
    assert f"<dt>eval &lt;b&gt;</dt><dd>{said}</dd>" in text and "<dt>report</dt>" not in text
    assert "model: &lt;i&gt;tiny\n  a: 1\n" in text
    for broken in ("{", "[]", '{"stages": [1]}', '{"stages": {"eval": {"finished": 3}}}'):
        (tmp_path / "manifest.json").write_text(broken)
        assert "Stages of the run" not in text_of(tmp_path)


def make_sweep(folder: Path, profile: Profile) -> Sweep:
    """Two criteria at two shares; the last cell is not finished."""
    sizes = {"parameters": 4_000, "active_parameters": 1_000, "bytes": 16_000}
    base = {"accuracy": 0.75, "ci95": (0.7, 0.8), "questions": 100, "right_logprob": -0.5, **sizes}
    change = Comparison(
        delta=-0.05, ci95=(-0.1, 0.0), gained=1, lost=6, mcnemar_p=0.1, smallest_effect=0.07
    )
    moved = {"max_abs_logprob_diff": 1.0, "median_abs_logprob_diff": 0.1, "change": change}
    keep = {block.name: (0, 1) for block in profile.info.model.blocks}
    cells = [
        SweepCell(**{**base, "accuracy": share}, **moved, by=by, fraction=fraction, keep=keep)
        for by, fraction, share in (("reap", 0.5, 0.7), ("reap", 0.25, 0.5), ("random", 0.5, 0.6))
    ]
    asked = SweepRequest(
        scored=profile.info,
        profile="0" * 64,
        by=("reap", "random"),
        fractions=(0.5, 0.25),
        budget="layer",
        min_keep=None,
        positions="answer",
        layout="stock",
        removed=None,
        fold="answer",
        protect=(),
        seed=0,
    )
    chosen_on = ChosenOnResult(split="val", overlap=0)
    found = Sweep(asked=asked, chosen_on=chosen_on, base=SweptModel(**base), cells=tuple(cells))
    folder.mkdir()
    found.save(folder / SWEEP_FILE)
    return found


def make_audit(folder: Path, profile: Profile) -> Audit:
    """Two experts removed, two criteria judged, one of them without a correlation."""
    model, info = profile.info.model, profile.info
    asked = AuditRequest(
        model=PlanModel(id=model.id, revision=None, fingerprint=model.fingerprint),
        settings=info.settings,
        profile="0" * 64,
        quiz=info.quiz.id,
        split="val",
        shots=5,
        questions=100,
        asked="0" * 64,
        by=("reap", "random"),
        positions="answer",
        layout="stock",
        fractions=(0.5,),
        sample=2,
        seed=0,
    )
    harm = {
        "stderr": 0.01,
        "accuracy": 0.02,
        "gained": 1,
        "lost": 3,
        "mcnemar_p": 0.6,
        "largest": 1,
    }
    regret = (BudgetRegret(fraction=0.5, removed=1, chosen=0.3, least=0.125, random=0.2),)
    known, unknown = Correlation(rho=0.5, ci95=(0.25, 0.75)), Correlation(rho=None, ci95=None)
    found = Audit(
        asked=asked,
        overlap=0,
        accuracy=0.75,
        right_logprob=-0.5,
        sampled=tuple(SampledExpert(layer=0, row=e, expert=e) for e in (0, 1)),
        standings={
            by: CriterionRank(score=(1, 2), share=(0.3, 0.7), place=(1, 0)) for by in asked.by
        },
        harms=tuple(
            AblationEffect(layer=0, expert=e, logprob=0.1 + e / 10, **harm) for e in (0, 1)
        ),
        verdicts=tuple(
            CriterionEvaluation(by=by, within=its, overall=its, within_accuracy=its, regrets=regret)
            for by, its in zip(asked.by, (known, unknown), strict=True)
        ),
    )
    folder.mkdir()
    found.save(folder / AUDIT_FILE)
    return found


def test_sweeps_and_audits_stand_there_as_show_prints_them(tmp_path: Path):
    profile = make_profile(tmp_path / "p", 1)
    sweep, audit = make_sweep(tmp_path / "s", profile), make_audit(tmp_path / "a", profile)
    make_profile(tmp_path / "s" / "cells" / "base", 1)
    text = text_of(tmp_path)
    assert {"Sweep: s", "Audit: a"} < set(titles(text)) and list(data_of(text)["explorers"]) == [
        "p"
    ]
    cells = Outline(text).cells
    for table in (sweep_table(sweep), *audit_tables(audit)):
        expected = [cell for row in table.texts() for cell in row]
        start = next(i for i in range(len(cells)) if cells[i : i + len(expected)] == expected)
        assert start >= 0
    for sentence in (*sweep_sentences(sweep), *audit_sentences(audit)):
        assert sentence in unescape(text)
    figures = data_of(text)["figures"]
    found = {its["name"]: its["values"] for its in figures["sweep-s-accuracy"]["series"]}
    assert found == {"reap": [0.7, 0.5], "random": [0.6, None], "unedited": [0.75, 0.75]}
    assert figures["audit-a-correlations"]["series"][0]["values"] == [0.5, None]
    assert figures["audit-a-regrets"]["series"][0]["values"] == [0.175, 0.175]
    # Equals are all named, and which is the best of several is partly chance.
    cells = tuple(c.model_copy(update={"accuracy": 0.7}) for c in sweep.cells if c.fraction == 0.5)
    few = sweep.model_copy(update={"cells": cells, "chance": 0.69})
    said = " ".join(sweep_sentences(few))
    assert "At 0.5 of the experts reap and random keep most, 70.0 %; by reap: −5.0 points" in said
    assert "; chance flatters the best of 2 criteria on " in said
    for rho, text in ((0.0, "+0.00"), (0.5, "+0.50")):
        both = Correlation(rho=rho, ci95=(-0.75, 0.75))
        equal = tuple(v.model_copy(update={"within": both}) for v in audit.verdicts)
        said = audit_sentences(audit.model_copy(update={"verdicts": equal}))[1]
        assert said.endswith(f"the best of 2 are reap and random (ρ = {text} within layers).")
    lost = [r.model_copy(update={"removed": 2}) for r in equal[0].regrets]
    rho = Correlation(rho=-0.5, ci95=(-0.75, -0.25))
    changes = {"regrets": tuple(lost), "within": rho}
    last = audit.model_copy(update={"verdicts": (equal[0].model_copy(update=changes),)})
    assert audit_tables(last)[0].texts()[0][:3] == ["reap", "−0.50 (−0.75 … −0.25)", "–"]


def test_a_proof_stands_with_its_plan_or_alone(tmp_path: Path):
    change = Comparison(
        delta=0.02, ci95=(0.01, 0.03), gained=4, lost=2, mcnemar_p=0.04, smallest_effect=0.01
    )
    proof = CrossFitResult(
        procedure="reweight --tune <b>",
        quiz="birds",
        split="val",
        questions=100,
        seed=0,
        base_accuracy=0.5,
        cross_fitted=change,
        same_questions=change,
        random=RandomResult(draws=99, distinct=90, delta_mean=0.0, range95=(-0.01, 0.01), p=0.01),
        folds=(),
        verdict="helps",
        sentence="This procedure helps & is <sound>.",
    )
    profile = make_profile(tmp_path / "p", 1)
    make_plan(tmp_path / "cut", profile)
    (tmp_path / "alone").mkdir()
    holding = HoldingResult(
        **proof.model_dump(exclude={"folds", "verdict", "sentence"}),
        margin=0.01,
        experts=2.5,
        folds=(HoldingFold(questions=20, experts=2.5, delta=0.0),),
        verdict="holds",
        sentence="This procedure holds & is <sound>.",
    )
    for folder in ("cut", "alone"):
        (tmp_path / folder / "proof.json").write_text(proof.model_dump_json())
        (tmp_path / folder / "holding.json").write_text(holding.model_dump_json())
    text = text_of(tmp_path)
    assert titles(text).count("Proof: alone") == 2 and "Proof: cut" not in titles(text)
    for word, name in (("helps", "experts (99 draws, 90 distinct)"), ("holds", "(99 draws)")):
        assert text.count(f"This procedure {word} &amp; is &lt;sound&gt;.") == 2
        assert Outline(text).cells.count(f"random {name}") == 2
    assert text.count("Chosen in the folds: 2.5 experts a token.") == 2
    assert "This procedure holds &amp; is" in text_of(tmp_path / "alone/holding.json")


def test_without_all_token_sums_there_is_no_map_of_them(tmp_path: Path):
    chunk = random_chunk(0, 30, [block(0)])
    kept = {name: values for name, values in chunk.items() if not name.endswith("_LE")}
    profile = write_profile(tmp_path / "p", profile_info([block(0)], {"birds": 30}), [kept])
    make_plan(tmp_path / "cut", profile)
    figures = data_of(text_of(tmp_path))["figures"]
    assert "p-tokens" not in figures and "plan-cut-traffic" not in figures
    assert "p-appearances" in figures and "p-rank-map" not in figures


def test_a_plan_of_a_cut_model_is_read_by_the_rows_of_its_profile():
    its = block(0, 3)
    edit = BlockEdit(keep=(4, 9), bias={9: 1.0}, rows=(4, 7, 9))
    assert rows_of(edit, its) == BlockEdit(keep=(0, 2), bias={2: 1.0})
    assert rows_of(BlockEdit(keep=(0, 2)), its) == BlockEdit(keep=(0, 2))
    assert rows_of(BlockEdit(keep=(0, 5)), its) is None  # another cut's profile
    assert rows_of(BlockEdit(keep=(4, 9), rows=(4, 7, 9, 11)), its) is None


@pytest.mark.parametrize("removal", get_args(PlanFile.model_fields["removal"].annotation))
def test_every_kind_of_removal_is_said_in_words(tmp_path: Path, removal: str):
    profile, keep = make_profile(tmp_path / "p", 1), (0, 2, 3, 4, 5, 6, 7)
    merged = {0: {0: 0.5, 1: 0.5}} if removal == "merge" else None
    form = {"layout": "exact", "removed": "mean"} if removal == "constant" else {}
    blocks = {"model.layers.0.mlp": BlockEdit(keep=keep, merged=merged)}
    plan = make_plan(tmp_path / "cut", profile, removal=removal, blocks=blocks, **form)
    text = text_of(tmp_path)
    (sentence,) = [s for edit in export.edits_of(plan) for s in edit.describe(8)]
    assert "of 8 experts" in sentence or "8 experts merged into 7" in sentence
    assert "a removed" in sentence and sentence in text
    (mark,) = data_of(text)["explorers"]["p"]["marks"]
    assert (mark["removed"], mark["verb"] == "merged") == ([1], removal == "merge")


def test_a_plan_of_another_model_says_nothing_of_a_profile(tmp_path: Path):
    profile = make_profile(tmp_path / "p")
    plan = make_plan(tmp_path / "cut", profile)
    other = plan.model.model_copy(update={"fingerprint": "0" * 64})
    make_plan(tmp_path / "cut", profile, model=other)
    assert data_of(text_of(tmp_path))["explorers"]["p"]["marks"] == []
    assert (
        edits_of(plan.model_copy(update={"blocks": {"x": BlockEdit(keep=(0,))}}), find(profile))
        is None
    )


# Safe, whole, the same


def test_the_page_asks_for_nothing_and_runs_nothing_else(page: Path):
    text = page.read_text(encoding="utf-8")
    its = Outline(text)
    assert its.open == [] and its.tags.count("script") == 2
    sources = [v for _, name, v in its.attributes if name in ("src", "srcset", "action", "style")]
    assert sources == []
    assert {v for t, n, v in its.attributes if (t, n) == ("link", "href")} == {"data:,"}
    assert not [name for _, name, _ in its.attributes if name.startswith("on")]
    hrefs = [v or "" for t, n, v in its.attributes if (t, n) == ("a", "href")]
    assert hrefs and all(h.startswith(("#", "report/")) for h in hrefs)
    assert "#profile-experts" in hrefs  # the map of the removed experts, beside the headline
    # Boxes that scroll are no landmarks: several have one name (axe-core: landmark-unique).
    assert ("div", "role", "region") not in its.attributes
    (policy,) = re.findall(r'Policy" content="([^"]*)"', text)
    assert unescape(policy).startswith("default-src 'none';") and "unsafe" not in policy
    assert "@import" not in text and "url(" not in text


def test_text_of_quizzes_and_models_stays_text(tmp_path: Path, run: Path):
    calm = Outline((run / "report.html").read_text(encoding="utf-8"))
    page = write(make_hostile_run(tmp_path / "<i>run"))
    text = page.read_text(encoding="utf-8")
    its = Outline(text)
    assert its.open == [] and set(its.tags) <= {*calm.tags, "dt"}
    assert its.tags.count("script") == 2 and "img" not in its.tags
    assert {name for _, name, _ in its.attributes} <= {name for _, name, _ in calm.attributes}
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "49" not in its.cells  # no template was run
    for words in (HOSTILE[0], HOSTILE[1], HOSTILE[4], HOSTILE[8], HOSTILE[9]):
        assert (
            words in its.cells
            or words in data_of(page)["explorers"]["b-profile"]["subjects"]["names"]
        )
    files = [file.name for file in (page.parent / "report").iterdir()]
    assert files and all(re.fullmatch(r"[a-z0-9-]+\.(png|svg|csv)", name) for name in files)
    assert {p.name for p in tmp_path.iterdir()} == {"<i>run"}  # nothing went elsewhere
    for file in (page.parent / "report").glob("*.svg"):
        tags = {node.tag.rpartition("}")[2] for node in ET.parse(file).iter()}
        assert not tags & {"script", "foreignObject", "a"}


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, run: Path):
    again = make_run(tmp_path / "a run")
    write(again)
    first, second = (
        [(f.name, f.read_bytes()) for f in (folder / PAGE, *sorted((folder / "report").iterdir()))]
        for folder in (run, again)
    )
    assert first == second and len(first) > 30


@pytest.mark.parametrize("missing", ["nothing", "empty"])
def test_where_there_is_nothing_that_is_said(tmp_path: Path, missing: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match=missing) as refused:
        write(tmp_path / missing)
    assert "name" in str(refused.value) and not list((tmp_path / "empty").iterdir())


def test_what_is_damaged_or_unfinished_is_refused_and_nothing_written(tmp_path: Path):
    profile = make_profile(tmp_path / "p")
    make_plan(tmp_path / "cut", profile)
    file = tmp_path / "cut" / "plan.json"
    damaged = file.read_text().replace('"proof": {}', '"proof": {"held_out": [{"against": 1}]}')
    file.write_text(damaged)
    with pytest.raises(PlanError, match="held_out"):
        write(tmp_path)
    make_plan(tmp_path / "cut", profile)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(OutputError, match=r"results\.json"):
        write(tmp_path)
    (tmp_path / "results.json").unlink()
    next((profile.path / "chunks").iterdir()).unlink()
    with pytest.raises(ProfileError, match="not finished"):
        write(tmp_path)
    (tmp_path / "note.json").write_text("{}")
    for path, out in ((tmp_path / "note.json", None), (tmp_path / "cut", tmp_path / "page.pdf")):
        with pytest.raises(OutputError):
            write(path, out)
    assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.png"))


def test_the_command_says_where_the_page_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    make_results(tmp_path / "results.json")
    page = tmp_path / "out" / "page.html"
    words = ["expertcut", "report", str(tmp_path), "--out", str(page)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code and page.is_file() and (tmp_path / "out" / "page").is_dir()
    assert capsys.readouterr().out.split() == [
        *("written", f"{page},", "its", "figures", "in", f"{tmp_path}/out/page/")
    ]


def test_an_error_or_warning_cannot_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["expertcut", "report", str(tmp_path / HOSTILE[6])])
    with pytest.raises(SystemExit) as done:
        main()
    said = capsys.readouterr().err
    assert done.value.code == 2 and "31mred" in said and "�" in said
    assert all(char.isprintable() for char in said.rstrip("\n"))
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s\nthen", (HOSTILE[6],), None)
    text = HarmlessFormatter().format(record)
    assert text.splitlines()[1] == "then" and text.splitlines()[0].isprintable()


# Figures


def test_a_figure_that_holds_nothing_is_drawn_all_the_same():
    nothing = Heat("k", "t", "n", (np.full(3, np.nan), np.full(2, np.nan)), Column("x", ".1%"))
    empty = Curves("k", "t", "n", "x", ("a",), (Series("s", (None,)),), Column("y", ".1f"))
    for figure in (nothing, empty):
        drawn = draw(figure)
        assert is_png(drawn["k.png"]) and drawn["k.svg"].startswith(b"<?xml")
        assert "NaN" not in json.dumps(figure.as_json())
    assert "hatched: never chosen" in draw(nothing)["k.svg"].decode()
    whole = Heat("k", "t", "n", (np.zeros(2),), Column("x", ".1%"))
    assert "hatched" not in draw(whole)["k.svg"].decode()
    assert span([np.full(3, np.nan)]) == (0.0, 1.0)
    low, high = span([np.array([2.0, math.nan])])
    assert low == 2.0 < high


def test_keys_are_plain_and_differ():
    used: list[str] = []
    for name in ("A run", "a-run", "a/run", "…", "…", "x" * 99):
        used.append(key_of(name, used))
    assert used[:5] == ["a-run", "a-run-2", "a-run-3", "run", "run-2"] and len(used[5]) == 40
