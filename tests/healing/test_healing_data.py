"""What is trained on: rows, mixtures, and nothing that is later scored."""

import csv
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from expertcut.data import Selection, load_quiz, prompt
from expertcut.data.sources import Weighted
from expertcut.edits.splits import UNUSED
from expertcut.errors import QuizError, TextError
from expertcut.healing.data import (
    CHOSE_STEP,
    USED_BEFORE,
    Part,
    Row,
    Rows,
    Text,
    TrainingData,
    question_lengths,
    question_row,
    quizzes_kept_out,
    read_data,
    texts_without_scored,
    without_scored,
)
from expertcut.healing.heal_settings import HealSettings
from expertcut.healing.objectives import (
    IGNORED,
    OBJECTIVES,
    Collator,
    TopLogprobs,
    distillation,
    top_logprobs,
)
from expertcut.healing.trainer import Balance
from expertcut.models.hooks import Routing
from expertcut.reporting.edit_tables import dropped_sentence
from expertcut.scoring.packing import cut_packs
from tests.conftest import make_tokenizer, open_model, write_quiz

Checkpoints = Callable[..., Path]


def read(*quizzes: Path | str, **changes: object) -> TrainingData:
    settings = HealSettings(quiz=tuple(map(str, quizzes)), **{"shots": 1, **changes})
    return read_data(settings, make_tokenizer(), settings.max_tokens)


def texts_of(found: TrainingData, n_rows: int) -> list[str]:
    tokenizer = make_tokenizer()
    rows = Rows(found.parts, n_rows)
    return [tokenizer.decode(rows[at][1].ids) for at in range(n_rows)]


def test_a_row_is_a_prompt_with_its_answer_and_the_places_before_letters(quiz_folder: Path) -> None:
    quiz = load_quiz(Selection(str(quiz_folder), "val", 0))
    group = next(iter(quiz.questions.values()))[:3]
    tokenizer = make_tokenizer()
    row = question_row(tokenizer, group)
    letters = ["ABCD"[question.answer] for question in group]
    assert tokenizer.decode(row.ids) == f"{prompt(group[-1], group[:-1])} {letters[-1]}"
    assert [tokenizer.decode(row.ids[at + 1]) for at in row.answers] == [f" {x}" for x in letters]


def test_groups_are_as_long_as_they_may_be() -> None:
    groups = list(cut_packs([10, 10, 10, 99, 10], 25, n_most=2))
    assert groups == [(0, 1), (2,), (3,), (4,)]


def test_every_question_is_trained_on_but_those_held_out(quiz_folder: Path) -> None:
    found = read(quiz_folder, shuffle=False)
    quiz = load_quiz(Selection(str(quiz_folder), "val", 0))
    n_held_out = len(quiz) - found.n_questions
    assert found.held_out_quiz is not None and 0 < n_held_out == len(found.held_out_quiz)
    held_out = {q.text for q in found.held_out_quiz}
    trained = "\n".join(texts_of(found, 40))
    for question in quiz:
        assert (question.text in trained) == (question.text not in held_out)


def test_choices_come_in_other_orders_and_letters_with_them(quiz_folder: Path) -> None:
    quiz = load_quiz(Selection(str(quiz_folder), "val", 0))
    right = {q.text: q.choices[q.answer] for q in quiz}
    orders: dict[str, set[str]] = {}
    for text in texts_of(read(quiz_folder, shots=0), 120):
        asked = text.split("\n\n")[1].split("\n")
        choices = {line[0]: line[3:] for line in asked[1:5]}
        orders.setdefault(asked[0], set()).add(str(choices))
        assert choices[asked[5].removeprefix("Answer: ")] == right[asked[0]]
    assert len(orders) > 15 and max(map(len, orders.values())) > 3


def test_rows_come_in_the_same_order_from_any_place(quiz_folder: Path) -> None:
    first, second = (Rows(read(quiz_folder).parts, 60) for _ in range(2))
    whole = [first[at] for at in range(60)]
    assert [second[at] for at in (50, 7, 59, 8)] == [whole[at] for at in (50, 7, 59, 8)]
    assert len({row for _, row in whole}) > 30


def test_parts_come_as_often_as_they_weigh() -> None:
    def rows(n: int) -> Callable[[random.Random], list[Row]]:
        return lambda order: order.sample([Row((n, i)) for i in range(5)], 5)

    parts = [Part("a", 3.0, rows(0), 0), Part("b", 1.0, rows(1), 0)]
    mixed = Rows(parts, 400)
    found = [mixed[at][1].ids for at in range(400)]
    assert Counter(ids[0] for ids in found) == {0: 300, 1: 100}
    assert max(abs(sum(ids[0] for ids in found[:n]) - n / 4) for n in range(1, 400)) <= 1
    assert Counter(found)[0, 3] == 60  # each epoch has all of them


