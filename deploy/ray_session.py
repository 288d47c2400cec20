"""A campaign's connection to Ray, and what its actors ask for there."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import ray

from deploy.config import CampaignConfig
from deploy.progress import Progress
from deploy.ray_address import no_cluster

__all__ = ["gpus_each", "ray_session"]


@contextlib.contextmanager
def ray_session(config: CampaignConfig, progress: Progress) -> Iterator[None]:
    """A connection to Ray, or a local Ray of our own (whatever else runs on this host) with room for every player."""
    local = not config.cluster.ray_address
    needed = max(os.cpu_count() or 1, round(config.search.actors * config.cluster.cpus_per_actor))
    options: dict[str, Any] = (
        {"address": "local", "num_cpus": needed, "include_dashboard": config.cluster.dashboard}
        if local
        else {"address": config.cluster.ray_address}
    )
    # Ray lays handlers of its own over SIGTERM, which end the process at once; the one before is set again.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, **options)
    except ConnectionError as error:
        raise no_cluster(config.cluster.ray_address, str(error).splitlines()[0]) from error
    signal.signal(signal.SIGTERM, on_sigterm)
    if context.dashboard_url:
        progress.note(f"Ray dashboard: http://{context.dashboard_url}")
    try:
        yield
    finally:
        ray.shutdown()


def gpus_each(config: CampaignConfig, there: float) -> float:
    """The GPUs that each actor asks for, where so many are `there`."""
    asked, local = config.cluster.gpus_per_actor, not config.cluster.ray_address
    if asked >= 0 or not there:
        return max(0.0, asked)
    return min(1.0, there / config.search.actors) if local else 1.0
