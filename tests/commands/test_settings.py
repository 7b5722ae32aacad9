"""One declaration of each option: the command line, recipes and Python are built from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from expertcut.cli import COMMANDS
from expertcut.cli.options import add_command
from expertcut.commands import UI, profile, prune, show, sweep
from expertcut.commands.prune import PruneSettings
from expertcut.commands.sweep import SweepSettings
from expertcut.edits.plan import load_plan
from expertcut.errors import SettingsError
from expertcut.recipes.recipe_schema import read_recipe
from expertcut.recipes.stages import stages_of
from expertcut.settings import IN_RECIPE, Settings, option, option_details
from tests.conftest import WORDS, Commands, help_of

OWN = {name: settings for _, name, settings, _ in COMMANDS}
NEEDED = {
    "show": ["there"],
    "merge": ["--keep", "4"],
    "heal": ["there"],
    "place": ["there"],
    "eval": ["there"],
    "dispatch": ["there"],
    "report": ["there"],
    "publish": ["there", "me/mine"],
    "run": ["there"],
}


def parsed(name: str, settings: type[Settings], *words: str) -> Settings:
    """What a command line becomes, without a run."""
    found: list[Settings] = []
    app = typer.Typer(rich_markup_mode=None)
    add_command(app, name, settings, found.append)
    app.command("another")(lambda: None)
    app([name, *words], standalone_mode=False)
    return found[0]


class Polished(PruneSettings):
    """Remove experts and polish the rest."""

    shine: int = option(3, "Polish this often.", panel="Finish", metavar="N", ge=1)


def test_an_option_declared_once_is_known_to_the_command_line_recipes_and_python(
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = typer.Typer(rich_markup_mode=None)
    add_command(app, "polish", Polished, lambda settings: None)
    app.command("another")(lambda: None)
    app(["polish", "-h"], standalone_mode=False)
    assert "Finish:\n  --shine N  Polish this often.  [default: 3]" in capsys.readouterr().out
    assert parsed("polish", Polished, "--keep", "4", "--shine", "2") == Polished(keep=4, shine=2)
    with pytest.raises(SettingsError, match=r"--shine: must be greater than or equal to 1, not 0"):
        Polished.read(shine=0)
    found = Polished.model_validate({"keep": 4, "shine": 2}, context=IN_RECIPE)
    assert found.recipe_values()["shine"] == 2
    with pytest.raises(ValidationError, match="did you mean shine"):
        Polished.model_validate({"shin": 2}, context=IN_RECIPE)
    with pytest.raises(ValidationError, match="unknown key 'plan_only'"):
        Polished.model_validate({"plan_only": True}, context=IN_RECIPE)


OLD_AND_NEW = [
    ("prune", "--positions all", "--tokens all"),
    ("prune", "--layout exact --removed mean", "--layout exact --replace-with mean"),
    ("prune", "--fold off", "--rescale-gates off"),
    ("audit", "--positions answer", "--tokens answer"),
    ("sweep", "--fractions 0.5 --positions all", "0.5 --tokens all"),
    ("sweep", "--layout exact --removed mean", "--layout exact --replace-with mean"),
    ("sweep", "--fold off", "--rescale-gates off"),
    ("reweight", "--prove --draws 100", "--cross-fit --random-draws 100"),
    ("route", "--tune --prove --draws 30", "--tune --cross-fit --random-draws 30"),
    ("heal", "--likeliest 8", "--top-k-logits 8"),
    ("heal", "--check-every 5", "--eval-every 5"),
    ("heal", "--save-memory", "--gradient-checkpointing"),
    ("heal", "--batch 8 --micro-batch 2", "--batch-size 8 --micro-batch-size 2"),
]


@pytest.mark.parametrize(("name", "old", "new"), OLD_AND_NEW)
def test_an_old_spelling_is_accepted_and_hidden(name: str, old: str, new: str) -> None:
    needed = NEEDED.get(name, [])
    found = [parsed(name, OWN[name], *needed, *words.split()) for words in (old, new, "")]
    assert found[0] == found[1] != found[2]
    text = help_of(name).split()
    gone = [word for word in old.split() if word.startswith("--") and word not in new.split()]
    assert gone and not {*gone} & {*text}
    assert {word for word in new.split() if word.startswith("--")} <= {*text}


def test_every_hidden_spelling_is_one_of_those() -> None:
    hidden = {
        (name, flag)
        for name, settings in OWN.items()
        for field in settings.model_fields
        for flag in option_details(settings, field)["aliases"]
    }
    assert hidden == {
        (name, word)
        for name, old, new in OLD_AND_NEW
        for word in old.split()
        if word.startswith("--") and word not in new.split()
    }


@pytest.mark.parametrize("name", OWN)
def test_help_fits_80_columns_and_explains_every_option(name: str) -> None:
    text = help_of(name)
    assert max(map(len, text.splitlines())) <= 80
    assert text.split("Examples:\n")[1].count(f"  expertcut {name} ") == 3
    for field in OWN[name].model_fields:
        flags = option_details(OWN[name], field)["flags"] or (f"--{field.replace('_', '-')}",)
        if not option_details(OWN[name], field)["is_argument"]:
            is_hidden = field in getattr(OWN[name], "hidden", ())
            assert (flags[0].partition("/")[0] in text.split()) is not is_hidden
        assert OWN[name].model_fields[field].description


def test_a_share_that_goes_is_one_that_stays() -> None:
    assert PruneSettings(sparsity=0.7).fraction == 0.3
    with pytest.raises(SettingsError, match="only one of them"):
        PruneSettings(sparsity=0.5, keep_fraction=0.5).check()
    with pytest.raises(SettingsError, match="--sparsity 1 must be at least 0, below 1"):
        PruneSettings.read(sparsity=1.0)


def test_the_fields_names_of_criteria_are_accepted_and_wrong_ones_name_the_nearest() -> None:
    found = parsed("prune", PruneSettings, "--sweep", "0.5", "--by", "frequency,ean_mean")
    assert isinstance(found, PruneSettings) and found.by == "activations,output_norm_mean"
    with pytest.raises(SettingsError, match=r"--by: 'reep' is .*: did you mean reap\?"):
        PruneSettings.read(by="reep")
    with pytest.raises(SettingsError, match="run `expertcut sweep` to score several"):
        PruneSettings.read(by="reap,random")


def test_a_sweep_asked_of_prune_is_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun: list[Settings] = []
    monkeypatch.setattr(sweep, "run", lambda settings, ui: begun.append(settings))
    words = "--by ean_sum,reap --seed 3 --quiz mmlu --subjects law,logic --limit 2 --held-out 0"
    both = f"{words} --layout exact --budget global --min-keep 4 --protect none --device cpu"
    shared = [*both.split(), "--out", str(tmp_path / "o"), "--profile", "p", "--removed", "mean"]
    prune.run(parsed("prune", PruneSettings, "--sweep", "0.5", *shared))  # type: ignore[arg-type]
    named = parsed("sweep", SweepSettings, "0.5", *shared)
    assert begun == [named] and isinstance(named, SweepSettings)
    for name in SweepSettings.model_fields:
        if name in PruneSettings.model_fields:
            default = SweepSettings.model_fields[name].default
            assert default == PruneSettings.model_fields[name].default
    given = named.model_dump(exclude_defaults=True)
    assert len(given) == 15 and given["by"] == "output_norm,reap"
    assert named.cut().by == "activations" and named.cut().removed == "mean"
    with pytest.raises(SettingsError, match="FRACTIONS is given twice"):
        parsed("sweep", SweepSettings, "0.5", "--fractions", "0.75")


RECIPE = """
model: owner/name
variants:
- name: cut
  prune: {%s: all, replace_with: mean, layout: exact, keep: 4}
