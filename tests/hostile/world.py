"""A small world where every command works: models, a quiz, a profile, plans, results, recipes."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from tests.conftest import make_checkpoint, make_tokenizer, write_quiz
from tests.hostile.running import run

COUNTS = {"dev": 1, "test": 3, "val": 3}


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
    recipe: str = "recipe.yaml"

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @property
    def asked(self) -> list[str]:
        """The options that ask the questions of this world."""
        return ["--quiz", self.quiz, "--shots", "0", "--threads", "1"]

    def copy(self, root: Path) -> "World":
        shutil.copytree(self.root, root)
        return World(root)


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
    ):
        ended = run(root, words)
        assert ended.status == 0, ended.stderr
    assert all((root / p).exists() for p in (world.profile, world.plan, world.cut, world.results))
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
