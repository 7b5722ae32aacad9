"""expertcut profile beside what a researcher writes, on the same questions and statistics.

    python -m benchmarks.against_hooks --quiz DATA/mmlu --tokenizer DATA/olmoe

The paper's loop (arXiv:2502.17187): transformers, batches of 2 prompts, all router logits
(`output_router_logits=True`), the full prompt of every question, statistics at the answer position.
The observer of expert-pruning tools (REAP, arXiv:2510.13999): one prompt at a time, and a hook on
every MoE block that runs every expert on every token to take norms. Both answer the first questions
of each subject only (`--slow-limit`); their seconds a question are set against ours on the same
questions and on the whole sets, where a shared prefix serves more of them. All run in this process,
and no ratio is printed where counts differ.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import SUBJECTS, parser, random_olmoe, report
from expertcut.data import Quiz, Selection, load_quiz, prompt
from expertcut.models.load import LoadOptions, MoeModel, find_source, load
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.schema import Stats
from expertcut.profiling.storage import load_profile

BATCH = 2


@dataclass(frozen=True)
class Found:
    """Seconds, processor seconds, and what was counted: tokens (L, E) or appearances (L, E)."""

    elapsed_s: float
    cpu_s: float
    n_questions: int
    count_LE: "np.ndarray"


def clocked(n_questions: int, work: Callable[[], "np.ndarray"]) -> Found:
    """What a piece of work took."""
    started = time.perf_counter(), time.process_time()
    count_LE = work()
    elapsed_s, cpu_s = time.perf_counter() - started[0], time.process_time() - started[1]
    return Found(elapsed_s, cpu_s, n_questions, count_LE)


@torch.inference_mode()
def paper_loop(model: Any, tokenizer: Any, quiz: Quiz) -> "np.ndarray":
    """Which experts the answer positions chose: questions by layer and expert."""
    config = model.config
    count_LE = np.zeros((config.num_hidden_layers, config.num_experts))
    texts = [prompt(q, quiz.shots_by_subject[q.subject]) for q in quiz]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for begin in range(0, len(texts), BATCH):
        inputs = tokenizer(texts[begin : begin + BATCH], return_tensors="pt", padding=True)
        output = model(**inputs, output_router_logits=True)
        output.logits[:, -1].log_softmax(-1)
        rows = len(inputs["input_ids"])
        for layer, logits in enumerate(output.router_logits):
            alpha = logits.view(rows, -1, config.num_experts)[:, -1].softmax(-1)
            chosen = alpha.topk(config.num_experts_per_tok).indices
            np.add.at(count_LE[layer], chosen.flatten().numpy(), 1)
    return count_LE


@contextmanager
def every_expert_on_every_token(model: Any, tokens_LE: "np.ndarray") -> Iterator[None]:
    """REAP's observer: all experts' outputs for all tokens, then the norms of the chosen ones."""
    config = model.config
    sums_LE = torch.zeros(2, *tokens_LE.shape, dtype=torch.float64)

    def hook(layer: int, block: Any) -> Callable[..., None]:
        def see(_module: object, args: tuple[Any, ...], _output: object) -> None:
            x_TD = args[0].reshape(-1, args[0].shape[-1])
            _, weights_TK, experts_TK = block.gate(x_TD)
            for expert in range(config.num_experts):
                gate_up = block.experts.gate_up_proj[expert]
                gate, up = torch.nn.functional.linear(x_TD, gate_up).chunk(2, dim=-1)
                hidden = block.experts.act_fn(gate) * up
                output_TD = torch.nn.functional.linear(hidden, block.experts.down_proj[expert])
                is_chosen_TK = experts_TK == expert
                is_chosen_T = is_chosen_TK.any(dim=1)
                norm_M = output_TD.norm(dim=-1)[is_chosen_T].double()
                sums_LE[0, layer, expert] += norm_M.sum()
                weight_M = (weights_TK * is_chosen_TK).sum(dim=1)[is_chosen_T]
                sums_LE[1, layer, expert] += (norm_M * weight_M).sum()
                tokens_LE[layer, expert] += int(is_chosen_T.sum())

        return see

    with ExitStack() as stack:
        for layer, decoder in enumerate(model.model.layers):
            handle = decoder.mlp.register_forward_hook(hook(layer, decoder.mlp))
            stack.callback(handle.remove)
        yield


def observer(model: Any, tokenizer: Any, quiz: Quiz) -> "np.ndarray":
    """Tokens by layer and expert, as REAP's observer counts them; one prompt at a time."""
    tokens_LE = np.zeros((model.config.num_hidden_layers, model.config.num_experts))
    with every_expert_on_every_token(model, tokens_LE), torch.inference_mode():
        for question in quiz:
            text = prompt(question, quiz.shots_by_subject[question.subject])
            model(**tokenizer([text], return_tensors="pt"), use_cache=False, logits_to_keep=1)
    return tokens_LE


