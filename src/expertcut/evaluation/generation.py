"""What models write: loops, caps, empty outputs, first divergences, judged in pairs. No torch.

An output loops if it ends with three consecutive copies of the same 20 or more tokens. So a single
token loops once it stands 60 times at the end, and a cycle of 7 tokens once it covers 63.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
from pydantic import Field

from expertcut.documents import Record
from expertcut.stats import (
    Array,
    Comparison,
    Count,
    Share,
    bootstrap_ci95,
    compare,
    wilson_interval,
)

LOOP_TOKENS, LOOP_COPIES = 20, 3
SHORTEST_LOOP = LOOP_TOKENS * LOOP_COPIES
Positive = Annotated[float, Field(ge=0)]
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Output:
    """Token ids without the end token, their text, and whether the model ended it by itself."""

    ids: tuple[int, ...]
    text: str
    is_ended: bool

    @property
    def is_empty(self) -> bool:
        """Whether the text has nothing but white space."""
        return not self.text.strip()


@dataclass(frozen=True)
class Generated:
    """All outputs of one model, and how its tokenizer encodes a text.

    `vocabulary` says which tokens the ids are; None of a server, which gives text: encoded again,
    bytes that are no text are other tokens.
    """

    outputs: tuple[Output, ...]
    encode: Encode
    vocabulary: str | None


class ShareResult(Record):
    """A number of outputs, and their share with Wilson's interval."""

    outputs: Count
    share: Share
    ci95: tuple[Share, Share]


class MeanResult(Record):
    """The mean of a figure over outputs, with a bootstrap interval over prompts; None of one."""

    mean: Positive
    ci95: tuple[Positive, Positive] | None


class GenerationResult(Record):
    """The outputs of one model.

    `loops` is None where the cap is below 60 tokens, so no loop could be seen; `distinct_4`, the
    share of distinct 4-grams of an output's tokens, where no output has four.
    """

    prompts: Count
    length_cap: ShareResult
    loops: ShareResult | None
    empty: ShareResult
    distinct_4: MeanResult | None
    mean_tokens: MeanResult


class GenerationChange(Record):
    """The outputs of a model beside the base's; `gained` ones have the fault only here.

    `first_divergence_median` is over outputs that differ: the number of equal tokens before.
    """

    differs: ShareResult
    first_divergence_median: Positive | None
    length_cap: Comparison
    loops: Comparison | None
    empty: Comparison


class GenerationInfo(Record):
    """The prompts and the settings of all models, and the file of outputs beside the results."""

    prompts: str
    prompts_sha256: str
    max_new_tokens: Count
    temperature: Positive
    seed: int | None  # None is greedy
    outputs: str = Field(pattern=r"^[^/\\\x00]+\.jsonl$")


class WrittenOutput(Record):
    """An output for a reader; `first_divergence` is None of the base, and where none is."""

    model: str
    text: str
    tokens: Count
    is_ended: bool
    is_loop: bool
    first_divergence: Count | None


class WrittenPrompt(Record):
    """A line of the file of outputs: a prompt as the base read it, and what each model wrote."""

    prompt: str
    outputs: list[WrittenOutput]