def test_weights_are_read_behind_the_last_equals_sign() -> None:
    assert Weighted.read("a=0.7") == Weighted("a", 0.7)
    assert Weighted.read("x=y/quiz") == Weighted("x=y/quiz")


def with_repeats(folder: Path, quiz_folder: Path, n_repeated: int) -> Path:
    """Fifty val questions a subject, the first few of which stand in test."""
    write_quiz(folder, {"val": 50}, seed=7)
    shutil.copytree(quiz_folder / "test", folder / "test")
    shutil.copytree(quiz_folder / "dev", folder / "dev")
    file = sorted((folder / "val").iterdir())[0]
    theirs = sorted((folder / "test").iterdir())[0]
    with theirs.open(newline="") as source, file.open(newline="") as target:
        repeated, own = list(csv.reader(source))[:n_repeated], list(csv.reader(target))
    with file.open("w", newline="") as target:
        csv.writer(target).writerows([*repeated, *own[n_repeated:]])
    return folder


def test_what_stands_in_the_evaluation_split_is_dropped_and_named(
    quiz_folder: Path, tmp_path: Path
) -> None:
    found = read(with_repeats(tmp_path / "quiz", quiz_folder, 7))  # of 150: 4.7 %
    (dropped,) = found.dropped
    assert (len(dropped.names), dropped.total, dropped.split) == (7, 150, "test")
    assert dropped.names[0] == "green_birds:0"
    scored = load_quiz(Selection(str(quiz_folder), "test", 0))
    everything = "\n".join(texts_of(found, 200))
    assert not [q for q in scored if q.text in everything]
    assert read(quiz_folder).dropped == []


def test_of_mmlu_28_questions_of_val_stand_in_test(real_mmlu: Path) -> None:
    scored = quizzes_kept_out(HealSettings(quiz=str(real_mmlu)))
    kept, (dropped,) = without_scored(load_quiz(Selection(str(real_mmlu), "val", 0)), scored)
    assert (len(dropped.names), dropped.total) == (28, 1_531)
    assert len(kept) == 1_503


def test_more_than_a_twentieth_of_them_is_refused(quiz_folder: Path, tmp_path: Path) -> None:
    folder = with_repeats(tmp_path / "quiz", quiz_folder, 8)  # 5.3 %
    with pytest.raises(QuizError, match=r"8 of 150 questions of .* stand in split test"):
        read(folder)
    assert read(folder, eval_split="dev").dropped == []


def test_another_quiz_may_be_what_is_scored(quiz_folder: Path, tmp_path: Path) -> None:
    alone = write_quiz(tmp_path / "alone", {"val": 50}, seed=9)
    assert read(alone).scored is None
    found = read(alone, eval_quiz=str(quiz_folder))
    assert found.scored is not None and found.scored.id == str(quiz_folder)


def jsonl(file: Path, *lines: object) -> Path:
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def test_texts_and_quizzes_are_mixed(quiz_folder: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "texts.jsonl", *({"text": f"note {i} on larks"} for i in range(30)))
    found = read(quiz_folder, text=f"{file}=3")
    assert found.n_texts == 27
    texts = texts_of(found, 80)
    assert sum("on larks" in text for text in texts) == 60
    alone = read(text=str(file))
    assert alone.held_out_quiz is None and len(alone.held_out) == 3


def test_chats_are_written_in_the_template(tmp_path: Path, quiz_folder: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"hello {i}"}]} for i in range(12)]
    file = jsonl(tmp_path / "chats.jsonl", *chats)
    with pytest.raises(TextError, match="no chat template"):
        read(quiz_folder, text=str(file))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    found = read_data(HealSettings(text=str(file)), tokenizer, 99)
    assert tokenizer.decode(Rows(found.parts, 1)[0][1].ids).startswith("<user>hello ")


def test_texts_that_ask_what_is_scored_are_dropped(quiz_folder: Path, tmp_path: Path) -> None:
    scored = next(iter(load_quiz(Selection(str(quiz_folder), "test", 0))))
    lines = [{"text": f"note {i}"} for i in range(39)]
    file = jsonl(tmp_path / "texts.jsonl", {"text": f"Q:\n{prompt(scored)} A"}, *lines)
    found = read(quiz_folder, text=str(file))
    assert [dropped.names for dropped in found.dropped] == [("line 1",)]
    with pytest.raises(QuizError, match="of 3 texts of notes stand in split test"):
        texts_without_scored("notes", said(prompt(scored), "b", "c"), [scored], "test")
    half = prompt(scored).replace(scored.choices[3], "zebra")
    assert texts_without_scored("notes", said(half), [scored], "test") == (said(half), [])


