"""The whole MMLU test split at 5 shots through an OLMoE of the real size, on one GPU.

    python -m benchmarks.gpu_full_size --quiz DATA/mmlu --tokenizer DATA/olmoe

The model is built on the device from the real config.json (in the folder of the tokenizer), with
random bf16 weights (13.8 GB), so no checkpoint is needed: only torch, transformers and this
repository. Prints seconds, tokens per second, and the share of the device's measured matrix rate.
`--device cpu --layers 2 --width 64 --limit 2` tries it out anywhere.
"""

import statistics
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, OlmoeForCausalLM

from benchmarks.common import parser, report
from benchmarks.limits import chunks, shape_of
from benchmarks.work import total
from expertcut.data import Selection, load_quiz
from expertcut.models.find_blocks import find_blocks
from expertcut.models.load import MoeModel, Source
from expertcut.profiling.measure import Measurement, MeasureOptions


class Made(Source):
    """A model that was built in memory, so that it has no files."""

    @cached_property
    def fingerprint(self) -> str:
        """Nothing to take one of."""
        return "made in memory"


def build(folder: Path, device: str, layers: int | None, width: int | None) -> MoeModel:
    """A random OLMoE of the real config in bfloat16, made where it runs."""
    config = AutoConfig.from_pretrained(folder)
    if layers:
        config.num_hidden_layers = layers
    if width:
        config.hidden_size, config.intermediate_size = width, width // 2
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = OlmoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model = model.eval().requires_grad_(False)
    # Never eager on CUDA: its index_add_ is atomic, so not reproducible.
    model.set_experts_implementation("grouped_mm" if device.startswith("cuda") else "eager")
    blocks = find_blocks(model, torch.arange(16, device=device)[None])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return MoeModel(Made("made in memory", folder), model, tokenizer, blocks)


def synchronise(device: str) -> None:
    """Waits for the device, where work is only queued."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matrix_rate(device: str, n: int) -> float:
    """Operations per second of a square product in bfloat16, the median of five goes."""
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    x @ y
    goes = []
    for _ in range(5):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(10):
            x @ y
        synchronise(device)
        goes.append(10 * 2 * n**3 / (time.perf_counter() - started))
    return statistics.median(goes)


def main() -> None:
    """Reads the command line, builds, profiles, reports."""
    options = parser(__doc__, "gpu_full_size")
    options.add_argument("--device", default="cuda")
    options.add_argument("--shots", type=int, default=5)
    options.add_argument("--stats", choices=("none", "answer", "all"), default="answer")
    options.add_argument("--batch-tokens", type=int, default=8192)
    options.add_argument("--limit", type=int, help="questions of each subject")
    options.add_argument("--subjects", help="separated by commas")
    options.add_argument("--layers", type=int, help="fewer than the config says")
    options.add_argument("--width", type=int, help="smaller than the config says")
    args = options.parse_args()
    subjects = tuple(args.subjects.split(",")) if args.subjects else ()
    select: dict[str, Any] = {"shots": args.shots, "limit": args.limit}
    quiz = load_quiz(Selection(str(args.quiz), subjects=subjects or None, **select))
    moe = build(args.tokenizer, args.device, args.layers, args.width)
    asking = MeasureOptions(stats=args.stats, batch_tokens=args.batch_tokens)
    measurement = Measurement(moe, quiz, args.limit, asking)
    rate = matrix_rate(args.device, 8192 if args.device.startswith("cuda") else 512)
    with tempfile.TemporaryDirectory() as folder:
        synchronise(args.device)
        started = time.perf_counter()
        steps = list(measurement.run(Path(folder) / "p"))
        elapsed_s = time.perf_counter() - started
    work = total(shape_of(moe.model.config), chunks(moe, quiz), keeps_all=args.stats == "all")
    is_cuda = args.device.startswith("cuda")
    name = torch.cuda.get_device_name() if is_cuda else "CPU"
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else 0.0
    columns = {"questions": ",d", "distinct tokens": ",d", "seconds": ".1f", "tokens/s": ",.0f"}
    columns |= {"Tflop/s": ".1f", "matrix rate": ".1f", "% of it": ".0f", "peak GB": ".1f"}
    row = [steps[-1].measured, work.tokens, elapsed_s, work.tokens / elapsed_s]
    row += [work.total / elapsed_s / 1e12, rate / 1e12, 100 * work.total / elapsed_s / rate]
    report(args.out, f"{name}, statistics: {args.stats}", columns, [[*row, peak_gb]])


if __name__ == "__main__":
    main()
