"""In a terminal of any width nothing is lost: tables or lists, wrapped sentences, other letters."""

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from expertcut.cli import COMMANDS
from expertcut.cli.progress import LastingStream, TerminalUI
from expertcut.commands.show import ShowSettings
from expertcut.commands.show import run as show
from expertcut.errors import OutputError
from expertcut.profiling.findings import find
from expertcut.profiling.storage import Profile
from expertcut.recipes.recipe_schema import read_recipe
from expertcut.recipes.stages import stages_of
from expertcut.reporting.eval_tables import result_facts, results_table
from expertcut.reporting.profile_tables import headline, profile_tables
from expertcut.reporting.tables import Column, Table, as_rich, labelled, next_lines, wrapped
from expertcut.reporting.views import find_shown, stage_names
from tests.reporting.test_reporting import comparison, model, results
from tests.support.hand_made import block, profile_info, random_profile

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SENTENCES = (
    labelled("accuracy", "75.8 %, was 80.9 % on 256 held-out questions (test): −5.1 points, worse"),
    "half loses accuracy: -5.16 points (105 gained, 247 lost), chosen on none of the questions.",
    *next_lines(["eval", "my model", "checkpoints/half", "--quiz", "a/quiz"], ["show", "half"]),
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """48 layers of 128 experts."""
    info = profile_info([block(i, 128, 8) for i in range(48)], {"birds": 4})
    return random_profile(tmp_path_factory.mktemp("large") / "p", info)


def printed(table: Table, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(as_rich(table, width))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def words_of(lines: list[str]) -> set[str]:
    return set(re.sub(r"[━─┏┓┡┩└┘┳╇┴┃│]", " ", "\n".join(lines)).split())


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_table_is_wider_than_the_terminal_or_breaks_a_word(width: int, large: Profile) -> None:
    scored = results_table(results(model("models/half-of-experts", 55), comparison()))
    long = Table("t", (Column("word"), Column("n", ",d")), [["a" * 300, 1234567], ["b", 2]])
    few = [replace(table, rows=table.rows[:3]) for table in profile_tables(large)]
    for table in (scored, *few, long):
        lines = printed(table, width)
        assert max(map(len, lines)) <= width
        cells = [column.name for column in table.columns if table is not long]
        cells += [cell for row in table.texts() for cell in row if len(cell) < 300]
        assert {word for cell in cells for word in cell.split()} <= words_of(lines)
        assert all(cell in "\n".join(lines) for cell in cells if cell.endswith("MB"))  # one line
        assert "".join(lines).count("a") >= (300 if table is long else 0)
    assert ("┃" in "".join(printed(scored.narrow(unless=False), width))) == (width >= 80)
    assert ("┃" in "".join(printed(scored, width))) == (width > 160)
    assert "verdict             undecided" in printed(scored, 60)  # a name and its value


@pytest.mark.parametrize("width", [30, 40, 80])
def test_sentences_wrap_at_words_and_commands_as_a_shell_reads_them(width: int) -> None:
    for sentence in SENTENCES:
        lines = wrapped(sentence, width).split("\n")
        assert max(map(len, lines)) <= width and len(lines) >= (2 if width < len(sentence) else 1)
        whole = " ".join(" ".join(line.removesuffix("\\") for line in lines).split())
        assert whole == " ".join(sentence.split())
        if "expertcut" in sentence:
            told = shlex.split(wrapped(sentence, width).removeprefix("next").replace("\\\n", ""))
            assert told == shlex.split(sentence.removeprefix("next"))
    (first, *others) = wrapped(SENTENCES[0], 40).split("\n")
    assert first.startswith("accuracy  75.8 %") and {line[:10] for line in others} == {" " * 10}
    assert wrapped("\n[eval] runs\n", 40) == "\n[eval] runs\n"


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("screen", "longest"), [(Screen(), 40), (io.StringIO(), 92)])
def test_a_terminal_has_its_width_and_a_pipe_whole_sentences(
    screen: io.StringIO, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", screen)
    TerminalUI().say([Table("Title", (Column("a"),), [["b"]])], SENTENCES[1:2])
    text = re.sub(r"\x1b\[\d*m", "", screen.getvalue())  # bold
    assert text.startswith("Title") and "┃ a ┃" in text
    assert max(map(len, text.splitlines())) in range(longest - 9, longest + 1)


def test_what_an_encoding_lacks_is_spelt_in_other_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr("sys.stdout", stream)
    table = Table("Δ", (Column("x"), Column("y")), [["1 … 2", "z"], ["−3", "ß"]])
    TerminalUI().say([table], ["−5.1 points (−9.6 … −0.9) |Δ log p|"])
    stream.flush()
    title, *lines, _, sentence = written.getvalue().decode("ascii").splitlines()
    assert title.strip() == "delta" and sentence == "-5.1 points (-9.6 ... -0.9) |delta log p|"
    assert "| 1 ... 2 | z |" in lines and "| -3      | ? |" in lines
    assert len({len(line) for line in lines if line}) == 1  # columns stand below each other


# What `show` begins with


def test_a_profile_begins_with_the_same_few_lines_on_any_model(large: Profile) -> None:
    lines = headline(find(large, permutations=20))
    text = "\n".join(lines[:-2])  # without the commands
    assert 8 < len(text.splitlines()) <= 18 and max(map(len, text.splitlines())) <= 80
    by_label = {
        label: " ".join(rest.split()) for label, rest in (x.split(maxsplit=1) for x in lines)
    }
    n_answer = sum(len(np.unique(chosen)) for chosen in large.array("chosen_NLK").swapaxes(0, 1))
    n_any = int((large.token_sum("tokens") > 0).sum())
    assert by_label["experts"].startswith(f"{n_answer:,} of 6,144 ever answer, {n_any:,} are")
    assert f"{100 * large.answers.accuracy:.1f} %" in by_label["accuracy"]
    sums_LE = np.stack([layer.over_tokens.weighted_norm_E for layer in large.layers])
    share_LE = sums_LE / sums_LE.sum(axis=1, keepdims=True)
    layer, expert = np.unravel_index(share_LE.argmax(), share_LE.shape)
    assert by_label["most"].startswith(f"{layer}:{expert} {100 * share_LE.max():.2g} %, ")
    flat_L = [layer.entropy_all_N.mean() / np.log(128) for layer in large.layers]
    assert by_label["gate"].startswith(f"{100 * min(flat_L):.1f} % (layer {np.argmin(flat_L)}) to")
    named = {name: settings for _, name, settings, _ in COMMANDS}
    for line in lines[-2:]:
        _, command, *words = shlex.split(line.removeprefix("next"))
        assert command in ("prune", "show") and str(large.path) in words
        assert all(
            w[2:].replace("-", "_") in named[command].model_fields for w in words if w[:2] == "--"
        )


def test_its_tables_are_printed_where_they_are_asked_for(
    large: Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for name, options in {"": {}, "tables": {"tables": True}, "md": {"format": "md"}}.items():
        show(ShowSettings(path=large.path, **options), TerminalUI())
        said[name] = capsys.readouterr().out
    assert "Tables 1–2" not in said[""] and len(said[""].splitlines()) <= 20
    assert said["tables"].startswith(said[""]) and "Tables 1–2" in said["tables"]
    assert said["md"].startswith("### Tables 1–2") and "profile   " not in said["md"]


def test_results_are_shown_with_the_sentences_of_eval(tmp_path: Path) -> None:
    found = results(model("models/cut", 55), comparison())
    found.save(tmp_path / "results.json")
    shown = find_shown(tmp_path / "results.json").sentences()
    assert shown == [labelled(*fact) for fact in result_facts(found)] and len(shown) == 2
    assert shown[0].startswith("verdict   cut: undecided at a margin of 1 point: could be 1.0 poi")
    # One whose interval does not lie above guessing is named, and one alone has its interval.
    chance = {"chance": 0.45}
    both = result_facts(found.model_copy(update=chance))
    text = "50.0 % (40.4 % … 59.6 %), no better than guessing (45 %)"
    assert both == [("accuracy", f"base: {text}"), *result_facts(found)]
    (alone,) = result_facts(found.model_copy(update={"comparisons": [], "models": [model()]}))
    assert alone == ("accuracy", "base: 50.0 % (40.4 % … 59.6 %)")


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The folder of a run that was stopped in its second variant."""
    (tmp_path / "recipe.yaml").write_text(
        "model: m\nshow:\nvariants:\n  - {name: half, prune: {keep: 2}}\n"
        "  - {name: tilted, reweight: {boost: ['1']}}\neval:\nreport:\npublish:\n"
        "  - {variant: half, repo: a/b}\n"
    )
    names = {"profile": ["profile/profile.json"], "show": ["show/a.md", "show/b.csv"]}
    names["half"] = ["variants/half/config.json", "variants/half/plan.json"]
    for name in (name for own in names.values() for name in own):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    stages = {
        name: {"inputs": {}, "output": "1", "files": dict.fromkeys(own), "elapsed_s": 1.25}
        for name, own in names.items()
    }
    stages["tilted"] = {"inputs": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "stages": stages}))
    return tmp_path


def test_a_run_is_shown_with_the_state_of_its_stages(ran: Path) -> None:
    (ran / "show/b.csv").unlink()
    found = results(model("models/cut", 55), comparison())
    found.save(ran / "results.json")
    for path in (ran, ran / "manifest.json"):
        shown = find_shown(path)
        stages, evaluated = shown.tables()
        assert stages.texts() == [
            ["profile", "done", "1.2", "profile"],
            ["show", "show/b.csv is gone", "1.2", "show (2 files)"],
            ["half", "done", "1.2", "variants/half (2 files)"],
            ["tilted", "not finished", "–", "–"],
            *[[name, "not run yet", "–", "–"] for name in ("eval", "report", "publish half")],
        ]
        assert evaluated == results_table(found)
        *verdicts, again = shown.sentences()
        assert verdicts == find_shown(ran / "results.json").sentences()
        assert again.split()[1:] == ["expertcut", "run", f"{ran}/recipe.yaml", "--out", f"{ran}"]
        assert set(shown.json()["stages"]) == {"profile", "show", "half", "tilted"}
    (ran / "manifest.json").write_text("[]")
    with pytest.raises(OutputError, match=r"manifest\.json is not a manifest: name "):
        find_shown(ran)


def test_the_stages_of_a_run_are_those_of_its_recipe(tmp_path: Path) -> None:
    assert len(RECIPES) > 2
    for recipe in RECIPES:
        (tmp_path / "recipe.yaml").write_bytes(recipe.read_bytes())
        assert stage_names(tmp_path) == [stage.name for stage in stages_of(read_recipe(recipe))]
    whole = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(f"{whole}\ndispatch: {{}}\n")
    assert {"eval", "report"} <= {*stage_names(tmp_path)}
    assert stage_names(tmp_path)[stage_names(tmp_path).index("eval") + 1] == "dispatch"
    deep = "a: &a [x, x]\nb: &b [*a, *a]\nvariants: [{name: *b}]"
    for text in ("", "[1]", "a: [", "variants: 3", "variants: [{prune: }]", deep, "[" * 5000):
        (tmp_path / "recipe.yaml").write_text(text)
        assert stage_names(tmp_path) == []
