"""Commands against plain transformers, family by family, and docs/families.md against that.

What is cheap runs for all families, the whole matrix with -m slow.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from expertcut.models.validate import REFUSED as NOT_SUPPORTED
from expertcut.models.validate import TESTED
from tests.conftest import write_quiz
from tests.support.matrix import (
    AGREE,
    PAGE,
    PARTS,
    WORLDS,
    World,
    facts_line,
    measure,
    table,
)

WITHIN = 1e-4  # of log p, in float32
MOVED = 1e-3  # at least, by an edit
# A bare parameter, a Linear inside, a selection bias that the block hands over, groups, all
# experts in one tensor on disk.
FEW = ("olmoe", "hunyuan_v1_moe", "minimax_m2", "deepseek_v3", "granitemoe")
CHEAP_PARTS = ("profile", "cut")
FEW_PARTS = ("cut", "sweep", "ablation", "boost")
_TABLE = "chooses its experts by a table of token ids"
# What is refused, and by which words.
REFUSED: dict[str, dict[str, str]] = {
    "gemma4": {"boost": "caps or scales its logits"},
    "gemma4_text": {"boost": "caps or scales its logits"},
    "laguna": {"boost": "caps or scales its logits"},
    "muse_spark": {"boost": "caps or scales its logits"},
    "deepseek_v4": dict.fromkeys(("cut", "sweep", "reconstruction", "merge"), _TABLE),
}
# The text part alone of another row, or nearly another row: with -m slow.
TWINS = {
    *("aria_text", "dots3_note_text", "gemma4_text", "inkling2_text", "minimax_m3_vl_text"),
    *("qwen3_5_moe_text", "qwen3_omni_moe_thinker", "qwen4_exp_text", "unlimited_ocr"),
}


def check(world: World, parts: tuple[str, ...], refused: dict[str, str]) -> dict[str, str]:
    """Measures, holds the numbers to their limits, and gives what the contract found."""
    row = measure(world, parts)
    assert set(row.refused) == set(refused), row.refused
    assert all(words in row.refused[part] for part, words in refused.items())
    asked = [PARTS[part] for part in parts if part not in refused and row.facts]
    for agree, moved in asked:
        assert {name: row.found[name] for name in agree if not row.found[name] <= WITHIN} == {}
        assert {name: row.found[name] for name in moved if not row.found[name] >= MOVED} == {}
    assert set(row.found) == {name for agree, moved in asked for name in (*agree, *moved)}
    return dict(row.facts)


@pytest.mark.parametrize("family", FEW)
def test_a_cut_a_removed_expert_and_a_boost_are_what_transformers_does_with_its_router_changed(
    family: str, tmp_path: Path
) -> None:
    quiz = write_quiz(tmp_path / "quiz", {"dev": 1, "val": 1, "test": 1})
    assert check(World(tmp_path, family, quiz), FEW_PARTS, {})


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in TWINS else n for n in WORLDS],
)
def test_every_family_is_profiled_as_by_brute_force_and_cut_as_masked(
    name: str, tmp_path: Path
) -> None:
    quiz = write_quiz(tmp_path / "quiz", {"dev": 1, "val": 1, "test": 1})
    refused = {k: v for k, v in REFUSED.get(name, {}).items() if k in CHEAP_PARTS}
    facts = check(World(tmp_path, name, quiz), CHEAP_PARTS, refused)
    assert not facts or facts_line(name, facts) in table("families")


def test_the_page_lists_what_the_matrix_runs_and_no_other() -> None:
    run = [name for name in WORLDS if "profile" not in REFUSED.get(name, {})]
    rows = {name: [cells(line) for line in table(name)] for name in ("families", "matrix")}
    assert [row[1].replace("`", "") for row in rows["families"]] == run
    assert [row[0].replace("`", "") for row in rows["matrix"]] == run
    for name, (_, *numbers) in zip(run, rows["matrix"], strict=True):
        is_refused = {key: cell == "refused" for key, cell in zip(AGREE, numbers, strict=True)}
        parts = {part for part, (agree, _) in PARTS.items() if is_refused[agree[0]]}
        assert parts == set(REFUSED.get(name, {})), name
    assert {WORLDS[name][0] for name in run} == TESTED and len(AGREE) == 8
    assert all(f"`{family}`" in PAGE.read_text(encoding="utf-8") for family in NOT_SUPPORTED)


def test_every_type_of_transformers_with_experts_is_run_or_refused() -> None:
    decided = TESTED | NOT_SUPPORTED.keys()
    loaded = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,  # those of images and texts too
    }
    others = {model_type: CONFIG_MAPPING[model_type]() for model_type in loaded - decided}
    undecided = [name for name, own in others.items() if counts_experts(own.to_dict())]
    assert undecided == [] and len(others) > 100
    assert not TESTED & NOT_SUPPORTED.keys()


def counts_experts(config: dict[str, Any]) -> bool:
    """Whether a config, or a part of it, has a number of experts, or a place for it."""
    return any(
        (re.fullmatch(r"(n|num|moe_num)_(routed_|local_)?experts", str(key)) and value != 1)
        or (isinstance(value, dict) and counts_experts(value))
        for key, value in config.items()
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_every_command_agrees_with_transformers_in_every_family(name: str, tmp_path: Path) -> None:
    quiz = write_quiz(tmp_path / "quiz", {"dev": 1, "val": 4, "test": 4})
    check(World(tmp_path, name, quiz), tuple(PARTS), REFUSED.get(name, {}))
