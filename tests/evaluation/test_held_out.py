"""What is called held out had no part in anything: told by hashes, whatever form a quiz has."""

import csv
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertcut.data import Question, Selection, load_quiz
from expertcut.data.questions import Quiz
from expertcut.edits.plan import BlockEdit, EditPlan, load_hashes, load_plan, save_plan
from expertcut.edits.splits import (
    UNUSED,
    choosing_profile,
    draft_plan,
    questions_for,
    read_scored_split,
    scored_split,
    used_hashes,
)
from expertcut.errors import QuizError
from expertcut.healing.data import read_data
from expertcut.healing.heal_settings import HealSettings
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.schema import quiz_info
from expertcut.profiling.storage import Profile, ProfilePart, largest_values, load_profile
from expertcut.reporting.page_sections import _plan_parts
from expertcut.reporting.tables import Table
from expertcut.reporting.views import gather
from expertcut.stats import HeldOutResult, LogprobShift
from tests.conftest import Commands, make_tokenizer, open_model
from tests.support.hand_made import block, profile_info

CHANGES: dict[str, Callable[[str], str]] = {
    "nothing": lambda text: text,
    "a doubled space": lambda text: text.replace(" ", "  ", 1),
    "a space at the end": lambda text: f"{text} ",
    "a space that does not break": lambda text: text.replace(" ", "\u00a0", 1),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "a byte order mark": lambda text: f"\ufeff{text}",
    "a zero-width space": lambda text: f"{text[:3]}\u200b{text[3:]}",
    "a line end": lambda text: text.replace(" ", "\r\n", 1),
}
Row = tuple[str, list[str], int]


def row_of(number: int, change: str = "nothing", is_turned: bool = False) -> Row:
    """A question of its own for each number, in a form that may differ trivially."""
    how = CHANGES[change]
    choices = [how(f"caf\u00e9 {word} {number}") for word in ("one", "two", "three", "four")]
    answer = number % 4
    if is_turned:
        choices, answer = choices[::-1], 3 - answer
    return how(f"No. {number}: which na\u00efve word?"), choices, answer


def number_of(question: Question) -> int:
    digits = "".join(c for c in question.text.split(":")[0] if c.isdigit())
    return int(digits)


def numbers_in(quiz: Quiz) -> set[int]:
    return set(map(number_of, quiz))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_question_is_known_after_trivial_changes(change: str, is_turned: bool) -> None:
    def question(row: Row) -> Question:
        return Question("s", row[0], tuple(row[1]), row[2], 0)

    same, changed = question(row_of(1)), question(row_of(1, change, is_turned))
    assert same.overlap_hash == changed.overlap_hash
    assert (same.content_hash == changed.content_hash) == (same.choices == changed.choices)
    others = [row_of(2), (row_of(1)[0], row_of(2)[1], 0), (row_of(2)[0], row_of(1)[1], 1)]
    assert same.overlap_hash not in {question(row).overlap_hash for row in others}
    assert changed.is_among({same.overlap_hash}) and same.is_among({same.content_hash})


# Any form of a quiz


@dataclass(frozen=True)
class Form:
    """A quiz on disk: rows by split, in one file, JSON lines by split or CSV by split."""

    kind: str
    rows: dict[str, list[Row]]

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        if self.kind == "file":
            rows = [row for own in self.rows.values() for row in own]
            return _write_lines(folder / "quiz.jsonl", rows)
        for split, rows in self.rows.items():
            if self.kind == "lines":
                _write_lines(folder / f"{split}.jsonl", rows)
            else:
                (folder / split).mkdir()
                with (folder / split / f"s_{split}.csv").open("w", newline="") as file:
                    letters = [[text, *choices, "ABCD"[at]] for text, choices, at in rows]
                    csv.writer(file).writerows(letters)
        return folder


def _write_lines(file: Path, rows: Sequence[Row]) -> Path:
    names = ("question", "choices", "answer")
    file.write_text("".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows))
    return file


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """Splits of few or many questions, some of which repeat others, changed trivially."""
    splits = draw(st.sets(st.sampled_from(["val", "test", "dev", "train"]), min_size=1))
    number, rows = 0, dict[str, list[Row]]()
    for split in sorted(splits):
        own = range(number, number := number + draw(st.sampled_from([60, 40, 6, 1])))
        rows[split] = [row_of(i) for i in own]
    for _ in range(draw(st.integers(0, 4))):
        split = draw(st.sampled_from(sorted(splits)))
        copied = draw(st.integers(0, number - 1))
        change = draw(st.sampled_from(sorted(CHANGES)))
        rows[split].append(row_of(copied, change, draw(st.booleans())))
    return Form(draw(st.sampled_from(["file", "lines", "csv"])), rows)


