"""The sequences that all systems are given."""

from pathlib import Path

import numpy as np

from benchmarks.replay_systems.protocol import Arrays
from learner.packing import MaskPacking
from learner.sequence import EpisodeTrace, SequenceConfig, cut

DISTINCT = 512
STEPS, FILTERS, ZEROED_A_STEP, HIDDEN = 24, 1056, 40, 192
_CUT, _PACKING = SequenceConfig(), MaskPacking(FILTERS, 0)
ABOUT = (
    f"{_CUT.burn_in} steps of burn-in and {_CUT.unroll_length} learned from, cut by learner.sequence from an episode"
    f" of {STEPS} over quarter-width VGG16's {FILTERS:,} filters, {ZEROED_A_STEP} zeroed a step, with three"
    f" recurrent states (2 x {HIDDEN} float32 each)"
)


def full_sequences(count: int = DISTINCT) -> list[Arrays]:
    """Sequences of about 8 kB; they differ in what they hold, not in shape, as some peers ask for."""
    random = np.random.default_rng(0)
    return [cut(_episode(random), _CUT, _PACKING)[-1] for _ in range(count)]


def small_sequences(count: int = DISTINCT) -> list[Arrays]:
    """Sequences of about 100 bytes: rewards only."""
    random = np.random.default_rng(0)
    return [{"rewards": random.standard_normal(16).astype(np.float32)} for _ in range(count)]


def write(path: Path, sequences: list[Arrays]) -> None:
    """One file of the arrays stacked, which the workers read."""
    np.savez(path, **{name: np.stack([sequence[name] for sequence in sequences]) for name in sequences[0]})


def _episode(random: np.random.Generator) -> EpisodeTrace:
    """An episode that zeroes other filters every step."""
    order = random.permutation(FILTERS)[: STEPS * ZEROED_A_STEP].reshape(STEPS, ZEROED_A_STEP)
    actions = np.zeros((STEPS, FILTERS), bool)
    np.put_along_axis(actions, order, True, axis=1)
    gone = np.concatenate([np.zeros((1, FILTERS), bool), np.logical_or.accumulate(actions, axis=0)])
    return EpisodeTrace(
        observations={
            "accuracy": random.random(STEPS + 1, np.float32),
            "compression": np.linspace(0, 0.9, STEPS + 1, dtype=np.float32),
            "keep_mask": ~gone,
        },
        actions=actions,
        rewards=random.standard_normal(STEPS).astype(np.float32),
        states=random.standard_normal((STEPS, 2, HIDDEN)).astype(np.float32),
        terminated=True,
    )
