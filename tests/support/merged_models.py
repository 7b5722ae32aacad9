"""Models with planted clones, and merging written out: one token or one pair at a time."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertcut.checkpoints.build import BuildOptions, Built, choose_groups, merge
from expertcut.checkpoints.merge_edit import Experts
from expertcut.checkpoints.tensor_names import find_disk_blocks
from expertcut.data import Quiz, Selection, load_quiz
from expertcut.edits.edit_settings import MergeSettings
from expertcut.edits.plan import EditPlan
from expertcut.models.hooks import Routing, observe_routers
from expertcut.models.load import LoadOptions, MoeModel
from expertcut.models.moe_block import MoeBlock
from expertcut.models.safetensors_index import read_headers
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.scoring.packing import encode
from tests.conftest import open_model

AS_IS = BuildOptions(LoadOptions())
UNASKED = BuildOptions(LoadOptions(), is_verified=False)
Groups = set[frozenset[int]]


def measured(model: Path, quiz_folder: Path, folder: Path, **options: Any) -> Profile:
    """A profile of two questions of each subject, one shot."""
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=1, limit=2))
    moe = open_model(model)
    list(Measurement(moe, quiz, 2, MeasureOptions(**options)).run(folder))
    return load_profile(folder)


class Merged(NamedTuple):
    """The checkpoint, and the groups that it was made of."""

    built: Built
    draft: EditPlan


def merged(
    profile: Profile, folder: Path, asked: MergeSettings, options: BuildOptions = AS_IS
) -> Merged:
    plan = choose_groups(profile, asked, folder, options.load_as)
    return Merged(merge(profile, asked, plan, folder, options), plan)


def with_clones(
    base: Path, folder: Path, pairs: Sequence[tuple[int, int]], *, is_shuffled: bool, seed: int = 0
) -> Path:
    """The same model in which, in each layer, the second of each pair has the first's weights.

    With `is_shuffled` its neurons stand in another order. Routers stay as they are.
    """
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    headers, weights = read_headers(folder), load_file(folder / "model.safetensors")
    torch.manual_seed(seed)
    for block in find_disk_blocks(headers).values():
        experts = Experts(headers, block, is_interleaved="gate_up_proj" in str(block.fused))
        for first, second in pairs:
            n_neurons = next(len(rows) for rows in experts.neurons(first) if len(rows))
            order_I = torch.randperm(n_neurons) if is_shuffled else torch.arange(n_neurons)
            targets = experts.tensors(second)
            for kind, tensor in experts.tensors(first).items():
                values = tensor.neurons.reordered(tensor.read(), order_I)
                if block.fused:
                    weights[kind][second] = values
                else:
                    weights[block.by_expert[second][kind]] = values
            assert targets
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rewritten(folder: Path, change: Any) -> Path:
    """Tensors changed in place by `change(weights)`, by their names on disk."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def router_inputs(moe: MoeModel, quiz: Quiz) -> dict[int, Tensor]:
    """What each layer's router reads at every token of every prompt, one prompt at a time."""
    found: dict[int, list[Tensor]] = {block.layer: [] for block in moe.blocks}
    for routing in routings(moe, quiz, is_repeating=True):
        found[routing.layer].append(routing.input_TD)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@torch.inference_mode()
def routings(moe: MoeModel, quiz: Quiz, *, is_repeating: bool) -> Iterator[Routing]:
    """Every router's doing, prompt by prompt; without `is_repeating` shared tokens come once."""
    seen: list[Routing] = []
    for subject, questions in quiz.questions.items():
        encoded = encode(moe.tokenizer, questions, quiz.shots_by_subject[subject])
        for position, ids in enumerate(encoded.prompts):
            skipped = 0 if is_repeating or position == 0 else encoded.shared_prefix()
            with observe_routers(moe.blocks, seen.append):
                moe.model(input_ids=torch.tensor([ids]), use_cache=False)
            for r in seen:
                tensors = (r.input_TD, r.logits_TE, r.weights_TK, r.experts_TK)
                yield Routing(r.layer, *(t[skipped:].clone() for t in tensors))
            seen.clear()


@torch.inference_mode()
def block_output(block: MoeBlock, x_TD: Tensor) -> Tensor:
    found = block.module(x_TD[None])
    result: Tensor = (found[0] if isinstance(found, tuple) else found)[0]
    return result


def groups_of(edit: Any) -> Groups:
    several = {frozenset(members) for members in (edit.merged or {}).values()}
    alone = {frozenset([e]) for e in edit.keep if e not in (edit.merged or {})}
    return several | alone


def m_smoe_by_hand(
    logits_TE: Tensor, tokens: Sequence[float], ids: Sequence[int], n: int
) -> Groups:
    """Dominant experts and whom each other one joins, cosines over tokens one by one."""
    order = sorted(ids, key=lambda e: (-tokens[e], e))
    groups = {e: {e} for e in order[:n]}
    rows = logits_TE.double().tolist()
    for e in order[n:]:
        likeness = {}
        for dominant in groups:
            dot = sum(row[e] * row[dominant] for row in rows)
            lengths = sum(row[e] ** 2 for row in rows) * sum(row[dominant] ** 2 for row in rows)
            likeness[dominant] = dot / lengths**0.5
        groups[max(likeness, key=lambda d: likeness[d])].add(e)
    return {frozenset(group) for group in groups.values()}


def hc_smoe_by_hand(mean_ED: "np.ndarray[Any, Any]", ids: Sequence[int], n: int) -> Groups:
    """The two clusters with the smallest mean distance join, until n are left."""
    clusters = [frozenset([e]) for e in ids]
    while len(clusters) > n:
        distance = {
            (a, b): np.mean([np.linalg.norm(mean_ED[i] - mean_ED[j]) for i in a for j in b])
            for a, b in combinations(clusters, 2)
        }
        a, b = min(distance, key=lambda pair: distance[pair])
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    return set(clusters)


def averaged_by_hand(
    weights: Mapping[str, Tensor], names: Sequence[Mapping[str, str]], shares: Mapping[int, float]
) -> dict[str, Tensor]:
    """Σ share · weight of each kind of tensor, neurons as they stand."""
    return {
        kind: sum(weights[names[e][kind]].double() * share for e, share in shares.items())  # type: ignore[misc]
        for kind in names[0]
    }
