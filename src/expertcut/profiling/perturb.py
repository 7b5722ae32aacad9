"""A profile's questions asked again, slightly otherwise: do choices and answers hold?

Each perturbation is a profile of its own inside the first, `perturbed/<kind>/`, so it is resumed
and checked as every profile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from expertcut.data import shuffle_choices
from expertcut.errors import SettingsError
from expertcut.models.load import LoadOptions
from expertcut.profiling.evidence.perturbations import KINDS, Kind, perturbed_folder
from expertcut.profiling.measure import Measurement, MeasureOptions, measure
from expertcut.profiling.sharing.work import Progress
from expertcut.scoring.passes import OnPass, ignore


def check_kinds(measurement: Measurement, names: Sequence[str]) -> list[Kind]:
    """The perturbations that are named, each of which must change something.

    Raises:
        SettingsError: bf16 of a model that runs in bfloat16.
    """
    if "bf16" in names and measurement.info.settings.dtype == "bfloat16":
        raise SettingsError(
            "--perturb bf16 changes nothing: the model runs in bfloat16: profile with "
            "--dtype float32 or leave it out"
        )
    return [kind for kind in KINDS if kind in names]


def perturb(
    measurement: Measurement,
    kind: Kind,
    folder: Path,
    load_as: LoadOptions,
    on_pass: OnPass = ignore,
) -> Iterator[Progress]:
    """Measures what is missing of a perturbation of the profile in `folder`.

    Raises:
        ProfileError: an earlier perturbation there was made otherwise.
    """
    settings, limit = measurement.info.settings, measurement.info.quiz.limit
    options = MeasureOptions(
        "answer", settings.batch_tokens, settings.threads, waits=measurement.waits
    )
    if kind == "shuffle-choices":
        quiz = shuffle_choices(measurement.quiz)
        other = Measurement(measurement.moe, quiz, limit, options)
    else:
        source = measurement.moe.source
        other = measure(
            source, measurement.quiz, limit, replace(load_as, dtype="bfloat16"), options
        )
    yield from other.run(perturbed_folder(folder, kind), on_pass)
