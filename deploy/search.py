"""The second stage: episodes. Starts or finds Redis, starts the learner and the players on Ray, and watches.

Called by deploy/campaign.py as a stage, and in parts (`open_services`, `Watch`) by deploy/rllib.py.

Its products are `episodes.jsonl`, `frontier.json` and the best network of each group and target in `candidates/`.
The driver holds nothing that Redis or the folder does not: kill it, and `zeroout resume` runs this stage again.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.exceptions
import redis
from ray._private import state as ray_state

from actors.player import Brief
from actors.ray_actors import start_learner, start_player
from actors.ray_metrics import RayMetrics
from actors.records import slot
from deploy.alone import play_alone
from deploy.candidates import keep_better, missing, require_candidates, write_frontier
from deploy.config import CampaignConfig
from deploy.controller_file import read_controller
from deploy.event_files import EventFiles
from deploy.folder import CampaignFolder, write_atomic
from deploy.frontier import frontier
from deploy.live_file import LiveFile
from deploy.prepare import Baseline
from deploy.progress import ActorLine, Progress, SearchSnapshot
from deploy.ray_session import gpus_each, ray_session
from deploy.redis_server import EmbeddedServer
from deploy.telemetry import Telemetry
from env.compact_file import network_to_bytes
from env.data import Dataset
from env.errors import UserError, ZerooutError
from learner.replay.codec import PayloadError
from learner.replay.connection import check_server, connect, memory_bytes, redact, retrying
from learner.replay.ledger import Ledger
from learner.replay.shards import open_replay
from learner.replay.weights import WeightStore
from learner.sequence import starts

__all__ = ["POLL_S", "Services", "Watch", "is_finished", "open_services", "open_telemetry", "search", "server_name"]

_log = logging.getLogger(__name__)

POLL_S = 0.5
_OUTAGE_S = 120.0  # how long Redis may be away before the driver gives up (and can be resumed)
# A worker that lives this long is well. One that fails sooner, so often in a row, is given up after 2 minutes or so.
_HEALTHY_S, _MAX_FAILURES, _NO_REST, _LONGEST_REST_S = 60.0, 12, 3, 20.0
_STARTING = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING")
_STOP_S = 60.0
_NOBODY_S = 20.0  # until it is said that no player has begun; a process that imports torch needs some of them


def search(
    folder: CampaignFolder,
    config: CampaignConfig,
    dataset: Dataset,
    baseline: Baseline,
    *,
    redis_url: str,
    refill_replay: bool,
    progress: Progress,
) -> None:
    """Play all episodes that are not yet recorded in the folder; see `open_services` for `refill_replay`."""
    if not is_finished(folder, config):
        if config.search.alone:
            play_alone(folder, config, dataset, baseline, progress)
        else:
            opened = open_services(
                folder,
                config,
                dataset,
                baseline,
                redis_url=redis_url,
                refill_replay=refill_replay,
                progress=progress,
            )
            _play_on_ray(folder, config, dataset, opened, progress)
    write_frontier(folder, config, folder.read_episodes())


def _play_on_ray(
    folder: CampaignFolder,
    config: CampaignConfig,
    dataset: Dataset,
    opened: contextlib.AbstractContextManager["Services"],
    progress: Progress,
) -> None:
    progress.stage("search", f"{config.search.total} episodes by {config.search.actors} actors")
    with opened as services, ray_session(config, progress), open_telemetry(folder, services) as telemetry:
        watch = Watch(folder, config, services, dataset, progress, telemetry)
        watch.run()
        watch.keep()
    require_candidates(folder, config)


@dataclass(frozen=True, kw_only=True)
class Services:
    """What the driver of a campaign holds while it runs: its description for workers, and its state in Redis."""

    brief: Brief
    client: redis.Redis
    ledger: Ledger
    weights: WeightStore


@contextlib.contextmanager
def open_services(
    folder: CampaignFolder,
    config: CampaignConfig,
    dataset: Dataset,
    baseline: Baseline,
    *,
    redis_url: str,
    progress: Progress,
    refill_replay: bool = False,
) -> Iterator[Services]:
    """Start or find the campaign's Redis, and bring it and the folder to the same episodes.

    Raises UserError for a server that does not answer, is not the one that the campaign began with, or has lost
    sequences of episodes in the folder; with `refill_replay` the last is only noted.
    """
    _check_same_server(folder, redis_url)
    with contextlib.ExitStack() as stack:
        if not redis_url:
            redis_url = stack.enter_context(EmbeddedServer(folder.redis)).url
            progress.note("Redis: a server of this campaign's own; actors on other hosts cannot reach it (see --redis)")
        client = connect(redis_url)
        stack.callback(client.close)
        check_server(client, redis_url)
        brief = _brief(folder, config, dataset, baseline, redis_url)
        ledger = Ledger(client, brief.prefix)
        _open(ledger, folder, config)
        lost = _lost_sequences(brief, client, folder, config)
        if lost is not None and not refill_replay:
            raise lost
        if lost is not None:
            progress.note(f"{lost.what} holds {lost.got}; the replay is filled by the episodes that are left")
        weights = WeightStore(client, brief.prefix)
        yield Services(brief=brief, client=client, ledger=ledger, weights=weights)


@contextlib.contextmanager
def open_telemetry(folder: CampaignFolder, services: Services) -> Iterator[Telemetry]:
    """Tell those who watch, by Prometheus and by TensorBoard's event files. Ray must run."""
    metrics = RayMetrics(campaign=services.brief.campaign)
    with metrics, EventFiles(folder.tensorboard, folder.read_episodes()) as events:
        yield Telemetry(metrics, events, lambda: memory_bytes(services.client))


