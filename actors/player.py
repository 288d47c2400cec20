"""A player: claims an episode, plays it, hands in what it learned. Ray stands one file further (actors/ray_actors.py).

All that must outlive this process goes to Redis in an order that a kill at any moment leaves right: sequences first
(idempotent by id), then the episode's record together with its networks, in one step.
"""

import copy
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from actors.deciders import decider, next_candidate
from actors.metrics import (
    NO_METRICS,
    PLAYER_ACCURACY,
    PLAYER_COMPRESSION,
    PLAYER_EPISODES,
    PLAYER_IMAGES,
    PLAYER_SECONDS,
    PLAYER_STEPS,
    PLAYER_WEIGHTS_AGE,
    Metrics,
)
from actors.records import candidates, episode_record
from actors.rollout import Rollout, StepReport, rollout
from actors.schedule import EpisodeOrder, ScheduleConfig, order
from agents.controller import Controller, ControllerConfig
from agents.ladder import Ladder
from agents.policies import ControllerPolicy, Policy, Shadowed
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, network_from_bytes
from env.compression import CompressionEnv, EpisodeConfig
from env.data import DataConfig, Dataset
from env.importance import FEATURES
from env.measure import Measure
from env.recognizer import Recognizer
from env.seeds import derive_seed
from learner.learner import LearnerConfig, first_priorities
from learner.packing import MaskPacking
from learner.replay.codec import PayloadError, encode
from learner.replay.connection import connect
from learner.replay.ledger import Ledger
from learner.replay.replay import Item, ReplayConfig
from learner.replay.shards import open_replay
from learner.replay.weights import WeightStore
from learner.sequence import SequenceConfig, cut

__all__ = ["Brief", "Player", "Services", "fresh_controller"]

_log = logging.getLogger("zeroout")

_PATIENCE_S = 120.0  # a worker sits out a Redis that is away for so long, and loses nothing


@dataclass(frozen=True, kw_only=True)
class Brief:
    """Everything a worker has to know, small enough to be sent to each of them; the images travel apart."""

    form: NetworkForm
    baseline: bytes  # the uncompressed network, as env.compact_file writes it
    image_shape: tuple[int, int, int]
    measure: Measure
    data: DataConfig
    episode: EpisodeConfig
    controller: ControllerConfig
    controller_start: bytes = b""  # weights that a new Controller takes over as far as they fit (safetensors)
    sequences: SequenceConfig
    learner: LearnerConfig
    replay: ReplayConfig
    schedule: ScheduleConfig
    seed: int
    campaign: str  # what those who watch know it by
    redis_url: str = field(repr=False)  # it may hold a password
    prefix: str
    lease_s: float

    def ladder(self, plan: ChannelPlan) -> Ladder:
        """The waypoints of every episode."""
        return Ladder(
            plan,
            measure=self.measure,
            targets=self.episode.targets,
            waypoints=self.episode.waypoints,
            min_width=self.episode.min_width,
        )

    def packing(self, plan: ChannelPlan) -> MaskPacking:
        """How observations and actions travel; what the Controller does not read stays behind."""
        return MaskPacking(plan.units, len(FEATURES) if self.controller.observation == "features" else 0)

    def fresh_controller(self, plan: ChannelPlan) -> Controller:
        """The Controller before any learning."""
        start = self.controller_start
        return fresh_controller(self.controller, plan, self.measure.name, start=start, seed=self.seed)

    def network(self) -> torch.nn.Module:
        """The baseline, on the CPU."""
        return network_from_bytes(self.baseline, self.form)


class Services:
    """The campaign's shared state in Redis, as one worker sees it."""

    def __init__(self, brief: Brief, worker: str) -> None:
        client = connect(brief.redis_url, patience_s=_PATIENCE_S)
        self.ledger = Ledger(client, brief.prefix)
        self.weights = WeightStore(client, brief.prefix)
        generator = np.random.default_rng(derive_seed(brief.seed, "replay", worker, time.time_ns()))
        self.replay = open_replay([client], brief.prefix, brief.replay, generator)


