"""The learner as a worker: restores, learns while episodes come in, publishes weights, saves checkpoints.

Ray stands in actors/ray_actors.py.
"""

import json
import logging
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors

from actors.metrics import (
    LEARNER_DELTA_Q,
    LEARNER_GRADIENT_NORM,
    LEARNER_LOSS,
    LEARNER_PRIORITY,
    LEARNER_SKIPPED,
    LEARNER_UPDATES,
    LEARNER_WAIT,
    NO_METRICS,
    REPLAY_BYTES,
    REPLAY_EVICTED,
    REPLAY_INSERTED,
    REPLAY_REFUSED,
    REPLAY_REJECTED,
    REPLAY_SAMPLED,
    REPLAY_SIZE,
    REPLAY_WAITING,
    Metrics,
    Tally,
)
from actors.player import Brief, Services
from env.channels import ChannelPlan
from env.errors import NonFiniteError, UserError
from learner import checkpoint
from learner.learner import Learner, UpdateReport
from learner.replay.pipeline import PipelinedReplay
from learner.replay.replay import ReplayStats

__all__ = ["Trainer"]

_log = logging.getLogger("zeroout")

_IDLE_S = 0.1
_BEAT_PERIOD_S = 0.5
_MOST_SAID = 200  # characters of an error that names every parameter


