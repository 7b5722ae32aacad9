"""What loads a checkpoint, and how: only where the form on disk is the loader's own."""

import json
from dataclasses import dataclass

from expertcut.checkpoints.exact import has_constants, has_earlier_names
from expertcut.publishing.card.markup import Markdown
from expertcut.publishing.verify import Checkpoint

# By config.model_type. vLLM has a class of its own for these; see docs/publishing.md.
_VLLM_STOCK = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
_VLLM_CONSTANTS = ("olmoe", "qwen2_moe", "qwen3_moe")
_LLAMA_CPP = ("olmoe",)  # converted and run (docs/benchmarks.md)
_ENVIRONMENT = "in an environment of its own (0.33 needs transformers below 5.21)"
# As vLLM 0.33.0 checks it, in SubstitutedRoutedExperts.
_EXCLUDED = (
    "not together with quantised experts, LoRA on experts, EPLB, or expert, data or sequence "
    "parallelism"
)


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
    is_stock = checkpoint.has_family_form
    serve = Markdown(f"vllm serve {repo}{branch}")
    if is_stock and family in _VLLM_STOCK:
        needs = f"any version that loads the base model, {_ENVIRONMENT}"
        found.append(Loader("vLLM", needs, "sh", serve))
    if not is_stock and family in _VLLM_CONSTANTS:
        found.append(Loader("vLLM", f"0.33 or later, {_ENVIRONMENT}; {_EXCLUDED}", "sh", serve))
    if is_stock and family in _LLAMA_CPP:
        lines = (
            f"hf download {repo}{branch} --local-dir model",
            "python convert_hf_to_gguf.py model --outfile model.gguf",
            "llama-cli -m model.gguf",
        )
        needs = "its own converter, which must know the tokenizer as it knows the base model's"
        found.append(Loader("llama.cpp", needs, "sh", Markdown("\n".join(lines))))
    return tuple(found)


def misreaders(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Sentences on programs that load the checkpoint and answer wrongly, or refuse it."""
    config = checkpoint.config
    if not has_constants(config) or "biased_gates" in config:
        return ()
    found = [
        "transformers 4 loads it wrongly: 4.57.6 warns that weights are newly initialized, and "
        "removed experts answer at random. Use 5.22 or later, as above."
    ]
    if has_earlier_names(config):
        found.append(
            "vLLM 0.32 loads it wrongly: it answers NaN, without a warning. `expertcut reweight` "
            "and `expertcut heal` write what they make of it in a form that 0.32 refuses."
        )
    else:
        found.append("vLLM 0.32 knows no constant experts and refuses it.")
    return tuple(found)


def _transformers(checkpoint: Checkpoint, repo: str, revision: str | None) -> Loader:
    options = ['dtype="auto"']
    if revision:
        options.append(f"revision={json.dumps(revision)}")
    own = [] if checkpoint.has_family_form else ["trust_remote_code=True"]
    tokenizer = ", ".join(["name", *options[1:]])
    lines = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {json.dumps(repo)}",
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        f"model = AutoModelForCausalLM.from_pretrained({', '.join(['name', *options, *own])})",
    )
    if checkpoint.has_family_form:
        needs = "any version that loads the base model (4.56 or later for dtype as written here)"
    else:
        needs = "5.22 or later, with trust_remote_code=True: modeling_exact.py comes along"
    return Loader("transformers", needs, "python", Markdown("\n".join(lines)))
