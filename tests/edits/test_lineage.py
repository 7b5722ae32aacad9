"""What was done to a model before is known from every working directory, or the command refuses."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from expertcut.edits.plan import (
    BlockEdit,
    ChosenOn,
    PlanFile,
    PlanModel,
    expert_ids,
    lineage,
    load_hashes,
    load_plan,
    profiled_plan,
    save_plan,
)
from expertcut.edits.router_edits import tilts
from expertcut.errors import PlanError
from expertcut.hub.provenance import origin
from expertcut.models import checkpoint_dir
from expertcut.models.checkpoint_dir import fingerprint_of
from expertcut.models.load import find_source
from expertcut.profiling.measure import default_folder
from expertcut.profiling.storage import load_profile
from tests.conftest import Commands, write_quiz

FIRST, LAST = "model.layers.0.mlp", "model.layers.1.mlp"


@pytest.fixture(scope="module")
def world(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cut` keeps six experts of `base`, `profiles/p` is of it, all named by relative paths."""
    from expertcut.cli import app

    root, here = tmp_path_factory.mktemp("world"), Path.cwd()
    shutil.copytree(checkpoint("olmoe"), root / "base")
    quiz = write_quiz(root / "quiz", {"dev": 2, "val": 8, "test": 4})
    asked = ("--quiz", quiz, "--split", "val", "--shots", 0)
    os.chdir(root)
    try:
        for words in (
            ("profile", "base", *asked, "--out", "profiles/base"),
            ("prune", "--profile", "profiles/base", "--keep", 6, "--by", "random",
             "--no-verify", "--out", "cut"),
            ("profile", "cut", *asked, "--out", "profiles/p"),
        ):  # fmt: skip
            app([str(word) for word in words], standalone_mode=False)
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    """A copy of the world, as if it had been made there."""
    root = tmp_path / "own"
    shutil.copytree(world, root)
    for file in (*root.glob("profiles/*/profile.json"), root / "cut" / "plan.json"):
        file.write_text(file.read_text().replace(str(world), str(root)))
    return root


def make_old(root: Path) -> None:
    """Profiles and plans as older versions wrote them: the model as it was typed."""
    for file in (*root.glob("profiles/*/profile.json"), root / "cut" / "plan.json"):
        text = file.read_text()
        assert f"{root}/" in text
        for name in ("base", "cut"):
            text = text.replace(f'"{root / name}"', f'"{name}"')
        file.write_text(text)


