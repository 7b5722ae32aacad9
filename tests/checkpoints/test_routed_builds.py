"""`build` with a routing rule: held-out check, plan, and what later commands make of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expertcut.checkpoints.build import (
    BuildOptions,
    Built,
    build,
    engine_as_profiled,
    found_source,
)
from expertcut.checkpoints.export import check_export, edits_of
from expertcut.checkpoints.held_out_check import BaseScores, score_base
from expertcut.checkpoints.text_check import BaseTexts, score_base_texts
from expertcut.data import Selection, load_quiz
from expertcut.data.corpus import TextSelection, load_corpus
from expertcut.data.sources import HELD_OUT_SHARE
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import BlockEdit, EditPlan, load_plan
from expertcut.edits.router_edits import route_draft, with_routing
from expertcut.edits.splits import choosing_profile, questions_for
from expertcut.errors import ContractError
from expertcut.hub.provenance import verified
from expertcut.models import modeling_routed
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import LoadOptions, find_source
from expertcut.models.routing_rule import RoutingRule
from expertcut.models.validate import expert_count
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.rerouting import Rerouting, rerouted_engine
from tests.conftest import WORDS, Commands, open_model
from tests.support.exact_models import logprobs
from tests.support.healed_models import healed, settings_for
from tests.support.routed_models import load_plainly, make_routed, routed_plan

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
    used, counts = plan.routing.experts_per_token, []

    def see(routing: Routing) -> None:  # packed, so no token is a pad
        counts.append(((routing.experts_TK < 8).sum(), len(routing.experts_TK)))

    engine = engine_as_profiled(profile, found_source(profile), LoadOptions())
    routing = Rerouting(RoutingRule(rule=rule), {0: at, 1: at})  # type: ignore[call-arg]
    with rerouted_engine(engine, routing) as begin, observe_routers(engine.moe.blocks, see):
        ask(engine, questions_for(profile, is_fitting=False).held_out, begin)
    n_used, n_tokens = np.sum(counts, axis=0)
    assert used == pytest.approx(n_used / n_tokens)
    assert 1 < used < 2 if rule == "skip" else used == 1
    assert {edit.at for edit in plan.blocks.values()} == {at}
    (sentence,) = (s for edit in edits_of(plan) for s in edit.describe(8))
    assert sentence.startswith(f"Routers choose by rule {rule} at {at:g}: {used:.2f} experts")
    assert verified(tmp_path / "made").has_family_form == (layout == "stock")


def test_a_file_that_runs_another_rule_is_far_from_the_rule_at_run_time(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def nobody_leaves(tokens: Any, at: float, options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens.weights_TK * 1.0, tokens.experts_TK.clone()

    monkeypatch.setitem(modeling_routed.RULE_FUNCTIONS, "skip", nobody_leaves)
    made = built(profile, tmp_path / "made", "skip", 0.7)
    assert made.proof is not None  # the file beside it is not patched, so both differ
    against = {shift.against: shift.max_abs_logprob_diff for shift in made.proof.held_out}
    assert against["the rule at run time"] > 0.1


@pytest.mark.parametrize("by", ["questions", "texts"])
def test_a_rule_that_does_not_reach_the_model_gives_no_result(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path, by: str
) -> None:
    """Tokens use fewer experts and every answer stays, here because experts give nothing."""
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": " ".join(WORDS * 5)}) + "\n")
    moe = open_model(checkpoint("qwen3_moe"))
    engine, plan = Engine(moe, 1024), routed_plan(moe, "skip", 0.7)

    def score() -> BaseScores | BaseTexts:
        if by == "texts":
            selection = TextSelection((str(tmp_path / "words.jsonl"),))
            texts = load_corpus(selection, moe.tokenizer)
            return score_base_texts(engine, texts, plan, edits_of(plan))
        quiz = load_quiz(Selection(str(quiz_folder), "test", 0, limit=2))
        return score_base(engine, quiz, plan, edits_of(plan))

    used = score().experts_per_token
    assert used is not None and 1 < used < 2
    for block in moe.blocks:
        block.experts.get_parameter("down_proj").data.zero_()
    with pytest.raises(ContractError, match="their tokens use other numbers of experts"):
        score()


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


def test_healing_trains_through_the_rule_and_keeps_it(
    profile: Profile, quiz_folder: Path, tmp_path: Path
) -> None:
    """As the stock checkpoint with as many experts, which runs without a rule; as no other."""
    for layout in ("routed", "stock"):
        built(profile, tmp_path / layout, "top-k", 3, layout)  # type: ignore[arg-type]
    targets = ("experts", "gate")
    settings = settings_for(quiz_folder, targets=targets, objective="answer", steps=2)
    base = Path(profile.info.model.id)
    losses, tensors = {}, {}
    for name, folder in (
        ("routed", tmp_path / "routed"),
        ("stock", tmp_path / "stock"),
        ("base", base),
    ):
        out = tmp_path / f"{name}-healed"
        losses[name] = torch.tensor(healed(folder, settings, out).curve.losses)
        tensors[name] = load_file(out / "model.safetensors")
    assert torch.allclose(losses["routed"], losses["stock"], atol=1e-4)
    assert not torch.allclose(losses["routed"], losses["base"], atol=1e-2)
    changed = {
        n
        for n, t in load_file(base / "model.safetensors").items()
        if not torch.equal(t, tensors["routed"][n])
    }
    assert any("experts" in name for name in changed) and any("gate.w" in name for name in changed)
    for name in changed:
        assert torch.allclose(tensors["routed"][name], tensors["stock"][name], atol=1e-3), name
    before, after = tmp_path / "routed", tmp_path / "routed-healed"
    for file in ("config.json", "modeling_routed.py", "tokenizer_config.json"):
        assert (after / file).read_bytes() == (before / file).read_bytes()
    plan = load_plan(after)
    assert (plan.layout, plan.routing) == ("routed", load_plan(before).routing)
    assert {edit.at for edit in plan.blocks.values()} == {3}
    own, plain = open_model(after), load_plainly(after)
    assert (logprobs(own.model) - logprobs(plain)).abs().max() < 1e-4
    assert verified(after).plan == plan


def declare(folder: Path, **changes: Any) -> None:
    """Changes the rule that config.json declares."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["expert_routing"] |= changes
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("declared", "n_kept", "fault"),
    [
        ({"rule": "null"}, 6, "rule null has thresholds that refer to the logits of all"),
        ({"rule": "grouped", "layers": {"0": 2.0, "1": 2.0}}, 6, "rule grouped has groups of"),
        ({"rule": "grouped", "layers": {"0": 2.0, "1": 2.0}}, 4, "rule grouped has groups of"),
        ({"rule": "top-p", "most": 5, "places": 5}, 4, "top-p takes up to 5 experts a token, and"),
        ({"rule": "top-k", "layers": {"0": 1.0, "1": 6.0}}, 4, "top-k takes up to 6 experts a"),
        ({"rule": "top-k", "layers": {"0": 1.0, "1": 6.0}}, 6, ""),
        ({}, 4, ""),
    ],
)
def test_a_rule_survives_a_cut_only_if_it_means_the_same(
    checkpoint: Checkpoints, tmp_path: Path, declared: dict[str, Any], n_kept: int, fault: str
) -> None:
    """A fresh cut of a routed checkpoint, of any number of experts that the stock router takes."""
    moe, folder = open_model(checkpoint("qwen3_moe")), tmp_path / "made"
    make_routed(moe, routed_plan(moe, "skip", 0.7), folder)
    declare(folder, **declared)
    edits = {b.name: BlockEdit(keep=tuple(range(n_kept))) for b in moe.blocks}
    plan = EditPlan("", "prune", "by hand", "answer", edits, fold="off", is_cut=True)
    source = find_source(str(folder))
    if not fault:
        check_export(source, plan, 8, tmp_path)
        return
    with pytest.raises(ContractError, match=fault):
        check_export(source, plan, 8, tmp_path)


def test_a_rule_and_a_cut_in_one_plan_fit_each_other(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    moe = open_model(checkpoint("qwen3_moe"))
    edits = {b.name: BlockEdit(keep=(0, 1, 4, 5)) for b in moe.blocks}
    cut = EditPlan("", "prune", "by hand", "answer", edits, "routed", fold="off", is_cut=True)
    for rule, at in (("grouped", 2), ("top-k", 5)):
        plan = with_routing(cut, RoutingRule(rule=rule), {0: at, 1: at}, {})  # type: ignore[call-arg]
        with pytest.raises(ContractError, match=f"rule {rule} "):
            make_routed(moe, plan, tmp_path / rule)


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
