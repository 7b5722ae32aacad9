"""Sequential calibration: a layer is scored with the layers before it already cut.

As llm-compressor does, the choice of layer l + 1 sees the damage of layer l. Layer after layer, the
calibration questions run on from the stored outputs of the decoder layers before, which are cut as
the checkpoint will be. What does not fit in memory runs from the start: slower, the same numbers.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertcut.checkpoints.build import fit_edits
from expertcut.checkpoints.edit import Edit, simulated
from expertcut.edits.criteria import (
    CRITERIA,
    after_removals,
    all_tokens,
    calibration_inputs,
    ranked,
)
from expertcut.edits.plan import BlockEdit, EditPlan
from expertcut.edits.selection import Ranking, cut
from expertcut.edits.splits import profiled_on, questions_for
from expertcut.models import hooks
from expertcut.models.devices import free_bytes, runs_on
from expertcut.models.kernels import Known
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.blend import Blend
from expertcut.profiling.recorder import NAMES, TokenSums, check_finite
from expertcut.profiling.schema import CHUNK_QUESTIONS
from expertcut.profiling.statistics import LayerSums
from expertcut.profiling.storage import Profile
from expertcut.scoring.engine import Engine
from expertcut.scoring.packing import Encoded, EncodedRows, Pass
from expertcut.scoring.passes import Decoders
from expertcut.stats import Array

logger = logging.getLogger(__name__)

_CHECKED_PROMPTS = 2
Outputs = dict[int, tuple[Tensor, Tensor]]  # of one pass, as `kernels.Known`


def rank_sequentially(
    profile: Profile,
    ranking: Ranking,
    n_keep: int,
    engine: Engine,
    kept_bytes: int | None = None,
) -> Ranking:
    """The ranking with every layer scored after the layers before it were cut to `n_keep`.

    No layer is cut before the first, which keeps its scores. Up to `kept_bytes` of outputs of
    decoder layers are stored, by default half of the free memory. A blend runs on what each of its
    domains was profiled on, with the weights of the blend.
    """
    by, n_layers = CRITERIA[ranking.settings.by], len(ranking.blocks)
    relays: list[Relay] = []
    if by.needs == "profile":
        if kept_bytes is None:
            kept_bytes = free_bytes(engine.moe.device) // 2
        for part in profile.parts:
            chunks = list(calibration_chunks(part, engine))
            relays.append(relay(engine, chunks, kept_bytes // len(profile.parts)))
        n_asked = sum(len(chunk) for own in relays for chunk in own.chunks)
        engine.n_scored, engine.n_asked = 0, (n_layers - 1) * n_asked
    edits: list[Edit] = []
    for layer in range(1, n_layers):
        edits += _cut_of_layer(profile, cut(ranking, n_keep).draft, layer - 1, engine)
        block, before = engine.moe.blocks[layer], profile.layers[layer]
        with simulated(engine.moe, edits, is_as_written=True):
            if relays:
                sums = _weighed(profile, [own.sums(layer) for own in relays])
                score_E = by.of_layer(_with_sums(before, sums), "all")
            else:
                x_TD = calibration_inputs(profile, engine)[layer]
                score_E = after_removals(profile, by, block, x_TD)
        scores, orders = [*ranking.scores], [*ranking.orders]
        scores[layer], orders[layer] = score_E, ranked(score_E, before.alpha_mean_E)
        ranking = replace(ranking, scores=tuple(scores), orders=tuple(orders))
    engine.n_asked = 0
    return ranking


def calibration_chunks(profile: Profile, engine: Engine) -> Iterator[Encoded]:
    """The questions or rows of a profile that are not held out, in chunks as it was measured."""
    for encoded in engine.encode_all(profiled_on(profile)):
        for start in range(0, len(encoded), CHUNK_QUESTIONS):
            yield encoded.part(range(start, min(start + CHUNK_QUESTIONS, len(encoded))))


def _cut_of_layer(profile: Profile, draft: EditPlan, layer: int, engine: Engine) -> list[Edit]:
    """The cut of one layer alone, with what its layout stores in place of the removed experts."""
    blocks = profile.info.model.blocks
    whole = {block.name: BlockEdit(keep=tuple(range(block.experts))) for block in blocks}
    name = blocks[layer].name
    alone = replace(draft, edits={**whole, name: draft.edits[name]})
    questions = questions_for(profile, is_fitting=draft.asks_tuning, used=draft.used)
    return fit_edits(profile, alone, questions, engine)


def _weighed(profile: Profile, sums_D: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """The sums of a profile, weighed as in its blend."""
    if not isinstance(profile, Blend):
        return sums_D[0]
    return {name: profile.weighed([own[name] for own in sums_D]) for name in NAMES}


def _with_sums(layer: LayerSums, sums: dict[str, Array]) -> LayerSums:
    """The statistics with measured sums in place of the profile's, where it has them."""
    before, n_experts = all_tokens(layer), layer.n_experts
    own: dict[str, Any] = {
        field.name: sums[field.name.removesuffix("_E")][:n_experts]
        for field in fields(before)
        if getattr(before, field.name) is not None
    }
    return replace(layer, over_tokens=replace(before, **own))


