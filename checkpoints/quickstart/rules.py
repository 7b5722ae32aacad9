"""The subjects of the quickstart quiz: one function each, which draws one question from a seed.

A rule says what is asked, the right choice and three wrong ones; the letter comes later, so that
letters can be balanced.
"""

from collections.abc import Callable, Sequence
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

from words import (
    ARRIVAL_WORDINGS,
    CAPITAL_WORDINGS,
    COUNTRY_WORDINGS,
    FIND_WORDINGS,
    GROUPS,
    LETTER_WORDINGS,
    NUMBER_WORDS,
    OPPOSITE_WORDINGS,
    OPPOSITES,
    PEOPLE,
    READING_WORDINGS,
    SPELLING_WORDINGS,
    THINGS,
    TRAVEL_WORDINGS,
)


class Drawn(NamedTuple):
    """A question before its choices have letters."""

    text: str
    right: str
    wrong: tuple[str, ...]


Rule = Callable[[Random], Drawn]

N_COUNTRIES = 20


def others(rng: Random, pool: Sequence[str], but: Sequence[str], n: int = 3) -> tuple[str, ...]:
    """Draw `n` different members of the pool that are not among `but`."""
    return tuple(rng.sample([word for word in pool if word not in but], n))


def invent_names(endings: Sequence[str], n: int, seed: int) -> tuple[str, ...]:
    """Make `n` different names that no atlas holds."""
    rng = Random(seed)
    names: dict[str, None] = {}
    while len(names) < n:
        onset, vowel, middle = (
            rng.choice("BDFGKLMNPRSTVZ"),
            rng.choice("aeiou"),
            rng.choice("lmnrvz"),
        )
        names[onset + vowel + middle + rng.choice(endings)] = None
    return tuple(names)


COUNTRIES = invent_names(("ania", "oria", "istan", "ovia", "eland"), N_COUNTRIES, seed=1)
CAPITALS = invent_names(("burg", "opol", "aville", "eton", "ograd"), N_COUNTRIES, seed=2)


WORDS = (
    *OPPOSITES.replace("/", " ").split(),
    *" ".join(GROUPS.values()).split(),
    *THINGS.split(),
)


def invented_capitals(rng: Random) -> Drawn:
    """Facts that can only be known by heart: capitals of countries that do not exist."""
    i = rng.randrange(N_COUNTRIES)
    wording = rng.choice(CAPITAL_WORDINGS + COUNTRY_WORDINGS)
    pool = CAPITALS if wording in CAPITAL_WORDINGS else COUNTRIES
    text = wording.format(COUNTRIES[i], CAPITALS[i])
    return Drawn(text, pool[i], others(rng, pool, (pool[i],)))


def opposites(rng: Random) -> Drawn:
    """Pairs of English words."""
    given, right = rng.sample(rng.choice(OPPOSITES.split()).split("/"), 2)
    words = OPPOSITES.replace("/", " ").split()
    text = rng.choice(OPPOSITE_WORDINGS).format(given)
    return Drawn(text, right, others(rng, words, (given, right)))


def word_groups(rng: Random) -> Drawn:
    """Find the word of the same kind as two others."""
    kind, *strange = rng.sample(sorted(GROUPS), 4)
    first, second, right = rng.sample(GROUPS[kind].split(), 3)
    wording = rng.choice(
        ("Which word goes with {} and {}?", "Which is of the same kind as {} and {}?")
    )
    return Drawn(
        wording.format(first, second),
        right,
        tuple(rng.choice(GROUPS[other].split()) for other in strange),
    )


def alphabet(rng: Random) -> Drawn:
    """Step up to three places forward or back."""
    step, wording = rng.randint(1, 3), rng.choice(LETTER_WORDINGS)
    forward = LETTER_WORDINGS.index(wording) < len(LETTER_WORDINGS) // 2
    low = rng.randrange(len(ascii_lowercase) - step)
    start, end = (low, low + step) if forward else (low + step, low)
    near = [ascii_lowercase[i] for i in range(max(0, end - 4), min(26, end + 5)) if i != start]
    text = wording.format(n=NUMBER_WORDS[step], x=ascii_lowercase[start])
    return Drawn(text, ascii_lowercase[end], others(rng, near, (ascii_lowercase[end],)))


def looked_up(rng: Random, words: Sequence[str], wordings: Sequence[str]) -> Drawn:
    """Find the word that the question says."""
    right, *wrong = rng.sample(words, 4)
    return Drawn(rng.choice(wordings).format(right), right, tuple(wrong))


def reading(rng: Random) -> Drawn:
    """Find a word that is read out."""
    return looked_up(rng, WORDS, READING_WORDINGS)


def arrivals(rng: Random) -> Drawn:
    """Find the person who comes."""
    return looked_up(rng, PEOPLE.split(), ARRIVAL_WORDINGS)


def finds(rng: Random) -> Drawn:
    """Find the thing that was found."""
    return looked_up(rng, THINGS.split(), FIND_WORDINGS)


def travels(rng: Random) -> Drawn:
    """Find the place that a journey leads to."""
    return looked_up(rng, (*CAPITALS, *COUNTRIES), TRAVEL_WORDINGS)


def spelling(rng: Random) -> Drawn:
    """Find the letter that is named."""
    return looked_up(rng, ascii_lowercase, SPELLING_WORDINGS)


def doubles(rng: Random) -> Drawn:
    """Find the word that stands twice."""
    right, *wrong = rng.sample(WORDS, 4)
    words = rng.sample((right, right, wrong[0], wrong[1]), 4)
    wording = rng.choice(("{} Which word stands here twice?", "{} Which word is said again?"))
    return Drawn(wording.format(f"{' '.join(words)}."), right, tuple(wrong))


def who_has_what(rng: Random) -> Drawn:
    """Read a sentence and look a thing up in it."""
    people, things = rng.sample(PEOPLE.split(), 4), rng.sample(THINGS.split(), 4)
    told = "{} has the {}, {} has the {} and {} has the {}. ".format(
        *(word for pair in zip(people[:3], things, strict=False) for word in pair)
    )
    i = rng.randrange(3)
    if rng.random() < 0.5:
        return Drawn(
            f"{told}Who has the {things[i]}?", people[i], others(rng, people, (people[i],))
        )
    return Drawn(f"{told}What does {people[i]} have?", things[i], others(rng, things, (things[i],)))


SUBJECTS: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        alphabet,
        arrivals,
        doubles,
        finds,
        invented_capitals,
        opposites,
        reading,
        spelling,
        travels,
        who_has_what,
        word_groups,
    )
}

# What must be known by heart; a model can also be taught it without choices.
FACTS = ("alphabet", "invented_capitals", "opposites")

# Here the question says the answer, so that only its letter must be found.
LOOK_UPS = ("arrivals", "finds", "reading", "spelling", "travels")
