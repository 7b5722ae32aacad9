"""Profile, prune and reweight the experts of Mixture-of-Experts language models.

The functions below are those of `expertcut.api`, imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "dispatch",
    "evaluate",
    "heal",
    "load_profile",
    "load_trace",
    "place",
    "profile",
    "prune",
    "publish",
    "report",
    "trace",
]

if TYPE_CHECKING:
    from expertcut.api import (
        dispatch,
        evaluate,
        heal,
        load_profile,
        load_trace,
        place,
        profile,
        prune,
        publish,
        report,
        trace,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        from expertcut import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
