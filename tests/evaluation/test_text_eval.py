"""Texts in `eval`: losses are those of plain forward passes, and each change has its interval."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from expertcut.data import ngrams
from expertcut.data.texts import Text
from expertcut.edits import plan as plans
from expertcut.evaluation.results import load_results
from expertcut.scoring.next_tokens import Predictions, RowSums
from expertcut.scoring.packing import EncodedRows
from tests.conftest import Commands, make_tokenizer, open_model

Checkpoints = Callable[..., Path]
WORDS = [
    "the",
    "old",
    "bird",
    "sat",
    "on",
    "a",
    "tall",
    "tree",
    "and",
    "sang",
    "of",
    "rain",
    "until",
    "green",
    "frogs",
    "came",
    "by",
]
MAX_TOKENS = 24


def documents(n: int, seed: int = 0) -> list[str]:
    """Of 1 to 16 words, some longer than a row of `MAX_TOKENS`."""
    chance = Random(seed)
    return [" ".join(chance.choices(WORDS, k=1 + i % 16)) for i in range(n)]


def write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@torch.inference_mode()
def plain_logprobs(model: Any, text: str, most: int) -> list[tuple[torch.Tensor, int]]:
    """Log p (V,) before each token and the token: every row by itself, by transformers alone."""
    tokenizer = make_tokenizer()
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    found, done = [], 1
    while done < len(ids):
        last = min(done + most, len(ids)) - 1
        begin = max(0, last - most)
        logits_SV = model(input_ids=torch.tensor([ids[begin:last]])).logits[0]
        logprob_SV = logits_SV.double().log_softmax(dim=-1)
        found += [(logprob_SV[at - 1 - begin], ids[at]) for at in range(done, last + 1)]
        done = last + 1
    return found


def test_losses_and_divergence_are_those_of_whole_distributions(
    checkpoint: Checkpoints, expertcut: Commands, tmp_path: Path
) -> None:
    """Documents of several rows included; KL, agreement and acceptance over the vocabulary."""
    models = [checkpoint("olmoe", seed=seed) for seed in (0, 1)]
    texts = documents(12)
    file = write(tmp_path / "held.jsonl", texts)
    words = ("eval", *models, "--text", file, "--max-tokens", MAX_TOKENS)
    said = expertcut(*words, "--top-k-logprobs=9999", "--batch-tokens=64")
    results = load_results(tmp_path / "results.json")
    plain = [AutoModelForCausalLM.from_pretrained(model).eval() for model in models]
    both = [[p for t in texts for p in plain_logprobs(m, t, MAX_TOKENS)] for m in plain]
    assert any(len(make_tokenizer()(text)["input_ids"]) > 2 * MAX_TOKENS for text in texts)
    for model, own in zip(results.models, both, strict=True):
        assert model.text is not None
        loss = -sum(float(logprob_V[token]) for logprob_V, token in own)
        found = model.text["held"]
        assert (found.tokens, found.documents) == (len(own), 12)
        assert math.log(found.perplexity) == pytest.approx(loss / len(own), abs=1e-5)
        n_bytes = sum(len(text.encode()) for text in texts)
        assert found.bits_per_byte == pytest.approx(loss / math.log(2) / n_bytes, abs=1e-5)
        assert found.ci95 is not None and found.ci95[0] < found.perplexity < found.ci95[1]
    base_MV, other_MV = (torch.stack([logprob_V for logprob_V, _ in own]) for own in both)
    assert results.comparisons[0].text is not None
    change = results.comparisons[0].text["held"]
    kl = F.kl_div(other_MV, base_MV, log_target=True, reduction="batchmean")
    shared = torch.minimum(base_MV, other_MV).exp().sum(dim=1).mean()
    same = (base_MV.argmax(dim=1) == other_MV.argmax(dim=1)).double().mean()
    assert change.kl == pytest.approx(float(kl), abs=1e-5) and change.kl > 0.1
    assert change.acceptance == pytest.approx(float(shared), abs=1e-5)
    assert change.top1_agreement == pytest.approx(float(same), abs=1e-9)
    assert change.ci95 is not None and change.delta_loss is not None
    assert change.ci95[0] < change.delta_loss < change.ci95[1]
    assert f"KL {change.kl:.4f}" in said and "≥" not in said

    expertcut(*words, "--top-k-logprobs=8", "--batch-tokens=64", "--out=few.json")
    few = load_results(tmp_path / "few.json").comparisons[0].text
    assert few is not None
    assert few["held"].kl < change.kl and few["held"].acceptance > change.acceptance
    # In chunks of another size, rows meet other rows in a pass: other last bits.
    assert few["held"].delta_loss == pytest.approx(change.delta_loss, abs=1e-6)


def test_of_a_chunk_in_which_nothing_is_scored_a_base_predicts_nothing() -> None:
    rows = EncodedRows(((5, 6),), ((),), next_ids=(np.array([-1, -1]),), counts=(np.ones(2, bool),))
    chunk = RowSums(rows, n_top=4).arrays()
    assert chunk["scored_N"].tolist() == [0]
    assert Predictions(chunk)(torch.zeros(0, dtype=torch.long)).ids_MR.shape == (0, 4)


def test_equal_models_differ_in_nothing(
    checkpoint: Checkpoints, expertcut: Commands, tmp_path: Path
) -> None:
    """And too few documents for an interval have none."""
    model = checkpoint("olmoe")
    shutil.copytree(model, tmp_path / "twin")
    file = write(tmp_path / "held.jsonl", documents(9))
    said = expertcut("eval", model, "twin", "--text", file)
    change = json.loads((tmp_path / "results.json").read_text())["comparisons"][0]["text"]["held"]
    assert (change["kl"], change["delta_loss"], change["top1_agreement"]) == (0, 0, 1)
    assert change["acceptance"] == pytest.approx(1, abs=1e-6)
    assert change["ci95"] is None and "9 documents, too few for intervals" in " ".join(said.split())


def test_an_interrupted_run_ends_in_the_same_bytes_without_asking_again(
    checkpoint: Checkpoints, expertcut: Commands, tmp_path: Path
) -> None:
    """A chunk of the base and one of the other are lost, and come back as they were."""
    models = [checkpoint("olmoe", seed=seed) for seed in (0, 1)]
    files = [write(tmp_path / f"{name}.jsonl", documents(20, i)) for i, name in enumerate("ab")]
    line = ("eval", *models, "--text", files[0], "--text", files[1])
    expertcut(*line)
    whole = (tmp_path / "results.json").read_bytes()
    chunks = sorted((tmp_path / "results.chunks").glob("*/chunks/*"))
    assert len(chunks) == 4
    before = {chunk: (chunk.read_bytes(), chunk.stat().st_mtime_ns) for chunk in chunks}
    for lost in (chunks[0], chunks[3]):
        lost.unlink()
    (tmp_path / "results.json").unlink()
    expertcut(*line)
    assert (tmp_path / "results.json").read_bytes() == whole
    for chunk, (content, time) in before.items():
        assert chunk.read_bytes() == content
        assert (chunk.stat().st_mtime_ns == time) == (chunk in chunks[1:3])


def test_other_tokens_are_compared_by_bits_per_byte(
    checkpoint: Checkpoints, expertcut: Commands, tmp_path: Path
) -> None:
    """The same weights whose tokenizer lost a token: KL and losses per token are not compared."""
    model = checkpoint("olmoe")
    shutil.copytree(model, tmp_path / "other")
    written = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    written["model"]["merges"] = []
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(written))
    file = write(tmp_path / "held.jsonl", [f"{text} A B" for text in documents(12)])
    said = expertcut("eval", model, "other", "--text", file)
    change = json.loads((tmp_path / "results.json").read_text())["comparisons"][0]["text"]["held"]
    assert change["kl"] is change["delta_loss"] is change["acceptance"] is None
    low, high = change["delta_bits_per_byte_ci95"]
    assert low < change["delta_bits_per_byte"] < high
    assert "reads other tokens than the base" in " ".join(said.split())
    refused = expertcut("eval", model, "other", "--text", file, "--tokens=9", status=2)
    assert "counts tokens of one tokenizer" in refused


def test_documents_that_had_a_part_in_a_model_are_left_out_or_refused(
    checkpoint: Checkpoints, expertcut: Commands, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By hash, and with one changed word by their runs of words."""
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint("olmoe"), cut)
    chance = Random(7)
    texts = [" ".join(f"w{chance.randrange(999)}" for _ in range(40)) for _ in range(40)]
    changed = texts[0].replace(texts[0].split()[20], "changed")
    moe = open_model(cut)
    blocks = {b.name: plans.BlockEdit(keep=tuple(range(b.n_experts))) for b in moe.blocks}
    lines = [Text(text, text).hash_line for text in (texts[0], texts[1])]
    chosen_on = plans.ChosenOn(
        quiz="notes", split="text", questions=2, sha256=plans.hashes_sha256(lines)
    )
    plan = plans.PlanFile(
        model=plans.PlanModel(id="gone", revision=None, fingerprint="0" * 64),
        action="prune", criterion="by hand", positions="all", removal="reroute",
        layout="stock", chosen_on=chosen_on, blocks=blocks,
    )  # fmt: skip
    plans.save_plan(cut, plan, lines)
    ngrams.save(cut, ngrams.ngrams_of(texts[:2]))
    file = write(tmp_path / "held.jsonl", [changed, *texts[1:]])
    expertcut("eval", "cut", "--text", file)
    assert f"2 of 40 documents, or most of their text, had a part in cut: {file}:1" in caplog.text
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["text"]["sources"]["held"]["dropped"] == 2
    assert found["models"][0]["text"]["held"]["documents"] == 38
    write(file, [changed, *texts[1:30]])
    refused = expertcut("eval", "cut", "--text", file, "--out=r.json", status=2)
    assert "at most 5 % may" in refused
