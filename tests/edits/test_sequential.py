"""`--sequential`: a layer is scored as it is once the layers before it are cut."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from expertcut.checkpoints import sequential as sequential_module
from expertcut.checkpoints.build import engine_as_profiled, profiled_source
from expertcut.checkpoints.sequential import Relay, calibration_chunks, rank_sequentially, relay
from expertcut.data import Quiz, Selection, load_quiz, prompt
from expertcut.edits.calibrate import rescaling_at_answers, rescaling_over_tokens
from expertcut.edits.criteria import CRITERIA, after_removals, calibration_inputs
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.selection import Ranking, cut, rank
from expertcut.evaluation.search_results import load_sweep
from expertcut.models import hooks, kernels
from expertcut.models.load import LoadOptions, MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.blend import Blend
from expertcut.profiling.recorder import NAMES
from expertcut.profiling.storage import Profile, load_profile
from expertcut.recipes.recipe_schema import Recipe
from expertcut.recipes.stages import stages_of
from expertcut.scoring.engine import Engine
from tests.conftest import FAMILIES, Commands, make_tokenizer, open_model, write_quiz
from tests.profiling.test_profile import profiled
from tests.support import loaded_stock

Checkpoints = Callable[..., Path]
Profiles = Callable[..., Profile]
KEEP, LAYERS, WIDTH = 4, 3, 32  # the third layer is the first that starts from stored outputs
# Packed, in groups with a shared expert, with pads, fused with biases.
FEW = ("olmoe", "gpt_oss")


def deeper(family: str) -> dict[str, object]:
    """What gives a family one layer more."""
    types: Any = FAMILIES[family].get("layer_types")
    return {"num_hidden_layers": LAYERS} | ({"layer_types": [*types, types[0]]} if types else {})


@pytest.fixture(scope="module")
def quiz(tmp_path_factory: pytest.TempPathFactory) -> Quiz:
    folder = write_quiz(tmp_path_factory.mktemp("quiz"), {"dev": 1, "test": 4, "val": 4}, seed=5)
    return load_quiz(Selection(str(folder), shots=1))


@pytest.fixture(scope="module")
def profile_of(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Profile]:
    """`profile_of("olmoe", **changes)`: the profile of a model, measured once."""
    root, made = tmp_path_factory.mktemp("profiles"), dict[str, Path]()

    def find(family: str, **changes: object) -> Profile:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            folder = root / str(len(made))
            made[key] = profiled(checkpoint(family, **changes), quiz, folder).path
        return load_profile(made[key])

    return find


def engine_of(profile: Profile) -> Engine:
    return engine_as_profiled(profile, profiled_source(profile), LoadOptions())


def sequential(profile: Profile, settings: CutSettings, **options: int) -> tuple[Ranking, Ranking]:
    """The ranking of the profile, and the one with earlier layers cut."""
    once = rank(profile, settings)
    return once, rank_sequentially(profile, once, KEEP, engine_of(profile), **options)


def reap_by_hand(moe: MoeModel, block: MoeBlock, quiz: Quiz) -> np.ndarray:
    """Mean gate weight · ‖f(x)‖ of each expert, prompt by prompt, by a hook of this file alone."""
    total, n_tokens = np.zeros(block.n_experts), np.zeros(block.n_experts)

    def see(_module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        for e in range(block.n_experts):
            at_T, slot_T = (output[2] == e).nonzero(as_tuple=True)
            if len(at_T):
                chosen, ones = torch.full((len(at_T), 1), e), torch.ones(len(at_T), 1)
                norm_T = block.experts(x_TD[at_T], chosen, ones).double().norm(dim=1)
                total[e] += float((norm_T * output[1][at_T, slot_T].double()).sum())
                n_tokens[e] += len(at_T)

    handle = block.router.register_forward_hook(see)
    for question in quiz:
        text = prompt(question, quiz.shots_by_subject[question.subject])
        with torch.no_grad():
            moe.model(torch.tensor([moe.tokenizer(text)["input_ids"]]), use_cache=False)
    handle.remove()
    return total / n_tokens.clip(1)


def really_cut(block: MoeBlock, keep: Sequence[int], settings: CutSettings, fold: Any) -> None:
    """Slices the tensors of a loaded block, or zeroes what removed experts give."""
    if settings.layout == "exact":
        removed = [e for e in range(block.n_experts) if e not in keep]
        for name, parameter in block.experts.named_parameters():
            if name.startswith("down_proj"):
                parameter.data[removed] = 0
        return
    if fold is not None:
        factors = dict(zip(keep, map(float, fold), strict=True))
        loaded_stock.scale_outputs(block, factors)
    loaded_stock.cut(block, tuple(keep))


# The law


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FEW),
        ("olmoe", {"fold": "all"}),
        ("olmoe", {"layout": "exact"}),
        ("qwen3_moe", {"layout": "exact"}),
    ],
    ids=str,
)
def test_every_layer_is_scored_as_behind_layers_that_are_really_cut(
    checkpoint: Checkpoints, profile_of: Profiles, quiz: Quiz, family: str, options: dict[str, Any]
):
    path, profile = checkpoint(family, **deeper(family)), profile_of(family, **deeper(family))
    scores_as_by_hand(path, profile, quiz, options)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*FEW}))
def test_every_family_is_scored_as_behind_layers_that_are_really_cut(
    checkpoint: Checkpoints, profile_of: Profiles, quiz: Quiz, family: str
):
    path, profile = checkpoint(family, **deeper(family)), profile_of(family, **deeper(family))
    scores_as_by_hand(path, profile, quiz, {})


def scores_as_by_hand(path: Path, profile: Profile, quiz: Quiz, options: dict[str, Any]) -> None:
    settings = CutSettings(by="reap", keep=KEEP, sequential=True, **options)
    once, found = sequential(profile, settings)
    edits = cut(found, KEEP).draft.edits
    folds: dict[int, Any] = {}
    if settings.layout == "stock":
        folds = rescaling_at_answers(profile, edits)
        if settings.fold == "all":
            folds = rescaling_over_tokens(engine_of(profile), quiz, edits)
    moe = open_model(path)
    assert np.array_equal(found.scores[0], once.scores[0])
    for block, score_E in zip(moe.blocks, found.scores, strict=True):
        np.testing.assert_allclose(score_E, reap_by_hand(moe, block, quiz), rtol=2e-5, atol=1e-7)
        really_cut(block, edits[block.name].keep, settings, folds.get(block.layer))
    for layer in range(1, LAYERS):
        usual_E = once.scores[layer]
        assert np.abs(found.scores[layer] - usual_E).max() > 1e-3 * usual_E.max()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "jamba"])
def test_layers_that_run_alone_give_the_sums_of_the_profile(profile_of: Profiles, family: str):
    profile = profile_of(family, **deeper(family))
    engine = engine_of(profile)
    running = relay(engine, list(calibration_chunks(profile, engine)), 1 << 30)
    assert running.kept_bytes
    for layer in range(LAYERS):
        for name, sum_E in running.sums(layer).items():
            wanted_LE = profile.token_sum(name)
            assert wanted_LE is not None and wanted_LE[layer].any()
            if layer < LAYERS - 1:
                assert np.array_equal(sum_E, wanted_LE[layer]), name
            else:  # the profile adds answers and other tokens in another order there
                np.testing.assert_allclose(sum_E, wanted_LE[layer], rtol=1e-6, err_msg=name)
    assert set(NAMES) == {*running.sums(0)}


def test_what_does_not_fit_in_memory_runs_from_the_start_to_the_same_bits(
    profile_of: Profiles,
):
    profile = profile_of("olmoe", **deeper("olmoe"))
    settings = CutSettings(by="reap", keep=KEEP, sequential=True)
    once, chunks = rank(profile, settings), list(calibration_chunks(profile, engine_of(profile)))
    # What its attention gives is stored beside the inputs of the layer.
    one_chunk = 2 * max(sum(map(len, chunk.prompts)) for chunk in chunks) * WIDTH * 4
    calls: list[int] = []

    def counted(work: Callable[[Engine], Any]) -> Any:
        engine = engine_of(profile)
        # The second layer is measured first, and comes again behind it, cut.
        attention: Any = engine.moe.model.model.layers[1].self_attn.q_proj
        with attention.register_forward_pre_hook(lambda *_: calls.append(1)):
            return work(engine)

    counted(lambda engine: relay(engine, chunks, 1 << 30))
    n_runs, n_checking, scores = [], len(calls), []
    for kept_bytes in (1 << 30, one_chunk, 0):
        calls.clear()
        again = counted(lambda e: rank_sequentially(profile, once, KEEP, e, kept_bytes))  # noqa: B023
        n_runs.append(len(calls) - (n_checking if kept_bytes else 0))
        scores.append(np.stack(again.scores))
    assert np.array_equal(scores[0], scores[1]) and np.array_equal(scores[0], scores[2])
    assert 0 < n_runs[0] < n_runs[1] < n_runs[2]
    assert n_runs[2] == 2 * n_runs[0]


def test_experts_run_again_only_on_tokens_that_come_from_removed_ones(
    profile_of: Profiles, monkeypatch: pytest.MonkeyPatch
):
    profile, n_rows, scores = profile_of("olmoe", **deeper("olmoe")), [], []
    once = rank(profile, CutSettings(by="reap", keep=KEEP, sequential=True, fold="off"))
    run = kernels.own_output
    for module in (kernels, hooks):
        own = lambda experts, e, x_MD: n_rows.append(len(x_MD)) or run(experts, e, x_MD)  # noqa: E731
        monkeypatch.setattr(module, "own_output", own)
    found = []
    for every in (1, 0):
        monkeypatch.setattr(
            sequential_module,
            "relay",
            lambda engine, chunks, room: Relay(engine, chunks, 1 << 30, every=every),  # noqa: B023
        )
        n_rows.clear()
        scores.append(rank_sequentially(profile, once, KEEP, engine_of(profile)).scores)
        found.append(sum(n_rows))
    assert np.array_equal(np.stack(scores[0]), np.stack(scores[1]))
    assert found[0] < 0.95 * found[1]


def test_a_blend_by_size_is_scored_as_the_profile_of_all_its_domains(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
):
    path, settings = checkpoint("olmoe"), CutSettings(by="reap", keep=KEEP, sequential=True)

    def scores(*parts: Quiz, weights: Sequence[float] | None = None) -> list[np.ndarray]:
        own = [profiled(path, part, tmp_path / f"{len(parts)}-{n}") for n, part in enumerate(parts)]
        sizes = [float(np.sum(part.token_sum("tokens"))) for part in own]
        profile = own[0] if len(own) == 1 else Blend(own, weights or sizes, "sum")
        return list(sequential(profile, settings)[1].scores)

    subjects = sorted(quiz.questions)
    halves = [
        load_quiz(Selection(quiz.id, shots=1, subjects=tuple(own)))
        for own in (subjects[:1], subjects[1:])
    ]
    whole, blended = scores(quiz), scores(*halves)
    np.testing.assert_allclose(blended[1], whole[1], rtol=1e-6)
    assert not np.allclose(scores(*halves, weights=[9, 1])[1], whole[1], rtol=1e-3)


def test_reconstruction_is_tried_on_inputs_behind_the_cut_layers(
    profile_of: Profiles,
):
    profile = profile_of("olmoe", **deeper("olmoe"))
    settings = CutSettings(by="reconstruction", keep=KEEP, sequential=True, fold="off")
    engine = engine_of(profile)
    once = rank(profile, settings, engine)
    found = rank_sequentially(profile, once, KEEP, engine)
    edits = cut(found, KEEP).draft.edits
    assert found.orders[0] == once.orders[0] and found.orders[1:] != once.orders[1:]
    for block in engine.moe.blocks:
        x_TD = calibration_inputs(profile, engine)[block.layer]
        by_hand_E = after_removals(profile, CRITERIA["reconstruction"], block, x_TD)
        assert found.scores[block.layer].tolist() == by_hand_E.tolist()
        loaded_stock.cut(block, edits[block.name].keep)


# A planted case


def planted(path: Path, folder: Path) -> Path:
    """OLMoE in which expert 3 of layer 1 is routed to where expert 5 of layer 0 has written.

    The latter writes little, and into a direction of its own; the former answers loudly.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    inner = model.model
    inner.embed_tokens.weight.data[:, 0], inner.embed_tokens.weight.data[:, 1] = 0, 1
    for layer in inner.layers:
        layer.self_attn.o_proj.weight.data[:2] = 0
        layer.mlp.experts.down_proj.data[:, :2] = 0
    inner.layers[0].mlp.gate.weight.data[5] = 0
    inner.layers[0].mlp.gate.weight.data[5, 1] = 2  # to which many tokens are routed
    written_DF = inner.layers[0].mlp.experts.down_proj.data[5]
    written_DF[1:], written_DF[0] = 0, 1e-4
    reader = inner.layers[1].mlp
    reader.gate.weight.data[3] = 0
    reader.gate.weight.data[3, :2] = torch.tensor([1e7, -20.0])
    reader.experts.down_proj.data[3] *= 20
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_an_expert_that_only_a_removed_one_feeds_goes_with_it(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
):
    profile = profiled(planted(checkpoint("olmoe"), tmp_path / "m"), quiz, tmp_path / "p")
    settings = CutSettings(by="reap", keep=KEEP)
    once, found = sequential(profile, settings)
    one_shot, after = (cut(ranking, KEEP).draft.edits for ranking in (once, found))
    first, second = one_shot
    assert 5 not in one_shot[first].keep and one_shot[first] == after[first]
    assert int(once.scores[1].argmax()) == 3 and 3 in one_shot[second].keep
    assert found.scores[1][3] == 0 and 3 not in after[second].keep


