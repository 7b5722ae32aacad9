"""Names with weights, as options and recipes have them. No torch here: recipes are read without."""

from dataclasses import dataclass

from expertcut.errors import SettingsError


@dataclass(frozen=True)
class Weighted:
    """A quiz or a text file, and how many rows of it are trained on compared with others.

    `revision` is that of a quiz of the hub, as in `quiz.sources.Selection`.
    """

    name: str
    weight: float = 1.0
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> "Weighted":
        """From `name` or `name=0.7`.

        Raises:
            SettingsError: a weight that is not above 0.
        """
        name, equals, weight = text.rpartition("=")
        if not equals or not _is_number(weight):  # a path may hold one of its own
            return cls(text)
        if not 0 < float(weight) < float("inf"):
            raise SettingsError(f"{text}: a weight must be above 0")
        return cls(name, float(weight))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
