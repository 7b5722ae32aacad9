"""The subjects of the quickstart quiz: one function each, which draws one question from a seed.

A rule says what is asked, the right choice and three wrong ones; the letter comes later, so that
letters can be balanced. No question says its answer: facts of a world that does not exist must be
known by heart, the others worked out.
"""

from collections.abc import Callable, Sequence
from itertools import product
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

from words import (
    ACTIVITIES,
    ANIMALS,
    CAPITAL_WORDINGS,
    DAYS,
    EXPORT_WORDINGS,
    FAMILY_NAMES,
    GIVEN_NAMES,
    GOODS,
    GROUP_WORDINGS,
    GROUPS,
    HOME_WORDINGS,
    LETTER_WORDINGS,
    NUMBER_WORDS,
    OPPOSITE_WORDINGS,
    OPPOSITES,
    PARTS,
    PET_WORDINGS,
    SEQUENCE_WORDINGS,
    SUM_WORDINGS,
    TIMETABLE_WORDINGS,
    TRADE_WORDINGS,
    TRADES,
)


class Drawn(NamedTuple):
    """A question before its choices have letters."""

    text: str
    right: str
    wrong: tuple[str, ...]


Rule = Callable[[Random], Drawn]

LARGEST_SUMMAND = 30
LARGEST_STEP = 9


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


def give(owners: Sequence[str], words: Sequence[str], seed: int) -> dict[str, str]:
    """Give each owner one of the words by lot, every word about as often as any other."""
    rng = Random(seed)
    lots = [*words] * (len(owners) // len(words) + 1)
    return dict(zip(owners, rng.sample(lots[: len(owners)], len(owners)), strict=True))


def pairs(first: Sequence[str], second: Sequence[str], n: int, seed: int) -> tuple[str, ...]:
    """Draw `n` of all pairs. What belongs to a pair can be told from neither word alone."""
    return tuple(Random(seed).sample([f"{a} {b}" for a, b in product(first, second)], n))


LANDS = invent_names(("ania", "oria", "istan", "ovia", "eland"), 8, seed=1)
CITIES = invent_names(("burg", "opol", "aville", "eton", "ograd"), 24, seed=2)
TOWNS = invent_names(("by", "wick", "ham", "mouth"), 24, seed=4)
COUNTRIES = pairs(PARTS.split(), LANDS, 40, seed=12)
PEOPLE = pairs(GIVEN_NAMES.split(), FAMILY_NAMES.split(), 60, seed=13)
BUSY_DAYS = pairs(GIVEN_NAMES.split(), DAYS.split(), 70, seed=14)

CAPITAL = give(COUNTRIES, CITIES, seed=5)
EXPORT = give(COUNTRIES, GOODS.split(), seed=6)
HOME = give(PEOPLE, TOWNS, seed=7)
PET = give(PEOPLE, ANIMALS.split(), seed=8)
TRADE = give(PEOPLE, TRADES.split(), seed=9)
TIMETABLE = give(BUSY_DAYS, ACTIVITIES.split(), seed=10)


def fact(rng: Random, facts: dict[str, str], wordings: Sequence[str]) -> Drawn:
    """Ask for what one of the owners was given."""
    owner = rng.choice(tuple(facts))
    right = facts[owner]
    wrong = others(rng, tuple(sorted(set(facts.values()))), (right,))
    return Drawn(rng.choice(wordings).format(owner, *owner.split()), right, wrong)


def capitals(rng: Random) -> Drawn:
    """Capitals of countries that do not exist."""
    return fact(rng, CAPITAL, CAPITAL_WORDINGS)


def exports(rng: Random) -> Drawn:
    """What these countries sell."""
    return fact(rng, EXPORT, EXPORT_WORDINGS)


def homes(rng: Random) -> Drawn:
    """Where people live."""
    return fact(rng, HOME, HOME_WORDINGS)


def pets(rng: Random) -> Drawn:
    """Which animals people keep."""
    return fact(rng, PET, PET_WORDINGS)


def trades(rng: Random) -> Drawn:
    """What people do for a living."""
    return fact(rng, TRADE, TRADE_WORDINGS)


def timetable(rng: Random) -> Drawn:
    """What people do on which day: two words together say it, neither alone."""
    return fact(rng, TIMETABLE, TIMETABLE_WORDINGS)


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
    text = rng.choice(GROUP_WORDINGS).format(first, second)
    return Drawn(text, right, tuple(rng.choice(GROUPS[other].split()) for other in strange))


def near(rng: Random, right: int) -> tuple[str, ...]:
    """Draw three numbers that are at most five away."""
    return tuple(str(n) for n in rng.sample([right + d for d in range(-5, 6) if d], 3))


def sums(rng: Random) -> Drawn:
    """Add two numbers."""
    a, b = rng.randint(5, LARGEST_SUMMAND), rng.randint(1, LARGEST_SUMMAND)
    return Drawn(rng.choice(SUM_WORDINGS).format(a, b), str(a + b), near(rng, a + b))


def sequences(rng: Random) -> Drawn:
    """Go on counting in equal steps."""
    start, step = rng.randint(1, LARGEST_SUMMAND), rng.randint(2, LARGEST_STEP)
    shown = (start, start + step, start + 2 * step)
    right = start + 3 * step
    return Drawn(rng.choice(SEQUENCE_WORDINGS).format(*shown), str(right), near(rng, right))


def alphabet(rng: Random) -> Drawn:
    """Step up to three places forward or back."""
    step, wording = rng.randint(1, 3), rng.choice(LETTER_WORDINGS)
    forward = LETTER_WORDINGS.index(wording) < len(LETTER_WORDINGS) // 2
    low = rng.randrange(len(ascii_lowercase) - step)
    start, end = (low, low + step) if forward else (low + step, low)
    around = [ascii_lowercase[i] for i in range(max(0, end - 4), min(26, end + 5)) if i != start]
    text = wording.format(n=NUMBER_WORDS[step], x=ascii_lowercase[start])
    return Drawn(text, ascii_lowercase[end], others(rng, around, (ascii_lowercase[end],)))


SUBJECTS: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        alphabet,
        capitals,
        exports,
        homes,
        opposites,
        pets,
        sequences,
        sums,
        timetable,
        trades,
        word_groups,
    )
}
