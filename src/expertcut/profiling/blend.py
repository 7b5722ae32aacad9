"""Several profiles of one model as one: each domain is weighed after normalising by its size."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from expertcut.errors import ProfileError
from expertcut.profiling.statistics import (
    LayerStatistics,
    LayerSums,
    NextTokenStatistics,
    OverTokens,
    TextLayer,
    share,
)
from expertcut.profiling.storage import Arrays, Profile, TextProfile
from expertcut.stats import Array

BlendRule = Literal["sum", "maxmin"]
_MOST_NAMES = 60  # characters in a slug


class Blend(Profile):
    """Profiles of D domains, weighed; `weights_D` sum to 1, the heaviest domain comes first.

    An all-token sum is Σ_d w_d·(T/T_d)·sum_d, with T_d tokens in domain d and T in all: domains
    weighed by their tokens give the sums of one profile of all of them. Statistics of answers are
    weighed in the same way by questions. Path, settings and quiz are those of the first domain.
    """

    def __init__(self, parts: Sequence[Profile], weights: Sequence[float], rule: BlendRule) -> None:
        check_blend(parts)
        order = sorted(range(len(parts)), key=lambda d: -weights[d])
        main = parts[order[0]]
        super().__init__(main.path, main.info, main.truncate)
        self.rule = rule
        self.weights_D = np.array([weights[d] for d in order]) / sum(weights)
        self._parts = tuple(parts[d] for d in order)

    @property
    def parts(self) -> tuple[Profile, ...]:
        """The profile of each domain."""
        return self._parts

    @property
    def names(self) -> list[str]:
        """A name of each domain: its profile's folder, or the path if two folders have one name."""
        names = [part.path.resolve().name for part in self.parts]
        return names if len({*names}) == len(names) else [str(part.path) for part in self.parts]

    @property
    def text(self) -> str:
        """The rule and the domains with their weights, as in the action of a plan."""
        pairs = zip(self.names, self.weights_D, strict=True)
        return f"--blend {self.rule} of {', '.join(f'{name} ({w:.3g})' for name, w in pairs)}"

    @property
    def slug(self) -> str:
        """The same for the name of an output folder."""
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:8]
        names = "+".join(part.path.resolve().name for part in self.parts)
        is_long = len(names) > _MOST_NAMES
        return f"{self.rule}-{f'{len(self.parts)}-profiles' if is_long else names}-{digest}"

    @property
    def key(self) -> str:
        """The rule, and every profile's hash and weight: all that the blend depends on."""
        pairs = zip(self.parts, self.weights_D, strict=True)
        return f"{self.rule} of " + ", ".join(f"{p.info.short_hash} {w:.17g}" for p, w in pairs)

    def of(self, parts: Sequence[Profile]) -> "Blend":
        """The same blend of other forms of its profiles, as without their held-out questions."""
        return Blend(parts, self.weights_D.tolist(), self.rule)

    @cached_property
    def chunks(self) -> list[Arrays]:
        """The chunks of all domains, without any weight."""
        return [chunk for part in self.parts for chunk in part.chunks]

    def subjects(self) -> list[str]:
        """The subject of each question of all domains."""
        return [subject for part in self.parts for subject in part.subjects()]

    def token_sum(self, name: str) -> Array | None:
        """A weighed all-token sum (L, E); None if a domain lacks it."""
        sums_D = [own for part in self.parts if (own := part.token_sum(name)) is not None]
        return self.weighed(sums_D) if len(sums_D) == len(self.parts) else None

    def weighed(self, sums_D: Sequence[Array]) -> Array:
        """The weighed sum of what was summed over the tokens of each domain."""
        # Each token chooses equally many experts, so choices normalise as tokens do.
        tokens_D = [part.token_sum("tokens") for part in self.parts]
        factors_D = _factors(self.weights_D, [float(np.sum(t)) for t in tokens_D if t is not None])
        return np.asarray(np.sum([f * s for f, s in zip(factors_D, sums_D, strict=True)], axis=0))

    @cached_property
    def layers(self) -> list[Any]:  # without answers if a domain has none
        """Every MoE block's statistics, in layer order."""
        by_layer = zip(*(part.layers for part in self.parts), self.over_tokens(), strict=True)
        if any(isinstance(part, TextProfile) for part in self.parts):
            return [self._without_answers(own, sums) for *own, sums in by_layer]
        return [
            replace(blended_answers(own, self.weights_D), over_tokens=over_tokens)
            for *own, over_tokens in by_layer
        ]

    def _without_answers(self, layers_D: Sequence[LayerSums], sums: OverTokens | None) -> LayerSums:
        """One block's sums over tokens, where a domain is of texts."""
        first = layers_D[0]
        pairs = zip(self.weights_D, layers_D, strict=True)
        mean_E = np.sum([w * layer.alpha_mean_E for w, layer in pairs], axis=0)
        if isinstance(first, TextLayer) and sums is not None:
            following = self._next_tokens(first.layer, first.n_experts)
            if following is not None:
                return replace(first, alpha_mean_E=mean_E, over_tokens=sums, next=following)
        return LayerSums(
            layer=first.layer,
            block=first.block,
            n_experts=first.n_experts,
            top_k=first.top_k,
            alpha_mean_E=mean_E,
            over_tokens=sums,
        )

    def _next_tokens(self, layer: int, n_experts: int) -> NextTokenStatistics | None:
        """One block's sums over scored tokens; None if a domain has none."""
        names = [field.name for field in fields(NextTokenStatistics)]
        sums = {name: self.token_sum(name.removesuffix("_E")) for name in names}
        own = {
            name: sum_LE[layer, :n_experts] for name, sum_LE in sums.items() if sum_LE is not None
        }
        return NextTokenStatistics(**own) if len(own) == len(names) else None


