"""Whatever stands in a file or an expression: it is read, or refused in words, and no third way."""

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertcut.data.readers import json_lines, read_csv, read_records
from expertcut.edits.edit_settings import read_fractions, read_size
from expertcut.edits.plan import PlanFile, load_plan, plan_text, save_plan
from expertcut.edits.router_edits import parse_target
from expertcut.edits.selection import protection
from expertcut.errors import ExpertcutError
from expertcut.files import HIDDEN, parse_json, without_secrets
from expertcut.models.devices import _limits
from expertcut.profiling.schema import ProfileInfo
from expertcut.profiling.storage import Profile, load_profile, read_chunk, write_chunk
from expertcut.recipes.recipe_schema import Recipe, read_recipe
from tests.support.hand_made import block, profile_info, random_chunk, random_profile
from tests.support.readable import (
    FEW,
    FILLED,
    JSON,
    NUMBERS,
    TEXTS,
    changed,
    damaged,
    plans,
    profiles,
    read_or_refused,
    written,
)

EXPRESSIONS = st.from_regex(r"\A\s?([0-9]{1,11}:)?-?[0-9]{1,11}(=[-+.0-9e]{1,9})?\Z") | st.text()
SIZES = st.from_regex(r"\A[0-9.]{1,400} ?[kmgtKMGT]?i?[bB]?\Z") | st.text()
QUESTIONS = st.fixed_dictionaries(
    {
        "question": FILLED,
        "choices": st.lists(FILLED, min_size=2, max_size=26),
        "answer": st.just(0) | st.just("A"),
    },
    optional={"subject": FILLED},
)
HEAD = {"model": "olmoe", "quiz": "owner/name", "shots": 0}
VARIANT = {"name": "half", "prune": {"keep": 4, "boost": ["1=0.5"]}, "merge": None}
RECIPE = {
    **HEAD,
    "profile": {"split": "val", "limit": 3},
    "variants": [{"name": "half", "prune": {"keep": 4, "boost": ["0:1=0.5"]}}],
    "eval": None,
    "publish": [{"variant": "half", "repo": "owner/name"}],
}


@FEW
@given(JSON)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@FEW
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
def test_what_is_no_json_is_a_value_error(content: bytes) -> None:
    try:
        value = parse_json(content)
    except ValueError:
        return
    assert value == json.loads(content)


@FEW
@given(st.binary(max_size=200) | st.lists(st.lists(TEXTS, max_size=7)).map(lambda r: _csv(r)))
def test_any_csv_is_questions_or_refused(tmp_path: Path, content: bytes) -> None:
    file = written(tmp_path / "birds_test.csv", content)
    questions = read_or_refused(lambda: read_csv(file, "birds"))
    if questions is None:
        return
    rows = [[q.text, *q.choices, "ABCD"[q.answer]] for q in questions]
    again = read_csv(written(file, _csv(rows)), "birds")
    assert again == questions


def _csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    # With the mark: without it a first cell that begins with one would lose it.
    return codecs.BOM_UTF8 + text.getvalue().encode("utf-8", "replace")


@FEW
@given(st.lists(st.tuples(FILLED, FILLED, FILLED, FILLED, FILLED, st.sampled_from("ABCD"))))
def test_questions_come_back_from_csv_as_they_went(tmp_path: Path, rows: list[Any]) -> None:
    found = read_csv(written(tmp_path / "birds_test.csv", _csv(rows)), "birds")
    assert [(q.text, *q.choices, "ABCD"[q.answer]) for q in found] == rows


@FEW
@given(st.binary(max_size=200) | st.lists(JSON | QUESTIONS).map(lambda r: _jsonl(r)))
def test_any_json_lines_are_questions_or_refused(tmp_path: Path, content: bytes) -> None:
    file = written(tmp_path / "test.jsonl", content)
    read_or_refused(lambda: read_records(json_lines(file), str(file), "birds"))


@FEW
@given(st.lists(QUESTIONS))
def test_questions_come_back_from_json_lines_as_they_went(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    file = written(tmp_path / "test.jsonl", _jsonl(records))
    found = read_records(json_lines(file), str(file), "birds")
    assert [q.text for q in found] == [r["question"] for r in records]
    assert [list(q.choices) for q in found] == [r["choices"] for r in records]
    assert [q.subject for q in found] == [r.get("subject", "birds") for r in records]


def _jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in records).encode()


@FEW
@given(plans())
def test_a_plan_comes_back_as_it_went(tmp_path: Path, plan: PlanFile) -> None:
    save_plan(tmp_path, plan, ())
    assert load_plan(tmp_path) == plan
    assert plan_text(load_plan(tmp_path)) == plan_text(plan)