class Relay:
    """Chunks that run layer after layer; each run starts from what the run before it stored.

    A layer runs twice: as it is, and cut. In the second run its attention and the outputs of its
    experts are given: an expert runs only on tokens that come to it from removed ones. Of an
    expert's outputs every `every`-th is given, none for 0.
    """

    def __init__(
        self, engine: Engine, chunks: Sequence[Encoded], kept_bytes: int, *, every: int = 1
    ) -> None:
        self.engine, self.chunks, self.kept_bytes = engine, chunks, kept_bytes
        self.decoders = Decoders(engine.moe.model, engine.moe.blocks)
        self.every = every
        self.number = 0  # of the decoder layer whose inputs are stored
        self.stored = [_Stored([], [], []) for _ in chunks]

    def sums(self, layer: int) -> dict[str, Array]:
        """All-token sums (E,) of a MoE block by name, as if every prompt had run alone.

        Layers come in ascending order; what changes those before stays as it is.
        """
        block, number = self.engine.moe.blocks[layer], self.decoders.number_of.get(layer, 0)
        room, total_AE = self.kept_bytes, np.zeros(())
        for place, chunk in enumerate(self.chunks):
            stored = _Stored([], [], [])
            with ExitStack() as stack:
                if number and self.kept_bytes:
                    self._resume(stack, self.stored[place])
                    stack.enter_context(self.decoders.storing(number, stored.inputs))
                    stack.enter_context(self.decoders.storing_attention(block, stored.attention))
                    stack.enter_context(self.decoders.ending_at(number))
                outputs = stored.outputs if self.every else None
                total_AE = total_AE + _sums(self.engine, chunk, [block], outputs)[:, layer]
            self.stored[place] = stored.within(room)
            room -= self.stored[place].size_bytes
        self.number, self.block, self.state = number, block, _state(block)
        return dict(zip(NAMES, total_AE, strict=True))

    def _resume(self, stack: ExitStack, stored: "_Stored") -> None:
        """Starts from what is stored: all before the MoE block of the layer measured last."""
        n_passes = len(stored.inputs)
        if not n_passes:
            return
        stack.enter_context(self.decoders.starting_at(self.number, stored.inputs))
        if len(stored.attention) == n_passes:
            stack.enter_context(self.decoders.given_attention(self.number, stored.attention))
        # A cut may change the experts too: as rescaled, or as constants.
        if len(stored.outputs) == n_passes and _state(self.block) == self.state:
            every = self.every
            known: Iterator[Known] = (
                {
                    expert: (own_M[::every], own_MD[::every])
                    for expert, (own_M, own_MD) in by_expert.items()
                }
                for by_expert in stored.outputs
            )
            stack.enter_context(hooks.given_outputs(self.block, known))


