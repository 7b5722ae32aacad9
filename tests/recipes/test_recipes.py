"""Recipes: what they may say, what runs and why, and that nothing runs that need not."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from expertcut.commands import UI
from expertcut.edits.placement_results import load_placement, trace_hash
from expertcut.edits.plan import load_plan
from expertcut.errors import OutputError, PlanError, RecipeError
from expertcut.evaluation.dispatch_results import load_dispatch
from expertcut.profiling.trace import load_trace
from expertcut.recipes import RunSettings, run
from expertcut.recipes.recipe_schema import MAX_BYTES, MAX_DEPTH, read_recipe
from expertcut.recipes.stage_runs import Outcome
from expertcut.recipes.stages import stages_of
from tests.conftest import make_checkpoint, write_quiz

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
CODE = """
import sys
import time
from expertcut.cli import main
try:
    main()
except SystemExit as ending:
    print("STATUS", ending.code)
print("LOADED", *(name for name in ("torch", "transformers", "scipy") if name in sys.modules))
"""
TEXT = """
model: {model}
quiz: {quiz}
shots: 2
threads: 1
profile: {{split: val}}
show:
variants:
- name: cut
  prune: {{keep: 5, verify: false}}
- name: tilted
  reweight: {{boost_best: 1, by: appearances, strength: 0.5, layout: exact, verify: false}}
eval: {{split: test, limit: 4}}
"""
ALL = ("profile", "show", "cut", "tilted", "eval")


class Listener(UI):
    """Remembers why each stage ran."""

    def __init__(self) -> None:
        self.why: dict[str, str] = {}
        self.said: list[str] = []

    def say(self, tables: object, sentences: list[str]) -> None:
        self.said += sentences
        for sentence in sentences:
            if found := re.match(r"\n?\[(.+)\] (?:is current|(?:would run|runs): (.+))", sentence):
                self.why[found[1]] = found[2] or ""


class Place:
    """A recipe with a model and a quiz of its own, and the folder of its run."""

    def __init__(self, root: Path) -> None:
        self.root, self.file, self.folder = root, root / "small.yaml", root / "run"
        self.model, self.quiz = root / "model", root / "quiz"
        self.why: dict[str, str] = {}
        self.said: list[str] = []

    def write(self, text: str = TEXT) -> None:
        self.file.write_text(text.format(model=self.model, quiz=self.quiz))

    def change(self, old: str, new: str) -> None:
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))

    def run(self, **options: object) -> Outcome:
        listener = Listener()
        try:
            return run(RunSettings(recipe=self.file, out=self.folder, **options), listener)  # type: ignore[arg-type]
        finally:
            self.why, self.said = listener.why, listener.said

    def contents(self) -> dict[str, bytes]:
        files = [f for f in self.folder.rglob("*") if f.is_file()]
        return {f.relative_to(self.folder).as_posix(): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A complete run; its recipe has relative paths, so that it may be copied elsewhere."""
    place = Place(tmp_path_factory.mktemp("recipes"))
    make_checkpoint(place.model, "olmoe")
    write_quiz(place.quiz, {"dev": 2, "val": 5, "test": 8})
    place.model, place.quiz = Path("model"), Path("quiz")
    place.write()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)
        assert place.run().ran == ALL
    return place


@pytest.fixture
def done(ran: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of the complete run, to do things to; one is in its folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ran.root, tmp_path, dirs_exist_ok=True)
    place = Place(tmp_path)
    place.model, place.quiz = Path("model"), Path("quiz")
    return place


def test_a_run_makes_all_its_files_and_says_what_they_were_made_from(ran: Place) -> None:
    made = ran.contents()
    for name in ("profile/profile.json", "show/tables.md", "show/experts.csv", "results.json"):
        assert made[name]
    text = ran.file.read_bytes()
    copies = ("recipe.yaml", "variants/cut/recipe.yaml", "variants/tilted/recipe.yaml")
    assert all(made[name] == text for name in copies)
    manifest = json.loads(made["manifest.json"])
    assert tuple(manifest["stages"]) == ALL
    assert all(record["output"] for record in manifest["stages"].values())
    assert manifest["stages"]["eval"]["versions"]["torch"]
    results = json.loads(made["results.json"])
    paths = [Path(model["path"]).name for model in results["models"]]
    assert paths == ["model", "cut", "tilted"]
    assert results["models"][0]["questions"] == 12


