"""Layout exact from the command line: profile, prune, eval, on a random and the bundled model."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertcut.models.safetensors_index import read_headers
from tests.conftest import Commands, make_checkpoint, write_quiz
from tests.hostile.running import run
from tests.hostile.world import copied_world
from tests.support.exact_models import as_written_before, declared

QUICKSTART = Path(__file__).parents[2] / "checkpoints" / "quickstart"


def comparison(folder: Path) -> dict[str, Any]:
    (found,) = json.loads((folder / "results.json").read_text())["comparisons"]
    return dict(found)


@pytest.mark.parametrize("is_bundled", [pytest.param(True, marks=pytest.mark.slow), False])
def test_keeping_what_fires_at_any_token_changes_no_bit_of_what_was_profiled(
    tmp_path: Path, expertcut: Commands, is_bundled: bool
) -> None:
    if is_bundled:
        model, asked = (
            QUICKSTART,
            f"--quiz {QUICKSTART / 'quiz'} --limit 2",
        )
    else:
        model = make_checkpoint(tmp_path / "model", "olmoe", num_experts=64)
        asked = f"--quiz {write_quiz(tmp_path / 'quiz')}"
    asked += " --split val --threads 1"
    expertcut(f"profile {model} {asked} --out p")
    printed = expertcut("prune --profile p --keep-active --positions all --layout exact --out cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    n_removed = sum(map(len, declared(config).values()))
    if not is_bundled:  # there every expert fires at some token
        assert n_removed > 0
        assert "all of them come out bit-equal" in printed
    expertcut(f"eval {model} cut {asked} --out results.json")
    found = comparison(tmp_path)
    assert found["max_abs_logprob_diff"] == 0.0
    assert (found["gained"], found["lost"]) == (0, 0)
    assert is_bundled or (found["parameters_delta"] < 0 and found["bytes_delta"] < 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, a profile `p` and an exact checkpoint `cut`, to be copied."""
    root = tmp_path_factory.mktemp("exact")
    make_checkpoint(root / "model", "olmoe")
    write_quiz(root / "quiz", {"dev": 5, "val": 3, "test": 2})
    for line in (
        "profile model --quiz quiz --split val --shots 1 --threads 1 --out p",
        "prune --profile p --keep 3 --layout exact --out cut",
    ):
        ended = run(root, line.split())
        assert ended.status == 0, ended.stderr
    return root


@pytest.fixture
def cut(made: Path, tmp_path: Path) -> Path:
    """An exact checkpoint of a small model, beside its profile `p`."""
    return copied_world(made, tmp_path) / "cut"


def test_code_of_our_own_runs_and_no_other(cut: Path, expertcut: Commands) -> None:
    line = "eval model cut --quiz quiz --shots 1 --out results.json"
    expertcut(line)
    with (cut / "modeling_exact.py").open("a") as file:
        file.write("\nraise SystemError('the checkpoint ran its code')\n")
    said = expertcut(line, status=2)
    assert "brings code of its own: read that, then --trust-remote-code" in said
    said = expertcut(f"{line} --trust-remote-code", status=2)
    assert "the checkpoint ran its code" in said


def test_a_checkpoint_as_written_before_goes_through_every_command(
    cut: Path, expertcut: Commands
) -> None:
    as_written_before(cut, cut.parent / "old")
    expertcut("eval cut old --quiz quiz --shots 1 --out results.json")
    found = comparison(cut.parent)
    assert (found["max_abs_logprob_diff"], found["parameters_delta"]) == (0.0, 0)
    expertcut("publish old who/what --dry-run")
    card = (cut.parent / "old" / "README.md").read_text()
    assert "vLLM 0.32" in card and "wrong" in card
    expertcut("profile old --quiz quiz --split val --shots 1 --threads 1 --out q")
    keep = json.loads((cut / "plan.json").read_text())["blocks"]["model.layers.1.mlp"]["keep"]
    expertcut(f"reweight --profile q --boost 1:{keep[0]}=1 --layout exact --out new")
    names = set(read_headers(cut.parent / "new"))
    assert names == {*read_headers(cut), "model.layers.1.mlp.gate.bias"}
    said = expertcut("prune --profile q --keep 2 --layout exact --out again", status=2)
    assert "has layout exact already" in said and said.count("\n") == 1


