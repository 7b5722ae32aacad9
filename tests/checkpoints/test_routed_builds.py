"""`build` with a routing rule: held-out check, plan, and what later commands make of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expertcut.checkpoints.build import BuildOptions, Built, build
from expertcut.checkpoints.export import edits_of
from expertcut.data.sources import HELD_OUT_SHARE
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import load_plan
from expertcut.edits.router_edits import route_draft
from expertcut.edits.splits import choosing_profile
from expertcut.errors import ContractError
from expertcut.hub.provenance import verified
from expertcut.models import modeling_routed
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import LoadOptions
from expertcut.models.routing_rule import RoutingRule
from expertcut.models.validate import expert_count
from expertcut.profiling.storage import Profile, load_profile
from tests.conftest import WORDS, Commands, open_model

Checkpoints = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture
def profile(
    checkpoint: Checkpoints, quiz_folder: Path, expertcut: Commands, tmp_path: Path
) -> Profile:
    model = checkpoint("qwen3_moe")
    expertcut("profile", model, "--quiz", quiz_folder, "--shots", "1", "--out", tmp_path / "p")
    return load_profile(tmp_path / "p")


def built(profile: Profile, folder: Path, rule: str, at: float, layout: Layout = "routed") -> Built:
    plan = route_draft(profile, RoutingRule(rule=rule), {0: at, 1: at}, layout)  # type: ignore[call-arg]
    return build(profile, plan, folder, BuildOptions(LoadOptions()))


@pytest.mark.parametrize(("rule", "at", "layout"), [("skip", 0.7, "routed"), ("top-k", 1, "stock")])
def test_a_checkpoint_is_held_to_the_base_and_to_the_rule_at_run_time(
    profile: Profile, tmp_path: Path, rule: str, at: float, layout: Layout
) -> None:
    made = built(profile, tmp_path / "made", rule, at, layout)
    assert made.proof is not None
    against = {shift.against: shift.max_abs_logprob_diff for shift in made.proof.held_out}
    assert against["the unedited base"] > 0.1  # else a rule that does nothing would pass
    assert against["the rule at run time"] <= 1e-4
    plan = load_plan(tmp_path / "made")
    assert plan == made.plan and plan.routing is not None
    used = plan.routing.experts_per_token
    assert used is not None and (1 < used < 2 if rule == "skip" else used == 1)
    assert {edit.at for edit in plan.blocks.values()} == {at}
    (sentence,) = (s for edit in edits_of(plan) for s in edit.describe(8))
    assert sentence.startswith(f"Routers choose by rule {rule} at {at:g}: {used:.2f} experts")
    assert verified(tmp_path / "made").has_family_form == (layout == "stock")


def test_a_rule_that_does_not_reach_the_model_is_no_checkpoint(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts are left out and every answer stays: the law of the check, not of the rule."""

    def nobody_leaves(tokens: Any, at: float, options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens.weights_TK * 1.0, tokens.experts_TK.clone()

    monkeypatch.setitem(modeling_routed.RULE_FUNCTIONS, "skip", nobody_leaves)
    made = built(profile, tmp_path / "made", "skip", 0.7)
    assert made.proof is not None  # the file beside it is not patched, so both differ
    against = {shift.against: shift.max_abs_logprob_diff for shift in made.proof.held_out}
    assert against["the rule at run time"] > 0.1


def test_a_checkpoint_goes_on_with_its_rule(
    profile: Profile, quiz_folder: Path, expertcut: Commands, tmp_path: Path
) -> None:
    """Profiled, cut again in stock, and its counts are those of a hook."""
    built(profile, tmp_path / "made", "skip", 0.7)
    moe, n_used = open_model(tmp_path / "made"), [0, 0]

    def see(routing: Routing) -> None:
        n_used[0] += int((routing.experts_TK < 8).sum())
        n_used[1] += len(routing.experts_TK)

    with observe_routers(moe.blocks, see):
        moe.model(input_ids=torch.arange(2, 42)[None], use_cache=False)
    assert 1 < n_used[0] / n_used[1] < 2
    arguments = ("--quiz", quiz_folder, "--shots", "1", "--out", tmp_path / "again")
    expertcut("profile", tmp_path / "made", *arguments)
    chosen = load_profile(tmp_path / "again")
    assert float(chosen.token_sum("tokens")[0].sum()) < float(profile.token_sum("tokens")[0].sum())  # type: ignore[index]
    printed = expertcut("prune", "--profile", tmp_path / "again", "--keep", "6", "--out", "cut")
    assert "written" in printed
    config = read_config(tmp_path / "cut")
    assert config["expert_routing"] == read_config(tmp_path / "made")["expert_routing"]
    assert expert_count(config) == 6
    held_out = load_plan(tmp_path / "cut").proof.held_out
    assert held_out[0].max_abs_logprob_diff > 1e-2 and held_out[1].max_abs_logprob_diff < 1e-4


def test_thresholds_of_logits_do_not_survive_a_cut(
    profile: Profile, quiz_folder: Path, expertcut: Commands, tmp_path: Path
) -> None:
    built(profile, tmp_path / "made", "skip", 0.7)
    file = tmp_path / "made" / "config.json"
    config = json.loads(file.read_text())
    config["expert_routing"]["rule"] = "null"
    file.write_text(json.dumps(config))
    from expertcut.checkpoints.stock import StockWriter
    from expertcut.models.load import Source

    source = Source("m", tmp_path / "made")
    with pytest.raises(ContractError, match="routes by rule null"):
        StockWriter().check(source, is_cutting=True)


def test_texts_judge_a_rule_as_questions_do(
    checkpoint: Checkpoints, expertcut: Commands, tmp_path: Path
) -> None:
    chance = random.Random(0)
    lines = [" ".join(chance.choices(WORDS, k=30)) for _ in range(40)]
    text = "".join(json.dumps({"text": f"{n} {line}"}) + "\n" for n, line in enumerate(lines))
    (tmp_path / "words.jsonl").write_text(text)
    expertcut("profile", checkpoint("qwen3_moe"), "--text", "words.jsonl", "--out", "texts")
    part, _ = choosing_profile(load_profile(tmp_path / "texts"), HELD_OUT_SHARE)
    made = built(part, tmp_path / "made", "skip", 0.7)
    assert made.proof is not None and made.plan.routing is not None
    base, rule = made.proof.text
    assert rule.against == "the rule at run time"
    assert base.kl > 1e-2 and rule.kl < 1e-6 and abs(rule.delta_loss) < 1e-5
    assert 1 < (made.plan.routing.experts_per_token or 0) < 2
