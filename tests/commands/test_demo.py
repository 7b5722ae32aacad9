"""The demo: the bundled model travels in the wheel, and the tour prints what it runs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from expertcut.commands import UI, demo, eval, profile, prune
from expertcut.settings import Settings
from tests.commands.test_settings import OWN, parsed
from tests.conftest import Commands

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools.build_meta import build_sdist, build_wheel as b; b('.'), build_sdist('.')"


def bundled() -> set[str]:
    """The bundled files by their names in the repository."""
    files = {f.relative_to(ROOT).as_posix() for p in demo.BUNDLED for f in ROOT.glob(p)}
    assert {"checkpoints/quickstart/model.safetensors", "recipes/quickstart.yaml"} < files
    assert len([name for name in files if "/quiz/" in name]) == 33
    return files


def test_the_wheel_and_the_sdist_carry_what_the_demo_copies_and_no_training_code(
    tmp_path: Path,
) -> None:
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("src", "recipes", "checkpoints/quickstart"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.egg-info"))
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    place = "expertcut/bundled/"
    assert {n.removeprefix(place) for n in names if n.startswith(place)} == bundled()
    assert not [name for name in names if name.endswith(("train.py", ".jsonl"))]
    shutil.unpack_archive(sdist, tmp_path / "sdist")
    (folder,) = (tmp_path / "sdist").iterdir()
    assert all((folder / name).is_file() for name in (*bundled(), "setup.py"))


def test_the_demo_runs_what_it_prints_in_a_copy_and_goes_on_there(
    expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[Path, Settings]] = []

    def run(given: Settings, ui: UI) -> None:
        ran.append((Path.cwd(), given))
        Path("profiles/it").mkdir(parents=True, exist_ok=True)
        Path("profiles/it/profile.json").touch()

    for command in (profile, prune, eval):
        monkeypatch.setattr(command, "run", run)
    printed = expertcut("demo --out a/tour").splitlines()
    folder = Path("a/tour").resolve()
    files = [file for file in folder.rglob("*") if file.is_file()]
    copied = {file.relative_to(folder).as_posix() for file in files}
    assert copied == bundled() | {"profiles/it/profile.json"}
    typed = [line.split()[2:] for line in printed if line.startswith("$ expertcut ")]
    assert ran == [(folder, parsed(name, OWN[name], *words)) for name, *words in typed]
    assert [name for name, *_ in typed] == ["profile", "prune", "eval"]
    assert printed[-6:] == [
        "next      cd a/tour",
        "          expertcut show profiles/it",
        "          expertcut show checkpoints/quickstart-keep-16-reap",
        "          expertcut show results.json",
        "          expertcut run recipes/quickstart.yaml",
        "          expertcut profile MODEL --quiz FILE.jsonl",
    ]
    # Again: nothing is copied, and the checkpoint is not written twice.
    (folder / demo.HALF).mkdir()
    (folder / demo.HALF / "plan.json").touch()
    (folder / demo.MODEL / "config.json").write_text("{}")
    expertcut("demo --out a/tour")
    assert [type(given) for _, given in ran[3:]] == [type(ran[0][1]), type(ran[2][1])]
    assert (folder / demo.MODEL / "config.json").read_text() == "{}"


def test_only_copying_runs_nothing_and_names_the_commands(
    expertcut: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "run", lambda given, ui: pytest.fail("it ran"))
    printed = expertcut("demo --copy-only").split("next ")[1]
    assert [line.split()[1] for line in printed.splitlines()[1:4]] == ["profile", "prune", "eval"]
    assert demo.run(demo.DemoSettings(copy_only=True), UI()) == Path("expertcut-demo")


def test_a_folder_of_others_is_refused_in_one_line(expertcut: Commands, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    for place, words in {".": "not empty and holds no demo", "mine/x": "cannot be written"}.items():
        line = expertcut("demo", "--out", place, status=2)
        assert line.startswith(f"expertcut: {place} ") and words in line and line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