def is_finished(folder: CampaignFolder, config: CampaignConfig) -> bool:
    """Whether every episode is recorded and the networks of every group and target are kept."""
    return len(folder.read_episodes()) == config.search.total and not list(missing(folder, config))


def _brief(
    folder: CampaignFolder, config: CampaignConfig, dataset: Dataset, baseline: Baseline, redis_url: str
) -> Brief:
    prefix = folder.make_redis_prefix()
    return Brief(
        form=baseline.form,
        baseline=network_to_bytes(baseline.start, baseline.form),
        image_shape=dataset.image_shape,
        measure=baseline.measure,
        data=config.data,
        episode=config.episode,
        controller=config.controller,
        controller_start=read_controller(config.controller_start),
        sequences=config.sequence,
        learner=config.learner,
        replay=config.replay_in_search,
        schedule=config.schedule,
        seed=config.seed,
        campaign=folder.shown_name(),
        redis_url=redis_url,
        prefix=prefix,
        lease_s=config.cluster.lease_s,
    )


def _open(ledger: Ledger, folder: CampaignFolder, config: CampaignConfig) -> None:
    """Bring Redis and the folder to the same episodes; whoever held one before this driver is gone."""
    ledger.open(folder.campaign_toml.read_text(encoding="utf-8"), config.search.total)
    ledger.restore([json.dumps(record) for record in folder.read_episodes()])
    ledger.clear_stop()
    for episode, owner in ledger.in_flight():
        ledger.release(episode, owner)


@dataclass
class _Worker:
    """A Ray actor, the call that is running on it, and how often it failed soon after it was called.

    `call` is None while the worker rests: until `call_at_s`, and until its process is there, since one that Ray is
    restarting refuses calls at once.
    """

    handle: Any
    call: Any
    called_s: float
    failures: int = 0
    call_at_s: float = 0.0


