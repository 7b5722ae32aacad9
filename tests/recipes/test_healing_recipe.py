"""A recipe that cuts and heals: in order, only what is due, and on from where it was stopped."""

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from expertcut.cli import main
from expertcut.errors import QuizError, RecipeError
from expertcut.evaluation.results import load_results
from expertcut.healing.heal_settings import HealSettings
from expertcut.recipes.recipe_schema import read_recipe
from expertcut.recipes.stage_runs import heal_settings
from expertcut.recipes.stages import stages_of
from tests.conftest import make_checkpoint, write_quiz
from tests.recipes.test_recipes import Place

TEXT = """
model: {model}
quiz: {quiz}
shots: 1
threads: 1
profile: {{split: val, limit: 2}}
variants:
- name: cut
  prune: {{keep: 5, verify: false}}
- name: healed
  heal: {{of: cut, steps: 4, batch: 4, check_every: 2, rank: 2, verify: false}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    found = Place(tmp_path)
    make_checkpoint(found.model, "olmoe")
    write_quiz(found.quiz, {"dev": 1, "val": 7, "test": 3})
    found.write(TEXT)
    return found


def test_a_variant_is_healed_only_where_that_is_due(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertcut.healing.trainer import _Watch

    done: list[int] = []

    def stop(self: object, args: object, state: object, control: object, **more: object) -> None:
        done.append(state.global_step)  # type: ignore[attr-defined]
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Watch, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        place.run()
    assert (place.folder / "variants" / "healed.healing" / "steps" / "checkpoint-2").is_dir()
    assert not (place.folder / "variants" / "healed").exists()
    assert place.run().ran == ("healed",)
    assert done == [1, 2, 3, 3, 4]  # the third step was not saved
    assert any(line.startswith("trained   ") for line in place.said)
    assert sorted(p.name for p in (place.folder / "variants").iterdir()) == ["cut", "healed"]
    assert (place.folder / "variants" / "healed" / "recipe.yaml").is_file()
    assert place.run().ran == ()
    place.change("steps: 4", "steps: 2")
    assert place.run().ran == ("healed",)
    assert "steps is 2, was 4" in place.why["healed"]
    place.change("keep: 5", "keep: 6")
    assert place.run().ran == ("cut", "healed")


def test_a_recipe_ends_with_a_sentence_for_each_model_and_knows_what_was_healed(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write(TEXT + "eval: {{split: test, limit: 2}}\nreport:\n")
    monkeypatch.setattr(sys, "argv", ["expertcut", "run", str(place.file), "--out", "run"])
    for last in (["model answers", "cut: ", "healed: "], None):
        with pytest.raises(SystemExit) as ending:
            main()
        assert ending.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        if last:
            assert all(map(str.startswith, lines[-3:], last)), lines[-3:]
        else:  # nothing ran, so nothing is told
            assert "nothing to do" in lines[-1]
    base, cut, healed = load_results(place.folder / "results.json").models
    assert healed.healed_from == cut.fingerprint != base.fingerprint
    assert (base.healed_from, cut.healed_from) == (None, None)


def test_other_settings_do_not_go_on_with_what_was_begun(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expertcut.healing import recovery

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "_write", None)  # a fault after training
        with pytest.raises(TypeError):
            place.run()
    place.change("rank: 2", "rank: 1")
    assert place.run().ran == ("healed",)


def test_its_own_texts_are_inputs(place: Place) -> None:
    texts = place.root / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "some words {i}"}}\n' for i in range(12)))
    place.change("of: cut", f"of: cut, objective: lm, text: {texts}=2")
    stage = stages_of(read_recipe(place.file))[-1]
    assert stage.reads == (str(texts),) and stage.after == ("profile", "cut")
    place.run()
    assert place.run(dry_run=True).ran == ()
    texts.write_text("".join(f'{{"text": "other words {i}"}}\n' for i in range(12)))
    assert place.run(dry_run=True).ran == ("healed",)
    assert f"{texts} changed" in place.why["healed"]


def test_what_the_recipe_scores_is_kept_out(place: Place) -> None:
    other = write_quiz(place.root / "other", {"dev": 1, "val": 20}, seed=3)
    place.change("of: cut", f"of: cut, objective: lm, quiz: {other}")
    place.file.write_text(place.file.read_text() + "eval: {split: val}\n")
    recipe = read_recipe(place.file)
    heal = next(v.heal for v in recipe.variants if v.heal)
    settings = heal_settings(recipe, heal)
    assert (settings.eval_quiz, settings.eval_split) == (str(place.quiz), "val")
    stage = next(stage for stage in stages_of(recipe) if stage.kind == "heal")
    assert [part.split for part in stage.optional_questions] == ["val"]
    assert not stage.questions and stage.reads == (str(other),)
    place.change(f", quiz: {other}", "")
    with pytest.raises(QuizError, match="stand in split val, which is scored later"):
        place.run()


@pytest.mark.parametrize(
    ("own", "shots", "subjects", "reads_all"),
    [
        ("rank: 2", 1, ("old_clocks",), False),
        ("shots: 0", 0, ("old_clocks",), False),
        ("subjects: [tide_pools]", 1, ("tide_pools",), True),
        ("quiz: mmlu", 1, (), False),
        ("quiz: mmlu, subjects: virology, shots: 3", 3, ("virology",), False),
    ],
)
def test_shots_and_subjects_are_the_recipes_unless_it_has_its_own(
    place: Place, own: str, shots: int, subjects: tuple[str, ...], *, reads_all: bool
) -> None:
    place.change("shots: 1", "shots: 1\nsubjects: [old_clocks]")
    place.change("rank: 2", own)
    recipe = read_recipe(place.file)
    asked = recipe.variants[-1].heal
    assert asked is not None
    settings = heal_settings(recipe, asked)
    assert (settings.shots, settings.subjects) == (shots, subjects)
    assert (recipe.quiz in stages_of(recipe)[-1].reads) == reads_all


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_does_not_take_is_refused(seed: int) -> None:
    HealSettings(seed=2**32 - 1)
    with pytest.raises(ValidationError, match="than or equal to"):
        HealSettings(seed=seed)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("of: cut", "of: healed", "healed heals 'healed', which no variant before it is"),
        ("of: cut", "of: nobody", "which no variant before it is"),
        ("steps: 4", "stepps: 4", "did you mean steps?"),
        ("rank: 2", "targets: [experts, mlp]", "targets"),
        ("rank: 2", "seed: -1", "seed: must be greater than or equal to 0"),
        ("rank: 2", "seed: 4294967296", "seed: must be less than or equal to 4294967295"),
        ("rank: 2", "shots: -1", "shots"),
        ("rank: 2", "teacher_cache: /tmp/cache", "lies outside this folder"),
        ("rank: 2", "teacher_cache: a/../../cache", "lies outside this folder"),
    ],
)
def test_what_cannot_be_healed_is_refused_before_anything_runs(
    place: Place, old: str, new: str, said: str
) -> None:
    place.change(old, new)
    with pytest.raises(RecipeError) as refused:
        read_recipe(place.file)
    assert said in str(refused.value)
