"""Many recoveries at once: each by a Ray actor that has a GPU for itself. The driver keeps what they have reached.

Called by deploy/recover.py where more than one network is left to recover and the campaign's Ray has GPUs for it. A
recovery whose actor or node dies goes on elsewhere from its last checkpoint, which lies in the folder; one that cannot
be made there is left to the driver.
"""

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch
from torch import nn

from actors.ray_actors import start_recovery
from actors.recovery import RecoveryOrder
from deploy.config import CampaignConfig
from deploy.folder import CampaignFolder, write_atomic
from deploy.prepare import how_to_go_on
from deploy.progress import Progress
from deploy.ray_session import gpus_each, ray_session
from env.compact_file import NetworkForm, network_from_bytes, network_to_bytes
from env.data import Dataset
from env.errors import NonFiniteError, ZerooutError, first_line

__all__ = ["Retraining", "may_share", "retrained_together"]

_POLL_S = 1.0
_ANSWER_S = 60.0  # of an actor whose work has failed, for what it had reached
_NOBODY_S = 60.0  # until it is said that no actor has begun
_MAX_FAILURES = 4  # in a row without an epoch between them


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """A network to recover."""

    name: str  # for people
    network: nn.Module  # compact
    seed: int
    checkpoint: Path


def may_share(config: CampaignConfig) -> bool:
    """Whether the campaign's Ray may have several GPUs, as far as that shows without asking it."""
    wanted = not config.search.alone and config.search.actors > 1 and config.cluster.gpus_per_actor != 0
    return wanted and bool(config.cluster.ray_address or torch.cuda.device_count() > 1)


def retrained_together(
    asked: Sequence[Retraining],
    *,
    folder: CampaignFolder,
    config: CampaignConfig,
    dataset: Dataset,
    form: NetworkForm,
    teacher: nn.Module | None,
    progress: Progress,
) -> Generator[tuple[Retraining, nn.Module]]:
    """Retrain by `config.recovery`; yields each as it is done, in any order, on the CPU.

    Nothing is yielded where the cluster has no two GPUs, nor what failed time and again.

    Raises:
        ZerooutError: a training's own, as `env.training.train`; the others keep what they have reached.

    """
    with ray_session(config, progress):
        there = float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
        gpus = max(1.0, gpus_each(config, there))
        room = min(config.search.actors, int(there / gpus), len(asked))
        if room < 2:
            return
        detail = f"{len(asked)} networks, {config.recovery.epochs} epochs each, up to {room} at a time"
        progress.stage("recover", detail)
        fleet = _Fleet(folder, config, form, ray.put(dataset.to("cpu")), _bytes(teacher, form), gpus, progress)
        try:
            yield from fleet.run(asked, room)
        finally:
            fleet.end()


def _bytes(network: nn.Module | None, form: NetworkForm) -> bytes:
    return b"" if network is None else network_to_bytes(network, form)


@dataclass
class _Running:
    """A recovery, its actor, and the calls that run there."""

    asked: Retraining
    handle: Any
    call: Any
    news: Any  # None until it is asked for again
    version: int = 0  # of the checkpoint that the folder has from this actor
    epochs: float = 0.0
    failures: int = 0  # in a row
    heard_s: float = 0.0


