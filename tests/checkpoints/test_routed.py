"""Layout `routed`: a checkpoint chooses experts by the rule, as the rule at run time does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertcut.checkpoints.edit import simulated
from expertcut.edits.plan import BlockEdit, EditPlan, PlanFile, plan_text
from expertcut.edits.router_edits import with_routing
from expertcut.errors import ContractError, PlanError
from expertcut.models import modeling_routed
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import ROUTED_FILE, LoadOptions, find_source, load, modelling_code
from expertcut.models.routing_rule import RULE_KINDS as KINDS
from expertcut.models.routing_rule import RoutingRule
from expertcut.scoring.rerouting import rerouted
from tests.conftest import FAMILIES, STORAGE_FORMS, open_model, slow_but
from tests.support.exact_models import TOKENS, logprobs
from tests.support.routed_models import load_plainly, make_routed, routed_plan

Checkpoints = Callable[..., Path]
KEYS = ("architectures", "model_type", "auto_map", "expert_routing")

pytestmark = pytest.mark.usefixtures("modules_cache")


# Each form of storage, groups, selection biases in routers and given to them, recurrent layers.
QUICK = (*STORAGE_FORMS, "deepseek_v3", "minimax_m2", "lfm2_moe", "jamba")


@pytest.mark.parametrize("family", slow_but(QUICK, FAMILIES))
def test_every_family_answers_as_the_rule_at_run_time(
    checkpoint: Checkpoints, family: str, tmp_path: Path
) -> None:
    moe = open_model(checkpoint(family))
    folder = tmp_path / "routed"
    (edit,) = make_routed(moe, routed_plan(moe, "skip", 0.7), folder)
    before = logprobs(moe.model)
    with rerouted(moe.blocks, edit.rerouting):  # type: ignore[attr-defined]
        expected = logprobs(moe.model)
    assert (expected - before).abs().max() > 0.1  # else a rule that does nothing would pass
    model = load_plainly(folder)
    for experts in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(experts)
        assert (logprobs(model) - expected).abs().max() < 1e-4, experts
    own = open_model(folder)  # without --trust-remote-code: the file is this package's
    assert torch.equal(logprobs(own.model), expected)
    for block in own.blocks:  # the gate is read behind the rule
        base = moe.blocks[block.layer]
        assert (block.scoring, block.selection) == (base.scoring, base.selection)
        assert (block.weights is None) == (base.weights is None)
        if block.weights and base.weights:
            assert block.weights.is_renormalised == base.weights.is_renormalised
    model.save_pretrained(tmp_path / "again")
    old, new = (read_config(path) for path in (folder, tmp_path / "again"))
    assert {key: old[key] for key in KEYS} == {key: new[key] for key in KEYS}
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert set(old) == set(new) and all(torch.equal(old[name], new[name]) for name in old)
    assert torch.equal(logprobs(load_plainly(tmp_path / "again", "batched_mm")), logprobs(model))
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert type(again) is type(moe.tokenizer)


# Selection biases in routers, given to them, and for the logits; renormalised, and not.
@pytest.mark.parametrize("family", ["olmoe", "minimax_m2", "lfm2_moe", "ernie4_5_moe", "kolibri1"])
@pytest.mark.parametrize("at", [1, 3])
def test_fewer_and_more_experts_are_those_of_the_family(
    checkpoint: Checkpoints, family: str, at: int, tmp_path: Path
) -> None:
    """The rule, the routed checkpoint, and in stock the family's own router of that number."""
    moe = open_model(checkpoint(family))
    for layout in ("routed", "stock"):
        make_routed(moe, routed_plan(moe, "top-k", at, layout), tmp_path / layout)  # type: ignore[arg-type]
    expected = logprobs(load_plainly(tmp_path / "stock"))
    assert (expected - logprobs(moe.model)).abs().max() > 0.1
    for experts in ("eager", "batched_mm"):
        found = logprobs(load_plainly(tmp_path / "routed", experts))
        assert (found - expected).abs().max() < 1e-4
    names = [block.n_places for block in open_model(tmp_path / "routed").blocks]
    assert names == [max(at, 2)] * len(names)


FIT = ((0.3, 0.2),)
RULES: dict[str, tuple[float, dict[int, Any]]] = {
    "top-p": (0.1, {}),
    "entropy": (0.1, {}),
    "null": (0.4, {}),
    "fitted": (0.28, {0: FIT, 1: FIT}),
    "grouped": (2, {}),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["minimax_m2", "olmoe"])  # with and without a selection bias
