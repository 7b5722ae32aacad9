"""`expertcut route`: a checkpoint answers as its rule at run time, and nothing is written else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import expertcut as api
from expertcut.checkpoints.build import engine_as_profiled, found_source
from expertcut.data import Selection, load_quiz
from expertcut.edits.plan import load_plan
from expertcut.errors import SettingsError
from expertcut.evaluation import route_tuning
from expertcut.evaluation.holding import load_holding
from expertcut.evaluation.route_results import load_route_sweep
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.models.routing_rule import RoutingRule
from expertcut.profiling.storage import load_profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.rerouting import Rerouting, rerouted_engine
from tests.conftest import Commands, make_checkpoint, write_quiz
from tests.hostile.running import run
from tests.hostile.world import copied_world

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and a profile `p`, to be copied."""
    root = tmp_path_factory.mktemp("routing")
    make_checkpoint(root / "model", "olmoe")
    write_quiz(root / "quiz", {"dev": 5, "val": 5, "test": 4})
    line = "profile model --quiz quiz --split val --shots 1 --threads 1 --out p"
    ended = run(root, line.split())
    assert ended.status == 0, ended.stderr
    return root


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    return copied_world(made, tmp_path)


@pytest.mark.parametrize("rule", ["skip", "fitted"])
def test_a_calibrated_checkpoint_answers_as_its_rule_at_run_time(
    world: Path, expertcut: Commands, rule: str
) -> None:
    said = expertcut(f"route --profile p --rule {rule} --experts 1.5 --out routed")
    plan = load_plan(world / "routed")
    assert plan.action == f"route --rule {rule} --experts 1.5" and plan.routing is not None
    assert plan.routing.rule == rule and "routed" in said
    at_by_layer = {i: edit.at for i, edit in enumerate(plan.blocks.values())}
    fit_by_layer = {i: edit.fit for i, edit in enumerate(plan.blocks.values()) if edit.fit}
    assert len(set(at_by_layer.values())) > 1, "each layer has its own threshold"
    shown = expertcut("show routed")
    assert all(f"{at:.4g}" in shown for at in at_by_layer.values())
    assert f"Rule {rule} uses" in shown and "Calibrated on" in shown
    quiz = load_quiz(Selection(str(world / "quiz"), shots=1))
    profile = load_profile(world / "p")
    engine = engine_as_profiled(profile, found_source(profile), LoadOptions())
    routing = Rerouting(RoutingRule(rule=rule), at_by_layer, fit_by_layer)
    with rerouted_engine(engine, routing) as begin:
        at_run_time = ask(engine, quiz, begin).numpy()
    own = load(find_source(str(world / "routed")), LoadOptions(trust_remote_code=True))
    written = ask(Engine(own, engine.batch_tokens), quiz).numpy()
    assert np.allclose(written, at_run_time, atol=1e-4)
    assert not np.allclose(ask(engine, quiz).numpy(), written, atol=1e-3), "the rule did nothing"


def test_the_profile_of_a_model_with_a_rule_is_refused(world: Path, expertcut: Commands) -> None:
    """Whatever is asked: its router has empty places, of which no rule knows."""
    expertcut("route --profile p --rule skip --at 0.6 --no-verify --out routed")
    line = "profile routed --quiz quiz --split val --shots 1 --threads 1 --out routed-profile"
    expertcut(f"{line} --trust-remote-code")
    for words in ("--at 0.5", "--tune", "--sweep", "--oracle", "--experts 1.5"):
        said = expertcut(f"route --profile routed-profile --rule skip {words}", status=2)
        assert "has a routing rule already: route the model that it was made from" in said


def test_top_k_in_layout_stock_changes_the_config_alone(world: Path, expertcut: Commands) -> None:
    """The model is profiled first."""
    line = "route model --quiz quiz --split val --shots 1 --threads 1"
    expertcut(f"{line} --rule top-k --at 1 --layout stock --out one")
    config = json.loads((world / "one/config.json").read_text())
    assert config["num_experts_per_tok"] == 1 and "auto_map" not in config