class Trainer:
    """Trains the Controller of one campaign.

    Args:
        brief: the campaign.
        checkpoints: the folder that checkpoints are kept in.
        metrics: told of each update and, with each heartbeat, of the replay.

    Raises:
        UserError: the newest checkpoint is of a Controller that this version does not build.

    """

    def __init__(self, brief: Brief, checkpoints: Path, *, metrics: Metrics = NO_METRICS) -> None:
        self.brief, self.checkpoints, self.metrics = brief, checkpoints, metrics
        plan = ChannelPlan(brief.network(), torch.zeros(1, *brief.image_shape))
        self.services = Services(brief, "learner")
        self.replay = PipelinedReplay(self.services.replay, brief.learner.batch_size)
        self.learner = Learner(
            brief.fresh_controller(plan),
            brief.ladder(plan),
            self.replay,
            brief.learner,
            brief.sequences,
            brief.packing(plan),
        )
        self.replay.prepare = self.learner.prepare
        _restore(self.learner, checkpoints)
        self._last: UpdateReport | None = None
        self._delta_q: tuple[float, float] | None = None
        self._tallies = {
            "inserted": Tally(metrics, REPLAY_INSERTED),
            "sampled": Tally(metrics, REPLAY_SAMPLED),
            "evicted": Tally(metrics, REPLAY_EVICTED),
            "rejected": Tally(metrics, REPLAY_REJECTED),
            "learner_waits": Tally(metrics, REPLAY_REFUSED),
        }
        self._skipped = Tally(metrics, LEARNER_SKIPPED)
        self._skipped.look(self.learner.skipped)
        self._tell_replay(self.replay.stats())
        self._running, self._asked, self._saved = (threading.Event() for _ in range(3))
        self._publish()

    def run(self) -> int:
        """Learn until the Controller's own episodes are played; returns the number of updates."""
        self._running.set()
        try:
            with self.replay:
                self._learn()
        finally:
            self._running.clear()
        return self.learner.updates

    def save(self) -> None:
        """Have `run`, which runs in another thread, write a checkpoint; returns when it is there.

        Where `run` does not run, the newest checkpoint holds everything already.
        """
        self._saved.clear()
        self._asked.set()
        while self._running.is_set() and not self._saved.wait(_IDLE_S):
            pass

    def _learn(self) -> None:
        try:
            while not self._over():
                self._learn_until(time.monotonic() + _BEAT_PERIOD_S)
                self._beat()
                if self._asked.is_set():
                    self._asked.clear()
                    self._save()
                    self._saved.set()
            self._publish()
        except NonFiniteError:
            self._save()  # the weights are the last good ones
            raise
        self._save()

    def _over(self) -> bool:
        """Whether a stop is asked for, or only controls are left to play."""
        schedule, ledger = self.brief.schedule, self.services.ledger
        return ledger.stop_requested() or ledger.remaining() <= schedule.total - schedule.per_group

    def _learn_until(self, deadline_s: float) -> None:
        """Update after update; the ledger is asked in between only, as each question makes the learner wait."""
        while time.monotonic() < deadline_s:
            report = self.learner.update()
            if report is None:
                time.sleep(_IDLE_S)
                self.metrics.add(LEARNER_WAIT, _IDLE_S)
            else:
                self._after(report)

    def _after(self, report: UpdateReport) -> None:
        self._last, self._delta_q = report, report.delta_q or self._delta_q
        self.metrics.add(LEARNER_UPDATES)
        if report.updates % self.brief.learner.publish_period == 0:
            self._publish()
        if report.updates % self.brief.learner.checkpoint_period == 0:
            self._save()
            _log.info(_line(report, self._delta_q))

    def _publish(self) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.learner.controller.state_dict().items()}
        self.services.weights.publish(self.learner.updates, save_tensors(state))

    def _save(self) -> None:
        self.replay.flush()  # a checkpoint's updates and their priorities belong together
        checkpoint.save(self.checkpoints, self.learner.state_dict(), self.learner.updates)

    def _beat(self) -> None:
        stats = self.replay.stats()
        self._tell_replay(stats)
        self._tell_learner()
        state: dict[str, float] = {
            "updates": self.learner.updates,
            "skipped": self.learner.skipped,
            "replay": stats.size,
        }
        if self._last is not None:
            state |= {"loss": self._last.loss, "mean_priority": self._last.mean_priority}
        if self._delta_q is not None:
            state |= {"delta_q_first": self._delta_q[0], "delta_q_last": self._delta_q[1]}
        self.services.ledger.beat("learner", json.dumps(state))

    def _tell_learner(self) -> None:
        self._skipped.look(self.learner.skipped)
        if self._last is not None:
            self.metrics.set(LEARNER_LOSS, self._last.loss)
            self.metrics.set(LEARNER_GRADIENT_NORM, self._last.gradient_norm)
            self.metrics.set(LEARNER_PRIORITY, self._last.mean_priority)
        for place, value in zip(("first", "last"), self._delta_q or (), strict=False):
            self.metrics.set(LEARNER_DELTA_Q, value, place=place)

    def _tell_replay(self, stats: ReplayStats) -> None:
        for name, tally in self._tallies.items():
            tally.look(getattr(stats, name))
        self.metrics.set(REPLAY_SIZE, stats.size)
        self.metrics.set(REPLAY_BYTES, stats.bytes)
        self.metrics.set(REPLAY_WAITING, float(stats.learner_waiting), who="learner")
        self.metrics.set(REPLAY_WAITING, float(stats.actors_waiting), who="actors")


def _restore(learner: Learner, checkpoints: Path) -> None:
    """Go on from the newest checkpoint, where there is one."""
    saved = checkpoint.load_newest(checkpoints)
    if saved is None:
        return
    try:
        learner.load_state_dict(saved)
    except (KeyError, RuntimeError, ValueError) as error:  # what torch raises over other names, shapes and groups
        raise UserError(
            f"checkpoints in {checkpoints}",
            expected="the Controller that this version of Zeroout builds",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:_MOST_SAID]}",
            remedy="resume with the version that the campaign began with (versions.json), or begin another in a new "
            "folder; this one is untouched",
        ) from error


def _line(report: UpdateReport, delta_q: tuple[float, float] | None) -> str:
    """One line a checkpoint, for the learner's log in the Ray dashboard."""
    stale = (
        "" if delta_q is None else f", Delta Q {delta_q[0]:.3f} at the first learned step, {delta_q[1]:.3f} at the last"
    )
    return (
        f"{report.updates} updates: loss {report.loss:.4g}, mean priority {report.mean_priority:.4g}, "
        f"gradient norm {report.gradient_norm:.4g}{stale}"
    )
