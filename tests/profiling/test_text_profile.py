"""A profile of texts against brute force: one row at a time through plain transformers, hooks only.

Rows are cut, masks are made and sums are added here once more; of expertcut only the places of
routers and experts are taken.
"""

import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertcut.data.corpus import TextSelection, load_corpus
from expertcut.models.load import MoeModel
from expertcut.profiling.measure import MeasureOptions
from expertcut.profiling.measure_text import TextMeasurement
from expertcut.profiling.statistics import text_layer_json
from expertcut.profiling.storage import TextPart, TextProfile, load_profile
from tests.conftest import FAMILIES, WORDS, open_model, slow_but
from tests.support.processes import DEATHS, chunk_bytes, ended, is_whole, start

Checkpoints = Callable[..., Path]
Array = np.ndarray[Any, Any]
MOST = 24  # tokens of a row; a byte is about a token
SIGMOID_FAMILIES = ("deepseek_v3", "glm4_moe", "minimax_m2", "lfm2_moe")
RESIDUAL_FACTORS = {"granitemoe": 0.5}  # of the block's output in the residual stream
NORMED = "flex_olmo"  # norms the block's output before it adds it
ROUTED = ("tokens", "weight", "norm", "weighted_norm", "votes", "input_shift", "residual_shift")
NEXT = ("predicted", "right", "loss", "alpha", "alpha_right")
CHAT = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}({{ c.name }}){% endfor %}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def written(folder: Path, name: str, records: Sequence[object]) -> str:
    """A file of JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def texts(n: int, seed: int) -> list[dict[str, str]]:
    """Documents of one token to many rows; no two are alike."""
    chance = np.random.default_rng(seed)
    lengths = [1, *chance.integers(2, 3 * MOST, n - 1).tolist()]
    words = " ".join(chance.permutation(np.repeat(WORDS, 60)).tolist())
    starts = np.cumsum([0, *lengths])
    return [{"text": words[a : a + m]} for a, m in zip(starts, lengths, strict=False)]


def profiled(moe: MoeModel, folder: Path, *specs: str, **options: Any) -> TextProfile:
    """Measures and loads; `options` are of the selection, or `has_loss`."""
    has_loss = options.pop("has_loss", True)
    selection = TextSelection(specs, **{"max_tokens": MOST, **options})
    corpus = load_corpus(selection, moe.tokenizer)
    how = MeasureOptions(batch_tokens=100)
    list(TextMeasurement(moe, corpus, how, has_loss=has_loss).run(folder))
    profile = load_profile(folder)
    assert isinstance(profile, TextProfile)
    return profile


def likely_right(moe: MoeModel) -> MoeModel:
    """The model, which now predicts letters and spaces alone: some of them are right."""
    bias_V = torch.zeros(moe.model.config.get_text_config().vocab_size)
    bias_V[moe.tokenizer(" ".join(WORDS))["input_ids"]] = 20.0
    head = moe.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, logits: logits + bias_V)
    return moe


@dataclass
class PlainRow:
    """Token ids of a row, which of them count, and the document that it is of."""

    ids: list[int]
    counts: list[bool]
    said: str

    @property
    def chooses(self) -> bool:
        """Whether its document is not in the fifth that is held out, which its hash decides."""
        return int(sha256(" ".join(self.said.split()).encode()).hexdigest()[:16], 16) % 5 != 0


def cut(ids: list[int], said: str, counts: list[bool] | None = None) -> Iterator[PlainRow]:
    """A document in rows."""
    counts = counts or [True] * len(ids)
    for begin in range(0, len(ids), MOST):
        yield PlainRow(ids[begin : begin + MOST], counts[begin : begin + MOST], said)


def plain_rows(moe: MoeModel, file: str) -> list[PlainRow]:
    """The rows of a file of plain texts."""
    said = [json.loads(line)["text"] for line in Path(file).read_text().splitlines()]
    return [row for text in said for row in cut(moe.tokenizer(text)["input_ids"], text)]


class Sums:
    """Sums (L, E) by name, of all rows or some."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        names = (*ROUTED, *NEXT, "probability", "largest")
        self.by_name = {name: np.zeros((n_layers, n_experts)) for name in names}

    def add(self, name: str, layer: int, experts: Tensor, amount: Tensor) -> None:
        np.add.at(self.by_name[name][layer], experts.numpy(), amount.double().numpy())


