"""Token ids, the shared prefix, packs and masks, each against the plainest definition of it."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from expertcut.data import Question, Selection, load_quiz, prompt
from expertcut.errors import ModelError
from expertcut.scoring.packing import (
    Encoded,
    Pass,
    cut_packs,
    encode,
    packed_pass,
    padded_pass,
    prefix_pass,
)
from tests.conftest import LETTERS, SUBJECTS, make_tokenizer


def encoded(*prompts: list[int]) -> Encoded:
    return Encoded(tuple(map(tuple, prompts)), ((0, 1),) * len(prompts))


def random_prompts(chance: random.Random) -> list[list[int]]:
    """Prompts with a common beginning, sometimes equal, sometimes one inside another."""
    shared = [chance.randint(0, 2) for _ in range(chance.randint(0, 6))]
    return [
        shared + [chance.randint(0, 2) for _ in range(chance.randint(not shared, 5))]
        for _ in range(chance.randint(1, 5))
    ]


def naive_shared_prefix(prompts: list[list[int]]) -> int:
    length = 0
    while all(len(p) > length + 1 for p in prompts) and len({p[length] for p in prompts}) == 1:
        length += 1
    return length


def test_the_shared_prefix_is_the_longest_that_leaves_every_prompt_a_token():
    chance = random.Random(0)
    lengths = []
    for _ in range(3000):
        prompts = random_prompts(chance)
        lengths.append(encoded(*prompts).shared_prefix())
        assert lengths[-1] == naive_shared_prefix(prompts)
    assert set(range(9)) <= set(lengths)  # else hardly anything was shared


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[1, 2, 3]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2], [1, 2, 3]], 1),
        ([[1, 2, 9], [1, 2, 10], [1, 2, 8]], 2),
        ([[1], [1, 2]], 0),
        ([[5, 1], [6, 1]], 0),
    ],
)
def test_a_prefix_is_never_a_whole_prompt(prompts: list[list[int]], length: int):
    assert encoded(*prompts).shared_prefix() == length


def rectangle(lengths: list[int]) -> int:
    return len(lengths) * max(lengths)


@pytest.mark.parametrize("is_padded", [False, True])
def test_cutting_takes_everything_in_order_and_as_much_as_fits(is_padded):
    cost = rectangle if is_padded else sum
    chance = random.Random(0)
    n_alone = 0
    for _ in range(500):
        lengths = [chance.randint(1, 30) for _ in range(chance.randint(1, 25))]
        budget = chance.choice([0, 1, 20, 40, 100, 10_000])
        pieces = list(cut_packs(lengths, budget, is_padded=is_padded))
        assert [item for piece in pieces for item in piece] == list(range(len(lengths)))
        assert all(pieces)
        for piece in pieces:
            costs = [lengths[i] for i in piece]
            assert len(piece) == 1 or cost(costs) <= budget
            n_alone += len(piece) == 1 and cost(costs) > budget
            if piece[-1] + 1 < len(lengths):  # the next one would not have fitted
                assert cost([*costs, lengths[piece[-1] + 1]]) > budget
    assert n_alone > 100  # an item above the budget goes alone, it is not lost
    assert list(cut_packs([], 10, is_padded=is_padded)) == []


def sees(query: tuple[int, int], key: tuple[int, int]) -> bool:
    """Whether a token, named by (question, place in its prompt), may look at another."""
    is_prefix = key[0] == -1
    return is_prefix or (key[0] == query[0] and key[1] <= query[1])


def test_a_packed_token_sees_the_prefix_and_what_stands_before_it_in_its_own_question():
    chance = random.Random(0)
    seen: set[bool] = set()
    for _ in range(60):
        prompts = random_prompts(chance)
        chunk = encoded(*prompts)
        n_prefix = chunk.shared_prefix()
        questions = sorted(chance.sample(range(len(prompts)), chance.randint(1, len(prompts))))
        tokens = [(q, place) for q in questions for place in range(n_prefix, len(prompts[q]))]
        keys = [*((-1, place) for place in range(n_prefix)), *tokens]
        step = packed_pass(chunk, questions, n_prefix)
        assert step.mask is not None and step.positions is not None
        assert step.mask.dtype == torch.bool
        assert step.mask[0, 0].tolist() == [[sees(t, key) for key in keys] for t in tokens]
        seen |= set(step.mask.flatten().tolist())
        # Positions and ids are those that a token has when its prompt stands alone.
        assert step.positions.tolist() == [[place for _, place in tokens]]
        assert step.input_ids.tolist() == [[prompts[q][place] for q, place in tokens]]
        assert step.question_T.tolist() == [q for q, _ in tokens]
        assert step.questions == tuple(questions)
        assert [tokens[i] for i in step.answers_N.tolist()] == [
            (q, len(prompts[q]) - 1) for q in questions
        ]
        assert step.valid_T is None and not step.is_prefix
    assert seen == {True, False}


def counted(step: Pass) -> list[int]:
    """The token ids that count, in order."""
    ids_T = step.input_ids.flatten()
    return (ids_T if step.valid_T is None else ids_T[step.valid_T]).tolist()


def test_padded_rows_hold_every_prompt_once_and_say_which_tokens_are_pads():
    prompts = [[7, 8, 9], [5], [4, 4, 6, 2]]
    chunk = encoded(*prompts)
    step = padded_pass(chunk, (0, 1, 2), pad_id=99)
    assert step.input_ids.tolist() == [[7, 8, 9, 99], [5, 99, 99, 99], [4, 4, 6, 2]]
    assert step.mask is not None
    assert step.mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert counted(step) == [token for ids in prompts for token in ids]
    assert step.input_ids.flatten()[step.answers_N].tolist() == [9, 5, 2]
    assert step.question_T.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_rows_of_one_length_need_no_mask():
    step = padded_pass(encoded([1], [2, 3], [4, 5]), (1, 2), pad_id=0)
    assert step.mask is None and step.valid_T is None
    assert step.questions == (1, 2)
    assert counted(step) == [2, 3, 4, 5]
    assert step.question_T.tolist() == [1, 1, 2, 2]


def test_the_prefix_is_a_pass_without_questions():
    step = prefix_pass((3, 1, 4))
    assert step.is_prefix and step.input_ids.tolist() == [[3, 1, 4]]
    assert step.answers_N.tolist() == [] and step.question_T.tolist() == [-1] * 3


def question(text: str, n_choices: int = 4) -> Question:
    return Question("birds", text, tuple(f"choice {i}" for i in range(n_choices)), 0, 0)


def test_a_prompt_is_tokenised_whole_and_a_choice_is_the_token_behind_it(quiz_folder: Path):
    tokenizer = make_tokenizer()
    quiz = load_quiz(Selection(str(quiz_folder), shots=3))
    for subject in SUBJECTS:
        questions, shots = quiz.questions[subject], quiz.shots_by_subject[subject]
        chunk = encode(tokenizer, questions, shots)
        assert len(chunk) == len(questions) > 1
        assert chunk.longest == max(map(len, chunk.prompts))
        for asked, ids, letters in zip(questions, chunk.prompts, chunk.choice_ids, strict=True):
            assert tokenizer.decode(ids) == prompt(asked, shots)
            assert [tokenizer.decode(i) for i in letters] == [" A", " B", " C", " D"]


def test_a_question_has_as_many_answer_tokens_as_choices():
    tokenizer = make_tokenizer()
    chunk = encode(tokenizer, [question("few?", 2), question("all?", 26), question("some?", 5)], ())
    assert [len(ids) for ids in chunk.choice_ids] == [2, 26, 5]
    assert tokenizer.decode(chunk.choice_ids[1]) == "".join(f" {letter}" for letter in LETTERS)


def byte_tokenizer(merges: list[tuple[str, str]], **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in [*special.values(), *map("".join, merges)]:
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def splitting_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer([("Ġ", letter) for letter in LETTERS if letter != "B"])


def gluing_tokenizer() -> PreTrainedTokenizerFast:
    letters = [("Ġ", letter) for letter in LETTERS]
    return byte_tokenizer([*letters, *((":", f"Ġ{letter}") for letter in LETTERS)])


def ending_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer([("Ġ", letter) for letter in LETTERS], eos_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    return tokenizer


def ignorant_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Answer:": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.mark.parametrize(
    ("tokenizer", "letter"),
    [
        (splitting_tokenizer, "B"),  # " A" is one token, " B" is two
        (gluing_tokenizer, "A"),  # ": A" is one token, so the prompt's last one is gone
        (ending_tokenizer, "A"),  # every text ends with <eos>: the model would answer behind it
        (ignorant_tokenizer, "B"),  # both are <unk>: no two answers could be told apart
    ],
)
def test_a_tokenizer_without_a_token_for_each_choice_is_refused(tokenizer, letter: str):
    with pytest.raises(ModelError, match=rf"' {letter}'.*one token"):
        encode(tokenizer(), [question("which?")], ())
    encode(make_tokenizer(), [question("which?")], ())  # the question is not at fault


def test_tokenising_shots_and_question_apart_would_change_tokens_at_the_seam(
    real_mmlu: Path, real_tokenizer: Path
):
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizer)
    quiz = load_quiz(Selection(str(real_mmlu), subjects=("anatomy", "astronomy"), limit=60))
    n_changed = 0
    for subject, questions in quiz.questions.items():
        shots = quiz.shots_by_subject[subject]
        chunk = encode(tokenizer, questions, shots)
        n_prefix = chunk.shared_prefix()
        assert chunk.choice_ids[0] == (329, 378, 330, 399)
        for asked, ids in zip(questions, chunk.prompts, strict=True):
            whole = prompt(asked, shots)
            assert list(ids) == tokenizer(whole)["input_ids"]
            own = whole.rindex(asked.text.strip())
            apart = tokenizer([whole[:own], whole[own:]])["input_ids"]
            n_changed += list(ids) != apart[0] + apart[1]
            # What is shared is tokens of the joint prompt, all of them in the common text.
            assert (
                tokenizer.decode(ids[:n_prefix]) == whole[: len(tokenizer.decode(ids[:n_prefix]))]
            )
        assert n_prefix > 200
    assert n_changed > len(quiz) / 2
