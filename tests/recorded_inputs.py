"""What the recorded commands read: models, quizzes, texts, adapters and recipes.

Made with transformers and peft alone, without expertcut and without tests/conftest.py, so that a
refactoring of either leaves these inputs as they are. The families' configurations are written out
here for the same reason.
"""

import csv
import json
import random
import shutil
import warnings
from itertools import islice
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "checkpoints" / "quickstart"
BUNDLED = "bundled"
# Rows of each subject of the bundled quiz, and questions of each of a family's.
N_ROWS = {"dev": 5, "val": 8, "test": 6}
SUBJECTS = ("green_birds", "old_clocks", "tall_trees")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WORDS = ("amber", "birch", "cloud", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty")

_SMALL = {
    "vocab_size": 290,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "intermediate_size": 16,
    "num_experts_per_tok": 2,
    "initializer_range": 0.25,  # with 0.02 experts do not matter
}
# By config.model_type: a softmax that renormalises; a sigmoid with groups, a selection bias and a
# shared expert; a router with biases and experts in one tensor.
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3_moe": {
        **_SMALL,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        **_SMALL,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 0,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    "gpt_oss": {
        **_SMALL,
        "num_local_experts": 8,
        "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
    },
}
WORLDS = (BUNDLED, *FAMILIES)
STOCK_ONLY = ("deepseek_v3", "gpt_oss")  # layout exact does not know them

RECIPE = """\
model: model
quiz: quiz
shots: 1
threads: 1
out: recipe
profile: {split: val, limit: 4}
show: {subjects: true}
variants:
- name: pruned
  prune: {keep_fraction: 0.5}
- name: tilted
  reweight: {boost: ["1:2=0.5"], layout: LAYOUT}
- name: healed
  heal: {of: pruned, steps: 2, batch: 4, micro_batch: 2, check_every: 1, rank: 2}
eval: {split: test, limit: 2}
report:
publish:
- {variant: pruned, repo: someone/pruned, dry_run: true}
"""


def make_inputs(world: Path) -> None:
    """Writes the inputs of one world, named by its folder.

    These are model/, quiz/, lora/, single.jsonl, text.jsonl and recipe.yaml. `lora` is a LoRA
    adapter of the model whose deltas are as large as the weights.
    """
    world.mkdir(parents=True)
    if world.name == BUNDLED:
        _copy_bundled(world)
    else:
        _make_model(world / "model", world.name)
        _make_quiz(world / "quiz")
    _make_adapter(world / "model", world / "lora")
    _make_single(world / "quiz", world / "single.jsonl")
    _make_texts(world / "quiz", world / "text.jsonl")
    layout = "stock" if world.name in STOCK_ONLY else "exact"
    (world / "recipe.yaml").write_text(RECIPE.replace("LAYOUT", layout), encoding="utf-8")


def _copy_bundled(world: Path) -> None:
    """The bundled checkpoint, and the first rows of each file of its quiz."""
    (world / "model").mkdir()
    for file in sorted(QUICKSTART.iterdir()):
        if file.suffix in (".json", ".safetensors"):
            shutil.copyfile(file, world / "model" / file.name)
    for split, n_rows in N_ROWS.items():
        (world / "quiz" / split).mkdir(parents=True)
        for file in sorted((QUICKSTART / "quiz" / split).glob("*.csv")):
            with file.open(encoding="utf-8", newline="") as source:
                rows = list(islice(csv.reader(source), n_rows))
            _write_rows(world / "quiz" / split / file.name, rows)


def _make_quiz(folder: Path) -> None:
    """A Hendrycks CSV folder of questions of uneven length; no two are alike."""
    chance = random.Random(0)
    number = 0
    for split, n_questions in N_ROWS.items():
        (folder / split).mkdir(parents=True)
        for subject in SUBJECTS:
            rows = []
            for _ in range(n_questions):
                number += 1
                words = " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))
                choices = chance.sample(WORDS, 4)
                rows.append([f"{number}: {words}?", *choices, chance.choice("ABCD")])
            _write_rows(folder / split / f"{subject}_{split}.csv", rows)


def _write_rows(file: Path, rows: list[list[str]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as target:
        csv.writer(target).writerows(rows)


def _make_single(quiz: Path, file: Path) -> None:
    """A quiz of one set of questions as JSON lines, of which a part judges: some of split val."""
    lines = []
    for questions in sorted((quiz / "val").glob("*.csv")):
        with questions.open(encoding="utf-8", newline="") as source:
            for question, *choices, answer in islice(csv.reader(source), 6):
                subject = questions.stem.removesuffix("_val")
                row = {"question": question, "choices": choices, "answer": answer}
                lines.append(json.dumps({**row, "subject": subject}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _make_texts(quiz: Path, file: Path) -> None:
    """JSON lines with the text of some questions of split val, for `heal --text`."""
    texts = []
    for questions in sorted((quiz / "val").glob("*.csv")):
        with questions.open(encoding="utf-8", newline="") as source:
            texts += [" ".join(row[:5]) for row in islice(csv.reader(source), 4)]
    lines = [json.dumps({"text": text}) for text in texts]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _make_model(folder: Path, family: str) -> None:
    """A random model of a family, saved as transformers saves it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # A selection bias of zero would hide a path that forgets it.
        if name.endswith(("e_score_correction_bias", "router.bias")):
            tensor.data.normal_(0, 0.25)
    model.save_pretrained(folder)
    _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> None:
    """Bytes, and one token for each letter behind a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    merges = [("Ġ", letter) for letter in LETTERS]
    for merge in merges:
        vocabulary["".join(merge)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    ).save_pretrained(folder)


def _make_adapter(model: Path, folder: Path) -> None:
    """LoRA on attention, all experts and the router; as peft begins, deltas would be zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        init_lora_weights=False,
        target_modules=["q_proj", "q_b_proj", "o_proj"],
        target_parameters=[
            *("experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight", "router.weight"),
        ],
    )
    with warnings.catch_warnings():  # of parameters that a family does not have
        warnings.simplefilter("ignore")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written["base_model_name_or_path"] = "model"
    for key in ("target_modules", "target_parameters"):  # peft has sets, in any order
        written[key] = sorted(written[key])
    file.write_text(json.dumps(written, indent=2), encoding="utf-8")