@dataclass
class BruteForce:
    """Every sum of a profile of texts, row by row and rank by rank."""

    moe: MoeModel
    is_sigmoid: bool = False
    residual_factor: float = 1.0
    all: Sums = field(init=False)
    calibration: Sums = field(init=False)
    moments: Array = field(init=False)
    losses: list[Tensor] = field(default_factory=list)
    rights: list[Tensor] = field(default_factory=list)
    routings: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        blocks = self.moe.blocks
        self.all, self.calibration = (Sums(len(blocks), blocks[0].n_experts) for _ in range(2))
        self.moments = np.zeros((2, len(blocks), 2 + blocks[0].top_k))

    def run(self, rows: Sequence[PlainRow]) -> "BruteForce":
        handles = [
            module.register_forward_hook(self.note_norm)
            for name, module in self.moe.model.named_modules()
            if "norm" in name.rpartition(".")[2]
        ]
        for block in self.moe.blocks:
            handles.append(block.router.register_forward_hook(self.note_routing(block.layer)))
        for row in rows:
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                self.moe.model(ids[:, :1], use_cache=False)  # a dynamic RoPE forgets longer rows
                self.routings.clear()
                logits = self.moe.model(ids, use_cache=False).logits[0].double()
            self.add(row, logits)
        for handle in handles:
            handle.remove()
        return self

    def note_norm(self, _module: object, args: tuple[Any, ...], output: Any) -> None:
        self.normed = args[0], output

    def note_routing(self, layer: int) -> Callable[..., None]:
        def see(_module: object, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            x_TD = args[0].reshape(-1, args[0].shape[-1])
            before, after = self.normed
            # A block that norms its output instead reads the residual stream itself.
            is_normed = torch.equal(after.reshape(x_TD.shape), x_TD)
            stream_TD = before.reshape(x_TD.shape) if is_normed else x_TD
            self.routings.append((*output[:3], x_TD, stream_TD))

        return see

    def add(self, row: PlainRow, logits_TV: Tensor) -> None:
        counts_T = torch.tensor(row.counts)
        next_T = torch.tensor([*row.ids[1:], -1])
        is_scored_T = torch.tensor([*row.counts[1:], False])
        loss_T = -logits_TV.log_softmax(-1).gather(1, next_T.clamp(min=0)[:, None])[:, 0]
        right_T = logits_TV.argmax(-1) == next_T
        self.losses.append(loss_T[is_scored_T])
        self.rights.append(right_T[is_scored_T])
        for layer, routing in enumerate(self.routings):
            for sums in (self.all, self.calibration) if row.chooses else (self.all,):
                self.add_layer(sums, layer, routing, counts_T)
                self.add_next(sums, layer, routing, (is_scored_T, right_T, loss_T))
            alpha_TE, experts_TK = self.alpha(routing[0])[counts_T], routing[2][counts_T]
            p_TK = alpha_TE.gather(1, experts_TK).sort(dim=1, descending=True).values
            p_TK = p_TK / p_TK.sum(1, keepdim=True)
            entropies = [-(p.xlogy(p)).sum(1) for p in (p_TK, alpha_TE)]
            values = torch.stack([*entropies, *p_TK.T], dim=1)
            self.moments[0, layer] += values.sum(0).numpy()
            self.moments[1, layer] += (values**2).sum(0).numpy()

    def alpha(self, logits_TE: Tensor) -> Tensor:
        logits_TE = logits_TE.double()
        return logits_TE.sigmoid() if self.is_sigmoid else logits_TE.softmax(-1)

    def add_layer(
        self, sums: Sums, layer: int, routing: tuple[Tensor, ...], counts_T: Tensor
    ) -> None:
        logits_TE, weights_TK, experts_TK, x_TD, stream_TD = routing
        experts, ranks = self.moe.blocks[layer].experts, range(experts_TK.shape[1])
        one_T1 = torch.ones(len(x_TD), 1)
        with torch.no_grad():
            f_KTD = torch.stack([experts(x_TD, experts_TK[:, k : k + 1], one_T1) for k in ranks])
        f_KTD, x_TD, stream_TD = f_KTD.double(), x_TD.double(), stream_TD.double()
        weights_KT = weights_TK.double().T
        y_TD = (weights_KT[..., None] * f_KTD).sum(0)
        norm_KT = f_KTD.norm(dim=-1)
        weighted_KT = weights_KT * norm_KT
        shift_T = 1 - torch.cosine_similarity(x_TD, x_TD + y_TD, dim=1)
        if self.moe.model.config.model_type == NORMED:
            y_TD = self.moe.model.model.layers[layer].post_feedforward_layernorm.forward(y_TD)
        added_TD = stream_TD + self.residual_factor * y_TD
        residual_T = 1 - torch.cosine_similarity(stream_TD, added_TD, dim=1)
        for k in ranks:
            own = experts_TK[counts_T, k]
            amounts = {
                "tokens": torch.ones(len(x_TD)),
                "weight": weights_KT[k],
                "norm": norm_KT[k],
                "weighted_norm": weighted_KT[k],
                "votes": 1 + (weighted_KT < weighted_KT[k]).sum(0),
                "input_shift": weighted_KT[k] * shift_T,
                "residual_shift": weighted_KT[k] * residual_T,
            }
            for name, amount_T in amounts.items():
                sums.add(name, layer, own, amount_T[counts_T])
            largest_T = f_KTD[k].abs().amax(-1)[counts_T]
            np.maximum.at(sums.by_name["largest"][layer], own.numpy(), largest_T.numpy())
        sums.by_name["probability"][layer] += self.alpha(logits_TE)[counts_T].sum(0).numpy()

    def add_next(
        self, sums: Sums, layer: int, routing: tuple[Tensor, ...], scored: tuple[Tensor, ...]
    ) -> None:
        logits_TE, _, experts_TK, *_ = routing
        is_scored_T, right_T, loss_T = scored
        alpha_TK = self.alpha(logits_TE).gather(1, experts_TK)
        for own_T, alpha_T in zip(experts_TK.T, alpha_TK.T, strict=True):
            parts = (torch.ones_like(loss_T), right_T, loss_T, alpha_T, alpha_T * right_T)
            for name, amount_T in zip(NEXT, parts, strict=True):
                sums.add(name, layer, own_T[is_scored_T], amount_T[is_scored_T])


def assert_sums(profile: TextProfile, sums: Sums) -> None:
    """Every sum within rounding; counts exactly."""
    for name, expected in sums.by_name.items():
        found = profile.token_sum(name)
        if name == "largest":
            found = np.max([chunk["largest_LE"] for chunk in profile.chunks], axis=0)
        assert found is not None, name
        if name in ("tokens", "votes", "predicted", "right"):
            assert found.tolist() == expected.tolist(), name
        # A shift is one minus a cosine, from numbers in float32.
        close = {"rtol": 1e-3, "atol": 1e-4} if name.endswith("shift") else {"rtol": 2e-5}
        np.testing.assert_allclose(found, expected, err_msg=name, **close)


# A plain one, fused with biases, with a factor of the block's output, which norms it, with latent
# attention and a sigmoid, with recurrent layers. All families: `test_matrix`, on a quiz.
FEW = ("olmoe", "gpt_oss", *RESIDUAL_FACTORS, NORMED, "deepseek_v3", "qwen3_next")
MODELS = {
    **{family: (family, {}) for family in FAMILIES},
    "padded": ("mixtral", {"sliding_window": 16}),
    "single": (
        "olmoe",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
}


@pytest.mark.parametrize("name", slow_but((*FEW, "padded", "single"), MODELS))
def test_every_sum_of_both_parts_agrees_with_brute_force(
    checkpoint: Checkpoints, tmp_path: Path, name: str
) -> None:
    family, changes = MODELS[name]
    moe = likely_right(open_model(checkpoint(family, **changes)))
    files = [written(tmp_path, source, texts(8, seed)) for seed, source in enumerate("ab")]
    profile = profiled(moe, tmp_path / "p", *files)
    brute = BruteForce(moe, family in SIGMOID_FAMILIES, RESIDUAL_FACTORS.get(family, 1.0))
    rows = [row for file in files for row in plain_rows(moe, file)]
    brute.run(rows)
    assert {row.chooses for row in rows} == {False, True}  # both parts hold something
    assert 0 < sum(float(right.sum()) for right in brute.rights) < 0.5 * sum(map(len, brute.losses))
    assert_sums(profile, brute.all)
    assert_sums(TextPart(profile), brute.calibration)
    moments = np.sum([chunk["moments_2LX"] for chunk in profile.chunks], axis=0)
    np.testing.assert_allclose(moments, brute.moments, rtol=1e-4, atol=1e-5)
    assert profile.array("tokens_N").tolist() == [len(row.ids) for row in rows]
    assert profile.array("scored_N").tolist() == [len(loss) for loss in brute.losses]
    assert profile.array("right_N").tolist() == [int(right.sum()) for right in brute.rights]
    losses = [float(loss.sum()) for loss in brute.losses]
    np.testing.assert_allclose(profile.array("loss_N"), losses, rtol=2e-5, atol=1e-6)


@pytest.fixture(scope="module")
def moe(checkpoint: Checkpoints) -> MoeModel:
    return likely_right(open_model(checkpoint("olmoe")))


@pytest.fixture
def talking(moe: MoeModel, monkeypatch: pytest.MonkeyPatch) -> MoeModel:
    """The model with a chat template that marks what the assistant writes."""
    monkeypatch.setattr(moe.tokenizer, "chat_template", CHAT)
    return moe


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Two files of texts."""
    return [written(tmp_path, source, texts(9, seed)) for seed, source in enumerate("ab")]


def test_in_double_precision_every_sum_is_that_in_single_up_to_its_rounding(
    checkpoint: Checkpoints, two: list[str], tmp_path: Path
) -> None:
    found = {
        dtype: profiled(
            likely_right(open_model(checkpoint("olmoe"), dtype=dtype)), tmp_path / dtype, *two
        )
        for dtype in ("float32", "float64")
    }
    for name in ROUTED:
        single_LE, double_LE = (profile.token_sum(name) for profile in found.values())
        np.testing.assert_allclose(single_LE, double_LE, rtol=1e-4, atol=1e-5, err_msg=name)
        is_counted = name in ("tokens", "votes")  # whole numbers, the same in both
        assert np.array_equal(single_LE, double_LE) == is_counted, name


def test_the_numbers_shown_are_those_of_the_paper_and_of_transformers_own_loss(
    moe: MoeModel, two: list[str], tmp_path: Path
) -> None:
    profile = profiled(moe, tmp_path / "p", *two)
    rows = [row for file in two for row in plain_rows(moe, file)]
    own = []
    for row in rows:
        ids = torch.tensor([row.ids])
        if len(row.ids) > 1:
            with torch.no_grad():
                loss = moe.model(ids, labels=ids, use_cache=False).loss.double()
            own.append((float(loss) * (len(row.ids) - 1), len(row.ids) - 1))
    total, n = np.sum(own, axis=0)
    assert profile.score.scored == n
    assert profile.score.perplexity == pytest.approx(math.exp(total / n), rel=1e-5)
    brute = BruteForce(moe).run(rows)
    assert profile.score.accuracy == float(torch.cat(brute.rights).double().mean())
    for layer, found in enumerate(map(text_layer_json, profile.layers)):
        sums = {name: sum_LE[layer] for name, sum_LE in brute.all.by_name.items()}
        entropies = brute.moments[0, layer] / sum(len(row.ids) for row in rows)
        assert found["entropy_top_mean"] == pytest.approx(entropies[0], rel=1e-4)
        assert found["entropy_all_mean"] == pytest.approx(entropies[1], rel=1e-4)
        assert found["rank_probability_mean"] == pytest.approx(entropies[2:].tolist(), rel=1e-4)
        for row in found["expert"]:
            e = row["expert"]
            assert row["tokens"] == sums["tokens"][e]
            if not sums["predicted"][e]:
                assert row["next_token_accuracy"] is row["mean_loss"] is None
                continue
            assert row["next_token_accuracy"] == sums["right"][e] / sums["predicted"][e]
            weighted = sums["alpha_right"][e] / sums["alpha"][e]
            assert row["weighted_accuracy"] == pytest.approx(weighted, rel=1e-4)
            mean = sums["loss"][e] / sums["predicted"][e]
            assert row["mean_loss"] == pytest.approx(mean, rel=1e-4)


def test_a_profile_of_two_sources_is_the_sum_of_two_profiles(
    moe: MoeModel, two: list[str], tmp_path: Path
) -> None:
    both = profiled(moe, tmp_path / "both", *two)
    alone = [profiled(moe, tmp_path / name, file) for name, file in zip("ab", two, strict=True)]
    assert chunk_bytes(both.path) == chunk_bytes(alone[0].path) | chunk_bytes(alone[1].path)
    assert [s.loss for s in both.scores.values()] == [profile.score.loss for profile in alone]
    for name in (*ROUTED, *NEXT, "probability"):
        first, second = (profile.token_sum(name) for profile in alone)
        assert first is not None and second is not None and first.any() and second.any()
        np.testing.assert_array_equal(both.token_sum(name), first + second)


def test_a_document_that_is_cut_gives_the_losses_of_its_pieces_as_documents(
    moe: MoeModel, tmp_path: Path
) -> None:
    whole = "".join(text["text"] for text in texts(6, 3))[: 3 * MOST + 5]
    pieces = [{"text": whole[at : at + MOST]} for at in range(0, len(whole), MOST)]
    assert len(moe.tokenizer(whole)["input_ids"]) == len(whole)  # a token a byte
    one = profiled(moe, tmp_path / "one", written(tmp_path, "one", [{"text": whole}]))
    many = profiled(moe, tmp_path / "many", written(tmp_path, "many", pieces))
    assert (one.info.text.n_documents, many.info.text.n_documents) == (1, 4)
    for name in ("tokens_N", "scored_N", "loss_N", "right_N"):
        np.testing.assert_array_equal(one.array(name), many.array(name))


def test_without_losses_the_routing_is_the_same_to_the_bit(
    moe: MoeModel, two: list[str], tmp_path: Path
) -> None:
    whole = profiled(moe, tmp_path / "whole", *two)
    less = profiled(moe, tmp_path / "less", *two, has_loss=False)
    assert not less.scores
    left_out = {"scored_N", "right_N", "loss_N"}
    left_out |= {f"{part}{name}_LE" for name in NEXT for part in ("", "calibration_")}
    assert {*whole.chunks[0]} - {*less.chunks[0]} == left_out
    for chunk, smaller in zip(whole.chunks, less.chunks, strict=True):
        for name, array in smaller.items():
            np.testing.assert_array_equal(array, chunk[name], err_msg=name)


CHATS: list[tuple[dict[str, Any], list[tuple[str, bool]]]] = [  # parts, and who wrote them
    (
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "one?"},
                {"role": "assistant", "content": "two, then three"},
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": "four and five"},
            ]
        },
        [("<system>be brief<user>one?<assistant>", False), ("two, then three", True),
         ("<user>and?<assistant>", False), ("four and five", True)],
    ),
    (
        {
            "tools": [{"name": "clock"}],
            "messages": [
                {"role": "user", "content": "when?"},
                {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
                {"role": "tool", "content": "noon"},
                {"role": "assistant", "content": "at noon"},
            ],
        },
        [("[clock]<user>when?<assistant>", False), ("(clock)", True),
         ("<tool>noon<assistant>", False), ("at noon", True)],
    ),
    (
        {"prompt": "the sky is", "completion": " blue and the grass is green"},
        [("the sky is", False), (" blue and the grass is green", True)],
    ),
]  # fmt: skip


def test_with_assistant_only_exactly_the_tokens_of_the_assistant_count(
    talking: MoeModel, tmp_path: Path
) -> None:
    file = written(tmp_path, "chats", [record for record, _ in CHATS])
    rows = []
    for record, parts in CHATS:
        ids: list[int] = []
        counts: list[bool] = []
        for text, is_own in parts:
            own = talking.tokenizer(text)["input_ids"]
            ids, counts = ids + own, counts + [is_own] * len(own)
        said = [m.get("content") or '[{"name": "clock"}]' for m in record.get("messages", [])]
        own_text = "\n".join(said) or record["prompt"] + record["completion"]
        rows += [row for row in cut(ids, own_text, counts) if any(row.counts)]
    n = sum(len(text) for _, parts in CHATS for text, is_own in parts if is_own)
    assert n == sum(sum(row.counts) for row in rows) < sum(len(row.ids) for row in rows)
    profile = profiled(talking, tmp_path / "p", file, assistant_only=True)
    assert profile.info.text.n_tokens == n
    brute = BruteForce(talking).run(rows)
    assert_sums(profile, brute.all)
    assert_sums(TextPart(profile), brute.calibration)
    assert profile.score.scored == sum(len(loss) for loss in brute.losses)
    whole = profiled(talking, tmp_path / "whole", file)
    assert whole.info.text.n_tokens == sum(
        len(text) for _, parts in CHATS for text, _ in parts
    )  # the same tokens, all counted


def test_an_amount_of_tokens_is_taken_exactly_by_weight_and_by_its_seed(
    moe: MoeModel, tmp_path: Path
) -> None:
    files = [written(tmp_path, name, texts(60, seed)) for seed, name in enumerate("ab")]
    specs = (f"{files[0]}=3", f"{files[1]}=1")
    taken = partial(profiled, moe, tokens=1000)
    one, again, other = (
        taken(tmp_path / name, *specs, seed=seed) for name, seed in (("1", 1), ("2", 1), ("3", 2))
    )
    assert chunk_bytes(one.path) == chunk_bytes(again.path) != chunk_bytes(other.path)
    assert (one.path / "profile.json").read_bytes() == (again.path / "profile.json").read_bytes()
    for profile in (one, other):
        assert profile.info.text.n_tokens == profile.array("tokens_N").sum() == 1000
        shares = [source.tokens / 1000 for source in profile.info.text.sources.values()]
        assert shares == pytest.approx([0.75, 0.25], abs=3 * MOST / 1000)  # within a document


@dataclass(frozen=True)
class TextTask:
    """One process's whole work; `die` names a moment of `DEATHS`."""

    model: Path
    files: tuple[str, ...]
    out: Path
    die: str | None = None

    def __call__(self) -> None:
        torch.set_num_threads(1)
        if self.die is not None:
            DEATHS[self.die][0]()
        profiled(open_model(self.model), self.out, *self.files)


@pytest.mark.parametrize("moment", ["before a claim is given back", "never"])
def test_killed_and_resumed_or_shared_by_two_every_chunk_is_the_same(
    moment: str, checkpoint: Checkpoints, two: list[str], tmp_path: Path
) -> None:
    model = checkpoint("olmoe")
    two.append(written(tmp_path, "c", texts(9, 7)))  # it dies with two of three chunks
    expected = profiled(open_model(model), tmp_path / "undisturbed", *two).path
    task, out = partial(TextTask, model, tuple(two)), tmp_path / "p"
    if moment == "never":
        both = [start(task(out)) for _ in range(2)]
        assert [ended(process) for process in both] == [0, 0]
    else:
        assert ended(start(task(out, die=moment))) == -signal.SIGKILL
        assert len(chunk_bytes(out)) == DEATHS[moment][1] and not is_whole(out)
        assert ended(start(task(out))) == 0
        assert is_whole(out)
    assert chunk_bytes(out) == chunk_bytes(expected)
    assert len(chunk_bytes(out)) == 3
