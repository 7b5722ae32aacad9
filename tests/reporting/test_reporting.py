"""What people read: tables in three forms, sentences, and words that cannot do harm."""

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from expertcut.checkpoints.build import Built
from expertcut.commands.profile import ProfileSettings
from expertcut.edits import plan as plans
from expertcut.edits.calibrate import Fit
from expertcut.edits.criteria import CRITERIA
from expertcut.edits.plan import (
    BlockEdit,
    ChosenOn,
    EditPlan,
    ExpertIds,
    PlanFile,
    PlanModel,
    save_plan,
)
from expertcut.edits.router_edits import RouterEdit
from expertcut.edits.selection import Pruning, RemovedTraffic
from expertcut.edits.splits import ScoredSplit
from expertcut.errors import OutputError
from expertcut.evaluation.cross_fit import Comparison, CrossFitResult, RandomResult
from expertcut.evaluation.results import (
    ChosenOnResult,
    QuizComparison,
    QuizModelResult,
    QuizResults,
    SubjectResult,
)
from expertcut.profiling import findings, schema
from expertcut.profiling.findings import find, profile_json
from expertcut.profiling.storage import Profile
from expertcut.reporting.edit_tables import (
    held_out_sentences,
    held_out_tables,
    proof_csv,
    pruning_sentences,
    scale_sentences,
    tilt_sentences,
    touched_sentences,
    touched_table,
)
from expertcut.reporting.eval_tables import (
    plan_csv,
    plan_table,
    result_sentences,
    results_csv,
    results_table,
    verdict_sentences,
)
from expertcut.reporting.profile_tables import experts_csv, profile_tables
from expertcut.reporting.tables import Column, Table, as_csv, as_markdown, as_rich
from expertcut.reporting.views import find_shown
from expertcut.stats import (
    BitExactCheck,
    ExpertShares,
    FormResult,
    HeldOutResult,
    LogprobShift,
    RoutingAgreement,
)
from tests.support.hand_made import block, profile_info, random_chunk, random_profile, write_profile

TABLE = Table(
    "Birds",
    (Column("name"), Column("share", ".1%"), Column("n", ",d"), Column("x", "+.3g")),
    [["wren", 0.12345, 1234567, -2.0], ["heron", None, 0, None], [None, 1.0, None, 12345.678]],
    "Counted at dawn.",
)


def printed(table: Table, *, width: int = 120, colors: Any = None) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=colors)
    console.print(as_rich(table))
    return stream.getvalue()


# Forms


def test_markdown_is_a_github_table_under_a_heading():
    assert as_markdown(TABLE) == (
        "### Birds\n"
        "\n"
        "| name | share | n | x |\n"
        "| --- | --- | --- | --- |\n"
        "| wren | 12.3% | 1,234,567 | −2 |\n"
        "| heron | – | 0 | – |\n"
        "| – | 100.0% | – | +1.23e+04 |\n"
        "\n"
        "Counted at dawn.\n"
    )
    assert as_markdown(replace(TABLE, note="")).endswith("+1.23e+04 |\n")


def test_csv_has_full_precision_and_one_header_line():
    assert as_csv(TABLE) == (
        "name,share,n,x\nwren,0.12345,1234567,-2.0\nheron,,0,\n,1.0,,12345.678\n"
    )
    third = Table("t", (Column("x", ".1f"),), [[1 / 3]])
    assert float(as_csv(third).splitlines()[1]) == 1 / 3


