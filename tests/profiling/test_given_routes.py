"""Routes of a serving engine, as a trace or a profile; what cannot be of the model is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertcut.edits.plan import load_plan
from expertcut.edits.splits import choosing_profile
from expertcut.profiling import given_routes
from expertcut.profiling.storage import Profile, load_profile
from expertcut.profiling.trace import load_trace
from tests.conftest import DENSE_FIRST, Commands
from tests.profiling.test_text_profile import texts, written
from tests.support.processes import chunk_bytes

Checkpoints = Callable[..., Path]
LENGTHS = (7, 1, 12, 5)


def routes(n_layers: int = 2, top_k: int = 2, n_experts: int = 8) -> dict[str, Any]:
    """Four requests, one after the other."""
    chance = np.random.default_rng(0)
    shape = (sum(LENGTHS), n_layers, n_experts)
    experts_TLK = chance.random(shape).argsort(axis=2)[..., :top_k].astype(np.int32)
    return {
        "routed_experts": experts_TLK,
        "token_ids": chance.integers(0, 200, len(experts_TLK)),
        "sequence_ids": np.repeat([3, 9, 4, 5], LENGTHS),  # any numbers that change
    }


def saved(given: dict[str, Any]) -> str:
    np.savez_compressed("routes.npz", **given)
    return "routes.npz"


def test_a_trace_of_routes_holds_them_request_by_request(
    expertcut: Commands, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given_routes, "CHUNK_TOKENS", 13)
    given, model = routes(), checkpoint("olmoe")
    said = expertcut("trace", model, "--routes", saved(given), "--out", "t")
    assert "25 in 4 sequences" in said and "routes.npz" in expertcut("show", "t")
    trace, ends = load_trace(Path("t")), np.cumsum(LENGTHS)[:-1]
    assert len(list(trace.info.chunks())) == 3
    sequences = list(trace.sequences())
    for name, key in (("experts_TLK", "routed_experts"), ("token_T", "token_ids")):
        found = [getattr(sequence, name).tolist() for sequence in sequences]
        assert found == [part.tolist() for part in np.split(given[key], ends)]
    assert [len(half) for half in trace.halves()] == [2, 2]
    before = chunk_bytes(Path("t"))
    (Path("t/chunks") / min(before)).unlink()
    expertcut("trace", model, "--routes", "routes.npz", "--out", "t")
    assert chunk_bytes(Path("t")) == before
    given["token_ids"][0] += 1
    refused = expertcut("trace", model, "--routes", saved(given), "--out", "t", status=2)
    assert "t is a trace of another file of routes: 25 tokens of" in refused


def test_of_all_decoder_layers_those_with_experts_are_taken(
    expertcut: Commands, checkpoint: Checkpoints
) -> None:
    model = checkpoint("qwen2_moe", num_hidden_layers=3, **DENSE_FIRST["qwen2_moe"])
    given = routes(n_layers=3)
    given["routed_experts"][:, 0] = 0  # as vLLM leaves a dense layer
    expertcut("trace", model, "--routes", saved(given), "--out", "t")
    experts = [s.experts_TLK for s in load_trace(Path("t")).sequences()]
    assert (np.concatenate(experts) == given["routed_experts"][:, 1:]).all()


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an expert beyond the last": (
        lambda g: g["routed_experts"].__setitem__((3, 1, 0), 8),
        r"expert 8 in layer 1, and .* has 8 experts in model.layers.1.mlp",
    ),
    "a negative expert": (lambda g: g["routed_experts"].__setitem__((0, 0, 0), -1), "expert -1"),
    "another K": (lambda g: g.update(routes(top_k=3)), "3 experts a token, and .* has 2"),
    "other layers": (lambda g: g.update(routes(n_layers=5)), "5 layers, and .* has 2 MoE blocks"),
    "a token too many": (
        lambda g: g.update(token_ids=np.arange(26)),
        "26 token_ids for 25 tokens .*: leave it out",
    ),
    "no experts": (lambda g: g.pop("routed_experts"), "it has no routed_experts: save"),
    "experts that are no whole numbers": (
        lambda g: g.update(routed_experts=g["routed_experts"] * 1.0),
        "type float64, must be whole numbers",
    ),
    "objects": (lambda g: g.update(token_ids=np.array([{}] * 25)), "is not an .npz file of numb"),
    "no token": (lambda g: g.update({k: v[:0] for k, v in g.items()}), "it has no token"),
    "a negative token": (lambda g: g.update(token_ids=g["token_ids"] - 200), "not a token id"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_routes_of_the_model_is_refused_in_one_line(
    fault: str, expertcut: Commands, checkpoint: Checkpoints
) -> None:
    change, says = FAULTS[fault]
    change(given := routes())
    refused = expertcut("trace", checkpoint("olmoe"), "--routes", saved(given), status=2)
    (line,) = refused.strip().splitlines()
    assert re.search(says, line), line
    assert not Path("traces").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and nonsense", json.dumps({}).encode()])
def test_a_file_that_is_no_npz_is_refused(
    content: bytes, expertcut: Commands, checkpoint: Checkpoints
) -> None:
    Path("routes.npz").write_bytes(content)
    refused = expertcut("trace", checkpoint("olmoe"), "--routes", "routes.npz", status=2)
    assert "--routes routes.npz is not an .npz file" in refused
    assert "No such file" in expertcut("trace nowhere --routes none.npz", status=2)
    assert "--weights does not go with --routes" in expertcut(
        "trace nowhere --routes routes.npz --weights", status=2
    )


def test_a_profile_of_routes_counts_as_that_of_the_texts_and_cuts_and_judges_as_it(
    expertcut: Commands, checkpoint: Checkpoints
) -> None:
    model, file = checkpoint("olmoe"), written(Path(), "code", texts(40, seed=3))
    expertcut("trace", model, "--text", file, "--length", 128, "--tokens", "1M", "--out", "t")
    sequences = list(load_trace(Path("t")).sequences())
    given = {
        "routed_experts": np.concatenate([s.experts_TLK for s in sequences]),
        "token_ids": np.concatenate([s.token_T for s in sequences]),
        "sequence_ids": np.repeat(np.arange(len(sequences)), [len(s) for s in sequences]),
    }
    said = expertcut("profile", model, "--routes", saved(given), "--out", "r")
    assert "prune --sparsity 0.5 --profile r" in " ".join(said.split())
    assert "% of the choices of" in " ".join(expertcut("show r").split())
    expertcut("profile", model, "--text", file, "--max-tokens", 128, "--no-loss", "--out", "p")
    whole, ordinary = load_profile(Path("r")), load_profile(Path("p"))
    for one, other in ((whole, ordinary), *zip(*map(halves, (whole, ordinary)), strict=True)):
        assert (one.token_sum("tokens") == other.token_sum("tokens")).all()
        assert one.token_sum("weight") is None and other.token_sum("weight") is not None
    layers = json.loads(expertcut("show r --format json"))["layers"]
    assert "entropy_all_mean" not in layers[0] and layers[0]["expert"][0]["tokens"] > 0
    assert "activations" in expertcut("show r --criteria")
    options = "--keep 6 --protect none --by activations"
    expertcut(f"prune --profile p {options} --plan-only --out p-cut")
    said = expertcut(f"prune --profile r {options} --out r-cut")
    plan, ordinary_plan = load_plan(Path("r-cut")), load_plan(Path("p-cut"))
    assert plan.blocks == ordinary_plan.blocks and len(plan.blocks) == 2
    assert plan.proof.held_out_hashes and plan.proof.text is not None
    assert "of all choices" in " ".join(said.split())
    refused = expertcut("prune --profile r --keep 6 --by reap --out x", status=2)
    (line,) = refused.strip().splitlines()
    assert "reap: needs outputs of experts, and the profile holds routes" in line
    assert "gate_mass: needs gate weights" in expertcut(
        "prune --profile r --keep 6 --by gate_mass --out x", status=2
    )
    np.savez_compressed("routes.npz", **{**given, "token_ids": given["token_ids"] + 1})
    changed = expertcut(f"prune --profile r {options} --out x", status=2)
    assert "no longer holds the routes" in changed
    assert "--no-loss does not go with --routes" in expertcut(
        "profile nowhere --routes routes.npz --no-loss", status=2
    )


def halves(profile: Profile) -> tuple[Profile, ...]:
    """What chooses."""
    return (choosing_profile(profile)[0],)
