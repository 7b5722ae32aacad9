"""`reweight --balance`: biases even out the loads of experts, where these are uneven."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertcut.edits.balance import (
    Gate,
    Tokens,
    balance_layer,
    balancing_bias,
    fitting_gate,
    max_violation,
)
from expertcut.edits.plan import BlockEdit, load_plan
from expertcut.errors import ProfileError
from expertcut.models.checkpoint_dir import read_config
from expertcut.profiling.schema import BlockInfo
from expertcut.profiling.trace import Sequence, load_trace
from tests.conftest import Commands, open_model, slow_but

E, K, T = 8, 2, 60
Array = np.ndarray[Any, Any]


def block_of(**changes: Any) -> BlockInfo:
    known = {"name": "model.layers.0.mlp", "experts": E, "top_k": K, "scoring": "softmax"}
    return BlockInfo(**{**known, "inflates": False, "groups": 1, "top_groups": 1, **changes})


def sequence_of(logits_TE: Array, n_shared: int = 0, seed: int = 0) -> Sequence:
    """A sequence of one layer that goes to the K largest logits."""
    logits_TE = logits_TE.astype(np.float16)
    experts_TK = np.argsort(-logits_TE.astype(np.float32), axis=1)[:, :K]
    ids_T = np.random.default_rng(seed).integers(0, 99, len(logits_TE))
    ids_T[:n_shared] = np.arange(n_shared)
    return Sequence(experts_TK[:, None], ids_T, n_shared, logits_TLE=logits_TE[:, None])


def random_halves(shift_E: Array, n: int = 20) -> tuple[list[Sequence], list[Sequence]]:
    chance = np.random.default_rng(0)
    made = [sequence_of(chance.normal(size=(T, E)) + shift_E, seed=i) for i in range(2 * n)]
    return made[::2], made[1::2]


def test_a_router_that_is_even_keeps_b_at_0() -> None:
    even_TE = np.array([np.roll(np.arange(E)[::-1], t) for t in range(2 * E)])
    layer = balance_layer(([sequence_of(even_TE)], [sequence_of(even_TE)]), 0, block_of(), 0.1)
    assert not layer.bias_E.any()
    loads = layer.loads
    assert loads.tuned == loads.held_out == loads.behind == (0.0, 0.0) and loads.kept == 1.0
    assert loads.smallest == (1.0, 1.0)


@pytest.mark.parametrize("selection_E", [None, np.linspace(0, 0.01, E)])
def test_an_expert_of_three_times_the_load_is_evened_out_on_other_sequences_too(
    selection_E: Array | None,
) -> None:
    halves = random_halves(np.where(np.arange(E) == 5, 1.7, 0.0))
    layer = balance_layer(halves, 0, block_of(), 0.05, selection_E=selection_E)
    loads = layer.loads
    assert loads.tuned[0] > 1.8 > 0.05 >= loads.tuned[1]
    assert loads.held_out[0] > 1.8 > 0.2 > loads.held_out[1]
    assert loads.behind == loads.held_out  # no shots
    assert loads.smallest[0] < 0.8 < loads.smallest[1]
    assert loads.heaviest == pytest.approx(1 / (20 * T * K / E))  # no two tokens are alike
    assert layer.bias_E.argmin() == 5
    assert layer.bias_E.mean() == pytest.approx(0, abs=1e-6)
    # b stands on α where the family has a selection bias, on logits elsewhere.
    assert np.abs(layer.bias_E).max() < 1 if selection_E is not None else layer.bias_E[5] < -1.2
    assert 0.5 < loads.kept < 0.95


@pytest.mark.parametrize("seed", range(3))
def test_steps_get_short_enough_to_even_loads_out_to_a_few_tokens(seed: int) -> None:
    chance, block = np.random.default_rng(seed), block_of()
    shift_E = chance.normal(size=E)
    halves = [sequence_of(chance.normal(size=(T, E)) + shift_E, seed=i) for i in range(20)]
    tokens = Tokens.of(halves, 0, block)
    bias_E = balancing_bias(tokens, Gate(block), 0.01)  # 3 of 300 tokens
    chosen_TK = Gate(block).choose(tokens.logits_TE, torch.from_numpy(bias_E).float())
    assert max_violation(tokens.load(chosen_TK, E)) <= 0.01


def test_tokens_of_equal_logits_move_as_one_and_set_the_floor() -> None:
    chance = np.random.default_rng(0)
    alike_TE = np.repeat(chance.normal(size=(1, E)), 40, axis=0)  # K experts get all of these
    made = [sequence_of(np.concatenate([alike_TE, chance.normal(size=(40, E))])) for _ in range(8)]
    loads = balance_layer((made[::2], made[1::2]), 0, block_of(), 0.1).loads
    assert loads.heaviest == pytest.approx(40 / (80 * K / E))
    assert loads.tuned[0] > loads.tuned[1] >= loads.heaviest - 1 > 0.1


def test_a_constant_expert_keeps_its_bias_and_counts_for_no_load() -> None:
    (tuning, _), block = random_halves(np.where(np.arange(E) == 5, 1.7, 0.0)), block_of()
    tokens = Tokens.of(tuning, 0, block)
    bias_E = balancing_bias(tokens, Gate(block), 0.05, constant=[5])
    load_E = tokens.load(Gate(block).choose(tokens.logits_TE, torch.from_numpy(bias_E)), E)
    assert bias_E[5] == 0
    assert load_E[5] > 2.5 * np.delete(load_E, 5).mean()
    assert max_violation(load_E, [5]) <= 0.05


def test_shots_count_once_for_each_question_that_has_them() -> None:
    chance, block = np.random.default_rng(1), block_of()
    shots_TE = chance.normal(size=(9, E))
    whole = [
        sequence_of(np.concatenate([shots_TE, chance.normal(size=(n, E))]), n_shared=9, seed=n)
        for n in (3, 5, 7)
    ]
    tokens = Tokens.of(whole, 0, block)
    assert len(tokens.logits_TE) == 9 + 3 + 5 + 7
    every_TK = np.concatenate([sequence.experts_TLK[:, 0] for sequence in whole])
    wanted_E = np.bincount(every_TK.ravel(), minlength=E)
    assert tokens.load(tokens.experts_TK, E).tolist() == wanted_E.tolist()
    behind = Tokens.of(whole, 0, block, has_shots=False)
    own_TK = np.concatenate([sequence.experts_TLK[9:, 0] for sequence in whole])
    assert behind.experts_TK.tolist() == own_TK.tolist() and set(behind.weight_T.tolist()) == {1}
    chosen_TK = Gate(block).choose(tokens.logits_TE, torch.zeros(E))
    assert tokens.same(chosen_TK, tokens.experts_TK) == 1.0


def test_choices_that_do_not_follow_from_the_logits_are_refused() -> None:
    sequence = sequence_of(np.random.default_rng(0).normal(size=(T, E)))
    tokens = Tokens.of([sequence], 0, block_of())
    with pytest.raises(ProfileError, match="would not act as said"):
        fitting_gate(tokens, block_of(), np.linspace(-1, 1, E))
    bare = Sequence(sequence.experts_TLK, sequence.token_T)
    with pytest.raises(ProfileError, match="keeps no logits"):
        Tokens.of([bare], 0, block_of())


@pytest.fixture
def traced(
    expertcut: Commands, checkpoint: Callable[..., Path], quiz_folder: Path
) -> Callable[..., Path]:
    """A model's folder, with its trace in `t`."""

    def make(family: str, **changes: object) -> Path:
        model = checkpoint(family, **changes)
        asked = f"--quiz {quiz_folder} --split val --shots 0"
        expertcut(f"trace {model} {asked} --logits --out t")
        return model

    return make