@dataclass
class Watch:
    """The driver's loop: starts the workers, mirrors records into the folder, calls the dead back to work.

    `run` is all of it; `start`, `look` again and again, and `stop` are its parts.
    """

    folder: CampaignFolder
    config: CampaignConfig
    services: Services
    dataset: Dataset
    progress: Progress
    telemetry: Telemetry
    records: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    started: float = field(default_factory=time.monotonic)
    workers: dict[str, _Worker] = field(default_factory=dict)
    somebody_plays: bool = False  # or it was said that nobody does

    def __post_init__(self) -> None:
        self.brief, self.ledger = self.services.brief, self.services.ledger
        self.live = LiveFile(self.folder.live_json)

    def run(self) -> None:
        """Watch until every episode is recorded."""
        self.start()
        try:
            while not self.over:
                time.sleep(POLL_S)
                self.progress.search(self.look())
        finally:
            self.stop()

    @property
    def over(self) -> bool:
        """Whether every episode is recorded."""
        return len(self.records) >= self.config.search.total

    def start(self) -> None:
        """Set the workers to work."""
        self.records = self.folder.read_episodes()
        self.before, self.beats_before = len(self.records), self._beats()
        self._start_workers()

    def look(self) -> SearchSnapshot:
        """Record what was played since the last look, call the dead back to work, and tell those who watch.

        Returns how the search stands. Raises UserError where Redis has lost the campaign, and a worker's own error
        where it cannot go on.
        """
        none_left = self._remaining() == 0
        self._mirror()
        if none_left and not self.over:
            raise _lost_state(self.brief.redis_url, len(self.records), self.config.search.total)
        self._revive()
        texts = self._beats()
        self._say_that_nobody_plays(texts)
        beats = {name: json.loads(text) for name, text in texts.items()}
        snapshot = self._snapshot(beats)
        self.telemetry.look(snapshot, beats.get("learner", {}))
        self.live.write(snapshot)
        return snapshot

    def keep(self) -> None:
        """Write what is worth keeping of Redis into the folder: the best networks, and the learned Controller."""
        _keep_candidates(self.ledger, self.folder, self.config)
        _keep_controller(self.services.weights, self.folder)

    def _start_workers(self) -> None:
        cluster, namespace = self.config.cluster, self.brief.prefix
        self.gpus = gpus_each(self.config, ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
        # References are arguments of `run`, not of the constructor: Ray can only restart an actor whose own are small.
        self.brief_ref, self.images_ref = ray.put(self.brief), ray.put(self.dataset)
        self._call("learner", start_learner(self.folder.checkpoints.resolve(), cluster.threads_per_actor, namespace))
        for number in range(self.config.search.actors):
            name = f"actor-{number}"
            player = start_player(
                name,
                gpus=self.gpus,
                cpus=cluster.cpus_per_actor,
                threads=cluster.threads_per_actor,
                namespace=namespace,
            )
            self._call(name, player)

    def _call(self, name: str, handle: Any) -> None:
        """Set a worker to work, for the first time or again after its process was restarted."""
        failures = self.workers[name].failures if name in self.workers else 0
        arguments = (self.brief_ref,) if name == "learner" else (self.brief_ref, self.images_ref)
        self.workers[name] = _Worker(handle, handle.run.remote(*arguments), time.monotonic(), failures)

    def _remaining(self) -> int:
        return retrying(self.ledger.remaining, _OUTAGE_S, url=self.brief.redis_url)

    def _mirror(self) -> None:
        """Write the episodes that Redis has and the folder has not."""
        texts = retrying(lambda: self.ledger.records(self.read), _OUTAGE_S, url=self.brief.redis_url)
        new = [json.loads(text) for text in texts]
        self.read += len(new)
        known = {record["id"] for record in self.records}
        fresh = [record for record in new if record["id"] not in known]
        if fresh:
            # networks first: a record says that its network is safe
            _keep_candidates(self.ledger, self.folder, self.config)
            self.folder.append_episode(fresh)
            self.records += fresh
            write_frontier(self.folder, self.config, self.records)
            self.telemetry.episodes(fresh)

    def _revive(self) -> None:
        """Call a worker that died back to work, once Ray has restarted its process."""
        for name, worker in list(self.workers.items()):
            if worker.call is None:
                if time.monotonic() >= worker.call_at_s and not _is_starting(worker.handle):
                    self._call(name, worker.handle)
                continue
            finished, _ = ray.wait([worker.call], timeout=0)
            if not finished:
                continue
            try:
                ray.get(worker.call)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, ZerooutError):
                    raise error.cause from None
                self._rest(name, worker, f"failed ({type(error.cause).__name__}: {error.cause})")
            except ray.exceptions.RayActorError:
                self._rest(name, worker, "died")

    def _rest(self, name: str, worker: _Worker, what: str) -> None:
        """Let a worker be for a while, longer each time that it fails soon after it was called."""
        soon = time.monotonic() - worker.called_s < _HEALTHY_S
        worker.failures = worker.failures + 1 if soon else 1
        if worker.failures > _MAX_FAILURES:
            raise ZerooutError(f"{name} {what}, {worker.failures} times in a row soon after it was started")
        if worker.failures == 1:
            self.progress.note(f"{name} {what}; it is started again")
        # none the first times: somebody who kills, or a spot market, may well do so thrice in a minute
        more = worker.failures - _NO_REST
        rest_s = min(2.0**more, _LONGEST_REST_S) if more > 0 else 0.0
        worker.call, worker.call_at_s = None, time.monotonic() + rest_s

    def stop(self) -> None:
        """Ask everyone to stop and give the learner time for its last checkpoint."""
        with contextlib.suppress(Exception):  # the reason for stopping may be that Redis is gone
            self.ledger.request_stop()
            if self.workers["learner"].call is not None:
                ray.wait([self.workers["learner"].call], timeout=_STOP_S)

    def kill(self) -> None:
        """End the workers' processes, in a Ray that outlives the campaign; an episode in flight is played again."""
        handles = [worker.handle for worker in self.workers.values()]
        for handle in handles:
            ray.kill(handle)
        # these calls fail when the processes are gone
        ray.wait([handle.__ray_ready__.remote() for handle in handles], num_returns=len(handles), timeout=_STOP_S)

    def _snapshot(self, beats: dict[str, dict[str, Any]]) -> SearchSnapshot:
        elapsed = time.monotonic() - self.started
        played, total = len(self.records) - self.before, self.config.search.total
        left = (total - len(self.records)) * elapsed / played if played else None
        learner = beats.get("learner", {})
        spent: dict[str, list[float]] = {name: [] for name in self.workers}
        for record in self.records:  # once for all actors: of both there may be thousands
            spent.setdefault(record["actor"], []).append(record["seconds"])
        return SearchSnapshot(
            done=len(self.records),
            total=total,
            actors=[_actor_line(name, spent[name], beats.get(name, {})) for name in self.workers if name != "learner"],
            learner_updates=learner.get("updates", 0),
            learner_loss=learner.get("loss"),
            replay_size=learner.get("replay", 0),
            best=_best(self.records, self.config.episode.targets),
            seconds_elapsed=elapsed,
            seconds_left=left,
        )

    def _say_that_nobody_plays(self, beats: dict[str, str]) -> None:
        """Once, where all players still wait for a node that has room for them."""
        if self.somebody_plays or time.monotonic() - self.started < _NOBODY_S:
            return
        self.somebody_plays = True
        if any(beats.get(name) != self.beats_before.get(name) for name in self.workers if name != "learner"):
            return
        cluster, there = self.config.cluster, ray.cluster_resources()  # type: ignore[no-untyped-call]
        asked = f"{self.gpus:g} GPUs and {cluster.cpus_per_actor:g} cores"
        found = f"{there.get('GPU', 0):g} and {there.get('CPU', 0):g} in all"
        self.progress.note(
            f"no player has begun yet: each asks for {asked}, the cluster has {found}; ray status says who waits"
        )

    def _beats(self) -> dict[str, str]:
        return retrying(self.ledger.beats, _OUTAGE_S, url=self.brief.redis_url)


def _is_starting(handle: Any) -> bool:
    """Whether Ray is still about to start the process of an actor."""
    found = ray_state.actors(handle._actor_id.hex())  # Ray has no public word for it without its dashboard
    return bool(found.get("State") in _STARTING)


def _actor_line(name: str, seconds: list[float], beat: dict[str, Any]) -> ActorLine:
    """An actor with the seconds of each of its episodes, and its newest heartbeat."""
    busy = sum(seconds)
    state = f"episode {beat['episode']}, step {beat['step']}" if beat else "starting"
    rate = 60.0 * len(seconds) / busy if busy else 0.0
    return ActorLine(name=name, episodes=len(seconds), episodes_per_minute=rate, state=state)


def _best(records: list[dict[str, Any]], targets: tuple[float, ...]) -> list[tuple[float, str, float, float]]:
    rows = [(row["target"], row["best"]) for row in frontier(records, targets) if row["best"]]
    return [(target, best["policy"], best["cross_entropy"], best["accuracy"]) for target, best in rows]


def _keep_candidates(ledger: Ledger, folder: CampaignFolder, config: CampaignConfig) -> None:
    """Write the best networks that Redis has into the folder."""
    slots = [slot(group, target) for group in config.search.groups for target in config.episode.targets]
    keep_better(folder, (best for best in map(ledger.best, slots) if best is not None))


