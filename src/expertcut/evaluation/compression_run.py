"""What `compress` runs the model for: errors of options, and plans scored side by side.

U units are the experts of all layers, O options.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertcut import stats
from expertcut.checkpoints.build import engine_as_profiled
from expertcut.checkpoints.compression_problem import CompressionProblem, Options, errors_of, start
from expertcut.checkpoints.edit import simulated
from expertcut.checkpoints.shards import read_tensor
from expertcut.checkpoints.size import size
from expertcut.checkpoints.text_check import JudgedRows
from expertcut.data import Quiz
from expertcut.data.corpus import CalibrationSet, Corpus, as_quiz, hash_lines
from expertcut.edits import compression_error
from expertcut.edits.calibrate import sample_inputs
from expertcut.edits.compression import (
    COMPRESSION_FILE,
    CompressionFile,
    CompressionQuestion,
    PeerScore,
    load_compression,
)
from expertcut.edits.compression_error import Inputs
from expertcut.edits.edit_settings import CompressSettings
from expertcut.errors import ContractError
from expertcut.evaluation import search_results as schema
from expertcut.evaluation.ablation import observed
from expertcut.evaluation.ablation_effects import ablations_of
from expertcut.evaluation.cell_search import CellSearch, Step
from expertcut.evaluation.results import ChosenOnResult, Scoring, profile_hash
from expertcut.evaluation.sweep_judges import TextScoring, judge_of, pooled
from expertcut.models.expert_matrices import matrices
from expertcut.models.hooks import registered
from expertcut.models.moe_block import MoeBlock
from expertcut.profiling.measure import MeasureOptions
from expertcut.profiling.storage import Profile
from expertcut.profiling.workers import Progress
from expertcut.scoring.engine import Engine, ask
from expertcut.scoring.passes import OnPass, ignore
from expertcut.stats import Array

NOISE_SIZES = (0.25, 0.5)  # of each token's output of a block
_LEAST_SLOPE = 0.01  # of the largest: noise may help by chance
OnPart = Callable[[int, int], None]


def stored_inputs(problem: CompressionProblem, engine: Engine) -> Inputs:
    """Inputs of all blocks at the tokens that errors are measured on."""
    return sample_inputs(engine, problem.calibration.questions.tuning)


def measure(
    problem: CompressionProblem, engine: Engine, inputs: Inputs, on_part: OnPart
) -> CompressionFile:
    """`compress.json` without a choice: errors as shares of each block's output, weighed."""
    tuning = problem.calibration.questions.tuning
    check_matrices(problem, engine)
    found = compression_error.option_errors(
        engine, inputs, problem.menu, problem.dtype, problem.group_size, on_part,
        is_ggml=problem.settings.loader == "llama.cpp",
    )  # fmt: skip
    weight_L = 1 / found.energy_L
    if problem.settings.weigh == "answers":
        weight_L = weight_L * noise_slopes(engine, tuning)
    error_UO = (found.error_LEO * weight_L[:, None, None])[problem.layer_U, problem.expert_U]
    return CompressionFile(
        asked=CompressionQuestion(
            options=",".join(map(str, problem.menu)),
            grain=problem.settings.grain_taken,
            group_size=problem.group_size,
            tokens=found.tokens,
            questions=len(tuning),
            fingerprint=problem.source.fingerprint,
            weigh=problem.settings.weigh,
            is_ggml=problem.settings.loader == "llama.cpp",
        ),
        units=problem.units,
        options=tuple(map(str, problem.menu)),
        error=tuple(map(tuple, error_UO.tolist())),
        bytes=tuple(map(tuple, problem.bytes_UO.tolist())),
        weights=tuple(weight_L.tolist()),
    )


def noise_slopes(engine: Engine, tuning: CalibrationSet) -> Array:
    """By layer the loss of log p by relative block noise: one run at each of two sizes.

    The least squares of the losses over the squared sizes, through 0; of the questions that choose,
    for those held out judge.
    """
    runs, squares = ablations_of(engine, tuning), np.square(NOISE_SIZES)
    slope_L = np.zeros(len(engine.moe.blocks))
    for block in engine.moe.blocks:
        expert = schema.SampledExpert(layer=block.layer, row=0, expert=0)
        losses = [
            runs.effect(expert, with_noise(block, size), is_masked=False).logprob
            for size in NOISE_SIZES
        ]
        slope_L[block.layer] = squares @ losses / (squares @ squares)
    if not slope_L.max() > 0:
        raise ContractError(
            "noise in no block makes answers worse, so they cannot weigh layers: take --weigh "
            "output"
        )
    return np.asarray(np.maximum(slope_L, _LEAST_SLOPE * slope_L.max()))