def profile_of(quiz: Path, split: str) -> Profile:
    """A profile's description, without anything measured."""
    info = profile_info([block(0)], {"x": 1})
    settings = info.settings.model_copy(update={"stats": "answer"})
    asked = quiz_info(load_quiz(Selection(str(quiz), split, 0)), None)
    return Profile(Path("p"), info.model_copy(update={"quiz": asked, "settings": settings}))


def drafts(way: str, used: frozenset[str]) -> EditPlan:
    """What `prune`, `prune` with a calibration, `merge`, `reweight` and its search draft."""
    kinds: dict[str, dict[str, object]] = {
        "prune": {},
        "calibrate": {"is_calibrated": True},
        "boost": {},
        "tune": {"is_tuned": True},
    }
    bias = {0: 0.5} if way in ("boost", "tune") else {}
    edits = {block(0).name: BlockEdit(keep=(0, 1), bias=bias)}
    return EditPlan("s", "prune", "activations", "answer", edits, used=used, **kinds[way])  # type: ignore[arg-type]


@given(
    form=forms(),
    way=st.sampled_from(["prune", "calibrate", "boost", "tune"]),
    held_out=st.sampled_from([None, None, 0.0]),
    before=st.sampled_from(["nothing", "some, by both hashes", "some, by one", "all"]),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_no_question_that_was_used_is_called_held_out(
    form: Form, way: str, held_out: float | None, before: str, data: st.DataObject
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        quiz = form.write(folder / "quiz")
        split = data.draw(st.sampled_from(sorted(form.rows)))
        split = "val" if form.kind == "file" else split
        profile = profile_of(quiz, split)
        # What an earlier step looked at, in the forms of older and newer lists.
        earlier = {n: Question("s", *_asked(row_of(n)), 0) for n in range(200)}
        some = {n for n in earlier if before == "all" or (before != "nothing" and n % 3 == 0)}
        lines = {earlier[n].content_hash if "one" in before else earlier[n].hash_line for n in some}
        draft = drafts(way, frozenset(lines))
        try:
            choosing, _ = choosing_profile(profile, held_out)
            questions = questions_for(choosing, is_fitting=draft.asks_tuning, used=draft.used)
        except QuizError as error:
            assert "too few questions" in str(error) or "at most 5 %" in str(error)
            return
        used = used_hashes(draft, questions)
        plan = draft_plan(choosing, draft, questions)
        looked_at = numbers_in(questions.tuning) if draft.asks_tuning else set[int]()
        looked_at |= set() if draft.is_tuned else numbers_in(questions.profiled)
        if not len(questions.held_out):
            assert questions.why_unscored
            return
        held_out = questions.held_out
        shift = LogprobShift(
            against="the base",
            questions=len(held_out),
            max_abs_logprob_diff=1.0,
            median_abs_logprob_diff=0.5,
            flipped=0,
        )
        proof = HeldOutResult(
            held_out_split=held_out.split,
            held_out=(shift,),
            held_out_hashes=tuple(sorted(question.hash_line for question in held_out)),
        )
        scored_on = scored_split(proof.held_out_hashes, used, held_out.split)
        plan = plan.model_copy(update={"proof": proof})
        save_plan(folder / "cut", plan, used)
        read = load_plan(folder / "cut")
        run = gather(folder / "cut")
        [table] = [p for p in _plan_parts(run, run.plans[0], "plan") if isinstance(p, Table)]
        titles = [
            scored_on.title,
            scored_on.noun,
            read_scored_split(read, folder / "cut").title,
            read_scored_split(read, folder / "cut").clause,
            table.title,
        ]
        # The first hash of an older list is of the form that was used then, and no other.
        by_one = {q.content_hash for q in map(earlier.get, some) if q is not None}
        is_used = any(
            number_of(q) in looked_at
            or (number_of(q) in some and ("one" not in before or q.content_hash in by_one))
            for q in questions.held_out
        )
        said = [("held-out" in t.lower()) or ("not used" in t) for t in titles]
        assert said == [not is_used] * len(titles), titles
        if before == "nothing":
            assert not is_used


def _asked(row: Row) -> tuple[str, tuple[str, ...], int]:
    return row[0], tuple(row[1]), row[2]


@given(form=forms(), texts=st.lists(st.integers(0, 60), max_size=4))
@settings(max_examples=15, deadline=None)
def test_heal_trains_on_nothing_that_it_calls_held_out_or_not_used(
    form: Form, texts: list[int]
) -> None:
    with TemporaryDirectory() as name:
        quiz = form.write(Path(name) / "quiz")
        file = Path(name) / "texts.jsonl"
        said = [f"Note:\n{row_of(n, 'a doubled space')[0]}\n{row_of(n)[1]}" for n in texts]
        said += [f"line {i}" for i in range(30)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
        split = "val" if form.kind == "file" else sorted(form.rows)[0]
        settings = HealSettings(quiz=(str(quiz), str(quiz)), split=split, shots=0)
        settings = settings.model_copy(update={"text": (str(file),), "shuffle": False})
        try:
            found = read_data(settings, make_tokenizer(), 4096)
        except QuizError:
            return
        tokenizer = make_tokenizer()
        trained = {n for part in found.parts for n in _trained(tokenizer, part.shuffled(Random(0)))}
        held = {n for n in _trained(tokenizer, found.held_out)}
        judges = found.scored_quiz(found.hashes)
        assert trained and not trained & held
        assert judges is None or not trained & numbers_in(judges.quiz)
        if judges is not None and judges.used == UNUSED:
            assert not numbers_in(judges.quiz) & (trained | held)


def _trained(tokenizer: object, rows: Sequence[object]) -> set[int]:
    text = "\n".join(tokenizer.decode(row.ids) for row in rows)  # type: ignore[attr-defined]
    found = (piece.split(":")[0] for piece in text.split("No.")[1:])
    return {int("".join(c for c in piece if c.isdigit())) for piece in found}


# Profiles that tell a fifth from the rest


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row_of(n) for n in range(40)] + [row_of(3, "NFD", is_turned=True)]
    return _write_lines(tmp_path_factory.mktemp("one") / "one.jsonl", rows)


@pytest.fixture(scope="module")
def measured(
    checkpoint: Callable[..., Path], one_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Profile:
    folder = tmp_path_factory.mktemp("profile") / "one"
    quiz = load_quiz(Selection(str(one_file), "val", 0))
    moe = open_model(checkpoint("olmoe"))
    list(Measurement(moe, quiz, None, MeasureOptions()).run(folder))
    return load_profile(folder)


def test_a_part_of_a_profile_is_the_profile_of_that_part(
    measured: Profile, one_file: Path, tmp_path: Path
) -> None:
    part, _ = choosing_profile(measured)
    assert isinstance(part, ProfilePart)
    questions = questions_for(part, is_fitting=False)
    assert numbers_in(questions.held_out).isdisjoint(numbers_in(questions.profiled))
    assert 0 < len(part.subjects()) < 41
    rows = [_asked(row_of(n)) for n in range(40)]
    rows.append(_asked(row_of(3, "NFD", is_turned=True)))
    kept = [rows[row] for row in part.array("row_N").tolist()]
    file = _write_lines(tmp_path / "one.jsonl", [(t, list(c), a) for t, c, a in kept])
    quiz = load_quiz(Selection(str(file), "val", 0))
    moe = open_model(Path(measured.info.model.id))
    list(Measurement(moe, quiz, None, MeasureOptions()).run(tmp_path / "alone"))
    alone = load_profile(tmp_path / "alone")
    assert np.array_equal(part.array("answer_N"), alone.array("answer_N"))
    assert np.array_equal(part.array("chosen_NLK"), alone.array("chosen_NLK"))
    for name in ("tokens", "weight", "norm", "weighted_norm", "votes", "residual_shift"):
        own_LE, theirs_LE = part.token_sum(name), alone.token_sum(name)
        assert own_LE is not None and theirs_LE is not None and theirs_LE.any()
        assert own_LE == pytest.approx(theirs_LE, rel=1e-5)
        assert (measured.token_sum(name) != own_LE).any()
    largest = zip(largest_values(part) or [], largest_values(alone) or [], strict=True)
    assert all(own_E == pytest.approx(theirs_E, rel=1e-5) for own_E, theirs_E in largest)


def test_a_profile_without_sums_of_the_fifth_chooses_on_all_and_nothing_judges(
    measured: Profile, tmp_path: Path
) -> None:
    older = Profile(measured.path, measured.info)
    older.chunks = [  # as profiles were before
        {name: array for name, array in chunk.items() if not name.startswith("calibration")}
        for chunk in measured.chunks
    ]
    found, note = choosing_profile(older)
    assert found is older and "profile again to hold a fifth out" in note
    questions = questions_for(found, is_fitting=False)
    assert not len(questions.held_out) and "nothing judges it" in questions.why_unscored


# The commands


def test_a_quiz_of_one_set_is_chosen_on_four_fifths_and_judged_on_the_last(
    measured: Profile, one_file: Path, expertcut: Commands
) -> None:
    n_held = sum(1 for q in load_quiz(Selection(str(one_file), "val", 0)) if _is_out(q))
    assert 0 < n_held < 20
    asked = ("--profile", measured.path)
    for name, words in {
        "reap": ("prune", *asked, "--keep", 5, "--by", "reap"),
        "merge": ("merge", *asked, "--keep", 5),
        "boost": ("reweight", *asked, "--boost-best", 1, "--by", "appearances", "--strength", 1),
        "tune": ("reweight", *asked, "--boost", "0:1", "--tune", "--apply-at", "answer"),
    }.items():
        out = expertcut(*words, "--out", name)
        said = " ".join(out.split())
        assert f"{41 - n_held} of them choose, the other {n_held} are held out" in said
        if not Path(name, "plan.json").is_file():
            continue  # a search that found nothing to gain
        plan = load_plan(Path(name))
        assert plan.chosen_on.questions == 41 - n_held
        assert "eld-out questions (val)" in said
        assert f" {name} --quiz NEW.jsonl" in said  # `eval` of its own would flatter it
        if name in ("reap", "merge"):  # `show` says what the command said
            shown = expertcut("show", name)
            ending = shown[shown.index("size  ") :]
            assert out[out.index("size  ") :].startswith(ending)
            assert {"accuracy", "verdict", "distance"} < set(ending.split())
        assert read_scored_split(plan, Path(name)).used == 0
        assert len(load_hashes(Path(name), plan)) == 41 - n_held
        assert len(plan.proof.held_out_hashes) == n_held
        # A plan that was edited to name others is found out.
        lines = (Path(name) / "chosen_on.txt").read_text().splitlines()
        proof = plan.proof.model_copy(update={"held_out_hashes": tuple(lines[:2])})
        claims = plan.model_copy(update={"proof": proof})
        assert read_scored_split(claims, Path(name)).used == 2
    out = expertcut("prune", *asked, "--keep", 5, "--held-out", 0, "--out", "all")
    assert "eld-out" not in out and "held out" not in out
    said = "was not scored on any question: nothing judges it: all 41 val questions"
    assert said in " ".join(out.split())
    assert load_plan(Path("all")).chosen_on.questions == 41


def _is_out(question: Question) -> bool:
    return int(question.overlap_hash, 16) % 5 == 0


def test_a_sweep_of_one_set_scores_what_did_not_choose(
    measured: Profile, expertcut: Commands
) -> None:
    sweep = ("prune", "--profile", measured.path, "--sweep", "0.75", "--by", "activations,reap")
    out = expertcut(*sweep, "--out", "s")
    assert "none of the questions scored here" in " ".join(out.split())
    found = json.loads(Path("s/sweep.json").read_text())
    expertcut("prune", "--profile", measured.path, "--keep", 6, "--by", "reap", "--plan-only")
    plan = load_plan(next(Path("plans").iterdir()))
    assert found["cells"][1]["keep"] == {n: list(e.keep) for n, e in plan.blocks.items()}
    out = expertcut(*sweep, "--split", "val", "--out", "t")
    assert f"{plan.chosen_on.questions} of the 41 val questions scored here were used" in " ".join(
        out.split()
    )
    again = expertcut(*sweep, "--held-out", 0, "--split", "val", "--out", "t", status=2)
    assert "is another sweep" in again
