"""Asks one engine for log-probabilities, in the Python that runs this.

    python benchmarks/served.py vllm|transformers FOLDER CHECKPOINT ... [--dtype bfloat16]

benchmarks/against_vllm.py runs it in one Python after another; it needs nothing of expertcut. Reads
the token ids of the prompts from FOLDER/prompts.json, and prints one line of JSON per checkpoint:
the engine's version, and the error if it did not load. Answers go to FOLDER/<checkpoint>: log p of
each prompt token after the first, and of the whole vocabulary after the last one.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {  # read by vLLM when it is imported
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}

import torch
from safetensors.torch import save_file
from torch import Tensor

Prompts = list[list[int]]
Answers = dict[str, Tensor]


def ask_vllm(checkpoint: Path, prompts: Prompts, dtype: str) -> Answers:
    """Without compiling, one prompt at a time."""
    import vllm
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    n_tokens = max(map(len, prompts)) + 16
    try:
        engine = vllm.LLM(
            str(checkpoint),
            dtype=dtype,
            enforce_eager=True,
            distributed_executor_backend="uni",
            max_logprobs=-1,
            max_model_len=n_tokens,
            max_num_seqs=1,
            enable_prefix_caching=False,
        )
        # prompt_logprobs 0 is the token itself; logprobs -1 the whole vocabulary.
        once = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, logprobs=-1, temperature=0)
        found: Answers = {}
        for i, ids in enumerate(prompts):
            (done,) = engine.generate([{"prompt_token_ids": ids}], once, use_tqdm=False)
            assert done.prompt_logprobs is not None and done.outputs[0].logprobs is not None
            told = zip(ids[1:], done.prompt_logprobs[1:], strict=True)
            found[f"tokens.{i}"] = torch.tensor([at[token].logprob for token, at in told])
            last = done.outputs[0].logprobs[0]
            found[f"last.{i}"] = torch.tensor([last[token].logprob for token in range(len(last))])
        return found
    finally:
        cleanup_dist_env_and_memory()


def ask_transformers(checkpoint: Path, prompts: Prompts, dtype: str) -> Answers:
    """Version 4 with the family's own class, as someone loads it who trusts no code."""
    from transformers import AutoModelForCausalLM, __version__

    options = {} if __version__.startswith("4.") else {"trust_remote_code": True}
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **options)
    found: Answers = {}
    with torch.inference_mode():
        for i, ids in enumerate(prompts):
            logprobs = model.eval()(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
            found[f"tokens.{i}"] = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            found[f"last.{i}"] = logprobs[-1]
    return {name: tensor.contiguous() for name, tensor in found.items()}


ENGINES: dict[str, Callable[[Path, Prompts, str], Answers]] = {
    "vllm": ask_vllm,
    "transformers": ask_transformers,
}


def main() -> None:
    """Reads the command line, asks, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    version = __import__(args.engine).__version__
    prompts = json.loads((args.folder / "prompts.json").read_text())
    for checkpoint in args.checkpoints:
        error = None
        try:
            answers = ENGINES[args.engine](checkpoint, prompts, args.dtype)
            save_file(answers, args.folder / checkpoint.name)
        except Exception as refusal:  # whatever an engine says when it refuses
            error = f"{type(refusal).__name__}: {refusal}"
        told = {"checkpoint": checkpoint.name, "version": version, "error": error}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