def ours(moe: MoeModel, quiz: Quiz, limit: int | None, stats: Stats) -> "np.ndarray":
    """The same counts from a profile."""
    measurement = Measurement(moe, quiz, limit, MeasureOptions(stats=stats))
    with tempfile.TemporaryDirectory() as folder:
        list(measurement.run(Path(folder) / "p"))
        profile = load_profile(Path(folder) / "p")
        if stats == "all":
            found = profile.token_sum("tokens")
            assert found is not None
            return found
        chosen_NLK = profile.array("chosen_NLK").astype(int)
        n_experts = profile.array("alpha_NLE").shape[2]
        return np.eye(n_experts)[chosen_NLK].sum(axis=(0, 2))


def measured(model_folder: Path, args: argparse.Namespace) -> list[list[object]]:
    """One row per way; ratios are of seconds a question."""
    select = {"shots": args.shots, "subjects": SUBJECTS}
    whole = load_quiz(Selection(str(args.quiz), limit=args.limit, **select))
    few = load_quiz(Selection(str(args.quiz), limit=args.slow_limit, **select))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    moe = load(find_source(str(model_folder)), LoadOptions())
    rows: list[list[object]] = []
    slow: dict[Stats, tuple[str, Callable[..., Any]]] = {
        "answer": ("the paper's loop, batch 2", paper_loop),
        "all": ("every expert on every token", observer),
    }
    for stats, (name, work) in slow.items():
        theirs = clocked(len(few), lambda work=work: work(model, tokenizer, few))
        same = clocked(len(few), lambda s=stats: ours(moe, few, args.slow_limit, s))
        fast = clocked(len(whole), lambda s=stats: ours(moe, whole, args.limit, s))
        differing = float(np.abs(theirs.count_LE - same.count_LE).sum() / theirs.count_LE.sum() / 2)
        runs = [(name, theirs), (f"expertcut profile --stats {stats}", same), ("the same", fast)]
        for label, run in runs:
            per_question = 1000 * run.elapsed_s / run.n_questions
            cpu = 1000 * run.cpu_s / run.n_questions
            is_comparable = differing <= args.tolerance
            wall = 1000 * theirs.elapsed_s / theirs.n_questions / per_question
            busy = 1000 * theirs.cpu_s / theirs.n_questions / cpu
            ratios = [wall, busy] if is_comparable else [None, None]
            rows.append([label, run.n_questions, run.elapsed_s, per_question, cpu, *ratios])
        print(f"{name}: {differing:.2e} of what it counts differs from ours", flush=True)
    return rows


def main() -> None:
    """Reads the command line, measures, reports."""
    options = parser(__doc__, "against_hooks")
    options.add_argument("--shots", type=int, default=5)
    options.add_argument("--limit", type=int, help="questions of each subject for expertcut")
    options.add_argument("--slow-limit", type=int, default=4, help="for the others")
    options.add_argument(
        "--tolerance", type=float, default=1e-4, help="share of counts that differ"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(random_olmoe(Path(folder) / "olmoe", args.tokenizer), args)
    columns = {"run": "", "questions": ",d", "seconds": ".2f", "ms a question": ".1f"}
    columns |= {"CPU ms a question": ".1f", "× faster": ".1f", "× CPU": ".1f"}
    report(args.out, f"{args.shots} shots, {args.threads} threads", columns, rows)


if __name__ == "__main__":
    main()
