"""Options of `compress`: their grammar, what loaders take, and `compress.json`."""

from pathlib import Path

import pytest

from expertcut.edits.compression import (
    LOADERS,
    BlockErrors,
    CompressionFile,
    CompressionQuestion,
    Loader,
    Option,
    Solver,
    check_menu,
    load_compression,
    parse_options,
)
from expertcut.errors import PlanError, SettingsError

MENU = "1,2,3,4,8,lowrank:0.25,lowrank:0.25:0.1,mean,zero,copy,whole"
SHAPES = {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}


def test_an_option_reads_as_it_is_written():
    assert ",".join(map(str, parse_options(MENU))) == MENU
    assert Option.parse(" lowrank:.5 ") == Option("lowrank", rank_share=0.5)
    assert Option("lowrank", rank_share=1 / 3).kind == "lowrank"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        *(("9", "is not an option"), ("0", "width"), ("", "is not an option"), ("4bit", "width")),
        *(("lowrank", "lowrank:SHARE"), ("lowrank:0", "between 0 and 1")),
        *(("lowrank:2", "between 0 and 1"), ("lowrank:0.2:1.5", "between 0 and 1")),
        ("4,8,4", "twice"),
    ],
)
def test_other_texts_are_refused(text: str, part: str):
    with pytest.raises(SettingsError, match=part):
        parse_options(text)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        # 24,576 weights in groups of 64: 384 scales, three shapes of two int64.
        *(("4", 24576 // 2 + 2 * 384 + 3 * 16), ("1", 24576 // 8 + 2 * 384 + 3 * 16)),
        ("3", 24576 // 8 * 3 + 2 * 384 + 3 * 16),
        # 0.25 · 64 · 128 / 192 are 10.67 columns, rounded up; a tenth of the rows: 7, 7 and 13.
        ("lowrank:0.25", 3 * 2 * 11 * 192),
        ("lowrank:0.25:0.1", 3 * 2 * 11 * 192 + 2 * 7 * (2 * 128 + 4) + 13 * (2 * 64 + 4)),
        *(("mean", 256), ("zero", 256), ("copy", 258), ("whole", 2 * 24576)),
    ],
)
def test_bytes_of_an_expert_are_those_of_the_formula(text: str, n_bytes: int):
    assert Option.parse(text).expert_bytes(SHAPES, "BF16", 128, 64) == n_bytes


def test_seven_hundredths_of_a_hundred_rows_are_seven():
    assert 0.07 * 100 > 7
    assert Option("lowrank", rank_share=0.5, row_share=0.07).n_rows((100, 64)) == 7


def test_group_size_that_does_not_divide_a_width_is_refused_with_one_that_does():
    with pytest.raises(SettingsError, match="--group-size 128 does not divide the 64 columns of"):
        Option.parse("4").expert_bytes(SHAPES, "BF16", 128, 128)
    with pytest.raises(SettingsError, match="take 64 or 32 or 16"):
        Option.parse("4").stored("down_proj.weight", (8, 64), "BF16", 48)
    assert Option.parse("lowrank:0.5").expert_bytes(SHAPES, "BF16", 128, 128) > 0


@pytest.mark.parametrize("loader", LOADERS)
def test_default_options_are_taken_in_every_grain(loader: Loader):
    rules = LOADERS[loader]
    for grain in rules.grains:
        check_menu(parse_options(rules.options), loader, grain, 128)


@pytest.mark.parametrize(
    ("loader", "options", "grain", "group_size", "part"),
    [
        ("vllm", "4", "expert", 128, "expert 0 .*; take --grain layer or --for transformers"),
        ("vllm", "2,4", "layer", 128, "--allow 2"),
        ("vllm", "3", "layer", 128, "take 4, 8 or whole"),
        ("vllm", "lowrank:0.25", "layer", 128, "option lowrank:0.25"),
        ("vllm", "copy", "layer", 128, "option copy"),
        ("vllm", "4", "layer", 48, "32, 64, 128"),
        ("llama.cpp", "4", "expert", 128, "one type"),
        ("llama.cpp", "1", "layer", 128, "option 1"),
        ("llama.cpp", "mean", "layer", 128, "--for transformers"),
    ],
)
def test_what_a_loader_does_not_take_is_refused(
    loader: Loader, options: str, grain: str, group_size: int, part: str
):
    with pytest.raises(SettingsError, match=part) as refusal:
        check_menu(parse_options(options), loader, grain, group_size)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value) and f"--for {loader}" in str(refusal.value)


def test_two_bits_are_taken_by_vllm_where_allowed():
    check_menu(parse_options("2,4"), "vllm", "layer", 128, allow=("2",))


def test_llama_cpp_takes_another_type_where_a_block_does_not_divide_the_columns():
    two, four = parse_options("2,4")
    assert [two.ggml_type(c, "BF16") for c in (512, 64, 48)] == ["q2_K", "q4_0", "f16"]
    assert four.ggml_type(64, "BF16") == "q4_0"
    assert Option("whole").ggml_type(48, "BF16") == "bf16"
    assert four.gguf_bytes({"gate": (10, 512), "down": (10, 64)}, "BF16") == 10 * (2 * 144 + 2 * 18)


def test_compress_json_is_read_as_it_was_written(tmp_path: Path):
    asked = CompressionQuestion(
        options="4,8", grain="expert", group_size=32, tokens=10, questions=2, fingerprint="ab"
    )
    table = CompressionFile(
        asked=asked,
        units=("model.layers.0.mlp:0", "model.layers.0.mlp:1"),
        options=("4", "8"),
        error=((0.5, None), (1e-9, 0.0)),
        bytes=((10, 20), (10, 20)),
        block_error=BlockErrors(sum=(0.5,), measured=(0.4,)),
        solver=Solver(status="optimal", gap=0.0, seconds=0.1),
    )
    table.save(tmp_path / "compress.json")
    assert load_compression(tmp_path / "compress.json") == table
    assert table.menu == parse_options("4,8")
    assert table.layers == ("model.layers.0.mlp",) * 2
    text = (tmp_path / "compress.json").read_text()
    for part, other, refusal in (
        ('"model.layers.0.mlp:0",', "", "error is not a table of 1 units"),
        ('"8"\n', '"9"\n', "options: '9' is not an option"),
    ):
        assert text.count(part) == 1
        (tmp_path / "compress.json").write_text(text.replace(part, other))
        with pytest.raises(PlanError, match=refusal):
            load_compression(tmp_path / "compress.json")
