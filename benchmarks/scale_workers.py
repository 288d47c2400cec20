"""The processes of benchmarks/scale.py: players whose Recognizer sleeps where a real one works, and the learner.

Everything else is the product's own: player, rollout, Controller, ledger, replay, weights, trainer, Ray's metrics.
"""

import copy
import functools
import math
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from actors.metrics import LEARNER_WAIT, NO_METRICS, Metric
from actors.player import Brief, Player
from actors.ray_metrics import RayMetrics
from actors.schedule import EpisodeOrder
from actors.trainer import Trainer
from agents.controller import Controller
from agents.policies import Policy
from env.channels import ChannelPlan
from env.compression import EpisodeConfig
from env.cpu_layers import keep_freed_memory
from env.data import Dataset
from env.recognizer import Body, Recognizer, Retraining
from env.retraining import Metrics
from env.splits import Split

IMAGES, JUDGED, CLASSES = 2048, 2500, 10  # random ones; a campaign on CIFAR-10 judges by 2,500
COMPACT = "compact"  # the part that is the environment's own
_WAIT_S = 0.2  # between two questions for an episode, as in actors/ray_actors.py


@dataclass(frozen=True, kw_only=True)
class Work:
    """How long the Recognizer works, in seconds on a core of its own."""

    minibatch_s: float
    image_s: float  # of an evaluation, for each image
    score_s: float  # of the filters' scores, for each call

    def step_s(self, config: EpisodeConfig) -> float:
        """Of one step: retraining, evaluation, scores."""
        judged = min(config.step_images, JUDGED)
        return self.minibatch_s * config.step_minibatches + self.image_s * judged + self.score_s

    def episode_s(self, config: EpisodeConfig) -> float:
        """Of one episode that reaches all targets; the last step has no scores."""
        recovery = self.minibatch_s * config.recovery_minibatches + self.image_s * JUDGED
        return self.step_s(config) * config.waypoints - self.score_s + recovery * len(config.targets)


