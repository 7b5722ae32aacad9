"""Measure a checkpoint on the quickstart quiz: accuracy per subject, and which experts fire.

    OMP_WAIT_POLICY=PASSIVE python measure.py --split test --shots 5 --ablate

A plain loop over right-padded prompts, independent of expertcut, so that the one can judge the
other. Weights are computed with in float32.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from make_quiz import LETTERS, Question
from texts import asked, header
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

BATCH = 50


class Measured(NamedTuple):
    """What one subject's questions gave; fired counts are tokens per layer and expert."""

    correct: int
    questions: int
    answer_LE: Tensor
    any_LE: Tensor


def read(path: Path) -> list[Question]:
    """Read a CSV file of the quiz."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Question(row[0], tuple(row[1:5]), row[5]) for row in csv.reader(file)]


def prompts(quiz: Path, subject: str, split: str, shots: int) -> list[tuple[str, str]]:
    """Write each question's prompt, and the letter that is right."""
    dev = read(quiz / "dev" / f"{subject}_dev.csv")[:shots]
    start = header(subject) + "".join(f"{asked(q)} {q.letter}\n\n" for q in dev)
    questions = read(quiz / split / f"{subject}_{split}.csv")
    return [(start + asked(q), q.letter) for q in questions]


@contextmanager
def routing(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the experts (T, K) chosen in each layer, in order, by every forward pass."""
    chosen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen.append(output[2])

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[None]:
    """Let the MoE blocks of these layers give zero."""
    blocks = [model.model.layers[i].mlp for i in layers]
    hooks = [b.register_forward_hook(lambda _m, _i, out: torch.zeros_like(out)) for b in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked_with: list[tuple[str, str]]
) -> Measured:
    """Score (prompt, letter) pairs: the letter's token after the prompt, the best of four."""
    letter_ids = [tokenizer(f" {letter}")["input_ids"][-1] for letter in LETTERS]
    n_layers, n_experts = model.config.num_hidden_layers, model.config.num_experts
    correct, answer_LE = 0, torch.zeros(n_layers, n_experts, dtype=torch.long)
    any_LE = torch.zeros_like(answer_LE)
    for first in range(0, len(asked_with), BATCH):
        part = asked_with[first : first + BATCH]
        encoded = tokenizer([p for p, _ in part], padding=True, return_tensors="pt")
        used_BT = encoded["attention_mask"].bool()
        last_B = used_BT.sum(1) - 1
        rows_B = torch.arange(len(part))
        with routing(model) as chosen:
            logits_BTV = model(**encoded).logits
        picked_B = logits_BTV[rows_B, last_B][:, letter_ids].argmax(1)
        correct += sum(LETTERS[i] == a for i, (_, a) in zip(picked_B.tolist(), part, strict=True))
        for layer, experts_TK in enumerate(chosen):
            experts_BTK = experts_TK.view(*used_BT.shape, -1)
            answer_LE[layer] += experts_BTK[rows_B, last_B].flatten().bincount(minlength=n_experts)
            any_LE[layer] += experts_BTK[used_BT].flatten().bincount(minlength=n_experts)
    return Measured(correct, len(asked_with), answer_LE, any_LE)


def report(results: dict[str, Measured]) -> Iterator[str]:
    """Write the lines of the tables."""
    for subject, m in results.items():
        yield f"{subject:20} {m.correct / m.questions:6.1%}"
    correct = sum(m.correct for m in results.values())
    questions = sum(m.questions for m in results.values())
    yield f"{'all':20} {correct / questions:6.1%} of {questions}"
    answer_LE = sum((m.answer_LE for m in results.values()), torch.tensor(0))
    any_LE = sum((m.any_LE for m in results.values()), torch.tensor(0))
    for layer, (answer_E, any_E) in enumerate(zip(answer_LE, any_LE, strict=True)):
        fired = f"{int((answer_E > 0).sum())} at the answer, {int((any_E > 0).sum())} anywhere"
        yield f"layer {layer}: experts that fire: {fired}, of {len(any_E)}"


def accuracy(results: dict[str, Measured]) -> float:
    """Of all subjects together."""
    return sum(m.correct for m in results.values()) / sum(m.questions for m in results.values())


def main() -> None:
    """Read the command line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Measure a checkpoint on the quickstart quiz.")
    parser.add_argument("--model", type=Path, default=here)
    parser.add_argument("--quiz", type=Path, default=here / "quiz")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--limit", type=int, help="questions of each subject; all without")
    parser.add_argument("--ablate", action="store_true", help="also without each MoE block")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    subjects = sorted(p.name.removesuffix("_dev.csv") for p in (args.quiz / "dev").glob("*.csv"))
    asked_with = {s: prompts(args.quiz, s, args.split, args.shots)[: args.limit] for s in subjects}

    def answered() -> dict[str, Measured]:
        return {s: measure(model, tokenizer, asked_with[s]) for s in subjects}

    sys.stdout.writelines(f"{line}\n" for line in report(answered()))
    layers = range(model.config.num_hidden_layers)
    for gone in [(i,) for i in layers] + [tuple(layers)] if args.ablate else []:
        with without(model, gone):
            found = accuracy(answered())
        print(f"without MoE block {', '.join(map(str, gone)):12} {found:6.1%}", flush=True)


if __name__ == "__main__":
    main()
