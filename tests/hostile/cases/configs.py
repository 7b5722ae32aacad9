"""config.json that is none, or lies."""

import json
import os
from pathlib import Path

from tests.hostile.case import Corpus
from tests.hostile.edits import (
    CONFIG,
    Change,
    Command,
    config,
    eval_cut,
    evaluate,
    in_cut,
    in_model,
    json_of,
    merge,
    profile,
    prune,
    prune_exactly,
    publish,
    reweight,
    text_of,
)

CASES = Corpus("config")
FILE = r"olmoe/config\.json"
DEEP = "[" * 10_000 + "]" * 10_000


def literal(name: str, value: str) -> Change:
    """A field has a value that no JSON writer would write."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        content[name] = "HERE"
        text = json.dumps(content).replace('"HERE"', value)
        (folder / CONFIG).write_text(text)

    return edit


def sparse(size_bytes: int) -> Change:
    return lambda folder: os.truncate(folder / CONFIG, size_bytes)


def without(name: str) -> Change:
    return json_of(CONFIG, lambda content: content.pop(name))


def named_dtype(folder: Path) -> None:
    """Under the name that older checkpoints have."""
    without("dtype")(folder)
    config(torch_dtype="os.system")(folder)


def rope(**fields: object) -> Change:
    return config(rope_parameters={"rope_type": "default", "rope_theta": 1e4} | fields)


TEXTS: dict[str, tuple[Change, str]] = {
    "no JSON": (text_of(CONFIG, '{"model_type": '), "cannot be read as JSON"),
    "nothing": (text_of(CONFIG, ""), "cannot be read as JSON"),
    "no UTF-8": (text_of(CONFIG, b'{"model_type": "\xff"}'), "cannot be read as JSON"),
    "UTF-16": (text_of(CONFIG, '{"model_type": "olmoe"}'.encode("utf-16")), "cannot be read as"),
    "a BOM": (text_of(CONFIG, b'\xef\xbb\xbf{"model_type": "olmoe"}'), "BOM"),
    "a lone surrogate": (text_of(CONFIG, '{"model_type": "\ud800"}'), "cannot be read as JSON"),
    "a list": (text_of(CONFIG, "[]"), "holds a list, must be a JSON object"),
    "a number": (text_of(CONFIG, "1"), "holds a int, must be a JSON object"),
    "null": (text_of(CONFIG, "null"), "must be a JSON object"),
    "YAML": (text_of(CONFIG, "model_type: olmoe\n"), "cannot be read as JSON"),
    "10,000 levels": (literal("rope_scaling", DEEP), "cannot be read as JSON: .*recursion"),
    "a million levels": (text_of(CONFIG, '{"a":' * 1_000_000), "cannot be read as JSON"),
    "a number of 5,000 digits": (literal("num_experts", "9" * 5000), "cannot be read as JSON"),
    "5 GB": (sparse(5_000_000_000), "5,000,000,000 bytes, more than"),
    "a pipe in its place": (
        lambda f: ((f / CONFIG).unlink(), os.mkfifo(f / CONFIG)),
        "not a regular file",
    ),
    "a folder in its place": (
        lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir()),
        "not a regular file",
    ),
}
for fault, (change, says) in TEXTS.items():
    CASES.add(f"{fault} for a config", in_model(change), FILE, says)
CASES.add("none", in_model(lambda f: (f / CONFIG).unlink()), "olmoe", "it has no config.json")

COUNTS: dict[str, tuple[Change, str]] = {
    "10^12 experts": (config(num_experts=10**12), "says 1000000000000 experts, .* holds 8"),
    "16 experts": (config(num_experts=16), "says 16 experts, .* holds 8"),
    "6 experts": (config(num_experts=6), "says 6 experts, .* holds 8"),
    "two experts in another field": (config(num_local_experts=2), "lacks 6|says 2 experts"),
    "10^9 layers": (config(num_hidden_layers=10**9), "says 1000000000 layers, the weights hold 2"),
    "3 layers": (config(num_hidden_layers=3), "says 3 layers, the weights hold 2"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers 0, must be a whole number"),
    "-2 layers": (config(num_hidden_layers=-2), "num_hidden_layers -2, must be"),
    "a width of 10^9": (config(hidden_size=10**9), "values, .*safetensors holds"),
    "a width of 10^30": (config(hidden_size=10**30), "config.json"),
    "a width of 0": (config(hidden_size=0), "hidden_size 0, must be a whole number"),
    "a negative width": (config(hidden_size=-32), "hidden_size -32, must be"),
    "a width of 16": (config(hidden_size=16), r"olmoe/model.safetensors lacks|config.json"),
    "a width that is a text": (config(hidden_size="32"), "hidden_size 32, must be a whole number"),
    "a width that is a list": (
        config(hidden_size=[32]),
        r"hidden_size \[32\], must be a whole",
    ),
    "a width of 32.5": (config(hidden_size=32.5), "hidden_size 32.5, must be a whole number"),
    "a width that is NaN": (
        literal("hidden_size", "NaN"),
        "hidden_size nan, must be a whole",
    ),
    "a width that is infinite": (literal("hidden_size", "1e999"), "hidden_size inf, must be"),
    "a width that is true": (config(hidden_size=True), "hidden_size True, must be a whole number"),
    "an intermediate size of 10^12": (config(intermediate_size=10**12), "holds"),
    "an intermediate size of -16": (config(intermediate_size=-16), "intermediate_size|negative"),
    "10^15 tokens": (config(vocab_size=10**15), "holds"),
    "-1 tokens": (config(vocab_size=-1), "vocab_size -1, must be"),
    "100 tokens": (config(vocab_size=100), "shape"),
    "3 heads": (config(num_attention_heads=3), "lacks 10 of the model"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads 0, must be"),
    "10^9 heads": (config(num_attention_heads=10**9), "config.json|holds"),
    "10^12 key heads": (config(num_key_value_heads=10**12), "config.json|holds"),
    "heads as wide as 10^12": (config(head_dim=10**12), "config.json|holds"),
    "top-k above the experts": (config(num_experts_per_tok=9), "to 9 of 8 experts"),
    "top-k of 0": (config(num_experts_per_tok=0), "num_experts_per_tok 0, must be"),
    "top-k of -2": (config(num_experts_per_tok=-2), "num_experts_per_tok -2, must be"),
    "top-k of 2.5": (config(num_experts_per_tok=2.5), "num_experts_per_tok 2.5, must be"),
    "one expert": (config(num_experts=1), "not a MoE model"),
    "a list of experts": (config(num_experts=[8, 8]), r"num_experts '\[8, 8\]', must be a whole"),
    "experts in quotes": (config(num_experts="8"), "num_experts '8', must be a whole number"),
    "experts in quotes in a text_config": (
        lambda f: (without("num_experts")(f), config(text_config={"num_experts": "8"})(f)),
        "num_experts '8', must be a whole number",
    ),
    "n_experts in quotes": (
        lambda f: (without("num_experts")(f), config(n_experts="8")(f)),
        "n_experts '8', must be a whole number",
    ),
    "no experts": (without("num_experts"), "not a MoE model|says .* experts"),
}
for fault, (change, says) in COUNTS.items():
    CASES.add(f"a config of {fault}", in_model(change), "olmoe", says)

VALUES: dict[str, tuple[Change, str]] = {
    "no model_type": (without("model_type"), "model_type|cannot be loaded"),
    "an unknown model_type": (config(model_type="unheard_of"), "unheard_of"),
    "a model_type that is a list": (config(model_type=["olmoe"]), "config.json"),
    "a model_type that is a path": (config(model_type="../../x"), r"\.\./\.\./x"),
    "a model_type of 1 MB": (config(model_type="x" * 10**6), "xxxx"),
    "another family with the same weights": (config(model_type="mixtral"), "lacks|config.json"),
    "a dense model_type": (config(model_type="llama"), "config.json|lacks|not a MoE"),
    "an unknown activation": (config(hidden_act="eval('1')"), "config.json"),
    "an activation that is a list": (config(hidden_act=["silu"]), "config.json"),
    "a nonsense dtype": (config(dtype="float37"), "config.json"),
    "a nonsense torch_dtype": (
        (lambda f: (without("dtype")(f), config(torch_dtype="os.system")(f))),
        "config.json",
    ),
    "a nonsense rope_scaling": (
        rope(rope_type="evil", factor=-1),
        "config.json",
    ),
    "a rope_scaling that is a text": (config(rope_scaling="linear"), "config.json"),
    "a rope_theta of 0": (
        rope(rope_theta=0),
        "config.json|olmoe",
    ),
    "a rope_theta that is a text": (
        rope(rope_theta="x"),
        "config.json",
    ),
    "a padding token beyond the vocabulary": (config(pad_token_id=10**6), "config.json"),
    "an epsilon that is a text": (config(rms_norm_eps="small"), "config.json"),
    "an epsilon that is NaN": (literal("rms_norm_eps", "NaN"), "config.json|olmoe"),
    "a dropout that is a list": (config(attention_dropout=[0.1]), "config.json"),
    "a nonsense quantization_config": (
        config(quantization_config={"quant_method": "evil"}),
        "olmoe",
    ),
    "a quantization_config that is a list": (config(quantization_config=[8]), "olmoe"),
    "a quantization that is not there": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "olmoe",
    ),
    "weights of another name": (
        config(transformers_weights="other.safetensors"),
        "transformers_weights 'other.safetensors'",
    ),
    "weights of another folder": (
        config(transformers_weights="../sharded/model-00001-of-00006.safetensors"),
        r"transformers_weights '\.\./sharded",
    ),
}
for fault, (change, says) in VALUES.items():
    CASES.add(f"a config with {fault}", in_model(change), "olmoe", says)

BY_COMMAND: tuple[tuple[Command, str], ...] = (
    (evaluate, "says 1000000000000 experts"),
    (prune, "says 1000000000000 experts"),
    (prune_exactly, "says 1000000000000 experts"),
    (reweight, "says 1000000000000 experts"),
    (merge, "says 1000000000000 experts"),
)
for command, says in BY_COMMAND:
    CASES.add(
        f"10^12 experts, met by {command.__name__}",
        in_model(config(num_experts=10**12), command),
        "olmoe|profiles/finished",
        says,
    )
CASES.add(
    "an edited checkpoint that says 10^12 experts",
    in_cut(config(num_experts=10**12), eval_cut),
    r"cut/config\.json",
    "says 1000000000000 experts",
)
CASES.add(
    "an edited checkpoint of another count, published",
    in_cut(config(num_experts=5), publish),
    r"cut/config\.json",
    "config.json says 5|says 5 experts",
)
CASES.add(
    "an edited checkpoint without a config, published",
    in_cut(lambda f: (f / CONFIG).unlink(), publish),
    "checkpoints/cut",
    "no config.json",
)
CASES.add(
    "a family whose router scales the input",
    in_model(text_of(CONFIG, '{"model_type": "llama4", "text_config": {"num_local_experts": 16}}')),
    "llama4 models are not supported",
    "scales the expert's input",
)
CASES.add(
    "a family whose attention is routed",
    in_model(text_of(CONFIG, '{"model_type": "jetmoe", "num_local_experts": 8}'), profile),
    "jetmoe models are not supported",
    "attention is routed too",
)
CASES.add(
    "a family whose zero-computation experts have no weights",
    in_model(config(model_type="longcat_flash", zero_expert_num=4)),
    r"olmoe/config\.json: longcat_flash is not supported",
    "has experts without weights.*: zero_expert_num 4",
)
for family, says in (
    ("longcat_flash", "has experts without weights"),
    ("zaya", "has experts without weights.*skip all experts"),
    ("doge", "its experts are rows of an embedding"),
):
    CASES.add(
        f"{family} in whole files",
        in_model(config(model_type=family), evaluate),
        rf"olmoe/config\.json: {family} is not supported",
        says,
    )
CASES.add(
    "qwen3_vl_moe_text, which is not a text model",
    in_model(
        config(model_type="qwen3_vl_moe_text", text_config={"num_experts": 8}, vision_config={})
    ),
    r"olmoe/config\.json: qwen3_vl_moe_text is not a text model",
    "take a text model",
)
CASES.add(
    "a model of text, pictures and sound without experts",
    in_model(
        lambda f: (
            without("num_experts")(f),
            config(
                model_type="qwen3_omni_moe",
                thinker_config={"vision_config": {}, "audio_config": {}},
            )(f),
        )
    ),
    r"olmoe is not a MoE model: its config\.json \(model_type 'qwen3_omni_moe'\)",
    "has no num_experts",
)
