"""Which experts matter: one pure function per criterion, from a layer's statistics to scores (E,).

Ties are broken by mean α, then by the lower id, in `ranked`.
"""

from typing import Any

import numpy as np

from expertcut.errors import ProfileError
from expertcut.interventions.plan import Positions
from expertcut.profiling.statistics import LayerStatistics

Array = np.ndarray[Any, Any]


def activations(layer: LayerStatistics, positions: Positions) -> Array:
    """How many questions (answer positions) or tokens (all) chose each expert. arXiv:2502.17187."""
    return layer.is_activated_NE.sum(axis=0) if positions == "answer" else tokens(layer)


CRITERIA = {f.__name__: f for f in (activations,)}


def tokens(layer: LayerStatistics) -> Array:
    """Tokens that chose each expert, shots included.

    Raises:
        ProfileError: the profile was made with --stats answer.
    """
    if layer.tokens_E is None:
        raise ProfileError(
            "the profile holds no all-token statistics (--stats answer): profile with --stats all"
        )
    return layer.tokens_E


def ranked(score_E: Array, alpha_mean_E: Array) -> list[int]:
    """Expert ids, best first: by score, then mean α, then the lower id."""
    ids = np.arange(len(score_E))
    return [int(e) for e in np.lexsort((ids, -alpha_mean_E, -score_E))]
