"""An answer that is no finite number stops the run and is named; it is never a wrong answer."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.router_edits import RouterEdit
from expertcut.errors import ModelError
from expertcut.evaluation.reweight_search import CachedScorer
from expertcut.models.load import MoeModel
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import load_profile
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import encode
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import Commands, make_checkpoint, make_tokenizer, open_model, write_quiz

SIGN = "~"  # in one question of the test split, and nowhere else
WHERE = "question 4 of old_clocks (counted from 0)"
NAMED = rf"expertcut: {{stage}}\S+: non-finite log-probability for {re.escape(WHERE)}: "
FIRST = "is the first module with a non-finite output"
HERE = f"layer 0 (model.layers.0.mlp.experts) {FIRST}, in float32: its weights"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights are finite, and all its experts overflow at one sign.

    That sign alone has a value in the first dimension, by which they multiply twice.
    """
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "olmoe", "olmoe")
    (sign,) = make_tokenizer()(SIGN)["input_ids"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][sign, 0] = 100
    tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
    for expert in range(8):
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.experts.{expert}.{name}.weight"][:, 0] = 1e19
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def quiz_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_quiz(tmp_path_factory.mktemp("quiz") / "birds")
    file = folder / "test" / "old_clocks_test.csv"
    lines = file.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace("?", SIGN, 1)
    file.write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def profile(model: Path, quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the split val, which the model can read."""
    folder = tmp_path_factory.mktemp("profile") / "val"
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=1))
    list(Measurement(open_model(model), quiz, None, MeasureOptions(threads=1)).run(folder))
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "profile {model} --quiz {quiz} --shots 1 --out out",
        "eval {model} --quiz {quiz} --shots 1 --out out/results.json",
        "prune --keep 5 --profile {profile} --out out",
        "prune --keep 5 --layout exact --profile {profile} --out out",
        "prune --sweep 0.5 --by activations --profile {profile} --out out",
        "audit --sample 2 --profile {profile} --out out",
        "reweight --boost 1=1 --profile {profile} --out out",
        "merge --keep 5 --profile {profile} --out out",
    ],
)
def test_every_command_that_asks_questions_names_the_one_without_an_answer(
    line: str, model: Path, quiz_folder: Path, profile: Path, tmp_path: Path, expertcut: Commands
) -> None:
    said = expertcut(line.format(model=model, quiz=quiz_folder, profile=profile), status=2)
    assert re.match(NAMED.format(stage="") + re.escape(HERE), said), said
    assert said.count("\n") == 1
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left <= {"profile.json", "sweep.json", *(f"{s}-0.safetensors" for s in FINISHED)}


FINISHED = ("green_birds", "tall_trees")  # the other subjects, which are kept


def test_the_subjects_that_were_answered_are_kept(
    model: Path, quiz_folder: Path, tmp_path: Path, expertcut: Commands
) -> None:
    line = f"profile {model} --quiz {quiz_folder} --shots 1 --out {tmp_path / 'out'}"
    expertcut(line, status=2)
    found = load_profile(tmp_path / "out")
    assert "old_clocks-0.safetensors" in found.missing
    assert not list((tmp_path / "out").glob("claims/*"))


# Where it begins


@pytest.fixture
def quiz(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), split="val", shots=1))


def overflowing(moe: MoeModel, name: str) -> None:
    """A matrix so large that what comes out is none of the dtype's numbers."""
    dict(moe.model.named_parameters())[name].data.fill_(3e38)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.0.mlp.experts.down_proj", "layer 0 (model.layers.0.mlp.experts)"),
        ("model.layers.1.self_attn.v_proj.weight", "layer 1 (model.layers.1.self_attn.v_proj)"),
        ("model.layers.1.mlp.gate.weight", "layer 1 (model.layers.1.mlp.gate)"),
        ("lm_head.weight", "lm_head"),
    ],
)
@pytest.mark.parametrize("stats", ["none", "all"])
def test_the_first_layer_that_gives_none_is_named(
    name: str, place: str, stats: str, checkpoint: Callable[..., Path], quiz: Quiz, tmp_path: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    options = MeasureOptions(stats=stats, threads=1)  # type: ignore[arg-type]
    measurement = Measurement(moe, quiz, None, options)
    overflowing(moe, name)
    hooks = sum(len(module._forward_hooks) for module in moe.model.modules())
    with pytest.raises(ModelError, match=re.escape(f"{place} {FIRST}")):
        list(measurement.run(tmp_path / "p"))
    assert sum(len(module._forward_hooks) for module in moe.model.modules()) == hooks
    assert not any("forward" in vars(module) for module in moe.model.modules())


def test_every_family_says_where(different_moe: MoeModel, quiz: Quiz) -> None:
    engine, block = Engine(different_moe, 500), different_moe.blocks[-1]
    assert ask(engine, quiz).isfinite().all()
    for name, parameter in block.experts.named_parameters():
        if "down" in name or name.startswith("w2"):
            parameter.data.fill_(torch.inf)
    with pytest.raises(ModelError, match=re.escape(f"({block.name}")):
        ask(engine, quiz)


def test_masked_experts_are_not_taken_for_the_fault(
    checkpoint: Callable[..., Path], quiz: Quiz
) -> None:
    """Their logits are −inf, in layer 0, and the fault is in layer 1."""
    moe = open_model(checkpoint("olmoe"))
    gone = torch.zeros(8)
    gone[2] = -torch.inf
    with tilted(moe.blocks, Tilts({0: gone}, apply_at="all")) as begin:
        chunk = encode(moe.tokenizer, quiz.questions["old_clocks"], ())
        assert Engine(moe, 500).score(chunk, begin).isfinite().all()
        overflowing(moe, "model.layers.1.mlp.experts.down_proj")
        with pytest.raises(ModelError, match=r"layer 1 \(model\.layers\.1\.mlp\.experts\)"):
            Engine(moe, 500).score(chunk, begin)


def test_a_later_run_that_starts_where_something_changes_says_where_too(
    checkpoint: Callable[..., Path], quiz: Quiz
) -> None:
    """As in an audit and a proof: layers before the change are not run, but what they gave is."""
    moe = open_model(checkpoint("olmoe"))
    rescorer = CachedScorer(Engine(moe, 500), quiz)
    assert rescorer.replay.starts == (1,)
    overflowing(moe, "model.layers.1.mlp.experts.down_proj")
    with pytest.raises(ModelError, match=r"layer 1 \(model\.layers\.1\.mlp\.experts\)"):
        rescorer.ask((RouterEdit(1, 3, 0.5),))
    assert not any("forward" in vars(module) for module in moe.model.modules())


def test_tokens_that_reach_no_answer_stop_a_profile_too(
    checkpoint: Callable[..., Path], quiz: Quiz, tmp_path: Path
) -> None:
    """In the last block only answers go on, but a profile sums over all."""
    moe = open_model(checkpoint("olmoe"))
    sound = Measurement(moe, quiz, None, MeasureOptions(stats="all", threads=1))
    list(sound.run(tmp_path / "sound"))
    found = load_profile(tmp_path / "sound")
    tokens_LE = found.token_sum("tokens")
    assert tokens_LE is not None
    answering = set(found.array("chosen_NLK")[:, 1].ravel().tolist())
    (expert, *_) = [e for e in range(8) if e not in answering and tokens_LE[1, e] > 0]
    experts = moe.blocks[1].experts
    experts.down_proj.data[expert] = 3e38
    assert ask(sound.engine, quiz).isfinite().all()
    with pytest.raises(ModelError, match=r"norm_LE of layer 1 \(model\.layers\.1\.mlp\)"):
        list(sound.run(tmp_path / "spoilt"))
    assert len(load_profile(tmp_path / "spoilt").missing) == 3


def test_a_choice_of_probability_zero_is_no_answer_either(
    checkpoint: Callable[..., Path], quiz: Quiz
) -> None:
    """A logit of −inf would make the choice a wrong one without a word."""
    moe = open_model(checkpoint("olmoe"))
    chunk = encode(moe.tokenizer, quiz.questions["old_clocks"], ())
    letter = chunk.choice_ids[0][2]

    def forbid(_module: object, _args: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([letter]), -torch.inf)

    moe.model.lm_head.register_forward_hook(forbid)
    with pytest.raises(ModelError, match=r"question 0 of old_clocks.* lm_head is the first"):
        Engine(moe, 500).score(chunk)


def test_what_happens_in_packs_alone_is_said_so(
    checkpoint: Callable[..., Path], quiz: Quiz
) -> None:
    moe = open_model(checkpoint("olmoe"))
    chunk = encode(moe.tokenizer, quiz.questions["old_clocks"], ())
    n_alone = max(map(len, chunk.prompts))

    def spoil(_module: object, _args: object, out: torch.Tensor) -> torch.Tensor:
        return out if out.shape[1] <= n_alone else out * torch.nan

    moe.model.get_input_embeddings().register_forward_hook(spoil)
    with pytest.raises(ModelError, match=r"only in a pack with others: try another --batch-tokens"):
        Engine(moe, 2000).score(chunk)


def test_half_precision_gets_other_advice(checkpoint: Callable[..., Path], quiz: Quiz) -> None:
    moe = open_model(checkpoint("olmoe"), dtype="float16")
    dict(moe.model.named_parameters())["model.layers.1.mlp.experts.down_proj"].data.fill_(6e4)
    with pytest.raises(ModelError, match=r"in float16: .* --dtype bfloat16 or float32"):
        ask(Engine(moe, 500), quiz)
