"""What the search is compared with that is no campaign of ours: Torch-Pruning's criteria, and a smaller network trained
from scratch. Both end in the recovery that every campaign has, and leave a result in its form.

`python -m benchmarks.search_methods.peers torch-pruning|uniform CONFIG.toml --out DIR`; called by benchmarks/search.py.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from rich.console import Console
from torch import nn

from benchmarks.campaigns import ended_as_a_command
from deploy.config import dump, load
from deploy.folder import CampaignFolder, read_json, write_json
from deploy.prepare import Baseline, default_device, preflight, prepare, train_shown
from deploy.progress import Progress, make_progress
from deploy.recover import Recovery
from env.augment import normalise
from env.data import Dataset
from env.networks import NetworkConfig, build_network
from env.retraining import evaluate, retrain
from env.seeds import derive_seed

STEPS = 10
#: Name, importance, whether all layers are ranked together.
CRITERIA: dict[str, tuple[Callable[[], Any], bool]] = {
    "L2 uniform": (lambda: tp.importance.MagnitudeImportance(p=2), False),
    "L2 global": (lambda: tp.importance.MagnitudeImportance(p=2), True),
    "Taylor global": (lambda: tp.importance.TaylorImportance(), True),
    "BN scale global": (lambda: tp.importance.BNScaleImportance(), True),
    "FPGM global": (lambda: tp.importance.FPGMImportance(), True),
}
_MOST_OF_A_LAYER = 0.98
_HALVINGS = 10


@dataclass(frozen=True)
class Peer:
    """A campaign's folder, images and baseline, used by another method."""

    folder: CampaignFolder
    recovery: Recovery

    @property
    def dataset(self) -> Dataset:
        """The images."""
        return self.recovery.dataset

    @property
    def baseline(self) -> Baseline:
        """The network to be made smaller."""
        return self.recovery.baseline

    @property
    def target(self) -> float:
        """The share of the parameters to remove: the last target."""
        return self.recovery.config.episode.targets[-1]

    def removed(self, network: nn.Module) -> float:
        """The share of the parameters that `network` lacks."""
        return 1.0 - sum(p.numel() for p in network.parameters()) / self.baseline.measure.given

    def retrained(self, network: nn.Module, minibatches: int, rate: float, *, name: str, decay: bool = False) -> None:
        """Retrain in place, as an episode of ours does."""
        episode = self.recovery.config.episode
        retrain(
            network, self.dataset, self.recovery.config.data,
            minibatches=minibatches, batch_size=episode.batch_size, learning_rate=rate, decay=decay,
            seed=derive_seed(self.recovery.config.seed, name), precision=episode.precision,
        )  # fmt: skip

    def cross_entropy(self, network: nn.Module) -> float:
        """On the whole validation split."""
        dataset, precision = self.dataset, self.recovery.config.episode.precision
        return evaluate(network, dataset.validation, dataset.mean, dataset.std, precision=precision).cross_entropy


def best_of_torch_pruning(peer: Peer) -> tuple[nn.Module, dict[str, Any]]:
    """The best on validation of five criteria, each at once and in ten steps, after a short recovery."""
    episode, tried = peer.recovery.config.episode, []
    for name in CRITERIA:
        for steps in (1, STEPS):
            network = copy.deepcopy(peer.baseline.network).to(default_device())
            for step in range(1, steps + 1):
                network = pruned(peer, network, name, peer.target * step / steps)
                peer.retrained(network, episode.step_minibatches, episode.step_learning_rate, name=f"{name} {step}")
            recovered = copy.deepcopy(network)
            peer.retrained(
                recovered,
                episode.recovery_minibatches,
                episode.recovery_learning_rate,
                name="short recovery",
                decay=True,
            )
            score = peer.cross_entropy(recovered)
            peer.recovery.progress.note(f"{name}, {steps} steps: {peer.removed(network):.2%} removed, {score:.3f} nats")
            tried.append((score, f"{name}, {steps} steps", recovered))
    score, name, network = min(tried, key=lambda each: each[0])
    images = len(CRITERIA) * episode.batch_size * (
        (1 + STEPS) * episode.step_minibatches + 2 * episode.recovery_minibatches
    )  # fmt: skip
    return network, {
        "policy": name, "images": images, "tried": {each: round(value, 4) for value, each, _ in tried},
    }  # fmt: skip