def said(*texts: str) -> list[Text]:
    return [Text(f"[INST] {text}", text) for text in texts]


def test_every_source_is_held_against_all_that_is_scored(quiz_folder: Path, tmp_path: Path) -> None:
    other = write_quiz(tmp_path / "other", {"dev": 2, "val": 50, "test": 3}, seed=7)
    theirs = sorted((quiz_folder / "test").iterdir())[0].read_text().splitlines()
    mine = sorted((other / "val").iterdir())[0]
    mine.write_text("\n".join([*theirs[:3], *mine.read_text().splitlines()[3:]]) + "\n")
    assert read(other).dropped == []
    for found in (read(other, quiz_folder), read(other, eval_quiz=str(quiz_folder))):
        (dropped,) = found.dropped
        assert dropped.source == str(other) and len(dropped.names) == 3


def test_what_is_scored_is_read_or_nothing_is_trained(quiz_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quiz_folder, tmp_path / "quiz"))
    file = sorted((folder / "test").iterdir())[0]
    file.write_text("only,two\n")
    with pytest.raises(QuizError, match=file.name):
        read(folder)
    with pytest.raises(QuizError, match="no questions in split nowhere"):
        read(quiz_folder, eval_quiz=str(quiz_folder), eval_split="nowhere")


def test_where_nothing_is_kept_out_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = jsonl(tmp_path / "texts.jsonl", *({"text": f"note {i}"} for i in range(12)))
    assert read(text=str(file)).scored is None
    assert "name the scored quiz by --eval-quiz" in caplog.text


