"""`show TRACE`: tables of 80 columns, sentences that follow from the numbers, files, the page."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from expertcut.errors import ProfileError
from expertcut.profiling.trace_findings import TraceFindings
from expertcut.reporting import trace_tables as tables
from expertcut.reporting.page import write
from expertcut.reporting.plots import Heat
from expertcut.reporting.tables import as_rich
from expertcut.reporting.trace_page import _transitions, trace_sections
from expertcut.reporting.views import gather
from tests.conftest import Commands
from tests.profiling.test_expert_load import made, random_sequence
from tests.profiling.test_given_routes import routes, saved
from tests.profiling.test_predictability import by_token, halves_of

Checkpoints = Callable[..., Path]


def found(sequences: list[Any], n_experts_L: tuple[int, ...], **sizes: Any) -> TraceFindings:
    names = tuple(f"model.layers.{layer}.mlp" for layer in range(len(n_experts_L)))
    halves = halves_of(sequences)
    trace: Any = SimpleNamespace(
        halves=lambda: halves, n_experts_L=np.array(n_experts_L), block_names=names
    )
    return TraceFindings(trace, **sizes)


@pytest.mark.parametrize("n_experts", [16, 256])
def test_tables_fit_a_terminal_of_80_columns(n_experts: int) -> None:
    top_k = n_experts // 4
    sequences = by_token(np.random.default_rng(0), 12, n_experts, top_k)
    findings = found(sequences, (n_experts, n_experts), segments=(4, 16, 32, 60))
    shown = tables.finding_tables(findings)
    assert len(shown) == 6
    for table in shown:
        console = Console(width=80, file=io.StringIO(), record=True)
        console.print(as_rich(table.narrow(unless=False), 80))
        text = console.export_text()
        assert "┃" in text, f"{table.title} is a list of names and values"
        assert max(map(len, text.splitlines())) <= 80


def test_sentences_follow_from_the_numbers() -> None:
    by_id, held, served, dropped = tables.finding_sentences(
        found(by_token(np.random.default_rng(0)), (16, 16))
    )
    assert by_id.startswith("All choices follow from the token's id alone: 100.0 % (100.0 %")
    assert held.startswith("With 8 of 16 experts in fast memory LRU, empty at first, hits")
    assert "A segment of 16 tokens is served best by" in served
    assert dropped.startswith("Dropped at capacity 1.25, by tenth of the sequence: 0 ")
    rng = np.random.default_rng(1)
    noise = [random_sequence(rng, 60, (16, 16), 4) for _ in range(20)]
    by_id, *_ = tables.finding_sentences(found(noise, (16, 16)))
    assert by_id.startswith("A token's id says no more of its experts than their popularity: 2")


@pytest.mark.parametrize(
    ("share", "text"), [(0.736, "Three of four"), (0.02, "Hardly any"), (0.31, "One of three")]
)
def test_shares_are_told_as_the_nearest_fraction(share: float, text: str) -> None:
    assert tables.fraction_text(share) == text


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((0, 5), "0 to 5 points more than"),
        ((-3, -1), "1 to 3 points less than"),
        ((-3, 0), "0 to 3 points less than"),
        ((-2, 4), "from 2 points less to 4 more, by layer, than"),
        ((2, 2), "2 points more than"),
        ((1, 1), "1 point more than"),
        ((0, 0), "as often as"),
    ],
)
def test_differences_of_layers_are_told_as_a_span(ends: tuple[int, int], text: str) -> None:
    assert tables.points_span(*ends) == text


def test_a_trace_without_two_documents_is_halved_in_its_pieces_or_in_the_middle() -> None:
    sequences = by_token(np.random.default_rng(0), 1)
    alone = found(sequences, (16, 16))
    assert [len(s) for half in alone._halves for s in half] == [30, 30]
    assert alone.predictability.recall["token_id"].whole > 0.4
    trace: Any = SimpleNamespace(
        halves=lambda: (sequences * 3, []), n_experts_L=np.array([16, 16]), block_names=("a", "b")
    )
    assert [len(half) for half in TraceFindings(trace)._halves] == [2, 1]
    assert TraceFindings(trace).predictability.recall["token_id"].whole == 1


def test_a_layer_that_routes_no_token_has_no_numbers() -> None:
    sequences = [random_sequence(np.random.default_rng(n), 20, (8, 4), 2) for n in range(12)]
    for sequence in sequences:
        sequence.experts_TLK[:, 1] = -1
    findings = found(sequences, (8, 4))
    content = json.loads(json.dumps(findings.as_json(), allow_nan=False))
    assert content["load"]["max_vio"][1] is None and content["load"]["max_vio"][0] > 0
    assert content["recall"]["layer_before"]["value"] is None
    texts = [
        cell for table in tables.finding_tables(findings) for row in table.texts() for cell in row
    ]
    assert "–" in texts and not any("nan" in cell for cell in texts)
    assert "nan" not in " ".join(tables.finding_sentences(findings))


def test_a_trace_of_one_token_is_refused() -> None:
    one: Any = random_sequence(np.random.default_rng(0), 1, (8,), 2)
    trace: Any = SimpleNamespace(halves=lambda: ([one], []), n_experts_L=[8], path="t")
    with pytest.raises(ProfileError, match="t has one token: trace more"):
        _ = TraceFindings(trace).drops


def test_the_map_of_transitions_is_of_the_layers_that_tell_most_of_each_other() -> None:
    rng = np.random.default_rng(2)
    sequences = []
    for _ in range(4):
        first_TK, last_TK = (rng.random((50, 6)).argsort(1)[:, :2] for _ in range(2))
        sequences.append(made(np.stack([first_TK, last_TK, last_TK], 1)))
    figure = _transitions(found(sequences, (6, 6, 6)), "t")
    assert isinstance(figure, Heat) and figure.title.endswith(
        "of layer 2 that follow those of layer 1"
    )
    assert (np.diag(np.stack(figure.rows)) == 1).all() and figure.down == "expert of layer 1"


@pytest.fixture
def trace(expertcut: Commands, checkpoint: Checkpoints, quiz_folder: Path) -> Path:
    asked = ("--quiz", quiz_folder, "--shots", 1, "--limit", 8)
    expertcut("trace", checkpoint("olmoe"), *asked, "--weights", "--out", "t")
    return Path("t")


def test_show_prints_tables_json_and_csv_of_a_trace(expertcut: Commands, trace: Path) -> None:
    said = expertcut("show", trace, "--segments", "2,4", "--cache", "1,2")
    assert "Local routing consistency" in said and "│       2 │" in said and "SCH 4" in said
    found = json.loads(
        expertcut("show", trace / "trace.json", "--segments", "2", "--format", "json")
    )
    assert [*found["srp"]] == ["2"] and found["cache_experts"]["2.0"] == [4, 4]
    assert found["load"]["balance_loss"][0] >= 1  # gate weights are kept
    rows = list(csv.DictReader(io.StringIO(expertcut("show", trace, "--format", "csv"))))
    assert len(rows) == 2 and float(rows[0]["SRP 4"]) == found_srp(expertcut, trace)
    assert expertcut("show", trace, "--format", "md").startswith("### Local routing consistency")


def found_srp(expertcut: Commands, trace: Path) -> float:
    found = json.loads(expertcut("show", trace, "--format", "json"))
    return float(found["srp"]["4"]["by_layer"][0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--segments", "0"), "--segments: '0' must be a whole number of tokens from 1 on"),
        (("--segments", "4,1.5"), "--segments: '1.5' must be a whole number"),
        (("--cache", "x"), "--cache: 'x' must be a number from 1 on"),
        (("--cache", ""), "--cache: '' must be a number from 1 on"),
        (("--subjects",), "is not a profile"),
    ],
)
def test_sizes_that_are_none_are_refused(
    options: tuple[str, ...], said: str, expertcut: Commands, trace: Path
) -> None:
    assert said in expertcut("show", trace, *options, status=2)


def test_sizes_are_refused_of_what_is_no_trace(expertcut: Commands, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    said = expertcut("show", tmp_path / "results.json", "--cache", 2, status=2)
    assert "is not a trace: name one or omit the option" in said


def test_the_page_has_a_section_for_each_trace(trace: Path) -> None:
    (section,) = trace_sections(gather(trace))
    assert section.title == "Trace: t"
    page = write(trace).read_text()
    assert "Local routing consistency" in page and "Trace t" in page
    names = {file.name for file in (trace / "report").glob("*.png")}
    assert names == {f"trace-t-{name}.png" for name in ("locality", "hits", "transitions")}


def test_given_routes_are_shown_and_drawn_as_a_trace_is(
    expertcut: Commands, checkpoint: Checkpoints
) -> None:
    given = routes()
    expertcut("trace", checkpoint("olmoe"), "--routes", saved(given), "--out", "t")
    found = json.loads(expertcut("show", "t", "--segments", "4", "--format", "json"))
    assert found["routes"]["id"].endswith("routes.npz") and found["srp"]["4"]["value"] > 0
    loads_L = [np.bincount(layer_TK.ravel()) for layer_TK in given["routed_experts"].swapaxes(0, 1)]
    assert found["load"]["max_vio"] == pytest.approx([n.max() / n.mean() - 1 for n in loads_L])
    expertcut("report", "t", "--out", "page.html")
    page = Path("page.html").read_text()
    assert "routes.npz" in page and "25 in 4 sequences" in page and "Cache hits" in page
    assert "Experts of layer 1 that follow those of layer 0" in page
