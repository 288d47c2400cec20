"""The first stage: data and the baseline network. Its product is the folder `baseline/`.

The baseline is trained from scratch, or made of given weights: as they are, or moved to other classes and trained on
(deploy/transfer.py).
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from deploy.config import CampaignConfig
from deploy.controller_file import check_controller
from deploy.folder import CampaignFolder, read_json, write_atomic, write_json
from deploy.like import widths_like
from deploy.progress import Progress
from deploy.transfer import on_paper, transfer_facts, transferred
from env.channels import ChannelPlan, costs_of
from env.compact_file import NetworkForm, network_from_file, network_to_bytes
from env.compression import unreachable
from env.data import Dataset, load_dataset, require_batch
from env.errors import NonFiniteError, UserError
from env.groups import count_logits
from env.measure import Measure
from env.networks import build_network
from env.replacement import require_filters
from env.retraining import Metrics, evaluate
from env.seeds import derive_seed
from env.skips import add_skip_convolutions
from env.training import TrainConfig, train

__all__ = ["Baseline", "default_device", "how_to_go_on", "is_prepared", "preflight", "prepare", "train_shown"]

_LOG = logging.getLogger(__name__)
_MOSTLY = 0.5  # of all multiply-accumulates outside what is counted: a share of the rest would say little


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The network that is compressed; episodes start from `start`.

    `replaced` is the network after filter replacement (deploy/replace.py), where there was one. `given` is what the
    network as given costs, in each of `env.channels.MEASURES`; compression is counted in `measure`.
    """

    form: NetworkForm
    network: nn.Module
    given: dict[str, int]
    measure: Measure
    validation: Metrics
    replaced: nn.Module | None = None

    @property
    def start(self) -> nn.Module:
        """What episodes start from."""
        return self.network if self.replaced is None else self.replaced