def test_tuning_writes_what_holds_and_else_the_proof_alone(
    world: Path, expertcut: Commands
) -> None:
    line = "route --profile p --rule skip --tune --cross-fit --random-draws 2 --no-verify"
    expertcut(f"{line} --margin 100 --out held")
    assert load_plan(world / "held").action.endswith("--tune --margin 100")
    assert load_holding(world / "held").verdict == "holds"
    said = expertcut(f"{line} --margin 0.1 --out not --wide")
    assert "no checkpoint" in said and not (world / "not/plan.json").exists()
    assert load_holding(world / "not").experts is None
    assert "Cross-fit of" in expertcut("show not") and "Cross-fit of" in expertcut("show held")
    assert not list(world.glob(".*.tuning"))


def test_what_is_not_shown_to_hold_is_written_only_if_forced(
    world: Path, expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undecided(*given: Any) -> Any:
        found = own(*given)
        assert found.routing is not None and found.proof is not None
        return replace(found, proof=found.proof.model_copy(update={"verdict": "no evidence"}))

    own = route_tuning.tune
    monkeypatch.setattr(route_tuning, "tune", undecided)
    line = "route --profile p --rule skip --tune --cross-fit --random-draws 2 --no-verify"
    line += " --margin 100 --out made"
    said = " ".join(expertcut(line).split())
    assert "hold: --force --force-write writes it, from what stays in .made.tuning" in said
    assert load_holding(world / "made").verdict == "no evidence"
    assert [file.name for file in (world / "made").iterdir()] == ["holding.json"]
    expertcut(f"{line} --force --force-write")
    plan = load_plan(world / "made")
    assert plan.routing is not None and not list(world.glob(".*.tuning"))
    assert "made stays as it was" in expertcut(f"{line} --force"), "a proof replaces no checkpoint"
    assert load_plan(world / "made") == plan


def test_what_a_fit_reads_counts_as_used(world: Path, expertcut: Commands) -> None:
    """Of a profile of `test` it reads `val`, also where the threshold is given."""
    expertcut("profile model --quiz quiz --split test --shots 1 --threads 1 --out t")
    splits = {}
    for rule in ("fitted", "skip"):
        expertcut(f"route --profile t --rule {rule} --at 0.3 --plan-only --out {rule}")
        splits[rule] = load_plan(world / rule).chosen_on.split
    assert splits == {"fitted": "val", "skip": "test"}


def test_contrast_is_code_for_generate(world: Path, expertcut: Commands) -> None:
    said = expertcut("route --profile p --rule contrast --weak rank:1 --beta 3 --out both")
    assert "custom_generate='both', trust_remote_code=True" in " ".join(said.split())
    assert [file.name for file in (world / "both").iterdir()] == ["custom_generate"]
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids_BT = torch.arange(40, 52)[None]
    before = model.generate(ids_BT, **options)
    also = {"custom_generate": str(world / "both"), "trust_remote_code": True}
    assert not torch.equal(model.generate(ids_BT, **options, **also), before)
    assert torch.equal(model.generate(ids_BT, **options), before)


def test_python_has_the_same_plan(world: Path, expertcut: Commands) -> None:
    expertcut("route --profile p --plan-only --out usual")
    assert load_plan(world / "usual").action == "route --rule skip --at 0.5"
    expertcut("route --profile p --rule top-p --at 0.3 --plan-only --out plan")
    plan = api.load_profile("p").route(rule="top-p", at=0.3)
    assert plan.edit.edits == load_plan(world / "plan").blocks
    for given in ({"rule": "top-p", "sweep": True}, {"rule": "contrast"}):
        with pytest.raises(SettingsError, match="is not a plan"):
            api.load_profile("p").route(**given)


@pytest.mark.parametrize("judged", ["", "--text t.jsonl"], ids=["quiz", "texts"])
def test_a_sweep_is_a_table_a_figure_and_sentences(
    world: Path, expertcut: Commands, judged: str
) -> None:
    words = ["red", "green", "blue", "salt", "iron", "wood", "rain", "snow", "sand", "moss", "fern"]
    texts = [f"{first} and {second} " * 3 for first in words for second in words[:2]]
    (world / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    line = "route --profile p --rule skip,top-k --experts 1,2 --sweep --random-draws 2"
    said = expertcut(f"{line} {judged} --out swept")
    assert "Routing rules" in said and "Routing rules" in expertcut("show swept --wide")
    found = load_route_sweep(world / "swept")
    assert len(found.cells) == 6 and (world / "swept/route.png").stat().st_size > 1000
    lines = (world / "swept/route.csv").read_text().splitlines()
    assert len(lines) == 1 + 1 + 6, "a heading, the model as it is, every setting and control"
    unit = "perplexity" if judged else "accuracy"
    assert unit in lines[0] and unit in said and "random, 2 draws" in said
    same, fewer = (c for c in found.cells if c.setting.rule == "top-k")
    assert (same.experts_per_token, fewer.experts_per_token) in {(1, 2), (2, 1)}


def test_an_oracle_stands_beside_its_noise(world: Path, expertcut: Commands) -> None:
    said = expertcut("route --profile p --rule top-k --oracle --random-draws 2 --out oracle")
    assert "of noise variants (2 sets)" in said and "chosen beforehand" in said
    assert "best per question" in expertcut("show oracle")
    assert "best" in expertcut("show oracle --format csv")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--rule random", "no checkpoint can carry it"),
        ("--rule skip,top-p", "one rule and one threshold"),
        ("--rule skip --at 0.5 --layout stock", "no place for a threshold"),
        ("--rule entropy", "needs a threshold"),
        ("--rule dare", "no rule 'dare'"),
        ("--rule skip --at 0.5 --text t.jsonl", "--text judges a sweep"),
        ("--rule skip --tune --text t.jsonl", "--tune counts right answers"),
        ("--rule skip --tune --random-draws 3", "controls of --sweep, --oracle and --cross-fit"),
        ("--rule dropout --sweep", "needs a threshold: give --at F"),
        ("--rule skip --sweep --at 0.5,,1", "'' is not a number"),
        ("--rule skip --sweep model", "--sweep reads a profile"),
        ("--rule skip,top-p --tune", "one rule and one threshold"),
        ("--rule skip --tune --layout stock", "no place for a threshold"),
        ("--rule skip --sweep --seed 4294967296", "--seed"),
        ("--rule skip --most 0", "must be a number from 1 to 65535, or all"),
        ("--rule top-p --sweep --most 9", "has 8 experts, rule top-p asks for 9: take fewer"),
        ("--rule top-p --sweep --most 4 --matched-draws 1", "leaves out none to shuffle"),
        ("--rule random --sweep --random-draws 0", "--random-draws 0 leaves nothing"),
        ("--rule contrast --plan-only", "neither a plan nor a checkpoint"),
        ("--rule contrast --weak rank:8", "asks for 9: take fewer"),
        ("--rule contrast --sweep --text t.jsonl", "texts have no perplexity with"),
        ("--rule contrast --sweep --weak rank:8 --random-draws 0", "asks for 9: take fewer"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused_in_one_line(
    world: Path, expertcut: Commands, words: str, told: str
) -> None:
    said = expertcut(f"route --profile p {words} --out out", status=2)
    assert told in said and not (world / "out").exists()


def test_a_recipe_routes_and_older_hashes_stay() -> None:
    from expertcut.recipes.recipe_schema import Recipe

    variants = [{"name": "a", "route": {"rule": "skip", "at": 0.5}}, {"name": "b", "prune": {}}]
    first, second = Recipe.of_recipe({"model": "x/y", "variants": variants}).variants
    assert first.kind == "route" and first.recipe_values()["route"]["at"] == "0.5"
    assert "route" not in second.recipe_values()


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"rule": "contrast"}, "rule contrast writes no checkpoint"),
        ({"rule": "random"}, "no checkpoint can carry it"),
        ({"rule": "skip", "at": 0.5, "layout": "stock"}, "no place for a threshold"),
    ],
)
def test_a_recipe_without_a_checkpoint_is_refused_as_it_is_read(
    section: dict[str, object], told: str
) -> None:
    from expertcut.recipes.recipe_schema import Recipe

    with pytest.raises(ValidationError, match=f"route: .*{told}"):
        Recipe.of_recipe({"model": "x/y", "variants": [{"name": "a", "route": section}]})