class _Fleet:
    """The recoveries that run, and what they share."""

    def __init__(
        self,
        folder: CampaignFolder,
        config: CampaignConfig,
        form: NetworkForm,
        images: Any,
        teacher: bytes,
        gpus: float,
        progress: Progress,
    ) -> None:
        self._folder, self._config, self._form, self._gpus, self._progress = folder, config, form, gpus, progress
        self._images, self._teacher = images, ray.put(teacher)
        self._namespace = folder.make_redis_prefix()
        self._running: list[_Running] = []
        self._begun = 0  # actors
        self._silent_until_s = time.monotonic() + _NOBODY_S

    def run(self, asked: Sequence[Retraining], room: int) -> Iterator[tuple[Retraining, nn.Module]]:
        """See `retrained_together`."""
        waiting, done, shown = deque(asked), 0, -1
        while waiting or self._running:
            while waiting and len(self._running) < room:
                self._running.append(self._begin(waiting.popleft()))
            calls = [each.call for each in self._running]
            ray.wait(calls, num_returns=1, timeout=_POLL_S)
            for each in list(self._running):
                self._hear(each)
                network = self._ended(each)
                if network is not None:
                    done += 1
                    yield each.asked, network
            self._say_that_nobody_answers()
            reached = round(done * self._config.recovery.epochs + sum(each.epochs for each in self._running))
            if reached != shown:
                self._progress.share("recover", reached, len(asked) * self._config.recovery.epochs)
                shown = reached

    def _say_that_nobody_answers(self) -> None:
        """Say it once where no actor has begun for long; there may be no room for them now."""
        if any(each.heard_s for each in self._running) or not self._running:
            self._silent_until_s = math.inf
        elif time.monotonic() >= self._silent_until_s:
            self._silent_until_s = math.inf
            asked = f"{self._gpus:g} GPUs and {self._config.cluster.cpus_per_actor:g} cores"
            self._progress.note(f"no recovery has begun yet: each asks for {asked}; ray status says who waits")

    def end(self) -> None:
        """End the actors that still run; what they have told is in the folder."""
        for each in self._running:
            with contextlib.suppress(Exception):  # Ray may be what is gone
                ray.kill(each.handle)

    def _begin(self, asked: Retraining, failures: int = 0) -> _Running:
        """Start an actor that goes on from what the folder has."""
        self._begun += 1
        cluster = self._config.cluster
        order = RecoveryOrder(
            name=asked.name,
            form=self._form,
            network=network_to_bytes(asked.network, self._form),
            data=self._config.data,
            training=self._config.recovery,
            seed=asked.seed,
            checkpoint=asked.checkpoint.read_bytes() if asked.checkpoint.is_file() else b"",
            kept_as=str(asked.checkpoint),
        )
        handle = start_recovery(
            f"recovery of {asked.name} ({os.getpid()}-{self._begun})",  # a killed driver's may still be there
            order,
            campaign=self._folder.shown_name(),
            gpus=self._gpus,
            cpus=cluster.cpus_per_actor,
            threads=cluster.threads_per_actor,
            namespace=self._namespace,
        )
        call = handle.run.remote(self._images, self._teacher)
        return _Running(asked=asked, handle=handle, call=call, news=None, failures=failures)

    def _hear(self, each: _Running, patience_s: float = 0.0) -> None:
        """Keep what an actor has reached, if it has answered; ask it again a little later."""
        if each.news is None and (patience_s or time.monotonic() - each.heard_s >= _POLL_S):
            each.news = each.handle.news.remote(each.version)
        if each.news is None or not ray.wait([each.news], timeout=patience_s)[0]:
            return
        answer, each.news, each.heard_s = each.news, None, time.monotonic()
        with contextlib.suppress(ray.exceptions.RayError):  # its call says what is wrong
            news = ray.get(answer)
            if news.checkpoint:
                write_atomic(each.asked.checkpoint, news.checkpoint)
                each.version, each.failures = news.version, 0
            each.epochs = news.epochs

    def _ended(self, each: _Running) -> nn.Module | None:
        """The network of a recovery that is done; one that failed is begun again."""
        if not ray.wait([each.call], timeout=0)[0]:
            return None
        self._running.remove(each)
        try:
            network = network_from_bytes(ray.get(each.call), self._form)
        except ray.exceptions.RayTaskError as error:
            self._hear(each, _ANSWER_S)
            if isinstance(error.cause, NonFiniteError):
                raise how_to_go_on(each.asked.name, error.cause, self._folder) from None
            if isinstance(error.cause, ZerooutError):
                raise error.cause from None
            self._again(each, f"{type(error.cause).__name__}: {first_line(error.cause)}")
        except ray.exceptions.RayError as error:
            self._again(each, first_line(error))
        else:
            ray.kill(each.handle)  # its GPU is the next one's
            return network
        return None

    def _again(self, each: _Running, what: str) -> None:
        """Begin a recovery again from its last checkpoint, unless it got nowhere time and again."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(each.handle)
        failures = each.failures + 1
        if failures >= _MAX_FAILURES:
            self._progress.note(f"{each.asked.name}: failed {failures} times in a row ({what}); it is made here later")
            return
        self._progress.note(f"{each.asked.name}: its actor failed ({what}); it goes on from its last checkpoint")
        self._running.append(self._begin(each.asked, failures))
