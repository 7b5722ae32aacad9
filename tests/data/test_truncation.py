"""Prompts longer than the context: refused with their number, or cut as lm_eval cuts them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PretrainedConfig

from expertcut.data import Quiz, Selection, load_quiz, prompt
from expertcut.evaluation.results import load_results
from expertcut.evaluation.search_results import load_audit, load_sweep
from expertcut.profiling.storage import CUT, load_profile
from expertcut.recipes.recipe_schema import read_recipe
from expertcut.recipes.stages import stages_of
from expertcut.scoring.engine import Engine, context_length
from tests.conftest import SUBJECTS, Commands, make_checkpoint, open_model

Checkpoints = Callable[..., Path]
PLACES = 330
SHOTS = 2
BOS = 1
TOLERANCE = 1e-4
THEIRS = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], dtype="float32", device="cpu", batch_size=4)
pairs = [(text, f" {letter}") for text in json.load(sys.stdin) for letter in "ABCD"]
requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
print(json.dumps([logprob for logprob, _ in model.loglikelihood(requests, disable_tqdm=True)]))
"""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context some of the quiz's prompts do not fit, and whose tokenizer adds BOS."""
    folder = tmp_path_factory.mktemp("models") / "short"
    make_checkpoint(folder, "olmoe", max_position_embeddings=PLACES)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", pair="<eos> $A $B", special_tokens=[("<eos>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def quiz(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), shots=SHOTS, truncate="left"))


def lengths(quiz: Quiz, subject: str) -> "np.ndarray[Any, Any]":
    """Tokens of whole prompts: a byte each, but for ` A` and its like, and the BOS."""
    shots = quiz.shots_by_subject[subject]
    texts = [prompt(question, shots) for question in quiz.questions[subject]]
    return np.array([1 + len(text) - SHOTS for text in texts])