def default_device() -> str:
    """Where the driver trains: the GPU if this machine has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def preflight(
    config: CampaignConfig,
    *,
    on_images: Callable[[int, int], None] | None = None,
    warn: Callable[[str], object] = _LOG.warning,
) -> Dataset:
    """Load the images and try the network on paper, so that a mistake shows before a folder is made.

    `on_images(done, total)` is called while images are decoded or downloaded, `warn` with what is odd but can be done.

    Raises:
        UserError: anything wrong with the images, the network, its weights, or a target that cannot be reached.

    """
    if config.baseline.distillation:
        raise UserError(
            "baseline.distillation",
            expected="0, because the baseline is the teacher and has none itself",
            got=repr(config.baseline.distillation),
            remedy="leave it out; recovery.distillation learns from the baseline",
        )
    dataset = load_dataset(config.data, progress=on_images)
    trainings = [config.baseline, config.recovery]
    if config.replacement.how:
        trainings.append(config.replacement_training)
    for size in (config.episode.batch_size, *(training.batch_size for training in trainings)):
        require_batch(dataset, size)
    pruned = _on_paper(config, dataset)
    example = torch.zeros(1, *dataset.image_shape)
    plan = ChannelPlan(pruned, example)
    count_logits(pruned.train(), example.expand(2, -1, -1, -1), batch=2)  # which may answer otherwise than in eval mode
    if plan.outputs != len(dataset.classes):
        raise UserError(
            "the network's logits",
            expected=f"{len(dataset.classes)} for an image, one for each class",
            got=str(plan.outputs),
            remedy="let the factory use classes=",
        )
    if config.episode.measure == "macs":
        _check_macs(plan, warn)
    left = check_controller(config.controller_start, config.controller, plan)
    if left:
        warn(f"controller.weights: of other sizes or another version, so these begin anew: {', '.join(left)}")
    measure = Measure(config.episode.measure, _given(config, dataset)[config.episode.measure])
    problem = unreachable(plan, measure, config.episode)
    if problem is not None:
        raise problem
    if config.search.like:
        widths_like(config.search.like, config.network, plan, pruned)
    if config.replacement.how:
        require_filters(plan, config.replacement.share)
    _check_start(config, float(measure.compression(plan, plan.widths)))
    return dataset


def _on_paper(config: CampaignConfig, dataset: Dataset) -> nn.Module:
    """A network of the shape that episodes start from; UserError for what is wrong with it or its weights."""
    network = replace(config.network, weights="") if config.transfer.classes else config.network
    whole = build_network(network, channels=dataset.image_shape[0], classes=len(dataset.classes))
    return on_paper(config, dataset) if config.transfer.classes else whole


def _check_start(config: CampaignConfig, removed: float) -> None:
    """UserError where the lowest target is reached before an episode begins, because the transfer removes as much."""
    if config.episode.targets[0] <= removed:
        raise UserError(
            "episode.targets",
            expected=f"above {removed:.4f}, which transfer.how = prune removes before anything else",
            got=repr(config.episode.targets[0]),
            remedy="raise the target, or lower transfer.share",
        )


def _check_macs(plan: ChannelPlan, warn: Callable[[str], object]) -> None:
    """UserError where a share of the MACs that can be counted would say little; a warning where it says less."""
    if plan.share_outside > _MOSTLY:
        raise UserError(
            "episode.measure",
            expected="parameters or bytes for this network",
            got=f"macs, though {plan.uncounted}",
            remedy="measure something else, or let its forward call modules (nn.Conv2d, nn.Linear)",
        )
    if plan.uncounted:
        warn(f"episode.measure = macs: {plan.uncounted}; targets are shares of the rest")


def prepare(folder: CampaignFolder, config: CampaignConfig, dataset: Dataset, progress: Progress) -> Baseline:
    """Train, load or transfer the baseline; what is already in the folder is taken from there."""
    channels, height, width = dataset.image_shape
    form = NetworkForm(
        network=config.network, channels=channels, classes=len(dataset.classes), image_size=height, image_width=width
    )
    model, facts = _products(folder)
    given = _given(config, dataset)
    if not is_prepared(folder):
        folder.baseline.mkdir(exist_ok=True)
        _make(folder, config, form, dataset, given, model, facts, progress)
    validation = Metrics(**read_json(facts)["validation"])
    progress.note(f"baseline: {given['parameters']:,} parameters, validation accuracy {validation.accuracy:.4f}")
    return Baseline(
        form=form,
        network=network_from_file(str(model)),
        given=given,
        measure=Measure(config.episode.measure, given[config.episode.measure]),
        validation=validation,
    )


def is_prepared(folder: CampaignFolder) -> bool:
    """Whether the baseline is in the folder."""
    return all(product.is_file() for product in _products(folder))


def _products(folder: CampaignFolder) -> tuple[Path, Path]:
    return folder.baseline / "model.safetensors", folder.baseline / "baseline.json"


def _given(config: CampaignConfig, dataset: Dataset) -> dict[str, int]:
    """What the network costs as the user gave it, without skip convolutions, by measure."""
    plain = replace(config.network, skips="coupled", weights="")
    network = build_network(plain, channels=dataset.image_shape[0], classes=len(dataset.classes))
    return costs_of(network, torch.zeros(1, *dataset.image_shape))


def _make(
    folder: CampaignFolder,
    config: CampaignConfig,
    form: NetworkForm,
    dataset: Dataset,
    given: dict[str, int],
    model: Path,
    facts: Path,
    progress: Progress,
) -> None:
    """Train, load or transfer the network, add its skip convolutions if asked, and save both files."""
    there = dataset.to(default_device())
    if config.transfer.classes:
        measure = Measure(config.episode.measure, given[config.episode.measure])
        network = transferred(folder, config, form, there, measure, progress)
    else:
        plain = replace(form.network, skips="coupled")
        network = build_network(
            plain, channels=form.channels, classes=form.classes, seed=derive_seed(config.seed, "initial weights")
        )
    network.to(default_device())
    if config.transfer.classes or not config.network.weights:
        parameters = sum(parameter.numel() for parameter in network.parameters())
        progress.stage("prepare", f"training the baseline ({parameters:,} parameters, {len(dataset.train):,} images)")
        _train(network, there, config, config.baseline, "baseline", folder, progress)
    if form.network.skips == "convolution" and add_skip_convolutions(network):
        progress.stage("prepare", "fine-tuning with skip convolutions")
        short = replace(
            config.baseline,
            epochs=max(1, config.baseline.epochs // 4),
            learning_rate=config.baseline.learning_rate / 10,
        )
        _train(network, there, config, short, "skip convolutions", folder, progress)
    validation = evaluate(network, there.validation, dataset.mean, dataset.std, precision=config.baseline.precision)
    moved = {"transfer": transfer_facts(config, network, dataset)} if config.transfer.classes else {}
    write_atomic(model, network_to_bytes(network, form))
    write_json(facts, {**given, "validation": asdict(validation), **moved})


def _train(
    network: nn.Module,
    dataset: Dataset,
    config: CampaignConfig,
    training: TrainConfig,
    name: str,
    folder: CampaignFolder,
    progress: Progress,
) -> None:
    train_shown(
        network,
        dataset,
        config,
        training,
        name=name,
        section="baseline",
        seed=derive_seed(config.seed, name),
        checkpoint=folder.baseline / f"{name.replace(' ', '-')}.pt",
        folder=folder,
        progress=progress,
    )


def train_shown(
    network: nn.Module,
    dataset: Dataset,
    config: CampaignConfig,
    training: TrainConfig,
    *,
    name: str,
    section: str,
    seed: int,
    checkpoint: Path,
    folder: CampaignFolder,
    progress: Progress,
    teacher: nn.Module | None = None,
) -> None:
    """Train a campaign's network, shown on `progress` as `name`; `section` is where `training` stands in the file.

    Raises:
        NonFiniteError: as `env.training.train`, and says how the campaign can go on with other settings.

    """
    try:
        train(
            network,
            dataset,
            config.data,
            training,
            seed=seed,
            teacher=teacher,
            section=section,
            checkpoint=checkpoint,
            on_epoch=partial(progress.epoch, name),
            on_batch=partial(progress.batch, name),
        )
    except NonFiniteError as error:
        raise how_to_go_on(name, error, folder) from error


def how_to_go_on(name: str, error: NonFiniteError, folder: CampaignFolder) -> NonFiniteError:
    """The error of the training that people know as `name`, with what can be done."""
    return NonFiniteError(
        f"{name}: {error}. To go on: change that in {folder.campaign_toml}, and zeroout resume {folder.path}"
    )
