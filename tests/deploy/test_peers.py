"""Peers: networks that other methods leave beside the search's, on digits, and what becomes of those that cannot."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from rich.console import Console
from torch import nn

import deploy.peers
from deploy.candidates import candidate_path
from deploy.config import CampaignConfig, dump, parse
from deploy.folder import CampaignFolder, read_json
from deploy.frontier import PEERS
from deploy.peers import CRITERIA, METHODS, Commission, _classifier, left_out, make_peers
from deploy.prepare import preflight, prepare
from deploy.progress import PlainProgress
from env.channels import costs_of
from env.compact_file import network_from_file
from env.errors import UserError
from env.networks import initialise_anew, small

CAMPAIGN = """
peers = ["torch-pruning", "uniform"]
[network]
width = 0.25
[data]
validation_share = 0.2
[baseline]
epochs = 3
batch_size = 64
[episode]
targets = [0.5, 0.9]
batch_size = 32
step_minibatches = 1
recovery_minibatches = 3
score_images = 64
"""


@pytest.fixture(autouse=True)
def few_criteria(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    few = {name: CRITERIA[name] for name in ("L2 uniform", "Taylor global")}
    monkeypatch.setattr(deploy.peers, "CRITERIA", few)
    monkeypatch.setattr(deploy.peers, "STEPS", 3)
    return dict(few)


def made(config: CampaignConfig, path: Path) -> tuple[CampaignFolder, str]:
    """The folder with what the peers left in it, and what was said."""
    path.mkdir(exist_ok=True)
    folder, dataset = CampaignFolder.create(path / "out", dump(config)), preflight(config)
    with (path / "log").open("w") as log:
        progress = PlainProgress(Console(file=log, width=200))
        baseline = prepare(folder, config, dataset, progress)
        make_peers(folder, config, dataset, baseline, progress)
    return folder, (path / "log").read_text()


def test_each_peer_leaves_a_network_at_each_target_that_lacks_as_much(
    tmp_path: Path, few_criteria: dict[str, object]
) -> None:
    config = parse(CAMPAIGN)
    folder, said = made(config, tmp_path)
    given = costs_of(small(width=0.25), torch.zeros(1, 1, 8, 8))["parameters"]
    for target in config.episode.targets:
        for peer in PEERS:
            path = candidate_path(folder, peer, target)
            network, facts = network_from_file(str(path)), read_json(path.with_suffix(".json"))
            left = sum(parameter.numel() for parameter in network.parameters())
            assert target <= 1 - left / given <= target + 0.05
            assert facts["episode"] is None
        pruned = read_json(candidate_path(folder, "torch-pruning", target).with_suffix(".json"))
        assert set(pruned["tried"]) == {f"{name}, {how}" for name in few_criteria for how in ("at once", "3 steps")}
        assert pruned["policy"] == min(pruned["tried"], key=lambda name: pruned["tried"][name])
        assert pruned["images"] == 2 * 32 * (4 * 1 + 2 * 3)  # at once and in three steps, a short recovery after each
    assert "uniform 90.00%: epoch 3/3" in said


def test_what_is_there_is_kept_and_a_killed_peer_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(parse(CAMPAIGN), peers=("uniform",))
    folder, _ = made(config, tmp_path)
    kept, lost = (candidate_path(folder, "uniform", target) for target in config.episode.targets)
    before = kept.stat().st_mtime_ns
    lost.with_suffix(".json").unlink()  # written last
    asked: list[float] = []

    def counted(wanted: Commission) -> tuple[nn.Module, dict[str, object]]:
        asked.append(wanted.target)
        return small(width=0.1), {"policy": "counted", "images": 0}

    monkeypatch.setitem(METHODS, "uniform", counted)
    made(config, tmp_path)
    assert asked == [0.9]
    assert kept.stat().st_mtime_ns == before
    assert read_json(lost.with_suffix(".json"))["policy"] == "counted"


def test_what_torch_pruning_has_tried_is_not_tried_again_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(CAMPAIGN.replace(', "uniform"', "").replace("[0.5, 0.9]", "[0.9]"))
    whole, _ = made(config, tmp_path / "whole")
    tried: list[str] = []
    once = deploy.peers._by_criterion

    def killed_in_the_third(wanted: Commission, criterion: str, steps: int) -> nn.Module:
        tried.append(f"{criterion}, {steps}")
        if len(tried) == 3:
            raise KeyboardInterrupt
        return once(wanted, criterion, steps)

    monkeypatch.setattr(deploy.peers, "_by_criterion", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        made(config, tmp_path / "killed")
    folder, _ = made(config, tmp_path / "killed")
    assert tried == ["L2 uniform, 1", "L2 uniform, 3", "Taylor global, 1", "Taylor global, 1", "Taylor global, 3"]
    expected, found = (candidate_path(one, "torch-pruning", 0.9) for one in (whole, folder))
    assert found.read_bytes() == expected.read_bytes()
    assert read_json(found.with_suffix(".json")) == read_json(expected.with_suffix(".json"))
    assert not any((folder.path / "peers").iterdir())


def test_a_network_that_a_peer_cannot_prune_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise KeyError("a layer nobody knows")

    monkeypatch.setattr(deploy.peers.tp.pruner, "BasePruner", unknown)
    folder, said = made(parse(CAMPAIGN), tmp_path)
    assert not candidate_path(folder, "torch-pruning", 0.9).exists()
    assert candidate_path(folder, "uniform", 0.9).is_file()
    assert "torch-pruning at 90.00%: left out: none of" in " ".join(said.split())
    assert "a layer nobody knows" in said
    missing = left_out(folder, parse(CAMPAIGN))
    assert [(row["group"], row["target"]) for row in missing] == [("torch-pruning", 0.5), ("torch-pruning", 0.9)]
    again, said = made(parse(CAMPAIGN), tmp_path)
    assert "peers" not in said  # neither made nor tried anew
    assert left_out(again, parse(CAMPAIGN)) == missing


class HeadFirst(nn.Module):
    """Its classifier is registered first, and called last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.head(self.body(images)))


