"""Any small plan becomes a checkpoint with exactly its experts, that loads and knows its plan."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertcut.checkpoints.tensor_names import find_disk_blocks
from expertcut.edits.plan import (
    BlockEdit,
    ChosenOn,
    EditPlan,
    PlanFile,
    PlanModel,
    load_plan,
    removed_experts,
    save_plan,
)
from expertcut.models.load import LoadOptions, Source, find_source, load
from expertcut.models.safetensors_index import read_headers
from tests.support.readable import FEW, edits
from tests.support.rewrites import Fitted, export, zero_outputs

N_EXPERTS, WIDTH = 8, 32
NAMES = ("model.layers.0.mlp", "model.layers.1.mlp")
Edits = dict[str, BlockEdit]


@pytest.fixture(scope="module")
def source(checkpoint: Callable[..., Path]) -> Source:
    return find_source(str(checkpoint("olmoe")))


@st.composite
def cuts(draw: st.DrawFn, *, is_even: bool) -> Edits:
    """Two blocks that keep at least top-k; layout stock equally many."""
    n_kept = draw(st.integers(2, N_EXPERTS))
    counts = [n_kept, n_kept if is_even else draw(st.integers(2, N_EXPERTS))]
    drawn = [draw(edits(N_EXPERTS, n)) for n in counts]
    return {name: BlockEdit(keep=e.keep) for name, e in zip(NAMES, drawn, strict=True)}


def exported(source: Source, draft: EditPlan, gathered: Fitted, folder: Path) -> PlanFile:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    export(source, draft, N_EXPERTS, gathered, folder)
    plan = PlanFile(
        model=PlanModel(id=source.id, revision=None, fingerprint=source.fingerprint),
        action=draft.action,
        criterion=draft.criterion,
        positions=draft.positions,
        removal="reroute" if draft.layout == "stock" else "constant",
        layout=draft.layout,
        chosen_on=ChosenOn(quiz="birds", split="test", questions=1, sha256="0" * 64),
        blocks=dict(draft.edits),
    )
    save_plan(folder, plan, ())
    return plan


def draft_of(edits: Edits, layout: str) -> EditPlan:
    about = ("cut", "fuzzed", "by hand", "answer")
    return EditPlan(*about, edits=edits, layout=layout, is_cut=True)  # type: ignore[arg-type]


@settings(FEW, max_examples=12)
@given(cuts(is_even=True))
def test_any_plan_of_layout_stock_is_what_is_exported(
    source: Source, tmp_path: Path, edits: Edits
) -> None:
    folder = tmp_path / "out"
    plan = exported(source, draft_of(edits, "stock"), Fitted(), folder)
    assert load_plan(folder) == plan
    before, after = load(source, LoadOptions()), load(find_source(str(folder)), LoadOptions())
    for old, new, edit in zip(before.blocks, after.blocks, edits.values(), strict=True):
        assert new.n_experts == len(edit.keep)
        kept = old.router.weight[list(edit.keep)]
        assert torch.equal(new.router.weight, kept)
        experts = old.experts.gate_up_proj[list(edit.keep)]
        assert torch.equal(new.experts.gate_up_proj, experts)


@settings(FEW, max_examples=12)
@given(cuts(is_even=False))
def test_any_plan_of_layout_exact_is_what_is_exported(
    source: Source, tmp_path: Path, edits: Edits
) -> None:
    folder = tmp_path / "out"
    constants = zero_outputs(removed_experts(edits, N_EXPERTS), WIDTH)
    plan = exported(source, draft_of(edits, "exact"), Fitted(constants=constants), folder)
    assert load_plan(folder) == plan
    on_disk = find_disk_blocks(read_headers(folder))
    for name, edit in edits.items():
        own = [e for e, its in enumerate(on_disk[name].by_expert) if its]
        assert tuple(own) == edit.keep
    options = LoadOptions(trust_remote_code=True)
    after = load(find_source(str(folder)), options)
    assert [block.n_experts for block in after.blocks] == [N_EXPERTS] * 2
