"""Free text of the quiz's world, in two domains that have few words in common.

    python stories.py --out text

writes `<domain>_<split>.jsonl`, a document a line. `people` states who lives where, does what and
sells what; `numbers` counts, adds and spells. The same seed writes the same bytes, and training
draws other documents by the same rules.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from string import ascii_lowercase

from rules import (
    BUSY_DAYS,
    CAPITAL,
    COUNTRIES,
    EXPORT,
    HOME,
    LARGEST_STEP,
    LARGEST_SUMMAND,
    PEOPLE,
    PET,
    TIMETABLE,
    TRADE,
)

SPLIT_SIZES = {"val": 400, "test": 400}  # documents of each domain
SENTENCES = (4, 8)
SEED = 20250218

Sentence = Callable[[Random], str]


def of_a_person(rng: Random) -> str:
    """Say what is known of somebody."""
    who = rng.choice(PEOPLE)
    return rng.choice(
        (
            f"{who} lives in {HOME[who]} and works as a {TRADE[who]}.",
            f"In {HOME[who]} everybody knows {who}, who keeps a {PET[who]}.",
            f"The {TRADE[who]} {who} never goes out without the {PET[who]}.",
        )
    )


def of_a_country(rng: Random) -> str:
    """Say what is known of a country."""
    where = rng.choice(COUNTRIES)
    return rng.choice(
        (
            f"{where} is ruled from {CAPITAL[where]}.",
            f"Ships full of {EXPORT[where]} leave {where} every spring.",
            f"Merchants of {CAPITAL[where]} in {where} sell {EXPORT[where]}.",
        )
    )


def of_a_week(rng: Random) -> str:
    """Say what somebody does on a day."""
    both = rng.choice(BUSY_DAYS)
    who, day = both.split()
    return rng.choice(
        (f"Every {day} {who} {TIMETABLE[both]}.", f"{who} always {TIMETABLE[both]} on {day}.")
    )


def of_a_sum(rng: Random) -> str:
    """State a sum."""
    a, b = rng.randint(5, LARGEST_SUMMAND), rng.randint(1, LARGEST_SUMMAND)
    return rng.choice((f"{a} plus {b} is {a + b}.", f"{a} and {b} make {a + b}."))


def of_a_sequence(rng: Random) -> str:
    """Count in equal steps."""
    start, step = rng.randint(1, LARGEST_SUMMAND), rng.randint(2, LARGEST_STEP)
    return f"By steps of {step}: {' '.join(str(start + i * step) for i in range(4))}."


def of_letters(rng: Random) -> str:
    """Spell a part of the alphabet."""
    first = rng.randrange(len(ascii_lowercase) - 4)
    return f"Letters in order: {' '.join(ascii_lowercase[first : first + 5])}."


DOMAINS: dict[str, tuple[Sentence, ...]] = {
    "people": (of_a_person, of_a_country, of_a_week),
    "numbers": (of_a_sum, of_a_sequence, of_letters),
}


def story(domain: str, rng: Random) -> str:
    """Draw a document of one domain."""
    n = rng.randint(*SENTENCES)
    return " ".join(rng.choice(DOMAINS[domain])(rng) for _ in range(n))


def stories(domain: str, seed: int = SEED) -> Iterator[tuple[str, str]]:
    """Yield (split, document) for all files of a domain, no document twice."""
    rng = Random(f"{seed} {domain}")
    seen: set[str] = set()
    for split, n in SPLIT_SIZES.items():
        last = len(seen) + n
        while len(seen) < last:
            text = story(domain, rng)
            if text not in seen:
                seen.add(text)
                yield split, text


def kept_back(seed: int = SEED) -> frozenset[str]:
    """Collect every document of the files: what training must not draw."""
    return frozenset(text for domain in DOMAINS for _, text in stories(domain, seed))


def write_stories(folder: Path, seed: int = SEED) -> None:
    """Write `folder/<domain>_<split>.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        lines: dict[str, list[str]] = {split: [] for split in SPLIT_SIZES}
        for split, text in stories(domain, seed):
            lines[split].append(json.dumps({"text": text}) + "\n")
        for split, of_split in lines.items():
            (folder / f"{domain}_{split}.jsonl").write_text("".join(of_split), encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write the free text of the quickstart's world.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "text")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    write_stories(args.out, args.seed)


if __name__ == "__main__":
    main()
