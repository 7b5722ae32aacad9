"""`audit`: what removing single experts does, against other code, and what was planted."""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from expertcut.checkpoints.build import BuildOptions, build
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.edit_settings import AuditSettings, CutSettings
from expertcut.edits.plan import BlockEdit
from expertcut.edits.selection import empty_draft
from expertcut.errors import OutputError, PlanError
from expertcut.evaluation import ablation
from expertcut.evaluation.ablation import (
    AuditRun,
    evaluate_criterion,
    interval,
    ranks_within,
    regret,
    sample_experts,
)
from expertcut.evaluation.ablation_effects import QuizAblations
from expertcut.evaluation.search_results import AblationEffect, Audit, CriterionRank, load_audit
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import LoadOptions
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting.eval_tables import audit_sentences
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.passes import OnPass, ignore
from expertcut.scoring.router_bias import Tilts, tilted
from tests.conftest import LETTERS, Commands, make_checkpoint, open_model, profiled, write_quiz

BY = ("activations", "random")
EXACT: dict[str, Any] = {"layout": "exact"}


@pytest.fixture(scope="module")
def profile(profile_of: Callable[..., Profile]) -> Profile:
    return profile_of("olmoe")


def options(sample: int = 16, by: tuple[str, ...] = BY, **more: Any) -> AuditSettings:
    names = ",".join(by)
    return AuditSettings(by=names, fractions="0.75,0.5", sample=sample, questions=12, **more)


def audited(
    profile: Profile, folder: Path, asked: AuditSettings, on_pass: OnPass = ignore
) -> tuple[AuditRun, Audit]:
    auditing = AuditRun(profile, asked, LoadOptions())
    list(auditing.run(folder, on_pass))
    return auditing, load_audit(folder)


def right_logprob(moe_logprob: torch.Tensor, quiz: Quiz) -> np.ndarray:
    answers = [question.answer for question in quiz]
    return moe_logprob.double()[range(len(answers)), answers].numpy()


# Harm


def test_the_harm_is_that_of_a_mask_on_the_router(profile: Profile, tmp_path: Path) -> None:
    auditing, found = audited(profile, tmp_path / "audit", options(sample=6))
    moe, quiz = open_model(Path(profile.info.model.id)), auditing.held_out
    base = ask(Engine(moe, 2048), quiz)
    assert len(quiz) == 12 and found.overlap == 0
    for harm in found.harms:
        bias_E = torch.zeros(8)
        bias_E[harm.expert] = -torch.inf
        with tilted(moe.blocks, Tilts({harm.layer: bias_E})):
            without = ask(Engine(moe, 2048), quiz)
        lost = right_logprob(base, quiz) - right_logprob(without, quiz)
        assert harm.logprob == pytest.approx(lost.mean(), abs=1e-6)
        assert harm.stderr == pytest.approx(lost.std(ddof=1) / np.sqrt(12), abs=1e-6)
        answers = torch.tensor([q.answer for q in quiz])
        was, now = (x.argmax(1) == answers for x in (base, without))
        assert (harm.gained, harm.lost) == (int((~was & now).sum()), int((was & ~now).sum()))
        assert harm.accuracy == pytest.approx((harm.lost - harm.gained) / 12)
    assert max(abs(harm.logprob) for harm in found.harms) > 0.01


def test_the_harm_is_that_of_a_written_checkpoint(profile: Profile, tmp_path: Path) -> None:
    auditing, found = audited(profile, tmp_path / "audit", options(sample=3, **EXACT))
    quiz = auditing.held_out
    base = ask(Engine(open_model(Path(profile.info.model.id)), 2048), quiz)
    for harm in found.harms:
        name = profile.info.model.blocks[harm.layer].name
        edits = {b.name: BlockEdit(keep=tuple(range(8))) for b in profile.info.model.blocks}
        edits[name] = BlockEdit(keep=tuple(e for e in range(8) if e != harm.expert))
        draft = replace(empty_draft(CutSettings(**EXACT), "one", "", ""), edits=edits)
        out = tmp_path / f"{harm.layer}-{harm.expert}"
        build(profile, draft, out, BuildOptions(LoadOptions(), is_verified=False))
        written = ask(Engine(open_model(out), 2048), quiz)
        lost = right_logprob(base, quiz) - right_logprob(written, quiz)
        assert harm.logprob == pytest.approx(lost.mean(), abs=1e-6)
    assert any(harm.largest > 0.01 for harm in found.harms)


