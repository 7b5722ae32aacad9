"""How many experts stay: over all layers together, in groups, or as many as fit in a size."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertcut.checkpoints.size import (
    largest,
    planned_sizes,
    size,
    size_of_cut,
    size_of_cuts,
    stored_size,
)
from expertcut.data import Selection, load_quiz
from expertcut.edits.criteria import CRITERIA
from expertcut.edits.edit_settings import CutSettings, read_size
from expertcut.edits.plan import removed_experts
from expertcut.edits.selection import (
    Pruning,
    Ranking,
    choose,
    counts,
    cut,
    normalised,
    rank,
    share_out,
    wanted_count,
)
from expertcut.errors import PlanError, SettingsError
from expertcut.models.load import Source, find_source
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting.edit_tables import size_line
from tests.conftest import Commands, open_model
from tests.support.hand_made import block, profile_info, random_profile
from tests.support.rewrites import Fitted, export, zero_outputs

Profiles = Callable[[str], Profile]
# One tensor an expert, a selection bias, biases of all experts in one tensor, Granite's names.
STOCK_FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen2_moe")
EXACT_FAMILIES = ("olmoe", "qwen3_moe")
GLOBAL = CutSettings(layout="exact")


@pytest.fixture(scope="module")
def profile_of(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Profiles:
    made: dict[str, Profile] = {}

    def measure(family: str) -> Profile:
        if family not in made:
            folder = tmp_path_factory.mktemp("profiles") / family
            quiz = load_quiz(Selection(str(quiz_folder), split="val", limit=2, shots=0))
            moe = open_model(checkpoint(family))
            list(Measurement(moe, quiz, 2, MeasureOptions()).run(folder))
            made[family] = load_profile(folder)
        return made[family]

    return measure


def hand_made(folder: Path, top_k: int = 2, **more: int) -> Profile:
    blocks = [block(layer, 8, top_k, **more) for layer in range(3)]
    return random_profile(folder, profile_info(blocks, {"birds": 60}), n_idle=1)


def n_kept(pruning: Pruning) -> list[int]:
    return [len(edit.keep) for edit in pruning.draft.edits.values()]


# Sizes in words


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4GB", 4_000_000_000),
        ("500MB", 500_000_000),
        ("3.5GiB", 3_758_096_384),
        ("1kib", 1024),
        ("2 tb", 2_000_000_000_000),
        (".5M", 500_000),
        ("12345", 12_345),
        ("7B", 7),
    ],
)
def test_a_size_is_read_in_both_kinds_of_units(text: str, size_bytes: int) -> None:
    assert read_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "4 gigabytes", "0", "0.4", "1e9", "4G B", "1.2.3MB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"3\.5GiB"):
        read_size(text)


# One budget for all layers


def test_normalised_scores_are_shares_of_their_layer() -> None:
    assert normalised(np.array([1.0, 3.0, 0.0])) == pytest.approx([0.25, 0.75, 0])
    assert normalised(np.array([-3.0, -1.0, -2.0])) == pytest.approx([0, 2 / 3, 1 / 3])
    assert normalised(np.array([np.nan, 2.0, -np.inf, np.inf])) == pytest.approx([1 / 4] * 4)
    assert normalised(np.array([-1.0, 1.0, 3.0])) == pytest.approx([0, 0.25, 0.75])
    assert normalised(np.array([0.0, 0.0])) == pytest.approx([0.5, 0.5])
    assert normalised(np.array([np.nan, 1.0, 3.0])) == pytest.approx([0.2, 0.2, 0.6])


def test_a_global_budget_keeps_the_best_over_all_layers_above_the_floors() -> None:
    rng = np.random.default_rng(0)
    is_ragged = False
    for _ in range(30):
        sizes = rng.integers(4, 9, 3)
        scores = [rng.exponential(size=n) ** 3 for n in sizes]
        orders = [np.argsort(-s).tolist() for s in scores]
        floors = [int(rng.integers(1, 4)) for _ in sizes]
        total = int(rng.integers(sum(floors), sum(sizes) + 1))
        found = share_out(total, scores, orders, [()] * 3, floors)
        kept = {(la, e) for la, order in enumerate(orders) for e in order[: floors[la]]}
        rest = [(s[e] / s.sum(), la, e) for la, s in enumerate(scores) for e in range(len(s))]
        rest = sorted((r for r in rest if r[1:] not in kept), reverse=True)
        kept |= {r[1:] for r in rest[: total - len(kept)]}
        assert found == [sum(la == own for own, _ in kept) for la in range(3)]
        is_ragged |= len(set(found)) > 1
    assert is_ragged


def test_protected_experts_stay_whatever_they_score() -> None:
    scores = [np.array([5.0, 1, 1, 1]), np.array([9.0, 8, 7, 0.1])]
    orders = [[3, 0, 1, 2], [0, 1, 2, 3]]
    assert share_out(4, scores, orders, [(3,), ()], [0, 1])[0] >= 1
    assert share_out(5, scores, [[3, 2, 0, 1], orders[1]], [(3, 2), ()], [0, 0])[0] >= 2


@pytest.mark.parametrize("by", [name for name, own in CRITERIA.items() if not own.needs_model])
def test_budgets_honour_total_and_floors(profile_of: Profiles, by: str) -> None:
    ranking = rank(profile_of("olmoe"), CutSettings(by=by, layout="exact"))
    for min_keep in (None, 1, 4):
        more: dict[str, Any] = {"budget": "global", "min_keep": min_keep, "layout": "exact"}
        keep = CutSettings(keep_fraction=0.6, **more)
        n_keep = wanted_count(keep, ranking.blocks)
        assert n_keep == 2 * round(0.6 * 8)
        found = n_kept(cut(replace(ranking, settings=keep), n_keep))
        assert sum(found) == n_keep
        assert min(found) >= max(min_keep or 0, 2)


def test_a_global_budget_gives_layers_what_they_need(tmp_path: Path) -> None:
    profile = hand_made(tmp_path / "p")
    pruning = choose(profile, GLOBAL.updated(keep=4, budget="global"))
    assert sum(n_kept(pruning)) == 12 and len(set(n_kept(pruning))) > 1
    for name, edit in pruning.draft.edits.items():
        layer = int(name.split(".")[2])
        assert set(edit.keep) == set(rank(profile, GLOBAL).orders[layer][: len(edit.keep)])
    assert "global" in pruning.draft.slug and "12 of 24 experts" in pruning.draft.action


@pytest.mark.parametrize(
    ("keep", "layout", "told"),
    [
        (CutSettings(keep=4, budget="global"), "stock", "layout stock cannot"),
        (CutSettings(keep_active=True, budget="global"), "exact", "without --keep-active"),
        (CutSettings(keep=4, min_keep=2), "exact", "needs --budget global"),
        (CutSettings(keep=4, keep_fraction=0.5), "exact", "only one of them"),
        (CutSettings(), "stock", "--max-bytes SIZE"),
        (CutSettings(keep_fraction=1.5), "stock", "at most 1"),
    ],
)
def test_budgets_that_do_not_go_together_are_refused(
    tmp_path: Path, keep: CutSettings, layout: str, told: str
) -> None:
    with pytest.raises(SettingsError, match=told):
        choose(hand_made(tmp_path / "p"), keep.updated(layout=layout))


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (CutSettings(keep=1, budget="global"), "keep 6 "),
        (CutSettings(keep=9, budget="global"), "to 24"),
        (CutSettings(keep=4, budget="global", min_keep=9), "more than the 8 experts"),
        (CutSettings(keep=4, budget="global", min_keep=5), "keep 15 "),
    ],
)
def test_totals_that_do_not_fit_are_refused(tmp_path: Path, keep: CutSettings, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        choose(hand_made(tmp_path / "p"), keep.updated(layout="exact"))


# Groups


@pytest.mark.parametrize("fraction", [0.5, 0.6, 0.75, 1.0])
def test_groups_keep_equally_many(profile_of: Profiles, fraction: float) -> None:
    profile = profile_of("deepseek_v3")
    its = profile.info.model.blocks[0]
    assert its.groups == 2
    pruning = choose(profile, CutSettings(keep_fraction=fraction))
    for edit in pruning.draft.edits.values():
        per_group = [sum(e // 4 == g for e in edit.keep) for g in range(2)]
        assert per_group[0] == per_group[1] == round(fraction * 4)


def test_what_a_search_may_keep_is_what_may_be_asked_for(tmp_path: Path) -> None:
    grouped = hand_made(tmp_path / "g", groups=2)
    some = CutSettings(max_bytes="1")
    exact = some.updated(layout="exact")
    assert list(counts(some, grouped.info.model.blocks)) == [4, 6, 8]
    plain = hand_made(tmp_path / "p", top_k=3).info.model.blocks
    assert list(counts(some, plain)) == [3, 4, 5, 6, 7, 8]
    assert list(counts(exact, plain)) == list(range(1, 9))
    assert list(counts(exact.updated(budget="global"), plain)) == list(range(9, 25))


# Bytes


def written(profile: Profile, pruning: Pruning, folder: Path) -> Path:
    """The checkpoint of a cut, without folds: they change no size."""
    source = find_source(profile.info.model.id)
    n_experts = profile.info.model.blocks[0].experts
    removed = removed_experts(pruning.draft.edits, n_experts)
    is_exact = pruning.draft.layout == "exact"
    gathered = Fitted(constants=zero_outputs(removed, 32) if is_exact else {})
    folder.mkdir()
    export(source, pruning.draft, n_experts, gathered, folder)
    return folder


@pytest.mark.parametrize(
    ("family", "layout"),
    [*((f, "stock") for f in STOCK_FAMILIES), *((f, "exact") for f in EXACT_FAMILIES)],
)
def test_the_size_of_a_cut_is_known_before_it_is_written(
    profile_of: Profiles, tmp_path: Path, family: str, layout: str
) -> None:
    profile = profile_of(family)
    way = CutSettings(by="random", layout=layout)  # type: ignore[arg-type]
    pruning = choose(profile, way.updated(keep=6))
    size_of = size_of_cuts(find_source(profile.info.model.id), way.layout, 8)
    folder = written(profile, pruning, tmp_path / "cut")
    assert size_of(pruning.draft) == (folder / "model.safetensors").stat().st_size
    sources = (find_source(profile.info.model.id), Source(str(folder), folder))
    assert planned_sizes(profile, pruning.draft) == tuple(map(stored_size, sources))
    moe = open_model(Path(profile.info.model.id))
    assert size_of_cut(moe, pruning.draft, size_of(pruning.draft)) == size(open_model(folder))
    assert size(open_model(folder)).parameters < size(moe).parameters


@pytest.mark.parametrize(
    ("family", "layout", "budget"),
    [
        ("olmoe", "stock", "layer"),
        ("olmoe", "exact", "layer"),
        ("olmoe", "exact", "global"),
        ("deepseek_v3", "stock", "layer"),
    ],
)
def test_the_cut_that_fits_is_the_largest_that_does(
    profile_of: Profiles, family: str, layout: str, budget: str
) -> None:
    profile = profile_of(family)
    settings = CutSettings(max_bytes="1", layout=layout, budget=budget)  # type: ignore[arg-type]
    ranking: Ranking = rank(profile, settings)
    size_of = size_of_cuts(find_source(profile.info.model.id), settings.layout, 8)
    allowed = counts(settings, ranking.blocks)
    sizes = [size_of(cut(ranking, n).draft) for n in allowed]
    assert len(sizes) > 2 and sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    for limit in (*sizes, *(s - 1 for s in sizes[1:]), sizes[-1] + 10**9):
        within = replace(ranking, settings=settings.updated(max_bytes=str(limit)))
        fitting = [n for n, s in zip(allowed, sizes, strict=True) if s <= limit]
        found = largest(within, size_of)
        assert found.draft.edits == cut(ranking, fitting[-1]).draft.edits
    with pytest.raises(PlanError, match=f"{sizes[0]:,} bytes"):
        small = settings.updated(max_bytes=str(sizes[0] - 1))
        largest(replace(ranking, settings=small), size_of)


def test_a_plan_says_what_its_checkpoint_would_weigh_or_why_that_is_not_known(
    profile_of: Profiles, expertcut: Commands
) -> None:
    measured = profile_of("olmoe")
    line = f"prune --profile {measured.path} --keep 6 --plan-only"
    before, after = planned_sizes(measured, choose(measured, CutSettings(keep=6)).draft)
    assert after[1] < before[1]
    said = expertcut(f"{line} --out plan")
    assert size_line(before, after) in said
    weights = Path(measured.info.model.id) / "model.safetensors"
    weights.rename(weights.with_suffix(".away"))
    try:
        assert " size not known: " in " ".join(expertcut(f"{line} --out again").split())
    finally:
        weights.with_suffix(".away").rename(weights)
