"""Made-up records, with experts that help or harm by a known amount, and a model-free `ask`."""

from dataclasses import dataclass

import numpy as np

from expertcut.edits.reweight_select import Array, QuestionOutcomes
from expertcut.edits.router_edits import RouterEdit
from expertcut.profiling.schema import BlockInfo

LAYERS, EXPERTS, TOP_K, SUBJECTS = 2, 16, 4, 4


@dataclass(frozen=True)
class World:
    """Records of N questions; `effect_LE` times gate weight is added to the right choice."""

    records: QuestionOutcomes
    logits_NLE: Array
    noise_NC: Array
    effect_LE: Array

    def ask(self, shifts: tuple[RouterEdit, ...]) -> Array:
        """Log p (N, 4) with shifted gates."""
        logits_NLE = self.logits_NLE.copy()
        for shift in shifts:
            logits_NLE[:, shift.layer, shift.expert] += shift.bias
        return logprob(logits_NLE, self.noise_NC, self.effect_LE, self.records.answer_N)


def world(seed: int, n: int = 400, effects: dict[tuple[int, int], float] | None = None) -> World:
    """Random gates and answers; `effects` by (layer, expert), none for all others."""
    rng = np.random.default_rng(seed)
    logits_NLE = rng.normal(size=(n, LAYERS, EXPERTS))
    effect_LE = np.zeros((LAYERS, EXPERTS))
    for place, effect in (effects or {}).items():
        effect_LE[place] = effect
    answer_N, noise_NC = rng.integers(4, size=n), rng.normal(size=(n, 4))
    noise_NC[np.arange(n), answer_N] += 0.8
    alpha_NLE = softmax(logits_NLE)
    chosen_NLK = np.argsort(-logits_NLE, axis=2, kind="stable")[:, :, :TOP_K]
    block = {"scoring": "softmax", "inflates": True, "groups": 1, "top_groups": 1}
    records = QuestionOutcomes(
        blocks=tuple(
            BlockInfo(name=f"model.layers.{layer}.mlp", experts=EXPERTS, top_k=TOP_K, **block)
            for layer in range(LAYERS)
        ),
        subject_N=np.array([f"subject {i % SUBJECTS}" for i in range(n)]),
        hash_N=np.array([f"{i:016x}" for i in range(n)]),
        answer_N=answer_N,
        logprob_NC=logprob(logits_NLE, noise_NC, effect_LE, answer_N),
        alpha_NLE=alpha_NLE.astype(np.float32),
        chosen_NLK=chosen_NLK.astype(np.int16),
    )
    return World(records, logits_NLE, noise_NC, effect_LE)


def logprob(logits_NLE: Array, noise_NC: Array, effect_LE: Array, answer_N: Array) -> Array:
    """The right choice's logit gains Σ α·effect over the chosen experts."""
    alpha_NLE = softmax(logits_NLE)
    last_NL1 = np.sort(alpha_NLE, axis=2)[:, :, -TOP_K][:, :, None]
    gain_N = (alpha_NLE * (alpha_NLE >= last_NL1) * effect_LE).sum(axis=(1, 2))
    logits_NC = noise_NC.copy()
    logits_NC[np.arange(len(answer_N)), answer_N] += gain_N
    return np.log(softmax(logits_NC))


def softmax(logits: Array) -> Array:
    """Over the last axis."""
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)
