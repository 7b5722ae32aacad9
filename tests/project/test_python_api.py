"""The Python API does what the commands do, on the same settings, and shows it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

import expertcut as api
from expertcut.errors import PlanError, ProfileError, SettingsError
from expertcut.evaluation.results import load_results
from expertcut.profiling.storage import load_profile
from tests.conftest import Commands

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


@pytest.fixture
def model(
    checkpoint: Callable[..., Path],
    quiz_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, dict[str, object]]:
    """A tiny model and the quiz that it is asked; one is in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return checkpoint("olmoe"), {"quiz": str(quiz_folder), "shots": 1, "threads": 1}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_profile_and_saved_plans_are_those_of_the_commands(model, expertcut: Commands):
    base, quiz = model
    profile = api.profile(base, split="val", out=Path("a"), **quiz)
    words = ("--quiz", quiz["quiz"], "--shots", 1, "--threads", 1)
    expertcut("profile", base, *words, "--split", "val", "--out", "b")
    ours, theirs = load_profile(Path("a")), load_profile(Path("b"))
    assert ours.info == theirs.info and len(ours.chunks) == len(theirs.chunks) > 0
    of = ("--profile", "a", "--out")
    plans = {
        "cut": (profile.prune(keep=5, by="ean_sum"), ("prune", *of, "cut2", "--keep", 5)),
        "tilt": (profile.reweight(boost=["1:2=0.5"]), ("reweight", *of, "tilt2")),
        "merged": (profile.merge(keep=5), ("merge", *of, "merged2", "--keep", 5)),
    }
    more = {"cut": ("--by", "output_norm"), "tilt": ("--boost", "1:2=0.5"), "merged": ()}
    for name, (plan, command) in plans.items():
        saved = plan.save(name)
        expertcut(*command, *more[name])
        assert files(Path(name)) == files(Path(f"{name}2")) and "plan.json" in files(Path(name))
        assert saved.plan.action.startswith(command[0]) and name in repr(saved)
        assert set(saved.held_out.questions) == {33}


def test_experts_are_a_table_with_the_criteria(model):
    base, quiz = model
    profile = api.profile(base, split="val", **quiz)
    experts = profile.experts
    assert isinstance(experts, pd.DataFrame) and len(experts) == 2 * 8
    assert experts.expert.tolist() == [*range(8)] * 2
    assert {"layer", "appearances", "tokens", "reap", "activations"} <= set(experts)
    best = experts.sort_values(["layer", "reap"], ascending=[True, False]).groupby("layer").head(5)
    plan = profile.prune(keep=5, by="reap", protect=["none"])
    kept = plan.experts[plan.experts.kept]
    assert kept.expert.tolist() == best.sort_values(["layer", "expert"]).expert.tolist()
    with pytest.raises(SettingsError, match="when it is saved"):
        _ = profile.merge(keep=5).experts


@pytest.mark.parametrize("kind", ["prune", "merge"])
def test_simulating_answers_as_the_saved_checkpoint(model, kind: str):
    base, quiz = model
    profile = api.profile(base, split="val", **quiz)
    options = {"keep": 5, **({"rescale_gates": "off"} if kind == "prune" else {})}
    plan = getattr(profile, kind)(**options)
    before = {file for file in Path().rglob("*") if "chunks" not in file.parts}
    simulated = plan.simulate()
    assert {file for file in Path().rglob("*") if "chunks" not in file.parts} == before
    evaluated = api.evaluate([base, plan.save("edited")], split="test", **quiz)
    assert evaluated.first == simulated
    assert simulated.questions == 33 and 0 < simulated.accuracy < 1
    assert evaluated.models.path.tolist() == [str(base), "edited"]
    assert evaluated.comparisons.delta[0] == simulated.delta


def test_a_plan_is_judged_on_texts_as_the_saved_checkpoint(model, tmp_path: Path):
    base, quiz = model
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "{"bees fly over heather " * n}"}}\n' for n in (3, 5, 8)))
    plan = api.profile(base, split="val", **quiz).prune(keep=5)
    found = plan.evaluate(text=[str(texts)])
    saved = api.evaluate([base, plan.save("edited")], text=[str(texts)])
    assert found.texts.value.tolist() == saved.texts.value.tolist()
    base_row, edited_row = (
        found.texts[found.texts.path == path].value.iloc[0] for path in found.texts.path.unique()
    )
    assert base_row != edited_row


def test_a_bias_acts_while_it_is_simulated(model):
    base, quiz = model
    profile = api.profile(base, split="val", **quiz)
    plan = profile.reweight(suppress=["0:1=30", "1:2=30", "1:4=30"], boost=["0:3=30"])
    found = plan.simulate()
    assert found.gained + found.lost > 0


