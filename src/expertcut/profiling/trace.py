"""A routing trace: the experts that every token was routed to, in the order of the tokens."""

from dataclasses import dataclass

from expertcut.stats import Array


@dataclass(frozen=True)
class Sequence:
    """One prompt or document, token by token.

    `experts_TLK` are ids, −1 where a place is empty; `token_T` token ids. The first `n_shared`
    tokens are the shots, which all sequences of its subject begin with. Gate weights and router
    logits are there if they were traced; K and E are those of the largest block.
    """

    experts_TLK: Array
    token_T: Array
    n_shared: int = 0
    weights_TLK: Array | None = None
    logits_TLE: Array | None = None

    def __len__(self) -> int:
        return len(self.token_T)