def check_blend(parts: Sequence[Profile]) -> None:
    """Raises a ProfileError for profiles of two models, and for one that is given twice."""
    first = parts[0]
    for number, part in enumerate(parts[1:], start=1):
        ours, theirs = first.info.model, part.info.model
        if (ours.fingerprint, ours.blocks) != (theirs.fingerprint, theirs.blocks):
            raise ProfileError(
                f"{part.path} is a profile of {theirs.id} ({theirs.fingerprint[:8]}), "
                f"{first.path} of {ours.id} ({ours.fingerprint[:8]}): give profiles of one model"
            )
        if any(part.path.resolve() == other.path.resolve() for other in parts[:number]):
            raise ProfileError(f"{part.path} is given twice: give each profile once")


def _factors(weights_D: Array, sizes_D: Sequence[float]) -> Array:
    """What the sums of each domain count times: w_d·(size of all / size of d)."""
    return np.asarray(weights_D * sum(sizes_D) / np.asarray(sizes_D))


def blended_answers(layers_D: Sequence[LayerStatistics], weights_D: Array) -> LayerStatistics:
    """One block's statistics of answers and mean α, each domain weighed by its questions."""
    alpha_mean_E = np.asarray(
        sum(w * x.alpha_mean_E for w, x in zip(weights_D, layers_D, strict=True))
    )
    sizes_D = [len(layer.is_activated_NE) for layer in layers_D]
    factors_D = _factors(weights_D, sizes_D)
    weighed = [*zip(factors_D, layers_D, strict=True)]

    def blend(name: str, per: Sequence[Array]) -> Array:
        """Σ f·per·share / Σ f·per, where a share of nothing counts as nothing."""
        shares = [
            np.where(own > 0, getattr(x, name), 0.0) for own, x in zip(per, layers_D, strict=True)
        ]
        whole = [f * own for f, own in zip(factors_D, per, strict=True)]
        return share(
            np.sum([a * b for a, b in zip(whole, shares, strict=True)], axis=0),
            np.sum(whole, axis=0),
        )

    activated_DE = [layer.is_activated_NE.sum(axis=0) for layer in layers_D]
    mass_DE = [np.asarray(layer.alpha_mass_E) for layer in layers_D]
    squares_DE = [share(m**2, x.n_effective_E, 0.0) for m, x in zip(mass_DE, layers_D, strict=True)]
    mass_E = np.asarray(sum(f * m for f, m in zip(factors_D, mass_DE, strict=True)))
    squares_E = np.asarray(sum(f**2 * s for f, s in zip(factors_D, squares_DE, strict=True)))
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(layer, name) for layer in layers_D])
        for name in ("entropy_top_N", "entropy_all_N", "rank_probability_NK", "is_activated_NE")
    }
    return replace(
        layers_D[0],
        **joined,
        accuracy_E=blend("accuracy_E", activated_DE),
        weighted_accuracy_E=blend("weighted_accuracy_E", mass_DE),
        contribution_pct_E=blend("contribution_pct_E", activated_DE),
        n_effective_E=share(mass_E**2, squares_E, 0.0),
        alpha_mean_E=alpha_mean_E,
        alpha_mass_E=mass_E,
        weight_E=np.asarray(sum(f * np.asarray(x.weight_E) for f, x in weighed)),
        question_weight_N=np.repeat(factors_D, sizes_D),
    )
