"""A player: claims an episode, plays it, hands in what it learned. Ray stands one file further (actors/ray_actors.py).

All that must outlive this process goes to Redis in an order that a kill at any moment leaves right: sequences first
(idempotent by id), then the episode's record together with its networks, in one step. The episode itself goes there
every few steps as a snapshot (actors/snapshot.py), from which whoever claims it next goes on.
"""

import copy
import functools
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
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
    PLAYER_REFUSED_SNAPSHOTS,
    PLAYER_SECONDS,
    PLAYER_STEPS,
    PLAYER_WEIGHTS_AGE,
    Metrics,
)
from actors.play import Course
from actors.records import candidates, episode_record
from actors.rollout import Rollout, StepReport, Underway, rollout
from actors.schedule import EpisodeOrder, ScheduleConfig, order
from actors.snapshot import Snapshot, snapshot_from_bytes, snapshot_to_bytes
from agents.controller import Controller, ControllerConfig
from agents.ladder import Ladder
from agents.policies import ControllerPolicy, Policy, Shadowed, importance_of
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, network_from_bytes
from env.compression import CompressionEnv, EpisodeConfig
from env.data import DataConfig, Dataset
from env.errors import first_line
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

__all__ = ["Brief", "Player", "Services", "fresh_controller", "ladder_of", "packing_of"]

_log = logging.getLogger("zeroout")

_PATIENCE_S = 120.0  # a worker sits out a Redis that is away for so long, and loses nothing
_RENEWALS = 6  # of a lease while it would last
_AGE_S = 5.0  # between two looks at the newest weights' version: half of what Ray's metrics are reported in


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
        return ladder_of(self.episode, plan, self.measure)

    def packing(self, plan: ChannelPlan) -> MaskPacking:
        """How observations and actions travel; what the Controller does not read stays behind."""
        return packing_of(self.controller, plan)

    def fresh_controller(self, plan: ChannelPlan) -> Controller:
        """The Controller before any learning."""
        start = self.controller_start
        return fresh_controller(self.controller, plan, self.measure.name, start=start, seed=self.seed)

    def fingerprint(self, chosen: EpisodeOrder) -> str:
        """Names an episode by all that decides how it goes, but for what is learned meanwhile: 64 hex digits."""
        facts = (self.prefix, self.form, self.measure, self.data, self.episode, self.controller, self.seed, chosen)
        return hashlib.sha256(repr(facts).encode() + self._weights_digest).hexdigest()

    @functools.cached_property
    def _weights_digest(self) -> bytes:
        """Of the networks that episodes begin with: megabytes, which are the same in every one."""
        return hashlib.sha256(self.baseline).digest() + hashlib.sha256(self.controller_start).digest()

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


def ladder_of(config: EpisodeConfig, plan: ChannelPlan, measure: Measure) -> Ladder:
    """The waypoints of every episode of a campaign."""
    return Ladder(plan, measure=measure, targets=config.targets, waypoints=config.waypoints, min_width=config.min_width)


