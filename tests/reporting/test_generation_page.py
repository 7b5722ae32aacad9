"""Pairs of outputs on the page: marked where they diverge, and never markup."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from expertcut.errors import OutputError
from expertcut.evaluation.generation import Generated, GenerationInfo, Output, outputs_bytes
from expertcut.evaluation.generation_run import judge
from expertcut.reporting.generation_page import generation_sections, load_written
from expertcut.reporting.page import write
from expertcut.reporting.page_sections import Folded, Pair
from expertcut.reporting.views import gather
from tests.support.pages import HOSTILE, make_results


def generated(texts: Sequence[str], *, is_ended: bool = True) -> Generated:
    outputs = tuple(Output(tuple(text.encode()), text, is_ended) for text in texts)
    return Generated(outputs, lambda text: tuple(text.encode()), "bytes")


def evaluation(folder: Path, base: Sequence[str], other: Sequence[str]) -> Path:
    """Results of a quiz and of prompts, with the outputs beside them."""
    found = [generated(base), generated(other)]
    content = outputs_bytes(HOSTILE[: len(base)], ("models/base", "models/cut"), found)
    (folder / "generations.jsonl").write_bytes(content)
    info = GenerationInfo(
        prompts="prompts.jsonl",
        prompts_sha256="0" * 64,
        max_new_tokens=100,
        temperature=0.0,
        seed=None,
        outputs="generations.jsonl",
    )
    file = folder / "results.json"
    make_results(file).with_part(judge(found, info)).save(file)
    return file


def pairs(file: Path) -> list[Pair]:
    (section,) = generation_sections(gather(file))
    (folded,) = (part for part in section.parts if isinstance(part, Folded))
    return [part for part in folded.parts if isinstance(part, Pair)]


def test_a_pair_is_split_where_it_first_differs(tmp_path: Path) -> None:
    file = evaluation(tmp_path, ["one\ntwo three", "same"], ["one\ntwo four", "same"])
    (pair,) = pairs(file)  # the equal outputs are no example
    (_, equal, rest), (_, other_equal, other_rest) = pair.sides
    assert [*equal] == [*other_equal] == ["one", "two "]
    assert ([*rest], [*other_rest]) == (["three"], ["four"])
    assert "after 8 tokens" in pair.title


def test_an_output_that_loops_is_shown_before_others(tmp_path: Path) -> None:
    plain = [f"answer {n}" for n in range(9)]
    other = [text.upper() for text in plain]
    other[7] = "x" * 80
    assert "cut loops" in pairs(evaluation(tmp_path, plain, other))[0].title


def test_outputs_are_text_whatever_is_in_them(tmp_path: Path) -> None:
    base, other = [f"a{text}" for text in HOSTILE], [f"b{text}" for text in HOSTILE]
    page = write(evaluation(tmp_path, base, other)).read_text()
    assert page.count("<mark>") == 12
    assert "b&lt;script&gt;" in page
    for text in HOSTILE[:3]:
        assert text not in page
    assert not any(char in page for char in "\x1b\x07\u202e")


def test_a_page_without_its_outputs_says_so(tmp_path: Path) -> None:
    file = evaluation(tmp_path, ["a"], ["b"])
    outputs = tmp_path / "generations.jsonl"
    line = outputs.read_bytes()
    for content, said in (
        (None, "cannot be read"),
        (b"{}\n", "holds no outputs"),
        (line.replace(b'{"model":"models/cut"', b'{"model":1'), "holds no outputs"),
    ):
        outputs.unlink(missing_ok=True)
        if content is not None:
            outputs.write_bytes(content)
        (section,) = generation_sections(gather(file))
        assert said in str(section.parts[0])
    outputs.write_bytes(line)
    with pytest.raises(OutputError, match="of another evaluation"):
        load_written(outputs, ("base",))
