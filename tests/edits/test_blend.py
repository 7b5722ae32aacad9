"""Several profiles of one model as one: the blend, its cut by the worst domain, the overlap."""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

import expertcut as api
from expertcut.cli import app
from expertcut.data import Selection, load_quiz
from expertcut.data.sources import hash_lines
from expertcut.edits import selection
from expertcut.edits.criteria import CRITERIA, scores
from expertcut.edits.domains import Limit, kept_shares, maxmin
from expertcut.edits.edit_settings import CutSettings
from expertcut.edits.plan import ExpertIds, load_hashes, load_plan
from expertcut.edits.selection import choose, normalised
from expertcut.edits.splits import questions_for, scored_split
from expertcut.profiling.blend import Blend, BlendRule
from expertcut.profiling.storage import load_profile
from tests.conftest import Commands
from tests.support.hand_made import block, profile_info, random_profile, write_profile
from tests.support.planted_domains import CHAT, CODE, MARKS, plant_domains

Drawn = Callable[..., Blend]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """A blend of random profiles of a model that is nowhere."""
    monkeypatch.setattr(selection.plan, "expert_ids", lambda profile: ExpertIds())

    def blend(seed: int, n: int, rule: BlendRule = "maxmin", experts: int = 8) -> Blend:
        blocks = [block(layer, experts) for layer in range(2)]
        parts = [
            random_profile(
                tmp_path / f"{seed}-{d}", profile_info(blocks, {f"s{d}": 40}), 9 * seed + d
            )
            for d in range(n)
        ]
        return Blend(parts, [1.0 + d for d in range(n)], rule)

    return blend


# The weighed sum


def test_a_profile_of_two_sources_is_the_blend_of_two_profiles_by_their_sizes(tmp_path: Path):
    blocks = [block(layer, 8) for layer in range(2)]
    parts = [
        random_profile(tmp_path / name, profile_info(blocks, {name: n}), seed)
        for seed, (name, n) in enumerate({"bees": 60, "birds": 25}.items())
    ]
    both = profile_info(blocks, {"bees": 60, "birds": 25})
    whole = write_profile(tmp_path / "both", both, [own for part in parts for own in part.chunks])
    tokens = [float(np.sum(part.token_sum("tokens"))) for part in parts]
    n_compared = 0
    for by, chosen in CRITERIA.items():
        for positions in chosen.positions if chosen.needs == "profile" else ():
            if by.startswith("easy_ep") or by == "ranked_choice":
                continue  # whose sums these chunks lack
            if by == "weighted_accuracy" and positions == "all":
                continue  # of texts
            sizes = tokens if positions == "all" else [60, 25]
            blended = Blend(parts, sizes, "sum")
            for ours, theirs in zip(
                scores(blended, by, positions), scores(whole, by, positions), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12)
                n_compared += 1
    assert n_compared == 2 * 8
    equal = Blend(parts, [1, 1], "sum")
    assert not np.allclose(scores(equal, "reap", "all"), scores(whole, "reap", "all"), rtol=1e-3)