def packing_of(config: ControllerConfig, plan: ChannelPlan) -> MaskPacking:
    """How a campaign's observations and actions travel; what the Controller does not read stays behind."""
    return MaskPacking(plan.units, len(FEATURES) if config.observation == "features" else 0)


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
        self._recognizer = self._make_recognizer(dataset, device)
        self._envs: dict[str, CompressionEnv] = {}
        self.env = self._environment("")
        self.plan, self.ladder = self._recognizer.plan, brief.ladder(self._recognizer.plan)
        self.services = Services(brief, name)
        self._fresh = brief.fresh_controller(self.plan).eval()
        self._controller = copy.deepcopy(self._fresh)
        self._version = 0
        self._renewed = self._aged = 0.0  # when the lease was, and the age of the weights, on this process's clock
        self._give_back()

    def play(self) -> dict[str, Any] | None:
        """Claim and play one episode; returns its record, or None when there is nothing to play now."""
        ledger, self._renewed = self.services.ledger, time.monotonic()
        if self._learner_is_behind():
            return None
        claimed = ledger.claim(self.name, self.brief.lease_s)
        if claimed is None:
            return None
        chosen = order(self.brief.schedule, claimed, seed=self.brief.seed)
        self.env = self._environment(importance_of(chosen.policy))
        self._recognizer.on_minibatch = partial(self._keep_lease, claimed)
        fingerprint = self.brief.fingerprint(chosen)
        episode = self._taken_up(chosen, fingerprint) or self._begun(chosen, fingerprint)
        played = rollout(
            self.env,
            episode.policy,
            self.ladder,
            seed=chosen.retraining_seed,
            on_step=partial(self._on_step, episode),
            begun=episode.underway,
        )
        if chosen.group == "search":
            inserting_since = time.perf_counter()
            self.services.replay.insert(self._items(episode, played))
            self.metrics.add(PLAYER_SECONDS, time.perf_counter() - inserting_since, phase="insert")
        record = episode_record(
            chosen,
            played,
            actor=self.name,
            seconds=time.perf_counter() - episode.since,
            weights_version=episode.weights_version if chosen.policy == "controller" else 0,
            offsets=episode.offsets,
            begun_by=episode.begun_by,
            steps_again=episode.steps_again,
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

    def _environment(self, importance: str) -> CompressionEnv:
        """The environment for policies that ask for an importance beside the features; made when it is first needed."""
        if importance not in self._envs:
            # every policy reads features, also beside a Controller that does not
            self._envs[importance] = CompressionEnv(
                self._recognizer, self.brief.episode, features=True, importance=importance, seed=self.brief.seed
            )
        return self._envs[importance]

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

    def _begun(self, chosen: EpisodeOrder, fingerprint: str) -> "_Episode":
        """The episode from its start, with the newest weights."""
        self._pull_weights()
        since = time.perf_counter()
        offsets = next_candidate(
            chosen,
            lambda: map(json.loads, self.services.ledger.records(0)),
            len(self.plan.layers),
            episodes=self.brief.schedule.per_group,
        )
        return _Episode(
            chosen=chosen,
            fingerprint=fingerprint,
            policy=self._policy(chosen, offsets, self._controller),
            controller=self._controller,
            weights_version=self._version,
            offsets=offsets,
            begun_by=self.name,
            steps_again=self._steps_beyond(chosen.episode, 0),
            since=since,
        )

    def _taken_up(self, chosen: EpisodeOrder, fingerprint: str) -> "_Episode | None":
        """The episode from its snapshot on, with the weights that it began with; None where there is none to trust."""
        since = time.perf_counter()
        data = self.services.ledger.snapshot(chosen.episode)
        if data is None:
            return None
        controller = copy.deepcopy(self._fresh)
        try:
            kept = snapshot_from_bytes(data, fingerprint=fingerprint, recognizer=self.env.recognizer)
            controller.load_state_dict(kept.weights)
            policy = self._policy(chosen, kept.offsets, controller)
            policy.load_state_dict(kept.policy)
            self.env.load_state_dict(kept.env)
            _require_whole(kept.underway.course, self.env, policy)
        except Exception as error:  # what somebody forged may break anything, and must not end every actor in turn
            _log.warning("episode %d: its snapshot is refused, it begins anew: %s", chosen.episode, _said(error))
            self.metrics.add(PLAYER_REFUSED_SNAPSHOTS)
            return None
        step = len(kept.underway.course)
        _log.info("episode %d: goes on after step %d; %s began it", chosen.episode, step, kept.begun_by)
        return _Episode(
            chosen=chosen,
            fingerprint=fingerprint,
            policy=policy,
            controller=controller,
            weights_version=kept.weights_version,
            offsets=kept.offsets,
            begun_by=kept.begun_by,
            steps_again=kept.steps_again + self._steps_beyond(chosen.episode, step),
            since=since - kept.seconds,
            underway=kept.underway,
        )

    def _steps_beyond(self, episode: int, step: int) -> int:
        """Steps after `step` that players who are gone had played of the episode, as their last beats tell."""
        beats = map(json.loads, self.services.ledger.beats().values())
        return sum(max(0, beat["step"] - step) for beat in beats if beat.get("episode") == episode)

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

    def _policy(self, chosen: EpisodeOrder, offsets: np.ndarray | None, controller: Controller) -> Policy:
        network = self._fresh if chosen.policy == "controller-untrained" else controller
        policy = decider(chosen, self.plan, self.brief.measure.name, controller=network, offsets=offsets)
        return policy if isinstance(policy, ControllerPolicy) else Shadowed(policy, controller)

    def _keep_lease(self, episode: int) -> None:
        """Renew the lease where a part of it is over: after each step, and in a retraining, which may outlast it."""
        if time.monotonic() - self._renewed > self.brief.lease_s / _RENEWALS:
            self._renewed = time.monotonic()
            self.services.ledger.renew(episode, self.name, self.brief.lease_s)

    def _on_step(self, episode: "_Episode", now: StepReport) -> None:
        number, ledger = episode.chosen.episode, self.services.ledger
        self._keep_lease(number)
        state = {"episode": number, "step": now.step, "compression": now.compression, "accuracy": now.accuracy}
        ledger.beat(self.name, json.dumps(state))
        self.metrics.add(PLAYER_STEPS)
        self.metrics.add(PLAYER_IMAGES, self.brief.episode.retrained_images(now.reached))
        for phase, spent in now.seconds.items():
            self.metrics.add(PLAYER_SECONDS, spent, phase=phase)
        self.metrics.set(PLAYER_COMPRESSION, now.compression)
        self.metrics.set(PLAYER_ACCURACY, now.accuracy)
        self._show_age(episode)
        period = self.brief.schedule.snapshot_period
        if period and (now.step % period == 0 or now.reached) and not now.underway.course.over:  # else it is recorded
            self._save(episode, now.underway)

    def _show_age(self, episode: "_Episode") -> None:
        if time.monotonic() - self._aged < _AGE_S:
            return
        self._aged, newest = time.monotonic(), self.services.weights.version()
        if newest is not None:
            self.metrics.set(PLAYER_WEIGHTS_AGE, max(0, newest - episode.weights_version))

    def _save(self, episode: "_Episode", underway: Underway) -> None:
        since = time.perf_counter()
        snapshot = Snapshot(
            begun_by=episode.begun_by,
            steps_again=episode.steps_again,
            seconds=since - episode.since,
            weights_version=episode.weights_version,
            weights=episode.controller.state_dict(),
            offsets=episode.offsets,
            policy=episode.policy.state_dict(),
            env=self.env.state_dict(),
            underway=underway,
        )
        data = snapshot_to_bytes(snapshot, fingerprint=episode.fingerprint, recognizer=self.env.recognizer)
        number = episode.chosen.episode
        if not self.services.ledger.save(number, self.name, data):
            _log.warning(
                "episode %d: a snapshot of %d bytes is not kept: too large, Redis is full, or another plays it by now",
                number,
                len(data),
            )
        self.metrics.add(PLAYER_SECONDS, time.perf_counter() - since, phase="snapshot")

    def _items(self, episode: "_Episode", played: Rollout) -> Iterator[Item]:
        brief, packing = self.brief, self.brief.packing(self.plan)
        sequences = cut(played.trace, brief.sequences, packing)
        priorities = first_priorities(
            episode.controller, self.ladder, sequences, brief.learner, brief.sequences, packing
        )
        for number, (sequence, priority) in enumerate(zip(sequences, priorities.tolist(), strict=True)):
            yield Item(sequence_id=f"{episode.chosen.episode}.{number}", payload=encode(sequence), priority=priority)


@dataclass(frozen=True, kw_only=True)
class _Episode:
    """An episode in this player's hands, begun by it or taken up."""

    chosen: EpisodeOrder
    fingerprint: str
    policy: Policy
    controller: Controller  # plays or watches, and gives sequences their first priorities; not changed
    weights_version: int
    offsets: np.ndarray | None
    begun_by: str
    steps_again: int
    since: float  # on this process's clock, as if it had played all of it
    underway: Underway | None = None  # what was there already


def _require_whole(course: Course, env: CompressionEnv, policy: Policy) -> None:
    """ValueError for a course that cannot have led to where `env` and `policy` stand."""
    steps, memory = len(course), policy.recurrent_state
    lengths = (len(course.observations) - 1, len(course.rewards), len(course.states), env.state_dict()["step"])
    shape = None if memory is None else (2, memory[0].shape[-1])
    if steps < 1 or lengths != (steps,) * 4:
        raise ValueError(f"course: expected {steps} steps, and at least 1, got {lengths}")
    if not (
        all(map(env.observation_space.contains, course.observations))
        and all(map(env.action_space.contains, course.actions))
        and all(state.dtype == np.dtype(np.float32) and state.shape == shape for state in course.states)
    ):
        raise ValueError("course: expected observations, actions and states of this environment, got others")


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, PayloadError) else f"{type(error).__name__}: {first_line(error)}"


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