@pytest.mark.parametrize("is_old", [False, True])
def test_from_another_directory_the_same_experts_are_kept_and_tilted(
    own: Path, is_old: bool, expertcut: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if is_old:
        make_old(own)
    profile = own / "profiles" / "p"
    plans = {}
    for place in (own, tmp_path):
        monkeypatch.chdir(place)
        for name, words in {
            "cut": ("prune", "--keep", 4),
            "tilt": ("reweight", "--boost", f"0:{_last_kept(own)}=2"),
        }.items():
            out = tmp_path / f"{place.name}-{name}"
            expertcut(*words, "--profile", profile, "--plan-only", "--out", out)
            plan = load_plan(out)
            assert plan.model.id == str(own / "cut")
            plans[place, name] = (plan.blocks, load_hashes(out, plan))
    assert plans[own, "cut"] == plans[tmp_path, "cut"]
    assert plans[own, "tilt"] == plans[tmp_path, "tilt"]
    blocks, hashes = plans[tmp_path, "cut"]
    kept = load_plan(own / "cut").blocks[FIRST].keep
    assert set(blocks[FIRST].keep) < set(kept) != set(range(6))
    assert hashes >= load_hashes(own / "cut", load_plan(own / "cut"))
    assert blocks[FIRST].rows == kept
    shown = expertcut("show", profile, "--tables")
    assert "This model was cut before" in shown


def _last_kept(root: Path) -> int:
    return load_plan(root / "cut").blocks[FIRST].keep[-1]


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("harm", ["moved away", "other weights"])
def test_a_model_that_is_not_there_as_it_was_is_refused(
    own: Path, is_old: bool, harm: str, expertcut: Commands, caplog: pytest.LogCaptureFixture
) -> None:
    if is_old:
        make_old(own)
    if harm == "moved away":
        (own / "cut").rename(own / "elsewhere")
    else:
        config = json.loads((own / "cut" / "config.json").read_text())
        (own / "cut" / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    profile = own / "profiles" / "p"
    for words in (
        ("prune", "--keep", 4, "--plan-only"),
        ("reweight", "--boost", "0:1=2", "--plan-only"),
        ("merge", "--keep", 4, "--plan-only"),
        ("audit", "--sample", 2),
    ):
        line = expertcut(*words, "--profile", profile, status=2)
        assert line.count("\n") == 1 and "is not there with its weights" in line, line
    assert {p.name for p in Path.cwd().iterdir()} == {"own"}
    caplog.clear()
    assert "This model was cut before" not in expertcut("show", profile, "--tables")
    assert "the tables call experts by rows" in caplog.text  # but not without a word


def test_a_folder_of_the_same_name_is_not_taken_for_the_model(
    own: Path, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_old(own)
    shutil.copytree(checkpoint("olmoe"), tmp_path / "cut")
    monkeypatch.chdir(tmp_path)
    profile = load_profile(own / "profiles" / "p")
    assert expert_ids(profile).rows[FIRST] == load_plan(own / "cut").blocks[FIRST].keep
    assert (earlier := profiled_plan(profile)) and load_hashes(*earlier)
    assert tilts(profile, [f"0:{_last_kept(own)}=1"], [])[0].expert == 5


def test_a_folder_of_a_profile_is_called_as_before(own: Path) -> None:
    """By what was typed, so that what an older version began is found and gone on with."""
    new = load_profile(own / "profiles" / "p").info
    make_old(own)
    old = load_profile(own / "profiles" / "p").info
    assert new.model.id == str(own / "cut") != old.model.id == "cut"
    source = find_source(str(own / "cut"))
    named = default_folder(new, type(source)("cut", source.path)).name
    assert named.endswith(old.short_hash) and not named.endswith(new.short_hash)
    name, subject, _ = next(new.chunks())
    assert new.chunk_hash(name, subject) == old.chunk_hash(name, subject)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_card_tells_all_steps_from_any_directory_or_says_that_it_cannot(
    own: Path,
    is_old: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    expertcut: Commands,
) -> None:
    profile = own / "profiles" / "p"
    made = ("reweight", "--profile", profile, "--boost", f"0:{_last_kept(own)}=2", "--no-verify")
    expertcut(*made, "--out", own / "tilted")
    if is_old:
        make_old(own)
        file = own / "tilted" / "plan.json"
        file.write_text(file.read_text().replace(f'"{own / "cut"}"', '"cut"'))
    monkeypatch.chdir(tmp_path)
    found = origin(own / "tilted")
    assert [step.action.split()[0] for step in found.steps] == ["prune", "reweight"]
    assert found.is_here
    (own / "cut" / "model.safetensors").write_bytes(b"another")
    found = origin(own / "tilted")
    assert [step.action.split()[0] for step in found.steps] == ["reweight"]
    assert not found.is_here and "cannot say what was done to it before" in caplog.text
    expertcut("publish", own / "tilted", "birds/tilted", "--dry-run")
    card = (own / "tilted" / "README.md").read_text()
    assert "what was done to it before is not known" in " ".join(card.split())
    assert "pruning" in card and str(own) not in card


def test_a_fingerprint_is_read_once_while_nothing_changes(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint_of(own / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_dir.hashlib, "file_digest", None)  # would fail
        assert fingerprint_of(own / "cut") == before
    config = own / "cut" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=7))
    assert fingerprint_of(own / "cut") == before  # its spelling does not count
    config.write_text(json.dumps(json.loads(config.read_text()) | {"x": 1}))
    assert fingerprint_of(own / "cut") != before


def write_step(root: Path, name: str, base: str) -> None:
    plan = PlanFile(
        model=PlanModel(id=base, revision=None, fingerprint="f"),
        action=f"prune {name}",
        criterion="reap",
        positions="all",
        removal="reroute",
        layout="stock",
        chosen_on=ChosenOn(quiz="q", split="val", questions=1, sha256="0"),
        blocks={FIRST: BlockEdit(keep=(0, 1))},
    )
    save_plan(root / name, plan, [])


def test_the_walk_goes_from_the_checkpoint_to_its_base_and_ends(tmp_path: Path) -> None:
    for name, base in {"c": "b", "b": "a", "own": "own", "x": "y", "y": "x"}.items():
        write_step(tmp_path, name, base)
    (tmp_path / "a").mkdir()

    def walk(name: str, missing: str = "") -> list[tuple[str, str | None]]:
        find = lambda model, near: None if model.id == missing else tmp_path / model.id  # noqa: E731
        return [(plan.action, base and base.name) for plan, base in lineage(tmp_path / name, find)]

    assert walk("a") == []
    assert walk("c") == [("prune c", "b"), ("prune b", "a")]
    assert walk("c", missing="a") == [("prune c", "b"), ("prune b", None)]
    assert walk("own") == [("prune own", "own")]
    assert len(walk("x")) == 20
    (tmp_path / "b" / "plan.json").write_text("{}")
    with pytest.raises(PlanError):
        walk("c")
