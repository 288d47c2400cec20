"""The cross-entropy method over one offset per layer: the strongest control that is not a Controller.

A pure function from the finished episodes to the next candidate, so that any actor can compute it from the campaign's
records and none has to remember anything.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["generation_size", "next_offsets"]

_SIGMA = 0.4  # natural-log units of the Taylor score
_STEP = 0.5
_LARGEST, _SMALLEST, _GENERATIONS = 10, 3, 4


def generation_size(episodes: int) -> int:
    """Episodes between two moves of the mean, where `episodes` are played in all: few of them still give 4 moves."""
    return max(_SMALLEST, min(_LARGEST, episodes // _GENERATIONS))


def next_offsets(
    finished: Sequence[tuple[np.ndarray, float]], layers: int, *, seed: int, generation: int = _LARGEST
) -> np.ndarray:
    """Draw the offsets of the next episode: float64 [L].

    After every generation the mean moves half way to the mean of the best quarter of the last two.

    Args:
        finished: (offsets [L], return) of the episodes so far, in order of completion.
        layers: L.
        seed: of this episode's draw.
        generation: episodes between two moves, at least 2.

    """
    mean = np.zeros(layers)
    for end in range(generation, len(finished) + 1, generation):
        window = sorted(finished[max(0, end - 2 * generation) : end], key=lambda pair: pair[1], reverse=True)
        elite = np.mean([offsets for offsets, _ in window[: generation // 2]], axis=0)
        mean += _STEP * (elite - mean)
    return mean + _SIGMA * np.random.default_rng(seed).standard_normal(layers)