def lm_eval(model: Path, texts: list[str]) -> "np.ndarray[Any, Any]":
    """Log p of the letters after each text (N, C), by its own model class."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THEIRS, model],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout)).reshape(len(texts), 4)


def n_long(quiz: Quiz) -> int:
    return sum(int((lengths(quiz, subject) > PLACES).sum()) for subject in quiz.questions)


def test_prompts_are_cut_where_lm_eval_cuts_them(
    short: Path, quiz: Quiz, quiz_folder: Path, expertcut: Commands, tmp_path: Path
) -> None:
    texts = [prompt(q, quiz.shots_by_subject[q.subject]) for q in quiz]
    theirs_NC = lm_eval(short, texts)
    asked = ("--quiz", quiz_folder, "--shots", SHOTS)
    said = expertcut("eval", short, *asked, "--truncate", "left", "--out", "r.json")
    (store,) = (tmp_path / "r.chunks").iterdir()
    ours_NC = load_profile(store).array("choice_logprob_NC")
    assert np.abs(ours_NC - theirs_NC).max() < TOLERANCE
    assert theirs_NC.std(axis=0).min() > 10 * TOLERANCE  # else any question would do
    assert 5 < n_long(quiz) < len(quiz) - 5  # else one of the two ways is not tried
    (model,) = load_results(tmp_path / "r.json").models
    right_N = theirs_NC.argmax(axis=1) == [q.answer for q in quiz]
    assert (model.cut, model.accuracy) == (n_long(quiz), right_N.mean())
    for shown in (said, expertcut("show", "r.json")):
        assert f"{n_long(quiz)} prompts cut from the left" in " ".join(shown.split())


def test_what_is_cut_is_the_left_end_and_the_bos_with_it(short: Path, quiz: Quiz) -> None:
    engine = Engine(open_model(short), 2048)
    for subject, questions in quiz.questions.items():
        encoded = engine.encode(quiz, subject, questions)
        length_N = lengths(quiz, subject)
        assert list(map(len, encoded.prompts)) == np.minimum(length_N, PLACES).tolist()
        lost_N = np.maximum(length_N - PLACES, 0)
        assert list(encoded.cut_N) == (lost_N.tolist() if lost_N.any() else [])
        keeps_bos = [ids[0] == BOS for ids in encoded.prompts]
        assert keeps_bos == (length_N <= PLACES).tolist()
        ends = {tuple(ids[-7:]) for ids in encoded.prompts}
        assert ends == {tuple(engine.moe.tokenizer("Answer:")["input_ids"][1:])}


def test_cut_prompts_are_scored_and_counted_as_if_each_ran_alone(short: Path, quiz: Quiz) -> None:
    together, alone = Engine(open_model(short), 700), Engine(open_model(short), 700)
    alone.is_trusted = False
    for encoded in together.encode_all(quiz):
        assert together.mode(encoded) == "packed"
        difference_NC = together.score(encoded) - alone.score(encoded)
        assert difference_NC.abs().max() < TOLERANCE


def test_every_token_that_is_left_is_counted_once(
    short: Path, quiz: Quiz, quiz_folder: Path, expertcut: Commands, tmp_path: Path
) -> None:
    asked = ("--quiz", quiz_folder, "--shots", SHOTS, "--truncate", "left")
    said = expertcut("profile", short, *asked, "--out", "p")
    assert f"{n_long(quiz)} prompts cut from the left" in " ".join(said.split())
    profile = load_profile(tmp_path / "p")
    left = sum(int(np.minimum(lengths(quiz, s), PLACES).sum()) for s in SUBJECTS)
    tokens_LE = profile.token_sum("tokens")
    assert tokens_LE is not None
    assert tokens_LE.sum(axis=1).tolist() == [2 * left] * 2  # top-2
    for subject, chunk in zip(SUBJECTS, profile.chunks, strict=True):
        lost_N = np.maximum(lengths(quiz, subject) - PLACES, 0)
        assert (CUT in chunk) == bool(lost_N.any())
        assert CUT not in chunk or chunk[CUT].tolist() == lost_N.tolist()
    found = json.loads(expertcut("show", "p", "--format", "json"))
    assert found["cut_prompts"] == n_long(quiz)
    assert "prompts cut from the left" in " ".join(expertcut("show", "p").split())


def test_without_it_they_are_refused_with_their_number_before_anything_is_written(
    short: Path, quiz: Quiz, quiz_folder: Path, expertcut: Commands, tmp_path: Path
) -> None:
    longest = max(int(lengths(quiz, subject).max()) for subject in SUBJECTS)
    for command, out in (("profile", "p"), ("eval", "r.json")):
        asked = ("--quiz", quiz_folder, "--shots", SHOTS, "--out", out)
        line = expertcut(command, short, *asked, status=2)
        assert line.count("\n") == 1
        assert f"{n_long(quiz)} of {len(quiz)} prompts" in line
        assert f"the {PLACES} of the context" in line
        assert f"the longest {longest}" in line
        assert "--truncate left" in line
    assert not list(tmp_path.iterdir())


def test_only_prompts_that_may_be_too_long_are_made_into_tokens(
    short: Path, quiz: Quiz, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, made = open_model(short), []
    engine = Engine(moe, 2048)
    tokenizer = type(moe.tokenizer)
    encode = tokenizer.__call__
    monkeypatch.setattr(tokenizer, "__call__", lambda *a: made.append(a[1]) or encode(*a))
    assert sum(n > PLACES for n in engine.possible_lengths(quiz, PLACES)) == n_long(quiz)
    assert len(made) < len(quiz)
    made.clear()
    assert list(engine.possible_lengths(quiz, 4096)) == []
    assert len(made) == len(SUBJECTS)


def test_a_profile_of_cut_prompts_is_not_gone_on_with_as_one_of_whole_ones(
    checkpoint: Checkpoints, quiz_folder: Path, expertcut: Commands, tmp_path: Path
) -> None:
    command = ("profile", checkpoint("olmoe"), "--quiz", quiz_folder, "--limit", 2, "--shots", 0)
    expertcut(*command, "--out", "whole")
    expertcut(*command, "--out", "left", "--truncate", "left")
    whole, left = load_profile(tmp_path / "whole"), load_profile(tmp_path / "left")
    assert "truncate" not in (tmp_path / "whole" / "profile.json").read_text()
    assert (whole.answers.n_cut, left.answers.n_cut) == (None, 0)
    assert whole.info.short_hash != left.info.short_hash
    for mine, theirs in zip(whole.chunks, left.chunks, strict=True):  # nothing had to be cut
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine.keys() | theirs.keys())
    line = expertcut(*command, "--out", "left", status=2)
    assert "begun with truncate left, now it is None" in line
    line = expertcut(*command, "--out", "whole", "--truncate", "left", status=2)
    assert "begun with truncate None, now it is left" in line


@pytest.fixture(scope="module")
def long_test(quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quiz with one long question in its test split, which is held out."""
    folder = tmp_path_factory.mktemp("quizzes") / "long"
    shutil.copytree(quiz_folder, folder)
    file = folder / "test" / "green_birds_test.csv"
    file.write_text(f"{'why ' * 200}?,a,b,c,d,A\n" + file.read_text())
    return folder


