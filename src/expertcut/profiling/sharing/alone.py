"""One run at a time in a folder that several must not fill together."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from expertcut.errors import OutputError
from expertcut.profiling.sharing.claims import CLAIMS, Claims, Timing

_POLL_S = 0.25


@contextmanager
def alone(folder: Path, what: str, timing: Timing | None = None) -> Iterator[None]:
    """Keeps other runs out of a folder while the block lasts.

    One that was killed is in nobody's way: here that is seen at once, on another machine when its
    claim has not been touched for some seconds, which are waited for.

    Folders that it had to make and that are empty at the end are gone again.

    Raises:
        OutputError: another run is at work there, or the place cannot be written.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with _claimed(folder, what, timing):
            yield
    finally:
        with suppress(OSError):  # the first that holds something, and so those above it
            for place in made:
                place.rmdir()


@contextmanager
def _claimed(folder: Path, what: str, timing: Timing | None) -> Iterator[None]:
    with Claims(folder / CLAIMS, timing) as claims:
        patience_s = claims.timing.dead_after_s + 2 * claims.timing.beat_s
        end = time.monotonic() + patience_s
        while not claims.take(what):
            holder, is_here = claims.holder(what)
            if is_here or time.monotonic() > end:
                raise OutputError(
                    f"{folder}: another run is at work there ({holder}): wait until it has ended, "
                    "or name another --out"
                )
            time.sleep(_POLL_S)
        yield
