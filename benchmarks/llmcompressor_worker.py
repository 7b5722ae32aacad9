"""One run of llm-compressor's REAP, in its own environment, for `against_llmcompressor`.

Only that environment's packages are imported. Saliencies are read where the modifier chooses what
it keeps, for it forgets them afterwards; nothing that it computes is changed.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class Observed(REAPPruningModifier):
    """REAP with a clock: from its first hook, after tracing the model, to its last layer cut."""

    clock: ClassVar[list[tuple[float, float]]] = []

    def on_calibration_start(self, *args: Any, **kwargs: Any) -> None:
        """The layers are about to run."""
        super().on_calibration_start(*args, **kwargs)
        self.clock.append((time.perf_counter(), time.process_time()))

    def on_calibration_end(self, *args: Any, **kwargs: Any) -> None:
        """All layers have run."""
        self.clock.append((time.perf_counter(), time.process_time()))
        super().on_calibration_end(*args, **kwargs)


def observe_saliencies() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A list that gets (mean saliencies, tokens) of each layer, as the layers are cut."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    choose = REAPSaliencyTracker.compute_retained_experts

    def observed(tracker: Any, *args: Any) -> torch.Tensor:
        seen.append((tracker.mean_saliency.clone(), tracker.count.clone()))
        return choose(tracker, *args)

    REAPSaliencyTracker.compute_retained_experts = observed
    return seen


def main() -> None:
    """Reads the command line, calibrates and cuts, writes what was found; saves no checkpoint."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", type=Path)
    options.add_argument("rows", type=Path, help="JSON lines with text and input_ids")
    options.add_argument("out", type=Path, help="a folder for found.safetensors and found.json")
    options.add_argument("--sparsity", type=float, required=True)
    options.add_argument("--batch-size", type=int, default=1)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--every-expert", action="store_true", help="as is its default")
    options.add_argument("--uncut", action="store_true", help="behind layers that are not cut")
    args = options.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    ids = [row["input_ids"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    assert [tokenizer(row["text"])["input_ids"] for row in rows] == ids
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    linearize_moe(model)  # load_quantizable_moe would import torchvision too
    seen, modifier = observe_saliencies(), Observed(sparsity=args.sparsity)
    mask = [[1] * len(row) for row in ids]
    started = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=modifier,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": mask}),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=args.batch_size,
        moe_calibrate_all_experts=args.every_expert,
        propagate_error=not args.uncut,
    )
    whole_s = time.perf_counter() - started
    began, ended = modifier.clock[0], modifier.clock[-1]
    saliencies, counts = zip(*seen, strict=True)
    kept = list(modifier._retained_experts.values())
    tensors = {"saliency_LE": torch.stack(saliencies), "tokens_LE": torch.stack(counts)}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, "kept_LK": torch.tensor(kept)}, args.out / "found.safetensors")
    found = {
        "layers": list(modifier._retained_experts),
        "calibration_s": ended[0] - began[0],
        "calibration_cpu_s": ended[1] - began[1],
        "oneshot_s": whole_s,
        "tokens": sum(map(len, ids)),
        "threads": torch.get_num_threads(),
    }
    (args.out / "found.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
