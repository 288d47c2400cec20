"""What is in a running campaign's replay, and who waits for whom. Called by `zeroout replay-info`.

Everything is asked from Redis and costs it nothing that grows with the replay; Ray is not asked.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import redis
from redis.exceptions import RedisError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.config import load
from deploy.folder import CampaignFolder
from deploy.redis_server import running_url
from env.errors import UserError
from learner.replay.connection import connect, redact
from learner.replay.info import QUANTILES, ReplayInfo
from learner.replay.shards import open_replay

__all__ = ["read_replay_info", "recorded_url", "render_replay_info", "watch_replay_info"]

_APART_S = 1.0  # of the two looks from which a rate follows


def read_replay_info(
    folder: CampaignFolder, redis_url: str = "", *, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Return the replay's state, fit for JSON.

    Keys: "folder", "server", all of `ReplayStats`, "inserts_per_s" and "samples_per_s" (sequences, over the last
    second), "quantiles" with "ages" (in sequences inserted since) and "priorities" (both empty where there are none),
    and "waiting" ("learner", "actors" or None). Raises UserError when the campaign's server does not run.
    """
    url = redis_url or recorded_url(folder)
    prefix = folder.redis_prefix()
    if prefix is None:
        raise _not_running(folder, "no search begun yet")
    config = load(folder.campaign_toml).replay_in_search
    with contextlib.closing(connect(url, patience_s=0.1)) as client:
        # The generator is never used: nothing is drawn.
        replay = open_replay([client], prefix, config, np.random.default_rng(0))
        with _unreachable_named(folder, url):
            before, since = replay.stats(), time.monotonic()
            sleep(_APART_S)
            info, elapsed_s = replay.info(), time.monotonic() - since
    return {
        "folder": str(folder.path),
        "server": redact(url),
        **asdict(info.stats),
        "inserts_per_s": (info.stats.inserted - before.inserted) / elapsed_s,
        "samples_per_s": (info.stats.sampled - before.sampled) / elapsed_s,
        "quantiles": list(QUANTILES),
        "ages": list(info.ages),
        "priorities": list(info.priorities),
        "waiting": _waiting(info),
    }


def render_replay_info(found: dict[str, Any], console: Console) -> None:
    """Print what `read_replay_info` returned."""
    console.print(_renderable(found))


def watch_replay_info(folder: CampaignFolder, console: Console, redis_url: str = "") -> None:
    """Show the replay again and again until the server ends (UserError) or Ctrl-C, which passes to the caller."""
    found = read_replay_info(folder, redis_url)
    if not console.is_terminal:
        while True:
            render_replay_info(found, console)
            found = read_replay_info(folder, redis_url)
    with Live(_renderable(found), console=console, auto_refresh=False) as live:
        while True:
            live.update(_renderable(read_replay_info(folder, redis_url)), refresh=True)


def recorded_url(folder: CampaignFolder) -> str:
    """Return the URL of the campaign's own server, or the one it was begun with if no password was left out of it."""
    own = running_url(folder.redis)
    if own is not None:
        return own
    began = folder.path / "server"
    recorded = began.read_text() if began.is_file() else ""
    if "://" not in recorded:
        raise _not_running(folder, "no server that answers")
    if "***" in recorded:
        raise _not_running(folder, f"one that needs a password ({recorded})")
    return recorded


@contextlib.contextmanager
def _unreachable_named(folder: CampaignFolder, url: str) -> Iterator[None]:
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise _not_running(folder, f"none that answers at {redact(url)}") from error
    except RedisError as error:
        raise UserError(
            f"Redis at {redact(url)}",
            expected="a server that answers this campaign's questions",
            got=redact(str(error)),
            remedy="give the campaign's own --redis",
        ) from error


def _not_running(folder: CampaignFolder, got: str) -> UserError:
    return UserError(
        f"campaign {folder.path}",
        expected="a search in progress, with its Redis running",
        got=got,
        remedy=f"go on with it (zeroout resume {folder.path}), or give --redis URL",
    )


def _waiting(info: ReplayInfo) -> str | None:
    if info.stats.learner_waiting:
        return "learner"
    return "actors" if info.stats.actors_waiting else None


def _renderable(found: dict[str, Any]) -> RenderableType:
    waiting = {
        "learner": f"the learner waits for the actors ({found['learner_waits']} refused samples so far)",
        "actors": "the actors wait for the learner",
        None: "nobody waits",
    }[found["waiting"]]
    table = Table(box=None, header_style="dim")
    for header in ("", "sequences", "per second"):
        table.add_column(header, justify="right" if header else "left")
    table.add_row("held", f"{found['size']:,}", "")
    table.add_row("inserted", f"{found['inserted']:,}", f"{found['inserts_per_s']:,.1f}")
    table.add_row("sampled", f"{found['sampled']:,}", f"{found['samples_per_s']:,.1f}")
    table.add_row("evicted", f"{found['evicted']:,}", "")
    table.add_row("rejected", f"{found['rejected']:,}", "")
    head = Text(f"{found['folder']}\n{found['server']}\n{found['bytes'] / 2**20:,.1f} MiB; {waiting}\n")
    return Group(head, table, Text(), _quantile_table(found))


def _quantile_table(found: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("")
    for quantile in found["quantiles"]:
        table.add_column({0.0: "least", 1.0: "most"}.get(quantile, f"{quantile:.0%}"), justify="right")
    table.add_row("age, in sequences inserted since", *(f"{age:,.0f}" for age in found["ages"]))
    table.add_row("priority", *(f"{priority:.4g}" for priority in found["priorities"]))
    return table
