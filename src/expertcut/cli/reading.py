"""What options name: a quiz, a profile."""

from pathlib import Path
from typing import TYPE_CHECKING

from expertcut.cli.options import Truncate, value
from expertcut.errors import SettingsError

if TYPE_CHECKING:
    from expertcut.data import Quiz
    from expertcut.profiling.storage import Profile


def read_quiz(
    quiz: str,
    split: str,
    shots: int,
    subjects: str | None,
    limit: int | None,
    truncate: Truncate | None,
) -> "Quiz":
    """The quiz that the shared options name."""
    from expertcut.data import Selection, load_quiz

    names = tuple(name.strip() for name in subjects.split(",")) if subjects else ()
    return load_quiz(Selection(quiz, split, shots, names, limit, truncate=value(truncate)))


def read_choosing_profile(
    path: Path | None,
    threads: int | None,
    truncate: Truncate | None = None,
    held_out: float | None = None,
) -> "Profile":
    """The named profile, or the newest, without what is held out of it; says so.

    Raises:
        SettingsError: other threads than it was made with, or a share that cannot be held out.
    """
    from expertcut.edits.splits import choosing_profile

    found = choosing_profile(read_profile(path, threads, truncate), held_out)
    for note in found.notes:
        print(f"{note}.")
    return found.profile


def read_profile(
    path: Path | None, threads: int | None, truncate: Truncate | None = None
) -> "Profile":
    """The named profile, or the newest; `truncate` is for what else is asked.

    Raises:
        SettingsError: other threads than it was made with.
    """
    from expertcut.profiling.storage import load_profile, newest_profile

    cut = value(truncate)
    found = newest_profile(truncate=cut) if path is None else load_profile(path, cut)
    if threads not in (None, found.info.settings.threads):
        raise SettingsError(
            f"--threads {threads}: the profile was made with {found.info.settings.threads}, "
            "and what is compared with it must be too"
        )
    return found