@contextmanager
def with_noise(block: MoeBlock, size: float) -> Iterator[OnPass]:
    """Random directions added to a block's output, each token's `size` times as long as it."""
    generator = torch.Generator().manual_seed(0)

    def add(_module: Any, _args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        noise = torch.randn(y.shape, generator=generator).to(y)
        length = y.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        y = y + size * length * noise
        return (y, *output[1:]) if isinstance(output, tuple) else y

    with registered([block.module.register_forward_hook(add)]):
        yield ignore


def check_matrices(problem: CompressionProblem, engine: Engine) -> None:
    """Raises ContractError unless the loaded matrices of some experts are those on disk."""
    for block in engine.moe.blocks:
        for expert in {0, block.n_experts - 1}:
            loaded = matrices(block, expert)
            for name, own in problem.tensors(block.name, expert).items():
                stored_RC = read_tensor(problem.source.headers[own])
                matrix_RC = loaded[name]
                is_same = matrix_RC.shape == stored_RC.shape
                if not is_same or not torch.equal(matrix_RC.cpu(), stored_RC.to(matrix_RC.dtype)):
                    raise ContractError(
                        f"{own} is not the {name} matrix of expert {expert} of {block.name} as it "
                        "is loaded: this form is not supported"
                    )


def block_errors(
    problem: CompressionProblem,
    engine: Engine,
    inputs: Inputs,
    file: CompressionFile,
    chosen: Options,
) -> list[float]:
    """The error of each block with all its options at once, weighed as those of single experts."""
    blocks, edit = engine.moe.blocks, problem.edit(chosen.option_U, engine)
    before = compression_error.block_outputs(blocks, inputs)
    with simulated(engine.moe, [edit], is_as_written=False):
        after = compression_error.block_outputs(blocks, inputs)
    return [
        float((before[b.layer] - after[b.layer]).square().sum() / len(before[b.layer]) * weight)
        for b, weight in zip(blocks, file.weights, strict=True)
    ]


def score_peers(
    problem: CompressionProblem, engine: Engine, peers: Mapping[str, Options], on_part: OnPart
) -> tuple[PeerScore, ...]:
    """The unedited model and each choice on what is held out."""
    held_out = problem.calibration.questions.held_out
    scorer: _QuizScorer | _TextScorer
    if isinstance(held_out, Corpus):
        scorer = _TextScorer(engine, held_out)
    else:
        scorer = _QuizScorer(engine, as_quiz(held_out))
    size_bytes = sum(file.stat().st_size for file in problem.source.weight_files)
    found = [PeerScore(plan="base", bytes=size_bytes, **scorer.base())]
    on_part(1, len(peers) + 1)
    for name, choice in peers.items():
        edit = problem.edit(choice.option_U, engine)
        with simulated(engine.moe, [edit], is_as_written=False) as begin:
            own = scorer.compared(begin)
        bits = problem.mean_bits(choice.option_U)
        found.append(PeerScore(plan=name, bits=bits, bytes=choice.size_bytes, **own))
        on_part(len(found), len(peers) + 1)
    return tuple(found)


class _QuizScorer:
    """Answers of a quiz, beside those of the unedited model."""

    def __init__(self, engine: Engine, quiz: Quiz) -> None:
        self.engine, self.quiz = engine, quiz
        self.answer_N = np.array([question.answer for question in quiz])
        self.base_NC = ask(engine, quiz).numpy()

    def base(self) -> dict[str, Any]:
        """Mean log p of the right answers."""
        return {"logprob": self._logprob(self.base_NC)}

    def compared(self, begin: OnPass) -> dict[str, Any]:
        """The same, and how far answers moved."""
        logprob_NC = ask(self.engine, self.quiz, begin).numpy()
        _, median = stats.logprob_shift(self.base_NC, logprob_NC, np.float64)
        flipped = int((self.base_NC.argmax(axis=1) != logprob_NC.argmax(axis=1)).sum())
        return {
            "logprob": self._logprob(logprob_NC),
            "flipped": flipped,
            "median_abs_logprob_diff": median,
        }

    def _logprob(self, logprob_NC: Array) -> float:
        return float(stats.right_logprobs(logprob_NC, self.answer_N).mean(dtype=np.float64))


class _TextScorer:
    """Losses of texts, beside those of the unedited model."""

    def __init__(self, engine: Engine, corpus: Corpus) -> None:
        self.texts = JudgedRows(engine, corpus)
        self.first, _ = self.texts.read_base()

    def base(self) -> dict[str, Any]:
        """Mean log p of next tokens."""
        sums = pooled(self.texts.by_document(self.first))
        return {"logprob": float(-sums["loss"].sum() / sums["scored"].sum())}

    def compared(self, begin: OnPass) -> dict[str, Any]:
        """The same, and how far predictions moved."""
        sums = pooled(self.texts.by_document(self.texts.read(begin, self.first)))
        n = sums["scored"].sum()
        return {
            "logprob": float(-sums["loss"].sum() / n),
            "top1_agreement": float(sums["agrees"].sum() / n),
            "kl": max(0.0, float(sums["kl"].sum() / n)),
        }


class CompressionSweepRun(CellSearch[schema.CompressionSweep]):
    """A sweep over sizes of one profiled model; `sweep` holds the finished cells."""

    file_name = schema.COMPRESSION_SWEEP_FILE

    def __init__(
        self,
        profile: Profile,
        settings: CompressSettings,
        scoring: Scoring | TextScoring,
        folder: Path,
        on_part: OnPart,
    ) -> None:
        file, self.problem = start(profile, settings)
        self.problem.check_budget()
        measured = profile.info.settings
        self.waits = scoring.options.waits
        self.engine = engine_as_profiled(profile, self.problem.source, scoring.load_as)
        options = MeasureOptions("none", measured.batch_tokens, measured.threads, self.waits)
        self.judge = judge_of(self.engine.moe, scoring, options)
        questions = self.problem.calibration.questions
        used = hash_lines(questions.profiled) | hash_lines(questions.tuning) | questions.inherited
        judged = self.judge.request()
        judged["scored"] = judged["scored"].called(profile.info.model.id)
        request = schema.CompressionRequest(
            **judged,
            profile=profile_hash(profile.info),
            options=",".join(map(str, self.problem.menu)),
            grain=settings.grain_taken,
            group_size=self.problem.group_size,
            sizes=settings.sizes,
            **settings.model_dump(include={"loader", "by", "least", "rest", "weigh", "seed"}),
        )
        chosen_on = ChosenOnResult(split=questions.tuning.split, overlap=self.judge.n_used(used))
        self.sweep = schema.CompressionSweep(asked=request, chosen_on=chosen_on)
        self.is_resumed = self.resume(folder)
        kept = folder / "cells" / COMPRESSION_FILE
        if file is None and self.is_resumed and kept.is_file():
            file = load_compression(kept)
        if file is None:
            inputs = stored_inputs(self.problem, self.engine)
            file = measure(self.problem, self.engine, inputs, on_part)
            if self.waits:
                kept.parent.mkdir(parents=True, exist_ok=True)
                self.note(folder, {})
                file.save(kept)
        self.error_UO = errors_of(file, self.problem)

    def steps(self, folder: Path) -> Iterator[Step]:
        """The unedited model, then every size that the folder lacks; each is saved when done."""
        sizes, store = self.sweep.asked.sizes, folder / "cells"
        finished = {cell.size: cell for cell in self.sweep.cells}
        chosen = {n: self.problem.choose(self.error_UO, n) for n in sizes if n not in finished}
        if not self.is_resumed:
            self.note(folder, {})  # by every process: it claims the folder
        yield from self.base_step(folder)
        for n, own in chosen.items():
            content = hashlib.sha256(own.option_U.tobytes()).hexdigest()[:8]
            name = f"{n}-{content}"
            yield Step(f"{n:,} bytes", partial(self._run, own, store, name))
            if self.waits:
                finished[n] = self._cell(n, own, store, name)
                self.note(folder, {"cells": tuple(finished[s] for s in sizes if s in finished)})

    def _run(self, own: Options, store: Path, name: str, see: OnPass) -> Iterator[Progress]:
        edit = self.problem.edit(own.option_U, self.engine)
        with observed(simulated(self.engine.moe, [edit], is_as_written=True), see) as both:
            yield from self.judge.run(store, name, both)

    def _cell(
        self, n: int, own: Options, store: Path, name: str
    ) -> schema.CompressionCell | schema.CompressionTextCell:
        of_base = size(self.engine.moe)
        figures = self.judge.figures(store, name, replace(of_base, size_bytes=own.size_bytes))
        bits = self.problem.mean_bits(own.option_U)
        figures |= {"size": n, "bits": bits, "error": own.found.error}
        if self.sweep.asked.text is not None:
            return schema.CompressionTextCell(**figures)
        return schema.CompressionCell(**figures)
