"""How near null experts in the router come to rule null: K further rows b·v of every gate.

    python -m benchmarks.null_rows checkpoints/quickstart

Rule null leaves out routed experts with a logit of at most b. A server that knows constant experts
could do the same with K rows whose logit is always b and whose experts give 0. The gate has no
bias, so b·v stands for it, with v·h ≈ 1 fitted as `reweight` does. Their softmax share is lost to
the true experts; `folded` gives the mean of it back to the experts' outputs, as layout stock does.
Prints differences of log p of the choices against the rule, on `test`; v and b are of `val`.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertcut.data import Selection, load_quiz
from expertcut.edits.calibrate import collect_routing, fit_directions
from expertcut.models.hooks import Routing, own_forward, replaced_forward
from expertcut.models.load import LoadOptions, find_source, load
from expertcut.models.moe_block import MoeBlock
from expertcut.models.routing_rule import RoutingRule
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.rerouting import Rerouting, rerouted

FORMS = ("always b", "b·v", "b·v, folded")


@dataclass
class NullRows:
    """Routers with K null rows; sums over tokens are by layer."""

    at: Mapping[int, float]
    directions: Mapping[int, Tensor] | None  # None: every null logit is exactly b
    factors: Mapping[int, float] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)  # Σ without and with null rows
    n_same: int = 0
    n_tokens: int = 0

    @contextmanager
    def running(self, blocks: tuple[MoeBlock, ...]) -> Iterator[None]:
        """Puts them into the model; nobody (id E) takes the place of a null expert."""
        with ExitStack() as stack:
            for block in blocks:
                forward = own_forward(block.router)

                def run(x: Tensor, block: MoeBlock = block, forward: Any = forward) -> Any:
                    return self.route(block, x, *forward(x))

                stack.enter_context(replaced_forward(block.router, run))
            yield

    def route(
        self, block: MoeBlock, x: Tensor, logits_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a router with null rows gives."""
        at, n_places = self.at[block.layer], experts_TK.shape[1]
        null_T = logits_TE.new_full((len(logits_TE),), at)
        if self.directions is not None:
            null_T = (at * (x.flatten(0, -2).double() @ self.directions[block.layer])).float()
        rows_TX = torch.cat([logits_TE, null_T[:, None].expand(-1, n_places)], dim=1)
        weights_TM, experts_TM = rows_TX.softmax(dim=1).topk(n_places, dim=1)
        is_null_TM = experts_TM >= block.n_experts
        weights_TM = weights_TM.masked_fill(is_null_TM, 0)
        alpha_TX = torch.nn.functional.pad(logits_TE.softmax(dim=1), (0, n_places))
        sums = torch.stack([alpha_TX.gather(1, experts_TM).sum(), weights_TM.sum()]).double()
        self.weights[block.layer] = self.weights.get(block.layer, 0) + sums
        n_rule_T = (logits_TE.gather(1, experts_TK) > at).sum(dim=1)
        self.n_same += int(((~is_null_TM).sum(dim=1) == n_rule_T).sum())
        self.n_tokens += len(n_rule_T)
        weights_TM = weights_TM * self.factors.get(block.layer, 1.0)
        return logits_TE, weights_TM, experts_TM.masked_fill(is_null_TM, block.n_experts)


def main() -> None:
    """Runs every form at two thresholds."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    engine = Engine(load(find_source(str(folder)), LoadOptions()), 4096)
    val, test = (
        load_quiz(Selection(str(folder / "quiz"), split, 1, limit=limit))
        for split, limit in (("val", 10), ("test", 20))
    )
    blocks = engine.moe.blocks
    found: dict[int, list[Tensor]] = {block.layer: [] for block in blocks}

    def see(routing: Routing, _is_answer_T: Tensor) -> None:
        chosen_TK = routing.logits_TE.gather(1, routing.experts_TK)
        found[routing.layer].append(chosen_TK.flatten().float())

    collect_routing(engine, val, found, see)
    directions, base_NC = fit_directions(engine, val, found), ask(engine, test)
    print(f"{len(val)} questions of val, {len(test)} of test, top-{blocks[0].top_k}")
    for share in (0.25, 0.5):
        at = {layer: float(torch.cat(own).quantile(share)) for layer, own in found.items()}
        with rerouted(blocks, Rerouting(RoutingRule(rule="null"), at)):
            rule_NC = ask(engine, test)
        say(f"a share of {share} left out: base", base_NC, rule_NC)
        for form in FORMS:
            nulls = NullRows(at, None if form == "always b" else directions)
            if form.endswith("folded"):
                with nulls.running(blocks):
                    ask(engine, val)
                factors = {layer: float(own[0] / own[1]) for layer, own in nulls.weights.items()}
                nulls = NullRows(at, directions, factors)
            with nulls.running(blocks):
                found_NC = ask(engine, test)
            same = f"as many experts for {nulls.n_same / nulls.n_tokens:.1%} of tokens"
            say(f"  {form}, {same}", found_NC, rule_NC)


def say(name: str, found_NC: Tensor, rule_NC: Tensor) -> None:
    """One line of differences."""
    shift_NC = (found_NC - rule_NC).abs()
    flipped = int((found_NC.argmax(dim=1) != rule_NC.argmax(dim=1)).sum())
    print(f"{name}: max {shift_NC.max():.2f}, median {shift_NC.median():.3f}, flipped {flipped}")


if __name__ == "__main__":
    main()
