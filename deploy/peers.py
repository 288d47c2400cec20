"""What a campaign is compared with that plays no episodes: Torch-Pruning's criteria, and a smaller network trained from
scratch.

Between search and recovery, for who asks for `peers`. Each leaves a network at each target where the search leaves its
own (deploy/candidates.py), so that it is recovered and judged like every other.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from deploy.candidates import candidate_path
from deploy.config import CampaignConfig
from deploy.folder import CampaignFolder, read_json, write_atomic, write_json
from deploy.prepare import Baseline, default_device, train_shown
from deploy.progress import Progress
from env.augment import normalise
from env.channels import ChannelPlan, costs_of
from env.compact_file import NetworkForm, network_from_bytes, network_from_file, network_to_bytes
from env.copies import duplicate
from env.data import Dataset
from env.errors import ZerooutError, first_line
from env.groups import PRODUCERS
from env.networks import initialise_anew
from env.retraining import evaluate, retrain
from env.seeds import derive_seed

__all__ = ["Commission", "left_out", "make_peers"]

STEPS = 10
#: Torch-Pruning's: name, importance, whether all layers are ranked together.
CRITERIA: dict[str, tuple[Callable[[], Any], bool]] = {
    "L2 uniform": (lambda: tp.importance.MagnitudeImportance(p=2), False),
    "L2 global": (lambda: tp.importance.MagnitudeImportance(p=2), True),
    "Taylor global": (lambda: tp.importance.TaylorImportance(), True),
    "BN scale global": (lambda: tp.importance.BNScaleImportance(), True),
    "FPGM global": (lambda: tp.importance.FPGMImportance(), True),
}
_MOST_OF_A_LAYER = 0.98
_HALVINGS = 10  # to the least ratio of Torch-Pruning that reaches a target: a thousandth
_FINE_HALVINGS = 20  # to the widths of `uniform`


@dataclass(frozen=True)
class Commission:
    """What a peer is to make: of a campaign's baseline a network that lacks `target`; images are on the device."""

    folder: CampaignFolder
    config: CampaignConfig
    dataset: Dataset
    baseline: Baseline
    progress: Progress
    target: float

    @property
    def attempts(self) -> Path:
        """Where a peer may keep what it has tried, for a resume; deleted when it is through."""
        return self.folder.path / "peers" / f"{self.target}"

    @property
    def example(self) -> Tensor:
        """One black image, float32 [1, C, H, W]."""
        return torch.zeros(1, *self.dataset.image_shape, device=default_device())

    def removed(self, network: nn.Module) -> float:
        """The share that `network` lacks, in the campaign's measure."""
        measure = self.baseline.measure
        return 1.0 - costs_of(network, self.example)[measure.name] / measure.given

    def retrained(self, network: nn.Module, minibatches: int, rate: float, *, name: str, decay: bool = False) -> None:
        """Retrain in place, as an episode of ours does."""
        episode = self.config.episode
        retrain(
            network, self.dataset, self.config.data,
            minibatches=minibatches, batch_size=episode.batch_size, learning_rate=rate, decay=decay,
            seed=derive_seed(self.config.seed, name), precision=episode.precision,
        )  # fmt: skip

    def cross_entropy(self, network: nn.Module) -> float:
        """On the whole validation split, nats."""
        dataset, precision = self.dataset, self.config.episode.precision
        return evaluate(network, dataset.validation, dataset.mean, dataset.std, precision=precision).cross_entropy


def left_out(folder: CampaignFolder, config: CampaignConfig) -> list[dict[str, Any]]:
    """The peers that failed: "group", "target" and "reason" of each."""
    found = []
    for target in config.episode.targets:
        for peer in config.peers:
            facts = candidate_path(folder, peer, target).with_suffix(".json")
            reason = read_json(facts).get("left_out") if facts.is_file() else None
            if reason is not None:
                found.append({"group": peer, "target": target, "reason": reason})
    return found


