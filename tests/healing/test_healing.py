"""Healing: what it wins back, that a stop changes nothing, and that caches and batches do not."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expertcut.data import Selection, load_quiz
from expertcut.edits.plan import PlanFile, load_hashes, load_plan
from expertcut.errors import OutputError, SettingsError
from expertcut.healing.heal_settings import ObjectiveName
from expertcut.healing.objectives import OBJECTIVES
from expertcut.healing.recovery import BASE, BEFORE, HEALED
from expertcut.healing.teacher_cache import CachedTeacher, CacheKey
from expertcut.reporting.edit_tables import change_text
from expertcut.reporting.page_sections import checkpoint_headline
from expertcut.reporting.views import NamedDocument
from expertcut.scoring.engine import Engine, ask
from expertcut.stats import MARGIN, verdict
from tests.conftest import Commands, open_model
from tests.support.exact_models import (
    as_transformers_runs_it,
    as_written_before,
    load_exact,
    logprobs,
)
from tests.support.healed_models import Sudden, changed, cut, healed, settings_for

Checkpoints = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("modules_cache")

BUNDLED = Path(__file__).parents[2] / "checkpoints" / "quickstart"


@pytest.fixture(scope="module")
def stock(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return cut(checkpoint("olmoe"), quiz_folder, tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def exact(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return cut(checkpoint("olmoe"), quiz_folder, tmp_path_factory.mktemp("exact"), "exact")


def test_a_cut_model_comes_back_toward_its_base(tmp_path: Path) -> None:
    quiz = BUNDLED / "quiz"
    folder = cut(BUNDLED, quiz, tmp_path)
    settings = settings_for(quiz, shots=0, limit=8, steps=10, batch=12, check_every=5, verify=True)
    found = healed(folder, settings, tmp_path / "out")
    assert found.objective == "distill" and found.plan.proof is not None
    by_step = dict(found.curve.held_out)
    assert by_step[found.curve.best_step] < 0.6 * found.curve.losses[0]
    to_base, to_cut = found.plan.proof.held_out
    assert (to_base.against, to_cut.against) == (BASE, BEFORE)
    forms = {outcome.form: outcome for outcome in found.plan.proof.outcomes}
    assert forms[HEALED].right_logprob > forms[BEFORE].right_logprob + 0.1
    assert forms[HEALED].flipped < forms[BEFORE].flipped


@pytest.mark.parametrize("layout", ["stock", "exact"])
def test_a_healed_checkpoint_loads_as_it_was_written(
    stock: Path, exact: Path, quiz_folder: Path, tmp_path: Path, layout: str
) -> None:
    folder = stock if layout == "stock" else exact
    healed(folder, settings_for(quiz_folder), tmp_path / "out")
    ours = logprobs(as_transformers_runs_it(open_model(tmp_path / "out")).model)
    if layout == "exact":
        theirs = load_exact(tmp_path / "out")
    else:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        theirs.set_experts_implementation("eager")
    assert logprobs(theirs).equal(ours)
    theirs.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / p / "model.safetensors") for p in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    before = load_file(folder / "model.safetensors")
    assert before.keys() == first.keys()
    assert any(not first[name].equal(before[name]) for name in first)
    if layout == "exact":
        constants = [name for name in first if name.endswith("approx_value")]
        assert constants and all(first[name].equal(before[name]) for name in constants)


def test_one_as_written_before_is_healed_to_todays_names(
    exact: Path, quiz_folder: Path, tmp_path: Path
) -> None:
    old = as_written_before(exact, tmp_path / "old")
    for source in (exact, old):
        healed(source, settings_for(quiz_folder), tmp_path / f"of-{source.name}")
    new, upgraded = tmp_path / f"of-{exact.name}", tmp_path / "of-old"
    first, second = (load_file(p / "model.safetensors") for p in (new, upgraded))
    assert first.keys() == second.keys() != load_file(old / "model.safetensors").keys()
    assert all(first[name].equal(second[name]) for name in first)
    for name in ("config.json", "modeling_exact.py"):
        assert (new / name).read_bytes() == (upgraded / name).read_bytes()
    assert logprobs(load_exact(new)).equal(logprobs(load_exact(upgraded)))


def test_a_teacher_from_a_cache_teaches_as_a_live_one(
    stock: Path, quiz_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings_for(quiz_folder, likeliest=20)
    live = healed(stock, asked, tmp_path / "live")
    cached = changed(asked, teacher_cache=tmp_path / "cache")
    first = healed(stock, cached, tmp_path / "first")
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) > 4 and {f.suffix for f in files} == {".json", ".safetensors"}
    assert load_file(files[0])["ids"].shape[1] == 20

    def never(*_: object) -> None:
        raise AssertionError("the teacher is asked again")

    monkeypatch.setattr("expertcut.healing.recovery._load_other", never)
    second = healed(stock, cached, tmp_path / "second")
    assert first.curve == second.curve
    assert live.curve.losses == pytest.approx(first.curve.losses, abs=1e-5)
    assert live.curve.losses[0] > 0.01
    with pytest.raises(OutputError, match="another teacher, or another number of tokens"):
        healed(stock, changed(cached, likeliest=7), tmp_path / "third")
    assert not (tmp_path / "third.healing").exists()


@pytest.mark.parametrize("metadata", [None, {"rows": "{"}, {"rows": '{"a": [0, 9]}'}])
def test_a_damaged_cache_is_named(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    whose, file = CacheKey("f", "torch.float32", 2), tmp_path / "cache" / "a.safetensors"
    CachedTeacher(file.parent, whose)
    tensors = {"ids": torch.zeros(4, 2, dtype=torch.int32), "logprob": torch.zeros(4, 2)}
    save_file(tensors, file, {"rows": '{"a": [0, 4]}'})
    assert CachedTeacher(file.parent, whose).places["a"][1:] == (0, 4)
    save_file(tensors, file, metadata)
    with pytest.raises(OutputError, match=r"a\.safetensors is damaged"):
        CachedTeacher(file.parent, whose)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"a\.safetensors is damaged"):
        CachedTeacher(file.parent, whose)


def test_the_loss_is_that_of_the_whole_batch_however_it_is_cut(
    stock: Path, quiz_folder: Path, tmp_path: Path
) -> None:
    for objective in ("distill", "answer"):
        curves = []
        for micro in (4, 1):
            spent = {"micro_batch": micro, "answer_weight": 0.5, "balance": 0.1}
            asked = settings_for(quiz_folder, objective=objective, steps=2, **spent)
            curves.append(healed(stock, asked, tmp_path / f"{objective}-{micro}").curve)
        assert curves[1].losses == pytest.approx(curves[0].losses, rel=1e-6)
        assert curves[1].held_out[0][1] == pytest.approx(curves[0].held_out[0][1], rel=1e-6)


def test_training_stops_where_held_out_rows_no_longer_gain_and_keeps_the_best(
    stock: Path, quiz_folder: Path, tmp_path: Path
) -> None:
    wild = {"steps": 40, "check_every": 1, "patience": 2, "learning_rate": 0.9}
    curve = healed(stock, settings_for(quiz_folder, Sudden, **wild), tmp_path / "out").curve
    assert curve.steps < 40 and curve.best_step == curve.steps - 2
    losses = dict(curve.held_out)
    assert losses[curve.best_step] == min(losses.values()) < losses[curve.steps]


def test_the_plan_says_who_is_left_and_what_was_shown(
    stock: Path, checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path
) -> None:
    found = healed(stock, settings_for(quiz_folder, verify=True), tmp_path / "out")
    before, after = load_plan(stock), load_plan(tmp_path / "out")
    assert after == found.plan and after.action == "heal --objective distill"
    assert {n: e.keep for n, e in after.blocks.items()} == {
        n: e.keep for n, e in before.blocks.items()
    }
    shown = load_hashes(tmp_path / "out", after)
    trained = load_quiz(Selection(str(quiz_folder), "val", 0))
    assert {q.hash_line for q in trained} <= shown
    record = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert len(record["losses"]) == 4 and record["questions"] + 2 <= len(trained)
    assert after.proof.held_out_split == "test" and len(after.proof.outcomes) == 3
    # What is told is what anyone measures.
    quiz = load_quiz(Selection(str(quiz_folder), "test", 1))
    logprob_NC = ask(Engine(open_model(tmp_path / "out"), 512), quiz)
    right = sum(int(row.argmax()) == q.answer for row, q in zip(logprob_NC, quiz, strict=True))
    assert after.proof.outcomes[-1].accuracy == pytest.approx(right / len(quiz))


def document(folder: Path) -> NamedDocument[PlanFile]:
    return NamedDocument(folder / "plan.json", folder.name, load_plan(folder))


def shows_the_verdict(folder: Path, expertcut: Commands) -> None:
    """Page, card and `show` compare a healed checkpoint alone with the base of all edits."""
    proof, cut = load_plan(folder).proof, load_plan(folder).model
    base, before, own = proof.outcomes
    change, n = proof.answered.change, own.questions
    assert change.gained - change.lost == round((own.accuracy - base.accuracy) * n)
    assert proof.answered.base == base.accuracy and n == len(proof.held_out_hashes)
    head = checkpoint_headline(document(folder))
    label = load_plan(Path(cut.id)).model.label
    assert head.findings[0][1] == f"{folder.name} against {label}: {change_text(change)}"
    rows = [(row[0], row[2]) for row in head.table.rows]
    accuracies = [form.accuracy for form in (base, before)]
    expected = zip(
        (label, cut.label, folder.name), (*accuracies, head.table.rows[2][2]), strict=True
    )
    assert rows == [*expected] and head.table.rows[2][2] == pytest.approx(own.accuracy)
    assert head.table.rows[2][4] == verdict(change.gained, change.lost, n, MARGIN)
    shown = " ".join(expertcut("show", folder).split())
    assert f"{own.accuracy * 100:.1f} % on {n} held-out questions (test): " in shown
    assert "accuracy the unedited base " in shown and "verdict " in shown


def test_the_command_heals_and_tells(stock: Path, quiz_folder: Path, expertcut: Commands) -> None:
    short = ("--steps", 2, "--batch", 4, "--shots", 1, "--rank", 2, "--threads", 1)
    printed = expertcut("heal", stock, "--quiz", quiz_folder, *short)
    lines, words = printed.splitlines(), " ".join(printed.split())
    assert f"cut {stock}: prune --keep 5 of " in words and "2 steps" in words
    assert "by distill on " in words and "test questions that were not used" in words
    assert any(line.startswith("verdict   ") for line in lines) and len(lines) <= 40
    assert lines[-3] == "written   checkpoints/cut-healed"
    assert lines[-1].split() == ["expertcut", "show", "checkpoints/cut-healed"]
    shows_the_verdict(Path("checkpoints/cut-healed"), expertcut)
    evaluated = expertcut(
        "eval", stock, "checkpoints/cut-healed", "--quiz", quiz_folder, "--shots", 1
    )
    assert "chosen on val, none of these questions" in " ".join(evaluated.split())
    assert evaluated.splitlines()[-3:] == [
        "written   results.json",
        "next      expertcut report results.json",
        "          expertcut publish checkpoints/cut-healed --dry-run",
    ]
    again = expertcut("heal", stock, "--quiz", quiz_folder, *short, status=2)
    assert "checkpoints/cut-healed is not empty" in again
    adapter = ("--adapter", "--objective", "lm", "--out", "lora")
    printed = expertcut("heal", stock, "--quiz", quiz_folder, *short, *adapter)
    assert "by lm on " in " ".join(printed.split()) and "the unedited base" in printed
    (finding, _), *_ = checkpoint_headline(document(Path("lora"))).findings
    assert re.match(r"1[0-9] % smaller, ", finding)  # with the weights that it adapts
    modes = {
        name: Path("lora", name).stat().st_mode
        for name in ("adapter_model.safetensors", "plan.json")
    }
    assert len(set(modes.values())) == 1  # readable to whom the plan is


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--targets", "attention,mlp"),
            "--targets: must be 'attention', 'experts' or 'gate'",
        ),
        (("--batch", 6, "--micro-batch", 4), "--micro-batch-size 4 must divide --batch-size 6"),
        (("--alpha", 0), "--alpha: must be greater than or equal to 1"),
        (("--answer-weight", "nan"), "--answer-weight: must be a finite number"),
        (("--learning-rate", 3), "--learning-rate: must be less than 1"),
        (("--text", "x.jsonl", "--objective", "answer"), "--text has no answers"),
        (("--split", "test"), "stand in split test, which is scored later"),
        (("--split", "nothing"), "has no questions in split nothing"),
        (("--quiz", "birds=0"), "a weight must be above 0"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(
    stock: Path, quiz_folder: Path, expertcut: Commands, options: tuple[object, ...], said: str
) -> None:
    printed = expertcut("heal", stock, "--quiz", quiz_folder, "--shots", 1, *options, status=2)
    assert said in printed and len(printed.splitlines()) == 1
    assert not Path("checkpoints").exists()


def test_a_model_that_was_not_edited_is_trained_only_if_told(
    checkpoint: Checkpoints, quiz_folder: Path, expertcut: Commands
) -> None:
    asked = ("heal", checkpoint("olmoe"), "--quiz", quiz_folder, "--split", "nothing")
    printed = expertcut(*asked, status=2)
    assert "was not edited" in printed and len(printed.splitlines()) == 1
    assert "has no questions in split nothing" in expertcut(*asked, "--unedited", status=2)


def test_without_a_base_the_letters_are_trained_on(
    checkpoint: Checkpoints, quiz_folder: Path, tmp_path: Path
) -> None:
    asked = settings_for(quiz_folder, steps=1)
    assert healed(checkpoint("olmoe"), asked, tmp_path / "out").objective == "answer"
    with pytest.raises(SettingsError, match="name it with --teacher"):
        healed(checkpoint("olmoe"), changed(asked, objective="distill"), tmp_path / "none")
    other = checkpoint("olmoe", vocab_size=290, seed=3)
    taught = changed(asked, objective="distill", teacher=str(other))
    assert healed(checkpoint("olmoe"), taught, tmp_path / "taught").curve.losses[0] > 0.1


def test_the_settings_name_all_objectives() -> None:
    assert set(get_args(ObjectiveName)) == set(OBJECTIVES)


def test_options_of_memory_change_no_loss(stock: Path, quiz_folder: Path, tmp_path: Path) -> None:
    balanced = settings_for(quiz_folder, steps=2, balance=0.1)
    plain = healed(stock, balanced, tmp_path / "plain")
    found = healed(stock, changed(balanced, save_memory=True), tmp_path / "spared")
    assert found.curve.losses == pytest.approx(plain.curve.losses, rel=1e-4)
    other = healed(stock, changed(balanced, balance=0.0), tmp_path / "without")
    assert plain.curve.losses[0] > other.curve.losses[0] + 0.09  # at least 1, times its weight
