"""The Ray shell: players and the learner as named, restarting Ray actors. Nothing is decided here.

Ray restarts processes (`max_restarts=-1`) and is not asked to remember: a restarted actor finds its place in Redis.
"""

import logging
import time
from pathlib import Path
from typing import Any

import ray
import torch

from actors.player import Brief, Player
from actors.trainer import Trainer
from env.data import Dataset

__all__ = ["start_learner", "start_player"]

_WAIT_S = 0.2


class _EpisodeActor:
    """Plays episodes until the campaign is over."""

    def __init__(self, name: str, brief: Brief, dataset: Dataset, device: str, threads: int) -> None:
        _prepare_process(threads)
        self._name = name
        self._player = Player(name, brief, dataset, device=device)

    def __repr__(self) -> str:
        return f"EpisodeActor({self._name})"

    def run(self) -> int:
        """Play until nothing is left to claim or in flight; returns the episodes played."""
        played = 0
        ledger = self._player.services.ledger
        while not ledger.stop_requested() and ledger.remaining() > 0:
            record = self._player.play()
            if record is None:
                time.sleep(_WAIT_S)
                continue
            played += 1
            logging.getLogger("zeroout").info(_line(record))
        return played


class _LearnerActor:
    """Trains the Controller until it is asked to stop."""

    def __init__(self, brief: Brief, checkpoints: str, threads: int) -> None:
        _prepare_process(threads)
        self._trainer = Trainer(brief, Path(checkpoints))

    def __repr__(self) -> str:
        return "Learner"

    def run(self) -> int:
        """Learn until the campaign asks to stop; returns the number of updates."""
        return self._trainer.run()


def start_player(
    name: str, brief: Any, dataset: Any, *, gpus: float, cpus: float, threads: int, namespace: str
) -> ray.actor.ActorHandle:
    """Start a player; `brief` and `dataset` are values or Ray references to them."""
    device = "cuda" if gpus else "cpu"
    shell = ray.remote(_EpisodeActor).options(
        name=name, namespace=namespace, num_gpus=gpus, num_cpus=cpus, max_restarts=-1, max_task_retries=0
    )
    return shell.remote(name, brief, dataset, device, threads)


def start_learner(brief: Any, checkpoints: Path, *, threads: int, namespace: str) -> ray.actor.ActorHandle:
    """Start the learner; it asks for no core of its own, so that a laptop has room for the players."""
    shell = ray.remote(_LearnerActor).options(
        name="learner", namespace=namespace, num_cpus=0, max_restarts=-1, max_task_retries=0
    )
    return shell.remote(brief, str(checkpoints), threads)


def _prepare_process(threads: int) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("zeroout").setLevel(logging.INFO)
    if threads:
        torch.set_num_threads(threads)


def _line(record: dict[str, Any]) -> str:
    """One line an episode, for the actor's log in the Ray dashboard."""
    reached = ", ".join(
        f"{point['compression']:.2%} removed: accuracy {point['accuracy']:.3f}, cross-entropy "
        f"{point['cross_entropy']:.3f}"
        for point in record["targets"]
    )
    return f"episode {record['id']} ({record['group']}, {record['policy']}): {reached}; {record['seconds']:.1f} s"
