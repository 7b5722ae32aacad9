"""What the quickstart model reads in training, and the tokenizer made from it.

Four-choice questions alone teach a small model nothing for thousands of steps: it must know the
fact *and* find its letter before either pays. So it first learns to find letters of listed words
(`letters_text`), of few words and then of all. Beside the quiz each step then asks for facts by
their word (`direct_text`), for letters still, and tells stories.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

from make_quiz import LETTERS, Question, unseen, with_letter
from rules import CITIES, SUBJECTS, TOWNS
from stories import DOMAINS, story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from words import ACTIVITIES, ANIMALS, GOODS, GROUPS, OPPOSITES, TRADES

END = "<|endoftext|>"
VOCABULARY_SIZE = 2048
CONTEXT = 2048
FIRST_TEXTS, FIRST_LOOK_UPS = 32, 10  # of a step that teaches letters alone
QUIZ_QUESTIONS = 48  # of a step, in texts of one question (no shots) to six (five shots)
IN_A_TEXT = (1, 1, 2, 3, 6)
DIRECT_TEXTS = 20  # of two questions each
LETTER_TEXTS = 24
LOOK_UPS = 3  # in one list of choices
STORIES = 6


class Part(NamedTuple):
    """What asks, what answers (after a space), what follows, and the word that is meant."""

    question: str
    answer: str
    end: str
    word: str


class Text(NamedTuple):
    """A training text, the character positions of its answers (at their space), and their words.

    The word of an answer that is a letter is the choice behind it.
    """

    text: str
    answers: tuple[int, ...] = ()
    words: tuple[str, ...] = ()


def all_words() -> tuple[str, ...]:
    """Every word that can be a choice, in one fixed random order."""
    lists = (ACTIVITIES, ANIMALS, GOODS, TRADES, OPPOSITES.replace("/", " "), *GROUPS.values())
    words = dict.fromkeys([*" ".join(lists).split(), *CITIES, *TOWNS, *ascii_lowercase])
    shuffled = [*words, *map(str, range(1, 70))]
    Random(11).shuffle(shuffled)
    return tuple(shuffled)


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


def joined(start: str, parts: Iterable[Part]) -> Text:
    """Join parts into one text and note where each answer begins."""
    text, answers, words = start, [], []
    for part in parts:
        text += part.question
        answers.append(len(text))
        words.append(part.word)
        text += f" {part.answer}{part.end}"
    return Text(text, tuple(answers), tuple(words))


@dataclass
class Sampler:
    """Draws the texts of one step after the other; nothing of `seen` is among them."""

    rng: Random
    seen: Collection[str]  # keys of quiz questions, and stories

    def question(self, subject: str) -> Question:
        """Draw a question of the subject, its letter at random."""
        drawn = unseen(SUBJECTS[subject], self.rng, self.seen)
        return with_letter(drawn, self.rng.choice(LETTERS), self.rng)

    def subject(self) -> str:
        """Draw a subject."""
        return self.rng.choice(tuple(SUBJECTS))

    def quiz_text(self, n: int) -> Text:
        """Ask `n` questions of one subject, as a prompt with n - 1 shots does."""
        subject = self.subject()
        questions = [self.question(subject) for _ in range(n)]
        right = [q.choices[LETTERS.index(q.letter)] for q in questions]
        parts = [
            Part(asked(q), q.letter, "\n\n", word) for q, word in zip(questions, right, strict=True)
        ]
        return joined(header(subject), parts)

    def direct_text(self) -> Text:
        """Ask two questions without choices, answered by the word, at once or as in the quiz."""
        drawn = [unseen(SUBJECTS[self.subject()], self.rng, self.seen) for _ in range(2)]
        before = self.rng.choice(("", "\nAnswer:"))
        return joined("", [Part(d.text + before, d.right, "\n", d.right) for d in drawn])

    def letters_text(self, n_words: int = len(WORDS), n_look_ups: int = LOOK_UPS) -> Text:
        """List four of the first `n_words` words, then look letters up.

        They are drawn with replacement: a letter that is missing must not give itself away.
        """
        choices = self.rng.sample(WORDS[:n_words], len(LETTERS))
        named = self.rng.choices(list(zip(choices, LETTERS, strict=True)), k=n_look_ups)
        return joined(listed(choices), [Part(f"- {word}", a, "\n", word) for word, a in named])

    def draw_letters(self, n_words: int) -> list[Text]:
        """Draw the texts of a step that teaches letters alone."""
        return [self.letters_text(n_words, FIRST_LOOK_UPS) for _ in range(FIRST_TEXTS)]

    def story(self) -> Text:
        """Tell what is so, without a question."""
        while True:
            text = story(self.rng.choice(tuple(DOMAINS)), self.rng)
            if text not in self.seen:
                return Text(text)

    def draw(self) -> list[Text]:
        """Draw the texts of one step."""
        texts = []
        left = QUIZ_QUESTIONS
        while left:
            n = min(left, self.rng.choice(IN_A_TEXT))
            texts.append(self.quiz_text(n))
            left -= n
        texts += [self.direct_text() for _ in range(DIRECT_TEXTS)]
        texts += [self.letters_text() for _ in range(LETTER_TEXTS)]
        return texts + [self.story() for _ in range(STORIES)]


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
