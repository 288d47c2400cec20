"""A player that is killed in the middle of an episode: `python doomed_player.py BRIEF STEP`, a pickled Brief.

It kills itself with SIGKILL when the step is played and nothing of it is saved yet.
"""

import os
import pickle
import signal
import sys
from pathlib import Path

import torch

from actors.metrics import PLAYER_STEPS, Metric
from actors.player import Player
from env.data import load_dataset


class Doom:
    """A Metrics that ends the process at the `last` step that it is told of."""

    def __init__(self, last: int) -> None:
        self.left = last

    def add(self, counter: Metric, amount: float = 1.0, **labels: str) -> None:
        self.left -= counter is PLAYER_STEPS
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def set(self, gauge: Metric, value: float, **labels: str) -> None:
        """Forget it."""


def main() -> None:
    """Play one episode up to the step."""
    torch.set_num_threads(1)
    brief = pickle.loads(Path(sys.argv[1]).read_bytes())
    Player("killed", brief, load_dataset(brief.data), metrics=Doom(int(sys.argv[2]))).play()


if __name__ == "__main__":
    main()
