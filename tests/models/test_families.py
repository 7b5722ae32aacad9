"""docs/families.md against what the tiny models of each family do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertcut.checkpoints.exact import FAMILIES as EXACT_FAMILIES
from expertcut.checkpoints.tensor_names import match_blocks
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.safetensors_index import read_headers
from expertcut.models.validate import REFUSED
from tests.conftest import FAMILIES, PADDED_FAMILIES, open_model

Checkpoints = Callable[..., Path]
PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
TOKENS = torch.arange(2, 200)[None]


def table() -> dict[str, dict[str, str]]:
    """The rows of the page's first table by model_type."""
    first = PAGE[PAGE.index("| family") :].partition("\n\n")[0]
    lines = first.splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found = [dict(zip(head, row, strict=True)) for row in rows]
    return {row["`model_type`"].strip("`"): row for row in found}


def test_the_table_lists_the_families_that_the_tests_run() -> None:
    assert list(table()) == list(FAMILIES)
    assert all(f"`{family}`" in PAGE for family in REFUSED)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_the_family_does(checkpoint: Checkpoints, family: str) -> None:
    path, row = checkpoint(family), table()[family]
    blocks = open_model(path).blocks
    on_disk = next(iter(match_blocks(read_headers(path), [b.name for b in blocks])[0].values()))
    for block in blocks:
        assert block.scoring == row["α"]
        assert block.inflates == (row["gate weight"] == "α")
        assert (block.selection_bias() is not None) == (row["selection bias"] == "yes")
        assert (block.n_groups > 1) == (row["groups"] == "yes")
    assert (family in PADDED_FAMILIES) == (row["scored"] == "padded")
    assert bool(on_disk.by_expert) == (row["experts on disk"] == "one by one")
    layouts = "stock, exact" if family in EXACT_FAMILIES else "stock"
    assert row["layouts"] == layouts


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
