"""Contracts: what a model's own code does is what is measured, or the contract is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertcut.data import Selection, load_quiz
from expertcut.errors import ContractError
from expertcut.models.find_blocks import find_blocks
from expertcut.models.load import MoeModel
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting.profile_tables import constants_tables
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import Commands, open_model, write_quiz
from tests.support.declared_models import (
    CONTRACTS,
    SHAPES,
    contract_of,
    make_declared,
    open_declared,
    open_raw,
    own_sums,
)

WHY_NOT_CUT = {
    "deepseek": "None",
    "iterated": "one expert serves several calls",
    "recurrent": "reads a state",
    "plus_plus": "zero-computation experts",
}
pytestmark = pytest.mark.usefixtures("modules_cache")
Folders = Callable[[str], Path]
TOKENS = torch.arange(2, 42)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("declared")

    def find(shape: str) -> Path:
        return root / shape if (root / shape).exists() else make_declared(root / shape, shape)

    return find


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quiz(tmp_path_factory.mktemp("quiz") / "birds", {"dev": 1, "val": 2, "test": 2})


def profiled(moe: MoeModel, quiz: Path, folder: Path) -> tuple[Profile, list[list[int]]]:
    """A profile of all questions, and their prompts."""
    questions = load_quiz(Selection(str(quiz), "val", 1))
    measurement = Measurement(moe, questions, None, MeasureOptions())
    list(measurement.run(folder))
    encoded = [measurement.engine.encode(questions, *own) for own in questions.questions.items()]
    return load_profile(folder), [list(ids) for own in encoded for ids in own.prompts]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_profile_holds_what_the_models_own_code_does(
    folders: Folders, quiz: Path, tmp_path: Path, shape: str
) -> None:
    moe = open_declared(folders(shape), contract_of(shape))
    before = {name: tensor.clone() for name, tensor in moe.model.state_dict().items()}
    profile, prompts = profiled(moe, quiz, tmp_path / "profile")
    wanted = own_sums(open_raw(folders(shape)), prompts)
    assert len(moe.blocks) == len(wanted["tokens"]) == (4 if shape == "iterated" else 2)
    for name, wanted_LE in wanted.items():
        found_LE = profile.token_sum(name)
        assert found_LE is not None and found_LE.max() > 0
        if name == "tokens":
            np.testing.assert_array_equal(found_LE, wanted_LE.numpy())
        np.testing.assert_allclose(found_LE, wanted_LE.numpy(), rtol=1e-5, atol=1e-5)
    after = moe.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    block = profile.info.model.blocks[-1]
    assert block.declared is not None and profile.info.model.contract is not None
    assert (block.places is not None) == (shape in ("top_p", "dropping"))
    if block.places is not None:
        assert (profile.array("chosen_NLK") == -1).any()
    assert block.declared.has_state == (shape in ("recurrent", "plus_plus"))
    assert bool(block.declared.constants) == (shape == "plus_plus")
    tables = constants_tables(profile)
    assert len(tables) == 2 * (shape == "plus_plus")
    assert WHY_NOT_CUT.get(shape, "does not give `names`") in str(block.declared.why_not_cut)
    if tables:
        zero_L = (profile.array("chosen_NLK") == 9).mean(axis=(0, 2))
        assert zero_L.any()
        np.testing.assert_allclose([float(str(row[1])) for row in tables[0].rows], zero_L)


def test_olmoe_by_a_contract_gives_the_very_bytes_of_olmoe_by_itself(
    checkpoint: Callable[..., Path], quiz: Path, tmp_path: Path
) -> None:
    moe = open_declared(checkpoint("olmoe"), CONTRACTS / "module_list.py")
    found, _ = profiled(moe, quiz, tmp_path / "found")
    wanted, _ = profiled(open_model(checkpoint("olmoe")), quiz, tmp_path / "wanted")
    for ours, theirs in zip(found.chunks, wanted.chunks, strict=True):
        assert ours.keys() == theirs.keys() >= {"alpha_NLE", "question_residual_shift_LE"}
        assert [n for n in ours if ours[n].tobytes() != theirs[n].tobytes()] == []
    assert "declared" not in (wanted.path / "profile.json").read_text()
    assert "contract" not in (wanted.path / "profile.json").read_text()


BASE = """
from expertcut.models.declared import Declared
def route(m, x):
    z = m.gate(x)
    w, e = z.softmax(-1).topk(2)
    return z, w, e
