"""Biases and factors in every form: at run time, in both layouts, on top of cuts, on cut models."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertcut.checkpoints.build import BuildOptions, Built, build
from expertcut.checkpoints.edit import simulated
from expertcut.checkpoints.export import edits_of
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.plan import EditPlan, ids_text, load_hashes, load_plan
from expertcut.edits.router_edits import reweight_draft, scalings, tilts, with_tilts
from expertcut.edits.selection import choose
from expertcut.errors import ContractError, PlanError, SettingsError
from expertcut.models.checkpoint_dir import read_config
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import LoadOptions, MoeModel
from expertcut.profiling.storage import Profile
from expertcut.reporting.edit_tables import tilt_sentences
from expertcut.reporting.views import find_shown
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import Pass
from tests.conftest import STORAGE_FORMS, open_model, profiled, slow_but
from tests.scoring.test_tilting import by_hand
from tests.support.exact_models import EXACT_FAMILIES

Profiles = Callable[..., Profile]
AS_IS = BuildOptions(LoadOptions())
UNASKED = BuildOptions(LoadOptions(), is_verified=False)
LAST = "model.layers.1.mlp"


@pytest.fixture
def measure(quiz_folder: Path, tmp_path: Path) -> Callable[[Path], Profile]:
    return lambda path: profiled(path, quiz_folder, tmp_path / f"profile-of-{path.name}")


@pytest.fixture
def held_out(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), split="test", shots=1))


def model_of(profile: Profile, dtype: str = "float64") -> MoeModel:
    return open_model(Path(profile.info.model.id), dtype=dtype)


def scored(moe: MoeModel, quiz: Quiz) -> Tensor:
    return ask(Engine(moe, 2048), quiz)


def scored_at_run_time(moe: MoeModel, quiz: Quiz, draft: EditPlan) -> Tensor:
    with simulated(moe, edits_of(draft), is_as_written=False) as begin:
        return ask(Engine(moe, 2048), quiz, begin)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b)[a.isfinite()].abs().max())


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_a_bias_at_run_time_in_the_gate_and_by_hand_are_the_same(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path, family: str
) -> None:
    profile = profile_of(family)
    draft = reweight_draft(profile, tilts(profile, ["1:3=2.0"], ["0:1=0.5"]), "exact")
    build(profile, draft, tmp_path / "out", UNASKED)
    moe = model_of(profile)
    base = scored(moe, held_out)
    at_run = scored_at_run_time(moe, held_out, draft)
    exported = scored(open_model(tmp_path / "out", dtype="float64"), held_out)
    for layer, (expert, bias) in enumerate(((1, -0.5), (3, 2.0))):
        bias_E = torch.zeros(8, dtype=torch.float64)
        bias_E[expert] = bias
        moe.blocks[layer].router.forward = by_hand(moe.blocks[layer], bias_E, slice(None))
    written_out = scored(moe, held_out)
    assert apart(at_run, base) > 0.1
    assert apart(at_run, written_out) < 1e-6
    assert apart(at_run, exported) < 1e-6


def carried(profile: Profile, built: Built, held_out: Quiz, draft: EditPlan) -> tuple[float, float]:
    """How far a checkpoint is from the unedited model, and from the plan in it at run time."""
    moe = model_of(profile)
    base, wanted = scored(moe, held_out), scored_at_run_time(moe, held_out, draft)
    found = scored(open_model(built.folder, dtype="float64"), held_out)
    return apart(found, base), apart(found, wanted)


# With and without fused experts; test_streaming.py scales weights in all families.
@pytest.mark.parametrize("family", slow_but(("olmoe", "gpt_oss"), STORAGE_FORMS))
def test_factors_in_layout_stock_are_those_at_run_time(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path, family: str
) -> None:
    profile = profile_of(family)
    factors = scalings(profile, ["0:1=0.3", "3=1.7", "5=0", "0:6=2.5"])
    draft = reweight_draft(profile, [], "stock", factors)
    assert not draft.is_fitting
    built = build(profile, draft, tmp_path / "out", UNASKED)
    from_base, from_plan = carried(profile, built, held_out, draft)
    assert from_base > 1e-3
    assert from_plan < 4e-6  # two units in the last place of a log p, which is float32


@pytest.mark.parametrize("family", slow_but(("olmoe", "qwen2_moe"), EXACT_FAMILIES))
def test_factors_in_layout_exact_are_those_at_run_time(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path, family: str
) -> None:
    profile = profile_of(family)
    found, factors = tilts(profile, ["3=2"], []), scalings(profile, ["0:1=0.3", "3=1.7"])
    draft = reweight_draft(profile, found, "exact", factors)
    from_base, from_plan = carried(
        profile, build(profile, draft, tmp_path / "out", AS_IS), held_out, draft
    )
    assert from_base > 0.1
    assert from_plan < 1e-6


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_tilt_for_answers_acts_there_and_hardly_elsewhere(
    profile_of: Profiles, tmp_path: Path, family: str
) -> None:
    profile = profile_of(family, hidden_size=64)
    found = tilts(profile, ["0:3=2.0"], [])
    moved: dict[str, Tensor] = {}
    for apply_at in ("answer", "all"):
        draft = reweight_draft(profile, found, "stock", (), apply_at)  # type: ignore[arg-type]
        built = build(profile, draft, tmp_path / apply_at, AS_IS)
        assert load_plan(built.folder).apply_at == built.plan.apply_at == apply_at
        rows = [open_model(p).blocks[0].router for p in (Path(profile.info.model.id), built.folder)]
        old, new = (dict(router.named_parameters()) for router in rows)
        changed = {n for n in old if not torch.equal(old[n], new[n])}
        is_own = family == "gpt_oss" and apply_at == "all"
        assert changed == ({"bias"} if is_own else {"weight"})
        (fit,) = built.fits
        moved[apply_at] = torch.tensor([fit.mean_answer, fit.mean_elsewhere, fit.std_elsewhere])
        assert built.proof and [o.form for o in built.proof.outcomes] == [
            *("unedited", "bias at answer positions only", "bias everywhere", "this checkpoint")
        ]
    assert moved["answer"][0] > 0.5
    assert moved["answer"][1].abs() < 0.2 < 0.5 < moved["all"][1]


def test_the_outcomes_are_those_of_scoring_each_form_alone(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path
) -> None:
    profile = profile_of("olmoe")
    draft = reweight_draft(profile, tilts(profile, ["0:3=3.0"], []), "exact")
    built = build(profile, draft, tmp_path / "out", AS_IS)
    moe = model_of(profile, "float32")
    forms = [
        scored(moe, held_out),
        scored_at_run_time(moe, held_out, replace(draft, apply_at="answer")),
        scored_at_run_time(moe, held_out, draft),
        scored(open_model(built.folder), held_out),
    ]
    answers = torch.tensor([q.answer for q in held_out])
    assert built.proof
    for outcome, logprob_NC in zip(built.proof.outcomes, forms, strict=True):
        said_N = logprob_NC.argmax(dim=1)
        assert outcome.questions == len(answers) == 33
        assert outcome.accuracy == pytest.approx(float((said_N == answers).double().mean()))
        right = logprob_NC.gather(1, answers[:, None]).double().mean()
        assert outcome.right_logprob == pytest.approx(float(right), abs=1e-5)
        assert outcome.flipped == int((said_N != forms[0].argmax(dim=1)).sum())
    assert len({o.right_logprob for o in built.proof.outcomes}) >= 3
    assert load_plan(built.folder).proof.outcomes[2].flipped == built.proof.outcomes[2].flipped


def choices(moe: MoeModel, quiz: Quiz, draft: EditPlan | None) -> tuple[list[set[int]], list[bool]]:
    """What every token of the last layer chose, and whether it is an answer position."""
    chosen: list[set[int]] = []
    is_answer: list[bool] = []
    steps: list[Pass] = []

    def see(routing: Routing) -> None:
        chosen.extend(set(ids) for ids in routing.experts_TK.tolist())
        answers = set(steps[-1].answers_N.tolist())
        is_answer.extend(t in answers for t in range(len(routing.experts_TK)))

    with observe_routers(moe.blocks[-1:], see):
        if draft is None:
            ask(Engine(moe, 4096), quiz, steps.append)
        else:
            with simulated(moe, edits_of(draft), is_as_written=False) as begin:
                ask(Engine(moe, 4096), quiz, lambda step: (steps.append(step), begin(step)))  # type: ignore[func-returns-value]
    return chosen, is_answer


@pytest.mark.parametrize("n_keep", [8, 6])
def test_agreement_is_how_often_the_very_experts_of_the_exact_bias_are_chosen(
    profile_of: Profiles, held_out: Quiz, tmp_path: Path, n_keep: int
) -> None:
    profile = profile_of("olmoe")
    cut = choose(profile, CutSettings(keep=n_keep, fold="off")).draft
    expert = cut.edits[LAST].keep[-1]
    draft = with_tilts(cut, tilts(profile, [f"{expert}=1.5"], []))
    built = build(profile, draft, tmp_path / "out", AS_IS)
    wanted, is_answer = choices(model_of(profile, "float32"), held_out, draft)
    found, _ = choices(open_model(built.folder), held_out, None)
    keep = draft.edits[LAST].keep
    named = [{keep[row] for row in rows} for rows in found]
    overlap = [len(a & b) / 2 for a, b in zip(wanted, named, strict=True)]
    at = [o for o, is_it in zip(overlap, is_answer, strict=True) if is_it]
    assert built.proof
    (agreement,) = built.proof.agreement
    assert agreement.layer == 1 and len(at) == 33
    for found_share, share in (
        (agreement.same_answer, sum(o == 1 for o in at) / len(at)),
        (agreement.overlap_answer, sum(at) / len(at)),
        (agreement.same_all, sum(o == 1 for o in overlap) / len(overlap)),
        (agreement.overlap_all, sum(overlap) / len(overlap)),
    ):
        assert found_share == pytest.approx(share, abs=1e-9)
    assert 0.3 < agreement.same_all < 1
    sentences = tilt_sentences(tilts(profile, [f"{expert}=1.5"], []), built, draft.numbers)
    assert f"Expert {expert} of layer 1 is boosted by +1.5000" in sentences[0]
    assert f"the exact bias at {agreement.same_answer:.1%} of answer positions" in sentences[1]


def test_a_bias_that_the_layout_carries_exactly_agrees_everywhere(
    profile_of: Profiles, tmp_path: Path
) -> None:
    profile = profile_of("gpt_oss")
    draft = reweight_draft(profile, tilts(profile, ["3=1.5"], []))
    built = build(profile, draft, tmp_path / "out", AS_IS)
    assert built.proof
    (agreement,) = built.proof.agreement
    assert (agreement.same_answer, agreement.overlap_answer) == (1, 1)
    assert (agreement.same_all, agreement.overlap_all) == (1, 1)


# A cut and tilts at once


@pytest.mark.parametrize(
    ("layout", "family"), [("stock", "olmoe"), ("stock", "gpt_oss"), ("exact", "olmoe")]
)
def test_a_cut_can_tilt_what_it_keeps(
    profile_of: Profiles, tmp_path: Path, layout: Any, family: str
) -> None:
    profile = profile_of(family)
    fold: Any = "off" if layout == "stock" else "answer"
    cut = choose(
        profile, CutSettings(keep=6, layout=layout, fold=fold if layout == "stock" else None)
    ).draft
    first, last = cut.edits[LAST].keep[0], cut.edits[LAST].keep[-1]
    found, factors = tilts(profile, [f"{last}=1.5"], []), scalings(profile, [f"1:{first}=0.3"])
    draft = with_tilts(cut, found, factors)
    assert draft.action == f"prune --keep 6 --boost 1:{last}=1.5 --scale 1:{first}=0.3"
    assert draft.slug.startswith(cut.slug) and f"boost-1.{last}-scale-1.{first}" in draft.slug
    built = build(profile, draft, tmp_path / "out", AS_IS)
    assert built.proof and built.proof.alone is None
    against_base, against_plan = built.proof.held_out
    assert against_plan.against == "the same plan at run time"
    assert against_base.max_abs_logprob_diff > 0.1
    is_close = layout == "exact" or family == "gpt_oss"  # b·v is none
    assert not is_close or against_plan.max_abs_logprob_diff < 1e-5
    assert against_plan.median_abs_logprob_diff < against_base.median_abs_logprob_diff / 2
    share = built.proof.share(1, last)
    assert share.base < share.edited and (not is_close or share.exact == share.edited)
    assert [o.form for o in built.proof.outcomes][1] == "the plan without biases"
    edit = load_plan(built.folder).blocks[LAST]
    assert (edit.bias, edit.scale, len(edit.keep)) == ({last: 1.5}, {first: 0.3}, 6)


@pytest.mark.parametrize("layout", ["stock", "exact"])
def test_a_cut_does_not_tilt_what_it_removes(profile_of: Profiles, layout: Any) -> None:
    profile = profile_of("olmoe")
    cut = choose(profile, CutSettings(keep=5, layout=layout)).draft
    gone = cut.edits[LAST].removed(8)[0]
    for found, factors in (
        (tilts(profile, [f"{gone}=1"], []), []),
        ([], scalings(profile, [f"1:{gone}=2"])),
    ):
        with pytest.raises(PlanError, match=f"expert 1:{gone} is removed by this cut, which keeps"):
            with_tilts(cut, found, factors)


# What was cut before


@pytest.fixture
def cut_profile(
    profile_of: Profiles, measure: Callable[[Path], Profile], tmp_path: Path
) -> Callable[[Any], tuple[Profile, tuple[int, ...]]]:
    """A profile of a cut model, and the numbers of the experts that its last layer keeps."""

    def make(layout: Any) -> tuple[Profile, tuple[int, ...]]:
        profile = profile_of("olmoe")
        draft = choose(profile, CutSettings(keep=5, layout=layout)).draft
        build(profile, draft, tmp_path / f"cut-{layout}", UNASKED)
        return measure(tmp_path / f"cut-{layout}"), draft.edits[LAST].keep

    return make


@pytest.mark.parametrize("layouts", [("stock", "stock"), ("stock", "exact"), ("exact", "exact")])
def test_a_cut_model_calls_its_experts_by_their_first_numbers(
    cut_profile: Any, measure: Callable[[Path], Profile], tmp_path: Path, layouts: tuple[Any, Any]
) -> None:
    profile, keep = cut_profile(layouts[0])
    tables = find_shown(profile.path).tables()
    rows = [ids_text(load_plan(Path(profile.info.model.id)).blocks[LAST].keep)]
    assert (tables[-1].texts()[-1][1:] == rows) == (layouts[0] == "stock")
    gone = next(e for e in range(8) if e not in keep)
    row = keep.index(keep[-1]) if layouts[0] == "stock" else keep[-1]
    for turn in range(2):  # the second time on what the first one made
        found = tilts(profile, [f"{keep[-1]}=1.5"], [])
        assert [t.expert for t in found] == [row]
        with pytest.raises(PlanError, match=f"expert {gone} of layer 1 is not in this pruned"):
            tilts(profile, [f"{gone}=1"], [])
        with pytest.raises(PlanError, match="is not in this pruned model"):
            scalings(profile, [f"{gone}=2"])
        factors = scalings(profile, [f"1:{keep[0]}=0.5"])
        draft = reweight_draft(profile, found, layouts[1], factors)
        built = build(profile, draft, tmp_path / f"turn-{turn}", AS_IS)
        assert draft.action == f"reweight --boost 1:{keep[-1]}=1.5 --scale 1:{keep[0]}=0.5"
        plan = load_plan(built.folder)
        edit = plan.blocks[LAST]
        assert (edit.keep, edit.bias, edit.scale) == (keep, {keep[-1]: 1.5}, {keep[0]: 0.5})
        assert [s.expert for s in plan.proof.shares] == [keep[-1], keep[0]]
        assert f"Expert {keep[-1]} of layer 1" in tilt_sentences(found, built, draft.numbers)[0]
        assert load_hashes(built.folder, plan) >= load_hashes(
            Path(profile.info.model.id), load_plan(Path(profile.info.model.id))
        )
        profile = measure(built.folder)


def test_an_exact_cut_model_takes_biases_and_factors_exactly(
    cut_profile: Any, held_out: Quiz, tmp_path: Path
) -> None:
    profile, keep = cut_profile("exact")
    source = Path(profile.info.model.id)
    scaled = load_plan(source).blocks["model.layers.0.mlp"].keep[0]
    found, factors = tilts(profile, [f"{keep[1]}=2"], []), scalings(profile, [f"0:{scaled}=0.3"])
    draft = reweight_draft(profile, found, "exact", factors)
    built = build(profile, draft, tmp_path / "out", AS_IS)
    from_base, from_plan = carried(profile, built, held_out, draft)
    assert from_base > 0.1
    assert from_plan < 2e-6  # the last bit of a log p of −20 in float32
    old, new = (load_file(folder / "model.safetensors") for folder in (source, built.folder))
    assert set(new) == {*old, f"{LAST}.gate.bias"}
    constants = [name for name in old if name.endswith("approx_value")]
    assert len(constants) == 6 and all(torch.equal(old[n], new[n]) for n in constants)
    before, after = read_config(source), read_config(built.folder)
    assert after["compression_config"] == before["compression_config"]
    assert after["biased_gates"] == [1]
    assert (after["architectures"], after["model_type"]) == (
        ["ExactOlmoeForCausalLM"],
        "exact_olmoe",
    )


def test_layout_stock_does_not_carry_an_exact_model_on(cut_profile: Any, tmp_path: Path) -> None:
    profile, keep = cut_profile("exact")
    for draft in (
        reweight_draft(profile, tilts(profile, [f"{keep[0]}=1"], [])),
        choose(profile, CutSettings(keep=4)).draft,
    ):
        with pytest.raises(ContractError, match="layout exact, which layout stock cannot carry on"):
            build(profile, draft, tmp_path / "out", UNASKED)


def test_a_plan_of_another_checkpoint_is_found_out(
    profile_of: Profiles, measure: Callable[[Path], Profile], cut_profile: Any
) -> None:
    profile, _ = cut_profile("stock")
    file = Path(profile.info.model.id) / "plan.json"
    plan = json.loads(file.read_text())
    plan["blocks"][LAST]["keep"] = [0, 1, 2]
    file.write_text(json.dumps(plan))
    with pytest.raises(
        PlanError, match=r"is not of this checkpoint, whose model\.layers\.1\.mlp has 5"
    ):
        tilts(profile, ["3=1"], [])


# What is refused


@pytest.mark.parametrize("text", ["3", "1:3", "3=-1", "3=1", "3=inf", "3=x", "x=2"])
def test_a_factor_that_makes_no_sense_is_refused(profile_of: Profiles, text: str) -> None:
    with pytest.raises(SettingsError, match=text.split("=")[0]):
        scalings(profile_of("olmoe"), [text])


def test_positions_of_biases_that_cannot_be_are_refused(profile_of: Profiles) -> None:
    profile = profile_of("olmoe")
    with pytest.raises(SettingsError, match="--apply-at answer is of layout stock"):
        reweight_draft(profile, tilts(profile, ["3=1"], []), "exact", (), "answer")
    with pytest.raises(SettingsError, match="says where a bias acts, and there is none"):
        reweight_draft(profile, [], "stock", scalings(profile, ["3=2"]), "all")
