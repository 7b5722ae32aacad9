"""Statistics per layer and expert: the tables of arXiv 2502.17187, §3.

Standard deviations are population ones. Undefined shares are NaN here and null in JSON.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from expertcut.profiling.schema import BlockInfo
from expertcut.stats import Array, chance, document_ci95


@dataclass(frozen=True)
class OverTokens:
    """Sums of one MoE block over every token, shots included, as if each prompt had run alone.

    Of given routes the tokens of each expert are known, and nothing else.
    """

    tokens_E: Array
    weight_E: Array | None = None
    norm_E: Array | None = None
    weighted_norm_E: Array | None = None
    votes_E: Array | None = None  # None in older profiles too, as the following
    input_shift_E: Array | None = None
    residual_shift_E: Array | None = None  # None too if no residual stream is known


@dataclass(frozen=True)
class Answers:
    """Answers: log p of the choices, the right choices, and whether the best was right."""

    logprob_NC: Array
    answer_N: Array
    is_correct_N: Array
    n_cut: int | None = None  # truncated prompts; None if none may be

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.is_correct_N.mean())

    @property
    def chance(self) -> float:
        """Share of right answers by guessing."""
        return chance(self.logprob_NC)


@dataclass(frozen=True, kw_only=True)
class LayerSums:
    """One MoE block over the tokens of a profile."""

    layer: int
    block: str
    n_experts: int
    top_k: int
    alpha_mean_E: Array
    over_tokens: OverTokens | None = None

    @property
    def tokens_E(self) -> Array | None:
        """Tokens that chose each expert; None without all-token sums."""
        return None if self.over_tokens is None else self.over_tokens.tokens_E


@dataclass(frozen=True, kw_only=True)
class NextTokenStatistics:
    """Sums over the tokens routed to an expert whose next token is scored."""

    predicted_E: Array
    right_E: Array
    loss_E: Array
    alpha_E: Array
    alpha_right_E: Array

    @property
    def accuracy_E(self) -> Array:
        """Share of the tokens whose next token the model predicts."""
        return share(self.right_E, self.predicted_E)

    @property
    def weighted_accuracy_E(self) -> Array:
        """Σ α·1(ŷ = y) / Σ α."""
        return share(self.alpha_right_E, self.alpha_E)

    @property
    def mean_loss_E(self) -> Array:
        """Mean −log p of the next token."""
        return share(self.loss_E, self.predicted_E)


@dataclass(frozen=True)
class TextScore:
    """Σ −log p of next tokens (nats), how many were scored, and predicted, by document (D,).

    Intervals are of a bootstrap over documents, whose tokens depend on each other; None where fewer
    than 10 documents have scored tokens.
    """

    loss_D: Array
    scored_D: Array
    right_D: Array

    @property
    def loss(self) -> float:
        """Σ −log p."""
        return float(self.loss_D.sum())

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return int(self.scored_D.sum())

    @property
    def mean_loss(self) -> float:
        """Mean −log p in nats; NaN where nothing was scored."""
        return self.loss / self.scored if self.scored else float("nan")

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss; infinite beyond what a float holds."""
        return _exp(self.mean_loss)

    @property
    def accuracy(self) -> float:
        """Share of the scored tokens that were predicted."""
        return float(self.right_D.sum()) / self.scored if self.scored else float("nan")

    @cached_property
    def perplexity_ci95(self) -> tuple[float, float] | None:
        """95 % interval of the perplexity."""
        ends = document_ci95(self.loss_D, self.scored_D)
        return None if ends is None else (_exp(ends[0]), _exp(ends[1]))

    @cached_property
    def accuracy_ci95(self) -> tuple[float, float] | None:
        """95 % interval of the accuracy."""
        return document_ci95(self.right_D, self.scored_D)


def _exp(mean_loss: float) -> float:
    return float(np.exp(mean_loss)) if not mean_loss > 709 else float("inf")


