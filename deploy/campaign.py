"""A campaign: prepare, search, recover, export, report. Resume is running the same stages again."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from deploy.config import CampaignConfig, dump, resolved
from deploy.export import export
from deploy.folder import CampaignFolder, versions, write_json
from deploy.formats import FORMATS
from deploy.limit import within_drop
from deploy.peers import make_peers
from deploy.prepare import default_device, is_prepared, preflight, prepare
from deploy.progress import Progress
from deploy.ray_address import check_ray_address
from deploy.recover import Recovery
from deploy.replace import replaced
from deploy.report import write_report
from deploy.search import is_finished, search
from env.data import Dataset
from learner.replay.connection import check_server, connect

__all__ = ["interruptible", "run_campaign"]


def run_campaign(
    out: Path,
    config: CampaignConfig,
    *,
    redis_url: str,
    progress: Progress,
    refill_replay: bool = False,
    deliver: bool = True,
) -> dict[str, Any]:
    """Run every stage whose product is not there yet; returns what result.json holds.

    Whatever a user can get wrong is looked at first, before the folder is made or anything in it is touched.
    A Redis that has lost a resumed campaign's sequences is an error unless `refill_replay`. Without `deliver` the last
    two stages are left out, as for many campaigns of which only the numbers are wanted.
    """
    folder = CampaignFolder.check(out, dump(config), resolved)
    if redis_url:
        with contextlib.closing(connect(redis_url)) as client:
            check_server(client, redis_url)
    check_ray_address(config.cluster.ray_address)
    progress.stage("prepare", "images")
    dataset = preflight(_still_needed(folder, config), on_images=partial(progress.share, "images"), warn=progress.note)
    folder = CampaignFolder.create(out, dump(config), resolved)
    with folder.held():
        result = _run(folder, config, dataset, redis_url=redis_url, refill_replay=refill_replay, progress=progress)
        if deliver:
            _deliver(folder, dataset, result, progress)
        return result


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a campaign as Ctrl+C does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _still_needed(folder: CampaignFolder, config: CampaignConfig) -> CampaignConfig:
    """The configuration less the files of which the folder has all that came of them: they may be gone by now."""
    if is_prepared(folder) and not config.transfer.classes:
        config = replace(config, network=replace(config.network, weights=""))
    if is_finished(folder, config):
        controller, search_config = replace(config.controller, weights=""), replace(config.search, like="")
        config = replace(config, controller=controller, search=search_config)
    return config


def _run(
    folder: CampaignFolder,
    config: CampaignConfig,
    dataset: Dataset,
    *,
    redis_url: str,
    refill_replay: bool,
    progress: Progress,
) -> dict[str, Any]:
    if not folder.versions_json.is_file():
        write_json(folder.versions_json, versions())
    baseline = replaced(folder, config, dataset, prepare(folder, config, dataset, progress), progress)
    search(folder, config, dataset, baseline, redis_url=redis_url, refill_replay=refill_replay, progress=progress)
    make_peers(folder, config, dataset, baseline, progress)
    recovery = Recovery(folder, config, dataset.to(default_device()), baseline, progress)
    recovery.run()
    if config.has_limit:
        within_drop(recovery)
    return recovery.result()


def _deliver(folder: CampaignFolder, dataset: Dataset, result: dict[str, Any], progress: Progress) -> None:
    """Export the chosen networks and write the report."""
    if result["points"]:
        progress.stage("export", ", ".join(FORMATS) + ", each read back and compared")
        export(folder, dataset=dataset, warn=lambda failure: progress.note(str(failure)))
    write_report(folder)