def pruned(peer: Peer, network: nn.Module, criterion: str, target: float) -> nn.Module:
    """The least that Torch-Pruning can remove of `network` and reach `target`, which is counted from the baseline."""
    low, high = 0.0, 1.0
    best = None
    for _ in range(_HALVINGS):
        ratio = (low + high) / 2
        tried = _once(peer, copy.deepcopy(network), criterion, ratio)
        if peer.removed(tried) >= target:
            best, high = tried, ratio
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"Torch-Pruning's {criterion} did not reach {target:.2%}")
    return best


def _once(peer: Peer, network: nn.Module, criterion: str, ratio: float) -> nn.Module:
    make, together = CRITERIA[criterion]
    example = torch.zeros(1, *peer.dataset.image_shape, device=default_device())
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        network, example, importance=make(), global_pruning=together, pruning_ratio=ratio,
        max_pruning_ratio=_MOST_OF_A_LAYER, ignored_layers=[last],
    )  # fmt: skip
    if criterion.startswith("Taylor"):
        _gradients(peer, network)
    pruner.step()
    network.zero_grad(set_to_none=True)
    return network


def _gradients(peer: Peer, network: nn.Module) -> None:
    """Of the cross-entropy of as many training images as our own score sees."""
    chosen = torch.randperm(len(peer.dataset.train), generator=torch.Generator().manual_seed(0)).to(default_device())
    batch = peer.dataset.train.take(chosen[: peer.recovery.config.episode.score_images])
    network.eval()
    images = normalise(batch.images, peer.dataset.mean, peer.dataset.std)
    loss = nn.functional.cross_entropy(network(images), batch.labels)
    loss.backward()  # type: ignore[no-untyped-call]


def smaller_from_scratch(peer: Peer) -> tuple[nn.Module, dict[str, Any]]:
    """The same network with all widths multiplied alike, trained as the baseline and then as long as the recovery."""
    config = peer.recovery.config

    def made(width: float) -> nn.Module:
        torch.manual_seed(derive_seed(config.seed, "uniform"))
        return build_network(
            NetworkConfig(name=config.network.name, width=width, skips=config.network.skips),
            channels=peer.dataset.image_shape[0], classes=len(peer.dataset.classes),
        )  # fmt: skip

    low, high = 0.0, config.network.width
    for _ in range(20):
        width = (low + high) / 2
        low, high = (width, high) if peer.removed(made(width)) >= peer.target else (low, width)
    network = made(low).to(default_device())
    train_shown(
        network, peer.dataset, config, config.baseline, name="uniform", section="baseline",
        seed=derive_seed(config.seed, "uniform"), checkpoint=peer.folder.path / "uniform.pt",
        folder=peer.folder, progress=peer.recovery.progress,
    )  # fmt: skip
    images = config.baseline.epochs * len(peer.dataset.train)
    return network, {"policy": f"width {low:.4f} from scratch", "images": images}


METHODS: dict[str, Callable[[Peer], tuple[nn.Module, dict[str, Any]]]] = {
    "torch-pruning": best_of_torch_pruning,
    "uniform": smaller_from_scratch,
}


def run(method: str, config_path: Path, out: Path, progress: Progress) -> None:
    """Make the network, recover it, open the test split once; what is there already is kept."""
    if (out / "result.json").is_file():
        return
    config = load(config_path)
    dataset = preflight(config).to(default_device())
    folder = CampaignFolder.create(out, dump(config))
    baseline = prepare(folder, config, dataset, progress)
    recovery = Recovery(folder, config, dataset, baseline, progress)
    peer = Peer(folder, recovery)
    model = folder.recovered / f"{method}-{peer.target}.safetensors"
    if not model.with_suffix(".json").is_file():
        torch.manual_seed(derive_seed(config.seed, method))
        network, origin = METHODS[method](peer)
        recovery.recovered(network, model, {"group": method, "target": peer.target, "episode": 0, **origin})
    facts = read_json(model.with_suffix(".json"))
    point = {**facts, **recovery.point(model)}
    write_json(folder.result_json, {"baseline": recovery.as_given(), "points": [point], "images": facts["images"]})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_methods.peers", description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with ended_as_a_command():
        run(given.method, given.config, given.out, make_progress(Console(stderr=True)))


if __name__ == "__main__":
    main()
