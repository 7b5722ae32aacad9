"""Values of a recipe that can be told wrong before anything runs."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

# Those of interventions.criteria, which would bring scipy along; a test holds them together.
CRITERIA = (
    "activations",
    "gate_mass",
    "weighted_accuracy",
    "output_norm",
    "output_norm_mean",
    "reap",
    "easy_ep",
    "easy_ep_postnorm",
    "ranked_choice",
    "aimer",
    "reconstruction",
    "random",
)
_PATH = re.compile(r"[/~.].*|.*\.(jsonl|csv)")


def _as_text(value: Any) -> Any:
    """An expert that YAML took for a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_list(value: Any) -> Any:
    """One value where several may stand."""
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def _like(pattern: str, should: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            _refuse(f"{text[:100]!a} {should}")
        return text

    return check


def _known(name: str) -> str:
    if name not in CRITERIA:
        near = get_close_matches(name, CRITERIA, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"take one of {', '.join(CRITERIA)}"
        _refuse(f"{name[:60]!a} is no criterion: {hint}")
    return name


def _there(text: str) -> str:
    """A path is there; anything else may be an id of the hub."""
    if _PATH.fullmatch(text) and not Path(text).expanduser().exists():
        _refuse(f"{text[:200]!a} is not there: give an existing path, or an id of the hub")
    return text


def _below(text: str) -> str:
    """A folder that a stranger's recipe may have written to."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or "\0" in text or text.startswith("~"):
        _refuse(f"{text[:200]!a} lies outside this folder: a recipe writes below where you stand")
    return text


def _adapter(text: str) -> str:
    """A folder of this machine that peft wrote."""
    if not (Path(text) / "adapter_config.json").is_file():
        _refuse(f"{text[:200]!a} holds no adapter: give a folder with adapter_config.json")
    return text


def _refuse(text: str) -> None:
    raise PydanticCustomError("value", "{text}", {"text": text})


Text = Annotated[str, BeforeValidator(_as_text)]
Texts = Annotated[list[Text], BeforeValidator(_as_list)]
_Expert = Annotated[
    Text,
    AfterValidator(
        _like(
            r"\s*(\d{1,9}:)?\d{1,9}(=[+-]?[\d.]+([eE][+-]?\d+)?)?\s*",
            "is no expert: write 12, 3:12 or 3:12=0.25",
        )
    ),
]
Experts = Annotated[list[_Expert], BeforeValidator(_as_list), Field(min_length=1)]
Criterion = Annotated[str, AfterValidator(_known)]
Source = Annotated[str, AfterValidator(_there)]
Folder = Annotated[str, AfterValidator(_below)]
AdapterFolder = Annotated[str, AfterValidator(_adapter)]
DtypeName = Annotated[
    str,
    AfterValidator(_like(r"auto|stored|b?float\d+\w*", "is no dtype: take auto or float32")),
]
Repository = Annotated[
    str,
    AfterValidator(
        _like(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", "is no repository: write OWNER/NAME, as on the Hub")
    ),
]
