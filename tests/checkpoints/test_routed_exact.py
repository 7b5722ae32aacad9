"""A rule on a base of layout exact: the constants stay, and routers choose by the rule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from expertcut.checkpoints.prune_edit import constant_experts
from expertcut.edits.plan import load_plan
from expertcut.errors import ContractError
from expertcut.hub.provenance import verified
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.load import LoadOptions, find_source, load, modelling_code
from expertcut.models.safetensors_index import read_headers
from expertcut.scoring.rerouting import rerouted
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import Commands, make_checkpoint, open_model, write_quiz
from tests.hostile.running import run
from tests.hostile.world import copied_world
from tests.support.exact_models import (
    EXACT_FAMILIES,
    REMOVED,
    as_written_before,
    constants_for,
    logprobs,
    make_base,
    make_exact,
)
from tests.support.healed_models import healed, settings_for
from tests.support.routed_models import load_plainly, make_routed, routed_plan

KEYS = ("architectures", "model_type", "auto_map", "expert_routing", "compression_config")
FILES = ("modeling_exact.py", "modeling_routed.py", "modeling_routed_exact.py")
BIAS_E = torch.tensor([0, 0, 1.3, 0, 0, -2.0, 0, 0])

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.mark.parametrize("is_biased", [False, True])
@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_it_answers_as_the_rule_and_the_constants_on_the_base(
    family: str, is_biased: bool, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family)
    constants = constants_for(REMOVED, is_zero=False)
    biases = {"model.layers.1.mlp": BIAS_E} if is_biased else {}
    exact = open_model(make_exact(base, tmp_path / "exact", constants, biases))
    folder = tmp_path / "routed"
    (edit,) = make_routed(exact, routed_plan(exact, "skip", 0.7), folder)
    before, routing = logprobs(exact.model), edit.rerouting  # type: ignore[attr-defined]
    with rerouted(exact.blocks, routing):
        expected = logprobs(exact.model)
    assert (expected - before).abs().max() > 0.1  # else a rule that does nothing would pass
    moe = open_model(base)
    tilts = Tilts({1: BIAS_E} if is_biased else {})
    constant = constant_experts(moe.blocks, constants)
    with constant, tilted(moe.blocks, tilts), rerouted(moe.blocks, routing):
        assert (logprobs(moe.model) - expected).abs().max() < 1e-4
    model = load_plainly(folder)
    assert type(model).__module__.startswith("transformers_modules")
    for experts in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(experts)
        assert (logprobs(model) - expected).abs().max() < 1e-4, experts
    own = open_model(folder)  # without --trust-remote-code: the files are this package's
    assert (logprobs(own.model) - expected).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "again")
    old, new = (read_config(path) for path in (folder, tmp_path / "again"))
    assert {key: old[key] for key in KEYS} == {key: new[key] for key in KEYS}
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert set(old) == set(new) and all(torch.equal(old[name], new[name]) for name in old)
    assert torch.equal(logprobs(load_plainly(tmp_path / "again", "batched_mm")), logprobs(model))
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert type(again) is type(moe.tokenizer)


def test_the_tensors_are_those_of_the_exact_checkpoint(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "olmoe")
    exact = make_exact(base, tmp_path / "exact", constants_for(REMOVED, is_zero=False))
    earlier = as_written_before(exact, tmp_path / "earlier")  # constants have other names there
    wanted = load_file(exact / "model.safetensors")
    for name, folder in (("routed", exact), ("routed-earlier", earlier)):
        moe = open_model(folder)
        make_routed(moe, routed_plan(moe, "skip", 0.7), tmp_path / name)
        found = load_file(tmp_path / name / "model.safetensors")
        assert set(found) == set(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)
        for file in FILES:
            assert (tmp_path / name / file).read_bytes() == modelling_code(file)


@pytest.mark.parametrize("changed", FILES)
def test_a_changed_file_of_the_three_is_not_run(changed: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "olmoe")
    exact = open_model(make_exact(base, tmp_path / "exact", constants_for(REMOVED, is_zero=True)))
    make_routed(exact, routed_plan(exact, "skip", 0.7), tmp_path / "routed")
    load(find_source(str(tmp_path / "routed")), LoadOptions())
    with (tmp_path / "routed" / changed).open("a") as file:
        file.write("\nRAN = True\n")
    with pytest.raises(Exception, match="brings code of its own"):
        load(find_source(str(tmp_path / "routed")), LoadOptions())


@pytest.mark.parametrize("tilt", [{"bias": {3: 1.0}}, {"scale": {3: 2.0}}])
def test_biases_and_factors_are_an_edit_of_their_own(tilt: dict[str, Any], tmp_path: Path) -> None:
    """Expert 3 is a constant: a factor has no weights to act on, and a bias has a place before."""
    base = make_base(tmp_path / "base", "olmoe")
    exact = open_model(make_exact(base, tmp_path / "exact", constants_for(REMOVED, is_zero=True)))
    plan = routed_plan(exact, "skip", 0.7)
    edits = {name: edit.model_copy(update=tilt) for name, edit in plan.edits.items()}
    with pytest.raises(ContractError, match="where a rule goes alone: reweight it first"):
        make_routed(exact, replace(plan, edits=edits), tmp_path / "none")


def test_no_expert_runs_for_a_skipped_one(tmp_path: Path) -> None:
    """Not even with weight 0: as many rows reach the experts as the rule keeps of kept experts."""
    base = make_base(tmp_path / "base", "qwen3_moe")
    exact = open_model(make_exact(base, tmp_path / "exact", constants_for(REMOVED, is_zero=False)))
    make_routed(exact, routed_plan(exact, "skip", 0.7), tmp_path / "routed")
    model, rows, kept = load_plainly(tmp_path / "routed"), [0], [0]
    removed = [set(ids) for ids in REMOVED.values()]
    for layer, removed_ids in zip(model.model.layers, removed, strict=True):
        own = [e for e in range(8) if e not in removed_ids]
        own_E = torch.tensor(own)
        layer.mlp.gate.register_forward_hook(
            lambda _m, _a, out, own_E=own_E: kept.append(int(torch.isin(out[2], own_E).sum()))
        )
        act = layer.mlp.experts.act_fn
        layer.mlp.experts.act_fn = torch.nn.Module()
        layer.mlp.experts.act_fn.forward = (  # type: ignore[method-assign]
            lambda x, act=act: rows.append(len(x)) or act(x)
        )
    logprobs(model)
    assert sum(rows) == sum(kept) > 0


ASKED = "--quiz quiz --shots 1 --threads 1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, its exact cut, the profile `p` of that, and `routed`, made of `p`."""
    root = tmp_path_factory.mktemp("routed-exact")
    make_checkpoint(root / "model", "olmoe")
    write_quiz(root / "quiz", {"dev": 5, "val": 3, "test": 2})
    for line in (
        f"profile model {ASKED} --split val --out base",
        "prune --profile base --keep 5 --layout exact --replace-with mean --out cut",
        f"profile cut {ASKED} --split val --out p",
        "route --profile p --rule skip --at 0.5 --out routed",
    ):
        ended = run(root, line.split())
        assert ended.status == 0, ended.stderr
    return root


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy of what was made."""
    return copied_world(made, tmp_path)


def test_the_command_holds_it_to_the_rule_at_run_time(world: Path, expertcut: Commands) -> None:
    proof = load_plan(world / "routed").proof
    against = {shift.against: shift.max_abs_logprob_diff for shift in proof.held_out}
    assert against.pop("the rule at run time") < 1e-4 < 0.01 < against.popitem()[1]
    expertcut(f"eval cut routed {ASKED} --out results.json")
    expertcut("publish routed who/what --dry-run")
    assert {file.name for file in verified(world / "routed").files} >= set(FILES)
    card = (world / "routed" / "README.md").read_text()
    assert (
        "modeling_routed_exact.py" in card.replace("\\", "")
        and "transformers 4 loads it wrongly" not in card
    )


def test_it_is_not_edited_again(world: Path, expertcut: Commands) -> None:
    expertcut(f"profile routed {ASKED} --split val --out r")
    for line, words in (
        ("prune --profile r --keep 3 --out no", "is neither cut nor reweighted"),
        ("prune --profile r --keep 3 --layout exact --out no", "is neither cut nor reweighted"),
        ("merge --profile r --keep 3 --out no", "is neither cut nor reweighted"),
        ("reweight --profile r --boost 1:3=1 --out no", "is neither cut nor reweighted"),
        ("reweight --profile r --boost 1:3=1 --layout exact --out no", "is neither cut nor"),
        ("route --profile r --rule skip --out no", "has a routing rule already"),
        ("route --profile p --rule top-k --at 1 --layout stock --out no", "take --layout routed"),
        ("route --profile p --rule contrast --out no", "whose constants a weak run would miss"),
        (f"sweep 0.5 --profile r --by reap {ASKED} --out no", "is neither cut nor reweighted"),
    ):
        said = expertcut(line, status=2)
        assert words in said and said.count("\n") == 1, line
        assert not (world / "no").exists(), line


def test_healing_keeps_constants_and_rule(world: Path) -> None:
    settings = settings_for(world / "quiz", targets=("experts", "gate"), steps=2)
    healed(world / "routed", settings, world / "healed")
    before, after = (read_headers(world / name) for name in ("routed", "healed"))
    assert set(before) == set(after)
    for file in ("config.json", *FILES):
        assert (world / "healed" / file).read_bytes() == (world / "routed" / file).read_bytes()
    own, plain = open_model(world / "healed"), load_plainly(world / "healed")
    assert (logprobs(own.model) - logprobs(plain)).abs().max() < 1e-4
    assert (logprobs(own.model) - logprobs(open_model(world / "routed").model)).abs().max() > 0
    assert verified(world / "healed").plan.routing is not None