# The command


def test_the_plan_says_so_and_comes_again_with_the_same_bytes(
    profile_of: Profiles, tmp_path: Path, expertcut: Commands
):
    shutil.copytree(profile_of("olmoe").path, "p")
    line = "prune --keep 4 --by reap --profile p --no-verify"
    expertcut(f"{line} --plan-only --out usual")
    expertcut(f"{line} --plan-only --out plan --sequential")
    expertcut(f"{line} --out made --sequential")
    usual, plan, made = (
        json.loads((tmp_path / name / "plan.json").read_text())
        for name in ("usual", "plan", "made")
    )
    assert plan["action"] == "prune --keep 4 --sequential" == made["action"]
    assert plan["blocks"] == made["blocks"] != usual["blocks"]
    assert {k for k in plan if plan[k] != usual[k]} <= {"action", "blocks"}
    said = expertcut(f"{line} --plan-only --out again --sequential")
    assert "sequential" in expertcut("show again") and "written" in said
    for name in ("plan.json", "chosen_on.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plan" / name).read_bytes()


def test_a_size_bounds_a_sequential_cut_too(
    checkpoint: Checkpoints, profile_of: Profiles, tmp_path: Path, expertcut: Commands
):
    path = checkpoint("olmoe")
    shutil.copytree(profile_of("olmoe").path, "p")
    most = (path / "model.safetensors").stat().st_size * 4 // 5
    for layout in ("stock", "exact"):
        given = f"--max-bytes {most} --by reap --layout {layout} --sequential"
        expertcut(f"prune --profile p --no-verify --out {layout} {given}")
        written = (tmp_path / layout / "model.safetensors").stat().st_size
        assert most * 0.8 < written <= most