def test_rich_shows_title_cells_and_note():
    text = printed(TABLE)
    assert text.index("Birds") < text.index("wren") < text.index("Counted at dawn.")
    (row,) = [line for line in text.splitlines() if "wren" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["wren", "12.3%", "1,234,567", "−2"]
    assert "│ wren  │" in row and "│   −2 │" not in row
    (idle,) = [line for line in text.splitlines() if "heron" in line]
    assert idle.index("0") > row.index("1,234,567")  # numbers stand at the right


def test_a_row_that_does_not_fit_its_columns_is_our_fault():
    with pytest.raises(ValueError, match="zip"):
        as_markdown(Table("t", (Column("a"), Column("b")), [["only one"]]))


HARMFUL = {
    "markup": "[red]bold[/red] [link=file:///etc/passwd]x[/link]",
    "colour": "a\x1b[31mred\x1b[0m",
    "title of the window": "a\x1b]0;owned\x07b",
    "8-bit escape": "a\x9b31mb",
    "line break": "first\nsecond",
    "return": "good\rbad",
    "right to left": "abc\u202etxt.exe",
    "pipe": "a|b",
    "escaped pipe": "a\\|b",
    "html": "<script>alert(1)</script>",
    "comma and quote": 'a,"b"',
    "separator": "a\u2028b",
}


def is_harmless(text: str) -> bool:
    """No character but line breaks that a terminal would obey."""
    return all(char == "\n" or char.isprintable() for char in text)


@pytest.mark.parametrize("text", HARMFUL.values(), ids=HARMFUL)
def test_what_comes_from_a_file_is_text_and_no_more(text: str):
    table = Table(f"Of {text}", (Column("subject"), Column("n")), [[text, 1]], f"Read {text}.")
    n_lines = len(as_markdown(replace(table, title="t", rows=[["x", 1]], note="n")).splitlines())
    rich = printed(table, width=300)
    assert is_harmless(rich)
    assert "\x1b[31m" not in printed(table, width=300, colors="truecolor")
    markdown = as_markdown(table)
    assert is_harmless(markdown)
    assert len(markdown.splitlines()) == n_lines
    assert "<script" not in markdown
    row = markdown.splitlines()[4]
    assert row.replace("\\\\", "").replace("\\|", "").count("|") == 3  # two cells
    content = as_csv(table)
    assert is_harmless(content)
    assert list(csv.reader(io.StringIO(content, newline=""))) == [
        ["subject", "n"],
        ["".join(char if char.isprintable() else "�" for char in text), "1"],
    ]
    if text.isprintable():
        assert rich.count(text) == 3  # title, cell and note say it as it is


# Profiles


def profile_of(folder: Path) -> Profile:
    """300 questions; expert 5 of the first layer serves 3 of them, expert 4 serves 2."""
    blocks = [block(0, 8), block(1, 8), block(2, 8)]
    info = profile_info(blocks, {"bi|rds": 256, "clocks": 44}, shots=3)
    chunks = [random_chunk(0, 256, blocks), random_chunk(1, 44, blocks)]
    for chunk in chunks:
        chunk["chosen_NLK"][:, 0] = [0, 1]
    chunks[0]["chosen_NLK"][:3, 0] = [[5, 4], [4, 5], [5, 0]]
    chunks[0]["gap_N"][7] = 0
    chunks[1]["prefix_gap"][:] = 0
    return write_profile(folder, info, chunks)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return profile_of(tmp_path / "profile")


def test_the_tables_are_those_of_the_paper(profile: Profile):
    titles = [table.title for table in profile_tables(profile)]
    assert [title.split(":")[0] for title in titles] == [
        *("Tables 1–2", "Table 3", "Table 4", "Table 5", "Tables 6–7")
    ]
    assert "top 2" in titles[0] and "last layer (2)" in titles[1]
    assert "first layer (0)" in titles[2] and "last layer (2)" in titles[3]
    notes = [table.note for table in profile_tables(profile)]
    assert notes[0].startswith("300 test questions of birds at 3 shots.")
    assert "counted from 0" in notes[0] and "counted from 0" in notes[4]
    assert "1 questions have a token of their own" in notes[0]
    assert "44 more have one in their shots" in notes[0]


def test_the_tables_hold_the_numbers(profile: Profile):
    shown = profile_json(profile)
    activated, ranks, first, last, entropy_all = profile_tables(profile)
    assert activated.texts() == [
        [
            str(layer["layer"]),
            str(layer["activated"]),
            "8",
            f"{layer['entropy_top_mean']:.4f}",
            f"{layer['entropy_top_std']:.4f}",
            "0.6931",
        ]
        for layer in shown["layers"]
    ]
    assert len({row[1] for row in activated.texts()}) > 1
    bottom = shown["layers"][-1]
    assert ranks.texts() == [
        [
            str(k + 1),
            f"{bottom['rank_probability_mean'][k]:.4f}",
            f"{bottom['rank_probability_std'][k]:.4f}",
        ]
        for k in range(2)
    ]
    assert entropy_all.texts() == [
        [
            str(layer["layer"]),
            f"{layer['entropy_all_mean']:.4f}",
            f"{layer['entropy_all_std']:.4f}",
            "2.0794",
        ]
        for layer in shown["layers"]
    ]
    for table, layer in ((first, shown["layers"][0]), (last, bottom)):
        assert table.texts() == [
            [
                str(row["expert"]),
                f"{100 * row['appearances']:.1f}%",
                f"{100 * row['accuracy']:.1f}%",
                f"{100 * row['weighted_accuracy']:.1f}%",
                f"{row['contribution_pct']:.2f}",
                f"{row['tokens']:,}",
            ]
            for row in layer["expert"]
            if row["appearances"] >= 0.01
        ]
    assert [row[0] for row in first.rows] == [0, 1, 5]  # 3 of 300 is 1 %, 2 of 300 is less


def test_a_model_of_one_layer_has_its_experts_once(tmp_path: Path):
    profile = random_profile(tmp_path / "p", profile_info([block(0)], {"birds": 5}))
    titles = [table.title for table in profile_tables(profile)]
    assert sum("experts of the" in title for title in titles) == 1


def test_without_all_token_sums_the_tables_leave_tokens_out(tmp_path: Path):
    chunk = random_chunk(0, 9, [block(0)])
    kept = {k: v for k, v in chunk.items() if not k.endswith("_LE")}
    profile = write_profile(tmp_path / "p", profile_info([block(0)], {"birds": 9}), [kept])
    (experts,) = [t for t in profile_tables(profile) if "Table 4" in t.title]
    assert {row[-1] for row in experts.texts()} == {"–"}


def test_the_csv_has_every_expert_of_every_layer(profile: Profile):
    rows = list(csv.DictReader(io.StringIO(as_csv(experts_csv(find(profile))))))
    shown = profile_json(profile)
    assert len(rows) == 24
    experts = [(layer, e) for layer in shown["layers"] for e in layer["expert"]]
    for row, (layer, expert) in zip(rows, experts, strict=True):
        assert (row["layer"], row["block"]) == (str(layer["layer"]), layer["block"])
        for name, value in expert.items():
            assert row[name] == ("" if value is None else str(value))
    assert any(row["accuracy"] == "" for row in rows)  # nobody activated the last two


# Results


def model(path: str = "models/base", right: int = 50, **changes: Any) -> QuizModelResult:
    fields = {
        "path": path,
        "accuracy": right / 100,
        "stderr": 0.05,
        "ci95": (right / 100 - 0.1, right / 100 + 0.1),
        "questions": 100,
        "subjects": {"bi|rds": SubjectResult(accuracy=right / 100, questions=100)},
        "parameters": 6_919_161_856,
        "active_parameters": 1_281_906_688,
        "bytes": 13_838_323_712,
        "chosen_on": None,
    }
    return QuizModelResult(**{**fields, **changes})


def comparison(**changes: Any) -> QuizComparison:
    fields = {
        "base": 0,
        "other": 1,
        "delta": 0.05,
        "ci95": (0.01, 0.09),
        "gained": 7,
        "lost": 2,
        "mcnemar_p": 0.0123456,
        "smallest_effect": 0.0789,
        "max_abs_logprob_diff": 1.0,
        "median_abs_logprob_diff": 0.1,
        "parameters_delta": 0,
        "bytes_delta": 0,
    }
    return QuizComparison(**{**fields, **changes})


def results(other: QuizModelResult, *compared: QuizComparison) -> QuizResults:
    return QuizResults(
        quiz="birds",
        revision=None,
        split="test",
        shots=5,
        limit=None,
        content_hashes={"bi|rds": "0"},
        models=[model(), other],
        comparisons=list(compared),
    )


def told(chosen_on: ChosenOnResult | None = None, **changes: Any) -> str:
    found = results(model("models/cut", 55, chosen_on=chosen_on), comparison(**changes))
    base, sentence = result_sentences(found)
    assert base == "base answers 50.00% right: the base of the others."
    assert sentence.startswith("cut: ") and sentence.endswith(".")
    return sentence


def test_a_change_is_told_in_points_with_its_interval_and_the_size():
    assert told() == "cut: +5.0 points (+1.0 … +9.0), 7 gained, 2 lost."
    ends = {"delta": -0.05, "ci95": (-0.09, -0.01), "gained": 2, "lost": 7}
    n = model().parameters
    text = "cut: −5.0 points (−9.0 … −1.0), 2 gained, 7 lost; "
    assert told(parameters_delta=round(-0.29 * n), **ends) == f"{text}29 % fewer parameters."
    assert told(parameters_delta=100, **ends) == f"{text}under 1 % more parameters."


def test_a_verdict_names_the_margin_and_what_would_decide():
    def said(margin: float = 0.01, **changes: Any) -> str:
        found = results(model("models/cut"), comparison(**changes))
        (word,) = [row[4] for row in results_table(found, margin).rows[1:]]
        (sentence,) = verdict_sentences(found, margin)
        assert sentence.startswith(f"cut: {word} ")
        return sentence

    ends = {"delta": -0.05, "ci95": (-0.11, 0.01)}
    assert said(gained=2, lost=7, **ends) == (
        "cut: undecided at a margin of 1 point: could be 11.0 points worse; about 11,000 "
        "questions would decide"
    )
    assert said(gained=20, lost=1, delta=0.19, ci95=(0.1, 0.3)) == "cut: better than the base"
    assert said(gained=1, lost=20, delta=-0.19, ci95=(-0.3, -0.1)) == "cut: worse than the base"
    assert said(0.5, gained=2, lost=7, **ends) == "cut: holds within 50 points of the base"


def test_models_of_one_name_are_told_apart_by_their_paths():
    found = results(model("others/base"), comparison())
    names = [text.split()[0].rstrip(":") for text in result_sentences(found)]
    assert names == ["models/base", "others/base"]


def test_what_healing_won_back_is_said_where_the_cut_was_scored_too():
    lost = comparison(delta=-0.2, ci95=(-0.3, -0.1), gained=2, lost=22, mcnemar_p=1e-4)
    won = comparison(other=2, delta=-0.05, ci95=(-0.1, 0.01), gained=3, lost=8, mcnemar_p=0.2)
    cut, healed = model("cut", 30, fingerprint="c"), model("healed", 45, healed_from="c")

    def said(cut: QuizModelResult, lost: QuizComparison) -> str:
        found = results(cut, lost)
        found = found.model_copy(update={"models": [*found.models, healed]})
        return result_sentences(found.model_copy(update={"comparisons": [lost, won]}))[2]

    assert "healing won back 15.0 of the 20.0 points that cut had lost" in said(cut, lost)
    assert "won back" not in said(model("cut", 30, fingerprint="another"), lost)
    assert "won back" not in said(cut, comparison(delta=-0.2, ci95=(-0.4, 0.1), mcnemar_p=0.3))


def test_equal_answers_are_called_equal():
    same = {"delta": 0.0, "ci95": (0.0, 0.0), "gained": 0, "lost": 0, "mcnemar_p": 1.0}
    assert told(**same) == "cut: same answers."
    _, row = results_table(results(model("models/cut"), comparison(**same))).texts()
    assert row[3] == "same answers" and row[6:9] == ["0", "0", "–"]
    # As many gained as lost is something else.
    assert "+0.0 points" in told(delta=0.0, ci95=(-0.1, 0.1), gained=3, lost=3)


def test_a_model_chosen_on_what_scores_it_is_said_to_be_flattered():
    leak = told(ChosenOnResult(split="test", overlap=42))
    assert leak.endswith("; chosen on 42 of these 100 questions, which flatters it.")
    clean = told(ChosenOnResult(split="val", overlap=0))
    assert clean.endswith("; chosen on val, none of these questions.")
    assert "chosen" not in told(None)


def test_the_results_table_holds_the_numbers():
    found = results(model("models/cut", 55, parameters=5_000_000_000), comparison())
    table = results_table(found)
    base, cut = table.texts()
    assert base == [
        *("base", "13.8 GB", "50.00%", "–", "–", "40.00% … 60.00%", "–", "–", "–"),
        *("6,919,161,856", "1,281,906,688"),
    ]
    assert cut[:5] == ["cut", "13.8 GB", "55.00%", "+5.0 (+1.0 … +9.0)", "undecided"]
    assert cut[5:10] == ["45.00% … 65.00%", "7", "2", "0.0123", "5,000,000,000"]
    assert table.narrow(unless=True) == table
    narrow = table.narrow(unless=False)
    assert narrow.texts() == [base[:5], cut[:5]] and len(narrow.columns) == 5
    assert table.note == "100 test questions of birds at 5 shots"


def test_every_comparison_stands_with_its_model():
    found = results(model("models/a", 55), comparison())
    found = found.model_copy(
        update={
            "models": [*found.models, model("models/b", 45)],
            "comparisons": [comparison(other=2, delta=-0.05), comparison(other=1)],
        }
    )
    deltas = {row[0]: row[3].split()[0] for row in results_table(found).texts()}
    assert deltas == {"base": "–", "a": "+5.0", "b": "−5.0"}
    assert [text.split()[0] for text in result_sentences(found)] == ["base", "b:", "a:"]


def test_the_csv_of_a_plan_has_every_expert_that_stays():
    made = plan()
    rows = list(csv.DictReader(io.StringIO(as_csv(plan_csv(made)))))
    assert len(rows) == sum(len(edit.keep) for edit in made.blocks.values()) > 2
    for row in rows:
        edit, expert = made.blocks[row["block"]], int(row["expert"])
        assert expert in edit.keep
        for name, values in (("bias", edit.bias), ("scale", edit.scale)):
            assert row[name] == ("" if expert not in values else str(values[expert]))
    assert any(row["bias"] for row in rows) and any(row["scale"] for row in rows)


def test_the_csv_of_a_proof_has_every_estimate():
    change = Comparison(
        delta=1 / 3, ci95=(0.1, 0.5), gained=5, lost=2, mcnemar_p=0.25, smallest_effect=0.3
    )
    control = RandomResult(draws=99, distinct=20, delta_mean=0.0, range95=(-0.1, 0.1), p=0.01)
    proof = CrossFitResult(
        procedure="boost",
        quiz="birds",
        split="val",
        questions=30,
        seed=0,
        base_accuracy=0.5,
        cross_fitted=change,
        same_questions=change,
        random=control,
        folds=(),
        verdict="helps",
        sentence="",
    )
    rows = list(csv.DictReader(io.StringIO(as_csv(proof_csv(proof)))))
    assert [row["estimate"] for row in rows] == ["cross_fitted", "same_questions", "random"]
    assert float(rows[0]["delta"]) == 1 / 3 and rows[0]["p_random"] == ""
    assert (rows[2]["low"], rows[2]["draws"], rows[2]["p_random"]) == ("-0.1", "99", "0.01")


def test_the_results_csv_has_every_subject_and_all_of_them():
    rows = list(csv.reader(io.StringIO(as_csv(results_csv(results(model("models/cut", 55)))))))
    assert rows == [
        ["path", "subject", "accuracy", "questions"],
        ["models/base", "", "0.5", "100"],
        ["models/base", "bi|rds", "0.5", "100"],
        ["models/cut", "", "0.55", "100"],
        ["models/cut", "bi|rds", "0.55", "100"],
    ]


# Plans and what came of them


def plan(**changes: Any) -> PlanFile:
    fields: dict[str, Any] = {
        "model": PlanModel(id="tiny", revision=None, fingerprint="f"),
        "action": "prune --keep 7",
        "criterion": "activations",
        "positions": "answer",
        "removal": "reroute",
        "layout": "stock",
        "chosen_on": ChosenOn(quiz="birds", split="test", questions=14_042, sha256="0"),
        "blocks": {
            "model.layers.0.mlp": BlockEdit(keep=(0, 1, 2, 3, 7, 9, 10)),
            "model.layers.1.mlp": BlockEdit(keep=(5,), bias={5: -0.25}, scale={5: 1.5}),
        },
    }
    return PlanFile(**{**fields, **changes})


def test_a_plan_is_shown_block_by_block():
    table = plan_table(plan())
    assert table.title == "Plan: prune --keep 7 (stock)"
    assert table.texts() == [
        ["model.layers.0.mlp", "7", "0–3, 7, 9–10", "–", "–"],
        ["model.layers.1.mlp", "1", "5", "5: -0.2500", "5: ×1.5000"],
    ]
    assert table.note == "Chosen by activations on 14,042 test questions of birds; model tiny."
    chosen = ChosenOn(
        quiz="birds",
        split="test",
        questions=9,
        fitted_split="val",
        fitted_questions=1_531,
        sha256="0",
    )
    assert "of birds, fitted on 1,531 of val; model" in plan_table(plan(chosen_on=chosen)).note


def test_idle_experts_that_stay_are_listed():
    blocks = {"a": BlockEdit(keep=(0, 2, 3, 4)), "b": BlockEdit(keep=(0, 1, 2, 3))}
    draft = EditPlan("slug", "action", "activations", "answer", blocks)
    pruning = Pruning(draft, {"a": 1, "b": 4}, {"a": (2, 3, 4), "b": ()})
    assert pruning_sentences(pruning) == [
        "a: keeps 4 experts, 1 were active; never activated but kept to make one count for all "
        "layers: 2–4.",
        "b: keeps 4 experts, 4 were active.",
    ]


@pytest.mark.parametrize(
    ("positions", "n_used", "said"),
    [
        ("answer", 2, "2 of the 5 removed experts are used by other tokens of the prompts; "
                      "--keep-active --tokens all would keep them."),
        ("answer", 0, None),
        ("all", 2, None),
        ("answer", None, "The profile holds no all-token statistics: whether other tokens use "
                         "what goes is not known."),
    ],
)  # fmt: skip
def test_a_cut_says_what_it_touches(positions: Any, n_used: int | None, said: str | None):
    edits = {"a": BlockEdit(keep=(0, 1, 2))}
    pruning = Pruning(EditPlan("s", "prune", "activations", positions, edits), {"a": 3}, {"a": ()})
    goes = [RemovedTraffic("a", 5, 1234, n_used, None if n_used is None else 0.12345)]
    assert touched_sentences(pruning, goes) == ([said] if said else [])
    share = "–" if n_used is None else "12.35%"
    shown = "–" if n_used is None else str(n_used)
    assert touched_table(goes).texts() == [["a", "5", shown, share, "1,234"]]


def bit_exact(untouched: int, bit_equal: int) -> BitExactCheck:
    return BitExactCheck(questions=256, untouched=untouched, bit_equal=bit_equal)


def form(name: str, accuracy: float, right_logprob: float, flipped: int) -> FormResult:
    return FormResult(
        form=name, questions=256, accuracy=accuracy, right_logprob=right_logprob, flipped=flipped
    )


def built(alone: BitExactCheck | None = None) -> Built:
    shift = LogprobShift(
        against="the unedited base",
        questions=256,
        max_abs_logprob_diff=1.23456,
        median_abs_logprob_diff=0.012345,
        flipped=7,
    )
    shares = {"layer": 3, "base": 0.0, "exact": 0.25, "edited": 0.125}
    return Built(
        folder=Path("out"),
        plan=plan(),
        fits=[Fit(3, 0.95, 0.99, 0.98, 0.004, 1.0, 0.2)],
        proof=HeldOutResult(
            held_out_split="val",
            held_out=(shift,),
            shares=tuple(ExpertShares(expert=expert, **shares) for expert in (12, 40)),
            alone=alone,
        ),
        scored_on=ScoredSplit("val", 256, 0),
    )


def test_what_an_edit_did_to_held_out_questions_is_a_table():
    fit_table, table = held_out_tables(built())
    assert table.title == "Held-out questions (val)"
    assert table.texts() == [["the unedited base", "1.2346", "0.0123", "7", "256"]]
    assert fit_table.texts() == [["3", "0.9500", "0.9900", "0.980 ± 0.004", "1.000 ± 0.200"]]


@pytest.mark.parametrize(
    ("alone", "said"),
    [
        (None, []),
        (bit_exact(0, 0), ["Each of the 256 questions has tokens that chose a removed expert, so "
                            "none must stay as it was."]),
        (bit_exact(9, 9), ["9 of the 256 questions have no token that chose a removed expert; "
                            "scored alone, all of them come out bit-equal."]),
        (bit_exact(9, 7), ["9 of the 256 questions have no token that chose a removed expert; "
                            "scored alone, 7 of them come out bit-equal."]),
    ],
)  # fmt: skip
def test_layout_exact_says_whether_its_promise_held(alone: BitExactCheck | None, said: list[str]):
    assert held_out_sentences(built(alone)) == said


def test_a_checkpoint_that_was_not_asked_says_so():
    unasked = replace(built(), proof=None, scored_on=None, fits=[])
    assert held_out_tables(unasked) == []
    assert held_out_sentences(unasked) == ["The new checkpoint was not scored on any question."]


def test_a_tilt_says_what_it_did_and_where_its_strength_came_from():
    boost = RouterEdit(3, 12, 0.0856, block="model.layers.3.mlp", origin="its admission gap")
    down = RouterEdit(3, 12, -0.5, block="model.layers.3.mlp", origin="given")
    assert tilt_sentences([boost, down], None) == [
        "Expert 12 of layer 3 is boosted by +0.0856 on its logit (its admission gap).",
        "Expert 12 of layer 3 is suppressed by -0.5000 on its logit (given).",
    ]
    (sentence,) = tilt_sentences([boost], built())
    assert (
        "(its admission gap); the checkpoint's gate row moves it by +0.0839 ± 0.0003 at" in sentence
    )
    assert sentence.endswith(
        " positions; it serves 12.5% of held-out questions, before 0.0%, with the exact bias 25.0%."
    )


def test_experts_of_a_cut_model_are_called_by_their_first_numbers():
    numbers = ExpertIds({"model.layers.3.mlp": (*range(12), 40)})
    boost = RouterEdit(3, 12, 0.0856, block="model.layers.3.mlp", origin="given")
    assert tilt_sentences([boost], None, numbers)[0].startswith("Expert 40 of layer 3 is boosted")
    scaling = RouterEdit(3, 12, scale=1.5, block="model.layers.3.mlp")
    start = "The gate weight of expert 40 of layer 3 is multiplied by 1.5; routing in its"
    assert scale_sentences([scaling], None, numbers) == [f"{start} own layer is unchanged."]
    assert scale_sentences([scaling], built(), numbers) == [
        f"{start} own layer is unchanged, and it serves 12.5% of held-out questions."
    ]


def test_a_bias_says_whether_the_same_experts_are_chosen_and_where_it_acts():
    made = built()
    assert made.proof
    agreement = RoutingAgreement(
        layer=3, same_answer=0.75, overlap_answer=0.9, same_all=0.5, overlap_all=0.8125
    )
    outcomes = (form("unedited", 0.5, -1.25, 0), form("x", 0.625, -1.0, 32))
    proof = made.proof.model_copy(update={"agreement": (agreement,), "outcomes": outcomes})
    made = replace(made, proof=proof, plan=made.plan.model_copy(update={"apply_at": "answer"}))
    assert tilt_sentences([], made) == [
        "In layer 3 the checkpoint chooses the very experts of the exact bias at 75.0% of answer "
        "positions (90.0% of the experts) and at 50.0% of all tokens (81.2%)."
    ]
    fit_table, _, table = held_out_tables(made)
    assert "t is 1 at answer positions and 0 elsewhere" in fit_table.note
    assert table.texts() == [
        ["unedited", "50.00%", "−1.2500", "0", "256"],
        ["x", "62.50%", "−1.0000", "32", "256"],
    ]


# What lies at a path


def test_what_is_shown_is_what_lies_there(profile: Profile, tmp_path: Path):
    save_plan(tmp_path / "made", plan(), [])
    results(model("models/cut", 55), comparison()).save(tmp_path / "results.json")
    found = {
        tmp_path / "profile": ("Tables 1–2", "layers"),
        tmp_path / "profile" / "profile.json": ("Tables 1–2", "layers"),
        tmp_path / "made": ("Plan: prune", "blocks"),
        tmp_path / "made" / "plan.json": ("Plan: prune", "blocks"),
        tmp_path / "results.json": ("Evaluation", "models"),
    }
    for path, (title, key) in found.items():
        shown = find_shown(path)
        assert shown.tables()[0].title.startswith(title)
        assert key in json.loads(json.dumps(shown.json(), allow_nan=False))
        assert len(as_csv(shown.flat()).splitlines()) > 2


@pytest.mark.parametrize("content", [None, "", "[1]", "{", '{"models": []}', "{}", "\ud800"])
def test_where_there_is_nothing_to_show_that_is_said(tmp_path: Path, content: str | None):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises((OutputError, plans.PlanError)) as refused:
        find_shown(path)
    assert str(path) in str(refused.value)
    with pytest.raises(OutputError, match="nothing to show"):
        find_shown(tmp_path)


# Names on the command line


def test_every_criterion_is_a_documented_function():
    assert all(name == own.function.__name__ for name, own in CRITERIA.items())
    assert all(own.function.__doc__ for own in CRITERIA.values())


def test_choices_on_the_command_line_are_those_of_the_files():
    fields = ProfileSettings.model_fields
    stats, perturb = fields["stats"].annotation, fields["perturb"].annotation
    # `none` is what `eval` keeps, `routes` what a profile of recorded routes has.
    assert {*get_args(get_args(stats)[0]), "none", "routes"} == set(get_args(schema.Stats))
    assert get_args(get_args(perturb)[0]) == get_args(findings.Kind)


def test_showing_a_profile_or_results_needs_no_torch(tmp_path: Path):
    """Importing it takes seconds in which a person waits for a table."""
    profile = random_profile(tmp_path / "p", profile_info([block(0)], {"birds": 30}))
    results(model("models/cut", 55), comparison()).save(tmp_path / "results.json")
    code = (
        "import sys; from expertcut.reporting.views import find_shown\nfrom pathlib import Path\n"
    )
    code += "[find_shown(Path(p)).tables() for p in sys.argv[1:]]; print('torch' in sys.modules)"
    paths = map(str, (profile.path, tmp_path / "results.json"))
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