def test_a_profile_of_two_texts_is_the_blend_of_two_profiles_by_their_tokens(
    checkpoint: Callable[..., Path], expertcut: Commands
):
    texts = {"code": "if x: return # 12345 " * 9, "chat": "hello, how are you? " * 5}
    for name, text in texts.items():
        lines = [json.dumps({"text": f"{i} {text}"}) for i in range(3)]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    sources = {"both": [*texts], **{name: [name] for name in texts}}
    for out, names in sources.items():
        words = [word for name in names for word in ("--text", f"{name}.jsonl")]
        expertcut("profile", checkpoint("olmoe"), *words, "--threads", 1, "--out", out)
    parts = [load_profile(Path(name)) for name in texts]
    tokens = [float(np.sum(part.token_sum("tokens"))) for part in parts]
    blended, whole = Blend(parts, tokens, "sum"), load_profile(Path("both"))
    assert tokens[0] != tokens[1]
    for by in ("activations", "reap", "easy_ep", "weighted_accuracy"):
        pairs = zip(scores(blended, by, "all"), scores(whole, by, "all"), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_weight_counts_by_tokens_and_not_by_the_size_of_a_profile(drawn: Drawn):
    blend = drawn(0, 2)
    shares = []
    for part in blend.parts:
        weight_LE = part.token_sum("weight")
        shares.append(weight_LE / np.sum(part.token_sum("tokens")))
    expected = blend.weights_D[0] * shares[0] + blend.weights_D[1] * shares[1]
    found = blend.token_sum("weight") / np.sum(blend.token_sum("tokens"))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert blend.weights_D.tolist() == [2 / 3, 1 / 3] and blend.names == ["0-1", "0-0"]


# The worst domain


@pytest.mark.parametrize("budget", ["layer", "global"])
def test_maxmin_keeps_at_least_what_the_sum_keeps_for_the_worst_domain(drawn: Drawn, budget: str):
    n_better = 0
    for seed, by in product(range(6), ("reap", "gate_mass")):
        blend = drawn(2 * seed + (by == "reap"), 2 + seed % 3)
        settings = CutSettings(by=by, keep=3, layout="exact", budget=budget)
        draft = choose(blend, settings).draft
        kept = {rule: [p.kept[rule] for p in draft.blend.profiles] for rule in ("sum", "maxmin")}
        assert min(kept["maxmin"]) >= min(kept["sum"])
        n_better += min(kept["maxmin"]) > min(kept["sum"]) + 0.01
        shares = selection.domain_shares(blend.parts, settings)
        own = kept_shares(shares, [edit.keep for edit in draft.edits.values()])
        np.testing.assert_allclose(own, kept["maxmin"])
        n_kept = [len(edit.keep) for edit in draft.edits.values()]
        assert sum(n_kept) == 6 and (budget == "global" or n_kept == [3, 3])
    assert n_better >= 6


def test_the_linear_program_bounds_every_cut_and_rounding_costs_less_than_its_fractions():
    rng = np.random.default_rng(0)
    for n_domains in (2, 3):
        raw_DE = rng.gamma(0.5, size=(n_domains, 8))
        share_DE = np.stack([*map(normalised, raw_DE)])
        relaxed = maxmin([share_DE], [Limit([(0, e) for e in range(8)], 4, 4)], [()])
        best = max(share_DE[:, list(own)].sum(axis=1).min() for own in combinations(range(8), 4))
        assert relaxed.worst >= best - 1e-9 and relaxed.weights_D.sum() == pytest.approx(1)
        (kept_E,) = relaxed.kept_LE
        is_part_E = (kept_E > 0) & (kept_E < 1)
        assert is_part_E.sum() <= n_domains and kept_E.sum() == pytest.approx(4)
        # Strong duality: nothing keeps more by the weights than the kept experts do.
        by_weights_E = np.sort(relaxed.weights_D @ share_DE)[::-1]
        assert by_weights_E[:4].sum() == pytest.approx(relaxed.worst)
        assert relaxed.worst < 1


def test_what_is_protected_stays_in_a_cut_by_the_worst_domain(drawn: Drawn):
    blend = drawn(3, 2)
    plain = choose(blend, CutSettings(by="reap", keep=3, layout="exact")).draft
    (first, *_) = plain.edits.values()
    gone = first.removed(8)[0]
    settings = CutSettings(by="reap", keep=3, layout="exact", protect=[f"0:{gone}"])
    pruning = choose(blend, settings)
    (first, *_) = pruning.draft.edits.values()
    assert gone in first.keep and gone in next(iter(pruning.spared.values()))


# A model in which one expert serves one domain


@pytest.fixture(scope="module")
def planted(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The model, a quiz of each domain, its profile: its expert is routed only its mark."""
    root = tmp_path_factory.mktemp("planted")
    quizzes = {name: root / f"{name}.jsonl" for name in MARKS}
    for name, mark in MARKS.items():
        rows = [
            {
                "question": f"{mark * (3 + i % 5)} {name} {i}?",
                "choices": [mark * (k + 1) for k in range(4)],
                "answer": i % 4,
            }
            for i in range(30)
        ]
        quizzes[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = plant_domains(checkpoint("olmoe"), root / "model")
    with chdir(root):
        for name, quiz in quizzes.items():
            options = f"--quiz {quiz} --shots 0 --threads 1 --out {name}"
            app(["profile", str(model), *options.split()], standalone_mode=False)
    return {"model": model, "root": root, **quizzes}


@pytest.fixture
def profiled(planted: dict[str, Path], expertcut: Commands) -> Commands:
    for name in MARKS:
        shutil.copytree(planted["root"] / name, name)
    return expertcut


BOTH = "--profile code --profile chat=1 --by reap"


def kept(folder: str) -> list[tuple[int, ...]]:
    return [edit.keep for edit in load_plan(Path(folder)).blocks.values()]


def test_each_domains_cut_keeps_its_expert_and_maxmin_keeps_both(profiled: Commands):
    sizes = "--by reap --keep 6 --protect none --plan-only"
    for name, own, other in (("code", CODE, CHAT), ("chat", CHAT, CODE)):
        profiled(f"prune --profile {name} {sizes} --out cut-{name}")
        assert all(own in ids and other not in ids for ids in kept(f"cut-{name}"))
    said = profiled(f"prune {BOTH} {sizes} --blend maxmin --out both")
    assert all({CODE, CHAT} <= {*ids} for ids in kept("both"))
    for name in MARKS:  # of each domain the traffic, before the cut is made
        assert f"in {name}, had" in " ".join(said.split())
    assert "kept by maxmin" in said and "kept by sum" in said
    plan = load_plan(Path("both"))
    assert plan.action.endswith("--blend maxmin of code (0.5), chat (0.5)")
    assert plan.blend is not None and plan.blend.rule == "maxmin"
    worst = {r: min(own.kept[r] for own in plan.blend.profiles) for r in ("sum", "maxmin")}
    assert worst["maxmin"] >= worst["sum"] > 0
    shown = json.loads(profiled("show code chat --overlap --by reap --keep 6 --format json"))
    share = {(row["profile"], row["cut"]): row["share"] for row in shown["kept"]}
    for own, other in (("code", "chat"), ("chat", "code")):
        assert share[own, other] < share[own, own] - 0.02
    (pair,) = shown["pairs"]
    assert pair["jaccard"] < 1 and pair["spearman"] < 0.9 and len(pair["layers"]) == 2
    for form in ("table", "md"):
        text = profiled(f"show code chat --overlap --keep 6 --format {form}")
        assert "Jaccard" in text and "cut by" in text
    rows = profiled("show code chat --overlap --keep 6 --format csv").splitlines()
    assert len(rows) == 1 + 2 and rows[0].startswith("a,b,layer,spearman,jaccard,a_kept_by_a")


def test_no_question_of_any_profile_is_called_held_out(
    profiled: Commands, planted: dict[str, Path]
):
    said = profiled(f"prune {BOTH} --keep 6 --out made")
    plan, used = load_plan(Path("made")), load_hashes(Path("made"), load_plan(Path("made")))
    quizzes = {n: load_quiz(Selection(str(planted[n]), shots=0)) for n in MARKS}
    n_used = {n: scored_split(hash_lines(quiz), used, "test").used for n, quiz in quizzes.items()}
    assert all(20 <= n < 30 for n in n_used.values())  # but the held-out fifth
    assert plan.blend is not None
    assert [own.questions for own in plan.blend.profiles] == [*n_used.values()]
    lines = plan.proof.held_out_hashes
    assert lines and scored_split(lines, used, "test").used == 0
    assert not {*lines} & used and "held-out questions" in " ".join(said.split())
    whole = Blend([load_profile(Path(name)) for name in MARKS], [1, 2], "sum")
    questions = questions_for(whole, is_fitting=True)
    assert hash_lines(quizzes["code"]) <= questions.inherited  # of the lighter profile
    assert len(questions.profiled) == 30 and not len(questions.held_out)


def test_a_sweep_and_the_python_api_blend_as_prune_does(profiled: Commands):
    said = profiled(f"sweep 0.75 {BOTH} --blend maxmin --out grid")
    assert "--profile code --profile chat=1 --blend maxmin" in said.replace("\\\n", "")
    sweep = json.loads(Path("grid/sweep.json").read_text())
    profiled(f"prune {BOTH} --sparsity 0.25 --blend maxmin --plan-only --out cut")
    (cell,) = sweep["cells"]
    assert [*cell["keep"].values()] == [[*ids] for ids in kept("cut")]
    assert sweep["asked"]["blend"].startswith("maxmin of ")
    refused = profiled(f"sweep 0.75 {BOTH} --out grid", status=2)
    assert "grid" in refused and refused.count("\n") == 1
    plan = api.prune({"code": 1, "chat": 1}, by="reap", sparsity=0.25, blend="maxmin")
    assert [edit.keep for edit in plan.edit.edits.values()] == kept("cut")
    assert plan.simulate().questions > 0 and "code (0.5), chat (0.5)" in repr(plan)


REFUSED = {
    "prune --profile code --profile code/../code --keep 6": "given twice",
    "prune --profile code=0 --profile chat --keep 6": "a weight must be above 0",
    "prune --profile code --keep 6 --blend sum": "repeat --profile PATH=W",
    f"prune {BOTH} --blend maxmin --keep-active": "ranks experts",
    f"merge {BOTH.removesuffix(' --by reap')} --keep 6": "only prune and sweep blend",
    "reweight --profile code --profile chat --boost 0:1": "only prune and sweep blend",
    "audit --profile code --profile chat": "only prune and sweep blend",
    "prune --profile code --profile chat --by random --blend maxmin --keep 6": "random",
    "sweep 0.5 --profile code --profile chat --by all": "reconstruction",
    "show code chat": "--overlap",
    "show code --overlap": "two or more",
    "show code --keep 3": "--keep is an option of --overlap",
    "show code chat --overlap --by random": "does not depend on the profile",
    "show code chat --overlap --keep 9": "--keep 9",
}


def test_what_cannot_be_blended_is_refused_in_one_line(profiled: Commands):
    for line, says in REFUSED.items():
        refused = profiled(line, status=2)
        assert says in refused and refused.count("\n") == 1, line


def test_profiles_of_two_models_are_refused_and_a_path_may_hold_an_equals_sign(
    profiled: Commands, checkpoint: Callable[..., Path], planted: dict[str, Path]
):
    options = ("--quiz", planted["code"], "--shots", 0, "--threads", 1, "--out", "other=2")
    profiled("profile", checkpoint("olmoe"), *options)
    refused = profiled("prune --profile code --profile other=2 --keep 6", status=2)
    assert "give profiles of one model" in refused and refused.count("\n") == 1
    profiled("prune --profile other=2 --keep 6 --plan-only --out cut")
    assert load_plan(Path("cut")).blend is None
    assert '"blend"' not in Path("cut/plan.json").read_text()
