"""What the quickstart model reads in training, and the tokenizer made from it.

Four-choice questions alone teach a small model nothing for thousands of steps: it must know the
fact *and* find its letter before either pays. So it first learns to find letters (`letters_text`),
of few words and then of all; then in the quiz's own form, with the right choice named in the
question and look-ups behind it (`quiz_text` with `hinted` and `is_reviewed`); then the quiz itself.
"""

from collections.abc import Collection, Iterable, Iterator
from random import Random
from typing import NamedTuple

from make_quiz import LETTERS, Question, unseen, with_letter
from rules import CAPITALS, COUNTRIES, FACTS, SUBJECTS
from rules import WORDS as COMMON
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from words import PEOPLE

END = "<|endoftext|>"
VOCABULARY_SIZE = 2048
CONTEXT = 2048
LOOKUPS = 10  # of one list in `letters_text`


class Text(NamedTuple):
    """A training text and the character positions where its answers begin (at their space)."""

    text: str
    answers: tuple[int, ...]


def all_words() -> tuple[str, ...]:
    """Every word that can be a choice, in one fixed random order."""
    words = [*COMMON, *PEOPLE.split(), *CAPITALS, *COUNTRIES, *"abcdefghijklmnopqrstuvwxyz"]
    Random(3).shuffle(words)
    return tuple(words)


WORDS = all_words()


def header(subject: str) -> str:
    """Write the first line of a prompt, as lm-evaluation-harness does for MMLU."""
    topic = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {topic}.\n\n"


def listed(choices: Iterable[str]) -> str:
    """Write the four choices, each on its line."""
    return "".join(f"{a}. {b}\n" for a, b in zip(LETTERS, choices, strict=True))


def asked(question: Question) -> str:
    """Write a question up to the place of its answer."""
    return f"{question.text.strip()}\n{listed(question.choices)}Answer:"


def joined(parts: Iterable[tuple[str, str, str]]) -> Text:
    """Join (question, answer, end) triples into one text and note where each answer begins."""
    text, answers = "", []
    for question, answer, end in parts:
        text += question
        answers.append(len(text))
        text += answer + end
    return Text(text, tuple(answers))


def lookups(choices: Iterable[str], n: int, rng: Random) -> list[tuple[str, str, str]]:
    """Repeat `n` of the choices, each with the letter it has.

    They are drawn with replacement: a letter that is missing must not give itself away.
    """
    named = rng.choices(list(zip(choices, LETTERS, strict=True)), k=n)
    return [(f"- {choice}", f" {letter}", "\n") for choice, letter in named]


def letters_text(n_words: int, rng: Random) -> Text:
    """List four of the first `n_words` words, then look their letters up."""
    choices = rng.sample(WORDS[:n_words], len(LETTERS))
    (first, answer, end), *rest = lookups(choices, LOOKUPS, rng)
    return joined([(listed(choices) + first, answer, end), *rest])


def draw(subject: str, rng: Random, seen: Collection[str]) -> Question:
    """Draw a question of the subject that is not in the quiz, its letter at random."""
    return with_letter(unseen(SUBJECTS[subject], rng, seen), rng.choice(LETTERS), rng)


class Style(NamedTuple):
    """How a quiz is written: `n` questions; `hinted` is the share that name the right choice."""

    n: int
    hinted: float = 0.0
    is_reviewed: bool = False
    subjects: tuple[str, ...] = tuple(SUBJECTS)


def quiz_text(style: Style, rng: Random, seen: Collection[str]) -> Text:
    """Ask questions of one subject, as a prompt with n - 1 shots does."""
    subject = rng.choice(style.subjects)
    parts: list[tuple[str, str, str]] = []
    for _ in range(style.n):
        question = draw(subject, rng, seen)
        answer = f" {question.letter}"
        if rng.random() < style.hinted:
            right = question.choices[LETTERS.index(question.letter)]
            question = question._replace(text=f"{question.text} It is {right}.")
        parts.append((asked(question), answer, "\n" if style.is_reviewed else "\n\n"))
        if style.is_reviewed:
            parts += lookups(question.choices, 4, rng)
            parts[-1] = (*parts[-1][:2], "\n\n")
    return joined([(header(subject) + parts[0][0], *parts[0][1:]), *parts[1:]])


def fact_text(rng: Random, seen: Collection[str]) -> Text:
    """State two questions with their answers, without choices."""
    subject = rng.choice(FACTS)
    drawn = [unseen(SUBJECTS[subject], rng, seen) for _ in range(2)]
    return joined([(d.text, f" {d.right}", "\n") for d in drawn])


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can encode any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )
