"""Scale, by simulation: 1 to 512 actors that sleep where they would retrain, one learner, one Redis, this machine.

`python -m benchmarks.scale --help` says what is real, what sleeps, and what is counted.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import redis
import torch

from actors.player import Services
from actors.schedule import ScheduleConfig
from agents.controller import ControllerConfig
from benchmarks.scale_workers import (
    CLASSES,
    Sample,
    SharedBrief,
    Work,
    WorkerProcess,
    learner_process,
    players_process,
    work_process,
)
from benchmarks.step import Spread, cpu_name
from deploy.redis_server import EmbeddedServer
from env.compact_file import NetworkForm, network_to_bytes
from env.compression import EpisodeConfig
from env.data import DataConfig
from env.measure import Measure
from env.networks import NetworkConfig
from learner.learner import LearnerConfig
from learner.replay.connection import connect
from learner.replay.replay import ReplayConfig
from learner.sequence import SequenceConfig

RESULTS = Path(__file__).parent / "results"
ACTORS = (1, 8, 32, 64, 128, 512)
RATIOS = (ReplayConfig().replay_ratio, 1.0)
ALONE = 2  # actors with a process of their own; all others are threads
SHARED = max(8, os.cpu_count() or 1)  # processes that hold those: Python runs one thread of each at a time
EPISODES = 200_000  # of the campaign: more than are ever played here
FULL, WAITING = 0.95, 0.1  # of the cores' time used, of the actors' time waited for the learner
LINEAR, OVERHEAD_MS, GPUS = 0.95, 5.0, 1000
POLL_S, PATIENCE_S = 0.5, 20.0

EPILOG = f"""\
What is real: the player with its rollout, the Controller's decisions, the compaction of the network, the ledger, the
weights, the replay, sequences and records as long as in a campaign, Ray's metrics (nobody reads them), the Trainer,
and the embedded server with its log of writes. Every value of a campaign is its default; the network is quarter-width
VGG16 on 32x32 images. The Controller plays from the first episode on.
What sleeps: the Recognizer's retraining, evaluation and scores, as long as they took in a real episode that is played
first, in CPU seconds, which is what they take on a core of their own (or `--step-seconds`).

512 processes with torch do not fit in a small machine's memory. So the first {ALONE} actors have a process of their
own, and all others are threads in {SHARED} processes, each with its own player and its own connection to Redis. The
page shows both kinds side by side, from the same seconds: they should not differ.

Each number of actors is measured while all of them play, in the length of about two episodes, after each has begun at
a moment of its own. A sweep is repeated for every --replay-ratio: with a campaign's default the learner makes several
updates an episode, and is full before anything else; a sweep ends where it is, as more actors would only wait for it.

  episodes/s     sum over actors of episodes by their seconds, from the end of one to the end of the next
  of linear      that, divided by what as many actors as the first number would do at its own rate
  overhead       wall time of a step beside its sleep, all of an episode's beginning and end included, waiting for the
                 learner excluded. On full cores it is queueing: CPU time of the same stands beside it
  orchestration  the same without making the compact network, which is the environment's own work
  late           how much longer the sleeps of a step were than asked for: also queueing
  idle           share of wall time in which the learner had nothing to do, by its own metric
  cores          CPU seconds a second: of the actors, the learner, Redis, and of whatever else runs on this machine
  waiting        share of their time in which the replay's rate limiter held the actors back, for the learner
  full           at a linear rate somebody would use {FULL:.0%} of the cores' time, as much more as that is above the
                 measured one; or {WAITING:.0%} of the actors' time was such waiting

examples:
  python -m benchmarks.scale                       about ten minutes
  python -m benchmarks.scale --quick               a look; writes nothing
  python -m benchmarks.scale --actors 1 16 64 --replay-ratio 8 --step-seconds 0.5
"""


def make_brief(redis_url: str, *, width: float, ratio: float, actors: int, prefix: str) -> SharedBrief:
    """A campaign with every default."""
    config = NetworkConfig(name="vgg16", width=width)
    form = NetworkForm(network=config, channels=3, classes=CLASSES, image_size=32)
    network = form.build()
    return SharedBrief(
        form=form,
        baseline=network_to_bytes(network, form),
        image_shape=(3, 32, 32),
        measure=Measure("parameters", sum(parameter.numel() for parameter in network.parameters())),
        data=DataConfig(flip=True, shift_pixels=4),
        episode=EpisodeConfig(),
        controller=ControllerConfig(),
        sequences=SequenceConfig(),
        learner=LearnerConfig(),
        replay=ReplayConfig(replay_ratio=ratio, min_sequences=1),
        schedule=ScheduleConfig(episodes=EPISODES, actors=actors),
        seed=0,
        campaign="scale",
        redis_url=redis_url,
        prefix=prefix,
        lease_s=300.0,
    )


def measured_work(brief: SharedBrief) -> Work:
    """Of a real episode."""
    brief = dataclasses.replace(brief, prefix=f"{brief.prefix}-measured")
    Services(brief, "driver").ledger.open("scale", EPISODES)
    with WorkerProcess(work_process, brief) as process:
        work = process.ask("measure")
    assert isinstance(work, Work)
    return work


def given_work(step_seconds: float) -> Work:
    """A step that is nothing but its minibatches."""
    return Work(minibatch_s=step_seconds / EpisodeConfig().step_minibatches, image_s=0.0, score_s=0.0)


def housing(actor: int) -> int:
    """The number of the process that an actor lives in: the first ones alone, then four by four in turn."""
    return actor if actor < ALONE else ALONE + (actor - ALONE) // 4 % SHARED


class Simulation:
    """A campaign that runs: one learner, and as many actors as were started."""

    def __init__(
        self, brief: SharedBrief, work: Work, players: Sequence[WorkerProcess], learner: WorkerProcess
    ) -> None:
        self._players, self._learner = players, learner
        self._client, self._replay = connect(brief.redis_url), Services(brief, "driver").replay
        self.episode_s = work.episode_s(brief.episode)
        self.actors = 0
        self.samples: list[Sample] = []

    def start(self, actors: int) -> None:
        """Bring them to so many; returns when all play."""
        for place, process in enumerate(self._players):
            process.ask("start", [n for n in range(self.actors, actors) if housing(n) == place])
        self.actors = actors
        while sum(said["playing"] for said in self._look()) < actors:
            time.sleep(POLL_S)

    def take(self) -> list[Sample]:
        """The episodes that ended since the last call."""
        self._look()
        taken, self.samples = self.samples, []
        return taken

    def counters(self) -> dict[str, float]:
        """What only grows: seconds of CPU and of waiting, bytes, commands, updates, sequences."""
        learner = self._learner.ask("look")
        return {
            "wall": time.monotonic(),
            "actors": sum(said["cpu"] for said in self._look()),
            "learner": learner["cpu"],
            "updates": learner["updates"],
            "waited": learner["waited"],
            "sequences": self._replay.stats().inserted,
            **server_counters(self._client),
            "busy": busy_s(),
        }

    def _look(self) -> list[dict[str, Any]]:
        for process in self._players:
            process.tell("look")
        said = [process.answer() for process in self._players]
        for answer in said:
            self.samples += answer["samples"]
        return said


@contextlib.contextmanager
def simulation(brief: SharedBrief, work: Work) -> Iterator[Simulation]:
    """All processes, ready, with nobody playing yet."""
    Services(brief, "driver").ledger.open("scale", EPISODES)
    with contextlib.ExitStack() as stack:
        learner = stack.enter_context(WorkerProcess(learner_process, brief))
        processes = {housing(actor) for actor in range(brief.schedule.actors)}
        players = [stack.enter_context(WorkerProcess(players_process, brief, work)) for _ in processes]
        for process in (learner, *players):
            process.tell("open")
        for process in (learner, *players):
            process.answer()
        yield Simulation(brief, work, players, learner)
        learner.ask("finish")


def server_counters(client: redis.Redis) -> dict[str, float]:
    """What the server says of itself."""
    said = client.info("all")
    return {
        "redis": said["used_cpu_user"] + said["used_cpu_sys"],
        "in": said["total_net_input_bytes"],
        "out": said["total_net_output_bytes"],
        "commands": said["total_commands_processed"],
    }


def busy_s() -> float:
    """Seconds in which this machine's cores were used, by anybody; NaN where the system does not say."""
    with contextlib.suppress(OSError):
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _waiting, irq, softirq, _stolen = ticks
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return math.nan


def measured_point(running: Simulation, actors: int) -> dict[str, Any]:
    """One row: so many actors, all of them playing."""
    running.start(actors)
    running.take()
    before = running.counters()
    samples: list[Sample] = []
    least = max(1, math.ceil(3 / actors))  # whole episodes of each actor
    while time.monotonic() - before["wall"] < (least + 2) * running.episode_s + PATIENCE_S:
        time.sleep(POLL_S)
        samples += running.take()
        whole = [sample for sample in samples if sample.begun >= before["wall"]]
        if all(len(of_actor) >= least for of_actor in by_actor(whole, actors)):
            break
    after = running.counters()
    grown = {name: after[name] - before[name] for name in before}
    ended = [sample for sample in samples if sample.ended <= after["wall"]]
    if not ended:
        raise RuntimeError(f"no episode of {actors} actors ended in {grown['wall']:.0f} s: the machine is too loaded")
    return row(actors, whole or ended, ended, grown)


def by_actor(samples: Sequence[Sample], actors: int) -> list[list[Sample]]:
    """Episodes of each actor."""
    found: list[list[Sample]] = [[] for _ in range(actors)]
    for sample in samples:
        found[sample.actor].append(sample)
    return found


def episodes_per_s(seconds: Sequence[Sequence[float]], ended: int, wall_s: float) -> float:
    """The actors' rates together, from the seconds of each one's whole episodes.

    Where an actor has ended none, since it waited, the `ended` episodes of all in `wall_s` seconds.
    """
    if all(seconds):
        return sum(len(mine) / sum(mine) for mine in seconds)
    return ended / wall_s


def row(actors: int, whole: Sequence[Sample], ended: Sequence[Sample], grown: Mapping[str, float]) -> dict[str, Any]:
    """What is kept of a point, from the episodes that lie in its time as a `whole`, and all that `ended` in it.

    Where actors wait long enough, none is whole, and those that ended stand for them.
    """
    wall_s = grown["wall"]
    rate = episodes_per_s([[s.seconds for s in mine] for mine in by_actor(whole, actors)], len(ended), wall_s)
    steps = rate * wall_s * statistics.mean(sample.steps for sample in whole)
    ours = sum(grown[name] for name in ("actors", "learner", "redis"))
    return {
        "actors": actors,
        "window_s": wall_s,
        "n": len(whole),
        "episodes_per_s": rate,
        "steps_per_episode": statistics.mean(sample.steps for sample in whole),
        "episode_s": asdict(Spread.of([sample.seconds for sample in whole])),
        "overhead_ms": asdict(Spread.of([1e3 * sample.overhead_s for sample in whole])),
        "cpu_ms": asdict(Spread.of([1e3 * sample.cpu / sample.steps for sample in whole])),
        "orchestration_ms": asdict(Spread.of([1e3 * sample.orchestration_s(0) for sample in whole])),
        "orchestration_cpu_ms": asdict(Spread.of([1e3 * sample.orchestration_s(1) for sample in whole])),
        "late_ms": asdict(Spread.of([1e3 * sample.clock.late / sample.steps for sample in whole])),
        "waited_share": sum(s.clock.waited for s in ended) / sum(s.seconds for s in ended),
        "parts": parts(whole),
        "housing": {
            kind: {
                "n": len(some),
                "overhead_ms": asdict(Spread.of([1e3 * sample.overhead_s for sample in some])),
                "cpu_ms": asdict(Spread.of([1e3 * sample.cpu / sample.steps for sample in some])),
            }
            for kind, some in (
                ("process", [sample for sample in whole if sample.actor < ALONE]),
                ("thread", [sample for sample in whole if sample.actor >= ALONE]),
            )
            if some
        },
        "idle": grown["waited"] / wall_s,
        "updates_per_s": grown["updates"] / wall_s,
        "cpu_ms_per_update": 1e3 * grown["learner"] / grown["updates"] if grown["updates"] else math.nan,
        "sequences_per_episode": grown["sequences"] / len(ended),
        "cores": {
            **{name: grown[name] / wall_s for name in ("actors", "learner", "redis")},
            "others": max(0.0, grown["busy"] - ours) / wall_s,
        },
        "redis_per_step": {
            "cpu_ms": 1e3 * grown["redis"] / steps,
            **{name: grown[name] / steps for name in ("in", "out", "commands")},
        },
    }