def loads(trace: Path) -> list[float]:
    """MaxVio of each layer."""
    found = load_trace(trace)
    chosen_TLK = np.concatenate([s.experts_TLK for s in found.sequences()])
    return [
        max_violation(np.bincount(chosen_TLK[:, layer].ravel(), minlength=E))
        for layer in range(len(found.block_names))
    ]


@pytest.mark.parametrize(
    "family",
    slow_but(
        ("deepseek_v3", "lfm2_moe"), ["deepseek_v3", "minimax_m2", "lfm2_moe", "ernie4_5_moe"]
    ),
)
def test_a_family_with_a_selection_bias_gets_it_there_and_keeps_its_weights(
    expertcut: Commands,
    traced: Callable[..., Path],
    quiz_folder: Path,
    tmp_path: Path,
    family: str,
) -> None:
    model = traced(family)
    said = expertcut("reweight --balance 0.1 --trace t --out out --wide")
    assert "MaxVio" in said and "of the choices stay" in " ".join(said.split())
    assert "of the choices stay" in " ".join(expertcut("show out").split())
    plan = load_plan(tmp_path / "out")
    first, _ = load_trace(tmp_path / "t").halves()
    assert plan.chosen_on.questions == len(first) and plan.criterion == "load"
    assert (plan.layout, plan.action) == ("stock", "reweight --balance 0.1")
    assert all(edit.selection and not edit.bias for edit in plan.blocks.values())
    assert plan.balance is not None and plan.balance.blocks.keys() == plan.blocks.keys()
    assert all(own.tuned[0] > own.tuned[1] for own in plan.balance.blocks.values())
    against_base, against_exact = plan.proof.held_out
    assert against_exact.max_abs_logprob_diff < 1e-4 < against_base.max_abs_logprob_diff
    before, after = open_model(model), open_model(tmp_path / "out")
    for old, new, edit in zip(before.blocks, after.blocks, plan.blocks.values(), strict=True):
        moved_E = new.selection_bias() - old.selection_bias()
        wanted_E = torch.tensor([edit.selection.get(e, 0.0) for e in range(E)])
        torch.testing.assert_close(moved_E, wanted_E.to(moved_E), rtol=1e-3, atol=2e-6)
    gates = [[p for n, p in m.model.named_parameters() if "bias" not in n] for m in (before, after)]
    assert all(torch.equal(a, b) for a, b in zip(*gates, strict=True))
    expertcut(f"trace {tmp_path / 'out'} --quiz {quiz_folder} --split val --shots 0 --out after")
    # Later layers see other tokens than those that were traced.
    assert loads(tmp_path / "after")[0] < 0.15 < loads(tmp_path / "t")[0]