def make_peers(
    folder: CampaignFolder, config: CampaignConfig, dataset: Dataset, baseline: Baseline, progress: Progress
) -> None:
    """Make what `config.peers` asks for, at each target; what is there already is kept.

    Where a peer fails on a network, that is said and kept in place of what it would have made: the campaign does not
    need it.
    """
    if not config.peers:
        return
    there = dataset.to(default_device())
    for target in config.episode.targets:
        for peer in config.peers:
            path = candidate_path(folder, peer, target)
            if path.with_suffix(".json").is_file():  # written last
                continue
            path.parent.mkdir(exist_ok=True)
            progress.stage("peers", f"{peer} at {target:.2%}")
            wanted = Commission(folder, config, there, baseline, progress, target)
            try:
                network, origin = METHODS[peer](wanted)
                payload = _kept(network, baseline.form, there)
            except ZerooutError:
                raise  # a full disk, a loss that is not finite: nothing of the peer's
            except Exception as error:  # somebody's network may hold anything, and the peer may not know it
                progress.note(f"{peer} at {target:.2%}: left out: {first_line(error)}")
                write_json(path.with_suffix(".json"), {"left_out": first_line(error)})
                continue
            write_atomic(path, payload)
            write_json(path.with_suffix(".json"), {**origin, "episode": None})
            shutil.rmtree(wanted.attempts, ignore_errors=True)


def _kept(network: nn.Module, form: NetworkForm, dataset: Dataset) -> bytes:
    """The network as a file; RuntimeError where what is read back would be another, as a peer cuts what we do not."""
    payload = network_to_bytes(network, form)
    images = torch.rand(2, *dataset.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = network.cpu().eval()(images), network_from_bytes(payload, form)(images)
    if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        raise RuntimeError("the pruned network cannot be rebuilt from its file")
    return payload


def best_of_torch_pruning(wanted: Commission) -> tuple[nn.Module, dict[str, Any]]:
    """The best on validation of five criteria, each at once and in ten steps, after a short recovery each."""
    tried = sorted(_tried(wanted), key=lambda each: each[0])
    if not tried:
        raise RuntimeError(f"none of {', '.join(CRITERIA)} reached {wanted.target:.2%}")
    episode = wanted.config.episode
    images = len(CRITERIA) * episode.batch_size * (
        (1 + STEPS) * episode.step_minibatches + 2 * episode.recovery_minibatches
    )  # fmt: skip
    _, name, network = tried[0]
    scores = {each: round(score, 4) for score, each, _ in tried}
    return network, {"policy": name, "images": images, "tried": scores}


def _tried(wanted: Commission) -> Iterator[tuple[float, str, nn.Module]]:
    """Cross-entropy after the short recovery, name and network of each criterion that reaches the target."""
    for criterion in CRITERIA:
        for steps in (1, STEPS):
            name = f"{criterion}, {steps} steps" if steps > 1 else f"{criterion}, at once"
            kept = wanted.attempts / f"{name}.safetensors"
            if kept.with_suffix(".json").is_file():  # written last
                yield read_json(kept.with_suffix(".json"))["score"], name, network_from_file(str(kept))
                continue
            try:
                network = _by_criterion(wanted, criterion, steps)
                score, payload = wanted.cross_entropy(network), _kept(network, wanted.baseline.form, wanted.dataset)
            except ZerooutError:
                raise
            except Exception as error:  # as of a network without batch-norm, whose scale it ranks by
                wanted.progress.note(f"Torch-Pruning's {name}: {first_line(error)}")
                continue
            removed = wanted.removed(network.to(default_device()))
            wanted.progress.note(f"{name}: {removed:.2%} removed, {score:.3f} nats")
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, payload)
            write_json(kept.with_suffix(".json"), {"score": score})
            yield score, name, network


def _by_criterion(wanted: Commission, criterion: str, steps: int) -> nn.Module:
    """The baseline pruned in so many equal steps and retrained after each, then shortly recovered."""
    episode, network = wanted.config.episode, duplicate(wanted.baseline.start).to(default_device())
    for step in range(1, steps + 1):
        network = _pruned(wanted, network, criterion, wanted.target * step / steps)
        wanted.retrained(network, episode.step_minibatches, episode.step_learning_rate, name=f"{criterion} {step}")
    wanted.retrained(
        network, episode.recovery_minibatches, episode.recovery_learning_rate, name="short recovery", decay=True
    )
    return network


