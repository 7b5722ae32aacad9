"""What a stage is given to work with, and whom it tells what it found."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from expertcut.recipes.manifest import RECIPE_FILE
from expertcut.recipes.recipe_schema import Recipe
from expertcut.recipes.stages import PROFILE, Stage, variant_folder

if TYPE_CHECKING:
    from expertcut.models.load import LoadOptions, Source
    from expertcut.profiling.storage import Profile
    from expertcut.reporting.tables import Table
    from expertcut.scoring.passes import OnPass

T = TypeVar("T")
Parts = Callable[[int, int], None]
"""Told how many parts are done, of how many."""


class UI(Protocol):
    """Who is told what happens, and where long runs show how far they are."""

    def say(self, tables: "Sequence[Table]", sentences: Sequence[str]) -> None:
        """What a stage found."""

    def watch(
        self, run: "Callable[[OnPass], Iterator[T]]", what: str, total: int, where: Path
    ) -> list[T]:
        """All that a long run of questions yields."""

    def parts(self, what: str) -> AbstractContextManager[Parts]:
        """Someone to tell how many parts of something are done."""

    def plan(self, stage: Stage, why: str, *, is_dry: bool) -> None:
        """A stage is current (`why` is empty), or runs, or would."""

    def done(self, stage: Stage, elapsed_s: float) -> None:
        """A stage has run."""


class SilentUI:
    """An audience that is not there."""

    def say(self, tables: "Sequence[Table]", sentences: Sequence[str]) -> None:
        """Nothing."""

    def watch(
        self, run: "Callable[[OnPass], Iterator[T]]", what: str, total: int, where: Path
    ) -> list[T]:
        """All that the run yields."""
        return list(run(lambda step: None))

    def parts(self, what: str) -> AbstractContextManager[Parts]:
        """Nobody to tell."""
        return nullcontext(lambda done, total: None)

    def plan(self, stage: Stage, why: str, *, is_dry: bool) -> None:
        """Nothing."""

    def done(self, stage: Stage, elapsed_s: float) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Job:
    """A stage to be run: of which recipe (`text` is its file), in which folder, for whom."""

    recipe: Recipe
    text: bytes
    stage: Stage
    run: Path
    commit: str | None
    audience: UI

    @property
    def profile_folder(self) -> Path:
        """Where the profile lies."""
        return self.run / PROFILE

    @property
    def beside(self) -> dict[str, bytes]:
        """The recipe's copy, to lie beside what was made by it."""
        return {RECIPE_FILE: self.text}

    def load_as(self) -> "LoadOptions":
        """How the recipe loads models."""
        from expertcut.models.load import LoadOptions

        recipe = self.recipe
        return LoadOptions(
            dtype=recipe.dtype,
            device=recipe.device,
            trust_remote_code=recipe.trust_remote_code,
            device_map=recipe.device_map,
            max_memory=recipe.max_memory,
            offload=Path(recipe.offload) if recipe.offload else None,
        )

    def source(self) -> "Source":
        """The recipe's model."""
        from expertcut.models.load import find_source

        return find_source(self.recipe.model, self.commit or self.recipe.revision)

    def profile(self) -> "Profile":
        """The profile that the run made."""
        from expertcut.profiling.storage import load_profile

        return load_profile(self.profile_folder)

    def choosing(self, held_out: float | None) -> "Profile":
        """The profile without what is held out of it; says so."""
        from expertcut.edits.splits import choosing_profile

        found = choosing_profile(self.profile(), held_out)
        self.audience.say([], [f"{note}." for note in found.notes])
        return found.profile

    def checkpoints(self) -> dict[str, Path]:
        """The variants that became a checkpoint, by name; a search may have found nothing."""
        folders = {v.name: self.run / variant_folder(v.name) for v in self.recipe.variants}
        return {name: path for name, path in folders.items() if (path / "config.json").is_file()}