def test_every_rule_that_needs_a_router_alone_is_written(
    checkpoint: Checkpoints, rule: str, family: str, tmp_path: Path
) -> None:
    moe, (at, fits) = open_model(checkpoint(family)), RULES[rule]
    (edit,) = make_routed(moe, routed_plan(moe, rule, at, fits=fits), tmp_path / "routed")
    before = logprobs(moe.model)
    with rerouted(moe.blocks, edit.rerouting):  # type: ignore[attr-defined]
        expected = logprobs(moe.model)
    assert (expected - before).abs().max() > 0.1
    for experts in ("eager", "batched_mm"):
        found = logprobs(load_plainly(tmp_path / "routed", experts))
        assert (found - expected).abs().max() < 1e-4
    own = open_model(tmp_path / "routed")
    assert (logprobs(own.model) - expected).abs().max() < 1e-5


def test_the_most_experts_of_a_token_cap_a_written_rule(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    plan = routed_plan(moe, "skip", 0.0)
    assert plan.routing is not None
    plan = replace(plan, routing=plan.routing.model_copy(update={"most": 1}))
    make_routed(moe, plan, tmp_path / "routed")
    make_routed(moe, routed_plan(moe, "top-k", 1, "stock"), tmp_path / "stock")
    found, expected = (logprobs(load_plainly(tmp_path / name)) for name in ("routed", "stock"))
    assert (found - expected).abs().max() < 1e-4 < (logprobs(moe.model) - found).abs().max()


def test_all_rules_are_written_or_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    assert {*RULES, "skip", "top-k"} == {r for r, kind in KINDS.items() if kind.is_exportable}
    moe = open_model(checkpoint("olmoe"))
    for rule, kind in KINDS.items():
        if not kind.is_exportable:
            with pytest.raises(ContractError, match=f"rule {rule} needs more than a router has"):
                make_routed(moe, routed_plan(moe, rule, 0), tmp_path / "none")


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("olmoe", "num_experts_per_tok"),
        ("ernie4_5_moe", "moe_k"),
        ("hunyuan_v1_moe", "moe_topk"),
        ("aria_text", "moe_topk"),
        ("kimi_linear", "num_experts_per_token"),
    ],
)
def test_stock_changes_one_field_and_no_tensor(
    checkpoint: Checkpoints, family: str, field: str, tmp_path: Path
) -> None:
    moe, folder = open_model(checkpoint(family)), tmp_path / "stock"
    make_routed(moe, routed_plan(moe, "top-k", 1, "stock"), folder)
    before, after = read_config(moe.source.path), read_config(folder)
    assert {k for k in before if before[k] != after[k]} == {field} and after[field] == 1
    assert set(before) == set(after)
    old, new = (load_file(path / "model.safetensors") for path in (moe.source.path, folder))
    assert set(old) == set(new) and all(torch.equal(old[name], new[name]) for name in old)
    assert not (folder / ROUTED_FILE).exists()