@dataclass(frozen=True)
class _Stored:
    """Pass by pass: inputs of a decoder layer, outputs of its attention and of its experts."""

    inputs: list[Any]
    attention: list[Any]
    outputs: list[Outputs]

    @property
    def size_bytes(self) -> int:
        outputs = [part for by_expert in self.outputs for part in by_expert.values()]
        return sum(map(_size_bytes, [*self.inputs, *self.attention, *outputs]))

    def within(self, room: int) -> "_Stored":
        """What fits: all, less and less of it, or nothing."""
        tries = [self, _Stored(self.inputs, self.attention, []), _Stored(self.inputs, [], [])]
        tries.append(_Stored([], [], []))
        return next(own for own in tries if own.size_bytes <= max(room, 0))


def _state(block: MoeBlock) -> tuple[Any, ...]:
    """Equal as long as the experts compute the same."""
    places = (parameter.data_ptr() for parameter in block.experts.parameters())
    return (hooks.own_forward(block.experts), *places)


def relay(engine: Engine, chunks: Sequence[Encoded], kept_bytes: int) -> Relay:
    """A relay that stores up to `kept_bytes`; nothing where layers compute other bits alone."""
    few = chunks[0].part(range(min(_CHECKED_PROMPTS, len(chunks[0]))))
    # The trial is given half of the outputs, and computes the others in smaller products.
    for every in (1, 0) if kept_bytes else ():
        if _is_exact(Relay(engine, [few], kept_bytes, every=2 * every)):
            return Relay(engine, chunks, kept_bytes, every=every)
    if kept_bytes:
        logger.warning("layers do not compute the same bits alone: each run starts at layer 0")
    return Relay(engine, chunks, 0)


def _is_exact(trial: Relay) -> bool:
    """Whether its chunk has the same sums layer after layer as in one run of the model."""
    engine = trial.engine
    config, blocks = engine.moe.model.config.get_text_config(decoder=True), engine.moe.blocks
    if getattr(config, "num_kv_shared_layers", None):
        return False  # layers that read the keys of others cannot run without them
    together_ALE = _sums(engine, trial.chunks[0], blocks)
    alone = [list(trial.sums(block.layer).values()) for block in blocks]
    return np.array_equal(np.stack(alone, axis=1), together_ALE)


def _sums(
    engine: Engine,
    chunk: Encoded,
    blocks: Sequence[MoeBlock],
    outputs: list[Outputs] | None = None,
) -> Array:
    """All-token sums (A, L, E) of a chunk in the order of `NAMES`, 0 for other blocks.

    `outputs` gets what the experts give in each pass.
    """
    moe = engine.moe
    n_experts, device = max(b.n_experts for b in moe.blocks), runs_on(moe.blocks[0].router)
    tokens = TokenSums(moe.blocks, n_experts, device)
    valid_T: Tensor | None = None

    def begin(step: Pass) -> None:
        nonlocal valid_T
        valid_T = None if step.valid_T is None else step.valid_T.to(device)
        if isinstance(chunk, EncodedRows):  # --assistant-only counts some tokens
            valid_T = chunk.of_pass(step)[1].to(device)
        tokens.begin(0 if step.is_prefix else 1)
        if outputs is not None:
            outputs.append({})

    def store(call: hooks.ExpertCall) -> None:
        if outputs is not None:
            outputs[-1][call.expert] = call.tokens_M, call.output_MD

    def route(routing: hooks.Routing) -> None:
        tokens.route(routing.on(device), valid_T)

    experts = tokens.listening(blocks, lambda: valid_T, store)
    observers = [hooks.observe_routers(blocks, route), experts]
    with hooks.registered(observers):
        engine.run(chunk, begin)
    prefix_ALE, question_ALE = tokens.sums[:, :2].cpu().numpy().swapaxes(0, 1)
    sums_ALE: Array = len(chunk) * prefix_ALE + question_ALE
    named = {f"{name}_LE": sum_LE for name, sum_LE in zip(NAMES, sums_ALE, strict=True)}
    check_finite(moe, "calibration, with the layers before cut", named)
    return sums_ALE


def _size_bytes(output: Any) -> int:
    """Bytes of the tensors in the output of a decoder layer."""
    parts = output if isinstance(output, tuple | list) else [output]
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
