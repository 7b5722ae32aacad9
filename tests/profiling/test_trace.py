"""A routing trace against brute force (one prompt at a time, hooks only) and against a profile."""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertcut.data import Quiz, Selection, load_quiz, prompt
from expertcut.data.corpus import TextSelection, load_corpus
from expertcut.errors import ProfileError
from expertcut.models.load import MoeModel
from expertcut.profiling import trace_recorder
from expertcut.profiling.measure import Measurement, MeasureOptions
from expertcut.profiling.measure_text import TextMeasurement
from expertcut.profiling.storage import load_profile, read_chunk, write_chunk
from expertcut.profiling.trace import Trace, load_trace
from expertcut.profiling.trace_recorder import QuizTracing, TextTracing, TraceOptions
from expertcut.scoring import engine as engines
from expertcut.scoring.packing import Pass
from expertcut.scoring.passes import Run
from tests.conftest import FAMILIES, Commands, open_model, slow_but
from tests.profiling.test_text_profile import texts, written
from tests.support.processes import PROCESSES, Task, chunk_bytes, ended, logged, long_quiz, start
from tests.support.routed_models import make_routed, routed_plan

Checkpoints = Callable[..., Path]
Array = np.ndarray[Any, Any]
HOW = MeasureOptions(batch_tokens=300)
LENGTH = 24


QUICK = ("olmoe", "deepseek_v3", "jamba")  # packed, in groups, padded


@pytest.fixture(scope="module")
def quiz(quiz_folder: Path) -> Quiz:
    return load_quiz(Selection(str(quiz_folder), shots=2, limit=4))


def traced(moe: MoeModel, quiz: Quiz, folder: Path, **kept: Any) -> Trace:
    list(QuizTracing(moe, quiz, 4, HOW, TraceOptions(**kept)).run(folder))
    return load_trace(folder)


def traced_texts(moe: MoeModel, folder: Path, file: str) -> Trace:
    corpus = load_corpus(TextSelection((file,), LENGTH), moe.tokenizer)
    list(TextTracing(moe, corpus, HOW, TraceOptions()).run(folder))
    return load_trace(folder)


def counted(trace: Trace) -> Array:
    """Tokens by layer and expert."""
    n_experts = trace.n_experts_L.max()
    counts_LE = np.zeros((len(trace.n_experts_L), n_experts))
    for sequence in trace.sequences():
        for layer in range(len(counts_LE)):
            own = sequence.experts_TLK[:, layer].ravel()
            counts_LE[layer] += np.bincount(own[own >= 0], minlength=n_experts)
    return counts_LE


def prompts(moe: MoeModel, quiz: Quiz) -> list[list[int]]:
    texts = [prompt(q, quiz.shots_by_subject[q.subject]) for q in quiz]
    return [moe.tokenizer(text)["input_ids"] for text in texts]


def routed_alone(moe: MoeModel, ids: Sequence[int]) -> Iterator[tuple[Array, Array, Array]]:
    """Experts, gate weights and logits of one prompt in every layer."""
    found: dict[int, tuple[Array, Array, Array]] = {}

    def note(layer: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, output: Any) -> None:
            logits, weights, experts = (part.float().numpy() for part in output)
            found[layer] = experts, weights, logits

        return hook

    handles = [b.router.register_forward_hook(note(b.layer)) for b in moe.blocks]
    with torch.inference_mode():
        moe.model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    yield from (found[layer] for layer in range(len(moe.blocks)))


# What is in it