@pytest.mark.parametrize("named", ["other--modeling_exact.A", "modelling.A", 3, "modeling_exact"])
def test_only_the_one_file_counts_as_ours(cut: Path, expertcut: Commands, named: object) -> None:
    config = json.loads((cut / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = named
    (cut / "config.json").write_text(json.dumps(config))
    expertcut("eval model cut --quiz quiz --shots 1 --out results.json", status=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--keep 3 --removed mean", "--replace-with mean needs --layout exact: add it"),
        ("--keep 3 --removed zero", "--replace-with zero needs --layout exact"),
        ("--keep 3 --layout exact --fold all", "--rescale-gates all needs --layout stock"),
        ("--keep 0 --layout exact", "--keep: must be greater than or equal to 1"),
        ("--keep 9 --layout exact", "keep 1 to 8"),
        ("--keep 1", "keep 2 to 8"),
        ("--keep 3 --boost 1:99", "no expert 99 in layer 1: it has experts 0 to 7"),
        ("--keep 8 --boost 1:3=1 --layout exact --apply-at answer", "--apply-at answer is of"),
        ("--keep 3 --layout exact --apply-at all", "says where a bias acts, and there is none"),
        ("--keep 3 --scale 1:3", "must give a factor"),
        ("--keep 3 --layout other", "must be 'stock' or 'exact', not 'other'"),
    ],
)
def test_options_that_do_not_fit_the_layout_are_refused(
    cut: Path, expertcut: Commands, options: str, words: str
) -> None:
    said = expertcut(f"prune --profile p {options} --out new", status=2)
    assert words in said and said.count("\n") == 1
    assert not (cut.parent / "new").exists()


def test_a_plan_of_layout_exact_can_be_written_and_shown_alone(
    cut: Path, expertcut: Commands
) -> None:
    expertcut("prune --profile p --keep-active --layout exact --removed mean --plan-only --out q")
    plan = json.loads((cut.parent / "q" / "plan.json").read_text())
    assert (plan["layout"], plan["removal"], plan["removed"]) == ("exact", "constant", "mean")
    assert plan["fold"] is None and plan["proof"] == {}
    assert "prune --keep-active (exact)" in expertcut("show q")


def test_a_cut_and_tilts_are_said_in_words(cut: Path, expertcut: Commands) -> None:
    keep = json.loads((cut / "plan.json").read_text())["blocks"]["model.layers.1.mlp"]["keep"]
    line = (
        f"prune --profile p --keep 3 --boost {keep[0]}=1 --scale 1:{keep[1]}=0.5 --out both --wide"
    )
    printed = expertcut(line)
    assert f"Expert {keep[0]} of layer 1 is boosted by +1.0000 on its logit (given)" in printed
    assert f"The gate weight of expert {keep[1]} of layer 1 is multiplied by 0.5" in printed
    assert "the plan without biases" in printed and "the same plan at run time" in printed
    expertcut("profile both --quiz quiz --split val --shots 1 --threads 1 --out p-both")
    gone = next(e for e in range(8) if e not in keep)
    said = expertcut(f"reweight --profile p-both --boost 1:{gone}=1 --out again", status=2)
    assert f"expert {gone} of layer 1 is not in this pruned model" in said
    assert said.count("\n") == 1
    printed = expertcut(
        f"reweight --profile p-both --boost {keep[2]}=1 --apply-at answer --out again"
    )
    assert f"Expert {keep[2]} of layer 1 is boosted by +1.0000" in printed
    assert "This model was cut before" in expertcut("show p-both --tables")
    said = expertcut("profile cut --quiz quiz --split val --shots 1 --threads 1 --out p-cut")
    said = expertcut(f"reweight --profile p-cut --boost {keep[0]}=1 --out new", status=2)
    assert "has layout exact, which layout stock cannot carry on: take --layout exact" in said
    expertcut(f"reweight --profile p-cut --boost {keep[0]}=1 --layout exact --out new")


def test_outputs_are_named_after_what_makes_them_differ(cut: Path, expertcut: Commands) -> None:
    for options in (
        "--keep-active --layout exact",
        "--keep 3 --layout exact --removed mean --positions all",
        "--keep 3 --fold off",
    ):
        expertcut(f"prune --profile p {options} --no-verify")
    expertcut("reweight --profile p --boost 1:3=1 --layout exact --no-verify")
    expertcut("reweight --profile p --boost 1:3=1 --scale 0:1=2 --apply-at answer --no-verify")
    assert sorted(folder.name for folder in (cut.parent / "checkpoints").iterdir()) == [
        "model-boost-1.3-exact",
        "model-boost-1.3-scale-0.1-answer",
        "model-keep-3-activations-all-exact-mean",
        "model-keep-3-activations-fold-off",
        "model-keep-active-exact",
    ]