def blocks(model):
    for name, m in model.named_modules():
        if hasattr(m, "shared_experts"):
            own = list(m.experts)
            yield Declared(name, m, own, 2, route, shared=m.shared_experts)
"""
WRONG = {
    "other weights": ("z, w, e", "z, w / w.sum(-1, keepdim=True), e", "it weighs expert"),
    "no shared expert": (
        "shared=m.shared_experts",
        "",
        "it adds something that `experts` do not give",
    ),
    "a swapped pair": (
        "own = ",
        "own = [m.experts[1], m.experts[0], *m.experts[2:]]; _ = ",
        "swapped",
    ),
    "one call too many": ("shared=", "calls=2, shared=", "ran 1 times in one pass, must be 2"),
    "ids that are none": ("z, w, e", "z, w, e + 7", "chooses experts outside 0 to 7"),
    "one expert twice": ("z, w, e", "z, w, e[:, :1].expand(-1, 2)", "chooses an expert twice"),
    "a weight for nobody": (
        "z, w, e",
        "z, w, e - 9",
        "a weight to an expert id that stands for none",
    ),
    "another top k": ("own, 2", "own, 3", r"have the shapes .* and twice \(16, 3\)"),
    "uneven groups": ("shared=", "groups=2, shared=", "do not lie evenly in 2 groups"),
    "no zero expert": (
        "shared=",
        "constants={1: 'zero'}, shared=",
        "expert 1 is not a zero expert",
    ),
    "a block twice": (
        "            yield",
        "            yield Declared(name, m, own, 2, route)\n            yield",
        "owns the same experts as",
    ),
    "another module": ("Declared(name", "Declared(name + '.gate'", "another module of that name"),
    "a slower loss": ("own = ", "m.gate.weight.mul_(1.01); own = ", "changes the model"),
    "code that fails": ("z = m.gate(x)", "z = m.gat(x)", "fails with AttributeError"),
    "something else": ("yield Declared(", "yield dict(name=", "must be a Declared|fails with"),
    "nothing": ('shared_experts")', 'other_experts")', "yields no block of this tiny_declared"),
    "no function": ("def blocks", "def block", "must define blocks"),
    "no Python": ("def blocks(model):", "def blocks(model:", "fails with SyntaxError"),
}


def test_a_right_contract_is_believed(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text(BASE)
    assert len(open_declared(folders("deepseek"), tmp_path / "c.py").blocks) == 2


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_contract_is_refused_by_its_own_sentence(
    folders: Folders, tmp_path: Path, fault: str
) -> None:
    was, now, sentence = WRONG[fault]
    assert was in BASE
    (tmp_path / "c.py").write_text(BASE.replace(was, now))
    with pytest.raises(ContractError, match=sentence):
        open_declared(folders("deepseek"), tmp_path / "c.py")
    others = [own for _, _, own in WRONG.values() if own != sentence]
    assert len(others) == len(WRONG) - 1


def test_a_contract_that_does_not_hand_on_the_state_is_refused(
    folders: Folders, tmp_path: Path
) -> None:
    text = (CONTRACTS / "module_list.py").read_text()
    forgetful = text.replace("experts_TK, logits_TE, state_TH", "experts_TK, logits_TE")
    assert forgetful != text
    (tmp_path / "c.py").write_text(forgetful)
    with pytest.raises(ContractError, match="returns something else in place 3"):
        open_declared(folders("recurrent"), tmp_path / "c.py")


def test_a_contract_that_drifts_on_real_tokens_is_refused(
    folders: Folders, quiz: Path, tmp_path: Path
) -> None:
    text = BASE.replace("z, w, e", "z, w if len(x) <= 16 else 2 * w, e")
    (tmp_path / "c.py").write_text(text)
    moe = open_declared(folders("deepseek"), tmp_path / "c.py")
    with pytest.raises(ContractError, match="its own output differs from the contract's by"):
        profiled(moe, quiz, tmp_path / "profile")


def test_a_block_that_runs_twice_is_refused_where_no_contract_is(
    checkpoint: Callable[..., Path],
) -> None:
    model = open_model(checkpoint("olmoe")).model
    layer = model.model.layers[1]
    norm = layer.post_attention_layernorm
    own = norm.forward

    def twice(x: Tensor) -> Any:
        return layer.mlp(own(x))

    norm.forward = twice
    with pytest.raises(ContractError, match=r"1\.mlp breaks the law of once .* ran 2 times"):
        find_blocks(model, TOKENS[:, :16])


@pytest.mark.parametrize("shape", ["deepseek", "top_p", "grouped", "iterated"])
@torch.inference_mode()
def test_a_mask_equals_a_gate_that_gives_no_logit(folders: Folders, shape: str) -> None:
    moe, raw = open_declared(folders(shape), contract_of(shape)), open_raw(folders(shape))
    ids, expert = TOKENS, 3
    before = moe.model(input_ids=ids).logits
    assert (before - raw(input_ids=ids).logits).abs().max() < 1e-4
    bias_E = torch.zeros(8)
    bias_E[expert] = -torch.inf
    with tilted(moe.blocks, Tilts({block.layer: bias_E for block in moe.blocks})):
        masked = moe.model(input_ids=ids).logits
    for name, module in raw.named_modules():
        if re.search(r"\.(gate|router|gate\.\d)$", name) and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, _x, z: z + bias_E)
    wanted = raw(input_ids=ids).logits
    assert (wanted - before).abs().max() > 1e-2
    assert (masked - wanted).abs().max() < 1e-4
    assert torch.equal(moe.model(input_ids=ids).logits, before)


@torch.inference_mode()
def test_a_cut_on_disk_equals_the_mask(
    expertcut: Commands, folders: Folders, quiz: Path, tmp_path: Path
) -> None:
    contract, model = contract_of("deepseek"), folders("deepseek")
    trusted = "--trust-remote-code"
    asked = f"{model} --quiz {quiz} --split val --shots 0"
    expertcut(f"profile {asked} --contract {contract} {trusted} --out p")
    expertcut(f"prune --profile p --keep 6 --rescale-gates off --out cut {trusted}")
    plan = json.loads(Path("cut/plan.json").read_text())
    moe, biases = open_declared(model, contract), {}
    for block in moe.blocks:
        bias_E = torch.full((8,), -torch.inf)
        bias_E[plan["blocks"][block.name]["keep"]] = 0.0
        biases[block.layer] = bias_E
    before = moe.model(input_ids=TOKENS).logits
    with tilted(moe.blocks, Tilts(biases)):
        masked = moe.model(input_ids=TOKENS).logits
    cut = open_declared(tmp_path / "cut", contract)
    assert [block.n_experts for block in cut.blocks] == [6, 6]
    assert (masked - before).abs().max() > 1e-2
    assert (cut.model(input_ids=TOKENS).logits - masked).abs().max() < 1e-5


def test_later_commands_take_the_contract_from_the_profile(
    expertcut: Commands, folders: Folders, quiz: Path, tmp_path: Path
) -> None:
    contract = tmp_path / "own.py"
    contract.write_text((CONTRACTS / "iterated.py").read_text())
    model, trusted = folders("iterated"), "--trust-remote-code"
    asked = f"--quiz {quiz} --split val --shots 0"
    line = f"profile {model} {asked} --contract {contract} --out p"
    assert f"--contract {contract} is code that runs" in expertcut(line, status=2)
    expertcut(f"{line} {trusted}")
    info = json.loads(Path("p/profile.json").read_text())["model"]
    assert info["contract"]["path"] == str(contract) and len(info["contract"]["sha256"]) == 64
    shown = expertcut("show p --wide")
    assert "mlp.1" in shown or "3" in shown
    expertcut("prune --profile p --sparsity 0.5 --plan-only --out plan")
    expertcut(f"audit --profile p --sample 2 --out a {trusted}")
    said = expertcut("audit --profile p --sample 2 --out b", status=2)
    assert "declares the blocks of" in said and said.count("\n") == 1
    said = expertcut(f"prune --profile p --sparsity 0.5 --out cut {trusted}", status=2)
    assert "one expert serves several calls of its block" in said and said.count("\n") == 1
    expertcut(f"trace {model} {asked} --contract {contract} {trusted} --out t")
    expertcut(f"eval {model} {asked} --contract {contract} {trusted} --out r.json")
    contract.write_text(contract.read_text() + "\n")
    said = expertcut(f"audit --profile p --sample 2 --out c {trusted}", status=2)
    assert "is not the contract that was profiled with" in said and said.count("\n") == 1
    said = expertcut(f"{line} {trusted}", status=2)
    assert "with another contract" in said and said.count("\n") == 1