# What was planted


@pytest.mark.parametrize("layout", ["stock", "exact"])
def test_an_expert_that_no_token_chose_is_harmless_to_the_last_bit(
    profile_of: Callable[..., Profile], tmp_path: Path, layout: str
) -> None:
    # Where the gate renormalises, an expert that is not chosen takes no part in anything.
    family = "olmoe" if layout == "exact" else "qwen3_moe"
    profile = profile_of(family, num_experts=48)
    auditing, found = audited(profile, tmp_path / "audit", options(sample=24, layout=layout))
    used: set[tuple[int, int]] = set()

    def see(routing: Routing) -> None:
        used.update((routing.layer, e) for e in routing.experts_TK.unique().tolist())

    with observe_routers(auditing.engine.moe.blocks, see):
        ask(auditing.engine, auditing.held_out)
    idle = [h for h in found.harms if (h.layer, h.expert) not in used]
    busy = [h for h in found.harms if (h.layer, h.expert) in used]
    assert idle and busy
    if layout == "exact":
        assert all((h.logprob, h.stderr, h.largest, h.lost) == (0, 0, 0, 0) for h in idle)
    else:  # softmax over fewer rows, renormalised: the same but for rounding
        assert all(h.largest < 1e-5 and h.lost == 0 for h in idle)
    # In the last layer only answer positions are read.
    assert all(h.largest > 0 for h in busy if h.layer == 0)


def planted(folder: Path, dead: int, vital: int) -> Path:
    """GPT-OSS, whose router has a bias: in layer 0 no token chooses one expert, each the other."""
    model = make_checkpoint(folder / "model", "gpt_oss")
    weights = load_file(model / "model.safetensors")
    (bias,) = (n for n in weights if "layers.0" in n and n.endswith("router.bias"))
    weights[bias][dead], weights[bias][vital] = -1e4, 6.0
    for name in weights:
        if "layers.0" in name and "experts.down_proj" in name:
            weights[name][vital] *= 4
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


def answered_by(model: Path, quiz_folder: Path, folder: Path) -> Path:
    """The quiz with what a model says as the right answers."""
    moe = open_model(model)
    for split in ("val", "test"):
        said = ask(Engine(moe, 2048), load_quiz(Selection(str(quiz_folder), split, 0))).argmax(1)
        letters = iter(LETTERS[i] for i in said.tolist())
        for file in sorted((quiz_folder / split).glob("*.csv")):
            (folder / split).mkdir(parents=True, exist_ok=True)
            rows = [[*row[:-1], next(letters)] for row in csv.reader(file.read_text().splitlines())]
            with (folder / split / file.name).open("w", newline="") as copy:
                csv.writer(copy).writerows(rows)
    return folder


def test_a_planted_vital_expert_comes_first_and_a_dead_one_is_harmless(
    quiz_folder: Path, tmp_path: Path
) -> None:
    dead, vital = 5, 2
    model = planted(tmp_path, dead, vital)
    asked = answered_by(model, quiz_folder, tmp_path / "quiz")
    quiz = load_quiz(Selection(str(asked), split="val", shots=0))
    list(Measurement(open_model(model), quiz, None, MeasureOptions()).run(tmp_path / "p"))
    profile = load_profile(tmp_path / "p")
    asking = options().updated(questions=15, by="all")
    _, found = audited(profile, tmp_path / "audit", asking)
    assert len(found.harms) == 16 and found.accuracy == 1
    by_harm = sorted(found.harms, key=lambda harm: -harm.logprob)
    assert (by_harm[0].layer, by_harm[0].expert) == (0, vital)
    assert by_harm[0].lost > 2
    (its,) = (h for h in found.harms if (h.layer, h.expert) == (0, dead))
    assert (its.logprob, its.stderr, its.accuracy, its.largest) == (0, 0, 0, 0)
    (place,) = (i for i, s in enumerate(found.sampled) if (s.layer, s.expert) == (0, dead))
    assert found.standings["activations"].score[place] == 0


# Verdicts


