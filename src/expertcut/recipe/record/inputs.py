"""What a stage is made from, and why it has to be made again."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expertcut.recipe.model import Recipe
from expertcut.recipe.record.hashes import (
    Stamps,
    adapter_content,
    model_content,
    pinned,
    quiz_content,
    quiz_files,
    sha256_of,
)
from expertcut.recipe.record.manifest import Manifest, StageRecord, look
from expertcut.recipe.stages import Asking, Stage

_MOST_CHANGES = 3


class Inputs:
    """Content hashes of all that the stages of a recipe read, each looked up once.

    `commit` is that of a hub model: the pinned one, else the one that an earlier run found, else
    None until `found_commit` says what it is.
    """

    def __init__(self, recipe: Recipe, before: Manifest | None, *, is_anew: bool) -> None:
        self.recipe = recipe
        self.stamps = Stamps(before.inputs if before else {})
        self.contents: dict[str, str] = {}
        self._contents_before = before.contents if before else {}
        is_same = before is not None and before.model == self.asked_model and not is_anew
        self.commit = pinned(recipe.revision) or (before.commit if before and is_same else None)
        self._model: str | None = None

    @property
    def asked_model(self) -> str:
        """The model as the recipe names it."""
        return f"{self.recipe.model}@{self.recipe.revision or 'main'}"

    def of(self, stage: Stage, outputs: Mapping[str, str | None]) -> dict[str, Any]:
        """A stage's inputs by name; None for what is not made or not known yet.

        Raises:
            ModelError: the model's folder holds none.
            QuizError: questions that the stage needs cannot be read.
            RecipeError: a file cannot be read.
        """
        found: dict[str, Any] = {"settings": dict(stage.settings)}
        if stage.reads_model:
            found["model"] = self.model()
        if stage.adapter is not None:
            found["adapter"] = adapter_content(Path(stage.adapter), self.stamps)
        for asking in stage.asks:
            found[f"quiz {asking.split}"] = self._quiz(asking)
        for name in stage.reads:
            files = quiz_files(name)  # what is on the hub is its name
            found[f"data {name}"] = sha256_of(name if files is None else self.stamps.of(files))
        return {**found, **{f"stage {name}": outputs.get(name) for name in stage.after}}

    def model(self) -> str | None:
        """What the model is, by its content or its commit."""
        if self._model is None:
            recipe = self.recipe
            self._model = model_content(
                recipe.model, self.commit, self.stamps, has_code=recipe.trust_remote_code
            )
        return self._model

    def _quiz(self, asking: Asking) -> str:
        """Questions are read again only where some file of the quiz holds something else."""
        selection = asking.selection(self.recipe)
        files = quiz_files(selection.quiz)
        held = self.stamps.of(files) if files is not None else {}
        key = sha256_of([held, vars(selection)])
        if key not in self.contents:
            known = self._contents_before.get(key)
            self.contents[key] = known or quiz_content(selection, is_needed=asking.is_needed)
        return self.contents[key]


def reason(run: Path, stage: Stage, record: StageRecord | None, inputs: Mapping[str, Any]) -> str:
    """Why a stage has to run, in words; empty where what it made is there and current."""
    if record is None:
        return "it never ran"
    pending = [n for n, v in inputs.items() if n.startswith("stage ") and v is None]
    if pending:
        return f"{pending[0].removeprefix('stage ')} runs before it"
    if changes := list(_changes(stage, record.inputs, inputs)):
        more = len(changes) - _MOST_CHANGES
        return "; ".join(changes[:_MOST_CHANGES]) + (f"; and {more} more" if more > 0 else "")
    if record.output is None:
        return "it was begun and not finished"
    return look(run, record).fault or ""


def _changes(stage: Stage, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, value in now.items():
        was = before.get(name)
        if value == was:
            continue
        kind, _, which = name.partition(" ")
        if kind == "settings":
            yield from _changed_settings(was or {}, value)
        elif kind == "stage":
            yield f"{which} made something else" if was else f"{which} is new"
        else:
            named = {"quiz": f"split {which} of the quiz", "data": which}
            what = named.get(kind, f"the {kind}")
            yield f"{what} changed" if was else f"{what} is new"
    yield from (f"{name} is no longer read" for name in before if name not in now)


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in dict.fromkeys([*new, *old]):
        if old.get(key) != new.get(key):
            yield f"{key} is {_short(new.get(key))}, was {_short(old.get(key))}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    return "unset" if value is None else ascii(value)[:60]