def test_another_family_gets_biases_of_its_gates_in_layout_exact(
    expertcut: Commands,
    traced: Callable[..., Path],
    quiz_folder: Path,
    tmp_path: Path,
    modules_cache: None,
) -> None:
    traced("olmoe")
    expertcut("reweight --balance 0.1 --trace t --layout exact --out out")
    plan = load_plan(tmp_path / "out")
    assert [sorted(edit.bias) for edit in plan.blocks.values()] == [[*range(E)]] * 2
    assert plan.proof.held_out[1].max_abs_logprob_diff < 1e-4
    asked = f"--quiz {quiz_folder} --split val --shots 0 --logits"
    expertcut(f"trace out {asked} --out t2")  # later layers see other tokens now
    expertcut("reweight --balance 0.1 --trace t2 --layout exact --out out2 --no-verify")
    expertcut(f"trace out2 {asked} --out t3")
    first, second, third = (loads(tmp_path / name) for name in ("t", "t2", "t3"))
    assert max(first) > max(second) > max(third)
    expertcut("report out")
    assert "choices kept" in (tmp_path / "out" / "report.html").read_text()
    again = expertcut("reweight --balance 30 --trace t --layout exact --out none")
    assert "no checkpoint, for the loads are within 30 already" in " ".join(again.split())
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_balanced_is_refused(
    expertcut: Commands,
    traced: Callable[..., Path],
    quiz_folder: Path,
) -> None:
    model = traced("olmoe", num_experts=16, rope_theta=5e3)
    asked = f"--quiz {quiz_folder} --split val --shots 0"
    expertcut(f"trace {model} {asked} --out bare")
    expertcut(f"trace {model} {asked} --logits --tokens 40 --out short")
    for words, why in {
        "--balance 0.1": "needs --trace TRACE",
        "--trace t": "needs --balance",
        "--balance 0.1 --trace t --boost 0:3": "give --boost in a command of its own",
        "--balance 0.1 --trace t --cross-fit": "give --cross-fit in a command of its own",
        "--balance 0.1 --trace short --layout exact": "has one sequence",
        "--balance 0.1 --trace bare": "keeps no router logits",
        "--balance 0.1 --trace t --profile p": "leave --profile out",
        "--balance 0.1 --trace t": "take --layout exact",
        "--balance 0.1 --trace nowhere": "no trace in nowhere",
    }.items():
        line = expertcut(f"reweight {words}", status=2)
        assert line.count("\n") == 1 and why in line, line
    (model / "config.json").write_text(json.dumps(read_config(model) | {"rope_theta": 7.0}))
    line = expertcut("reweight --balance 0.1 --trace t --layout exact", status=2)
    assert line.count("\n") == 1 and "another model" in line, line
    with pytest.raises(ValueError, match="does not stay"):
        BlockEdit(keep=(0, 1), selection={2: 0.5})
