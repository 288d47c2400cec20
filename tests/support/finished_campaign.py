"""Finished campaigns on disk, with compact networks whose masks are known, for tests of what is exported."""

import base64
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deploy.config import CampaignConfig, dump
from deploy.folder import CampaignFolder
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, network_from_file, network_to_bytes
from env.data import load_dataset
from env.errors import ZerooutError
from env.networks import NetworkConfig
from env.retraining import evaluate
from env.training import TrainConfig, train


def brought(function: str, *, skips: str = "coupled") -> NetworkForm:
    """The form of a network in brought.py, for the embedded digits."""
    config = NetworkConfig(factory=f"brought:{function}", skips=skips)
    return NetworkForm(network=config, channels=1, classes=10, image_size=8)


TINY = brought("depthwise")


def compacted(form: NetworkForm) -> tuple[nn.Module, nn.Module, Tensor]:
    """The network with batch-norm statistics of its own, a compact form of it, and the mask between them."""
    torch.manual_seed(3)
    network = form.build(seed=3)
    images = torch.randn(5, form.channels, form.image_size, form.image_size)
    with torch.no_grad():
        network.train()(images)
    plan = ChannelPlan(network.eval(), images[:1])
    keep_mask = torch.rand(plan.units) < 0.6
    keep_mask[[layer.first for layer in plan.layers]] = True
    return network, plan.compact(network, keep_mask).eval(), keep_mask


def finished(path: Path, form: NetworkForm, targets: tuple[float, ...] = (0.5,)) -> CampaignFolder:
    """A finished campaign with the compact network at each target."""
    folder = CampaignFolder.create(path, dump(CampaignConfig(network=form.network)))
    folder.recovered.mkdir()
    folder.baseline.mkdir()
    network, compact, keep_mask = compacted(form)
    (folder.baseline / "model.safetensors").write_bytes(network_to_bytes(network, form))
    bits = base64.b64encode(np.packbits(keep_mask.numpy()).tobytes()).decode()
    points, frontier = [], []
    for episode, target in enumerate(targets, start=1):
        model = folder.recovered / f"search-{target}.safetensors"
        model.write_bytes(network_to_bytes(compact, form))
        points.append(
            {
                "target": target, "group": "search", "policy": "controller", "episode": episode, "compression": target,
                "parameters": 4000 + episode, "macs": 70000, "val_accuracy": 0.75, "test_accuracy": 0.5,
                "model": f"recovered/{model.name}",
            }
        )  # fmt: skip
        frontier.append({"groups": {"search": {**points[-1], "keep_bits": bits}}})
    baseline = {"parameters": 9000, "macs": 99000, "val_accuracy": 0.8, "test_accuracy": 0.7}
    folder.result_json.write_text(json.dumps({"baseline": baseline, "points": points}))
    folder.frontier_json.write_text(json.dumps({"targets": frontier}))
    return folder


def trained(path: Path, targets: tuple[float, ...] = (0.5,), *, seed: int = 0) -> CampaignFolder:
    """A finished campaign on the embedded digits whose networks are trained, with the accuracies that they have."""
    form = NetworkForm(network=NetworkConfig(name="small", width=0.5), channels=1, classes=10, image_size=8)
    config = CampaignConfig(network=form.network, seed=seed)
    folder, dataset = finished(path, form, targets), load_dataset(config.data)
    folder.campaign_toml.write_text(dump(config))
    result = json.loads(folder.result_json.read_text())
    for facts in (result["baseline"], *result["points"]):
        model = folder.path / facts.get("model", "baseline/model.safetensors")
        network = network_from_file(str(model))
        train(network, dataset, config.data, TrainConfig(epochs=2, batch_size=32), seed=seed)
        for key, split in (("val_accuracy", dataset.validation), ("test_accuracy", dataset.test)):
            facts[key] = evaluate(network, split, dataset.mean, dataset.std).accuracy
        model.write_bytes(network_to_bytes(network, form))
    folder.result_json.write_text(json.dumps(result))
    return folder


def no_failures(failure: ZerooutError) -> None:
    """Stands where an export tells what it could not write."""
    raise failure