def synthetic(
    seed: int, n_layers: int = 3, each: int = 6
) -> tuple[list[AblationEffect], np.ndarray]:
    rng = np.random.default_rng(seed)
    harm_X = rng.normal(size=n_layers * each)
    common = {"stderr": 0.1, "accuracy": 0.0, "gained": 0, "lost": 0, "mcnemar_p": 1.0}
    harms = [
        AblationEffect(layer=x // each, expert=x % each, logprob=float(h), largest=1.0, **common)
        for x, h in enumerate(harm_X)
    ]
    return harms, harm_X


def ranks_of(score_X: np.ndarray, each: int = 6) -> CriterionRank:
    rows = score_X.reshape(-1, each)
    place = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1).ravel()
    return CriterionRank(
        score=tuple(score_X.tolist()), share=tuple(score_X.tolist()), place=tuple(place.tolist())
    )


def test_rank_correlations_are_those_of_scipy() -> None:
    for seed in range(5):
        harms, harm_X = synthetic(seed)
        score_X = np.round(harm_X + np.random.default_rng(seed + 9).normal(size=18), 0)  # ties
        found = evaluate_criterion("x", ranks_of(score_X), harms, (0.5,), 0)
        assert found.overall.rho == pytest.approx(spearmanr(score_X, harm_X).statistic)
        assert found.overall.ci95 is not None
        assert -1 <= found.overall.ci95[0] < found.overall.rho < found.overall.ci95[1] <= 1
        alone, own = synthetic(seed, n_layers=1, each=9)
        within = evaluate_criterion("x", ranks_of(own**2, 9), alone, (0.5,), 0).within
        assert within.rho == pytest.approx(spearmanr(own**2, own).statistic)


def test_pairs_that_happen_to_agree_are_no_order_beyond_chance() -> None:
    harms, harm_X = synthetic(3, n_layers=4, each=2)
    score_X = harm_X.copy()
    score_X[:4] = 0.0  # tells two of four pairs apart, and both as they are
    few = evaluate_criterion("x", ranks_of(score_X, 2), harms, (0.5,), 0).within
    assert few.ci95 is not None and few.ci95[0] < 0
    assert few.p == pytest.approx(0.25, abs=0.05) and not few.is_clear
    many, own_X = synthetic(3)
    assert evaluate_criterion("x", ranks_of(own_X), many, (0.5,), 0).within.is_clear
    assert not evaluate_criterion("x", ranks_of(-own_X), many, (0.5,), 0).within.is_clear


@pytest.mark.parametrize(("n_layers", "each"), [(4, 2), (16, 2), (16, 4), (4, 16)])
def test_the_interval_of_a_correlation_holds_no_correlation(n_layers: int, each: int) -> None:
    rng, layer_X = np.random.default_rng(0), np.repeat(np.arange(n_layers), each)
    pair_2BX = rng.normal(size=(2, 400, n_layers * each))
    for group_X, freedom in (
        (layer_X, n_layers * (each - 1)),
        (np.zeros_like(layer_X), n_layers * each - 1),
    ):
        score_BX, harm_BX = (ranks_within(values_BX, group_X) for values_BX in pair_2BX)
        norm_B = np.sqrt((score_BX**2).sum(axis=1) * (harm_BX**2).sum(axis=1))
        rho_B = ((score_BX * harm_BX).sum(axis=1) / norm_B).tolist()
        ends = [interval(rho, freedom) for rho in rho_B]
        assert all(low <= rho <= high for rho, (low, high) in zip(rho_B, ends, strict=True))
        assert sum(low <= 0 <= high for low, high in ends) >= 0.93 * 400


def test_what_is_the_same_in_each_layer_says_nothing_within_them() -> None:
    harms, _ = synthetic(0)
    by_layer_X = np.repeat([1.0, 2.0, 3.0], 6)
    found = evaluate_criterion("x", ranks_of(by_layer_X), harms, (0.5,), 0)
    assert found.within.rho is None and found.within.ci95 is None
    assert found.overall.rho is not None