def _keep_controller(weights: WeightStore, folder: CampaignFolder) -> None:
    """Write what the learner published last into the folder: another campaign can start from it."""
    try:
        newest = weights.pull(-1)
    except PayloadError as error:
        _log.warning("the learned Controller is not kept: %s", error)
        return
    if newest is not None:
        write_atomic(folder.controller, newest[1])


def _check_same_server(folder: CampaignFolder, redis_url: str) -> None:
    """A campaign's episodes in flight, networks and replay are in the Redis it began with; UserError for another."""
    path, server = folder.path / "server", server_name(redis_url)
    if not path.is_file():
        write_atomic(path, server)
    began = path.read_text()
    if began != server:
        raise UserError(
            f"campaign {folder.path}",
            expected=f"the Redis it began with ({began})",
            got=server,
            remedy="give the same --redis (or none)",
        )


def _lost_sequences(
    brief: Brief, client: redis.Redis, folder: CampaignFolder, config: CampaignConfig
) -> UserError | None:
    """What to say where the replay has seen fewer sequences than the recorded episodes had; None where it has not.

    An episode's sequences are inserted before it is recorded, and the count outlives their eviction.
    """
    steps = [record["steps"] for record in folder.read_episodes() if record["group"] == "search"]
    expected = sum(len(starts(count, config.sequence)) for count in steps)
    found = open_replay([client], brief.prefix, brief.replay, np.random.default_rng(0)).stats().inserted
    if found >= expected:
        return None
    return UserError(
        f"the replay in Redis at {redact(brief.redis_url)}",
        expected=f"{expected} sequences inserted by the {len(steps)} episodes in the folder",
        got=f"{found} of them: the server was emptied, or is older than the folder",
        remedy="bring its data back, or go on without them: zeroout resume FOLDER --refill-replay",
    )


def server_name(redis_url: str) -> str:
    """What a Redis is called in files and messages: its URL without a password, or that it is the campaign's own."""
    return redact(redis_url) if redis_url else "a server of the campaign's own"


def _lost_state(redis_url: str, recorded: int, total: int) -> UserError:
    return UserError(
        f"Redis at {redact(redis_url)}",
        expected=f"this campaign's {total} episodes",
        got=f"an empty campaign, after {recorded} episodes were recorded",
        remedy="its data were deleted there; zeroout resume goes on from the campaign's folder",
    )
