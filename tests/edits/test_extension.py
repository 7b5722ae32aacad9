"""One function is a criterion everywhere; one class is an edit from its plan to the card."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expertcut.checkpoints import export as exporting
from expertcut.checkpoints.build import BuildOptions, build
from expertcut.checkpoints.edit import Edit, LayoutWriter, Simulation, TensorChanges
from expertcut.checkpoints.export import edits_of
from expertcut.edits import criteria
from expertcut.edits.criteria import CRITERIA, criterion, criterion_name
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.layouts import Layout
from expertcut.edits.plan import EditPlan, PlanFile, load_plan
from expertcut.edits.selection import choose
from expertcut.errors import SettingsError
from expertcut.evaluation.search_results import load_sweep
from expertcut.hub.provenance import origin
from expertcut.models.load import LoadOptions
from expertcut.profiling.statistics import LayerStatistics
from expertcut.profiling.storage import Profile
from tests.conftest import Commands
from tests.support.pages import text_of


@pytest.fixture
def steadiest() -> Iterator[str]:
    @criterion(needs="profile", positions=("answer",), paper="2606.00001", aliases=("calm",))
    def steadiest(layer: LayerStatistics) -> criteria.Array:
        """−(expert id), so that the first experts stay."""
        return -np.arange(layer.n_experts, dtype=np.float64)

    yield "steadiest"
    criteria._REGISTRY.pop("steadiest")


def measured(expertcut: Commands, checkpoint: Callable[..., Path], quiz_folder: Path) -> None:
    model = (checkpoint("olmoe"), "--quiz", quiz_folder, "--split", "val")
    expertcut("profile", *model, "--shots", 1, "--out", "p")


def test_a_criterion_of_ten_lines_works_in_prune_sweep_and_show(
    steadiest: str, expertcut: Commands, checkpoint: Callable[..., Path], quiz_folder: Path
):
    measured(expertcut, checkpoint, quiz_folder)
    for name in (steadiest, "calm"):
        prune = ("prune", "--profile", "p", "--protect", "none", "--no-verify")
        expertcut(*prune, "--keep", 5, "--by", name, "--out", name)
        plan = load_plan(Path(name))
        assert (plan.criterion, plan.positions) == (steadiest, "answer")
        assert {edit.keep for edit in plan.blocks.values()} == {(0, 1, 2, 3, 4)}
    shown = json.loads(expertcut("show", "p", "--criteria", "--format", "json"))
    assert steadiest in shown["criteria"]
    sweep = ("prune", "--profile", "p", "--sweep", "0.5", "--protect", "none", "--limit", 2)
    expertcut(*sweep, "--by", "calm,random", "--quiz", quiz_folder, "--shots", 1, "--out", "s")
    cells = {cell.by: set(cell.keep.values()) for cell in load_sweep(Path("s")).cells}
    assert cells[steadiest] == {(0, 1, 2, 3)} and set(cells) == {steadiest, "random"}


def test_a_recipe_knows_the_same_criterion(
    steadiest: str, expertcut: Commands, checkpoint: Callable[..., Path], quiz_folder: Path
):
    prune = "{keep: 5, by: calm, protect: none, verify: false}"
    Path("r.yaml").write_text(
        f"model: {checkpoint('olmoe')}\nquiz: {quiz_folder}\nshots: 1\nprofile: {{split: val}}\n"
        f"variants:\n- name: cut\n  prune: {prune}\n"
    )
    expertcut("run", "r.yaml", "--out", "run")
    plan = load_plan(Path("run/variants/cut"))
    assert plan.criterion == steadiest
    assert {edit.keep for edit in plan.blocks.values()} == {(0, 1, 2, 3, 4)}


def test_names_and_aliases_lead_to_one_criterion():
    aliases = {alias: own.name for own in CRITERIA.values() for alias in own.aliases}
    assert {"frequency", "ean_sum", "ean_mean"} <= set(aliases)
    assert {criterion_name(alias): name for alias, name in aliases.items()} == {
        name: name for name in aliases.values()
    }
    assert [criterion_name(name) for name in CRITERIA] == list(CRITERIA)
    for wrong, hint in (("reep", "did you mean reap?"), ("7", "take one of activations, gate_")):
        with pytest.raises(SettingsError, match=hint) as refused:
            criterion_name(wrong)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("taken", ["reap", "frequency"])
def test_no_two_criteria_have_one_name(taken: str):
    before = dict(CRITERIA)
    with pytest.raises(ValueError, match=taken):

        @criterion(needs="nothing", aliases=(taken,))
        def another(n_experts: int, layer: int, seed: int) -> criteria.Array:
            """Nothing."""
            return np.zeros(n_experts)

    assert dict(CRITERIA) == before


def test_importing_the_criteria_loads_no_heavy_library():
    import subprocess
    import sys

    code = "import sys, expertcut.edits.criteria as c; print(len(c.CRITERIA), *sys.modules)"
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(names[0]) >= 12
    assert {"torch", "scipy", "transformers"}.isdisjoint(names)


# An edit


@dataclass(frozen=True)
class MarkEdit(Edit):
    """Changes no answer and leaves a tensor behind."""

    @classmethod
    def of(cls, plan: EditPlan | PlanFile) -> Self | None:
        return cls() if plan.action.endswith("--mark") else None

    def simulate(self, simulation: Simulation) -> None:
        RUNS.append(simulation.moe.source.id)

    def rewrite(self, _layout: LayoutWriter, tensors: TensorChanges) -> None:
        tensors.added["marker"] = torch.arange(3.0)

    def describe(self, _n_experts: int | None) -> list[str]:
        return ["The checkpoint carries a marker."]


RUNS: list[str] = []


@pytest.mark.parametrize("layout", ["stock", "exact"])
def test_an_edit_of_one_class_is_built_checked_and_reported(
    monkeypatch: pytest.MonkeyPatch,
    profile_of: Callable[..., Profile],
    tmp_path: Path,
    layout: Layout,
):
    monkeypatch.setattr(exporting, "EDITS", [*exporting.EDITS, MarkEdit])
    profile = profile_of("olmoe")
    cut = choose(profile, CutSettings(keep=5, layout=layout)).draft
    RUNS.clear()
    for plan, is_marked in ((replace(cut, action=f"{cut.action} --mark"), True), (cut, False)):
        folder = tmp_path / str(is_marked)
        built = build(profile, plan, folder, BuildOptions(LoadOptions()))
        assert built.proof is not None and built.proof.held_out[0].max_abs_logprob_diff > 0
        tensors = load_file(folder / "model.safetensors")
        assert ("marker" in tensors) == is_marked
        edits, n_experts = edits_of(load_plan(folder)), origin(folder).n_experts
        sentences = [sentence for edit in edits for sentence in edit.describe(n_experts)]
        assert ("The checkpoint carries a marker." in sentences) == is_marked
        assert ("The checkpoint carries a marker." in text_of(folder)) == is_marked
        assert len(RUNS) == 1  # the marked plan alone was simulated with it
        if is_marked:
            assert tensors.pop("marker").tolist() == [0, 1, 2]
            marked = tensors
    assert marked.keys() == tensors.keys()
    assert all(torch.equal(marked[name], tensor) for name, tensor in tensors.items())
