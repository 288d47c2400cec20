"""The third stage: the best network of each group is retrained alike, judged on validation, then once on test.

Its products are `recovered/GROUP-TARGET.safetensors` with a `.json` beside each, and result.json.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploy.config import CampaignConfig
from deploy.folder import CampaignFolder, read_json, write_atomic, write_json
from deploy.prepare import Baseline, default_device, train_shown
from deploy.progress import Progress
from deploy.search import candidate_path
from env.channels import ChannelPlan
from env.compact_file import network_from_file, network_to_bytes
from env.data import Dataset, Split
from env.retraining import Metrics, evaluate
from env.seeds import derive_seed

__all__ = ["recover", "write_result"]


def recover(
    folder: CampaignFolder, config: CampaignConfig, dataset: Dataset, baseline: Baseline, progress: Progress
) -> None:
    """Retrain the best network of every group and target, with the same fresh minibatches for all groups."""
    there = dataset.to(default_device())
    for target in config.episode.targets:
        for group in config.search.groups:
            model = _model(folder, group, target)
            if model.with_suffix(".json").is_file() and model.is_file():
                continue
            progress.stage("recover", f"{group} at {target:.2%}, {config.recovery.epochs} epochs")
            _recover_one(folder, config, there, baseline, group, target, progress)


def _model(folder: CampaignFolder, group: str, target: float) -> Path:
    return folder.recovered / f"{group}-{target}.safetensors"


def _recover_one(
    folder: CampaignFolder,
    config: CampaignConfig,
    dataset: Dataset,
    baseline: Baseline,
    group: str,
    target: float,
    progress: Progress,
) -> None:
    candidate, model = candidate_path(folder, group, target), _model(folder, group, target)
    model.parent.mkdir(exist_ok=True)
    network = network_from_file(str(candidate)).to(default_device())
    train_shown(
        network,
        dataset,
        config,
        config.recovery,
        name=f"{group} {target:.2%}",
        section="recovery",
        seed=derive_seed(config.seed, "final recovery", str(target)),  # the same for all groups
        teacher=baseline.network.to(default_device()) if config.recovery.distillation else None,
        checkpoint=model.with_suffix(".pt"),
        folder=folder,
        progress=progress,
    )
    validation = _judge(network, dataset, dataset.validation, config)
    costs = _costs(network, dataset)
    facts = {
        "target": target,
        "group": group,
        **read_json(candidate.with_suffix(".json")),
        "compression": 1.0 - costs[baseline.measure.name] / baseline.measure.given,
        **costs,
        "validation": asdict(validation),
    }
    write_atomic(model, network_to_bytes(network, baseline.form))
    write_json(model.with_suffix(".json"), facts)


def _judge(network: nn.Module, dataset: Dataset, split: Split, config: CampaignConfig) -> Metrics:
    return evaluate(network, split, dataset.mean, dataset.std, precision=config.recovery.precision)


def _costs(network: nn.Module, dataset: Dataset) -> dict[str, int]:
    """Parameters, MACs and bytes, counted on the compact network itself."""
    example = torch.zeros(1, *dataset.image_shape, device=next(network.parameters()).device)
    plan = ChannelPlan(network, example)
    return plan.costs(plan.widths)


def write_result(
    folder: CampaignFolder, config: CampaignConfig, dataset: Dataset, baseline: Baseline, progress: Progress
) -> dict[str, Any]:
    """Choose by validation, open the test split once, write result.json; an existing one is left as it is."""
    if folder.result_json.is_file():
        result: dict[str, Any] = read_json(folder.result_json)
        return result
    progress.stage("recover", "the test split, once")
    there = dataset.to(default_device())
    records = folder.read_episodes()
    tested = {
        (group, target): _point(folder, config, there, group, target)
        for target in config.episode.targets
        for group in config.search.groups
    }
    chosen = [
        max((tested[group, target] for group in config.search.groups), key=lambda point: point["val_accuracy"])
        for target in config.episode.targets
    ]
    result = {
        "baseline": {
            "val_accuracy": baseline.validation.accuracy,
            "test_accuracy": _judge(baseline.network.to(default_device()), there, there.test, config).accuracy,
            **baseline.given,
        },
        "measure": baseline.measure.name,
        "points": chosen,
        "comparison": list(tested.values()),
        "episodes": len(records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "seed": config.seed,
    }
    write_json(folder.result_json, result)
    return result


def _point(
    folder: CampaignFolder, config: CampaignConfig, dataset: Dataset, group: str, target: float
) -> dict[str, Any]:
    """A row of result.json."""
    model = _model(folder, group, target)
    facts = read_json(model.with_suffix(".json"))
    network = network_from_file(str(model)).to(default_device())
    return {
        "target": target,
        "group": group,
        "policy": facts["policy"],
        "episode": facts["episode"],
        "compression": facts["compression"],
        "parameters": facts["parameters"],
        "macs": facts["macs"],
        "bytes": facts["bytes"],
        "val_accuracy": facts["validation"]["accuracy"],
        "test_accuracy": _judge(network, dataset, dataset.test, config).accuracy,
        "model": str(model.relative_to(folder.path)),
    }
