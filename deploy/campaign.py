"""A campaign: prepare, search, recover, export, report. Resume is running the same stages again."""

from typing import Any

from deploy.config import CampaignConfig
from deploy.export import export
from deploy.folder import CampaignFolder
from deploy.prepare import prepare
from deploy.progress import Progress
from deploy.recover import recover, write_result
from deploy.report import write_report
from deploy.search import search

__all__ = ["run_campaign"]


def run_campaign(
    folder: CampaignFolder, config: CampaignConfig, *, redis_url: str, progress: Progress
) -> dict[str, Any]:
    """Run every stage whose product is not there yet; returns what result.json holds."""
    dataset, baseline = prepare(folder, config, progress)
    search(folder, config, dataset, baseline, redis_url=redis_url, progress=progress)
    recover(folder, config, dataset, baseline, progress)
    result = write_result(folder, config, dataset, baseline, progress)
    progress.stage("export", "safetensors and ONNX, each read back and compared")
    export(folder)
    write_report(folder)
    return result