def test_held_out_questions_may_be_cut_where_the_profile_needed_no_cut(
    short: Path, long_test: Path, expertcut: Commands, tmp_path: Path, caplog: Any
) -> None:
    asked = ("--quiz", long_test, "--split", "val", "--shots", 0, "--limit", 4)
    expertcut("profile", short, *asked, "--out", "p")
    commands: dict[str, tuple[object, ...]] = {
        "prune": ("--keep", 4),
        "merge": ("--keep", 4),
        "reweight": ("--boost", "1:2"),
        "audit": ("--sample", 2, "--by", "activations"),
    }
    for command, options in commands.items():
        words = (command, "--profile", "p", *options, "--out", command)
        assert "1 of 34 prompts have more tokens" in expertcut(*words, status=2)
        assert not (tmp_path / command).exists()
        caplog.clear()
        expertcut(*words, "--truncate", "left")
        assert "1 of 34 test prompts lost tokens" in caplog.text
    assert load_audit(tmp_path / "audit").cut == 1
    sweep = ("prune", "--profile", "p", "--sweep", "0.5", "--limit", 2, "--out", "sweep")
    assert "1 of 6 prompts have more tokens" in expertcut(*sweep, status=2)
    printed = expertcut(*sweep, "--truncate", "left")
    assert "1 prompts are cut from the left" in " ".join(printed.split())
    found = load_sweep(tmp_path / "sweep")
    assert found.base is not None
    assert [found.base.cut, *(cell.cut for cell in found.cells)] == [1, 1]


def test_a_recipe_says_it_once_and_one_that_does_not_is_what_it_was(tmp_path: Path) -> None:
    text = "model: m\nquiz: q\nvariants:\n- name: v\n  prune: {keep: 4}\neval:\n"
    found = {}
    for name, more in (("silent", ""), ("cut", "truncate: left\n")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(text + more)
        recipe = read_recipe(file)
        found[name] = {stage.name: stage for stage in stages_of(recipe)}
        asked = found[name]["eval"].questions
        assert {a.truncate for a in asked} == {recipe.truncate}
    assert all("truncate" not in stage.settings for stage in found["silent"].values())
    asking = [name for name, stage in found["cut"].items() if "truncate" in stage.settings]
    assert asking == ["profile", "eval"]


@pytest.mark.parametrize("length", [None, 512])
def test_the_context_is_what_lm_eval_takes_it_to_be(
    checkpoint: Checkpoints, length: int | None
) -> None:
    moe = open_model(checkpoint("olmoe"))
    moe.tokenizer.model_max_length = length or 10**30
    assert context_length(moe.model.config, moe.tokenizer) == 4096
    assert context_length(PretrainedConfig(), moe.tokenizer) == length
    assert context_length(PretrainedConfig(n_positions=64), moe.tokenizer) == 64


def test_positions_that_grow_with_the_prompt_have_no_end(
    checkpoint: Checkpoints, quiz: Quiz
) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    path = checkpoint("olmoe", rope_parameters=rope, max_position_embeddings=64)
    engine = Engine(open_model(path), 2048)
    whole = load_quiz(Selection(quiz.id, shots=SHOTS, limit=1))
    assert min(encoded.longest for encoded in engine.encode_all(whole)) > 64
    assert {e.longest for e in engine.encode_all(quiz)} == {64}