def test_what_is_evaluated_can_be_kept(model):
    base, quiz = model
    found = api.evaluate([base], out=Path("r.json"), limit=2, **quiz)
    assert load_results(Path("r.json")) == found.results
    assert len(found.comparisons) == 0


def test_healing_and_reports_return_what_they_wrote(model):
    base, quiz = model
    profile = api.profile(base, split="val", **quiz)
    cut = profile.prune(keep=5).save("cut")
    del quiz["threads"]
    quick = {"steps": 1, "batch": 2, "micro_batch": 2, "rank": 1, "verify": False}
    healed = api.heal(cut, **quiz, **quick)
    assert healed.plan.action.startswith("heal") and healed.plan.healed_from
    assert api.report(profile.path, out=Path("page.html")).read_text().startswith("<!doctype html>")


def test_what_a_command_refuses_is_an_error_of_one_line(model):
    base, quiz = model
    profile = api.profile(base, split="val", **quiz)
    wrong = {
        "did you mean keep": {"kep": 3},
        "--keep: must be a valid integer": {"keep": "many"},
        "did you mean reap": {"keep": 5, "by": "reep"},
        "a sweep is not a plan": {"sweep": "0.5"},
    }
    for message, options in wrong.items():
        with pytest.raises(SettingsError, match=message) as refused:
            profile.prune(**options)
        assert "\n" not in str(refused.value)
    with pytest.raises(PlanError, match="keep 2 to 8"):
        profile.prune(keep=99)


def test_a_trace_is_that_of_the_command(model, expertcut: Commands):
    base, quiz = model
    words = ("--quiz", quiz["quiz"], "--shots", 1, "--threads", 1)
    trace = api.trace(base, **quiz, tokens=900, out="a")
    expertcut("trace", base, *words, "--tokens", 900, "--out", "b")
    assert files(Path("a/chunks")) == files(Path("b/chunks"))
    loaded = api.load_trace("b")
    n_tokens = sum(len(s) - s.n_shared for s in loaded.sequences())
    assert 0 < n_tokens <= trace.stored.info.n_tokens <= 900
    assert "sequences" in repr(trace) and "8 experts" in loaded._repr_html_()


def test_loads_are_evened_out_as_by_the_command(
    model, checkpoint: Callable[..., Path], expertcut: Commands, modules_cache
):
    base, quiz = model
    profile = api.profile(base, split="val", **quiz)
    trace = api.trace(base, **quiz, tokens=900, logits=True, out="t")
    plan = profile.reweight(balance=0.5, trace=trace.path, layout="exact")
    saved = plan.save("a", verify=False)
    expertcut("reweight --balance 0.5 --trace t --layout exact --no-verify --out b")
    assert Path("b/plan.json").read_bytes() == Path("a/plan.json").read_bytes()
    assert saved.experts.bias.tolist() == plan.experts.bias.tolist()
    assert plan.simulate(limit=2, split="test").questions == 6
    api.trace(checkpoint("olmoe", seed=1), **quiz, tokens=900, logits=True, out="u")
    with pytest.raises(ProfileError, match="another model"):
        profile.reweight(balance=0.5, trace="u", layout="exact")


def test_a_placement_is_that_of_the_command(model, expertcut: Commands):
    base, quiz = model
    api.trace(base, **quiz, tokens=900, out="t")
    placed = api.place("t", devices=2)
    expertcut("place t --devices 2 --out p")
    assert Path("p/placement.json").read_bytes() == placed.json_bytes()
    assert api.place("t", cache=2, out="c").experts == 2 and Path("c/cache.json").is_file()


def test_every_object_shows_itself_in_a_notebook(model):
    base, quiz = model
    profile = api.profile(base, split="val", **quiz)
    plan = profile.prune(keep=5)
    for shown, fact in ((profile, "accuracy"), (plan, "5 of 8, 5 of 8"), (plan.simulate(), "p =")):
        assert fact in repr(shown) and fact in shown._repr_html_()
    assert "&lt;b&gt;" in api.api.Evaluation(_named("<b>"))._repr_html_()


def _named(path: str) -> object:
    from types import SimpleNamespace

    return SimpleNamespace(models=[SimpleNamespace(path=path, accuracy=0.5, ci95=(0.0, 1.0))])


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, expertcut; assert 'evaluate' in dir(expertcut); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "pandas", "numpy", "pydantic"}.isdisjoint(done.stdout.split())
    with pytest.raises(AttributeError, match="has no attribute 'prunes'"):
        _ = api.prunes


def test_the_notebook_runs(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "quickstart").symlink_to(ROOT / "checkpoints" / "quickstart")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = [cell.source for cell in notebook.cells]
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(map(len, outputs)) >= 8 and kept
    assert not any(o.output_type == "error" for each in outputs for o in each)