@dataclass
class Clock:
    """Where one thread's time went since `taken`; used by that thread alone.

    `parts` holds wall and CPU seconds and calls by name. What is called inside another part counts in both.
    """

    slept: float = 0.0  # as asked for
    late: float = 0.0  # how much longer it was: the thread had to wait for a core or for Python's lock
    waited: float = 0.0
    parts: dict[str, list[float]] = field(default_factory=dict)

    def sleep(self, seconds: float) -> None:
        """Sleep in the place of work."""
        since = time.monotonic()
        time.sleep(seconds)
        self.slept += seconds
        self.late += time.monotonic() - since - seconds

    def timed(self, thing: object, part: str, *names: str) -> None:
        """Count calls of these methods of `thing` as `part` from now on."""
        for name in names:
            setattr(thing, name, functools.partial(self._called, part, getattr(thing, name)))

    def _called(self, part: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.monotonic(), time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            spent = self.parts.setdefault(part, [0.0, 0.0, 0.0])
            spent[0] += time.monotonic() - wall
            spent[1] += time.thread_time() - cpu
            spent[2] += 1

    def taken(self) -> "Clock":
        """What was counted; from here on it begins anew."""
        counted = Clock(self.slept, self.late, self.waited, self.parts)
        self.slept, self.late, self.waited, self.parts = 0.0, 0.0, 0.0, {}
        return counted


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One episode of one actor, from the end of the one before to its own."""

    actor: int
    begun: float  # seconds, time.monotonic, the same clock in all processes
    ended: float
    cpu: float  # seconds of the actor's thread
    steps: int
    clock: Clock
    record: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Wall."""
        return self.ended - self.begun

    @property
    def overhead_s(self) -> float:
        """Wall seconds of a step beside the sleep; waiting for the learner does not count."""
        clock = self.clock
        return (self.seconds - clock.slept - clock.late - clock.waited) / self.steps

    def orchestration_s(self, which: int) -> float:
        """Of a step without making the compact network: wall seconds (0) or CPU seconds (1)."""
        compacting = self.clock.parts[COMPACT][which] / self.steps
        return (self.cpu / self.steps if which else self.overhead_s) - compacting


class SleepingRecognizer(Recognizer):
    """`like`, with a sleep for each retraining and evaluation and for the scores; what they say is noise."""

    def __init__(self, like: Recognizer, scores: Tensor, work: Work, clock: Clock, seed: int) -> None:
        vars(self).update(vars(like))  # network, plan and images are shared, and only read
        self._scores, self._work, self._clock, self._noise = scores, work, clock, random.Random(seed)

    def retrain(self, body: Body, config: Retraining, *, seed: int) -> float:
        """Sleep as long as so many minibatches take."""
        self._clock.sleep(self._work.minibatch_s * config.minibatches)
        return 0.0

    def evaluate(self, body: Body, split: Split) -> Metrics:
        """Sleep as long as so many images take."""
        self._clock.sleep(self._work.image_s * len(split))
        accuracy = self._noise.uniform(0.2, 0.8)
        return Metrics(accuracy=accuracy, cross_entropy=-math.log(accuracy))

    def log_scores(self, body: Body, *, images: int, batch_size: int, seed: int) -> Tensor:
        """Sleep, and say what the whole network's scores are."""
        self._clock.sleep(self._work.score_s)
        return self._scores


class SharedBrief(Brief):
    """A brief of which many players in one process make the Controller and the Recognizer once."""

    def fresh_controller(self, plan: ChannelPlan) -> Controller:
        """A copy of the Controller before any learning."""
        return copy.deepcopy(_first_controller(self, plan))


@functools.cache
def _first_controller(brief: Brief, plan: ChannelPlan) -> Controller:
    return Brief.fresh_controller(brief, plan)


class SimulatedPlayer(Player):
    """A player whose Recognizer sleeps, with its calls of the services timed."""

    def __init__(self, number: int, brief: Brief, shared: "Shared", metrics: RayMetrics) -> None:
        self.clock, self._number, self._shared = Clock(), number, shared
        self.clock.timed(metrics, "metrics", "add", "set")
        super().__init__(f"actor-{number}", brief, shared.dataset, metrics=metrics)
        services = self.services
        self.clock.timed(services.ledger, "renew and beat", "renew", "beat")
        once = ("stop_requested", "remaining", "claim", "best_score", "complete")  # an episode
        self.clock.timed(services.ledger, "claim and complete", *once)
        self.clock.timed(services.ledger, "snapshot", "save", "snapshot")
        self.clock.timed(services.weights, "weights", "version")
        self.clock.timed(self, "weights", "_pull_weights")
        self.clock.timed(self.env, COMPACT, "_set_body")  # where the network before is thrown away
        self.clock.timed(services.replay, "insert", "insert", "stats")
        self.clock.timed(self.ladder, "decide", "cut")
        self.clock.taken()

    def _make_recognizer(self, dataset: Dataset, device: str) -> Recognizer:
        shared = self._shared
        made = SleepingRecognizer(shared.recognizer, shared.scores, shared.work, self.clock, self._number)
        self.clock.timed(made, COMPACT, "zero", "full")
        return made

    def _policy(self, chosen: EpisodeOrder, offsets: np.ndarray | None, controller: Controller) -> Policy:
        policy = super()._policy(chosen, offsets, controller)
        self.clock.timed(policy, "decide", "rank")
        return policy


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the players of a process have in common."""

    recognizer: Recognizer
    scores: Tensor
    work: Work

    @property
    def dataset(self) -> Dataset:
        """The images."""
        return self.recognizer.dataset


def random_data() -> Dataset:
    """Random 32x32 images; nobody looks at them but whoever measures the work."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Split(images, torch.randint(CLASSES, (count,), generator=generator))

    return Dataset(
        train=split(IMAGES), validation=split(JUDGED), test=split(1),
        classes=tuple(map(str, range(CLASSES))), mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip


def real_recognizer(brief: Brief) -> Recognizer:
    """The Recognizer that the sleeping ones stand for."""
    return Recognizer(brief.network(), random_data(), brief.data, measure=brief.measure)


class WorkerProcess:
    """A process of its own that runs `target(pipe, *args)` and answers questions."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self, question: str, *args: Any) -> None:
        """Send a question; `answer` waits for what is said to it."""
        self._pipe.send((question, *args))

    def answer(self, patience_s: float = 600.0) -> Any:
        """The answer to the oldest question. Raises RuntimeError where the process failed or says nothing."""
        if not self._pipe.poll(patience_s):
            raise RuntimeError(f"a worker of the benchmark said nothing for {patience_s:.0f} s")
        try:
            said = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a worker of the benchmark is gone") from None
        if isinstance(said, str):
            raise RuntimeError(f"a worker of the benchmark failed:\n{said}")
        return said

    def ask(self, question: str, *args: Any) -> Any:
        """Both."""
        self.tell(question, *args)
        return self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._pipe.close()  # which it takes for the end
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class _Failures:
    """What went wrong in a process's threads: the first of it is the answer to the next question."""

    def __init__(self) -> None:
        self.first = ""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is raised inside."""
        try:
            yield
        except Exception:
            self.first = self.first or traceback.format_exc()


def _serve(pipe: Connection, failures: _Failures, answers: dict[str, Callable[..., Any]]) -> None:
    """Answer questions until the other side closes."""
    while True:
        try:
            question, *args = pipe.recv()
        except (EOFError, OSError):
            return
        with failures.noted():
            said = answers[question](*args)
        pipe.send(failures.first or said)


def players_process(pipe: Connection, brief: Brief, work: Work) -> None:
    """Many players, each in a thread of its own."""
    _prepare()
    failures = _Failures()
    fleet: Fleet | None = None

    def open_fleet() -> bool:
        nonlocal fleet
        recognizer, config = real_recognizer(brief), brief.episode
        body = recognizer.full()
        scores = recognizer.log_scores(body, images=config.score_images, batch_size=config.batch_size, seed=0)
        fleet = Fleet(brief, Shared(recognizer=recognizer, scores=scores, work=work), failures)
        return True

    def start(numbers: Sequence[int]) -> bool:
        assert fleet is not None
        fleet.start(numbers)
        return True

    def look() -> dict[str, Any]:
        assert fleet is not None
        return {"cpu": time.process_time(), "playing": fleet.playing, "samples": fleet.take()}

    _serve(pipe, failures, {"open": open_fleet, "start": start, "look": look})
    os._exit(0)  # the players sleep in the middle of their episodes


class Fleet:
    """The players of one process."""

    def __init__(self, brief: Brief, shared: Shared, failures: _Failures) -> None:
        self._brief, self._shared, self._failures = brief, shared, failures
        self._made, self._lock = threading.Lock(), threading.Lock()
        self._samples: list[Sample] = []
        self._playing: set[int] = set()

    def start(self, numbers: Sequence[int]) -> None:
        """Have these actors play too, each from a moment of its own in the length of an episode."""
        for number in numbers:
            threading.Thread(target=self._run, args=(number,), name=f"actor-{number}", daemon=True).start()

    @property
    def playing(self) -> int:
        """Actors that have begun."""
        return len(self._playing)

    def take(self) -> list[Sample]:
        """Episodes that ended since the last call."""
        with self._lock:
            taken, self._samples = self._samples, []
        return taken

    def _run(self, number: int) -> None:
        with self._failures.noted(), RayMetrics(campaign=self._brief.campaign, actor=f"actor-{number}") as metrics:
            with self._made:  # one after the other: the Controller's first weights come from a global generator
                player = SimulatedPlayer(number, self._brief, self._shared, metrics)
            time.sleep(random.Random(number).uniform(0, self._shared.work.episode_s(self._brief.episode)))
            self._playing.add(number)
            self._play(number, player)

    def _play(self, number: int, player: SimulatedPlayer) -> None:
        """As actors/ray_actors.py does."""
        ledger, clock = player.services.ledger, player.clock
        begun, cpu = time.monotonic(), time.thread_time()
        while not ledger.stop_requested() and ledger.remaining() > 0:
            record = player.play()
            if record is None:
                time.sleep(_WAIT_S)
                clock.waited += _WAIT_S
                continue
            ended, ended_cpu = time.monotonic(), time.thread_time()
            sample = Sample(
                actor=number, begun=begun, ended=ended, cpu=ended_cpu - cpu,
                steps=record["steps"], clock=clock.taken(), record=record,
            )  # fmt: skip
            with self._lock:
                self._samples.append(sample)
            begun, cpu = ended, ended_cpu


class _Listening(RayMetrics):
    """Ray's metrics, with a sum of what the learner waited."""

    waited = 0.0

    def add(self, counter: Metric, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter."""
        super().add(counter, amount, **labels)
        if counter is LEARNER_WAIT:
            self.waited += amount


def learner_process(pipe: Connection, brief: Brief) -> None:
    """The learner, as a campaign runs it."""
    _prepare()
    failures = _Failures()
    with tempfile.TemporaryDirectory() as folder, _Listening(campaign=brief.campaign) as metrics:
        trainer: Trainer | None = None

        def run() -> None:
            assert trainer is not None
            with failures.noted():
                trainer.run()

        thread = threading.Thread(target=run, name="learner", daemon=True)

        def open_trainer() -> bool:
            nonlocal trainer
            trainer = Trainer(brief, Path(folder), metrics=metrics)
            thread.start()
            return True

        def look() -> dict[str, Any]:
            assert trainer is not None
            return {"cpu": time.process_time(), "updates": trainer.learner.updates, "waited": metrics.waited}

        def finish() -> bool:
            assert trainer is not None
            trainer.services.ledger.request_stop()
            thread.join()
            return True

        _serve(pipe, failures, {"open": open_trainer, "look": look, "finish": finish})


def work_process(pipe: Connection, brief: Brief) -> None:
    """How long the sleeping Recognizer has to sleep, from a real episode."""
    _prepare()
    failures = _Failures()

    def measure() -> Work:
        player = _MeasuredPlayer("measured", brief, random_data(), metrics=NO_METRICS)
        player.play()
        return player.timings.work()

    _serve(pipe, failures, {"measure": measure})


class _MeasuredPlayer(Player):
    """A real player, with its Recognizer's CPU seconds noted: on shared cores wall says who else was there."""

    def _make_recognizer(self, dataset: Dataset, device: str) -> Recognizer:
        made = super()._make_recognizer(dataset, device)
        self.timings = _Timings(made)
        return made


class _Timings:
    """CPU seconds of a Recognizer's calls, for each unit of work."""

    def __init__(self, recognizer: Recognizer) -> None:
        self._spent = {what: [0.0, 0.0] for what in ("minibatch", "image", "score")}  # CPU seconds, units
        self._note(recognizer, "minibatch", "retrain", lambda body, config, **_: config.minibatches)
        self._note(recognizer, "image", "evaluate", lambda body, split: len(split))
        self._note(recognizer, "score", "log_scores", lambda body, **_: 1)

    def work(self) -> Work:
        """The means over all units: an episode of sleeps is as long as the one measured."""
        mean = {what: seconds / units for what, (seconds, units) in self._spent.items()}
        return Work(minibatch_s=mean["minibatch"], image_s=mean["image"], score_s=mean["score"])

    def _note(self, recognizer: Recognizer, what: str, name: str, units: Callable[..., int]) -> None:
        method = getattr(recognizer, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            since = time.process_time()
            result = method(*args, **kwargs)
            self._spent[what][0] += time.process_time() - since
            self._spent[what][1] += units(*args, **kwargs)
            return result

        setattr(recognizer, name, noted)


def _prepare() -> None:
    """As actors/ray_actors.py prepares its processes, with one thread of torch; Ctrl+C is for who started them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()
