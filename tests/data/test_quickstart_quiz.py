"""Laws of the bundled quickstart quiz, text and model, read as a stranger would: csv and json."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

QUICKSTART = Path(__file__).parents[2] / "checkpoints" / "quickstart"
QUIZ = QUICKSTART / "quiz"
TEXT = QUICKSTART / "text"
SPLITS = ("dev", "val", "test")
SUBJECTS = sorted(path.name.removesuffix("_dev.csv") for path in (QUIZ / "dev").glob("*.csv"))

Row = list[str]


def rows(split: str, subject: str) -> list[Row]:
    with (QUIZ / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def asked(row: Row) -> str:
    choices = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row[1:5], strict=True)
    )
    return f"{row[0].strip()}\n{choices}Answer:"


def five_shot_prompts(subject: str) -> Iterator[str]:
    topic = subject.replace("_", " ")
    start = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    start += "".join(f"{asked(row)} {row[5]}\n\n" for row in rows("dev", subject))
    for split in ("val", "test"):
        yield from (start + asked(row) for row in rows(split, subject))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(QUICKSTART)


def test_there_are_at_least_eight_subjects_and_each_has_every_split():
    assert len(SUBJECTS) >= 8
    expected = {f"{split}/{s}_{split}.csv" for s in SUBJECTS for split in SPLITS}
    assert {path.relative_to(QUIZ).as_posix() for path in QUIZ.glob("*/*")} == expected


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_has_five_shots_a_hundred_val_and_250_test_questions(subject):
    assert len(rows("dev", subject)) == 5
    assert len(rows("val", subject)) >= 100
    assert len(rows("test", subject)) >= 250


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_row_is_a_question_four_different_choices_and_a_letter(subject):
    for split in SPLITS:
        for row in rows(split, subject):
            assert len(row) == 6
            assert all(cell == cell.strip() != "" for cell in row)
            assert len(set(row[1:5])) == 4
            assert row[5] in "ABCD"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_letters_are_balanced_within_one(subject, split):
    counts = Counter(row[5] for row in rows(split, subject))
    assert set(counts) == set("ABCD")
    assert max(counts.values()) - min(counts.values()) <= 1


def key(row: Row) -> tuple[str, ...]:
    return (row[0], *sorted(row[1:5]))


def test_no_question_stands_twice_in_the_whole_quiz():
    keys = Counter(
        key(row) for subject in SUBJECTS for split in SPLITS for row in rows(split, subject)
    )
    assert len(keys) > 2000
    assert [asked for asked, n in keys.items() if n > 1] == []


def test_training_never_draws_a_question_of_the_quiz(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    import make_quiz
    import rules

    seen = make_quiz.quiz_keys()
    all_rows = [row for s in SUBJECTS for split in SPLITS for row in rows(split, s)]
    assert seen == {make_quiz.key(row[0], row[1:5]) for row in all_rows}
    # A rule that draws nothing but a quiz question and another one must give the other.
    subject = SUBJECTS[0]
    row, other = rows("test", subject)[0], rules.Drawn("What?", "a", ("b", "c", "d"))
    turns = iter([rules.Drawn(row[0], row[1], tuple(row[2:5])), other])
    assert make_quiz.unseen(lambda _: next(turns), Random(0), seen) == other


def test_the_script_writes_the_committed_bytes(tmp_path):
    # Another hash seed than this process has: no order of a set may leak into the quiz.
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    script = [sys.executable, str(QUICKSTART / "make_quiz.py"), "--out", str(tmp_path)]
    subprocess.run(script, check=True, env=env)
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.glob("*/*.csv")}
    assert len(made) == len(SPLITS) * len(SUBJECTS)
    assert made == {p.relative_to(QUIZ): p.read_bytes() for p in QUIZ.glob("*/*.csv")}


def documents(name: str) -> list[str]:
    lines = (TEXT / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_the_stories_of_two_domains_have_few_words_in_common_and_none_stands_twice():
    files = sorted(path.name for path in TEXT.glob("*"))
    assert files == [f"{d}_{s}.jsonl" for d in ("numbers", "people") for s in ("test", "val")]
    assert 200_000 < sum((TEXT / name).stat().st_size for name in files) < 1_000_000
    found = [text for name in files for text in documents(name)]
    assert len(set(found)) == len(found) == 1600
    numbers, people = (
        {word for text in documents(f"{domain}_test.jsonl") for word in text.split()}
        for domain in ("numbers", "people")
    )
    assert len(numbers & people) <= 6


def test_the_script_writes_the_committed_stories(tmp_path):
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    script = [sys.executable, str(QUICKSTART / "stories.py"), "--out", str(tmp_path)]
    subprocess.run(script, check=True, env=env)
    made = {path.name: path.read_bytes() for path in tmp_path.glob("*")}
    assert made == {path.name: path.read_bytes() for path in TEXT.glob("*")}


def test_training_never_draws_a_story_of_the_files(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    import texts
    from stories import kept_back

    all_of_them = {text for path in TEXT.glob("*") for text in documents(path.name)}
    assert kept_back() == all_of_them
    turns = iter([documents("people_val.jsonl")[0], "Something else."])
    monkeypatch.setattr(texts, "story", lambda _domain, _rng: next(turns))
    assert texts.Sampler(Random(0), kept_back()).story().text == "Something else."


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32).eval()


@torch.inference_mode()
def test_the_two_domains_use_different_experts(model, tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    import measure

    shares = []
    for domain in ("numbers", "people"):
        ids = tokenizer("\n".join(documents(f"{domain}_test.jsonl")[:40]))["input_ids"]
        with measure.routing(model) as chosen:
            model(torch.tensor([ids]))
        counts_LE = torch.stack([experts.flatten().bincount(minlength=32) for experts in chosen])
        shares.append(counts_LE / counts_LE.sum(1, keepdim=True))
    different_L = (shares[0] - shares[1]).abs().sum(1) / 2  # 0 where the same, 1 where none is
    assert (different_L > 0.4).all(), different_L


def test_knowledge_lies_in_the_experts(model, tokenizer, monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    import measure

    asked_with = [p for s in SUBJECTS for p in measure.prompts(QUIZ, s, "test", 0)[:30]]

    def accuracy(*gone: int) -> float:
        with measure.without(model, gone):
            found = measure.measure(model, tokenizer, asked_with)
        return found.correct / found.questions

    whole = accuracy()
    assert 0.7 < whole < 0.92
    assert sum(whole - accuracy(layer) > 0.05 for layer in range(4)) >= 3
    assert whole - accuracy(0, 1, 2, 3) > 0.35


def test_the_folder_is_at_most_ten_megabytes_and_holds_no_pickles():
    files = [p for p in QUICKSTART.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 10_000_000
    weights = {p.name for p in files if p.stat().st_size > 1_000_000}
    assert weights == {"model.safetensors"}
    assert not {p.suffix for p in files} & {".bin", ".pt", ".pth", ".pkl", ".pickle"}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_answer_is_one_token_after_the_unchanged_prompt(subject, tokenizer):
    prompts = list(five_shot_prompts(subject))[::10]
    ids = tokenizer(prompts)["input_ids"]
    answer_ids = set()
    for letter in "ABCD":
        answered = tokenizer([f"{prompt} {letter}" for prompt in prompts])["input_ids"]
        assert [longer[:-1] for longer in answered] == ids
        answer_ids |= {longer[-1] for longer in answered}
    assert len(answer_ids) == 4


@pytest.mark.parametrize("subject", SUBJECTS)
def test_questions_are_short(subject, tokenizer):
    lengths = [len(tokenizer(asked(row))["input_ids"]) for row in rows("test", subject)]
    assert min(lengths) > 10
    assert max(lengths) <= 60


def test_any_text_encodes_and_comes_back(tokenizer):
    for text in ("Ünïcödé → 漢字 🦉\r\n\ttabs", "Which word goes with plum and pear?\nA. fig\n"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_rule_never_offers_a_choice_twice(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    import rules

    rng = Random(1)
    for rule in rules.SUBJECTS.values():
        for drawn in (rule(rng) for _ in range(300)):
            assert len({drawn.right, *drawn.wrong}) == 4
