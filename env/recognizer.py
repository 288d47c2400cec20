"""The Recognizer: the network being compressed, with the data it is retrained on.

What is the same in every episode (the baseline, its plan, the images) stands in `Recognizer`; what an episode
changes stands in `Body`, a small value that is replaced, never mutated.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from env.augment import normalise
from env.channels import ChannelPlan
from env.copies import duplicate
from env.data import DataConfig, Dataset
from env.importance import importance, log_scores
from env.measure import Measure
from env.retraining import Metrics, augmented, evaluate, retrain
from env.seeds import derive_seed
from env.splits import Split

__all__ = ["Body", "Recognizer", "Retraining"]


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """How a network is retrained for a few minibatches.

    `learning_rate` is that of SGD with momentum; `decay` lets it fall linearly to 0 over the call.
    """

    minibatches: int
    batch_size: int
    learning_rate: float
    decay: bool = False
    weight_decay: float = 5e-4
    momentum: float = 0.9


@dataclass(frozen=True)
class Body:
    """A Recognizer in the middle of an episode: the compact network and keep_mask bool [F]."""

    network: nn.Module
    keep_mask: Tensor


class Recognizer:
    """The baseline network, its plan and its images, on one device.

    Args:
        network: the trained baseline, with skip convolutions already in where they are wanted.
        dataset: images and labels; every decision uses its validation split.
        data_config: how training images are augmented.
        measure: what compression is counted in, against the network as the user gave it.
        precision: "float32" or "bfloat16", the arithmetic of retraining and evaluation.
        device: where the network and the images live.

    Attributes:
        on_minibatch: called after each minibatch of any retraining, where it is set.

    """

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset,
        data_config: DataConfig,
        *,
        measure: Measure,
        precision: str = "float32",
        device: str = "cpu",
    ) -> None:
        self.network = network.to(device)
        self.dataset = dataset.to(torch.device(device))
        self.data_config = data_config
        self.measure = measure
        self.precision = precision
        self.device = torch.device(device)
        self.on_minibatch: Callable[[], object] | None = None
        example = torch.zeros(1, *dataset.image_shape, device=self.device)
        self.plan = ChannelPlan(self.network, example)

    def full(self) -> Body:
        """The baseline, nothing removed."""
        return Body(duplicate(self.network), torch.ones(self.plan.units, dtype=torch.bool))

    def zero(self, body: Body, keep_mask: Tensor) -> Body:
        """Remove the filters outside `keep_mask` (bool [F], within body's) for good."""
        return Body(self.plan.compact(body.network, keep_mask, have=body.keep_mask), keep_mask)

    def state_of(self, body: Body) -> dict[str, Any]:
        """What `restored` makes an equal body of: its mask, and its network's tensors (the network's own) by name."""
        return {"keep_mask": body.keep_mask, "network": _tensors(body.network)}

    def restored(self, state: Mapping[str, Any]) -> Body:
        """A body from its `state_of`; ValueError for tensors that are not those of the network under that mask."""
        keep_mask = state["keep_mask"]
        if keep_mask.dtype != torch.bool or keep_mask.shape != (self.plan.units,):
            raise ValueError(f"keep_mask: expected bool [{self.plan.units}], got {_kind(keep_mask)}")
        body = self.zero(self.full(), keep_mask)
        own, given = _tensors(body.network), state["network"]
        if own.keys() != given.keys():
            strange = sorted(own.keys() ^ given.keys())
            raise ValueError(f"network: expected {len(own)} tensors by name, got {len(given)}; differs in {strange[0]}")
        for name, tensor in own.items():
            if _kind(tensor) != _kind(given[name]):
                raise ValueError(f"network's {name}: expected {_kind(tensor)}, got {_kind(given[name])}")
            tensor.copy_(given[name])
        return body

    def compression(self, keep_mask: Tensor) -> float:
        """The share that `keep_mask` (bool [F]) removes of the network as given, in the measure."""
        return float(self.measure.compression(self.plan, self.plan.kept_per_layer(keep_mask)))

    def retrain(self, body: Body, config: Retraining, *, seed: int) -> float:
        """Retrain in place; the seed alone decides images and augmentation. Returns the mean loss in nats."""
        return retrain(
            body.network,
            self.dataset,
            self.data_config,
            minibatches=config.minibatches,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            decay=config.decay,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            precision=self.precision,
            seed=seed,
            on_minibatch=self.on_minibatch,
        )

    def recovered(self, body: Body, config: Retraining, *, seed: int) -> Body:
        """A copy of body after retraining; body itself is unchanged."""
        copied = replace(body, network=duplicate(body.network))
        self.retrain(copied, config, seed=seed)
        return copied

    def evaluate(self, body: Body, split: Split) -> Metrics:
        """Accuracy and cross-entropy of body on a split of this dataset."""
        return evaluate(body.network, split, self.dataset.mean, self.dataset.std, precision=self.precision)

    def log_scores(self, body: Body, *, images: int, batch_size: int, seed: int) -> Tensor:
        """Log importance of every filter on `images` training images, the same for a seed: float32 [F, 3]."""
        batches = self._batches(images, batch_size, derive_seed(seed, "scores"))
        return log_scores(body.network, self.plan, body.keep_mask, batches)

    def importance(self, name: str, body: Body, *, images: int, batch_size: int, seed: int) -> Tensor:
        """One of `env.importance.IMPORTANCES` on `images` augmented training images: float32 [F], 0 where gone.

        Augmented as HRank's own code does; the seed alone decides which images, and how.
        """
        batches = self._batches(images, batch_size, derive_seed(seed, "importance"), as_trained=True)
        return importance(name, body.network, self.plan, body.keep_mask, batches)

    def _batches(
        self, images: int, batch_size: int, seed: int, *, as_trained: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        dataset, generator = self.dataset, torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(dataset.train), generator=generator)[:images]
        for part in torch.split(chosen.to(self.device), batch_size):
            batch = dataset.train.take(part)
            if as_trained:
                yield augmented(batch, dataset, self.data_config, generator), batch.labels
            else:
                yield normalise(batch.images, dataset.mean, dataset.std), batch.labels


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, one that is shared once; without gradients."""
    return {name: part.detach() for name, part in (*network.named_parameters(), *network.named_buffers())}


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
