"""Shared fixtures: no network, tiny models whose experts matter, a quiz, the real data if there."""

import io
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from unittest.mock import patch

# Before any import of a Hugging Face library: these are read at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["EXPERTCUT_CACHE"] = os.devnull  # every run checks anew

import csv
import gc
from typing import Any

import pytest
import torch
import typer.main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils import collect_env
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from expertcut.cli import main, progress
from expertcut.data import Selection, load_quiz
from expertcut.models.load import LoadOptions, MoeModel, find_source, load
from expertcut.models.validate import auto_class
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.storage import Profile, load_profile
from expertcut.reporting import plots
from tests.support.families import COMMON, EIGHT, LATENT, MORE, SHARED_EXPERT, SMALL

Commands = Callable[..., str]
SHARED = Path(__file__).resolve().parents[2] / "shared"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUBJECTS = ("green_birds", "old_clocks", "tall_trees")
COUNTS = {"dev": 5, "val": 7, "test": 11}
WORDS = [
    *("amber", "birch", "cloud", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty"),
    *("knoll", "lemon", "maple"),
]

# By config.model_type; all layers are MoE layers, what the families differ in is switched on.
FAMILIES: dict[str, dict[str, object]] = {
    "olmoe": EIGHT,
    "flex_olmo": EIGHT,
    "qwen2_moe": {**EIGHT, **SHARED_EXPERT},
    "qwen3_moe": {**EIGHT, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    "mixtral": {**SMALL, "num_local_experts": 8},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    "deepseek_v3": LATENT,
    "gpt_oss": {
        **SMALL,
        "num_local_experts": 8,
        "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
    },
    "glm4_moe": {
        **SMALL,
        "head_dim": 8,
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 0,
        "num_mtp_layers": 0,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
    },
    "granitemoe": {**SMALL, "num_local_experts": 8, "residual_multiplier": 0.5},
    "phimoe": {**SMALL, "num_local_experts": 8, "router_jitter_noise": 0.2},
    "ernie4_5_moe": {
        **COMMON,
        "intermediate_size": 16,
        "moe_k": 2,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
    "minimax_m2": {**SMALL, "num_local_experts": 8, "head_dim": 8},
    "lfm2_moe": {
        **EIGHT,
        "moe_intermediate_size": 16,
        "num_dense_layers": 0,
        "layer_types": ["conv", "full_attention"],
    },
    "jamba": {
        **EIGHT,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **EIGHT,
        **SHARED_EXPERT,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
PADDED_FAMILIES = ("lfm2_moe", "jamba", "qwen3_next")  # with recurrent layers
# What makes the first of three or four layers dense.
DENSE_FIRST: dict[str, dict[str, object]] = {
    "qwen2_moe": {"mlp_only_layers": [0]},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "jamba": {"num_hidden_layers": 4, "expert_layer_offset": 1, "expert_layer_period": 2},
    "qwen3_next": {
        "mlp_only_layers": [0],
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}
# A family of each form in which experts are stored: by projection, as w1 to w3, fused with biases,
# fused without.
FROZEN = [0]  # numbers of modules
# Numbers again and again, by code that others walk too: following its lines takes as long as that.
UNTRACED = {
    *("test_audit", "test_contract", "test_contrast", "test_contrast_generate", "test_criteria"),
    *("test_engine", "test_evaluation", "test_extension", "test_layouts", "test_lm_eval"),
    *("test_matrix", "test_numbers", "test_placement", "test_planted", "test_planted_tilts"),
    *("test_profile", "test_rescoring", "test_reweighting", "test_route_tuning", "test_routed"),
    *("test_routed_exact", "test_sparse_attention", "test_stock", "test_streaming"),
    *("test_tilting",),
}
STORAGE_FORMS = ("olmoe", "mixtral", "gpt_oss", "granitemoe")
# These, those with recurrent layers, with latent attention, and with a shared expert.
DIFFERENT = (*STORAGE_FORMS, *PADDED_FAMILIES, "deepseek_v3", "qwen2_moe")


SAVED_AS_SHIPPED = plots._saved


def _saved_small(name: str, canvas: Any) -> dict[str, bytes]:
    """A figure in few dots and as its parts were put: to lay it out takes most of its time."""
    canvas.set_layout_engine("none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_DPI", 20)
        return SAVED_AS_SHIPPED(name, canvas)


# Here, for processes that tests start too; tests/reporting sees figures as they are shipped.
plots._saved = _saved_small


def pytest_configure() -> None:
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    collect_env.get_pretty_env_info = lambda: "a machine"  # lm_eval asks ten programs, each time
    os.fsync = lambda _file: None  # some 15 ms each, and no test pulls the plug
    progress.FIRST_LINE_S = 60.0  # stderr of a refusal is one line, however busy the machine
    build = typer.main.get_command
    built: dict[object, object] = {}

    def get_command(app: typer.Typer) -> object:
        """The commands, built once: at each call anew, that is a third of a refused command."""
        key = (app, len(app.registered_commands))
        return built.get(key) or built.setdefault(key, build(app))

    typer.main.get_command = get_command  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in UNTRACED:
            item.add_marker(pytest.mark.no_cover)


def slow_but(quick: Iterable[str], names: Iterable[str]) -> list[Any]:
    """Cases of a test that stay in the default suite, and all others, opted into by `-m slow`."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one token for each letter behind a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    merges = [("Ġ", letter) for letter in LETTERS]
    for merge in merges:
        vocabulary["".join(merge)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )


def make_checkpoint(folder: Path, family: str, seed: int = 0, **changes: object) -> Path:
    """A random model of a family, saved as a stranger would find it."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**(FAMILIES | MORE)[family], **changes})
    model = auto_class(config, is_whole=True).from_config(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # A selection bias of zero would hide a path that forgets it.
        # So are the whole routers of ERNIE in transformers 5.22; a talker's experts are not made.
        if name.endswith(("e_score_correction_bias", "expert_bias", "router.bias")) or (
            (name.endswith("gate.weight") and not tensor.any())
            or (name.startswith("talker.") and ".experts." in name)
        ):
            tensor.data.normal_(0, 0.25)
        elif name.endswith("tid2eid"):  # which experts a token id is sent to
            order_VE = torch.rand(len(tensor), config.n_routed_experts).argsort(dim=-1)
            tensor.data.copy_(order_VE[:, : tensor.shape[1]])
        elif name.endswith("per_expert_scale"):
            tensor.data.uniform_(0.5, 1.5)
        elif name.endswith("layer_scalar"):
            tensor.data.fill_(0.5)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_quiz(folder: Path, counts: dict[str, int] = COUNTS, seed: int = 0) -> Path:
    """A Hendrycks CSV folder with questions of uneven length; no two are alike."""
    chance = random.Random(seed)
    number = 0
    for split, n_questions in counts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject in SUBJECTS:
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                for _ in range(n_questions):
                    number += 1
                    words = " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))
                    choices = chance.sample(WORDS, 4)
                    row = [f"{number}: {words}?", *choices, chance.choice("ABCD")]
                    writer.writerow(row)
    return folder


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code out of checkpoints goes into a folder of the tests'."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        # The package of an earlier folder would hide what is imported from this one.
        others = [p for p in sys.path if not (Path(p) / "transformers_modules").is_dir()]
        patch.setattr(sys, "path", others)
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            patch.delitem(sys.modules, name)
        yield
    for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def quiz_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quiz(tmp_path_factory.mktemp("quiz") / "birds")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("olmoe", seed=1, ...)`: a random checkpoint, made once a session."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("checkpoints")

    def find(family: str, **changes: object) -> Path:
        key = repr((family, sorted(changes.items())))
        if key not in made:
            made[key] = make_checkpoint(root / f"{family}-{len(made)}", family, **changes)  # type: ignore[arg-type]
        return made[key]

    return find


def profiled(model: Path, quiz_folder: Path, folder: Path, shots: int = 1) -> Profile:
    """The profile of a model on the split `val`, measured into `folder`."""
    quiz = load_quiz(Selection(str(quiz_folder), split="val", shots=shots))
    list(Measurement(open_model(model), quiz, None, MeasureOptions()).run(folder))
    return load_profile(folder)


@pytest.fixture(scope="session")
def profile_of(
    checkpoint: Callable[..., Path], quiz_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Profile]:
    """`profile_of("olmoe", seed=1, ...)`: that checkpoint, `profiled` once a session, to read."""
    made: dict[Path, Path] = {}

    def find(family: str, **changes: object) -> Profile:
        model = checkpoint(family, **changes)
        if model not in made:
            folder = tmp_path_factory.mktemp("profiles") / model.name
            made[model] = profiled(model, quiz_folder, folder).path
        return load_profile(made[model])

    return find


@pytest.fixture
def expertcut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Commands:
    """Runs a command in `tmp_path`: a line, or its words one by one. Gives what it printed.

    With `status` it must be refused so, and what it was refused for is given.
    """
    monkeypatch.chdir(tmp_path)

    def run(*words: object, status: int = 0) -> str:
        line = " ".join(map(str, words)).split() if len(words) == 1 else map(str, words)
        monkeypatch.setattr(sys, "argv", ["expertcut", *line])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == status, printed.err
        torch.set_num_threads(1)
        return printed.out if status == 0 else printed.err

    return run


@cache
def help_of(*command: str) -> str:
    """What `--help` prints, in this process: to start one takes a hundred times as long."""
    printed = io.StringIO()
    with (
        patch.dict(os.environ, COLUMNS="80"),
        patch.object(sys, "argv", ["expertcut", *command, "--help"]),
        redirect_stdout(printed),
        suppress(SystemExit),
    ):
        main()
    return printed.getvalue()


@pytest.fixture(params=FAMILIES)
def tiny_moe(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> MoeModel:
    """A fresh tiny model of each family."""
    return open_model(checkpoint(request.param))


@pytest.fixture(params=DIFFERENT)
def different_moe(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> MoeModel:
    """A fresh tiny model of each family that differs in form."""
    return open_model(checkpoint(request.param))


def open_model(path: Path, **options: str) -> MoeModel:
    return load(find_source(str(path)), LoadOptions(**options))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def real_mmlu() -> Path:
    folder = SHARED / "data" / "mmlu"
    if not folder.is_dir():
        pytest.skip("the real MMLU is not here (../shared/data/mmlu)")
    return folder


@pytest.fixture(scope="session")
def real_tokenizer() -> Path:
    folder = SHARED / "data" / "olmoe"
    if not folder.is_dir():
        pytest.skip("the real OLMoE tokenizer is not here (../shared/data/olmoe)")
    return folder


def pytest_runtest_logfinish() -> None:
    """What is imported stays: not to be searched for garbage again by every collection."""
    if len(sys.modules) > FROZEN[-1] + 100:
        FROZEN.append(len(sys.modules))
        gc.collect()
        gc.freeze()