def _pruned(wanted: Commission, network: nn.Module, criterion: str, target: float) -> nn.Module:
    """The least that Torch-Pruning can remove of `network` and reach `target`, which is counted from the baseline."""
    if wanted.removed(network) >= target:
        return network  # as the step before had to take that much
    low, high, best = 0.0, 1.0, None
    for _ in range(_HALVINGS):
        ratio = (low + high) / 2
        tried = _once(wanted, duplicate(network), criterion, ratio)
        if wanted.removed(tried) >= target:
            best, high = tried, ratio
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"did not reach {target:.2%}")
    return best


def _once(wanted: Commission, network: nn.Module, criterion: str, ratio: float) -> nn.Module:
    make, together = CRITERIA[criterion]
    pruner = tp.pruner.BasePruner(
        network, wanted.example, importance=make(), global_pruning=together, pruning_ratio=ratio,
        max_pruning_ratio=_MOST_OF_A_LAYER, ignored_layers=[_classifier(network, wanted.example)],
    )  # fmt: skip
    if criterion.startswith("Taylor"):
        _gradients(wanted, network)
    pruner.step()
    network.zero_grad(set_to_none=True)
    return network


def _classifier(network: nn.Module, example: Tensor) -> nn.Module:
    """The convolution or linear layer that is called last, whose outputs are the logits."""
    called: list[nn.Module] = []
    producers = [module for module in network.modules() if isinstance(module, PRODUCERS)]
    hooks = [module.register_forward_hook(lambda module, *_: called.append(module)) for module in producers]
    with torch.no_grad():
        network.eval()(example)
    for hook in hooks:
        hook.remove()
    return called[-1]


def _gradients(wanted: Commission, network: nn.Module) -> None:
    """Of the cross-entropy of as many training images as our own score sees."""
    dataset = wanted.dataset
    chosen = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0)).to(default_device())
    batch = dataset.train.take(chosen[: wanted.config.episode.score_images])
    network.eval()
    loss = nn.functional.cross_entropy(network(normalise(batch.images, dataset.mean, dataset.std)), batch.labels)
    loss.backward()  # type: ignore[no-untyped-call]


def smaller_from_scratch(wanted: Commission) -> tuple[nn.Module, dict[str, Any]]:
    """The network with all its widths multiplied alike, initialised anew and trained as the baseline is."""
    config, start = wanted.config, wanted.baseline.start.to(default_device())
    plan = ChannelPlan(start, wanted.example)
    share, kept = _uniform_widths(wanted, plan)
    place_in_layer = torch.cat([torch.arange(layer.units) for layer in plan.layers])
    network = plan.compact(start, place_in_layer < kept[plan.layer_of])
    seed = derive_seed(config.seed, "uniform")
    initialise_anew(network, seed=seed)
    train_shown(
        network, wanted.dataset, config, config.baseline, name=f"uniform {wanted.target:.2%}", section="baseline",
        seed=seed, checkpoint=candidate_path(wanted.folder, "uniform", wanted.target).with_suffix(".pt"),
        folder=wanted.folder, progress=wanted.progress,
    )  # fmt: skip
    images = config.baseline.epochs * len(wanted.dataset.train)
    return network, {"policy": f"all widths times {share:.3f}, from scratch", "images": images}


def _uniform_widths(wanted: Commission, plan: ChannelPlan) -> tuple[float, Tensor]:
    """The largest share of all widths with which the target is reached, and the widths int64 [L]."""
    least = plan.widths.clamp(max=wanted.config.episode.min_width)

    def widths(share: float) -> Tensor:
        return (plan.widths * share).round().to(torch.int64).maximum(least)

    low, high = 0.0, 1.0
    for _ in range(_FINE_HALVINGS):
        share = (low + high) / 2
        reached = float(wanted.baseline.measure.compression(plan, widths(share))) >= wanted.target
        low, high = (share, high) if reached else (low, share)
    return low, widths(low)


#: By the names of `deploy.frontier.PEERS`.
METHODS: dict[str, Callable[[Commission], tuple[nn.Module, dict[str, Any]]]] = {
    "torch-pruning": best_of_torch_pruning,
    "uniform": smaller_from_scratch,
}
