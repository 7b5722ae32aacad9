"""`custom_generate/` of rule contrast: the words that two whole runs choose, one by one."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertcut.checkpoints.build import add_files
from expertcut.checkpoints.routed import check_contrast, contrast_files
from expertcut.errors import ContractError
from expertcut.models import contrast_generate
from expertcut.models.load import MoeModel
from expertcut.models.routing_rule import RoutingRule
from expertcut.scoring.contrast import contrasted
from expertcut.scoring.rerouting import Rerouting, rerouted
from tests.conftest import FAMILIES, open_model, slow_but
from tests.support.exact_models import logprobs
from tests.support.routed_models import load_plainly, make_routed, routed_plan

Checkpoints = Callable[..., Path]
PROMPTS = ("Which of these birds is green?", "An old clock", "Trees that are tall stand in a row.")
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}

pytestmark = pytest.mark.usefixtures("modules_cache")


def against(moe: MoeModel, rank: int, beta: float = 3.0) -> Rerouting:
    layers = [block.layer for block in moe.blocks]
    return Rerouting(RoutingRule(rule="contrast"), dict.fromkeys(layers, float(rank)), {}, beta)


def most_of(moe: MoeModel) -> int:
    """The rank of an expert that the router did not choose, where its gate allows one."""
    try:
        against(moe, 2).rule.check(moe.blocks[0], 2)
    except ContractError:
        return 1
    return 2


def written(moe: MoeModel, folder: Path, routing: Rerouting) -> dict[str, Any]:
    """How `generate` is asked for the contrast."""
    folder.mkdir(exist_ok=True)
    add_files(folder, contrast_files(moe, routing))
    return {"custom_generate": str(folder), "trust_remote_code": True}


@torch.inference_mode()
def two_runs(moe: MoeModel, ids_T: Tensor, routing: Rerouting) -> tuple[Tensor, Tensor]:
    """Log p (1, V) of the next token in the model as it is, and in the weak run."""

    def run() -> Tensor:
        logits_V: Tensor = moe.model(input_ids=ids_T[None], use_cache=False).logits[:, -1]
        return logits_V.float().log_softmax(dim=-1)

    strong_1V = run()
    with rerouted(moe.blocks, routing):
        return strong_1V, run()


def by_definition(moe: MoeModel, prompt: str, routing: Rerouting) -> list[int]:
    """The tokens that scoring/contrast.py ranks first, each after both runs of the whole text."""
    ids_T = moe.tokenizer(prompt, return_tensors="pt").input_ids[0]
    n_before = len(ids_T)
    for _ in range(GREEDY["max_new_tokens"]):
        best_1 = contrasted(*two_runs(moe, ids_T, routing), routing.beta).argmax(dim=1)
        ids_T = torch.cat([ids_T, best_1])
    return ids_T[n_before:].tolist()


# Selection biases, sliding windows, and caches of recurrent layers.
QUICK = ("olmoe", "deepseek_v3", "gpt_oss", "lfm2_moe", "qwen3_next")


@pytest.mark.parametrize("family", slow_but(QUICK, FAMILIES))
def test_the_weak_run_of_every_family_is_that_of_the_rule(
    checkpoint: Checkpoints, family: str
) -> None:
    moe = open_model(checkpoint(family))
    before, routing = logprobs(moe.model), against(moe, most_of(moe))
    assert set(contrast_files(moe, routing)) == {
        "custom_generate/generate.py",
        "custom_generate/modeling_routed.py",
    }
    code = contrast_files(moe, routing)["custom_generate/generate.py"].decode()
    said: dict[str, Any] = {}
    line = next(line for line in code.splitlines() if line.startswith("EXPERT_ROUTING"))
    exec(line.replace(": dict[str, Any]", ""), said)
    with rerouted(moe.blocks, routing):
        expected = logprobs(moe.model)
    routers = contrast_generate.weak_routers(moe.model, said["EXPERT_ROUTING"])
    with contrast_generate.weakly_routed(routers):
        assert (logprobs(moe.model) - expected).abs().max() < 1e-4
    assert (expected - before).abs().max() > 0.1
    assert torch.equal(logprobs(moe.model), before)


@pytest.mark.parametrize("family", QUICK)
def test_greedy_words_are_those_of_two_whole_runs_alone_and_in_a_padded_batch(
    checkpoint: Checkpoints, family: str, tmp_path: Path
) -> None:
    moe = open_model(checkpoint(family))
    routing = against(moe, most_of(moe))
    also = written(moe, tmp_path / "both", routing)
    expected = [by_definition(moe, prompt, routing) for prompt in PROMPTS]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(moe.source.path), moe.tokenizer
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        own = tokenizer(prompt, return_tensors="pt")
        found = model.generate(own.input_ids, **GREEDY, **also)
        assert found[0, own.input_ids.shape[1] :].tolist() == tokens
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    asked = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **GREEDY}
    start = batch.input_ids.shape[1]
    assert (batch.attention_mask == 0).any()
    assert model.generate(**asked, **also)[:, start:].tolist() == expected
    plain = model.generate(**asked)[:, start:].tolist()
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) > 1, "the rule did nothing"
    slow = model.generate(**asked, **also, use_cache=False)[:, start:].tolist()
    assert slow == expected


def test_drawn_words_are_never_unlikely(checkpoint: Checkpoints, tmp_path: Path) -> None:
    moe = open_model(checkpoint("olmoe"))
    routing = against(moe, 2)
    also = written(moe, tmp_path / "both", routing)
    torch.manual_seed(0)
    ids_T = moe.tokenizer(PROMPTS[0], return_tensors="pt").input_ids[0]
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 3, "top_k": 0}
    found_BT = moe.model.generate(ids_T[None], **options, **also)
    assert len({tuple(row) for row in found_BT.tolist()}) == 3
    for row_T in found_BT:
        for at in range(len(ids_T), len(row_T)):
            strong_V = two_runs(moe, row_T[:at], routing)[0][0]
            assert strong_V[row_T[at]] >= strong_V.max() + math.log(0.1) - 1e-4


def test_a_folder_of_the_model_writes_so_by_itself(checkpoint: Checkpoints, tmp_path: Path) -> None:
    moe = open_model(checkpoint("olmoe"))
    shutil.copytree(moe.source.path, tmp_path / "own")
    also = written(moe, tmp_path / "own", against(moe, 2))
    own = moe.tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    expected = moe.model.generate(own, **GREEDY, **also)
    assert not torch.equal(moe.model.generate(own, **GREEDY), expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=True)
    assert torch.equal(model.generate(own, **GREEDY), expected)
    for file in (tmp_path / "own/custom_generate").iterdir():
        assert not re.search(r"^\s*(from|import) expertcut", file.read_text(), re.M)


@pytest.mark.parametrize(
    "given", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"penalty_alpha": 0.6}]
)
def test_what_does_not_write_token_by_token_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, given: dict[str, Any]
) -> None:
    moe = open_model(checkpoint("olmoe"))
    also = written(moe, tmp_path / "both", against(moe, 2))
    before = moe.model.forward
    with pytest.raises(ValueError, match=f"leave out {next(iter(given))}"):
        moe.model.generate(torch.arange(5)[None], **GREEDY, **given, **also)
    assert moe.model.forward == before


def test_routers_that_are_not_the_familys_own_are_refused(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    make_routed(moe, routed_plan(moe, "skip", 0.7), tmp_path / "routed")
    load_plainly(tmp_path / "routed")
    with pytest.raises(ContractError, match="has a routing rule already \\(skip\\): contrast"):
        check_contrast(open_model(tmp_path / "routed").source)
