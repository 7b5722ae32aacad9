"""Several sources, each with its weight, as one sequence of rows in the order of training."""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch.utils.data import Dataset

from expertcut.healing.data.rows import Row

Shuffled = Callable[[random.Random], list[Row]]  # all rows of a source once, in a random order


@dataclass
class Part:
    """A source of rows: it begins anew, in another order, whenever it comes to an end."""

    name: str
    weight: float
    shuffled: Shuffled
    seed: int
    starts: list[int] = field(default_factory=lambda: [0])  # of the epochs known so far
    _epoch: int = -1
    _rows: list[Row] = field(default_factory=list)

    def row(self, nth: int) -> Row:
        """The nth row of all epochs."""
        while nth >= self.starts[-1]:
            self._open(len(self.starts) - 1)
            self.starts.append(self.starts[-1] + len(self._rows))
        epoch = bisect_right(self.starts, nth) - 1
        if epoch != self._epoch:
            self._open(epoch)
        return self._rows[nth - self.starts[epoch]]

    def _open(self, epoch: int) -> None:
        self._epoch = epoch
        self._rows = self.shuffled(random.Random(f"{self.seed}/{self.name}/{epoch}"))
        assert self._rows, "a source without rows is refused before"


@dataclass
class Rows(Dataset[tuple[int, Row]]):
    """`n_rows` rows of all parts in turn, each as often as its weight says; item i is (i, row)."""

    parts: Sequence[Part]
    n_rows: int

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, at: int) -> tuple[int, Row]:
        part, nth = self._order[at]
        return at, self.parts[part].row(nth)

    @cached_property
    def _order(self) -> list[tuple[int, int]]:
        """Whose turn it is: always that of the part that lags its share the most."""
        total = sum(part.weight for part in self.parts)
        shares = [part.weight / total for part in self.parts]
        counts = [0] * len(shares)
        order = []
        for at in range(1, self.n_rows + 1):
            lags = [share * at - count for share, count in zip(shares, counts, strict=True)]
            part = lags.index(max(lags))
            order.append((part, counts[part]))
            counts[part] += 1
        return order


@dataclass
class Fixed(Dataset[tuple[int, Row]]):
    """Rows in the order given: those held out. Their numbers go on from `first`."""

    rows: Sequence[Row]
    first: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> tuple[int, Row]:
        return self.first + at, self.rows[at]
