"""A profile's questions asked again, slightly otherwise: do choices and answers hold?

Each perturbation is a profile of its own inside the first, `perturbed/<kind>/`, so it is resumed
and checked as every profile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from expertcut.errors import SettingsError
from expertcut.moe.engine import OnPass, ignore
from expertcut.moe.loading import LoadOptions
from expertcut.profiling.measure import Measurement, MeasureOptions, measure
from expertcut.profiling.sharing.work import Progress
from expertcut.profiling.store import Profile, load_profile
from expertcut.quiz import shuffle_choices

Kind = Literal["shuffle-choices", "bf16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_FOLDER = "perturbed"


def perturbed_folder(folder: Path, kind: Kind) -> Path:
    """Where a perturbation of a profile lies."""
    return folder / _FOLDER / kind


def perturbed_profiles(profile: Profile) -> dict[Kind, Profile]:
    """The finished perturbations of a profile, by kind."""
    folders = {kind: perturbed_folder(profile.path, kind) for kind in KINDS}
    found = {k: load_profile(f) for k, f in folders.items() if (f / "profile.json").is_file()}
    return {kind: other for kind, other in found.items() if other.finished_at is not None}


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