def test_a_second_run_does_nothing_and_without_heavy_libraries(done: Place) -> None:
    assert done.run().ran == ()  # notes the times of the copied files
    before = done.contents()
    finished = subprocess.run(
        [sys.executable, "-c", CODE, "run", "small.yaml", "--out", "run"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = finished.stdout.splitlines()
    assert lines[:5] == [f"[{name}] is current" for name in ALL]
    assert lines[5:] == [
        "run: nothing to do, all 5 stages are current (--from profile runs them again)",
        "STATUS 0",
        "LOADED",
    ]
    assert done.contents() == before


def rewrite_question(file: Path) -> None:
    lines = file.read_text().splitlines()
    lines[0] = lines[0].replace("?", " then?")
    file.write_text("\n".join(lines) + "\n")


def touch_all(done: Place) -> None:
    for root in (done.model, done.quiz, done.folder):
        for file in root.rglob("*"):
            os.utime(file, ns=(1, 1))


def remove_result(done: Place) -> None:
    (done.folder / "results.json").unlink()


def damage_profile(done: Place) -> None:
    chunk = next((done.folder / "profile" / "chunks").iterdir())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")


def damage_variant(done: Place) -> None:
    (done.folder / "variants" / "cut" / "config.json").write_text("{}")


def change_test_question(done: Place) -> None:
    rewrite_question(done.quiz / "test" / "old_clocks_test.csv")


def change_late_test_question(done: Place) -> None:
    """Beyond what eval's limit lets in, but what judges variants."""
    file = done.quiz / "test" / "old_clocks_test.csv"
    lines = file.read_text().splitlines()
    lines[-1] = lines[-1].replace("?", " then?")
    file.write_text("\n".join(lines) + "\n")


def respell_quiz(done: Place) -> None:
    """Other bytes that ask the same."""
    file = done.quiz / "val" / "old_clocks_val.csv"
    file.write_bytes(file.read_bytes().replace(b"\r\n", b"\n"))


def change_model(done: Place) -> None:
    make_checkpoint(done.model, "olmoe", seed=1)


TOUCHED: dict[str, tuple[Callable[[Place], None], tuple[str, ...], str]] = {
    "times alone": (touch_all, (), ""),
    "other bytes of the same quiz": (respell_quiz, (), ""),
    "a limit": (
        lambda done: done.change("limit: 4", "limit: 3"),
        ("eval",),
        "limit is 3, was 4",
    ),
    "a comment": (lambda done: done.change("shots: 2", "shots: 2 # as before"), (), ""),
    "one variant": (
        lambda done: done.change("strength: 0.5", "strength: 1.5"),
        ("tilted", "eval"),
        "reweight.strength is 1.5, was 0.5",
    ),
    "a question that judges and is evaluated": (
        change_test_question,
        ("cut", "tilted", "eval"),
        "split test of the quiz changed",
    ),
    "a result": (remove_result, ("eval",), "results.json is gone"),
    # What is made again comes out the same, so nothing after it has to be.
    "a chunk of the profile": (damage_profile, ("profile",), "is not what it wrote"),
    "a checkpoint": (damage_variant, ("cut",), "variants/cut/config.json is not what it wrote"),
    "the model": (change_model, ALL, "the model changed"),
}


@pytest.mark.parametrize("what", TOUCHED)
def test_touching_one_input_redoes_just_what_depends_on_it(done: Place, what: str) -> None:
    touch, expected, why = TOUCHED[what]
    before = done.contents()
    touch(done)
    dry = done.run(dry_run=True).ran
    assert set(expected) <= set(dry) and bool(expected) == bool(dry)
    assert done.run().ran == expected
    if expected:
        assert why in done.why[expected[0]]
        assert done.run().ran == ()
    else:
        assert done.contents().keys() == before.keys()


def test_a_question_beyond_a_limit_does_not_concern_what_has_it(done: Place) -> None:
    change_late_test_question(done)
    assert done.run(dry_run=True).ran == ("cut", "tilted", "eval")
    assert done.why["eval"] == "cut runs before it"
    assert done.why["cut"] == "split test of the quiz changed"


def test_a_dry_run_writes_nothing_and_says_why(done: Place) -> None:
    done.change("limit: 4", "limit: 3")
    before = done.contents()
    assert done.run(dry_run=True).ran == ("eval",)
    assert done.contents() == before
    shutil.rmtree(done.folder)
    assert done.run(dry_run=True).ran == ALL
    assert set(done.why.values()) == {"not run yet"}
    assert not done.folder.exists()


def test_from_a_stage_on_all_is_redone(done: Place) -> None:
    assert done.run(dry_run=True, start="tilted").ran == ("tilted", "eval")
    assert done.run(dry_run=True, start="prune").ran == ("cut", "tilted", "eval")
    assert done.run(start="eval").ran == ("eval",)
    assert done.why["eval"] == "--from asks for it"
    with pytest.raises(RecipeError, match="did you mean profile"):
        done.run(start="profil")


def test_a_killed_run_goes_on_where_it_was(done: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    done.change("limit: 4", "limit: 3")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("expertcut.evaluation.evaluate.save_answers", killed)
        done.run()
    assert done.run().ran == ("eval",)
    assert done.why["eval"] == "it was begun and not finished"


def test_a_stage_that_fails_is_named_and_what_was_done_stays(done: Place) -> None:
    done.change("keep: 5", "keep: 1")
    with pytest.raises(PlanError, match=r"^cut: --keep 1 does not fit"):
        done.run()
    assert (done.folder / "variants" / "cut" / "config.json").is_file()  # the old one
    done.change("keep: 1", "keep: 5")
    assert done.run().ran == ("cut",)  # and nothing after it, for it came out as before


def test_what_the_recipe_did_not_make_is_never_replaced(done: Place) -> None:
    shutil.rmtree(done.folder)
    mine = done.folder / "variants" / "cut" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(OutputError, match="was not made by this recipe"):
        done.run()
    assert mine.read_text() == "mine"


def test_variants_that_leave_the_recipe_are_named_and_stay(done: Place) -> None:
    done.change("- name: cut\n  prune: {keep: 5, verify: false}\n", "")
    outcome = done.run()
    assert outcome.ran == ("eval",)
    assert "cut is no longer read" in done.why["eval"].replace("stage ", "")
    assert outcome.left_over == ("cut",)
    assert (done.folder / "variants" / "cut").is_dir()


def test_a_search_that_finds_nothing_makes_no_checkpoint_and_the_run_goes_on(
    done: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertcut.edits.router_edits import Settled
    from expertcut.evaluation.reweight_search import TuningResult

    def nothing(*_: object) -> TuningResult:
        return TuningResult((), Settled(()), (), (), 0.5, {}, None)  # type: ignore[arg-type]

    monkeypatch.setattr("expertcut.evaluation.reweight_search.decide", nothing)
    for name in ("sentences", "tables"):
        patched = f"expertcut.reporting.edit_tables.decision_{name}"
        monkeypatch.setattr(patched, lambda _: [])
    done.change("strength: 0.5", "tune: true")
    assert done.run().ran == ("tilted", "eval")
    assert "tilted made no checkpoint, so none is scored" in done.said
    results = json.loads((done.folder / "results.json").read_text())
    assert len(results["models"]) == 2
    assert not (done.folder / "variants" / "tilted" / "config.json").exists()


def test_the_page_and_the_card_are_of_what_the_run_made(done: Place) -> None:
    with done.file.open("a") as file:
        file.write("report:\npublish: [{variant: cut, repo: owner/name, dry_run: true}]\n")
    outcome = done.run()
    assert outcome.ran == ("report", "publish cut")
    page = (done.folder / "report.html").read_text()
    assert "tilted" in page and "cut" in page
    cut = done.folder / "variants" / "cut"
    assert (cut / "report.html").read_text() == page
    assert "model-index" in (cut / "README.md").read_text()
    noted = json.loads((done.folder / "publish" / "cut.json").read_text())
    assert noted["repo"] == "owner/name" and noted["commit"] is None
    assert done.run().ran == ()  # what publishing put beside a checkpoint is not of the checkpoint
    card = done.folder / "variants/cut/README.md"
    before = card.read_text()
    card.unlink()  # and what is gone of it, or another's, is put there again
    assert done.run().ran == ("publish cut",)
    assert card.read_text() == before


def test_a_dispatch_chooses_between_the_models_of_the_run_and_of_other_results(
    done: Place,
) -> None:
    done.change("limit: 4", "limit: 8")
    with done.file.open("a") as file:
        file.write("dispatch: {as: symbolic, most: 2, results: [other.json]}\nreport:\n")
    with pytest.raises(RecipeError, match=r"'other\.json' does not exist"):
        done.run()
    done.change(", results: [other.json]", "")
    assert done.run().ran == ("eval", "dispatch", "report")
    found = load_dispatch(done.folder)
    assert [Path(model.path).name for model in found.models] == ["model", "cut", "tilted"]
    assert (found.questions, found.asked.way, found.asked.most) == (24, "symbolic", 2)
    assert (done.folder / "routes.csv").is_file()
    page = (done.folder / "report.html").read_text()
    assert "Dispatch by subject" in page and "equal votes" in page
    assert done.run().ran == ()
    done.change("most: 2", "most: 1")
    assert done.run().ran == ("dispatch", "report")
    assert done.why["dispatch"] == "most is 1, was 2"
    other = done.root / "other.json"
    for name, copy in (
        ("results.json", other),
        ("predictions.parquet", "other.predictions.parquet"),
    ):
        shutil.copyfile(done.folder / name, done.root / copy)
    done.change("most: 1", "most: 1, results: other.json")
    assert done.run(dry_run=True).ran == ("dispatch", "report")
    assert done.run().ran[0] == "dispatch"
    assert load_dispatch(done.folder).asked.results == (
        str(done.folder / "results.json"),
        "other.json",
    )
    other.write_text(other.read_text() + "\n")
    assert done.run(dry_run=True).ran == ("dispatch", "report")
    assert done.why["dispatch"] == "other.json changed"


def test_a_trace_is_a_stage_of_its_own(done: Place) -> None:
    with done.file.open("a") as file:
        file.write("trace: {tokens: 1k, weights: true}\nreport:\n")
    assert done.run().ran == ("trace", "report")
    trace = load_trace(done.folder / "trace")
    assert 0 < trace.info.n_tokens <= 1000 and trace.info.settings.weights
    assert done.run().ran == ()
    done.change("tokens: 1k", "tokens: 500")
    assert done.run().ran == ("trace", "report")
    assert done.why["trace"] == "tokens is '500', was '1k'"
    assert load_trace(done.folder / "trace").info.n_tokens <= 500


def test_a_placement_is_a_stage_behind_the_trace(done: Place) -> None:
    with done.file.open("a") as file:
        file.write("trace: {tokens: 1k}\nplace: {devices: 2}\nreport:\n")
    assert done.run().ran == ("trace", "place", "report")
    found = load_placement(done.folder / "placement")
    assert found.devices == 2 and found.trace == trace_hash(load_trace(done.folder / "trace"))
    assert "Placement: placement" in (done.folder / "report.html").read_text()
    assert done.run().ran == ()
    done.change("place: {devices: 2}", "place: {cache: 2, csv: true}")
    assert done.run().ran == ("place", "report")
    assert (done.folder / "placement" / "cache.csv").is_file()
    assert not (done.folder / "placement" / "placement.json").exists()


def test_loads_are_evened_out_by_the_trace_of_the_run(done: Place) -> None:
    tilted = "{boost_best: 1, by: appearances, strength: 0.5, layout: exact, verify: false}"
    done.change(tilted, "{balance: 0.5, layout: exact, verify: false}")
    with done.file.open("a") as file:
        file.write("trace: {tokens: 1k, logits: true, split: val}\n")
    assert done.run().ran == ("trace", "tilted", "eval")  # the trace comes before its variant
    plan = load_plan(done.folder / "variants" / "tilted")
    assert plan.balance is not None and plan.balance.target == 0.5
    assert done.run().ran == ()
    done.change("balance: 0.5", "balance: 0.2")
    assert done.run().ran == ("tilted", "eval")
    done.change("tokens: 1k", "tokens: 900")
    assert done.run().ran[:2] == ("trace", "tilted")


def test_a_merge_is_a_variant_too(done: Place) -> None:
    done.change("prune: {keep: 5, verify: false}", "merge: {keep: 5, verify: false}")
    assert done.run().ran == ("cut", "eval")
    cut = done.folder / "variants" / "cut"
    assert json.loads((cut / "plan.json").read_text())["action"].startswith("merge --keep 5")
    assert (cut / "recipe.yaml").read_bytes() == done.file.read_bytes()


def test_a_branch_of_the_hub_means_in_a_run_what_it_meant_first(tmp_path: Path) -> None:
    from expertcut.recipes.manifest import Inputs, Manifest
    from expertcut.recipes.recipe_schema import Recipe

    recipe, commit = Recipe(model="owner/name"), "a" * 40
    assert Inputs(recipe, None, is_anew=False).model() is None
    before = Manifest(model="owner/name@main", commit=commit)
    assert Inputs(recipe, before, is_anew=False).model() == f"owner/name@{commit}"
    assert Inputs(recipe, before, is_anew=True).model() is None
    other = Recipe(model="owner/name", revision="v2")
    assert Inputs(other, before, is_anew=False).model() is None
    pinned = Recipe(model="owner/name", revision="b" * 40)
    assert Inputs(pinned, before, is_anew=True).model() == f"owner/name@{'b' * 40}"


HOSTILE = {
    "model: !!python/object/apply:os.system [ls]": "tags are not read",
    "model: x\nsubjects: &a [b]\nvariants: *a": "anchors and aliases are not read",
    "model: &a x": "anchors and aliases are not read",
    "model: x\nmodel: y": "the key 'model' comes twice",
    "model: " + "[" * 5000: f"more than {MAX_DEPTH} levels",
    "model: \x1b[31m": "not allowed",
    "model: x\n? [a]\n: 1": "a key must be a word",
    "model: [": "expected the node content",
    "model: x\n---\nmodel: y": "another document",
    "model: x\nshots: " + "9" * 5000: "value that cannot be read",
    '"\\e[31m": 1': r"unknown key '\x1b[31m'",
    "": "holds nothing",
    "- a": "holds a list",
    "model: 3": "at model: must be a valid string, not 3",
    "model: x\nshots: true": "at shots: must be a valid integer, not True",
    "model: x\nthreads: 0": "at threads: must be greater than or equal to 1",
    "model: x\nvariants: [{name: a, prune: {keep_fraction: .inf}}]": "keep_fraction",
    "modle: x": "unknown key 'modle': did you mean model?",
    "model: x\nvariants: [{name: a, prune: {keep-active: true}}]": "did you mean keep_active?",
    "model: x\nzzzzzzzz: 1": "it may have model, revision",
    "model: x\nvariants: [{name: a}]": "a variant does one thing",
    "model: x\nvariants: [{name: ../a, prune: }]": "at variants.0.name",
    "model: x\nvariants: [{name: eval, prune: }]": "taken by the run itself",
    "model: x\nvariants: [{name: a, prune: }, {name: a, prune: }]": "two variants are called a",
    "model: x\nvariants: [{name: a, prune: , prove: }]": "leave prove out",
    "model: x\npublish: [{variant: a, repo: b/c}]": "which is not a variant",
    "model: x\npublish: [{variant: a, repo: me x}]": "'me x' is not a repository: write OWNER/NAME",
    "model: x\nvariants: [{name: a, prune: {keep: 4, by: reep}}]": "did you mean reap?",
    "model: x\nvariants: [{name: a, reweight: {boost: 'x:1'}}]": "'x:1' is not an expert: write 12",
    "model: /nope/model": "'/nope/model' does not exist: give an existing path",
    "model: x\nquiz: nope.jsonl": "'nope.jsonl' does not exist",
    "model: x\ndtype: fp12": "'fp12' is not a dtype",
    "model: x\ndispatch:": "dispatch requires the answers of eval to a quiz",
    "model: x\nprofile: {text: a}\neval: {text: a}\ndispatch:": "dispatch requires the",
    "model: x\neval:\ndispatch:": "dispatch chooses between models: add variants",
    "model: x\neval:\nvariants: [{name: dispatch, prune: }]\ndispatch:": "taken by the run itself",
    "model: x\ntrace: {tokens: 1M, logits: true}": "logits are kept of at most 65,536 tokens",
    "model: x\ntrace: {text: a, shots: 0}": "unknown key 'shots'",
    "model: x\nvariants: [{name: trace, prune: }]\ntrace:": "taken by the run itself",
    "model: x\nplace: {devices: 4}": "place reads a trace of the run: add trace",
    "model: x\nvariants: [{name: a, reweight: {balance: 0.1}}]": "a trace of the run with logits",
    "model: x\nvariants: [{name: a, reweight: {balance: 0.1}}]\ntrace:": "trace with logits: true",
    "model: x\nvariants: [{name: a, reweight: {balance: 0.1, tune: true}}]": "give --tune in a com",
    "model: x\nvariants: [{name: a, reweight: {balance: 1}, prove: }]": "give --cross-fit in a com",
    "model: x\ntrace:\nplace:": "give --devices N or --cache C",
    "model: x\ntrace:\nplace: {devices: 4, write: true}": "unknown key 'write'",
    "model: x\neval:\ndispatch: {by: skills.csv}": "skills.csv is not there",
    "model: x\neval:\ndispatch: {by: routing}": "--by routing reads a profile",
    "model: x\neval:\ndispatch: {by: fish}": "must be subject, routing or a .csv file",
    "model: x\neval:\ndispatch: {max_bytes: many}": "is not a size",
    "model: x\neval:\ndispatch: {out: x}": "unknown key 'out'",
}


def test_one_value_may_stand_where_several_may(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: x\nsubjects: law\nvariants: [{name: a, reweight: {boost: 3:12}}]")
    recipe = read_recipe(file)
    assert recipe.subjects == ["law"]
    assert recipe.variants[0].reweight is not None
    assert recipe.variants[0].reweight.boost == ["3:12"]


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_recipe_holds_at_worst_one_line_comes_of_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    started = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert HOSTILE[text] in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert time.monotonic() - started < 2


def test_a_recipe_of_unusual_size_or_encoding_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"model: x\n" + b"#" * MAX_BYTES)
    with pytest.raises(RecipeError, match="More than 256 KiB"):
        read_recipe(file)
    file.write_bytes(b"model: \xff")
    with pytest.raises(RecipeError, match="byte 7 is not UTF-8"):
        read_recipe(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path)


def test_experts_are_what_they_look_like(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: x\nrevision: 2024-01-01\nshots: 012\n"
        "variants: [{name: a, reweight: {boost: [12, 3:12, 3:12=0.25]}}]\nshow:"
    )
    recipe = read_recipe(file)
    # YAML 1.1 makes 192 of 3:12, 10 of 012 and a day of the revision.
    assert recipe.variants[0].reweight is not None
    assert recipe.variants[0].reweight.boost == ["12", "3:12", "3:12=0.25"]
    assert (recipe.revision, recipe.shots) == ("2024-01-01", 12)
    assert recipe.show is not None and recipe.report is None


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_say_what_they_would_do_without_a_model(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = read_recipe(file)
    assert Path(recipe.model).is_dir() or len(recipe.revision or "") == 40
    outcome = run(
        RunSettings(recipe=file, out=tmp_path / "run", dry_run=True, confirm_run_unsafe_code=True)
    )
    assert outcome.ran == tuple(stage.name for stage in stages_of(recipe))
    assert {"profile", "eval"} < set(outcome.ran)
    assert not (tmp_path / "run").exists()


def test_the_shipped_recipes_are_these() -> None:
    names = {"quickstart", "olmoe-mmlu", "qwen3-30b-half", "domain-prune", "code"}
    assert {file.stem for file in SHIPPED} == names


def test_the_quiz_of_the_domain_recipe_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from expertcut.data import load_quiz

    monkeypatch.chdir(ROOT)
    recipe = read_recipe(ROOT / "recipes" / "domain-prune.yaml")
    asked = [a for stage in stages_of(recipe) for a in stage.questions]
    assert {a.split for a in asked} == {"val", "test"}
    texts = [
        q.text
        for split in ("val", "test")
        for q in load_quiz(next(a for a in asked if a.split == split))
    ]
    assert len(texts) == len(set(texts)) == 40


def test_several_processes_are_sent_to_the_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from expertcut.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["expertcut", "run", str(SHIPPED[0])])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 2
    assert "a recipe runs in one process" in capsys.readouterr().err