def is_loop(ids: Sequence[int]) -> bool:
    """Whether tokens end with three consecutive copies of the same 20 or more."""
    for length in range(LOOP_TOKENS, len(ids) // LOOP_COPIES + 1):
        # Copies of a block are a suffix of that period.
        suffix = ids[-LOOP_COPIES * length :]
        if suffix[-1] == suffix[-1 - length] and suffix[length:] == suffix[:-length]:
            return True
    return False


def distinct_4(ids: Sequence[int]) -> float | None:
    """The share of distinct 4-grams; None of fewer than four tokens."""
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return len(set(grams)) / len(grams) if grams else None


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The number of equal tokens before the first that differs or ends; None if all are equal."""
    if tuple(a) == tuple(b):
        return None
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def divergences(base: Generated, other: Generated) -> list[int | None]:
    """The first divergence of every pair, in tokens of the base.

    Unless both have the ids of one vocabulary, the base's tokenizer encodes both texts.
    """
    pairs = zip(base.outputs, other.outputs, strict=True)
    if base.vocabulary is not None and base.vocabulary == other.vocabulary:
        return [first_divergence(a.ids, b.ids) for a, b in pairs]
    return [first_divergence(base.encode(a.text), base.encode(b.text)) for a, b in pairs]


def summarize(outputs: Sequence[Output], max_new_tokens: int) -> GenerationResult:
    """The shares and means of one model's outputs."""
    varied = [share for o in outputs if (share := distinct_4(o.ids)) is not None]
    capped_N, loops_N, empty_N = _flags(outputs)
    return GenerationResult(
        prompts=len(outputs),
        length_cap=_share(capped_N),
        loops=_share(loops_N) if max_new_tokens >= SHORTEST_LOOP else None,
        empty=_share(empty_N),
        distinct_4=_mean(varied) if varied else None,
        mean_tokens=_mean([len(o.ids) for o in outputs]),
    )


def compare_generated(base: Generated, other: Generated, max_new_tokens: int) -> GenerationChange:
    """A model's outputs against the base's on the same prompts."""
    found = divergences(base, other)
    differing = [at for at in found if at is not None]
    capped, loops, empty = (
        compare(of_base_N, of_other_N)
        for of_base_N, of_other_N in zip(_flags(base.outputs), _flags(other.outputs), strict=True)
    )
    return GenerationChange(
        differs=_share(np.array([at is not None for at in found])),
        first_divergence_median=float(median(differing)) if differing else None,
        length_cap=capped,
        loops=loops if max_new_tokens >= SHORTEST_LOOP else None,
        empty=empty,
    )


def outputs_path(results: Path) -> Path:
    """Where the outputs of all models lie: `generations.jsonl` beside `results.json`."""
    name = "generations" if results.stem == "results" else f"{results.stem}.generations"
    return results.with_name(f"{name}.jsonl")


def outputs_bytes(
    prompts: Sequence[str], names: Sequence[str], found: Sequence[Generated]
) -> bytes:
    """The file of outputs: a line for each prompt, models in the order of the results."""
    of_base: list[int | None] = [None] * len(prompts)
    diverge = [of_base, *(divergences(found[0], other) for other in found[1:])]
    lines = []
    for n, prompt in enumerate(prompts):
        outputs = [
            WrittenOutput(
                model=name,
                text=generated.outputs[n].text,
                tokens=len(generated.outputs[n].ids),
                is_ended=generated.outputs[n].is_ended,
                is_loop=is_loop(generated.outputs[n].ids),
                first_divergence=at_N[n],
            )
            for name, generated, at_N in zip(names, found, diverge, strict=True)
        ]
        lines.append(WrittenPrompt(prompt=prompt, outputs=outputs).model_dump_json())
    return "".join(f"{line}\n" for line in lines).encode()


def _flags(outputs: Sequence[Output]) -> tuple[Array, Array, Array]:
    """Whether outputs (N,) hit the cap, loop, are empty."""
    capped_N = np.array([not o.is_ended for o in outputs])
    return (
        capped_N,
        np.array([is_loop(o.ids) for o in outputs]),
        np.array([o.is_empty for o in outputs]),
    )


def _share(is_so_N: Array) -> ShareResult:
    count, n = int(is_so_N.sum()), len(is_so_N)
    return ShareResult(outputs=count, share=count / n, ci95=wilson_interval(count / n, n))


def _mean(values: Sequence[float]) -> MeanResult:
    values_N = np.asarray(values, dtype=float)
    ci95 = bootstrap_ci95(values_N, np.ones_like(values_N)) if len(values) > 1 else None
    return MeanResult(mean=float(values_N.mean()), ci95=ci95)