"""


def test_a_recipe_may_use_the_new_names_and_not_both(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    stages = []
    for name in ("tokens", "positions"):
        file.write_text(RECIPE % name)
        stages.append(stages_of(read_recipe(file))[1].settings)
    assert stages[0] == stages[1]
    assert stages[0]["prune"]["positions"] == "all" and stages[0]["prune"]["removed"] == "mean"
    with pytest.raises(ValidationError, match="given twice"):
        PruneSettings(tokens="all", positions="all")  # type: ignore[call-arg]


# As written by the first versions that kept manifests: the order of keys is part of their bytes.
_LOADED = (
    '"model": "owner/name", "revision": "main", "trust_remote_code": false, "dtype": "float32", '
    '"device": "auto", "device_map": null'
)
_NONE = '"merge": null, "reweight": null, "heal": null, "prove": null'
HASHED = {
    "profile": f'{{{_LOADED}, "threads": 2, "batch_tokens": null, "quiz": "mmlu", '
    '"quiz_revision": null, "shots": 3, "subjects": ["law"], "split": "val", "limit": null, '
    '"stats": "answer", "perturb": ["bf16"]}',
    "cut": f'{{{_LOADED}, "name": "cut", "prune": {{"keep_active": false, "keep": null, '
    '"keep_fraction": 0.5, "max_bytes": null, "budget": "global", "min_keep": 2, "by": "reap", '
    '"positions": null, "protect": ["super"], "seed": 0, "layout": "exact", "removed": "mean", '
    '"fold": null, "boost": ["3:12"], "suppress": null, "scale": null, "apply_at": null, '
    f'"adapter": null, "verify": false}}, {_NONE}}}',
    "merged": f'{{{_LOADED}, "name": "merged", "prune": null, "merge": {{"keep": 4, "by": '
    '"hc_smoe", "router": "fitted", "align": true, "verify": true}, "reweight": null, "heal": '
    'null, "prove": null}',
    "tilted": f'{{{_LOADED}, "name": "tilted", "prune": null, "merge": null, "reweight": '
    '{"boost": null, "suppress": null, "scale": null, "boost_best": 2, "suppress_worst": 0, "by": '
    'null, "min_appearances": null, "layers": "0,3", "contrast": ["a", "b"], "strength": null, '
    '"tune": true, "apply_at": null, "layout": "stock", "verify": true}, "heal": null, "prove": '
    '{"draws": 100, "seed": 0}}',
    "healed": f'{{{_LOADED}, "threads": 2, "name": "healed", "prune": null, "merge": null, '
    '"reweight": null, "heal": {"of": "cut", "quiz": ["mmlu=2"], "split": "val", "shots": null, '
    '"subjects": [], "limit": null, "text": [], "eval_quiz": null, "eval_split": null, '
    '"objective": null, "teacher": null, "teacher_cache": "cache/here", "likeliest": 64, '
    '"answer_weight": null, "targets": ["gate"], "rank": 16, "alpha": null, "steps": 5, '
    '"learning_rate": null, "batch": 16, "micro_batch": null, "balance": 0.0, "check_every": 50, '
    '"patience": 3, "max_tokens": 2048, "save_memory": false, "shuffle": true, "seed": 0, '
    '"verify": true}, "prove": null, "scored": "test"}',
    "publish cut": '{"variant": "cut", "repo": "a/b", "private": false, "revision": null, '
    '"force": false, "dry_run": true}',
}
FULL = """
model: owner/name
revision: main
shots: 3
subjects: [law]
threads: 2
dtype: float32
profile: {split: val, stats: answer, perturb: [bf16]}
variants:
- name: cut
  prune: {keep_fraction: 0.5, by: reap, protect: super, budget: global, min_keep: 2, layout: exact,
    removed: mean, boost: 3:12, verify: false}
