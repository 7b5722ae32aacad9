"""How passes are computed changes no answer: products, experts, attention, the last block."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.errors import ModelError
from expertcut.models.hooks import observe_routers
from expertcut.models.kernels import Linear, by_expert, linear
from expertcut.models.load import MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.measure import HALVED, Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring import attention, passes
from expertcut.scoring.attention import Split, groups
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Encoded, encode
from expertcut.scoring.passes import PassObserver, reading_answers
from tests.conftest import PADDED_FAMILIES, SUBJECTS, open_model

Checkpoints = Callable[..., Path]


@pytest.fixture
def quiz(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), shots=2))


def encoded(moe: MoeModel, quiz: Quiz) -> Encoded:
    subject = SUBJECTS[0]
    return encode(moe.tokenizer, quiz.questions[subject], quiz.shots_by_subject[subject])


def test_products_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 33), torch.randn(5, 33), torch.randn(5)
    for given in (
        (x, weight),
        (x, weight, bias),
        (x.double(), weight.double()),
        (x[:, :0], weight),
    ):
        torch.testing.assert_close(linear(*given), torch.nn.functional.linear(*given))
    strided = torch.randn(33, 5).T
    torch.testing.assert_close(linear(x, strided), torch.nn.functional.linear(x, strided))
    layer = Linear(33, 5)
    layer(x).sum().backward()  # where gradients are wanted, torch's own product gives them
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_each_expert_gets_the_tokens_that_chose_it_and_no_more() -> None:
    torch.manual_seed(0)
    x_TD, weights_TK = torch.randn(50, 3), torch.rand(50, 2)
    experts_TK = torch.stack([torch.randperm(6)[:2] for _ in range(50)])
    seen: dict[int, Tensor] = {}

    def see(expert: int, tokens_M: Tensor, weights_M: Tensor, output_MD: Tensor) -> None:
        seen[expert] = tokens_M
        assert torch.equal(output_MD, x_TD[tokens_M] * (expert + 1))
        assert torch.equal(weights_M, weights_TK[tokens_M][experts_TK[tokens_M] == expert])

    y_TD = by_expert(x_TD, experts_TK, weights_TK, 6, lambda e, x_MD: x_MD * (e + 1), see)
    expected = x_TD * (weights_TK * (experts_TK + 1)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(y_TD, expected)
    for expert, tokens_M in seen.items():
        assert (
            sorted(tokens_M.tolist()) == (experts_TK == expert).any(dim=1).nonzero()[:, 0].tolist()
        )
    assert sorted(seen) == list(range(6))


def test_groups_hold_each_token_of_a_pack_once_with_few_fillings() -> None:
    lengths_N = torch.tensor([1, 9, 3, 8, 2, 31, 1, 15, 16])
    found = groups(lengths_N)
    tokens = torch.cat([places_MS[is_own_MS] for places_MS, is_own_MS in found])
    assert sorted(tokens.tolist()) == list(range(int(lengths_N.sum())))
    assert len(found) > 2
    for _, is_own_MS in found:
        assert int(is_own_MS.sum()) * 2 > is_own_MS.numel()


def test_split_attention_equals_the_masked_one(different_moe: MoeModel, quiz: Quiz) -> None:
    chunk = encoded(different_moe, quiz)
    family = different_moe.model.config.model_type
    engine = Engine(different_moe, batch_tokens=200)
    engine.check(chunk)
    assert (engine.attention == "split") == (family != "gpt_oss")  # which has no sdpa
    if family in PADDED_FAMILIES or family == "gpt_oss":
        return
    split_NC = engine.score(chunk)
    engine.attention = "masked"
    assert (engine.score(chunk) - split_NC).abs().max() < 1e-5


def test_where_the_kernel_reads_beyond_shared_keys_each_head_gets_its_own(
    checkpoint: Checkpoints, quiz: Quiz, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch before 2.9; `make lowest` runs all tests with such a one."""
    moe = open_model(checkpoint("olmoe"))
    assert moe.model.config.num_key_value_heads < moe.model.config.num_attention_heads
    engine, chunk = Engine(moe, batch_tokens=200), encoded(moe, quiz)
    shared_NC = engine.score(chunk)
    flash, n_heads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, []

    def watched(query: Tensor, key: Tensor, *rest: object, **more: object) -> object:
        n_heads.append((query.shape[1], key.shape[1]))
        return flash(query, key, *rest, **more)

    monkeypatch.setattr(attention, "_SUPPORTS_GROUPED_QUERIES", False)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", watched)
    own_NC = engine.score(chunk)
    assert set(n_heads) == {(4, 4)}
    assert (own_NC - shared_NC).abs().max() < 1e-5