def parts(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Means over all steps: wall and CPU milliseconds, and calls, of each part; `rest` is what no part has."""
    steps = sum(sample.steps for sample in samples)
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, spent in sample.clock.parts.items():
            found[name] = [a + b for a, b in zip(found.get(name, [0.0] * 3), spent, strict=True)]
    wall, cpu = (sum(spent[i] for spent in found.values()) for i in (0, 1))
    found["rest"] = [
        sum(sample.overhead_s * sample.steps for sample in samples) - wall, sum(s.cpu for s in samples) - cpu, 0.0
    ]  # fmt: skip
    return {
        name: {"wall_ms": 1e3 * spent[0] / steps, "cpu_ms": 1e3 * spent[1] / steps, "calls": spent[2] / steps}
        for name, spent in sorted(found.items(), key=lambda item: -item[1][1])
    }


def is_full(point: Mapping[str, Any], first: Mapping[str, Any], cores: int) -> str:
    """What is full at a point: "cores", "learner", "cores, learner", or nothing."""
    needed = sum(point["cores"].values()) / min(1.0, of_linear(point, first))
    full = {"cores": needed >= FULL * cores, "learner": point["waited_share"] >= WAITING}
    return ", ".join(name for name, so in full.items() if so)


def largest_free(points: Sequence[Mapping[str, Any]], cores: int) -> Mapping[str, Any]:
    """The one with the most actors of those where nothing is full; the first where all are."""
    return next((point for point in reversed(points) if not is_full(point, points[0], cores)), points[0])


def sweep(brief: SharedBrief, work: Work, actors: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All points with one replay ratio, until the learner is what all wait for; and the records of the last one."""
    points: list[dict[str, Any]] = []
    with simulation(brief, work) as running:
        for number in actors:
            points.append(measured_point(running, number))
            print(line(points[-1], points[0]), flush=True)
            if points[-1]["waited_share"] >= WAITING:
                break
        records = [json.loads(text) for text in Services(brief, "driver").ledger.records(0)[-200:]]
    return points, records


def record_bytes(records: Sequence[Mapping[str, Any]]) -> float:
    """What the driver, which keeps all of them, needs in memory for one record."""
    texts = [json.dumps(record) for record in records]
    tracemalloc.start()
    kept = [json.loads(text) for text in texts]
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(kept)


def needed(point: Mapping[str, Any], learner: Mapping[str, Any], *, gpus: int, step_s: float) -> dict[str, float]:
    """What `gpus` actors need that make a step in `step_s` seconds.

    Args:
        point: whose costs of a step and of Redis are taken.
        learner: whose updates and sequences are taken, with its `replay_ratio` and `batch_size`.
        gpus: actors.
        step_s: what an episode sleeps by its steps, so that the recovery at its end is in it.

    """
    steps = gpus / step_s
    episodes = steps / point["steps_per_episode"]
    updates = episodes * learner["sequences_per_episode"] * learner["replay_ratio"] / learner["batch_size"]
    server = point["redis_per_step"]
    return {
        "step_s": step_s,
        "steps_per_s": steps,
        "episodes_per_s": episodes,
        "redis_cores": steps * server["cpu_ms"] / 1e3,
        "redis_in_mb_per_s": steps * server["in"] / 1e6,
        "redis_out_mb_per_s": steps * server["out"] / 1e6,
        "updates_per_s": updates,
        "learner_cores": updates * learner["cpu_ms_per_update"] / 1e3,
        "actor_cores": steps * point["cpu_ms"]["median"] / 1e3,
    }


def line(point: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """A row of a sweep's table."""
    cores = " / ".join(f"{point['cores'][name]:.2f}" for name in ("actors", "learner", "redis", "others"))
    cells = [
        point["actors"], point["n"], f"{point['episodes_per_s']:.3f}", f"{of_linear(point, first):.1%}",
        *(Spread(**point[key]) for key in ("overhead_ms", "orchestration_ms", "cpu_ms", "orchestration_cpu_ms")),
        Spread(**point["late_ms"]),
        f"{point['waited_share']:.0%}", f"{point['idle']:.0%}", f"{point['updates_per_s']:.2f}", cores,
        f"{point['redis_per_step']['cpu_ms']:.2f}", is_full(point, first, os.cpu_count() or 1) or "-",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def of_linear(point: Mapping[str, Any], first: Mapping[str, Any]) -> float:
    """Episodes/s beside those of as many actors at the first point's rate of one."""
    return float(point["episodes_per_s"] / point["actors"] / (first["episodes_per_s"] / first["actors"]))


HEAD = (
    "actors", "n", "episodes/s", "of linear", "overhead, ms/step", "orchestration, ms/step", "CPU, ms/step",
    "CPU of orchestration, ms/step", "late, ms/step", "waiting", "idle",
    "updates/s", "cores: actors / learner / Redis / others", "Redis, CPU ms/step", "full",
)  # fmt: skip


def judged(points: Sequence[Mapping[str, Any]], cores: int) -> list[str]:
    """The aims, of one sweep."""
    free = [point for point in points if not is_full(point, points[0], cores)]
    below = [f"{point['actors']}: {of_linear(point, points[0]):.1%}" for point in free]
    bad = [text for text, point in zip(below, free, strict=True) if of_linear(point, points[0]) < LINEAR]
    linear = f"**missed** at {'; '.join(bad)}" if bad else f"reached ({'; '.join(below)})"
    if len(free) < 2:
        linear = "cannot be said: the cores were full, with what else runs here, at all points but " + (
            str(free[0]["actors"]) if free else "none"
        )
    lines = [f"- at least {LINEAR:.0%} of linear where nothing is full: {linear}"]
    for title, key, of in (("wall", "orchestration_ms", free), ("CPU", "orchestration_cpu_ms", points)):
        over = [f"{p['actors']}: {p[key]['median']:.1f}" for p in of if p[key]["median"] >= OVERHEAD_MS]
        all_of = "; ".join(f"{p['actors']}: {p[key]['median']:.1f}" for p in of)
        where = " where nothing is full" if of is free else ""
        said = f"**missed** at {'; '.join(over)}" if over else f"reached ({all_of})" if of else "cannot be said"
        lines.append(f"- orchestration below {OVERHEAD_MS:.0f} ms a step, {title} time{where}: {said}")
    return lines


def sweep_page(run: Mapping[str, Any], swept: Mapping[str, Any]) -> list[str]:
    """Table and aims of one replay ratio."""
    points = swept["points"]
    first, cores = points[0], run["about"]["cores"]
    free = largest_free(points, cores)
    each = free["cpu_ms"]["median"] / 1e3 * first["steps_per_episode"]
    learner = first["sequences_per_episode"] * swept["replay_ratio"] / swept["batch_size"]
    learner *= free["cpu_ms_per_update"] / 1e3
    server = free["redis_per_step"]["cpu_ms"] / 1e3 * first["steps_per_episode"]
    room = cores / (each + learner + server) * run["episode_s"]
    return [
        f"## Replay ratio {swept['replay_ratio']:g}",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *(line(point, first) for point in points),
        "",
        f"CPU seconds an episode: {each:.3f} of its actor, {learner:.3f} of the learner, {server:.4f} of Redis.",
        f"So, with nothing else on them, {cores} cores are full at {room:.0f} actors,",
        f"and a learner that has one core to itself at {run['episode_s'] / max(learner, 1e-9):.0f}.",
        "",
        *judged(points, cores),
        "",
    ]


def parts_page(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a step's overhead goes, with the least and the most actors."""
    few, many = points[0], points[-1]
    lines = [
        "## Where a step's overhead goes",
        "",
        f"Means, milliseconds a step, with {few['actors']} and with {many['actors']} actors. `decide` is the",
        "Controller and the cut of its ranking; `insert` also cuts, judges and encodes the sequences; `rest` is the",
        "environment's own bookkeeping, the record and the network that the episode delivers.",
        "",
        f"| part | calls a step | wall, {few['actors']} | CPU, {few['actors']} | wall, {many['actors']} "
        f"| CPU, {many['actors']} |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in few["parts"].items():
        other = many["parts"].get(name, {"wall_ms": math.nan, "cpu_ms": math.nan})
        figures = (part["calls"], part["wall_ms"], part["cpu_ms"], other["wall_ms"], other["cpu_ms"])
        lines.append(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    return [*lines, ""]


def housing_page(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Threads beside processes."""
    lines = [
        "## A thread beside a process",
        "",
        "Milliseconds a step of actors that have a process of their own, and of those that share one, side by side.",
        "",
        "| actors | n | overhead, process | thread | CPU, process | thread |",
        "|---|---|---|---|---|---|",
    ]
    for point in points:
        if len(point["housing"]) == 2:
            alone, shared = point["housing"]["process"], point["housing"]["thread"]
            cells = [
                point["actors"], f"{alone['n']} / {shared['n']}",
                *(Spread(**kind[key]) for key in ("overhead_ms", "cpu_ms") for kind in (alone, shared)),
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def needs_page(run: Mapping[str, Any]) -> list[str]:
    """What 1,000 GPUs would need."""
    swept = run["sweeps"][-1]
    point = largest_free(swept["points"], run["about"]["cores"])
    server = point["redis_per_step"]
    lines = [
        f"## What {GPUS:,} GPUs would need, by these figures",
        "",
        f"One actor a GPU. A step costs, as in the last sweep with {point['actors']} actors, where nothing was full,",
        f"{point['cpu_ms']['median']:.2f} ms of CPU of its actor, {server['cpu_ms']:.3f} ms of Redis,",
        f"{server['commands']:.1f} commands, {server['in'] / 1e3:.1f} kB to it, {server['out'] / 1e3:.1f} kB from it.",
        f"Steps/s = {GPUS:,} / seconds a step, a share of the recovery included;",
        f"episodes/s = steps/s / {point['steps_per_episode']:.0f}; Redis cores and MB/s = steps/s x the costs above;",
        f"updates/s = episodes/s x sequences an episode x replay ratio / {swept['batch_size']}; cores of the learner =",
        "updates/s x the CPU time of an update in the sweep of that ratio. A Redis carries out commands on one core.",
        "",
        "| seconds a step | replay ratio | steps/s | episodes/s | Redis cores | to Redis, MB/s | from it, MB/s "
        "| updates/s | cores of the learner | cores of the actors |",
        "|" + "---|" * 10,
    ]
    needs = needs_of(run)
    for need in needs:
        cells = [
            f"{need['step_s']:.2f}", f"{need['replay_ratio']:g}", f"{need['steps_per_s']:.0f}",
            f"{need['episodes_per_s']:.1f}", f"{need['redis_cores']:.2f}", f"{need['redis_in_mb_per_s']:.1f}",
            f"{need['redis_out_mb_per_s']:.1f}", f"{need['updates_per_s']:.1f}", f"{need['learner_cores']:.1f}",
            f"{need['actor_cores']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    hourly = needs[0]["episodes_per_s"] * 3600
    return [
        *lines,
        "",
        f"The driver keeps every record: {run['record_bytes'] / 1e3:.1f} kB each in its memory, so "
        f"{hourly * run['record_bytes'] / 1e9:.2f} GB for each hour of the first line ({hourly:,.0f} episodes).",
        "",
    ]


def report(run: Mapping[str, Any]) -> str:
    """The page."""
    last = run["sweeps"][-1]["points"]
    work = Work(**run["work"])
    lines = [
        "# Scale, by simulation",
        "",
        f"`{run['command']}`",
        "",
        "; ".join(f"{key} {value}" for key, value in run["about"].items()),
        "",
        "Actors that sleep where they would retrain; `python -m benchmarks.scale --help` says what is real, and what",
        f"the columns are. A step sleeps {work.step_s(EpisodeConfig()):.2f} s, an episode {run['episode_s']:.1f} s "
        f"({run['slept_as']}). Medians (quartiles) over n episodes.",
        "",
    ]
    for swept in run["sweeps"]:
        lines += sweep_page(run, swept)
    return "\n".join([*lines, *parts_page(last), *housing_page(last), *needs_page(run)])


def needs_of(run: Mapping[str, Any]) -> list[dict[str, float]]:
    """The rows of the last table: each replay ratio, with steps as long as here and ten times as short."""
    sweeps, cores = run["sweeps"], run["about"]["cores"]
    point = largest_free(sweeps[-1]["points"], cores)
    step_s = run["episode_s"] / point["steps_per_episode"]
    rows = []
    for length in (step_s, step_s / 10):
        for swept in sweeps:
            learner = {
                **largest_free(swept["points"], cores),
                **{key: swept[key] for key in ("replay_ratio", "batch_size")},
            }
            need = needed(point, learner, gpus=GPUS, step_s=length)
            rows.append({"replay_ratio": swept["replay_ratio"], **need})
    return rows


def arguments() -> argparse.Namespace:
    """What was asked for, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--actors", type=int, nargs="+", help=f"rising (default {' '.join(map(str, ACTORS))})")
    parser.add_argument("--replay-ratio", type=float, nargs="+", help="a sweep each (default 64 1)")
    parser.add_argument("--step-seconds", type=float, help="that a step sleeps (default: as long as a real one takes)")
    parser.add_argument("--width", type=float, default=0.25, help="of VGG16 (default 0.25)")
    parser.add_argument("--quick", action="store_true", help="1 to 32 actors, half a second a step; writes nothing")
    given = parser.parse_args()
    given.actors = given.actors or (list(ACTORS[:3]) if given.quick else list(ACTORS))
    given.replay_ratio = given.replay_ratio or ([1.0] if given.quick else list(RATIOS))
    if given.quick and given.step_seconds is None:
        given.step_seconds = 0.5
    if given.actors != sorted(set(given.actors)) or given.actors[0] < 1:
        parser.error(f"--actors are rising numbers of at least 1, got {' '.join(map(str, given.actors))}")
    positive = {"--replay-ratio": min(given.replay_ratio), "--width": given.width, "--step-seconds": given.step_seconds}
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            parser.error(f"{name} must be above 0, got {value}")
    return given


def about() -> dict[str, Any]:
    """Machine, load and versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "redis", "ray")}
    return {
        "machine": cpu_name(), "cores": os.cpu_count(), "load at the start": round(os.getloadavg()[0], 1),
        "Python": platform.python_version(), **versions,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    given = arguments()
    torch.set_num_threads(1)
    run: dict[str, Any] = {"command": " ".join(["python -m benchmarks.scale", *sys.argv[1:]]), "about": about()}
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="zeroout-scale-") as folder, EmbeddedServer(Path(folder)) as server:
        briefs = [
            make_brief(server.url, width=given.width, ratio=ratio, actors=given.actors[-1], prefix=f"scale-{number}")
            for number, ratio in enumerate(given.replay_ratio)
        ]
        work = measured_work(briefs[0]) if given.step_seconds is None else given_work(given.step_seconds)
        run["slept_as"] = "CPU seconds of a real episode" if given.step_seconds is None else "as given"
        run |= {"work": asdict(work), "episode_s": work.episode_s(briefs[0].episode), "sweeps": []}
        print(f"a step sleeps {work.step_s(briefs[0].episode):.3f} s, an episode {run['episode_s']:.1f} s", flush=True)
        for brief in briefs:
            print(f"replay ratio {brief.replay.replay_ratio:g}\n| {' | '.join(HEAD)} |", flush=True)
            points, records = sweep(brief, work, given.actors)
            swept = {"replay_ratio": brief.replay.replay_ratio, "batch_size": brief.learner.batch_size}
            run["sweeps"].append({**swept, "points": points})
    run["record_bytes"] = record_bytes(records)
    run["about"]["load at the end"] = round(os.getloadavg()[0], 1)
    run = json.loads(json.dumps(run))  # the page is made of nothing but what is stored
    page = report(run)
    print(page)
    if not given.quick:
        (RESULTS / "scale.json").write_text(json.dumps(run, indent=1) + "\n")
        (RESULTS / "scale.md").write_text(page)


if __name__ == "__main__":
    main()