def test_the_truth_as_a_score_has_no_regret_and_its_opposite_the_most() -> None:
    harms, harm_X = synthetic(1)
    best = evaluate_criterion("x", ranks_of(harm_X), harms, (0.75, 0.5, 0.25), 0)
    worst = evaluate_criterion("x", ranks_of(-harm_X), harms, (0.75, 0.5, 0.25), 0)
    assert best.within.rho == pytest.approx(1) and worst.within.rho == pytest.approx(-1)
    for good, bad in zip(best.regrets, worst.regrets, strict=True):
        assert good.regret == pytest.approx(0, abs=1e-12) and bad.regret > good.random - good.least


@pytest.mark.parametrize("fraction", [0.75, 0.5, 0.25, 1.0])
def test_regret_equals_trying_every_choice(fraction: float) -> None:
    harms, harm_X = synthetic(2, n_layers=2, each=6)
    layer_X = np.array([harm.layer for harm in harms])
    place_X = np.array([*np.random.default_rng(0).permutation(6), 3, 5, 0, 1, 2, 4])
    found = regret(place_X, harm_X, layer_X, fraction)
    n_kept = round(fraction * 6)
    least, mean, chosen = 0.0, 0.0, 0.0
    for layer in range(2):
        own = harm_X[layer_X == layer]
        sums = [sum(own[list(c)]) for c in combinations(range(6), 6 - n_kept)]
        least, mean = least + min(sums), mean + float(np.mean(sums))
        chosen += sum(own[place_X[layer_X == layer] >= n_kept])
    assert found.least == pytest.approx(least)
    assert found.random == pytest.approx(mean)
    assert found.chosen == pytest.approx(chosen)
    assert found.removed == 2 * (6 - n_kept)


def test_the_sample_is_spread_over_layers_and_keeps_nothing_away() -> None:
    for sample in (1, 5, 12, 15, 26, 99):
        drawn = sample_experts([8, 8, 10], sample, seed=0)
        assert drawn == sorted(set(drawn)) and len(drawn) == min(sample, 26)
        per_layer = [sum(layer == own for own, _ in drawn) for layer in range(3)]
        if sample <= 24:
            assert max(per_layer) - min(per_layer) <= 1
        assert drawn == sample_experts([8, 8, 10], sample, seed=0)
    several = {tuple(sample_experts([8, 8, 10], 6, seed)) for seed in range(40)}
    assert len(several) > 30
    assert {pair for drawn in several for pair in drawn} == {
        (layer, e) for layer, n in enumerate((8, 8, 10)) for e in range(n)
    }


# What is finished is kept


class Killed(BaseException):
    """In place of a SIGKILL."""


def test_an_audit_that_was_killed_comes_to_the_same_bytes(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, done = options(sample=8, by=("random", "aimer", "reconstruction")), Counter[str]()

    def stopping(name: str, last: int) -> None:
        """Counts the results of a function; the run is killed instead of number `last`."""
        place = QuizAblations if name == "effect" else ablation
        function = getattr(place, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if done[name] == last:
                raise Killed
            result = function(*arguments, **options)
            done[name] += 1
            return result

        monkeypatch.setattr(place, name, call)

    _, whole = audited(profile, tmp_path / "whole", asked)
    assert whole.is_complete and list(whole.standings) == list(asked.by.split(","))
    # While the third criterion ranks, within the fourth expert, after the last one.
    for moment in ({"rank": 2}, {"effect": 3}, {"evaluate_criterion": 0}):
        for name, last in ({"rank": -1, "effect": -1} | moment).items():
            stopping(name, last)
        with pytest.raises(Killed):
            audited(profile, tmp_path / "killed", asked)
        monkeypatch.undo()
    assert done == {"rank": 3, "effect": 8}
    left = load_audit(tmp_path / "killed")
    assert left.harms == whole.harms and not left.verdicts
    monkeypatch.setattr(ablation, "ablations_of", Mock(side_effect=Killed))
    audited(profile, tmp_path / "killed", asked)
    audited(profile, tmp_path / "killed", asked)
    files = [(tmp_path / name / "audit.json").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1]
    with pytest.raises(OutputError, match="its settings"):
        list(AuditRun(profile, asked, LoadOptions("bfloat16")).run(tmp_path / "killed", ignore))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (options(sample=4), "its sample was 2, now it is 4"),
        (options(sample=2, **EXACT), "its layout was stock"),
        (options(sample=2, seed=1), "its seed was 0"),
        (options(sample=2, by=("random",)), "its by was"),
        (options(sample=2).updated(questions=6), "its questions was 12, now it is 6"),
    ],
)
def test_a_folder_of_another_audit_is_refused(
    profile: Profile, begun: Path, tmp_path: Path, other: AuditSettings, told: str
) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "audit"))
    before = (folder / "audit.json").read_bytes()
    with pytest.raises(OutputError, match=told):
        audited(profile, folder, other)
    assert (folder / "audit.json").read_bytes() == before


