"""A run folder's manifest while a recipe runs: what is there, what is begun, what is done."""

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from expertcut import __version__
from expertcut.errors import OutputError
from expertcut.recipe.record.inputs import Inputs
from expertcut.recipe.record.manifest import (
    RECIPE_FILE,
    Manifest,
    StageRecord,
    content_of,
    load_manifest,
    look,
    made_files,
    save_manifest,
)
from expertcut.recipe.stages import Stage

_LIBRARIES = ("torch", "transformers", "numpy")


class Ledger:
    """The records of a run folder's stages; `text` is the recipe, which lies beside them.

    Raises:
        OutputError: the folder's manifest cannot be read.
    """

    def __init__(self, folder: Path, text: bytes) -> None:
        self.folder, self.text = folder, text
        self.before = self._saved = load_manifest(folder)
        self.records = dict(self.before.stages) if self.before else {}

    def keep(self, stage: Stage) -> None:
        """A current stage; where its files were only touched, their new times are noted."""
        record = self.records[stage.name]
        if touched := look(self.folder, record).touched:
            files = {**record.files, **touched}
            self.records[stage.name] = record.model_copy(update={"files": files})

    def begin(self, stage: Stage, inputs: Mapping[str, Any]) -> None:
        """From now on what lies in the stage's place was begun with these inputs."""
        self.records[stage.name] = StageRecord(inputs=dict(inputs))

    def finish(self, stage: Stage, elapsed_s: float) -> str:
        """Notes what the stage made; returns the hash of its content."""
        files = made_files(self.folder, (*stage.makes, *stage.leaves), {})
        loaded = {name: version(name) for name in _LIBRARIES if name in sys.modules}
        output = content_of(files)
        self.records[stage.name] = StageRecord(
            inputs=self.records[stage.name].inputs,
            output=output,
            files=files,
            elapsed_s=round(elapsed_s, 3),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"expertcut": __version__, **loaded},
        )
        return output

    def check_unchanged(self) -> None:
        """That nobody else has written the manifest since this run read or wrote it.

        Raises:
            OutputError: another run has.
        """
        if load_manifest(self.folder) != self._saved:
            raise OutputError(
                f"{self.folder} was just changed by another run: run the same command again"
            )

    def is_saved(self, inputs: Inputs) -> bool:
        """Whether the manifest and the recipe's copy on disk say what is known."""
        return self._manifest(inputs) == self._saved and self._has_copy()

    def save(self, inputs: Inputs) -> None:
        """Writes the manifest and the recipe's copy, where they differ from what is there.

        Raises:
            OutputError: the place cannot be written.
        """
        if self.is_saved(inputs):
            return
        from expertcut.files import write_atomically  # with numpy, else not needed

        if not self._has_copy():
            write_atomically(self.folder / RECIPE_FILE, self.text)
        self._saved = self._manifest(inputs)
        save_manifest(self.folder, self._saved)

    def _has_copy(self) -> bool:
        copy = self.folder / RECIPE_FILE
        return copy.is_file() and copy.read_bytes() == self.text

    def _manifest(self, inputs: Inputs) -> Manifest:
        return Manifest(
            model=inputs.asked_model,
            commit=inputs.commit,
            inputs=dict(inputs.stamps.now),
            contents=dict(inputs.contents),
            stages=dict(self.records),
        )
