"""The Ray shell: players, the learner and recoveries as named Ray actors. Nothing is decided here.

Ray restarts players and the learner (`max_restarts=-1`) and is not asked to remember: they find their place in Redis.
A recovery finds it in the driver's folder: the driver starts another actor for it.
"""

import logging
import socket
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.metrics import PLAYER_SECONDS
from actors.player import Brief, Player
from actors.ray_metrics import RayMetrics
from actors.recovery import News, RecoveryOrder, RecoveryRun
from actors.trainer import Trainer
from env.data import Dataset

__all__ = ["start_learner", "start_player", "start_recovery"]

_WAIT_S = 0.2


class EpisodeActor:
    """Plays episodes until the campaign is over."""

    def __init__(self, name: str, gpus: float, threads: int) -> None:
        _prepare_process(threads)
        self._name, self._device = name, _device(name, gpus)

    def __repr__(self) -> str:
        return f"EpisodeActor({self._name})"

    def run(self, brief: Brief, dataset: Dataset) -> int:
        """Play until nothing is left to claim or in flight; returns the episodes played."""
        with RayMetrics(campaign=brief.campaign, actor=self._name) as metrics:
            player = Player(self._name, brief, dataset, device=self._device, metrics=metrics)
            ledger, played = player.services.ledger, 0
            while not ledger.stop_requested() and ledger.remaining() > 0:
                record = player.play()
                if record is None:
                    time.sleep(_WAIT_S)
                    metrics.add(PLAYER_SECONDS, _WAIT_S, phase="wait")
                    continue
                played += 1
                logging.getLogger("zeroout").info(_line(record))
            return played


class LearnerActor:
    """Trains the Controller until its episodes are played."""

    def __init__(self, checkpoints: str, threads: int) -> None:
        _prepare_process(threads)
        self._checkpoints = Path(checkpoints)
        self._trainer: Trainer | None = None

    def __repr__(self) -> str:
        return "Learner"

    def run(self, brief: Brief) -> int:
        """Learn until the Controller's own episodes are played; returns the number of updates."""
        with RayMetrics(campaign=brief.campaign) as metrics:
            self._trainer = Trainer(brief, self._checkpoints, metrics=metrics)
            return self._trainer.run()

    def save(self) -> None:
        """Write a checkpoint of what is learned so far, beside a `run` that goes on; returns when it is there."""
        if self._trainer is not None:
            self._trainer.save()


class RecoveryActor:
    """Retrains one network."""

    def __init__(self, name: str, order: RecoveryOrder, campaign: str, gpus: float, threads: int) -> None:
        _prepare_process(threads)
        self._name, self._metrics = name, RayMetrics(campaign=campaign, actor=name)
        log = logging.getLogger("zeroout").info
        self._run = RecoveryRun(order, device=_device(name, gpus), log=log, metrics=self._metrics)

    def __repr__(self) -> str:
        return f"RecoveryActor({self._name})"

    def run(self, dataset: Dataset, teacher: bytes) -> bytes:
        """The retrained network; see `RecoveryRun.run`."""
        with self._metrics:
            return self._run.run(dataset, teacher)

    def news(self, version: int) -> News:
        """How far it is, beside a `run` that goes on; see `RecoveryRun.news`."""
        return self._run.news(version)


def start_player(name: str, *, gpus: float, cpus: float, threads: int, namespace: str) -> Any:
    """Start a player's process, on any node that has room for it, now or later; it waits for `run`."""
    shell = ray.remote(EpisodeActor).options(
        name=name,
        namespace=namespace,
        num_gpus=gpus,
        num_cpus=cpus,
        max_restarts=-1,
        max_task_retries=0,
        # Spread, a node that is lost takes few players with it; but a trial of Tune has reserved where its players go.
        scheduling_strategy="SPREAD" if get_current_placement_group() is None else None,
    )
    return shell.remote(name, gpus, threads)


def start_learner(checkpoints: Path, threads: int, namespace: str) -> Any:
    """Start the learner's process on the driver's node, whose folder its checkpoints are kept in.

    It asks for no core of its own, so that a laptop has room for the players.
    """
    here = ray.get_runtime_context().get_node_id()
    shell = ray.remote(LearnerActor).options(
        name="learner",
        namespace=namespace,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=2,  # `save` beside `run`
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
    )
    return shell.remote(str(checkpoints), threads)


def start_recovery(
    name: str, order: RecoveryOrder, *, campaign: str, gpus: float, cpus: float, threads: int, namespace: str
) -> Any:
    """Start a recovery's process, on any node that has room for it, now or later; it waits for `run`."""
    shell = ray.remote(RecoveryActor).options(
        name=name,
        namespace=namespace,
        num_gpus=gpus,
        num_cpus=cpus,
        max_concurrency=2,  # `news` beside `run`
        scheduling_strategy="SPREAD",
    )
    return shell.remote(name, order, campaign, gpus, threads)


def _device(name: str, gpus: float) -> str:
    """Where a player that was given so many GPUs plays."""
    if gpus and not torch.cuda.is_available():
        logging.getLogger("zeroout").warning(
            "%s: Ray gave it %g GPU, and torch %s sees none on %s: it plays on the CPU (see zeroout doctor)",
            name, gpus, torch.__version__, socket.gethostname(),
        )  # fmt: skip
        return "cpu"
    return "cuda" if gpus else "cpu"


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