def fresh_controller(
    config: ControllerConfig, plan: ChannelPlan, measure: str, *, start: bytes, seed: int
) -> Controller:
    """A campaign's Controller before any learning; the same for every worker.

    `start` is what another campaign has learned (safetensors), taken over as far as it fits; may be empty.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "controller"))
        made = Controller(config, plan, measure)
    if start:
        made.adopt(load_tensors(start))
    return made


class Player:
    """Plays episodes of one campaign, one after the other.

    Args:
        name: stable over restarts; the ledger knows episodes in flight by it.
        brief: the campaign.
        dataset: its images, on the CPU.
        device: where the Recognizer lives.
        metrics: told of each step.

    """

    def __init__(
        self, name: str, brief: Brief, dataset: Dataset, *, device: str = "cpu", metrics: Metrics = NO_METRICS
    ) -> None:
        self.name, self.brief, self.metrics = name, brief, metrics
        recognizer = self._make_recognizer(dataset, device)
        # every policy reads features, also beside a Controller that does not
        self.env = CompressionEnv(recognizer, brief.episode, features=True, seed=brief.seed)
        self.plan, self.ladder = recognizer.plan, brief.ladder(recognizer.plan)
        self.services = Services(brief, name)
        self._fresh = brief.fresh_controller(self.plan).eval()
        self._controller = copy.deepcopy(self._fresh)
        self._version = 0
        self._give_back()

    def play(self) -> dict[str, Any] | None:
        """Claim and play one episode; returns its record, or None when there is nothing to play now."""
        ledger = self.services.ledger
        if self._learner_is_behind():
            return None
        claimed = ledger.claim(self.name, self.brief.lease_s)
        if claimed is None:
            return None
        chosen = order(self.brief.schedule, claimed, seed=self.brief.seed)
        self._pull_weights()
        since = time.perf_counter()
        offsets = next_candidate(
            chosen,
            lambda: map(json.loads, ledger.records(0)),
            len(self.plan.layers),
            episodes=self.brief.schedule.per_group,
        )
        played = rollout(
            self.env,
            self._policy(chosen, offsets),
            self.ladder,
            seed=chosen.retraining_seed,
            on_step=lambda report: self._on_step(claimed, report),
        )
        if chosen.group == "search":
            inserting_since = time.perf_counter()
            self.services.replay.insert(self._items(claimed, played))
            self.metrics.add(PLAYER_SECONDS, time.perf_counter() - inserting_since, phase="insert")
        record = episode_record(
            chosen,
            played,
            actor=self.name,
            seconds=time.perf_counter() - since,
            weights_version=self._version if chosen.policy == "controller" else 0,
            offsets=offsets,
        )
        networks = list(candidates(chosen, played, self.brief.form, best_score=ledger.best_score))
        if ledger.complete(claimed, json.dumps(record), networks):
            self.metrics.add(PLAYER_EPISODES)
        return record

    def _make_recognizer(self, dataset: Dataset, device: str) -> Recognizer:
        """What is compressed; benchmarks/scale.py puts one in its place that sleeps where this one trains."""
        brief = self.brief
        return Recognizer(
            brief.network(),
            dataset,
            brief.data,
            measure=brief.measure,
            precision=brief.episode.precision,
            device=device,
        )

    def _learner_is_behind(self) -> bool:
        """Whether the replay's rate limiter holds the actors back; controls need no learner."""
        schedule = self.brief.schedule
        searching = self.services.ledger.remaining() > schedule.total - schedule.per_group
        return searching and self.services.replay.stats().actors_waiting

    def _give_back(self) -> None:
        """Return what an earlier life of this actor had claimed."""
        for episode, owner in self.services.ledger.in_flight():
            if owner == self.name:
                self.services.ledger.release(episode, owner)

    def _pull_weights(self) -> None:
        try:
            newer = self.services.weights.pull(self._version)
            state = load_tensors(newer[1]) if newer is not None else {}
        except (PayloadError, SafetensorError) as error:  # the learner replaces them when it publishes next
            _log.warning("weights: what is stored cannot be read, those of version %d stay: %s", self._version, error)
            return
        if newer is None:
            return
        if _shapes(state) != _shapes(self._controller.state_dict()):
            _log.warning("weights: those stored are of another Controller, those of version %d stay", self._version)
            return
        self._version = newer[0]
        self._controller.load_state_dict(state)

    def _policy(self, chosen: EpisodeOrder, offsets: np.ndarray | None) -> Policy:
        network = self._fresh if chosen.policy == "controller-untrained" else self._controller
        policy = decider(chosen, self.plan, self.brief.measure.name, controller=network, offsets=offsets)
        return policy if isinstance(policy, ControllerPolicy) else Shadowed(policy, self._controller)

    def _on_step(self, episode: int, now: StepReport) -> None:
        self.services.ledger.renew(episode, self.name, self.brief.lease_s)
        state = {"episode": episode, "step": now.step, "compression": now.compression, "accuracy": now.accuracy}
        self.services.ledger.beat(self.name, json.dumps(state))
        self.metrics.add(PLAYER_STEPS)
        self.metrics.add(PLAYER_IMAGES, self.brief.episode.retrained_images(now.reached))
        for phase, spent in now.seconds.items():
            self.metrics.add(PLAYER_SECONDS, spent, phase=phase)
        self.metrics.set(PLAYER_COMPRESSION, now.compression)
        self.metrics.set(PLAYER_ACCURACY, now.accuracy)
        newest = self.services.weights.version()
        if newest is not None:
            self.metrics.set(PLAYER_WEIGHTS_AGE, max(0, newest - self._version))

    def _items(self, episode: int, played: Rollout) -> Iterator[Item]:
        brief, packing = self.brief, self.brief.packing(self.plan)
        sequences = cut(played.trace, brief.sequences, packing)
        priorities = first_priorities(self._controller, self.ladder, sequences, brief.learner, brief.sequences, packing)
        for number, (sequence, priority) in enumerate(zip(sequences, priorities.tolist(), strict=True)):
            yield Item(sequence_id=f"{episode}.{number}", payload=encode(sequence), priority=priority)


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