@pytest.mark.parametrize(
    ("given", "because"),
    [
        ("--keep 6 --by random", "looks at no tokens"),
        ("--keep 6 --by aimer", "looks at no tokens"),
        ("--keep 6", "counts answers: add --tokens all"),
        ("--keep 6 --by weighted_accuracy", "counts answers: add --tokens all"),
        ("--keep 6 --by reap --layout exact --budget global", "one after the other"),
        ("--keep-active --tokens all", "what the unedited model routes to"),
    ],
)
def test_what_cannot_be_measured_layer_after_layer_is_refused_in_a_line(
    expertcut: Commands, given: str, because: str
):
    said = expertcut(f"prune {given} --sequential", status=2)
    assert because in said and len(said.splitlines()) == 1


def test_a_sweep_cuts_as_prune_does_and_never_mixes_with_another(
    profile_of: Profiles, tmp_path: Path, expertcut: Commands
):
    profile = profile_of("olmoe")
    shutil.copytree(profile.path, "p")
    line = "sweep 0.5 --by reap --protect none --limit 2 --profile p"
    assert "--sequential" in expertcut(f"{line} --sequential --out s")
    _, found = sequential(profile, CutSettings(by="reap", sequential=True))
    (cell,) = load_sweep(tmp_path / "s").cells
    assert cell.keep == {n: e.keep for n, e in cut(found, KEEP).draft.edits.items()}
    assert "its sequential was True" in expertcut(f"{line} --out s", status=2)
    expertcut(f"{line} --out usual")
    assert b"sequential" not in (tmp_path / "usual" / "sweep.json").read_bytes()
    assert load_sweep(tmp_path / "usual").cells[0].keep != cell.keep


def test_a_recipe_without_it_keeps_its_hash():
    own = {"usual": {}, "changed": {"sequential": True, "by": "reap"}}
    variants = [{"name": n, "prune": {"keep": 6} | more} for n, more in own.items()]
    stages = stages_of(Recipe.of_recipe({"model": "m/m", "variants": variants}))
    by_name = {stage.name: stage.settings.get("prune") for stage in stages}
    assert "sequential" not in by_name["usual"]
    assert by_name["changed"]["sequential"] is True
