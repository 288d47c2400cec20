"""The cross-entropy method over one offset per layer: the strongest control that is not a Controller.

A pure function from the finished episodes to the next candidate, so that any actor can compute it from the campaign's
records and none has to remember anything.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["next_offsets"]

_SIGMA = 0.4  # natural-log units of the Taylor score
_EVERY, _WINDOW, _ELITE, _STEP = 10, 20, 5, 0.5


def next_offsets(finished: Sequence[tuple[np.ndarray, float]], layers: int, *, seed: int) -> np.ndarray:
    """Draw the offsets of the next episode: float64 [L].

    Every 10 episodes the mean moves half way to the mean of the best 5 of the last 20.

    Args:
        finished: (offsets [L], return) of the episodes so far, in order of completion.
        layers: L.
        seed: of this episode's draw.

    """
    mean = np.zeros(layers)
    for end in range(_EVERY, len(finished) + 1, _EVERY):
        window = sorted(finished[max(0, end - _WINDOW) : end], key=lambda pair: pair[1], reverse=True)
        elite = np.mean([offsets for offsets, _ in window[:_ELITE]], axis=0)
        mean += _STEP * (elite - mean)
    return mean + _SIGMA * np.random.default_rng(seed).standard_normal(layers)