@pytest.fixture(scope="module")
def begun(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun") / "audit"
    audited(profile, folder, options(sample=2))
    return folder


# The command


def test_the_command_writes_tables_a_figure_and_what_show_reads(
    profile: Profile, expertcut: Commands
) -> None:
    asked = ("audit", "--profile", profile.path, "--sample", 8, "--by", "activations,random")
    out = expertcut(*asked, "--questions", 9)
    folder = Path("audits") / profile.path.name
    lines = out.splitlines()
    assert lines[-2:] == [f"written   {folder}", f"next      expertcut show {folder}"]
    assert max(map(len, lines)) <= 80 and len(lines) <= 40
    assert any(line.startswith("ablated   8 experts, one at a time") for line in lines)
    assert "None of the 9 held-out questions (test) had a part in scoring" in " ".join(out.split())
    assert (folder / "audit.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (folder / "audit.svg").read_bytes()
    lines = (folder / "audit.csv").read_text().splitlines()
    assert len(lines) == 1 + 8 and lines[0].endswith("activations,random")
    assert expertcut("show", folder, "--format", "csv").splitlines() == lines
    assert len(json.loads(expertcut("show", folder, "--format", "json"))["harms"]) == 8
    assert "ρ within layers" in expertcut("show", folder, "--format", "md")
    said = out[out.index("ablated   ") : out.index("written   ")]
    assert said.count("\n") >= 4 and expertcut("show", folder).endswith(said)
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert expertcut(*asked, "--questions", 9) == out
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == files


def test_of_a_quiz_of_one_set_a_fifth_is_audited_that_scored_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path, expertcut: Commands
) -> None:
    asked = write_quiz(tmp_path / "one", {"dev": 2, "val": 30})
    profile = profiled(checkpoint("olmoe"), asked, tmp_path / "p")
    out = expertcut(
        "audit", "--profile", profile.path, "--sample", 3, "--by", "random", "--out", "o"
    )
    found = load_audit(Path("o"))
    n = found.asked.questions
    assert 0 < n < 40 and found.overlap == 0
    assert f"None of the {n} held-out questions (val) had a part in" in " ".join(out.split())
    assert "held-out" not in audit_sentences(found.model_copy(update={"overlap": n}))[0]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--by", "fame"), "'fame' is not a criterion"),
        (("--by", "random,random"), "names random twice"),
        (("--fractions", "0"), "--fractions 0"),
        (("--seed", "-1"), "--seed: must be"),
        (("--sample", "0"), "--sample"),
        (("--questions", "1"), "--questions"),
        (("--threads", "77"), "--threads 77"),
        (("--profile", "nowhere"), "no profile in nowhere"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_one_line(
    profile: Profile, expertcut: Commands, asked: tuple[str, ...], told: str
) -> None:
    of = () if "--profile" in asked else ("--profile", profile.path)
    out = expertcut("audit", *of, *asked, "--out", "o", status=2)
    assert told in out and out.count("\n") == 1 and not Path("o").exists()


def test_a_file_is_no_folder_to_write_to_or_to_read_from(
    profile: Profile, expertcut: Commands, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    out = expertcut("audit", "--profile", profile.path, "--out", "file", status=2)
    assert "file is a file: remove it or name another --out" in out
    assert "no profile in file" in expertcut("audit --profile file", status=2)
    assert "Value error" not in expertcut("show file --format song", status=2)


def test_where_every_expert_is_needed_none_is_removed(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path: Path
) -> None:
    model = checkpoint("olmoe", num_experts=2)
    with pytest.raises(PlanError, match="all of its 2 experts"):
        AuditRun(profiled(model, quiz_folder, tmp_path / "p"), options(), LoadOptions())
