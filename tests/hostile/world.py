"""A small world where every command works: models, a quiz, a profile, plans, results, recipes."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from tests.conftest import make_checkpoint, make_tokenizer, write_quiz
from tests.hostile.running import run

COUNTS = {"dev": 1, "test": 3, "val": 3}
SWEPT = ["--sweep", "0.5", "--limit", "1"]
AUDITED = ["--sample", "2", "--questions", "3", "--by", "activations"]


@dataclass(frozen=True)
class World:
    """The folder that commands run in; every path below is relative to it."""

    root: Path
    model: str = "olmoe"  # weights in one file
    sharded: str = "sharded"  # the same weights in several files with an index
    quiz: str = "birds"  # Hendrycks CSV
    profile: str = "profiles/finished"  # of `model`, split test, no shots
    plan: str = "plans/plan.json"
    cut: str = "checkpoints/cut"  # half of the experts, layout stock
    results: str = "results.json"  # `model` against `cut`
    cut_profile: str = "profiles/cut"  # of `cut`, which is called by numbers in its plan
    sweep: str = "sweep"  # of `profile`, one cut
    audit: str = "audit"  # of `profile`, two experts
    trace: str = "trace"  # of `model`, all its questions
    recipe: str = "recipe.yaml"
    run: str = "made"  # what `recipe` made

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @property
    def asked(self) -> list[str]:
        """The options that ask the questions of this world."""
        return ["--quiz", self.quiz, "--shots", "0", "--threads", "1"]

    def copy(self, root: Path) -> "World":
        return World(copied_world(self.root, root))


def copied_world(source: Path, root: Path) -> Path:
    """A copy whose records, which hold the whole path of a model, are of the copied model."""
    shutil.copytree(source, root, dirs_exist_ok=True)
    for file in root.rglob("*.json"):
        rename_world(file, source, root)
    return root


def rename_world(record: Path, source: Path, root: Path) -> None:
    content = record.read_bytes()
    if (before := str(source).encode()) in content:
        record.write_bytes(content.replace(before, str(root).encode()))


class Mended:
    """A copy of a world in which what a case has changed is put back, not all copied anew."""

    def __init__(self, pristine: World, root: Path) -> None:
        self.pristine, self.world = pristine, pristine.copy(root)
        self.stamps = stamps(root)

    def mend(self) -> World:
        root, now = self.world.root, stamps(self.world.root)
        changed = {name for name in {*now, *self.stamps} if now.get(name) != self.stamps.get(name)}
        if any(len({**self.stamps, **now}[name]) == 1 for name in changed):  # a folder
            shutil.rmtree(root)
            self.pristine.copy(root)
            changed = set()
        for name in changed:
            (root / name).unlink(missing_ok=True)
            if name in self.stamps:
                shutil.copy2(self.pristine.root / name, root / name)
                rename_world(root / name, self.pristine.root, root)
        self.stamps = stamps(root)
        return self.world


def stamps(root: Path) -> dict[str, tuple[int, ...]]:
    """What tells whether a file is the one that it was; a folder has its mode alone."""
    found = {}
    for path in root.rglob("*"):
        is_folder, seen = path.is_dir() and not path.is_symlink(), path.lstat()
        whole = (seen.st_mode, seen.st_ino, seen.st_size, seen.st_ctime_ns)
        found[str(path.relative_to(root))] = whole[:1] if is_folder else whole
    return found


def make_world(root: Path) -> World:
    """Takes some seconds: copy it for every case."""
    world = World(root)
    make_checkpoint(root / world.model, "olmoe")
    model = AutoModelForCausalLM.from_pretrained(root / world.model)
    model.save_pretrained(root / world.sharded, max_shard_size="40KB")
    make_tokenizer().save_pretrained(root / world.sharded)
    write_quiz(root / world.quiz, COUNTS)
    write_recipe(root / world.recipe, world)
    of = ["--profile", world.profile]
    for words in (
        ["profile", world.model, *world.asked, "--out", world.profile],
        ["prune", *of, "--keep", "4", "--plan-only", "--out", "plans"],
        ["prune", *of, "--keep", "4", "--no-verify", "--out", world.cut],
        ["eval", world.model, world.cut, *world.asked, "--out", world.results],
        ["profile", world.cut, *world.asked, "--out", world.cut_profile],
        ["prune", *of, *SWEPT, "--out", world.sweep],
        ["audit", *of, *AUDITED, "--out", world.audit],
        ["trace", world.model, *world.asked, "--out", world.trace],
        ["run", world.recipe, "--out", world.run],
    ):
        ended = run(root, words)
        assert ended.status == 0, ended.stderr
    made = (world.profile, world.plan, world.cut, world.results, world.sweep, world.audit)
    assert all((root / path).exists() for path in (*made, f"{world.run}/manifest.json"))
    return world


def write_recipe(file: Path, world: World) -> None:
    """A recipe of three stages, as JSON, which YAML holds."""
    values = {
        "model": world.model,
        "quiz": world.quiz,
        "shots": 0,
        "threads": 1,
        "show": None,
        "variants": [{"name": "half", "prune": {"keep": 4, "verify": False}}],
    }
    file.write_text(json.dumps(values, indent=1))
