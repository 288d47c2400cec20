"""How the first stage begins where a trained network moves to other classes; it ends in deploy/prepare.py.

Its product is `baseline/transferred.safetensors`: the network with a new last layer, its weakest filters treated, at
the moment before it is trained on the new classes.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from deploy.config import CampaignConfig
from deploy.folder import CampaignFolder, write_atomic
from deploy.progress import Progress
from env.channels import ChannelPlan, costs_of
from env.compact_file import NetworkForm, network_from_file, network_to_bytes
from env.data import Dataset
from env.measure import Measure
from env.networks import build_network
from env.recognizer import Recognizer
from env.replacement import require_filters, treat, weakest, without_weakest
from env.seeds import derive_seed
from env.skips import add_skip_convolutions
from env.training import TrainConfig
from env.transfer import head_of, with_new_head

__all__ = ["for_few_images", "on_paper", "transfer_facts", "transferred"]

#: Updates that a training has at least where the images are few and nobody has said how many epochs.
_LEAST_UPDATES = {"baseline": 300, "recovery": 150}
_LEAST_MINIBATCHES = 4  # in an epoch: with a single one, batch-norm sees the same few images over and over


def for_few_images(config: CampaignConfig, images: int) -> list[str]:
    """Overrides that fit the trainings of `config` to so few training images, at least 2; none are changed for many.

    A batch is at most the power of two that leaves four minibatches in an epoch (2 images at the least), and there are
    epochs for at least 300 updates of the baseline and 150 of each recovery.
    """
    largest = max(2, 2 ** int(math.log2(max(2, images // _LEAST_MINIBATCHES))))
    found = [f"episode.batch_size={min(largest, config.episode.batch_size)}"]
    for section, updates in _LEAST_UPDATES.items():
        training: TrainConfig = getattr(config, section)
        size = min(largest, training.batch_size)
        epochs = max(training.epochs, math.ceil(updates / (images // size)))
        found += [f"{section}.batch_size={size}", f"{section}.epochs={epochs}"]
    return found


def on_paper(config: CampaignConfig, dataset: Dataset) -> nn.Module:
    """A network of the shape that episodes will start from; which filters of a layer are gone is made up.

    UserError for anything wrong with the weights, the number of classes, or the share of filters.
    """
    network = _with_new_head(config, dataset)
    plan = ChannelPlan(network, torch.zeros(1, *dataset.image_shape))
    if config.transfer.how != "none" and plan.units:
        require_filters(plan, config.transfer.share, "transfer")
    if config.transfer.how == "prune" and plan.units:
        kept = torch.ones(plan.units, dtype=torch.bool)
        kept[torch.cat(weakest(plan, torch.zeros(plan.units), config.transfer.share))] = False
        network = plan.compact(network, kept)
    if config.network.skips == "convolution":
        add_skip_convolutions(network)
    return network


def transferred(
    folder: CampaignFolder,
    config: CampaignConfig,
    form: NetworkForm,
    dataset: Dataset,
    measure: Measure,
    progress: Progress,
) -> nn.Module:
    """The network as `config.transfer` moves it to the classes of `dataset`, not yet trained on them, on the CPU.

    What is in the folder is taken from there: a training that goes on must find the very same network.
    """
    model = folder.baseline / "transferred.safetensors"
    if not model.is_file():
        transfer = config.transfer
        treatment = "" if transfer.how == "none" else f", {transfer.how} for {transfer.share:.0%} of each layer"
        progress.stage("prepare", f"transfer from {transfer.classes} classes to {form.classes}{treatment}")
        network = _treated(_with_new_head(config, dataset), config, dataset, measure)
        plain = replace(form, network=replace(form.network, skips="coupled"))
        write_atomic(model, network_to_bytes(network, plain))
    return network_from_file(str(model))


def transfer_facts(config: CampaignConfig, network: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """What baseline.json says of the transfer: its settings, the tensors of the new head, and what `network` costs."""
    example = torch.zeros(1, *dataset.image_shape, device=next(network.parameters()).device)
    head = head_of(config.network, channels=dataset.image_shape[0], classes=len(dataset.classes))
    return {**asdict(config.transfer), "head": list(head), **costs_of(network, example)}


def _with_new_head(config: CampaignConfig, dataset: Dataset) -> nn.Module:
    return with_new_head(
        config.network,
        channels=dataset.image_shape[0],
        before=config.transfer.classes,
        classes=len(dataset.classes),
        seed=derive_seed(config.seed, "new head"),
    )


def _treated(network: nn.Module, config: CampaignConfig, dataset: Dataset, measure: Measure) -> nn.Module:
    """The network after `config.transfer.how`; importance is computed on the new classes' training images."""
    transfer, seed = config.transfer, derive_seed(config.seed, "transfer")
    if transfer.how == "none":
        return network
    recognizer = Recognizer(
        network.eval(),
        dataset,
        config.data,
        measure=measure,
        precision=config.baseline.precision,
        device=str(dataset.train.images.device),
    )
    if transfer.how == "prune":
        return without_weakest(recognizer, transfer, seed=seed, section="transfer")
    bare = replace(config.network, weights="", skips="coupled")
    fresh = build_network(
        bare,
        channels=dataset.image_shape[0],
        classes=len(dataset.classes),
        seed=derive_seed(config.seed, "re-initialised"),
    )
    treat(recognizer, transfer, fresh=fresh, seed=seed, section="transfer")
    return recognizer.network
