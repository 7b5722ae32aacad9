"""What is known of how a checkpoint does: evaluations of these very weights, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult

from expertcut.errors import SettingsError
from expertcut.evaluation.results import ModelResult, Results, load_results
from expertcut.publishing.card.markup import printable
from expertcut.publishing.verify import Checkpoint

RESULTS_FILE = "results.json"
_SOURCE_NAME = "expertcut eval"


@dataclass(frozen=True)
class Evaluated:
    """One evaluation, of its base and of the checkpoint alone; `file` is its name on the Hub.

    What was a path on this machine is only a name in it.
    """

    file: str
    results: Results

    @property
    def model(self) -> ModelResult:
        """The checkpoint's own result."""
        return self.results.models[-1]


def evaluations(checkpoint: Checkpoint, named: Sequence[Path]) -> tuple[Evaluated, ...]:
    """From the files that were named, else from `results.json` in the folder or beside it.

    Raises:
        OutputError: no results in a named file.
        SettingsError: a named file holds no results of these weights.
    """
    folder = checkpoint.folder
    beside = [f for f in (folder / RESULTS_FILE, folder.resolve().parent / RESULTS_FILE)]
    found: list[Results] = []
    for file in named or [file for file in beside if file.is_file()]:
        results = load_results(file)
        own = of_model(results, checkpoint.source.fingerprint)
        if own is not None and own not in found:
            found.append(own)
        elif own is None and named:
            raise SettingsError(
                f"{file} holds no results of {folder}, whose weights it tells by their hash: "
                "evaluate it again with `expertcut eval`"
            )
    return tuple(
        Evaluated(RESULTS_FILE if i == 1 else f"results-{i}.json", results)
        for i, results in enumerate(found, start=1)
    )


def of_model(results: Results, fingerprint: str) -> Results | None:
    """The base and the model with these weights, and their comparison; None without that model."""
    places = [i for i, m in enumerate(results.models) if m.fingerprint == fingerprint]
    if not places:
        return None
    place = places[-1]
    compared = [c for c in results.comparisons if c.other == place]
    kept = [compared[0].base, place] if compared else [place]
    return results.model_copy(
        update={
            "quiz": public_name(results.quiz, results.revision),
            "models": [_public(results.models[i]) for i in kept],
            "comparisons": [c.model_copy(update={"base": 0, "other": 1}) for c in compared[:1]],
        }
    )


def public_name(id: str, revision: str | None) -> str:
    """An id of the Hub, or the last part of a path: where it lies here concerns nobody."""
    name = id if revision is not None else Path(id).resolve().name
    return printable(name) or "unnamed"


def _public(model: ModelResult) -> ModelResult:
    return model.model_copy(update={"path": public_name(model.path, model.revision)})


def eval_results(evaluated: Sequence[Evaluated], place: str) -> list[EvalResult]:
    """For the card's `model-index`; `place` is the address under which files are shown."""
    return [
        EvalResult(
            task_type="multiple-choice",
            task_name="Multiple choice",
            dataset_type=one.results.quiz,
            dataset_name=one.results.quiz,
            dataset_split=printable(one.results.split),
            dataset_revision=one.results.revision,
            dataset_args={"num_few_shot": one.results.shots},
            metric_type="accuracy",
            metric_name=f"accuracy ({one.results.shots} shots, {one.model.questions} questions)",
            metric_value=round(one.model.accuracy, 6),
            source_name=_SOURCE_NAME,
            source_url=f"{place}/{one.file}",
        )
        for one in evaluated
    ]
