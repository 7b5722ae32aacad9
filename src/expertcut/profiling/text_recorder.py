"""Records what a profile stores of a chunk of texts: sums over tokens, and over next tokens."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expertcut.models import hooks
from expertcut.models.devices import runs_on
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.recorder import INPUT, NAMES, RESIDUAL, TokenSums
from expertcut.profiling.schema import Stats
from expertcut.profiling.storage import Arrays
from expertcut.scoring.next_tokens import NextTokens
from expertcut.scoring.packing import EncodedRows, Pass
from expertcut.scoring.passes import Layer

# Over all tokens, and over those of documents that are not held out; `TokenSums` numbers the parts.
PARTS = {"": 1, "calibration_": 2}
# Over the tokens routed to an expert whose next token is scored; `right` are those predicted.
NEXT = ("predicted", "right", "loss", "alpha", "alpha_right")
ROUTES = "routes_"  # names of what --layerwise keeps of a chunk until its losses are there
ALPHA = "probability"  # Σα over all tokens, routed to the expert or not


class TextRecorder:
    """The records of one chunk; with `stats` `none` only those of its rows."""

    def __init__(
        self,
        blocks: Sequence[MoeBlock],
        rows: EncodedRows,
        chooses: Sequence[bool],
        stats: Stats,
        *,
        has_loss: bool = True,
    ) -> None:
        self.blocks, self.rows, self.stats, self.has_loss = blocks, rows, stats, has_loss
        self.device = device = runs_on(blocks[0].router)
        n_experts = max(block.n_experts for block in blocks)
        self.tokens = TokenSums(blocks, n_experts, device)
        shape = (len(blocks), n_experts)
        kwargs: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.next_sums = torch.zeros(len(NEXT), 3, *shape, **kwargs)
        self.alpha_sums = torch.zeros(3, *shape, **kwargs)
        # Σ and Σ² by layer: entropy over the chosen experts, over all, probability by rank.
        n_places = max(block.n_places for block in blocks)
        self.moments = torch.zeros(2, len(blocks), 2 + n_places, **kwargs)
        self.by_row = torch.zeros(3, len(rows), dtype=torch.float64)  # scored, loss, right
        self.chooses_N = torch.tensor(chooses, dtype=torch.bool)
        self.layerwise: Layer | None = None  # then of all passes: experts and α of those chosen
        self.routes: dict[str, list[Tensor]] = {}
        self.n_tokens = 0  # of the passes so far

    def listening(self) -> AbstractContextManager[None]:
        """Hooks routers and experts."""
        if self.stats == "none":
            return hooks.registered([])
        routers = hooks.observe_routers(self.blocks, self._route)
        return hooks.registered([routers, self.tokens.listening(self.blocks, lambda: self.valid_T)])

    def begin(self, step: Pass) -> None:
        """Called before each forward pass."""
        _, counts_T = self.rows.of_pass(step)
        self.counts_T = counts_T.to(self.device)
        self.valid_T = None if bool(counts_T.all()) else self.counts_T
        self.tokens.begin(PARTS[""])
        chooses_T = self.chooses_N[step.question_T].to(self.device)
        self.tokens.mark(chooses_T)
        # Of each layer's tokens: experts and α of those chosen, until the losses are there.
        self.chosen: dict[int, tuple[Tensor, Tensor]] = {}
        if self.layerwise is not None and self.layerwise.is_last:
            self.chosen = self._routes_before(self.layerwise, len(step.question_T))
        self.before = [tensor.clone() for tensor in self._added()]

    def undo(self, _step: Pass) -> None:
        """Reverts the sums of the current pass."""
        for tensor, before in zip(self._added(), self.before, strict=True):
            tensor.copy_(before)

    def _added(self) -> list[Tensor]:
        own = [self.next_sums, self.alpha_sums, self.moments, self.by_row]
        return [*own, self.tokens.sums, self.tokens.largest]

    def _route(self, routing: hooks.Routing) -> None:
        routing = routing.on(self.device)
        block, layer = self.blocks[routing.layer], routing.layer
        alpha_TE = block.alpha(routing.logits_TE)
        place_TK = self.tokens.places(layer, routing.experts_TK)
        alpha_TK = F.pad(alpha_TE, (0, self.tokens.n_experts + 1 - block.n_experts)).gather(
            1, place_TK
        )
        self.chosen[layer] = place_TK, alpha_TK
        if self.layerwise is not None and self.has_loss:
            for name, kept in (("experts", place_TK.to(torch.int16)), ("alpha", alpha_TK)):
                self.routes.setdefault(f"{ROUTES}{name}_{layer}", []).append(kept)
        self.tokens.route(routing, self.valid_T)
        own = slice(block.n_experts)
        for part, counts_T in self._parts():
            self.alpha_sums[part, layer, own] += alpha_TE[counts_T].double().sum(dim=0)
        p_TK = alpha_TK[self.counts_T].double().sort(dim=1, descending=True).values
        p_TK = p_TK / p_TK.sum(dim=1, keepdim=True)
        p_TK = p_TK.nan_to_num(0.0)  # of a token without experts
        entropies = [entropy(p_TK), entropy(alpha_TE[self.counts_T].double())]
        values_TX = torch.cat([torch.stack(entropies, dim=1), p_TK], dim=1)
        n_own = values_TX.shape[1]
        self.moments[0, layer, :n_own] += values_TX.sum(dim=0)
        self.moments[1, layer, :n_own] += (values_TX**2).sum(dim=0)

    def _routes_before(self, layer: Layer, n_tokens: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Of each earlier layer's tokens of the pass, which is the next: experts and α."""
        at = slice(self.n_tokens, self.n_tokens + n_tokens)
        self.n_tokens = at.stop
        found = {}
        for block in self.blocks:
            names = [f"{ROUTES}{name}_{block.layer}" for name in ("experts", "alpha")]
            if names[0] in layer.before:
                experts_TK, alpha_TK = (torch.from_numpy(layer.before[name][at]) for name in names)
                found[block.layer] = experts_TK.long(), alpha_TK
        return found

    def _parts(self) -> list[tuple[int, Tensor]]:
        chooses_T = self.tokens.in_calibration_T
        assert chooses_T is not None, "begin sets it"
        counts_T = self.counts_T
        return [(PARTS[""], counts_T), (PARTS["calibration_"], counts_T & chooses_T)]

    def add(self, found: NextTokens) -> None:
        """Adds what the model predicted behind the tokens of the current pass."""
        values_QM = torch.stack(
            [torch.ones_like(found.loss_M), found.loss_M, found.is_right_M.float()]
        ).double()
        self.by_row.index_add_(1, found.row_M, values_QM)
        if self.stats == "none" or not len(found.at_M):
            return
        at_M, values_QM = found.at_M.to(self.device), values_QM.to(self.device)
        scored_M, loss_M, right_M = values_QM
        chooses_M = self.chooses_N[found.row_M].to(self.device)
        for layer, (experts_TK, alpha_TK) in self.chosen.items():
            experts_MK, alpha_MK = experts_TK[at_M], alpha_TK[at_M].double()
            nothing_MX = alpha_MK.new_zeros(len(at_M), self.next_sums.shape[-1] + 1)
            is_chosen_ME = nothing_MX.scatter(1, experts_MK, 1.0)[:, :-1]
            alpha_ME = nothing_MX.scatter(1, experts_MK, alpha_MK)[:, :-1]
            amounts = [is_chosen_ME * own_M[:, None] for own_M in (scored_M, right_M, loss_M)]
            amounts += [alpha_ME, alpha_ME * right_M[:, None]]
            for name, amount_ME in enumerate(amounts):
                self.next_sums[name, PARTS[""], layer] += amount_ME.sum(dim=0)
                chosen_E = amount_ME[chooses_M].sum(dim=0)
                self.next_sums[name, PARTS["calibration_"], layer] += chosen_E

    def arrays(self) -> Arrays:
        """The arrays of the chunk by their names on disk."""
        scored_N, loss_N, right_N = self.by_row
        kept = {"tokens_N": torch.tensor([int(c.sum()) for c in self.rows.counts])}
        if self.has_loss:
            kept |= {"scored_N": scored_N.int(), "right_N": right_N.int(), "loss_N": loss_N}
        if self.stats == "none":
            return {name: tensor.numpy() for name, tensor in kept.items()}
        kept["calibration_N"] = self.chooses_N.to(torch.uint8)
        kept["moments_2LX"] = self.moments
        left_out = set() if self.tokens.is_in_width else {INPUT}
        if any(block.residual is None for block in self.blocks):
            left_out.add(RESIDUAL)
        names_of_next = NEXT if self.has_loss else ()
        for prefix, part in PARTS.items():
            for name, sum_LE in zip(NAMES, self.tokens.sums[:, part], strict=True):
                if name not in left_out:
                    kept[f"{prefix}{name}_LE"] = sum_LE
            for name, sum_LE in zip(names_of_next, self.next_sums[:, part], strict=False):
                kept[f"{prefix}{name}_LE"] = sum_LE
            kept[f"{prefix}{ALPHA}_LE"] = self.alpha_sums[part]
            kept[f"{prefix}largest_LE"] = self.tokens.largest[part]
        kept |= {name: torch.cat(passes) for name, passes in self.routes.items()}
        return {name: tensor.cpu().numpy() for name, tensor in kept.items()}


def entropy(p_TE: Tensor) -> Tensor:
    """−Σ p ln p per token (T,), in nats; 0 ln 0 is 0."""
    entropy_T: Tensor = torch.special.entr(p_TE).sum(dim=1)
    return entropy_T
