"""A command of the command line, made from the fields of its settings."""

import inspect
import re
import types
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from expertcut.commands import JUDGING, MODEL, OUTPUT
from expertcut.edits.edit_settings import CRITERIA_HERE
from expertcut.errors import SettingsError
from expertcut.settings import Settings, flag_of, option_details

_HIDDEN = "__also_"  # between a field and the number of its hidden spelling
_METAVARS = {bool: None, int: "N", float: "F", Path: "PATH"}
_LAST_PANELS = (JUDGING, MODEL, OUTPUT, "Options")


class PanelCommand(TyperCommand):
    """A command whose help groups its options in panels, and ends with examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then each panel's options, in the order of the fields."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                panel = getattr(param, "rich_help_panel", None) or "Options"
                if param.param_type_name == "argument":
                    panel, record = "Arguments", (record[0].partition(" <")[0], record[1])
                if CRITERIA_HERE in record[1]:  # criteria are loaded only to be shown
                    from expertcut.edits.criteria import CRITERIA

                    record = record[0], record[1].replace(CRITERIA_HERE, ", ".join(CRITERIA))
                panels.setdefault(panel, []).append(record)
        for name in (*(n for n in panels if n not in _LAST_PANELS), *_LAST_PANELS):
            if panels.get(name):
                with formatter.section(name):
                    formatter.write_dl(panels[name])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments without typer's braces."""
        pieces = super().collect_usage_pieces(ctx)
        return [piece.replace("{", "").replace("}...", "").replace("}", "") for piece in pieces]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples, a line each."""
        if self.epilog:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.epilog.splitlines()))


class PanelGroup(TyperGroup):
    """The root command, whose help groups the commands in panels."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each panel's commands with their whole sentences, in columns of one width."""
        width = max(map(len, self.commands))
        for panel, commands in groupby(
            self.commands.items(), lambda c: vars(c[1]).get("rich_help_panel")
        ):
            with formatter.section(panel or "Commands"):
                formatter.write_dl([(name.ljust(width), c.help or "") for name, c in commands])


def add_command(
    app: typer.Typer,
    name: str,
    settings: type[Settings],
    run: Callable[..., object],
    panel: str | None = None,
) -> None:
    """Adds a command that reads its settings and runs."""

    def call(**given: Any) -> None:
        run(settings.read(**values_of(settings, given)))

    parameters = list(_parameters(settings))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    examples = "\n".join(getattr(settings, "examples", ()))
    help_text = (settings.__doc__ or "").partition("\n\n")[0]
    names = {"help_option_names": ["-h", "--help"]}
    shown_as: dict[str, Any] = {"help": help_text, "epilog": examples, "rich_help_panel": panel}
    app.command(name, cls=PanelCommand, context_settings=names, **shown_as)(call)


def values_of(settings: type[Settings], given: dict[str, Any]) -> dict[str, Any]:
    """Values of the fields from those of the parameters."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or value == []:
            continue
        field = name.partition(_HIDDEN)[0]
        extra = option_details(settings, field)
        if extra["separator"] is not None:
            value = [part.strip() for part in value.split(extra["separator"])]
        elif isinstance(value, tuple):
            value = list(value)
        elif value is True and extra["flags"] and extra["flags"][0].startswith("--no-"):
            value = False
        if field in values and isinstance(value, list):
            value = [*values[field], *value]
        elif field in values and values[field] != value:
            raise SettingsError(f"{flag_of(settings, field)} is given twice, with two values")
        values[field] = value
    return values


def _parameters(settings: type[Settings]) -> Iterator[inspect.Parameter]:
    for name, field in settings.model_fields.items():
        extra, kind, choices = option_details(settings, name), *_kind(field)
        if extra["separator"] is not None:
            kind = str
        default: Any = inspect.Parameter.empty if field.is_required() else None
        usual = "|".join(choices) or _METAVARS.get(kind, "TEXT")
        metavar = extra["metavar"] or (name.upper() if extra["is_argument"] else usual)
        if " " in (metavar or "") and not extra["is_argument"]:  # two values, as `A B`
            kind = tuple[str, str]
        text, value = field.description or "", field.get_default()
        is_named = "[default" in text or field.is_required()
        if not is_named and not isinstance(value, bool | None | list | tuple):
            text = f"{text}  [default: {value}]"
        about: dict[str, Any] = {"help": text, "metavar": metavar, "show_default": False}
        about["autocompletion"] = _completion(name, field, choices)
        if extra["is_argument"]:
            yield _parameter(name, kind, default, typer.Argument(**about))
        else:
            flags = extra["flags"] or (flag_of(settings, name),)
            about["hidden"] = name in getattr(settings, "hidden", ())
            option = typer.Option(*flags, **about, rich_help_panel=extra["panel"])
            yield _parameter(name, kind, default, option)
        for number, flag in enumerate(extra["aliases"]):
            option = typer.Option(flag, hidden=True)
            yield _parameter(f"{name}{_HIDDEN}{number}", kind, None, option)


def _completion(
    name: str, field: FieldInfo, choices: tuple[str, ...]
) -> Callable[[str], list[str]] | None:
    """What the shell offers for a value; None leaves it to offer files."""
    if choices:
        return lambda incomplete: list(choices)
    if CRITERIA_HERE in (field.description or ""):
        return _complete_criteria
    return _COMPLETIONS.get(name)


def _complete_criteria(incomplete: str) -> list[str]:
    """Criteria after those that are typed already."""
    from expertcut.edits.criteria import CRITERIA

    *typed, _ = incomplete.split(",")
    return [",".join([*typed, name]) for name in CRITERIA if name not in typed]


def _folders_with(file: str, place: str) -> Callable[[str], list[str]]:
    """Folders of a place that hold a file, unless their name means something to a shell."""

    def complete(incomplete: str) -> list[str]:
        found = sorted(path.parent.as_posix() for path in Path(place).glob(f"*/{file}"))
        return [name for name in found if re.fullmatch(r"[\w./+-]+", name)]

    return complete


_COMPLETIONS = {"profile": _folders_with("profile.json", "profiles")} | dict.fromkeys(
    ("model", "models", "checkpoint"), _folders_with("config.json", "checkpoints")
)


def _parameter(name: str, kind: Any, default: Any, info: Any) -> inspect.Parameter:
    annotation: Any = Annotated[kind if default is not None else kind | None, info]
    where = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, where, default=default, annotation=annotation)


def _kind(field: FieldInfo) -> tuple[Any, tuple[str, ...]]:
    """The type of a parameter, and its allowed values if it lists them."""
    plain = _plain(field.annotation)
    if get_origin(plain) is Literal:
        return str, tuple(map(str, get_args(plain)))
    if get_origin(plain) in (list, tuple):
        item = _plain(get_args(plain)[0])
        choices = tuple(map(str, get_args(item))) if get_origin(item) is Literal else ()
        return list[str], choices
    return (plain if plain in _METAVARS else str), ()


def _plain(annotation: Any) -> Any:
    """A type without None and annotations."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation
