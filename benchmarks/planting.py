"""The bundled checkpoint with one expert that gives noise, for benchmarks/planted.py."""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertcut.edits.reweight_select import SCORES, QuestionOutcomes, right
from expertcut.edits.router_edits import RouterEdit
from expertcut.evaluation.reweight_search import CachedScorer

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "quickstart"
QUIZ = BUNDLED / "quiz"
LAST = 3
NOISE = 300.0  # times the spread of the weights that it replaces


def copied(tensors: dict[str, Tensor], folder: Path) -> Path:
    """A checkpoint like the bundled one, with these weights."""
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(BUNDLED / name, folder)
    shutil.copy(BUNDLED / "tokenizer_config.json", folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bundled_weights() -> dict[str, Tensor]:
    """Every tensor of the bundled checkpoint by name."""
    return load_file(BUNDLED / "model.safetensors")


def cost(rescorer: CachedScorer, expert: int) -> float:
    """The accuracy that masking an expert of the last layer takes."""
    masked_N = right(
        rescorer.ask((RouterEdit(LAST, expert, -torch.inf),)), rescorer.records.answer_N
    )
    return float(rescorer.records.is_correct_N.mean() - masked_N.mean())


def saboteur(rescorer: CachedScorer) -> int:
    """An expert of the last layer in 20–80 % of questions that costs less than a point to mask.

    In the last layer noise reaches the answers of the questions that chose the expert, and no
    others. Of several the one with the most gate weight.
    """
    records = rescorer.records
    for expert in often(records):
        if abs(cost(rescorer, expert)) < 0.01:
            return expert
    raise LookupError("no expert of the last layer is in 20–80 % of questions and harmless to mask")


def often(records: QuestionOutcomes) -> list[int]:
    """Experts of the last layer in 20–80 % of questions, the most gate weight first."""
    n_experts = records.blocks[LAST].experts
    share_E, mass_E = (
        SCORES[name](records)[-n_experts:] for name in ("appearances", "contribution")
    )
    some = np.flatnonzero((share_E >= 0.2) & (share_E <= 0.8))
    return sorted(some.tolist(), key=lambda e: -mass_E[e] * share_E[e])


def sabotaged(tensors: dict[str, Tensor], expert: int, seed: int) -> dict[str, Tensor]:
    """The weights, one expert of the last layer made of strong noise."""
    dice, found = torch.Generator().manual_seed(seed), dict(tensors)
    for part in ("gate", "up", "down"):
        name = f"model.layers.{LAST}.mlp.experts.{expert}.{part}_proj.weight"
        found[name] = strong_noise(found[name], dice)
    return found


def strong_noise(weights: Tensor, dice: torch.Generator) -> Tensor:
    """In the place of weights, as an expert's are; no gate weight is too small to let it pass."""
    noise = torch.randn(weights.shape, generator=dice)
    return (NOISE * weights.float().std() * noise).to(weights.dtype)
