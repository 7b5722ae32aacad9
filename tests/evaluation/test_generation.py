"""What models write is judged: loops by construction, pairs, resumed runs, servers."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from expertcut.errors import ExpertcutError, ModelError, SettingsError
from expertcut.evaluation import generation_run
from expertcut.evaluation.completions_server import Server
from expertcut.evaluation.generation import (
    Generated,
    Output,
    compare_generated,
    distinct_4,
    first_divergence,
    is_loop,
    summarize,
)
from expertcut.evaluation.generation_prompts import ModelPrompts, encode_prompts, read_prompts
from expertcut.evaluation.generation_run import GenerateOptions, generate
from expertcut.evaluation.results import load_results
from expertcut.models import kernels
from expertcut.models.load import LoadOptions, find_source
from expertcut.reporting.generation_page import load_written
from tests.conftest import PADDED_FAMILIES, Commands, make_checkpoint, open_model

CPU = LoadOptions()
PROMPTS = "prompts.jsonl"
NEW_TOKENS = 16
ONE_LAYER = {"num_hidden_layers": 1}  # half of the time of a token
# A plain one, sinks and sliding windows, and every kind of recurrent layer.
BATCHED = ("olmoe", "gpt_oss", *PADDED_FAMILIES)
TEXTS = ["amber", "birch cloud delta", "a far longer prompt about ember and fjord", "grove", "h"]


def write_prompts(folder: Path, texts: list[str] = TEXTS) -> Path:
    file = folder / PROMPTS
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return file


def prompts_for(model: Path, file: Path, max_new_tokens: int = NEW_TOKENS) -> ModelPrompts:
    return encode_prompts(find_source(str(model)), read_prompts(file), CPU, max_new_tokens)


def outputs_of(
    model: Path, file: Path, folder: Path, url: str | None = None, **options: Any
) -> Generated:
    options = {"max_new_tokens": NEW_TOKENS, "threads": 1, **options}
    prompts = prompts_for(model, file, options["max_new_tokens"])
    *_, found = generate(
        prompts, GenerateOptions(CPU, **options), folder, Server(url) if url else None
    )
    assert isinstance(found, Generated)
    return found


def cyclic_checkpoint(folder: Path, length: int) -> Path:
    """A model that writes the next token of a cycle: blocks add nothing, the head looks it up."""
    moe = open_model(make_checkpoint(folder, "olmoe", **ONE_LAYER))
    model = moe.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.zero_()
        tokens = torch.arange(len(model.lm_head.weight))
        following = (tokens // length) * length + (tokens + 1) % length
        following = torch.where(following < len(tokens), following, tokens)
        embedding = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight[following] = 20 * embedding
        model.lm_head.weight[:2] = 0  # pad and end are never written
    model.set_experts_implementation("eager")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("length", [1, 7, 25, 20])
def test_three_copies_of_twenty_tokens_are_a_loop_and_one_token_fewer_is_none(length: int) -> None:
    block = list(range(length))
    n_least = 3 * length * -(-20 // length)
    copies = (block * 100)[:n_least]
    assert is_loop([98, 99, *copies])
    assert is_loop([99, *(block * 100)[5 : 5 + n_least]])  # begun within a copy
    assert not is_loop([99, *copies[1:]])
    assert not is_loop([*copies, 99])  # gone on with something else


def test_a_text_without_repetition_is_no_loop() -> None:
    assert not is_loop(range(500))
    assert not is_loop([])


def test_distinct_4_is_the_share_of_different_windows() -> None:
    tokens = [1, 2, 3, 4, 1, 2, 3, 4]
    windows = [tuple(tokens[i : i + 4]) for i in range(5)]
    assert distinct_4(tokens) == len(set(windows)) / len(windows) == 0.8
    assert distinct_4([1, 2, 3]) is None


def test_outputs_diverge_where_the_first_token_differs_or_ends() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2, 3], [1, 2]) == 2
    assert first_divergence([], [1]) == 0


@pytest.mark.parametrize(("length", "loops"), [(1, True), (7, True), (25, True), (60, False)])
def test_a_model_that_repeats_itself_by_construction_is_found(
    tmp_path: Path, length: int, loops: bool
) -> None:
    model = cyclic_checkpoint(tmp_path / "model", length)
    found = outputs_of(model, write_prompts(tmp_path), tmp_path, max_new_tokens=90)
    for output in found.outputs:  # the construction holds
        assert all(b in (a + 1, a + 1 - length) for a, b in pairwise(output.ids))
        assert len(output.ids) == 90 and not output.is_ended
    summary = summarize(found.outputs, 90)
    assert summary.loops is not None
    assert summary.loops.share == float(loops)
    assert summary.length_cap.share == 1


def test_against_a_model_that_writes_freely_loops_are_gained_and_significant(
    tmp_path: Path,
) -> None:
    texts = [f"{word} {n}" for n in range(4) for word in ("amber", "birch")]
    file = write_prompts(tmp_path, texts)
    free, stuck = (
        outputs_of(cyclic_checkpoint(tmp_path / name, n), file, tmp_path, max_new_tokens=60)
        for name, n in (("free", 280), ("stuck", 1))
    )
    change = compare_generated(free, stuck, 60)
    assert change.loops is not None
    assert (change.loops.gained, change.loops.lost, change.loops.delta) == (8, 0, 1.0)
    assert change.loops.mcnemar_p == 2 * 0.5**8
    assert change.differs.share == 1
    back = compare_generated(stuck, free, 60)
    assert back.loops is not None and (back.loops.gained, back.loops.lost) == (0, 8)


def test_loops_are_unknown_below_the_length_of_the_shortest() -> None:
    outputs = [Output((5,) * 59, "x", False)]
    assert summarize(outputs, 59).loops is None
    assert summarize([Output((5,) * 60, "x", False)], 60).loops is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_identical_models_show_no_differences_and_p_of_one(
    checkpoint: Callable[..., Path], tmp_path: Path, temperature: float
) -> None:
    file, options = write_prompts(tmp_path), {"temperature": temperature, "max_new_tokens": 60}
    one = outputs_of(checkpoint("olmoe", **ONE_LAYER), file, tmp_path / "one", **options)
    two = outputs_of(checkpoint("olmoe", **ONE_LAYER), file, tmp_path / "two", **options)
    change = compare_generated(one, two, 60)
    assert change.differs.outputs == 0
    assert change.first_divergence_median is None
    for flag in (change.length_cap, change.loops, change.empty):
        assert flag is not None
        assert (flag.gained, flag.lost, flag.delta, flag.mcnemar_p) == (0, 0, 0, 1)
    other = outputs_of(checkpoint("olmoe", seed=1, **ONE_LAYER), file, tmp_path / "two", **options)
    assert compare_generated(one, other, 60).differs.share == 1


@pytest.mark.parametrize("family", BATCHED)
def test_a_batch_writes_what_each_prompt_alone_writes(
    checkpoint: Callable[..., Path], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, model = write_prompts(tmp_path), checkpoint(family)
    n_rows: list[int] = []
    by_expert = kernels.by_expert
    monkeypatch.setattr(
        kernels, "by_expert", lambda x, *a: n_rows.append(len(x)) or by_expert(x, *a)
    )
    together = outputs_of(model, file, tmp_path / "together")
    assert len(TEXTS) in n_rows  # one token of each, by the loop over experts
    alone = outputs_of(model, file, tmp_path / "alone", batch_tokens=1)
    assert [o.ids for o in together.outputs] == [o.ids for o in alone.outputs]
    assert len({o.ids for o in alone.outputs}) > 1


def test_where_pads_change_a_prompt_each_is_written_alone(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    file, model = write_prompts(tmp_path), checkpoint("olmoe")
    alone = outputs_of(model, file, tmp_path / "alone", batch_tokens=1)
    assert not caplog.text
    load = generation_run.load

    def load_blind(*args: Any) -> Any:
        """A model that sees pads as if they were tokens."""
        moe = load(*args)
        forward = moe.model.forward

        @wraps(forward)
        def run(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            mask = None if attention_mask is None else torch.ones_like(attention_mask)
            return forward(*args, attention_mask=mask, **kwargs)

        moe.model.forward = run
        return moe

    monkeypatch.setattr(generation_run, "load", load_blind)
    found = outputs_of(model, file, tmp_path / "blind")
    assert "one prompt at a time" in caplog.text
    assert found.outputs == alone.outputs


def chunk(folder: Path) -> Path:
    (file,) = folder.glob("*.generations.jsonl")
    return file


def test_a_run_cut_short_anywhere_goes_on_to_the_same_bytes(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file, model = write_prompts(tmp_path), checkpoint("olmoe", **ONE_LAYER)
    options = {"temperature": 0.8, "batch_tokens": 100}  # sampled, in batches of one and two
    whole = outputs_of(model, file, tmp_path / "chunks", **options)
    place = chunk(tmp_path / "chunks")
    content = place.read_bytes()
    *lines, end = content.splitlines(keepends=True)
    middle = sum(map(len, lines[:3]))
    damaged = content[:middle] + content[middle:].replace(b"ids", b"idz", 1)
    for rest in (b"", content[:30], content[:-20], content[: -len(end)], content[:middle], damaged):
        place.write_bytes(rest)
        again = outputs_of(model, file, tmp_path / "chunks", **options)
        assert place.read_bytes() == content
        assert again.outputs == whole.outputs


def test_a_finished_run_writes_nothing_and_another_setting_is_another_file(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, model = write_prompts(tmp_path), checkpoint("olmoe", **ONE_LAYER)
    whole = outputs_of(model, file, tmp_path / "chunks")
    with monkeypatch.context() as patch:
        patch.setattr(generation_run.LocalModel, "complete", None)
        assert outputs_of(model, file, tmp_path / "chunks").outputs == whole.outputs
    outputs_of(model, file, tmp_path / "chunks", max_new_tokens=10)
    outputs_of(model, file, tmp_path / "chunks", temperature=1.0)
    outputs_of(model, file, tmp_path / "chunks", temperature=1.0, seed=1)
    files = list((tmp_path / "chunks").glob("*.generations.jsonl"))
    assert len(files) == 4
    assert len({f.read_bytes().partition(b"\n")[2] for f in files}) == 4  # the seed acts


def test_end_tokens_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    model, file = cyclic_checkpoint(tmp_path / "model", 25), write_prompts(tmp_path, ["amber"])
    (free,) = outputs_of(model, file, tmp_path).outputs
    config = model / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [1, free.ids[4]]}))
    (ended,) = outputs_of(model, file, tmp_path).outputs
    assert ended.ids == free.ids[:4] and ended.is_ended and not free.is_ended
    config.write_text(json.dumps({"eos_token_id": free.ids[0]}))
    (empty,) = outputs_of(model, file, tmp_path).outputs
    assert empty.is_empty and empty.ids == ()
    assert summarize([empty], NEW_TOKENS).empty.share == 1


@contextmanager
def completions_server(model: Path, file: Path, break_it: str = "") -> Iterator[str]:
    """A server of /v1/completions, backed by the model; gives its address."""
    options = GenerateOptions(CPU, max_new_tokens=NEW_TOKENS, threads=1)
    local = generation_run.LocalModel(prompts_for(model, file), options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "some/name"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (asked["model"], asked["temperature"]) == ("some/name", 0)
            assert (self.path, asked["max_tokens"]) == ("/v1/completions", NEW_TOKENS)
            found = local.complete([tuple(ids) for ids in asked["prompt"]], 0)
            choices = [
                {"index": i, "text": o.text, "finish_reason": "stop" if o.is_ended else "length"}
                for i, o in enumerate(found)
            ]
            self.answer({"choices": choices[::-1] if break_it != "few" else choices[1:]})

        def answer(self, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(500 if break_it == "500" else 200)
            self.end_headers()
            self.wfile.write(b"<html>" if break_it == "html" else body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_of_the_model_writes_what_the_model_writes(tmp_path: Path) -> None:
    model, file = cyclic_checkpoint(tmp_path / "model", 26), write_prompts(tmp_path)
    here = outputs_of(model, file, tmp_path / "here")
    with completions_server(model, file) as url:
        for spelling in (url, f"{url}/v1", f"{url}/v1/completions"):
            there = outputs_of(model, file, tmp_path / "there", spelling)
            assert [o.text for o in there.outputs] == [o.text for o in here.outputs]
            assert [o.is_ended for o in there.outputs] == [o.is_ended for o in here.outputs]
            # Bytes that are no text come back as other tokens, so texts are compared.
            assert [o.ids for o in there.outputs] != [o.ids for o in here.outputs]
            assert compare_generated(here, there, NEW_TOKENS).differs.outputs == 0
            assert compare_generated(there, here, NEW_TOKENS).differs.outputs == 0


@pytest.mark.parametrize("break_it", ["500", "html", "few"])
def test_a_server_that_fails_is_told_in_one_line(
    checkpoint: Callable[..., Path], tmp_path: Path, break_it: str
) -> None:
    file = write_prompts(tmp_path)
    with (
        completions_server(checkpoint("olmoe"), file, break_it) as url,
        pytest.raises(ModelError, match=url) as refusal,
    ):
        outputs_of(checkpoint("olmoe"), file, tmp_path, url)
    assert "\n" not in str(refusal.value)


def test_an_address_without_a_server_is_told(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_prompts(tmp_path)
    for url, kind in (("http://127.0.0.1:9", ModelError), ("localhost:8000", SettingsError)):
        with pytest.raises(kind, match=r"cannot be reached|http://localhost:8000/v1"):
            outputs_of(checkpoint("olmoe"), file, tmp_path, url)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": " "}', r"jsonl:2: the prompt is empty"),
        ('{"messages": []}', r"jsonl:1: messages must be turns"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', r"jsonl:1: the prompt is empty"),
        ('{"question": "a"}', r"jsonl:1: must hold prompt .* it holds question"),
        ('{"prompt": "\\ud800"}', "lone surrogate"),
        ("{", r"jsonl:1: not JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no chat template"),
        (json.dumps({"prompt": "a" * 4090}), r"jsonl:1: a prompt of .* tokens and 16 new ones"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused_in_one_line(
    checkpoint: Callable[..., Path], tmp_path: Path, line: str, said: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    with pytest.raises(ExpertcutError, match=said) as refusal:
        prompts_for(checkpoint("olmoe"), file)
    assert "\n" not in str(refusal.value)


def test_a_chat_is_written_in_the_template_up_to_the_answer(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": r, "content": c} for r, c in (("user", "amber?"), ("assistant", "birch"))]
    prompts.write_text(json.dumps({"messages": turns}))
    found = encode_prompts(find_source(str(checkpoint("olmoe"))), [], CPU, NEW_TOKENS)
    tokenizer = found.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (prompt,) = read_prompts(prompts)
    assert prompt.rendered(tokenizer) == "<user>amber?<assistant>"
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ModelError, match="jsonl:1: the tokenizer's chat template fails: no"):
        prompt.rendered(tokenizer)


def test_repeated_prompts_are_warned_of(tmp_path: Path, caplog: Any) -> None:
    read_prompts(write_prompts(tmp_path))
    assert not caplog.text
    read_prompts(write_prompts(tmp_path, [*TEXTS, "h"]))
    assert "1 of 6 prompts are repeats" in caplog.text


def test_eval_judges_a_looping_cut_beside_its_base_and_keeps_what_both_wrote(
    tmp_path: Path, expertcut: Commands
) -> None:
    for name, length in (("base", 280), ("stuck", 7)):
        cyclic_checkpoint(tmp_path / name, length)
    write_prompts(tmp_path, [f"{word} {n}" for n in range(6) for word in ("amber", "birch")])
    command = "eval base stuck --generate prompts.jsonl --max-new-tokens 70 --threads 1"
    said = " ".join(expertcut(command).split())
    assert (
        "loops stuck: 100.0 % (75.8 % … 100.0 %) of its outputs loop, 0.0 % of the base's" in said
    )
    assert "12 only here, 0 only there (McNemar p = 0.00049): worse than the base" in said
    results = load_results(tmp_path / "results.json")
    base, stuck = results.models
    assert results.generation and base.generation and stuck.generation
    assert base.generation.prompts == 12 and base.generation.loops
    assert (base.generation.loops.share, base.generation.length_cap.share) == (0, 1)
    assert base.generation.mean_tokens.mean == 70
    assert stuck.generation.distinct_4 and stuck.generation.distinct_4.mean == pytest.approx(7 / 67)
    (change,) = (c.generation for c in results.comparisons)
    assert change and change.differs.share == 1 and change.first_divergence_median is not None
    lines = load_written(tmp_path / results.generation.outputs, ("base", "stuck"))
    assert [line.prompt for line in lines] == [p.text for p in read_prompts(tmp_path / PROMPTS)]
    assert [o.is_loop for line in lines for o in line.outputs] == [False, True] * 12
    before = {f: f.read_bytes() for f in tmp_path.glob("*.json*")}
    for chunks in (tmp_path / "results.chunks").glob("stuck-*"):  # as if killed
        chunks.write_bytes(chunks.read_bytes()[:-100])
    expertcut(command)
    assert {f: f.read_bytes() for f in tmp_path.glob("*.json*")} == before
    table = expertcut("show results.json --format csv")
    assert "stuck,generation,loops,share,1.0,,12,1.0," in table and ",worse," in table
    expertcut("report results.json")
    page = (tmp_path / "report.html").read_text()
    assert "100.0 % of its outputs loop, 0.0 % of the base&#39;s" in page and "<mark>" in page


def test_eval_of_a_model_beside_itself_finds_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path, expertcut: Commands
) -> None:
    write_prompts(tmp_path)
    model = checkpoint("olmoe")
    said = expertcut(f"eval {model} {model} --generate prompts.jsonl --max-new-tokens 60")
    assert "every output is the base's" in " ".join(said.split())
    (change,) = (c.generation for c in load_results(tmp_path / "results.json").comparisons)
    assert change and change.differs.outputs == 0 and change.first_divergence_median is None
    assert change.loops and change.loops.mcnemar_p == change.length_cap.mcnemar_p == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--max-new-tokens 5", "--max-new-tokens is for --generate"),
        ("--generate prompts.jsonl --max-new-tokens 0", "--max-new-tokens"),
        ("--generate prompts.jsonl --max-new-tokens 4096", "lower --max-new-tokens"),
        ("--generate none.jsonl", "none.jsonl: cannot be read"),
        ("--generate prompts.jsonl --temperature -1", "--temperature"),
        ("--generate prompts.jsonl" + " --base-url http://a" * 3, "3 --base-url for 2 models"),
        ("--generate prompts.jsonl --base-url a:8000", "no address of a server"),
        ("--base-url http://a", "--base-url is for --tasks"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_in_one_line(
    checkpoint: Callable[..., Path], tmp_path: Path, expertcut: Commands, options: str, said: str
) -> None:
    write_prompts(tmp_path)
    refusal = expertcut(f"eval {checkpoint('olmoe')} {checkpoint('olmoe')} {options}", status=2)
    assert said in refusal and refusal.count("\n") == 1


def test_one_server_for_two_models_must_know_them_by_name(
    checkpoint: Callable[..., Path], tmp_path: Path, expertcut: Commands
) -> None:
    file, model = write_prompts(tmp_path), checkpoint("olmoe")
    with completions_server(model, file) as url:
        command = (
            f"eval {model} {model} --generate {file} --max-new-tokens {NEW_TOKENS} --base-url {url}"
        )
        assert "serves some/name, not" in expertcut(command, status=2)
        expertcut(f"{command} --base-url {url}")
    (change,) = (c.generation for c in load_results(tmp_path / "results.json").comparisons)
    assert change and change.differs.outputs == 0 and change.loops is None
