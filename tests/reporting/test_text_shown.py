"""What is shown of a profile of texts: headline, tables, files for programs, the page, the API."""

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest

import expertcut as package
from expertcut.cli import app
from expertcut.errors import ProfileError
from expertcut.profiling.storage import TextProfile, load_profile
from expertcut.reporting.text_profile_tables import text_tables
from tests.conftest import WORDS, Commands, open_model
from tests.support.routed_models import make_routed, routed_plan

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def world(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`p`: a profile of two sources, `a` of 30 documents and `b` of 5."""
    root = tmp_path_factory.mktemp("world")
    for seed, (name, n) in enumerate({"a": 30, "b": 5}.items()):
        chance = np.random.default_rng(seed)
        said = (" ".join(chance.choice(WORDS, 12)) for _ in range(n))
        text = "".join(json.dumps({"text": text}) + "\n" for text in said)
        (root / f"{name}.jsonl").write_text(text)
    line = f"profile {checkpoint('olmoe')} --text a.jsonl --text b.jsonl --max-tokens 32 --out p"
    with chdir(root):
        app(line.split(), standalone_mode=False)
    return root


@pytest.fixture
def profiled(world: Path, expertcut: Commands, tmp_path: Path) -> TextProfile:
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    found = load_profile(tmp_path / "p")
    assert isinstance(found, TextProfile)
    return found


def test_json_has_every_number_and_intervals_where_documents_are_enough(
    profiled: TextProfile, expertcut: Commands
) -> None:
    shown = json.loads(expertcut("show p --format json"))
    score, info = profiled.score, profiled.info.text
    assert (shown["tokens"], shown["documents"]) == (info.n_tokens, 35)
    assert shown["perplexity"] == score.perplexity == pytest.approx(math.exp(score.mean_loss))
    assert shown["next_token_accuracy"] == score.accuracy
    low, high = shown["perplexity_ci95"]
    assert low < shown["perplexity"] < high
    assert [source["documents"] for source in shown["sources"].values()] == [30, 5]
    assert shown["sources"]["a"]["perplexity_ci95"] is not None
    assert shown["sources"]["b"]["perplexity_ci95"] is None  # fewer than 10 documents
    assert sum(source["tokens"] for source in shown["sources"].values()) == shown["tokens"]
    for layer, own in zip(shown["layers"], profiled.layers, strict=True):
        assert [row["tokens"] for row in layer["expert"]] == own.over_tokens.tokens_E.tolist()
        assert {*layer["expert"][0]} == {
            *("expert", "tokens", "next_token_accuracy", "weighted_accuracy", "mean_loss")
        }
        assert layer["top_k"] == len(layer["rank_probability_mean"]) == 2
    rows = list(csv.DictReader(io.StringIO(expertcut("show p --format csv"))))
    assert len(rows) == sum(layer["experts"] for layer in shown["layers"])
    assert [int(row["tokens"]) for row in rows] == [
        row["tokens"] for layer in shown["layers"] for row in layer["expert"]
    ]


def test_intervals_hold_documents_together(profiled: TextProfile) -> None:
    whole, halves = profiled.score, profiled.array("document_N")
    rows = len(halves)
    assert rows > 2 * 35 and {*halves.tolist()} == {*range(30)}  # each is cut in rows
    assert len(whole.loss_D) == 35
    assert whole.loss_D.sum() == pytest.approx(profiled.array("loss_N").sum())
    mean = whole.loss_D / whole.scored_D  # of the delta method, documents as units
    centred = whole.loss_D - whole.mean_loss * whole.scored_D
    half = 1.96 * math.sqrt(float((centred**2).sum())) / whole.scored
    assert whole.perplexity_ci95 is not None and len(mean) == 35
    width = math.log(whole.perplexity_ci95[1] / whole.perplexity_ci95[0]) / 2
    assert width == pytest.approx(half, rel=0.15)


def test_headline_and_tables_say_what_was_read(profiled: TextProfile, expertcut: Commands) -> None:
    headline = " ".join(expertcut("show p").split())
    n = profiled.info.text.n_tokens
    assert f"p: {n:,} tokens in 35 documents: a 86 %, b 14 %" in headline
    assert f"perplexity {profiled.score.perplexity:.3f} (" in headline
    assert "expertcut prune --profile p --sparsity 0.5 --by reap" in headline
    tables = expertcut("show p --tables --wide")
    for title in ("Texts", "Tables 1–2", "Table 3", "Table 4", "Table 5", "Tables 6–7"):
        assert title in tables
    assert "### Texts" in expertcut("show p --format md")
    assert "which have no subjects" in expertcut("show p --subjects", status=2)
    left_out = json.loads(expertcut("show p --criteria --format json"))
    assert {"reap", "activations_all", "weighted_accuracy_all"} <= {*left_out["criteria"]}
    answers = [why for why in left_out["left_out"].values() if "one of texts" in why]
    assert answers  # what needs answers is left out and says so
    assert "Left out" in expertcut("show p --criteria --wide")


def test_without_losses_there_is_routing_alone(
    profiled: TextProfile, expertcut: Commands, checkpoint: Checkpoints
) -> None:
    expertcut(f"profile {checkpoint('olmoe')} --text a.jsonl --no-loss --out q")
    shown = json.loads(expertcut("show q --format json"))
    assert "perplexity" not in shown and {*shown["layers"][0]["expert"][0]} == {"expert", "tokens"}
    assert "perplexity" not in expertcut("show q --tables")
    expertcut("report q")
    with pytest.raises(ProfileError, match="holds no losses"):
        _ = package.load_profile("q").perplexity


def test_the_page_of_a_profile_of_texts_alone(profiled: TextProfile, expertcut: Commands) -> None:
    expertcut("report p")
    page = Path("p/report.html").read_text()
    for text in ("Experts: p", "Next token right", "All-token load", "source a"):
        assert text in page
    assert f"Perplexity {profiled.score.perplexity:.3f}" in page


def test_the_python_api_of_texts(
    profiled: TextProfile, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    found = package.profile(
        checkpoint("olmoe"), text=["a.jsonl", "b.jsonl"], max_tokens=32, out=tmp_path / "again"
    )
    assert found.perplexity == profiled.score.perplexity
    assert found.accuracy == profiled.score.accuracy
    assert "35 documents" in repr(found) and "perplexity" in repr(found)
    table = found.experts
    assert table["tokens"].sum() == sum(x.over_tokens.tokens_E.sum() for x in profiled.layers)
    assert {"next_token_accuracy", "weighted_accuracy", "mean_loss", "reap"} <= {*table.columns}


def test_a_cut_on_texts_has_the_same_bytes_again_and_show_says_what_it_said(
    profiled: TextProfile, expertcut: Commands
) -> None:
    first = expertcut("prune --profile p --sparsity 0.5 --by reap --out one")
    expertcut("prune --profile p --sparsity 0.5 --by reap --out two")
    for name in ("plan.json", "chosen_on.txt", "chosen_on.ngrams"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    shown = expertcut("show one")
    said = [line for line in first.splitlines() if line.startswith(("predicts", "distance"))]
    assert len(said) >= 2 and all(line in shown for line in said)


RECIPE = """
model: {model}
quiz: {quiz}
shots: 1
profile: {{text: [a.jsonl, b.jsonl], max_tokens: 32}}
show: {{}}
variants:
  - name: half
    prune: {{by: reap, sparsity: 0.5}}
eval: {{limit: 2}}
report: {{}}
"""


def test_a_recipe_profiles_texts_and_evaluates_on_its_quiz(
    profiled: TextProfile, expertcut: Commands, checkpoint: Checkpoints, quiz_folder: Path
) -> None:
    Path("r.yaml").write_text(RECIPE.format(model=checkpoint("olmoe"), quiz=quiz_folder))
    expertcut("run r.yaml --out run")
    made = load_profile(Path("run/profile"))
    of_file = {"sources": {"__all__": {"spec"}}}
    assert made.info.text.model_dump(exclude=of_file) == profiled.info.text.model_dump(
        exclude=of_file
    )
    assert json.loads(Path("run/results.json").read_text())["quiz"]
    assert "[profile] is current" in expertcut("run r.yaml --out run")
    with Path("b.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    assert "[profile] would run: b.jsonl changed" in expertcut("run r.yaml --out run --dry-run")


@pytest.mark.usefixtures("modules_cache")
def test_tokens_without_an_expert_count_in_every_share(
    checkpoint: Checkpoints, profiled: TextProfile, expertcut: Commands
) -> None:
    """Rule null leaves tokens without any expert; entropies over all experts are of all tokens."""
    moe = open_model(checkpoint("olmoe"))
    make_routed(moe, routed_plan(moe, "null", 1.0), Path("routed"))
    expertcut("profile routed --text a.jsonl --text b.jsonl --max-tokens 32 --out q")
    found = load_profile(Path("q"))
    assert isinstance(found, TextProfile)
    n = found.info.text.n_tokens
    for layer, base in zip(found.layers, profiled.layers, strict=True):
        assert layer.n_tokens == base.n_tokens == n
        assert layer.moments_2X[0, 2:].sum() < 0.99 * n  # else the rule leaves nobody without
    first, last = found.layers[0], found.layers[-1]
    before = profiled.layers[0].routing_json()  # the first router reads what it did before
    for kind in ("mean", "std"):
        name = f"entropy_all_{kind}"
        assert first.routing_json()[name] == pytest.approx(before[name], rel=1e-6)
    for layer in (first, last):
        shown = next(t for t in text_tables(found) if f"layer ({layer.layer}) at 1 %" in t.title)
        tokens_E = layer.over_tokens.tokens_E
        assert shown.rows
        for expert, tokens, share, *_ in shown.rows:
            assert tokens == tokens_E[int(expert)] and share == pytest.approx(tokens / n)  # type: ignore[call-overload,arg-type]
