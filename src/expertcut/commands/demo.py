"""`expertcut demo`: the tour of the README in a folder of its own, on the bundled model."""

import shlex
import shutil
from contextlib import chdir
from pathlib import Path
from typing import ClassVar

from expertcut.commands import SILENT, UI, eval, output_option, profile, prune
from expertcut.errors import OutputError
from expertcut.settings import FilePath, Settings

PACKAGE = Path(__file__).parents[1]
BUNDLED = (  # as in setup.py, which puts them into wheels
    "checkpoints/quickstart/*.json",
    "checkpoints/quickstart/README.md",
    "checkpoints/quickstart/model.safetensors",
    "checkpoints/quickstart/quiz/*/*.csv",
    "recipes/quickstart.yaml",
)
MODEL, QUIZ, HALF = (f"checkpoints/quickstart{end}" for end in ("", "/quiz", "-keep-16-reap"))

# More than one thread does not help for so small a model.
STEPS = (
    ("Record what every expert does in the questions of split val",
     f"profile {MODEL} --quiz {QUIZ} --split val --threads 1"),
    ("Keep the 16 of 32 experts in each layer that the criterion REAP ranks highest",
     "prune --keep 16 --by reap"),
    ("Compare the two models on split test, which had no part in the choice",
     f"eval {MODEL} {HALF} --quiz {QUIZ} --threads 1"),
)  # fmt: skip


class DemoSettings(Settings):
    """Profile, prune and evaluate a small model that comes with the package."""

    examples: ClassVar = (
        "expertcut demo --out tour",
        "expertcut demo --copy-only",
        "expertcut demo --out tour --copy-only",
    )

    out: FilePath = output_option(
        Path("expertcut-demo"), "Folder to work in; a demo that was started there is resumed."
    )
    copy_only: bool = output_option(False, "Copy model, quiz and recipe, and run nothing.")


def run(settings: DemoSettings, ui: UI = SILENT) -> Path:
    """Copies the bundled files unless the folder has them, and runs every step there."""
    folder = settings.out
    if not (folder / BUNDLED[-1]).is_file() or (folder / "pyproject.toml").exists():  # a clone
        _copy(folder)
    ui.say([], [f"{folder} has a model of 4 layers × 32 experts, its quiz and a recipe"])
    following = [f"expertcut {words}" for _, words in STEPS]
    if not settings.copy_only:
        with chdir(folder):
            for number, (text, words) in enumerate(STEPS, 1):
                ui.say([], [f"\n{number}. {text}", f"$ expertcut {words}"])
                _run(words.partition(" ")[0], ui)
            profiles = [file.parent for file in Path("profiles").glob("*/profile.json")]
        following = [f"expertcut show {place}" for place in (*profiles, HALF, "results.json")]
    following += [f"expertcut run {BUNDLED[-1]}", "expertcut profile MODEL --quiz FILE.jsonl"]
    first = f"next      cd {shlex.quote(str(folder))}"
    ui.say([], ["", first, *(f"{'':<10}{line}" for line in following)])
    return folder


def _run(command: str, ui: UI) -> None:
    """Runs a step, with the settings of its words; a checkpoint is not written twice."""
    if command == "profile":
        profile.run(profile.ProfileSettings(model=MODEL, quiz=QUIZ, split="val", threads=1), ui)
    elif command == "eval":
        eval.run(eval.EvalSettings(models=[MODEL, HALF], quiz=QUIZ, threads=1), ui)
    elif not Path(HALF, "plan.json").is_file():
        prune.run(prune.PruneSettings(keep=16, by="reap"), ui)
    else:
        ui.say([], [f"{HALF} was written before"])


def _copy(folder: Path) -> None:
    """Copies the bundled files out of the wheel or the clone that this module lies in."""
    from expertcut.checkpoints.output_dir import atomic_dir

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder} is not empty and holds no demo: name another with --out")
    places = (PACKAGE / "bundled", PACKAGE.parents[1])
    root = next(place for place in places if (place / BUNDLED[-1]).is_file())
    with atomic_dir(folder) as temporary:
        for file in (file for pattern in BUNDLED for file in root.glob(pattern)):
            place = temporary / file.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