@FEW
@given(st.data())
def test_any_plan_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    text = plan_text(data.draw(plans()))
    value = json.dumps(data.draw(changed(json.loads(text)))).encode()
    content = data.draw(st.sampled_from([value, data.draw(damaged(text.encode()))]))
    file = written(tmp_path / "plan.json", content)
    plan = read_or_refused(lambda: load_plan(file))
    if plan is not None:
        written(file, plan_text(plan))
        assert load_plan(file) == plan


@FEW
@given(profiles())
def test_a_description_comes_back_as_it_went(tmp_path: Path, info: ProfileInfo) -> None:
    written(tmp_path / "profile.json", info.model_dump_json())
    assert load_profile(tmp_path).info == info
    for name, _, _ in info.chunks():
        assert "/" not in name and len(name.encode()) <= 255


@FEW
@given(st.data())
def test_any_description_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    text = data.draw(profiles()).model_dump_json()
    value = json.dumps(data.draw(changed(json.loads(text)))).encode()
    content = data.draw(st.sampled_from([value, data.draw(damaged(text.encode()))]))
    written(tmp_path / "profile.json", content)
    found = read_or_refused(lambda: load_profile(tmp_path))
    if found is not None:
        read_or_refused(lambda: found.chunks)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("fuzz") / "profile"
    return random_profile(folder, profile_info([block(0), block(1)], {"birds": 4}))


@FEW
@given(st.data())
def test_any_chunk_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    arrays, file = random_chunk(0, 4, [block(0)]), tmp_path / "birds-0.safetensors"
    write_chunk(file, arrays, "birds")
    written(file, data.draw(damaged(file.read_bytes())))
    found = read_or_refused(lambda: read_chunk(file, "birds"))
    if found is not None:  # a change that changes nothing
        assert all(np.array_equal(found[name], array) for name, array in arrays.items())


@FEW
@given(EXPRESSIONS)
def test_any_expert_expression_is_a_target_or_refused(text: str) -> None:
    target = read_or_refused(lambda: parse_target(text))
    if target is None:
        return
    layer = "" if target.layer is None else f"{target.layer}:"
    strength = "" if target.strength is None else f"={target.strength!r}"
    assert parse_target(f"{layer}{target.expert}{strength}") == target


@FEW
@given(st.lists(EXPRESSIONS, min_size=1, max_size=3))
def test_any_protection_is_experts_or_refused(profile: Profile, texts: list[str]) -> None:
    found = read_or_refused(lambda: protection(profile, texts))
    if found is not None:
        assert all(0 <= e < 8 for experts in found.ids for e in experts)


@FEW
@given(SIZES)
def test_any_size_is_bytes_or_refused(text: str) -> None:
    size = read_or_refused(lambda: read_size(text))
    assert size is None or size >= 1
    assert size is None or read_size(str(size)) == size


@FEW
@given(st.text() | st.lists(NUMBERS).map(lambda n: ",".join(map(str, n))))
def test_any_shares_are_numbers_or_refused(text: str) -> None:
    shares = read_or_refused(lambda: read_fractions(text, "--sweep"))
    assert shares is None or all(0 < share <= 1 for share in shares)


@FEW
@given(st.text() | st.from_regex(r"\A(cpu|[0-9²]{1,3})=[0-9²]{1,4}(GiB)?\Z"))
def test_any_memory_limit_is_read_or_refused(text: str) -> None:
    assert read_or_refused(lambda: _limits(text)) != {}


@FEW
@given(st.data())
def test_any_recipe_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    value = json.dumps(data.draw(changed(RECIPE))).encode()
    content = data.draw(st.sampled_from([value, data.draw(damaged(json.dumps(RECIPE).encode()))]))
    file = written(tmp_path / "recipe.yaml", content)
    recipe = read_or_refused(lambda: read_recipe(file))
    if recipe is not None:
        written(file, recipe.model_dump_json(exclude_defaults=True))
        assert read_recipe(file) == recipe


@FEW
@given(st.text(max_size=80) | st.binary(max_size=80))
def test_any_text_is_a_recipe_or_refused(tmp_path: Path, content: str | bytes) -> None:
    text = content.encode("utf-8", "replace") if isinstance(content, str) else content
    read_or_refused(lambda: read_recipe(written(tmp_path / "recipe.yaml", text)))


@FEW
@given(st.text(max_size=30), st.text(max_size=30), st.from_regex(r"\A[A-Za-z0-9]{16,40}\Z"))
def test_no_token_is_left_in_any_text(before: str, after: str, token: str) -> None:
    for secret in (f"hf_{token}", f"https://me:{token}@hub/x"):
        shown = without_secrets(f"{before} {secret} {after}")
        assert token not in shown and HIDDEN in shown


def test_what_is_written_is_a_recipe(tmp_path: Path) -> None:
    assert isinstance(read_recipe(written(tmp_path / "r.yaml", json.dumps(RECIPE))), Recipe)
    with pytest.raises(ExpertcutError):
        read_recipe(written(tmp_path / "r.yaml", json.dumps({**HEAD, "variants": [VARIANT, 7]})))
