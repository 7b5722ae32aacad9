"""The page's section of what models write: pairs of outputs, marked where they diverge."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from os.path import commonprefix
from pathlib import Path

from pydantic import ValidationError

from expertcut.documents import first_fault
from expertcut.errors import OutputError
from expertcut.evaluation.generation import WrittenOutput, WrittenPrompt
from expertcut.evaluation.results import Results
from expertcut.files import read_file
from expertcut.reporting.eval_tables import model_names
from expertcut.reporting.page_sections import Folded, Pair, Part, Section, one_each
from expertcut.reporting.views import NamedDocument, Run

_EXAMPLES = 6  # of a comparison
_BEFORE, _AFTER, _PROMPT = 200, 600, 400  # characters that are shown


def generation_sections(run: Run) -> list[Section]:
    """One for each evaluation with outputs: a few pairs of each comparison."""
    written = [f for f in run.results if f.content.generation and f.content.comparisons]
    sections = one_each("Outputs", written, "outputs-", _pair_parts)
    return [replace(s, title="Outputs") for s in sections] if len(sections) == 1 else sections


def _pair_parts(document: NamedDocument[Results], _key: str) -> list[Part]:
    results = document.content
    assert results.generation is not None
    outputs, names = document.file.with_name(results.generation.outputs), model_names(results)
    try:
        written = load_written(outputs, names)
    except OutputError as error:
        return [f"No outputs are shown: {error}."]
    parts: list[Part] = []
    for c in results.comparisons:
        pairs = [(line.prompt, line.outputs[c.base], line.outputs[c.other]) for line in written]
        n_different = sum(other.first_divergence is not None for _, _, other in pairs)
        title = f"{names[c.other]} beside {names[c.base]}"
        if not n_different:
            parts.append(f"{title}: all {len(pairs):,} outputs are the same.")
            continue
        chosen = _chosen(pairs)
        note = (
            f"{len(chosen)} of the {n_different:,} outputs of {names[c.other]} that differ from "
            f"those of {names[c.base]}, marked from the first difference on. All are in "
            f"{outputs.name}."
        )
        examples = [_pair(*pairs[n], (names[c.base], names[c.other])) for n in chosen]
        parts += [note, Folded(title, examples)]
    return parts


def load_written(file: Path, names: Sequence[str]) -> list[WrittenPrompt]:
    """The outputs of these models, else an OutputError that says what is wrong."""
    try:
        lines = read_file(file, 1 << 30).splitlines()
        written = [WrittenPrompt.model_validate_json(line, strict=True) for line in lines]
    except OSError as error:
        raise OutputError(f"{file.name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else str(error)
        raise OutputError(f"{file.name} holds no outputs: {fault}") from None
    if any(len(line.outputs) != len(names) for line in written):
        raise OutputError(f"{file.name} is of another evaluation")
    return written


def _chosen(pairs: Sequence[tuple[str, WrittenOutput, WrittenOutput]]) -> list[int]:
    """Up to two of each new fault, then outputs over the range of first divergences."""
    differ = [n for n, (_, _, other) in enumerate(pairs) if other.first_divergence is not None]
    found = {
        fault: [n for n in differ if fault in _faults(*pairs[n][1:])][:2]
        for fault in ("loops", "is empty", "does not end")
    }
    chosen = list(dict.fromkeys(n for some in found.values() for n in some))
    by_place = sorted(differ, key=lambda n: pairs[n][2].first_divergence or 0)
    spread = [by_place[i * (len(by_place) - 1) // (_EXAMPLES - 1)] for i in range(_EXAMPLES)]
    return list(dict.fromkeys([*chosen, *spread]))[:_EXAMPLES]


def _faults(base: WrittenOutput, other: WrittenOutput) -> Iterator[str]:
    """The faults of an output that the base's has not."""
    if other.is_loop and not base.is_loop:
        yield "loops"
    if not other.text.strip() and base.text.strip():
        yield "is empty"
    if base.is_ended and not other.is_ended:
        yield "does not end"


def _pair(prompt: str, base: WrittenOutput, other: WrittenOutput, names: tuple[str, str]) -> Pair:
    n_equal = len(commonprefix([base.text, other.text]))  # noqa: RUF071 - of texts, not paths
    title = f"first difference after {other.first_divergence:,} tokens"
    if faults := ", ".join(_faults(base, other)):
        title += f"; {names[1]} {faults}"
    sides = []
    for name, output in zip(names, (base, other), strict=True):
        equal, rest = output.text[:n_equal], output.text[n_equal:]
        equal = equal if n_equal <= _BEFORE else f"…{equal[-_BEFORE:]}"
        rest = rest if len(rest) <= _AFTER else f"{rest[:_AFTER]}…"
        how = "ended" if output.is_ended else "cut off"
        how += ", loops" if output.is_loop else ""
        sides.append((f"{name}: {output.tokens:,} tokens, {how}", _lines(equal), _lines(rest)))
    shown = prompt if len(prompt) <= _PROMPT else f"…{prompt[-_PROMPT:]}"
    return Pair(title, _lines(shown), sides)


def _lines(text: str) -> list[str]:
    return text.expandtabs(4).split("\n")