@dataclass(frozen=True, kw_only=True)
class TextLayer(LayerSums):
    """One MoE block over the tokens of texts; moments are Σ and Σ² over those tokens.

    X is the entropy over the chosen experts, the one over all, and the probability by rank. Of
    given routes there are no moments, and α is NaN.
    """

    n_tokens: int  # that count; with a routing rule some may have no expert
    over_tokens: OverTokens
    moments_2X: Array | None
    next: NextTokenStatistics | None = None  # None without losses

    @property
    def n_activated(self) -> int:
        """Number of experts that at least one token activated."""
        return int((self.over_tokens.tokens_E > 0).sum())

    def routing_json(self) -> dict[str, Any]:
        """Entropies and rank probabilities, as of a quiz; empty of given routes."""
        if self.moments_2X is None:
            return {}
        n_tokens = max(self.n_tokens, 1)
        mean_X = self.moments_2X[0] / n_tokens
        std_X = np.sqrt(np.maximum(self.moments_2X[1] / n_tokens - mean_X**2, 0))
        numbers: dict[str, Any] = {}
        for name, x in (
            ("entropy_top", 0),
            ("entropy_all", 1),
            ("rank_probability", slice(2, None)),
        ):
            numbers |= {f"{name}_mean": mean_X[x].tolist(), f"{name}_std": std_X[x].tolist()}
        return numbers


@dataclass(frozen=True, kw_only=True)
class LayerStatistics(LayerSums):
    """One MoE block over the N questions of a profile."""

    entropy_top_N: Array
    entropy_all_N: Array
    rank_probability_NK: Array
    is_activated_NE: Array
    accuracy_E: Array
    weighted_accuracy_E: Array
    n_effective_E: Array  # (Σα)²/Σα², the effective number of questions of a weighted accuracy
    contribution_pct_E: Array
    weight_E: Array | None = None  # Σ gate weight over the questions that chose an expert
    alpha_mass_E: Array | None = None  # Σα over the questions that chose an expert
    question_weight_N: Array | None = None  # in a blend of profiles; else each question counts once

    @property
    def activations_E(self) -> Array:
        """Number of questions that activated each expert, in a blend by their weights."""
        if self.question_weight_N is None:
            return np.asarray(self.is_activated_NE.sum(axis=0))
        return np.asarray(self.question_weight_N @ self.is_activated_NE)

    @cached_property
    def appearances_E(self) -> Array:
        """Share of questions that activated each expert."""
        return np.asarray(self.activations_E / len(self.is_activated_NE))

    @property
    def n_activated(self) -> int:
        """Number of experts that at least one question activated."""
        return int(self.is_activated_NE.any(axis=0).sum())


def layers_of(
    blocks: Sequence[BlockInfo], alpha_NLE: Array, chosen_NLK: Array, is_correct_N: Array
) -> list[LayerStatistics]:
    """The statistics of any questions, without sums over gate weights and tokens."""
    layers = []
    for layer, block in enumerate(blocks):
        alpha_NE = alpha_NLE[:, layer, : block.experts].astype(np.float64)
        chosen_NK = chosen_NLK[:, layer].astype(np.int64)
        # An empty place (−1) is a further last column, which is dropped.
        alpha_NX = np.pad(alpha_NE, ((0, 0), (0, 1)))
        is_activated_NX, p_NX = np.zeros(alpha_NX.shape, dtype=bool), np.zeros_like(alpha_NX)
        np.put_along_axis(is_activated_NX, chosen_NK, True, axis=1)
        is_activated_NE = is_activated_NX[:, :-1]
        chosen_alpha_NK = np.take_along_axis(alpha_NX, chosen_NK, axis=1)
        p_NK = share(chosen_alpha_NK, chosen_alpha_NK.sum(axis=1, keepdims=True), 0.0)
        np.put_along_axis(p_NX, chosen_NK, p_NK, axis=1)
        p_NE = p_NX[:, :-1]
        mass_NE = alpha_NE * is_activated_NE
        mass_E, activated_E = mass_NE.sum(0), is_activated_NE.sum(0)
        layers.append(
            LayerStatistics(
                layer=layer,
                block=block.name,
                n_experts=block.experts,
                top_k=chosen_NK.shape[1],
                entropy_top_N=entropy(p_NK),
                entropy_all_N=entropy(alpha_NE),
                rank_probability_NK=np.sort(p_NK, axis=1)[:, ::-1],
                is_activated_NE=is_activated_NE,
                accuracy_E=share(is_activated_NE[is_correct_N].sum(0), activated_E),
                weighted_accuracy_E=share(mass_NE[is_correct_N].sum(0), mass_E),
                n_effective_E=share(mass_E**2, (mass_NE**2).sum(0), 0.0),
                contribution_pct_E=100 * share(p_NE.sum(0), activated_E),
                alpha_mean_E=alpha_NE.mean(axis=0),
                alpha_mass_E=mass_E,
            )
        )
    return layers