- name: merged
  merge: {keep: 4, by: hc_smoe, align: true}
- name: tilted
  reweight: {boost_best: 2, tune: true, contrast: [a, b], layers: "0,3"}
  prove: {draws: 100}
- name: healed
  heal: {of: cut, steps: 5, targets: [gate], quiz: mmlu=2, teacher_cache: cache/here}
eval: {limit: 4}
publish: [{variant: cut, repo: a/b, dry_run: true}]
"""


def test_what_stages_are_hashed_by_is_what_it_was(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(FULL)
    found = {s.name: json.dumps(dict(s.settings)) for s in stages_of(read_recipe(file))}
    assert {name: found[name] for name in HASHED} == HASHED


def test_the_commands_run_from_python_and_say_nothing(
    checkpoint: Callable[..., Path],
    quiz_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {"quiz": str(quiz_folder), "split": "val", "shots": 1}
    measured = profile.run(
        profile.ProfileSettings(model=str(checkpoint("olmoe")), **asked, out=tmp_path / "p")
    )
    assert measured.path == tmp_path / "p"
    cut = PruneSettings(profile=tmp_path / "p", keep=5, out=tmp_path / "plan", plan_only=True)
    assert prune.run(cut, UI()) == tmp_path / "plan"
    assert {len(e.keep) for e in load_plan(tmp_path / "plan").blocks.values()} == {5}
    shown_plan = show.run(show.ShowSettings(path=tmp_path / "plan"))
    assert shown_plan.tables()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prune owner/name", "make one with `expertcut profile owner/name --quiz QUIZ`, or add"),
        ("merge owner/name --keep 4", "`expertcut profile owner/name --quiz QUIZ`, or add --quiz"),
        ("reweight owner/name", "`, or add --quiz QUIZ or --text FILE, and no --profile"),
        ("audit owner/name", "`expertcut profile owner/name --quiz QUIZ`, or add --quiz QUIZ"),
        ("sweep owner/name", "make one with `expertcut profile owner/name --quiz QUIZ`\n"),
        ("prune owner/name --profile p --quiz q --keep 4", "--text FILE, and no --profile"),
        ("prune mine --keep 4", "mine is a profile: name it with --profile mine"),
        ("sweep mine", "mine is a profile: name it with --profile mine"),
        (
            "merge --quiz q --keep 4",
            "--quiz is for a MODEL that is profiled first: give MODEL and --quiz, or",
        ),
        ("prune --split val --keep 4", "--split is for a MODEL that is profiled first"),
        ("audit --text t.txt", "--text is for a MODEL that is profiled first: give MODEL and"),
        ("prune owner/name --text t.txt --profile p --keep 4", "--text FILE, and no --profile"),
        ("prune owner/name --quiz q --text t --keep 4", "--quiz is for a quiz, and --text reads"),
        ("prune --profile owner/name --keep 4", "no profile in owner/name: it has no profile.json"),
        ("prune owner/name --sweep 0.5", "MODEL does not go with --sweep"),
    ],
)
def test_a_model_where_a_profile_is_needed_is_answered_with_how_to_make_one(
    line: str, words: str, expertcut: Commands, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "profile.json").touch()
    refused = expertcut(line, status=2)
    assert words in refused and refused.count("\n") == 1


def test_a_model_with_a_quiz_is_profiled_first_and_once(
    checkpoint: Callable[..., Path], quiz_folder: Path, expertcut: Commands
) -> None:
    asked = (checkpoint("olmoe"), "--quiz", quiz_folder, "--split", "val", "--shots", 1)
    first = expertcut("prune", *asked, "--limit", 2, "--keep", 5, "--plan-only", "--out", "a")
    (made,) = Path("profiles").iterdir()
    assert f"written   {made}\n" in first and f"profile   {made} (" in first
    assert "newest" not in first
    found = json.loads((made / "profile.json").read_text())["quiz"]
    assert (found["split"], found["shots"], found["limit"]) == ("val", 1, 2)
    chunks = {file: file.stat().st_mtime_ns for file in made.glob("chunks/*")}
    expertcut("reweight", *asked, "--limit", 2, "--boost", "0:1", "--plan-only", "--out", "b")
    assert chunks and chunks == {file: file.stat().st_mtime_ns for file in made.glob("chunks/*")}
    assert load_plan(Path("a")).chosen_on.sha256 == load_plan(Path("b")).chosen_on.sha256
    assert f"profile   {made} (newest; " in expertcut("prune --keep 5 --plan-only --out c")


def test_a_model_with_texts_is_profiled_first_and_once(
    checkpoint: Callable[..., Path], expertcut: Commands
) -> None:
    documents = [f"{WORDS[n % 7]} {WORDS[n % 5]} {n} {WORDS[n % 3]}" for n in range(40)]
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    Path("t.jsonl").write_text("".join(lines))
    asked = (checkpoint("olmoe"), "--text", "t.jsonl=2")
    cut = ("--keep", 5, "--by", "reap", "--plan-only", "--seed")
    first = expertcut("prune", *asked, *cut, 0, "--out", "a")
    (made,) = Path("profiles").iterdir()
    assert f"written   {made}\n" in first and f"profile   {made} (" in first
    assert list(json.loads((made / "profile.json").read_text())["text"]["sources"]) == ["t"]
    chunks = {file: file.stat().st_mtime_ns for file in made.glob("chunks/*")}
    expertcut("prune", *asked, *cut, 1, "--out", "b")  # another seed of the cut, the same profile
    audit = expertcut("audit", *asked, "--sample", 2, "--by", "reap", "--out", "audit")
    assert f"profile   {made} (" in audit and "documents" in audit
    assert chunks and chunks == {file: file.stat().st_mtime_ns for file in made.glob("chunks/*")}
    assert load_plan(Path("a")).chosen_on.sha256 == load_plan(Path("b")).chosen_on.sha256
