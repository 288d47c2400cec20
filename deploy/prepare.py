"""The first stage: data and the baseline network. Its product is the folder `baseline/`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from deploy.config import CampaignConfig
from deploy.folder import CampaignFolder, read_json, write_atomic, write_json
from deploy.progress import Progress
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, network_from_file, network_to_bytes
from env.compression import unreachable
from env.data import Dataset, load_dataset, require_batch
from env.networks import build_network
from env.retraining import Metrics, evaluate
from env.seeds import derive_seed
from env.skips import add_skip_convolutions
from env.training import EpochReport, TrainConfig, train

__all__ = ["Baseline", "default_device", "epoch_line", "preflight", "prepare"]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The network that episodes start from; `parameters` and `macs` are those of the network as given."""

    form: NetworkForm
    network: nn.Module
    parameters: int
    macs: int
    validation: Metrics


def default_device() -> str:
    """Where the driver trains: the GPU if this machine has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def epoch_line(progress: Progress, stage: str) -> "_EpochLine":
    """A callback for `train` that reports each epoch."""
    return _EpochLine(progress, stage)


@dataclass(frozen=True)
class _EpochLine:
    progress: Progress
    stage: str

    def __call__(self, report: EpochReport) -> None:
        self.progress.epoch(self.stage, report.epoch, report.epochs, report.train_loss, report.validation.accuracy)


def preflight(config: CampaignConfig) -> Dataset:
    """Load the images and try the network on paper, so that a mistake shows before a folder is made.

    Raises:
        UserError: anything wrong with the images, the network, its weights, or a target that cannot be reached.

    """
    dataset = load_dataset(config.data)
    for size in (config.baseline.batch_size, config.episode.batch_size, config.recovery.batch_size):
        require_batch(dataset, size)
    channels = dataset.image_shape[0]
    given = build_network(replace(config.network, skips="coupled"), channels=channels, classes=len(dataset.classes))
    pruned = build_network(config.network, channels=channels, classes=len(dataset.classes))
    parameters = sum(parameter.numel() for parameter in given.parameters())
    problem = unreachable(ChannelPlan(pruned, torch.zeros(1, *dataset.image_shape)), parameters, config.episode)
    if problem is not None:
        raise problem
    return dataset


def prepare(folder: CampaignFolder, config: CampaignConfig, dataset: Dataset, progress: Progress) -> Baseline:
    """Train or load the baseline; what is already in the folder is taken from there."""
    channels, image_size, _ = dataset.image_shape
    form = NetworkForm(network=config.network, channels=channels, classes=len(dataset.classes), image_size=image_size)
    model, facts = folder.baseline / "model.safetensors", folder.baseline / "baseline.json"
    if not (model.is_file() and facts.is_file()):
        folder.baseline.mkdir(exist_ok=True)
        _make(config, form, dataset, model, facts, progress)
    known = read_json(facts)
    validation = Metrics(**known["validation"])
    progress.note(f"baseline: {known['parameters']:,} parameters, validation accuracy {validation.accuracy:.4f}")
    return Baseline(
        form=form,
        network=network_from_file(str(model)),
        parameters=known["parameters"],
        macs=known["macs"],
        validation=validation,
    )


def _make(
    config: CampaignConfig, form: NetworkForm, dataset: Dataset, model: Path, facts: Path, progress: Progress
) -> None:
    """Train (or load) the network as given, add its skip convolutions if asked, and save both files."""
    plain = replace(form.network, skips="coupled")
    network = build_network(
        plain, channels=form.channels, classes=form.classes, seed=derive_seed(config.seed, "initial weights")
    )
    given = sum(parameter.numel() for parameter in network.parameters())
    plan = ChannelPlan(network, torch.zeros(1, *dataset.image_shape))
    macs = int(plan.macs(plan.widths))
    network.to(default_device())
    there = dataset.to(default_device())
    if not config.network.weights:
        progress.stage("prepare", f"training the baseline ({given:,} parameters, {len(dataset.train):,} images)")
        _train(network, there, config, config.baseline, "baseline", model.parent, progress)
    if form.network.skips == "convolution" and add_skip_convolutions(network):
        progress.stage("prepare", "fine-tuning with skip convolutions")
        short = replace(
            config.baseline,
            epochs=max(1, config.baseline.epochs // 4),
            learning_rate=config.baseline.learning_rate / 10,
        )
        _train(network, there, config, short, "skip convolutions", model.parent, progress)
    validation = evaluate(network, there.validation, dataset.mean, dataset.std, precision=config.baseline.precision)
    write_atomic(model, network_to_bytes(network, form))
    write_json(facts, {"parameters": given, "macs": macs, "validation": asdict(validation)})


def _train(
    network: nn.Module,
    dataset: Dataset,
    config: CampaignConfig,
    training: TrainConfig,
    name: str,
    folder: Path,
    progress: Progress,
) -> None:
    train(
        network,
        dataset,
        config.data,
        training,
        seed=derive_seed(config.seed, name),
        checkpoint=folder / f"{name.replace(' ', '-')}.pt",
        on_epoch=epoch_line(progress, name),
    )