def test_layers_without_a_threshold_keep_their_routing(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    moe, folder = open_model(checkpoint("qwen3_moe")), tmp_path / "routed"
    (edit,) = make_routed(moe, routed_plan(moe, "skip", {1: 0.9}), folder)
    before = logprobs(moe.model)
    with rerouted(moe.blocks, edit.rerouting):  # type: ignore[attr-defined]
        expected = logprobs(moe.model)
    assert not torch.equal(expected, before)
    model = load_plainly(folder, "batched_mm")
    assert (logprobs(model) - expected).abs().max() < 1e-4
    gates = [type(layer.mlp.gate).__name__ for layer in model.model.layers]
    assert [name.startswith("RoutedRouter") for name in gates] == [False, True]


def test_biases_factors_and_a_cut_act_with_the_rule(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Biases before the rule, factors behind it; the rule chooses among the experts that stay."""
    moe = open_model(checkpoint("qwen3_moe"))
    edits = {b.name: BlockEdit(keep=(0, 1, 2, 4, 5, 7), scale={2: 3.0, 5: 0.2}) for b in moe.blocks}
    cut = EditPlan("", "prune", "by hand", "answer", edits, "routed", fold="off", is_cut=True)
    plan = with_routing(cut, RoutingRule(rule="skip"), {0: 0.7, 1: 0.5}, {})
    fitted = make_routed(moe, plan, tmp_path / "routed")
    with simulated(moe, fitted, is_as_written=False):
        expected = logprobs(moe.model)
    without = [edit for edit in fitted if not hasattr(edit, "rerouting")]
    with simulated(moe, without, is_as_written=False):
        assert (logprobs(moe.model) - expected).abs().max() > 0.1
    for experts in ("eager", "batched_mm"):
        found = logprobs(load_plainly(tmp_path / "routed", experts))
        assert (found - expected).abs().max() < 1e-4


def test_it_writes_what_the_rule_writes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    moe, folder = open_model(checkpoint("olmoe")), tmp_path / "routed"
    (edit,) = make_routed(moe, routed_plan(moe, "skip", 0.7), folder)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    before = moe.model.generate(TOKENS, **options)
    with rerouted(moe.blocks, edit.rerouting):  # type: ignore[attr-defined]
        expected = moe.model.generate(TOKENS, **options)
    assert not torch.equal(expected, before)
    assert torch.equal(load_plainly(folder, "grouped_mm").generate(TOKENS, **options), expected)


def test_without_its_code_no_loader_takes_it(checkpoint: Checkpoints, tmp_path: Path) -> None:
    moe, folder = open_model(checkpoint("olmoe")), tmp_path / "routed"
    make_routed(moe, routed_plan(moe, "skip", 0.7), folder)
    assert (folder / ROUTED_FILE).read_bytes() == modelling_code(ROUTED_FILE)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(ValueError, match="tp_plan is not supported"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tp_plan="auto")
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        modeling_routed.Nothing  # noqa: B018
    (folder / ROUTED_FILE).write_bytes(modelling_code(ROUTED_FILE) + b"\n# changed\n")
    with pytest.raises(Exception, match="brings code of its own"):
        load(find_source(str(folder)), LoadOptions())


def test_a_plan_without_a_rule_says_nothing_of_rules(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("olmoe"))
    block = {"keep": [0, 1], "bias": {}, "scale": {}}
    head: dict[str, Any] = {
        "model": {"id": "m", "revision": None, "fingerprint": "f"},
        **{"action": "prune", "criterion": "reap", "positions": "all", "removal": "reroute"},
        **{"layout": "stock", "blocks": {"b": block}},
        "chosen_on": {"quiz": "q", "split": "test", "questions": 1, "sha256": "s"},
    }
    text = plan_text(PlanFile.model_validate(head))
    assert "routing" not in text and '"at"' not in text
    plan = routed_plan(moe, "skip", 0.5)
    routing = {"rule": "skip", "experts_per_token": 2.5}
    blocks = {name: edit.model_dump() for name, edit in plan.edits.items()}
    routed = plan_text(PlanFile.model_validate({**head, "routing": routing, "blocks": blocks}))
    assert '"experts_per_token": 2.5' in routed and routed.count('"at": 0.5') == 2


@pytest.mark.parametrize(
    ("asked", "family", "reason"),
    [
        (("skip", 0.5, "stock"), "olmoe", "stock has no place for a threshold by token: take"),
        (("skip", 0.5, "exact"), "olmoe", "exact has no place for a routing rule: take --layout"),
        (("top-k", {0: 1, 1: 2}, "stock"), "olmoe", "one number of experts per token for all 2"),
        (("top-k", {0: 1}, "stock"), "olmoe", "asked are 1 in 1: take --layout routed"),
        (("top-k", 1, "stock"), "phimoe", "works with 2 experts per token only"),
        (("top-k", 3, "routed"), "deepseek_v3", "routes in 2 groups and picks from 1"),
        (("top-k", 9, "routed"), "olmoe", "has 8 experts, rule top-k asks for 9"),
    ],
)
def test_what_cannot_be_written_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, asked: tuple[Any, ...], family: str, reason: str
) -> None:
    moe = open_model(checkpoint(family))
    with pytest.raises(ContractError, match=reason):
        make_routed(moe, routed_plan(moe, *asked), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_thresholds_must_fit_rule_and_layers(checkpoint: Checkpoints) -> None:
    moe = open_model(checkpoint("olmoe"))
    with pytest.raises(PlanError, match="not a threshold of rule skip"):
        routed_plan(moe, "skip", 1.5)
    with pytest.raises(PlanError, match="MoE layers are 0 to 1"):
        routed_plan(moe, "skip", {2: 0.5})


def test_a_routed_checkpoint_is_not_routed_again(checkpoint: Checkpoints, tmp_path: Path) -> None:
    moe, folder = open_model(checkpoint("olmoe")), tmp_path / "routed"
    make_routed(moe, routed_plan(moe, "skip", 0.7), folder)
    routed = open_model(folder)
    with pytest.raises(ContractError, match="has a routing rule already"):
        make_routed(routed, routed_plan(routed, "skip", 0.5), tmp_path / "none")
