"""docs/families.md against what the tiny models of each family do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertcut.models import validate
from expertcut.models.hooks import Routing, observe_routers
from tests.conftest import FAMILIES, PADDED_FAMILIES, Commands, open_model
from tests.support.matrix import facts_line, facts_of, table

Checkpoints = Callable[..., Path]
TOKENS = torch.arange(2, 200)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_the_family_does(checkpoint: Checkpoints, family: str) -> None:
    facts = facts_of(checkpoint(family))
    assert facts_line(family, facts) in table("families")
    assert (family in PADDED_FAMILIES) == (facts["scored"] == "padded")


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_chosen_and_weighed_by_alpha_as_the_page_says(
    checkpoint: Checkpoints, family: str
) -> None:
    moe = open_model(checkpoint(family))
    routings: list[Routing] = []
    with observe_routers(moe.blocks, routings.append), torch.inference_mode():
        moe.model(input_ids=TOKENS, use_cache=False)
    for block, seen in zip(moe.blocks, routings, strict=True):
        alpha_TE = block.alpha(seen.logits_TE)
        score_TE = alpha_TE + (block.selection_bias() if block.selection_bias() is not None else 0)
        last_T1 = score_TE.gather(1, seen.experts_TK).min(dim=1, keepdim=True).values
        is_better_TE = (score_TE > last_T1).scatter(1, seen.experts_TK, False)
        # Within the groups that were used nobody better was passed over.
        group_E = torch.arange(block.n_experts) * block.n_groups // block.n_experts
        is_used_TE = (group_E[seen.experts_TK][:, :, None] == group_E).any(dim=1)
        assert not (is_better_TE & is_used_TE).any()
        assert is_better_TE.any() if block.n_groups > 1 else not is_better_TE.any()
        ratio_TK = seen.weights_TK / alpha_TE.gather(1, seen.experts_TK)
        is_even_T = (ratio_TK.amax(1) / ratio_TK.amin(1) - 1).abs() < 1e-4
        assert bool(is_even_T.all()) == (family != "phimoe")
        is_constant = bool((ratio_TK.max() / ratio_TK.min() - 1).abs() < 1e-4)
        assert is_constant == block.inflates


def test_a_routing_rule_in_a_layer_that_is_the_block_is_refused_in_one_line(
    expertcut: Commands, checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path
) -> None:
    model = checkpoint("gemma4_text")
    said = expertcut(f"route {model} --rule skip --at 0.5 --quiz {quiz_folder}", status=2)
    assert "beside other modules of the decoder layer" in said.splitlines()[-1]
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_family_that_no_test_runs_is_loaded_with_a_warning(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_model(checkpoint("olmoe"))
    assert "is not tested" not in caplog.text
    monkeypatch.setattr(validate, "TESTED", validate.TESTED - {"olmoe"})
    open_model(checkpoint("olmoe"))
    assert "config.json: model_type olmoe is not tested (docs/families.md)" in caplog.text