def test_a_trace_holds_every_token_of_every_prompt_with_its_experts_weights_and_logits(
    different_moe: MoeModel, quiz: Quiz, tmp_path: Path
) -> None:
    trace = traced(different_moe, quiz, tmp_path / "t", weights=True, logits=True)
    sequences = list(trace.sequences())
    assert [s.token_T.tolist() for s in sequences] == prompts(different_moe, quiz)
    for sequence in sequences[::5]:
        assert 0 < sequence.n_shared < len(sequence)
        for layer, found in enumerate(routed_alone(different_moe, sequence.token_T.tolist())):
            experts, weights, logits = found
            assert (sequence.experts_TLK[:, layer] == experts).all()
            assert sequence.weights_TLK is not None and sequence.logits_TLE is not None
            np.testing.assert_allclose(sequence.weights_TLK[:, layer], weights, rtol=2e-3)
            np.testing.assert_allclose(sequence.logits_TLE[:, layer], logits, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", slow_but(QUICK, FAMILIES))
def test_the_chunks_of_a_trace_sum_to_the_tokens_of_a_profile(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, family: str
) -> None:
    moe = open_model(checkpoint(family))
    list(Measurement(moe, quiz, 4, HOW).run(tmp_path / "p"))
    tokens_LE = load_profile(tmp_path / "p").token_sum("tokens")
    assert tokens_LE is not None and tokens_LE.sum() > 1000
    assert (counted(traced(moe, quiz, tmp_path / "t")) == tokens_LE).all()


@pytest.mark.parametrize("family", QUICK)
def test_a_trace_of_texts_sums_to_their_profile(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    moe, file = open_model(checkpoint(family)), written(tmp_path, "code", texts(9, seed=3))
    corpus = load_corpus(TextSelection((file,), LENGTH), moe.tokenizer)
    list(TextMeasurement(moe, corpus, HOW, has_loss=False).run(tmp_path / "p"))
    trace = traced_texts(moe, tmp_path / "t", file)
    assert (counted(trace) == load_profile(tmp_path / "p").token_sum("tokens")).all()
    rows = [row.ids.tolist() for row in corpus.rows["code"]]
    assert [s.token_T.tolist() for s in trace.sequences()] == rows
    assert trace.info.n_tokens == sum(map(len, rows))


@pytest.mark.parametrize("mode", ["padded", "single"])
def test_packed_padded_and_single_prompts_give_the_same_sequences(
    mode: str, checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("olmoe")
    packed = traced(open_model(path), quiz, tmp_path / "packed")
    monkeypatch.setattr(engines.passes, "scoring_mode", lambda *_: mode)
    other = traced(open_model(path), quiz, tmp_path / mode)
    assert packed.info.n_tokens < other.info.n_tokens  # where shots run once they are kept once
    pairs = list(zip(packed.sequences(), other.sequences(), strict=True))
    assert len(pairs) == len(quiz)
    for one, two in pairs:
        assert one.n_shared == two.n_shared
        assert (one.token_T == two.token_T).all()
        assert (one.experts_TLK == two.experts_TLK).all()


def test_a_place_that_a_rule_leaves_empty_is_minus_1(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, modules_cache: None
) -> None:
    moe = open_model(checkpoint("olmoe"))
    make_routed(moe, routed_plan(moe, "top-p", 0.3), tmp_path / "routed")
    routed = open_model(tmp_path / "routed", trust_remote_code=True)  # type: ignore[arg-type]
    trace = traced(routed, quiz, tmp_path / "t")
    list(Measurement(routed, quiz, 4, HOW).run(tmp_path / "p"))
    assert (counted(trace) == load_profile(tmp_path / "p").token_sum("tokens")).all()
    experts_XK = np.concatenate([s.experts_TLK.reshape(-1, 2) for s in trace.sequences()])
    assert 0 < (experts_XK[:, 1] == -1).mean() < 1 and (experts_XK[:, 0] >= 0).all()


@pytest.mark.parametrize(("n_experts", "kind"), [(256, np.uint8), (257, np.uint16)])
def test_ids_take_one_byte_up_to_256_experts(
    n_experts: int, kind: type, checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
) -> None:
    moe = open_model(checkpoint("olmoe", num_experts=n_experts))
    trace = traced(moe, quiz, tmp_path / "t", tokens=400)
    assert {chunk["experts_TLK"].dtype for chunk in trace.read_chunks()} == {np.dtype(kind)}
    first = next(trace.sequences())
    for layer, found in enumerate(routed_alone(moe, first.token_T.tolist())):
        assert (first.experts_TLK[:, layer] == found[0]).all()


# How much of it


def test_questions_are_taken_in_turn_of_each_subject_until_the_tokens_are_spent(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    whole = traced(moe, quiz, tmp_path / "whole")
    bound = whole.info.n_tokens * 2 // 3
    part = traced(moe, quiz, tmp_path / "part", tokens=bound)
    counts = [s.questions for s in part.info.quiz.subjects.values()]
    assert bound * 0.8 < part.info.n_tokens <= bound
    assert max(counts) - min(counts) <= 1 and sum(counts) < len(quiz)
    one = traced(moe, quiz, tmp_path / "one", tokens=1)
    assert one.n_sequences == 1 and len(next(one.sequences())) == one.info.n_tokens


def test_halves_split_questions_and_documents(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
) -> None:
    moe = open_model(checkpoint("olmoe"))
    trace = traced(moe, quiz, tmp_path / "t")
    sequences = list(trace.sequences())
    ids = [[s.token_T.tolist() for s in half] for half in trace.halves()]
    assert ids == [[s.token_T.tolist() for s in sequences[i::2]] for i in (0, 1)]
    records = texts(6, seed=4)
    halves = traced_texts(moe, tmp_path / "x", written(tmp_path, "chat", records)).halves()
    said = ["".join(moe.tokenizer.decode(s.token_T) for s in half) for half in halves]
    assert said == ["".join(record["text"] for record in records[i::2]) for i in (0, 1)]


def test_chunks_are_cut_so_that_logits_fit(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = open_model(checkpoint("olmoe"))
    whole = traced(moe, quiz, tmp_path / "whole", logits=True)
    monkeypatch.setattr(trace_recorder, "_CHUNK_BYTES", 1 << 15)
    small = traced(moe, quiz, tmp_path / "small", logits=True)
    assert len(list(small.info.chunks())) > len(list(whole.info.chunks()))
    assert (counted(small) == counted(whole)).all()


# Interrupted, shared, damaged


@pytest.fixture(scope="module")
def undisturbed(
    checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("undisturbed")
    task = Task(checkpoint("olmoe"), long_quiz(root / "birds"), root / "t", traces=True)
    assert ended(start(task)) == 0
    return task.model, task.quiz, task.out


def test_a_trace_that_was_killed_goes_on_to_the_same_bytes(
    undisturbed: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, quiz, whole = undisturbed
    out = tmp_path / "t"
    death = "while the fourth chunk is written"
    assert ended(start(Task(model, quiz, out, die=death, traces=True))) == -signal.SIGKILL
    assert len(kept := chunk_bytes(out)) == 3
    for log in tmp_path.glob("t.*"):
        log.unlink()
    assert ended(start(Task(model, quiz, out, traces=True))) == 0
    assert logged(out, "chunks") == sorted(chunk_bytes(whole).keys() - kept.keys())
    assert chunk_bytes(out) == chunk_bytes(whole)
    assert (out / "trace.json").read_bytes() == (whole / "trace.json").read_bytes()
    assert load_trace(out).finished_at is not None


def test_two_processes_share_a_trace(undisturbed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, quiz, whole = undisturbed
    out, barrier = tmp_path / "t", PROCESSES.Barrier(2)
    joined = [start(Task(model, quiz, out, barrier=barrier, traces=True)) for _ in range(2)]
    assert [ended(process) for process in joined] == [0, 0]
    assert logged(out, "chunks") == sorted(chunk_bytes(whole))  # none twice
    assert chunk_bytes(out) == chunk_bytes(whole)


def _first(name: str, value: float) -> Callable[[dict[str, Array]], None]:
    def change(arrays: dict[str, Array]) -> None:
        arrays[name].flat[0] = value

    return change


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_first("experts_TLK", 8), "names experts that are not in model.layers.0.mlp"),
        (_first("experts_TLK", 255), "names experts that are not in model.layers.0.mlp"),
        (_first("sequence_T", 1), "sequence_T does not number"),
        (_first("token_T", -1), "token_T or row_N has a negative number"),
        (_first("weights_TLK", np.nan), "weights_TLK holds a value that is not finite"),
        (lambda arrays: arrays.pop("weights_TLK"), "it has no weights_TLK"),
        (lambda a: a.update(token_T=a["token_T"][1:]), "sequence_T has shape"),
        (lambda a: a.update(row_N=a["row_N"].astype(np.int64)), "row_N has type int64"),
    ],
)
def test_a_chunk_that_says_what_cannot_be_is_refused(
    change: Callable[[dict[str, Array]], None],
    fault: str,
    checkpoint: Checkpoints,
    quiz: Quiz,
    tmp_path: Path,
) -> None:
    trace = traced(open_model(checkpoint("olmoe")), quiz, tmp_path / "t", weights=True)
    name, subject, _ = next(trace.info.chunks())
    file, of = trace.path / "chunks" / name, trace.info.chunk_hash(name, subject)
    arrays = read_chunk(file, of)
    change(arrays)
    write_chunk(file, arrays, of)
    with pytest.raises(ProfileError, match=f"{name} is damaged .*{fault}.*: trace again"):
        list(load_trace(trace.path).sequences())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"n_tokens": 9}, "t has [\\d,]+ tokens, and its trace.json says 9: trace again"),
        ({"n_tokens": 0}, "trace.json is not a valid trace: n_tokens"),
        ({"chunk_questions": 257}, "trace.json is not a valid trace: chunk_questions"),
        ({"text": {}}, "trace.json is not a valid trace: text"),
        ({"settings": {}}, "trace.json is not a valid trace: settings.dtype"),
        ({"quiz": None}, "trace.json is not a valid trace: quiz"),
    ],
)
def test_a_description_that_lies_is_refused(
    change: dict[str, Any], fault: str, checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path
) -> None:
    traced(open_model(checkpoint("olmoe")), quiz, tmp_path / "t", tokens=500)
    file = tmp_path / "t" / "trace.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ProfileError, match=fault):
        list(load_trace(tmp_path / "t").sequences())
    file.unlink()
    with pytest.raises(ProfileError, match=r"no trace in .*: run `expertcut trace`"):
        load_trace(tmp_path / "t")


def test_passes_that_run_out_of_memory_come_again_in_halves_to_the_same_trace(
    checkpoint: Checkpoints, quiz: Quiz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = open_model(checkpoint("olmoe"))
    whole, forward = traced(moe, quiz, tmp_path / "whole", weights=True), Run._forward
    tracing = QuizTracing(moe, quiz, 4, HOW, TraceOptions(weights=True))

    def short_of_memory(run: Run, step: Pass) -> torch.Tensor:
        found = forward(run, step)
        if len(step.questions) > 1:
            raise MemoryError
        return found

    monkeypatch.setattr(Run, "_forward", short_of_memory)
    list(tracing.run(tmp_path / "halved"))
    halved = load_trace(tmp_path / "halved")
    assert any("halved_passes" in chunk for chunk in halved.read_chunks())
    for one, two in zip(whole.sequences(), halved.sequences(), strict=True):
        assert (one.experts_TLK == two.experts_TLK).all()
        assert one.weights_TLK is not None and two.weights_TLK is not None
        np.testing.assert_allclose(one.weights_TLK, two.weights_TLK, rtol=2e-3)


# The command


def test_the_command_resumes_and_refuses_another_setting(
    expertcut: Commands, checkpoint: Checkpoints, quiz_folder: Path
) -> None:
    asked = ("trace", checkpoint("olmoe"), "--quiz", quiz_folder, "--shots", 1, "--limit", 2)
    said = expertcut(*asked, "--out", "t")
    assert "6 test questions" in said and "expertcut show t" in said and "bound" not in said
    before = chunk_bytes(Path("t"))
    removed = min(before)
    (Path("t/chunks") / removed).unlink()
    assert "is not finished: 1 of 3 chunks" in expertcut("show", "t", status=2)
    expertcut(*asked, "--out", "t")
    assert chunk_bytes(Path("t")) == before
    assert "t was begun with weights False, now it is True" in expertcut(
        *asked, "--weights", "--out", "t", status=2
    )
    assert "trace of another quiz" in expertcut(*asked, "--tokens", 300, "--out", "t", status=2)
    expertcut(*asked)
    assert len(list(Path("traces").glob("*-birds-????????/trace.json"))) == 1
    assert "1 of 6 questions, then --tokens 100 are spent" in expertcut(*asked, "--tokens", 100)


def test_the_default_bound_warns_of_nothing_where_texts_are_shorter(
    expertcut: Commands, checkpoint: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(Path(), "code", texts(5, seed=5))
    asked = ("trace", checkpoint("olmoe"), "--text", file, "--length", LENGTH)
    said = expertcut(*asked, "--out", "t")
    assert "5 documents: code" in said and not caplog.records
    assert max(map(len, load_trace(Path("t")).sequences())) == LENGTH
    expertcut(*asked, "--tokens", 30, "--out", "few")
    assert sum(map(len, load_trace(Path("few")).sequences())) == 30


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--logits --tokens 100k", "logits are kept of at most 65,536 tokens"),
        ("--text x.jsonl --shots 0", "--shots does not go with --text"),
        ("--tokens 0", "--tokens 0 takes no token"),
        ("--tokens few", "is not a number"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_a_model_is_loaded(
    words: str, fault: str, expertcut: Commands
) -> None:
    assert fault in expertcut(f"trace nowhere {words}", status=2)
