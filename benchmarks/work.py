"""How much a chunk asks of a model of OLMoE's form: operations that cannot be avoided."""

from collections.abc import Sequence
from dataclasses import dataclass

from expertcut.scoring.packing import Encoded


@dataclass(frozen=True)
class Shape:
    """The sizes that operations are counted from."""

    width: int
    inner: int
    layers: int
    experts: int
    top_k: int
    words: int

    @property
    def attention_weights(self) -> int:
        """Operations of the four projections of one layer for one token."""
        return 2 * 4 * self.width**2

    @property
    def expert_weights(self) -> int:
        """Of the router and of the chosen experts of one layer for one token."""
        return 2 * (self.width * self.experts + self.top_k * 3 * self.width * self.inner)

    def pair(self) -> int:
        """Of one query and one key in one layer, all heads: their product and the weighted sum."""
        return 4 * self.width


@dataclass(frozen=True)
class Work:
    """Operations of one chunk by part, and its distinct tokens.

    Weights count once per distinct token. A token of the prefix attends to what stands before it
    and to itself, a question's token to the prefix, what stands before it in its question, and
    itself. In the last layer only answers need queries' attention, the router and experts.
    """

    tokens: int
    projections: int
    attention: int
    experts: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.projections + self.attention + self.experts + self.head

    def __add__(self, other: "Work") -> "Work":
        return Work(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def count(shape: Shape, encoded: Encoded, *, keeps_all: bool) -> Work:
    """The operations of one chunk; `keeps_all` where the last layer runs for every token too."""
    n_prefix = encoded.shared_prefix()
    lengths = [len(ids) - n_prefix for ids in encoded.prompts]
    tokens, answers = n_prefix + sum(lengths), len(lengths)
    pairs = _before(n_prefix) + sum(n_prefix * n + _before(n) for n in lengths)
    last_pairs = pairs if keeps_all else sum(n_prefix + n for n in lengths)
    last_tokens = tokens if keeps_all else answers
    early = shape.layers - 1
    return Work(
        tokens=tokens,
        projections=tokens * shape.layers * shape.attention_weights,
        attention=shape.pair() * (early * pairs + last_pairs),
        experts=shape.expert_weights * (early * tokens + last_tokens),
        head=2 * answers * shape.width * shape.words,
    )


def total(shape: Shape, chunks: Sequence[Encoded], *, keeps_all: bool) -> Work:
    """Of several chunks."""
    works = [count(shape, encoded, keeps_all=keeps_all) for encoded in chunks]
    return sum(works[1:], works[0])


def _before(n: int) -> int:
    return n * (n + 1) // 2