def entropy(p_NE: Array) -> Array:
    """−Σ p ln p per row, in nats; 0 ln 0 is 0."""
    logs = np.log(p_NE, where=p_NE > 0, out=np.zeros_like(p_NE))
    return np.asarray(-(p_NE * logs).sum(axis=1))


def layer_json(layer: LayerStatistics) -> dict[str, Any]:
    """The numbers of a layer and its experts."""
    experts = [expert_json(layer, expert) for expert in range(layer.n_experts)]
    return _block_json(layer) | routing_json(layer, slice(None)) | {"expert": experts}


def text_layer_json(layer: TextLayer) -> dict[str, Any]:
    """The numbers of a layer and its experts over texts, undefined shares as None."""
    return _block_json(layer) | layer.routing_json() | {"expert": text_experts(layer)}


def _block_json(layer: LayerStatistics | TextLayer) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "block": layer.block,
        "experts": layer.n_experts,
        "top_k": layer.top_k,
        "activated": layer.n_activated,
    }


def text_experts(layer: TextLayer) -> list[dict[str, Any]]:
    """The numbers of each expert of a layer over texts, undefined shares as None."""
    experts: list[dict[str, Any]] = []
    for expert in range(layer.n_experts):
        own: dict[str, Any] = {"expert": expert, "tokens": int(layer.over_tokens.tokens_E[expert])}
        if layer.next is not None:
            values = (layer.next.accuracy_E, layer.next.weighted_accuracy_E, layer.next.mean_loss_E)
            names = ("next_token_accuracy", "weighted_accuracy", "mean_loss")
            own |= {n: or_none(v[expert]) for n, v in zip(names, values, strict=True)}
        experts.append(own)
    return experts


def routing_json(layer: LayerStatistics, which: Array | slice) -> dict[str, Any]:
    """Entropies and rank probabilities over some of the questions."""
    return {
        "entropy_top_mean": float(layer.entropy_top_N[which].mean()),
        "entropy_top_std": float(layer.entropy_top_N[which].std()),
        "entropy_all_mean": float(layer.entropy_all_N[which].mean()),
        "entropy_all_std": float(layer.entropy_all_N[which].std()),
        "rank_probability_mean": layer.rank_probability_NK[which].mean(axis=0).tolist(),
        "rank_probability_std": layer.rank_probability_NK[which].std(axis=0).tolist(),
    }


def expert_json(layer: LayerStatistics, expert: int) -> dict[str, Any]:
    """The numbers of an expert, undefined shares as None."""
    return {
        "expert": expert,
        "appearances": float(layer.appearances_E[expert]),
        "accuracy": or_none(layer.accuracy_E[expert]),
        "weighted_accuracy": or_none(layer.weighted_accuracy_E[expert]),
        "contribution_pct": or_none(layer.contribution_pct_E[expert]),
        "tokens": None if layer.tokens_E is None else int(layer.tokens_E[expert]),
    }


def share(part: Array, whole: Array, undefined: float = np.nan) -> Array:
    """Part / whole, `undefined` where the whole is 0."""
    shape = np.broadcast_shapes(np.shape(part), np.shape(whole))
    return np.asarray(np.divide(part, whole, out=np.full(shape, undefined), where=whole > 0))


def or_none(value: float) -> float | None:
    """The number, or None if not finite."""
    return float(value) if np.isfinite(value) else None