def test_the_prefix_is_never_copied(
    checkpoint: Checkpoints, quiz: Quiz, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = open_model(checkpoint("olmoe"))
    updates: list[int] = []
    update = DynamicLayer.update

    def counted(self: DynamicLayer, keys: Tensor, *args: object, **kwargs: object) -> object:
        updates.append(keys.shape[2])
        return update(self, keys, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(DynamicLayer, "update", counted)
    chunk = encoded(moe, quiz)
    Engine(moe, batch_tokens=150).score(chunk)
    assert not updates  # where the masked way adds each pack's keys behind a copy of the prefix's
    engine = Engine(moe, batch_tokens=150)
    engine.attention = "masked"
    engine.score(chunk)
    assert updates[0] == chunk.shared_prefix() and len(updates) > 2 * len(moe.blocks)


def test_where_split_attention_is_wrong_a_mask_is_taken(
    checkpoint: Checkpoints,
    quiz: Quiz,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    moe = open_model(checkpoint("olmoe"))
    chunk = encoded(moe, quiz)
    expected_NC = Engine(moe, batch_tokens=150).score(chunk)

    class Wrong(Split):
        def __call__(self, *args: object, **kwargs: object) -> tuple[Tensor, None]:
            return super().__call__(*args, **kwargs)[0] * 1.5, None  # type: ignore[arg-type]

    caplog.set_level("INFO", "expertcut")
    monkeypatch.setattr(passes, "Split", Wrong)
    engine = Engine(moe, batch_tokens=150)
    engine.check(chunk)
    assert (engine.attention, engine.is_trusted) == ("masked", True)
    assert "using a mask" in caplog.text
    assert (engine.score(chunk) - expected_NC).abs().max() < 1e-5


def test_the_last_block_runs_for_answers_alone_and_the_rest_changes_no_bit(
    different_moe: MoeModel, quiz: Quiz
) -> None:
    chunk = encoded(different_moe, quiz)
    engine = Engine(different_moe, batch_tokens=3 * chunk.longest)
    rows: list[tuple[int, int]] = []
    with observe_routers(
        different_moe.blocks, lambda seen: rows.append((seen.layer, len(seen.logits_TE)))
    ):
        answers_NC = engine.score(chunk, watch=PassObserver())
        of_answers = [n for layer, n in rows if layer == len(different_moe.blocks) - 1]
        rows.clear()
        all_NC = engine.score(chunk, watch=PassObserver(keeps_all=True))
    assert sum(of_answers) == len(chunk)
    by_layer = [
        sum(n for at, n in rows if at == layer) for layer in (0, len(different_moe.blocks) - 1)
    ]
    assert by_layer[0] == by_layer[1] > 2 * len(chunk)
    assert torch.equal(all_NC, answers_NC)
    assert (engine.score(chunk) - answers_NC).abs().max() < 1e-5
    assert torch.equal(engine.score(chunk, watch=PassObserver()), answers_NC)


class ByToken(nn.Module):
    """A block that takes tokens with or without a batch, and their ids as hash routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: set[int] = set()

    def forward(self, x: Tensor, ids: Tensor | None = None, scale: float = 1.0) -> Tensor:
        assert ids is not None and ids.shape == x.shape[:-1]
        self.ranks.add(x.ndim)
        return x * ids[..., None] * scale


@pytest.mark.parametrize("shape", [(12,), (1, 12), (3, 4)])
def test_the_last_block_is_called_in_the_rank_that_the_model_calls_it_in(
    shape: tuple[int, ...],
) -> None:
    module, answers_N, seen = ByToken(), torch.tensor([3, 7, 11]), []
    x, ids = torch.randn(*shape, 5), torch.arange(12).reshape(shape)
    block = cast(MoeBlock, SimpleNamespace(module=module, residual=None))

    def told(rows_M: Tensor, is_read: bool) -> None:
        seen.append((rows_M.tolist(), is_read))

    with reading_answers(block, answers_N, PassObserver(on_rows=told, keeps_all=True)):
        y = module(x, ids=ids, scale=2.0)
    is_answer = torch.isin(ids, answers_N)[..., None]
    assert torch.equal(y, module(x, ids, 2.0) * is_answer) and y.any()
    assert module.ranks == {x.ndim}
    assert seen == [([3, 7, 11], True), ([0, 1, 2, 4, 5, 6, 8, 9, 10], False)]


def test_a_model_whose_last_layer_is_dense_runs_whole(checkpoint: Checkpoints, quiz: Quiz) -> None:
    moe = open_model(checkpoint("qwen2_moe", mlp_only_layers=[1]))
    assert Engine(moe, 200).last_layer is None
    assert Engine(open_model(checkpoint("olmoe")), 200).last_layer == 1


class Small:
    """A machine that has memory for passes of so many tokens only."""

    def __init__(self, moe: MoeModel, n_tokens: int, error: Exception) -> None:
        self.n_tokens, self.error = n_tokens, error
        # The last layer fails, when the others have been seen.
        self.handle = moe.blocks[-1].module.register_forward_pre_hook(self.check)
        embedding = moe.model.get_input_embeddings()
        embedding.register_forward_hook(self.note)

    def note(self, _module: object, _args: object, out: Tensor) -> None:
        self.seen = out.shape[1]

    def check(self, _module: object, _args: object) -> None:
        if self.seen > self.n_tokens:
            raise self.error


ERRORS = (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no"))


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_a_pass_that_runs_out_of_memory_comes_again_in_halves(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, error: Exception, caplog
) -> None:
    whole = profiled(open_model(checkpoint("olmoe")), quiz, tmp_path / "whole")
    moe = open_model(checkpoint("olmoe"))
    measurement = Measurement(moe, quiz, None, MeasureOptions(batch_tokens=1000))
    n_prefix = encoded(moe, quiz).shared_prefix()
    Small(moe, n_prefix + 100, error)
    with caplog.at_level(logging.WARNING):
        list(measurement.run(tmp_path / "halved"))
    halved = load_profile(tmp_path / "halved")
    assert "halves" in caplog.text
    assert all(HALVED in chunk for chunk in halved.chunks)
    assert not any(HALVED in chunk for chunk in whole.chunks)
    assert halved.info == whole.info
    assert_alike(halved, whole)


def profiled(moe: MoeModel, quiz: Quiz, folder: Path) -> Profile:
    list(Measurement(moe, quiz, None, MeasureOptions(batch_tokens=1000)).run(folder))
    return load_profile(folder)


def assert_alike(halved: Profile, whole: Profile) -> None:
    """Nothing was counted twice, and nothing was lost."""
    for name in ("tokens", "weight", "norm", "weighted_norm"):
        one, other = halved.token_sum(name), whole.token_sum(name)
        assert one is not None and other is not None and other.sum() > 1
        np.testing.assert_allclose(one, other, rtol=1e-5)
    for name in ("alpha_NLE", "choice_logprob_NC", "gap_N"):
        np.testing.assert_allclose(halved.array(name), whole.array(name), atol=1e-5)


def test_one_prompt_that_does_not_fit_is_said_so_and_other_errors_stay(
    checkpoint: Checkpoints, quiz: Quiz
) -> None:
    for error, expected in ((ERRORS[0], ModelError), (RuntimeError("another"), RuntimeError)):
        moe = open_model(checkpoint("olmoe"))
        chunk = encoded(moe, quiz)
        engine = Engine(moe, batch_tokens=200)
        Small(moe, 20, error)
        watch = PassObserver(undo=lambda _: None)
        with pytest.raises(expected, match=r"memory|another"):
            engine.score(Encoded(chunk.prompts, chunk.choice_ids), watch=watch)
