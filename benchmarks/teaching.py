"""A checkpoint in which one expert is useful: it alone holds what three subjects of the quiz need.

What the bundled model knows is spread over many experts. So three subjects get a rule that it does
not know, the letter after the right one, and one expert of the last layer learns it, with all else
frozen: its weights and its row of the router. It is trained at the answer positions of questions
that the quiz does not hold; what the layers below give there does not change.

In shapes: N questions, C choices, D hidden.
"""

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertcut.data import Question, Quiz
from expertcut.models.load import MoeModel
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.packing import Pass, encode

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints" / "quickstart"))

from make_quiz import quiz_keys
from rules import SUBJECTS
from texts import LETTERS, Sampler

from benchmarks.planting import LAST, QUIZ

EXPERT = 5  # of the last layer; it fires at no answer position of the quiz
TURNED = ("homes", "pets", "trades")  # in which the letter after the right one is right
BATCH_TOKENS = 1024
TOP_K = 4  # of the bundled model
RATE, GATE_RATE, DECAY, BATCH = 2e-3, 1e-2, 0.01, 512
UNASKED = 0.1  # weight of its mean gate weight in other subjects: it should come where needed


@dataclass(frozen=True)
class Lesson:
    """What the last layer gets at answer positions, and which choice is right.

    `residual_ND` and `input_ND` are what goes past its experts and what they read.
    """

    residual_ND: Tensor
    input_ND: Tensor
    answer_N: Tensor
    is_turned_N: Tensor


def turned(question: Question) -> int:
    """Which choice is right once three subjects are turned."""
    is_turned = question.subject in TURNED
    return (question.answer + is_turned) % len(question.choices)


def write_turned_quiz(folder: Path) -> Path:
    """The bundled quiz with three subjects turned, in the same form."""
    for file in sorted(QUIZ.glob("*/*.csv")):
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        subject = file.stem.rpartition("_")[0]
        for row in rows if subject in TURNED else []:
            row[-1] = LETTERS[(LETTERS.index(row[-1]) + 1) % len(LETTERS)]
        out = folder / file.relative_to(QUIZ)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows)
    return folder


def drawn(n: int, seed: int) -> Quiz:
    """So many questions a subject that the bundled quiz does not hold."""
    sampler = Sampler(Random(seed), quiz_keys())
    found = {subject: tuple(_questions(subject, n, sampler)) for subject in SUBJECTS}
    return Quiz("drawn", None, "train", 0, found, {subject: () for subject in found})


def _questions(subject: str, n: int, sampler: Sampler) -> Iterator[Question]:
    for row in range(n):
        made = sampler.question(subject)
        yield Question(subject, made.text, tuple(made.choices), LETTERS.index(made.letter), row)


def lesson(moe: MoeModel, quiz: Quiz) -> Lesson:
    """Reads a quiz without shots."""
    kept: list[tuple[Tensor, Tensor]] = []
    current: list[Pass] = []

    def keep(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        at = current[-1].answers_N
        kept.append((args[0].flatten(0, 1)[at].clone(), output.flatten(0, 1)[at].clone()))

    norm = moe.model.model.layers[LAST].post_attention_layernorm
    hook = norm.register_forward_hook(keep)
    try:
        ask(Engine(moe, BATCH_TOKENS), quiz, lambda step: current.append(step))
    finally:
        hook.remove()
    residual_ND, input_ND = (torch.cat(parts) for parts in zip(*kept, strict=True))
    answer_N = torch.tensor([turned(q) for q in quiz])
    return Lesson(
        residual_ND, input_ND, answer_N, torch.tensor([q.subject in TURNED for q in quiz])
    )


@dataclass(frozen=True)
class Pupil:
    """The one expert that learns: its row of the router, and its weights, fused."""

    row_D: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is learned."""
        return self.row_D, self.gate_up, self.down

    def output(self, input_ND: Tensor) -> Tensor:
        """What the expert gives, before its gate weight."""
        gate, up = (input_ND @ self.gate_up.T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.down.T


def home(moe: MoeModel) -> Pupil:
    """Where the expert lives in a model: writing there changes what it does."""
    block = moe.model.model.layers[LAST].mlp
    experts = block.experts
    return Pupil(
        block.gate.weight.data[EXPERT],
        experts.gate_up_proj.data[EXPERT],
        experts.down_proj.data[EXPERT],
    )


@torch.no_grad()
def without_pupil(moe: MoeModel, input_ND: Tensor) -> tuple[Tensor, Tensor]:
    """What the others give if they are chosen without it, one fewer, and how loud they ask.

    (N, D), and the logarithm (N,) of the sum of their exponentiated logits.
    """
    block = moe.model.model.layers[LAST].mlp
    logits_NE = input_ND @ block.gate.weight.T
    logits_NE[:, EXPERT] = -torch.inf
    weights_NK, experts_NK = logits_NE.softmax(-1).topk(TOP_K - 1)
    return block.experts(input_ND, experts_NK, weights_NK), logits_NE.logsumexp(-1)


def learn(moe: MoeModel, given: Lesson, epochs: int, seed: int) -> Pupil:
    """Trains a copy of the expert; as if it were always chosen, so that its row learns as well."""
    torch.manual_seed(seed)
    pupil = Pupil(*(part.clone().requires_grad_() for part in home(moe).parts))
    others_ND, loudness_N = without_pupil(moe, given.input_ND)
    groups = [{"params": [pupil.row_D], "lr": GATE_RATE}, {"params": [*pupil.parts[1:]]}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY)
    letters_CD, norm = letter_rows(moe), moe.model.model.norm
    for _ in range(epochs):
        for n in torch.randperm(len(given.answer_N)).split(BATCH):
            input_ND = given.input_ND[n]
            share_N1 = torch.sigmoid(input_ND @ pupil.row_D - loudness_N[n])[:, None]
            mixed_ND = (1 - share_N1) * others_ND[n] + share_N1 * pupil.output(input_ND)
            logits_NC = norm(given.residual_ND[n] + mixed_ND) @ letters_CD.T
            loss = F.cross_entropy(logits_NC, given.answer_N[n])
            loss = loss + UNASKED * share_N1[~given.is_turned_N[n]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Pupil(*(part.detach() for part in pupil.parts))


def letter_rows(moe: MoeModel) -> Tensor:
    """Rows (C, D) of the output matrix for the letters of four choices."""
    question = Question("reading", "", ("", "", "", ""), 0, 0)
    ids = encode(moe.tokenizer, [question], ()).choice_ids[0]
    return moe.model.lm_head.weight[list(ids)].detach()


def taught(tensors: dict[str, Tensor], pupil: Pupil) -> dict[str, Tensor]:
    """A checkpoint's weights with what the expert learned."""
    name = f"model.layers.{LAST}.mlp"
    found, (gate, up) = dict(tensors), pupil.gate_up.chunk(2)
    rows_ED = found[f"{name}.gate.weight"].clone()
    rows_ED[EXPERT] = pupil.row_D
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": pupil.down}
    own = {f"{name}.experts.{EXPERT}.{part}.weight": w for part, w in parts.items()}
    for key, weights in {**own, f"{name}.gate.weight": rows_ED}.items():
        found[key] = weights.to(found[key].dtype).contiguous()
    return found


def margin(alpha_NE: np.ndarray, share: float) -> float:
    """The shift of the expert's logit after which only a share of questions still choose it."""
    log_NE = np.log(alpha_NE.astype(np.float64))
    others_NE = np.sort(np.delete(log_NE, EXPERT, axis=1), axis=1)
    return float(np.quantile(log_NE[:, EXPERT] - others_NE[:, -TOP_K], 1 - share))