def test_a_scored_question_in_a_chat_is_found_whatever_the_template(
    quiz_folder: Path, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    scored = next(iter(load_quiz(Selection(str(quiz_folder), "test", 0))))
    content = "\n".join([scored.text, *scored.choices])
    lines = [[{"role": "user", "content": said}] for said in (content, *map(str, range(39)))]
    file = jsonl(tmp_path / "chats.jsonl", *({"messages": line} for line in lines))
    settings = HealSettings(text=str(file), eval_quiz=str(quiz_folder))
    found = read_data(settings, tokenizer, 999)
    assert [dropped.names for dropped in found.dropped] == [("line 1",)]


def test_questions_that_are_too_long_are_counted_and_named(quiz_folder: Path) -> None:
    everyone = list(load_quiz(Selection(str(quiz_folder), "val", 0)))
    sizes = question_lengths(make_tokenizer(), everyone)
    most = sorted(sizes)[len(sizes) // 2]
    found = read(quiz_folder, max_tokens=most)
    (dropped,) = found.dropped
    assert dropped.longest == most and 0 < len(dropped.names) == sum(size > most for size in sizes)
    assert found.held_out_quiz is not None
    assert found.n_questions + len(found.held_out_quiz) + len(dropped.names) == len(everyone)
    assert f"have more than {most} tokens and were left out" in dropped_sentence(dropped)
    with pytest.raises(QuizError, match="raise --max-tokens"):
        read(quiz_folder, max_tokens=3)


def test_how_the_judges_were_used_is_said(quiz_folder: Path) -> None:
    found = read(quiz_folder)
    assert found.scored is not None
    hashes = [question.content_hash for question in found.scored]
    some, none = found.scored_quiz(frozenset(hashes[1:])), found.scored_quiz(frozenset(hashes))
    assert some is not None and (len(some.quiz), some.used) == (1, UNUSED)
    assert none is not None and (len(none.quiz), none.used) == (len(hashes), USED_BEFORE)
    alone = replace(found, scored=None).scored_quiz(frozenset())
    assert alone is not None and alone.used == CHOSE_STEP
    assert alone.quiz.split == "val"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": 3}', "its text must be a text, not int"),
        ("[1]", "a list, must be a JSON object"),
        ('{"text": "\\ud800"}', "a lone surrogate"),
        ('{"text": NaN}', "NaN is not a number"),
        ('{"messages": [{"role": "user"}]}', "messages must be turns"),
        ("{", "not JSON"),
    ],
)
def test_a_line_that_holds_no_text_is_named(
    quiz_folder: Path, tmp_path: Path, line: str, said: str
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(TextError, match=rf":2: .*{said}"):
        read(quiz_folder, text=str(file))


def test_a_batch_trains_where_the_objective_says() -> None:
    row = Row((5, 6, 7, 8, 9), answers=(1, 3))
    items = [(0, row), (1, Row((5, 6, 7), answers=(1,)))]
    batch = Collator(OBJECTIVES["answer"].where, 0)(items)
    wanted = [[IGNORED, 7, IGNORED, 9, IGNORED], [IGNORED, 7, *[IGNORED] * 3]]
    assert batch["labels"].tolist() == wanted
    batch = Collator(OBJECTIVES["lm"].where, 0, 1.0)(items)
    assert batch["labels"].tolist() == [[6, 7, 8, 9, IGNORED], [6, 7, *[IGNORED] * 3]]
    assert batch["weight_BS"].tolist() == [[1, 3, 1, 3, 0], [1, 3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_distillation_is_the_divergence_and_of_fewer_tokens_a_lower_bound() -> None:
    torch.manual_seed(0)
    ours_MV, theirs_MV, next_M = 3 * torch.randn(6, 40), 3 * torch.randn(6, 40), torch.zeros(6)
    logs = [x.log_softmax(dim=-1) for x in (ours_MV, theirs_MV)]
    exact_M = F.kl_div(*logs, log_target=True, reduction="none").sum(dim=-1)
    bounds = [
        distillation(ours_MV, next_M, top_logprobs(theirs_MV, n)) for n in (1, 5, 20, 39, 40, 99)
    ]
    for fewer_M, more_M in pairwise(bounds):
        assert (fewer_M <= more_M + 1e-5).all()
    assert bounds[-1].allclose(exact_M, atol=1e-5) and (bounds[0] < 0.9 * exact_M).any()
    same = top_logprobs(ours_MV, 5)
    assert distillation(ours_MV, next_M, same).abs().max() < 1e-5
    sure = TopLogprobs(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0.0, -99.0]]))
    logits = torch.zeros(1, 4, requires_grad=True)
    distillation(logits, next_M, sure).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_the_balance_is_counted_over_the_step_and_all_processes(checkpoint: Checkpoints) -> None:
    block = open_model(checkpoint("olmoe")).blocks[0]
    torch.manual_seed(0)
    passes = [routing_of(block.layer, torch.randn(12, 8)) for _ in range(2)]
    mask_BS = torch.ones(3, 4)

    def loss(balance: Balance, routing: Routing) -> float:
        balance.seen = {block.layer: routing}
        return float(balance.loss(mask_BS))

    counts = [torch.bincount(r.experts_TK.flatten(), minlength=8).float() for r in passes]
    means = [r.logits_TE.softmax(dim=-1).mean(dim=0) for r in passes]
    together_E = (counts[0] + counts[1]) / (counts[0] + counts[1]).sum()
    whole = 8 * float((together_E * (means[0] + means[1]) / 2).sum())
    # Two processes: each has its half of the step's loss.
    halves = [
        Balance([block], lambda own_E, other=other: own_E + counts[other]) for other in (1, 0)
    ]
    parts = [loss(half, routing) for half, routing in zip(halves, passes, strict=True)]
    assert sum(parts) == pytest.approx(whole)
    assert parts[0] == pytest.approx(8 * float((together_E * means[0]).sum()) / 2)
    # Two micro-batches, counted before.
    alone = Balance([block], lambda own_E: own_E)
    first = loss(alone, passes[0])
    assert first == pytest.approx(8 * float((counts[0] / 24 * means[0]).sum()))
    alone.begin()
    for routing in passes:
        alone.seen = {block.layer: routing}
        alone.count(mask_BS)
    alone.share()
    assert [loss(alone, routing) for routing in passes] == pytest.approx(parts)
    alone.begin()
    assert loss(alone, passes[0]) == pytest.approx(first)
    even = routing_of(block.layer, torch.zeros(12, 8))
    even = replace(even, experts_TK=torch.arange(24).reshape(12, 2) % 8)
    assert loss(Balance([block], lambda own_E: own_E), even) == pytest.approx(1.0)
    # Places where a routing rule leaves nobody (the id E) do not count.
    empty = replace(passes[0], experts_TK=F.pad(passes[0].experts_TK, (0, 1), value=8))
    assert loss(Balance([block], lambda own_E: own_E), empty) == first


def test_pads_do_not_count_for_the_balance(checkpoint: Checkpoints) -> None:
    block = open_model(checkpoint("olmoe")).blocks[0]
    torch.manual_seed(0)
    logits_TE = torch.randn(8, 8)
    short, padded = Balance([block], lambda own_E: own_E), Balance([block], lambda own_E: own_E)
    short.seen = {0: routing_of(0, logits_TE[[0, 1, 2, 4, 5]])}
    padded.seen = {0: routing_of(0, logits_TE)}
    mask_BS = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert float(padded.loss(mask_BS)) == pytest.approx(float(short.loss(torch.ones(1, 5))))


def routing_of(layer: int, logits_TE: torch.Tensor) -> Routing:
    weights_TK, experts_TK = logits_TE.softmax(dim=-1).topk(2, dim=-1)
    return Routing(layer, torch.empty(0), logits_TE, weights_TK, experts_TK)
