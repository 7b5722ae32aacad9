"""What loads a checkpoint, and how: only where the form on disk is the loader's own."""

import json
from dataclasses import dataclass

from expertcut.publishing.card.markup import Markdown
from expertcut.publishing.verify import Checkpoint

# By config.model_type. vLLM has a class of its own for these; see docs/publishing.md.
_VLLM_STOCK = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
_VLLM_CONSTANTS = ("olmoe", "qwen2_moe", "qwen3_moe")
_LLAMA_CPP = ("olmoe",)  # converted and run (docs/benchmarks.md)


@dataclass(frozen=True)
class Loader:
    """A program, what it must be, and the lines that load the checkpoint there."""

    name: str
    needs: str
    language: str
    lines: Markdown


def loaders(checkpoint: Checkpoint, repo: str, revision: str | None) -> tuple[Loader, ...]:
    """The loaders whose form on disk this is, transformers first."""
    found = [_transformers(checkpoint, repo, revision)]
    family = str(checkpoint.config.get("model_type"))
    branch = f" --revision {revision}" if revision else ""
    if not checkpoint.is_exact and family in _VLLM_STOCK:
        needs = "any version that loads the base model; it was not run on this checkpoint"
        found.append(Loader("vLLM", needs, "sh", Markdown(f"vllm serve {repo}{branch}")))
    if checkpoint.is_exact and family in _VLLM_CONSTANTS:
        needs = "0.33 or later, whose form for constant experts this is; it was not run on it"
        found.append(Loader("vLLM", needs, "sh", Markdown(f"vllm serve {repo}{branch}")))
    if not checkpoint.is_exact and family in _LLAMA_CPP:
        lines = (
            f"hf download {repo}{branch} --local-dir model",
            "python convert_hf_to_gguf.py model --outfile model.gguf",
            "llama-cli -m model.gguf",
        )
        needs = "its own converter, which must know the tokenizer as it knows the base model's"
        found.append(Loader("llama.cpp", needs, "sh", Markdown("\n".join(lines))))
    return tuple(found)


def _transformers(checkpoint: Checkpoint, repo: str, revision: str | None) -> Loader:
    options = ['dtype="auto"']
    if revision:
        options.append(f"revision={json.dumps(revision)}")
    own = ["trust_remote_code=True"] if checkpoint.is_exact else []
    tokenizer = ", ".join(["name", *options[1:]])
    lines = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {json.dumps(repo)}",
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        f"model = AutoModelForCausalLM.from_pretrained({', '.join(['name', *options, *own])})",
    )
    if checkpoint.is_exact:
        needs = "5.22 or later, with trust_remote_code=True: modeling_exact.py comes along"
    else:
        needs = "any version that loads the base model (4.56 or later for dtype as written here)"
    return Loader("transformers", needs, "python", Markdown("\n".join(lines)))