def test_the_classifier_is_what_is_called_last() -> None:
    network = HeadFirst()
    assert _classifier(network, torch.zeros(1, 1, 8, 8)) is network.head


def test_a_network_that_its_file_would_not_give_back_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(_: Commission) -> tuple[nn.Module, dict[str, object]]:
        network = small(width=0.1)
        return nn.Sequential(network, nn.Linear(10, 10)), {"policy": "other", "images": 0}

    monkeypatch.setitem(METHODS, "uniform", other)
    folder, said = made(replace(parse(CAMPAIGN), peers=("uniform",)), tmp_path)
    assert not candidate_path(folder, "uniform", 0.9).exists()
    assert "left out: the pruned network cannot be rebuilt" in " ".join(said.split())


def test_uniform_is_trained_from_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a training that does nothing, its weights are fresh ones; all widths are one share of the baseline's."""
    monkeypatch.setattr(deploy.peers, "train_shown", lambda *_, **__: None)
    config = replace(parse(CAMPAIGN), peers=("uniform",))
    folder, _ = made(config, tmp_path)
    network = network_from_file(str(candidate_path(folder, "uniform", 0.9)))
    whole = network_from_file(str(folder.baseline / "model.safetensors"))
    pairs = [
        (narrow, wide)
        for narrow, wide in zip(network.modules(), whole.modules(), strict=True)
        if isinstance(narrow, nn.Conv2d) and isinstance(wide, nn.Conv2d)
    ]
    shares = [narrow.out_channels / wide.out_channels for narrow, wide in pairs]
    assert all(abs(share - shares[-1]) <= 1 / wide.out_channels for share, (_, wide) in zip(shares, pairs, strict=True))
    for narrow, wide in pairs:
        assert not torch.isin(narrow.weight, wide.weight).any()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms)
    assert all(not norm.running_mean.any() for norm in norms if norm.running_mean is not None)


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    networks = [small(width=0.25) for _ in range(3)]
    state = torch.get_rng_state()
    for network, seed in zip(networks, (1, 1, 2), strict=True):
        initialise_anew(network, seed=seed)
    first, again, other = (network.state_dict() for network in networks)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])


def test_macs_are_counted_where_they_are_the_measure(tmp_path: Path) -> None:
    config = parse(CAMPAIGN, ['episode.measure="macs"', "episode.targets=[0.6]"])
    folder, _ = made(config, tmp_path)
    given = costs_of(small(width=0.25), torch.zeros(1, 1, 8, 8))["macs"]
    for peer in PEERS:
        network = network_from_file(str(candidate_path(folder, peer, 0.6)))
        assert 0.6 <= 1 - costs_of(network, torch.zeros(1, 1, 8, 8))["macs"] / given <= 0.7


def test_the_names_are_those_of_the_configuration() -> None:
    assert tuple(METHODS) == PEERS
    with pytest.raises(UserError, match=r"peers: expected different ones of torch-pruning, uniform, got .*'hope'"):
        parse(CAMPAIGN, ['peers=["hope"]'])
    with pytest.raises(UserError, match="peers: expected different ones"):
        parse(CAMPAIGN, ['peers=["uniform", "uniform"]'])
