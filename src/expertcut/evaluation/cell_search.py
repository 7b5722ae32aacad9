"""What every sweep does: claims or resumes a folder, scores the unedited model, then cells."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from expertcut.checkpoints.size import size
from expertcut.documents import Record
from expertcut.evaluation.results import check_same, load_unfinished
from expertcut.evaluation.route_results import RouteSweep
from expertcut.evaluation.search_results import Audit, CompressionSweep, Sweep
from expertcut.evaluation.sweep_judges import Judge
from expertcut.profiling.measure import decided, is_writer
from expertcut.profiling.workers import Progress
from expertcut.scoring.engine import Engine
from expertcut.scoring.passes import OnPass

Document = TypeVar("Document", Sweep, RouteSweep, CompressionSweep)
Search = TypeVar("Search", Sweep, Audit, RouteSweep, CompressionSweep)
_NOUNS: dict[type[Record], str] = {
    RouteSweep: "sweep of routing rules",
    CompressionSweep: "sweep of sizes",
}


class Step(NamedTuple):
    """One form of the model: its name, and the run that scores the missing questions."""

    name: str
    run: Callable[[OnPass], Iterator[Progress]]


class CellSearch(Generic[Document]):
    """A search over forms of one loaded model; `sweep` is its document, with the finished cells.

    Only a process that waits for all answers saves cells.
    """

    file_name: str
    engine: Engine
    judge: Judge
    waits: bool
    sweep: Document

    def resume(self, folder: Path) -> bool:
        """Takes over the finished cells of an earlier run; whether there was one."""
        find = partial(load_earlier, folder / self.file_name, type(self.sweep), self.sweep.asked)
        earlier = decided(self.engine.moe, find)
        self.sweep = earlier or self.sweep
        return earlier is not None

    def base_step(self, folder: Path) -> Iterator[Step]:
        """The step of the unedited model, whose figures are then saved."""
        store = folder / "cells"
        yield Step("the unedited model", partial(self.judge.run, store, "base"))
        if self.waits:
            self.note(folder, self.judge.base(store, size(self.engine.moe)))

    def note(self, folder: Path, figures: dict[str, Any]) -> None:
        """Saves further fields of the document."""
        self.sweep = self.sweep.model_copy(update=figures)
        if is_writer(self.engine.moe):
            self.sweep.save(folder / self.file_name)


def load_earlier(file: Path, kind: type[Search], request: Record) -> Search | None:
    """The search of an earlier run of this request, None in a new or empty folder."""
    earlier = load_unfinished(file, kind)
    if earlier is not None:
        noun = _NOUNS.get(kind, kind.__name__.lower())
        check_same(file.parent, earlier.asked, request, noun)
    return earlier
