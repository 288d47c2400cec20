"""The baseline: trained or loaded once, counted as the user gave it."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from deploy.config import CampaignConfig, dump, parse
from deploy.folder import CampaignFolder
from deploy.prepare import Baseline, preflight, prepare
from deploy.progress import PlainProgress
from env.errors import UserError
from env.networks import build_network

TINY = """
[network]
name = "resnet18"
width = 0.05
[data]
validation_share = 0.2
[baseline]
epochs = 1
batch_size = 64
"""


def prepared(tmp_path: Path, text: str, *overrides: str) -> tuple[CampaignConfig, Baseline]:
    config = parse(text, overrides)
    folder = CampaignFolder.create(tmp_path, dump(config))
    with (tmp_path.parent / "log").open("w") as log:
        return config, prepare(folder, config, preflight(config), PlainProgress(Console(file=log)))


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_skip_convolutions_are_added_to_the_trained_network_and_do_not_count_as_given(tmp_path: Path) -> None:
    config, baseline = prepared(tmp_path / "out", TINY, "network.skips=convolution")
    plain = build_network(parse(TINY).network, channels=1, classes=10)
    added = [name for name, _ in baseline.network.named_parameters() if name not in dict(plain.named_parameters())]
    assert baseline.parameters == parameters(plain)
    assert parameters(baseline.network) > baseline.parameters
    assert added
    assert all("shortcut" in name for name in added)
    assert config.network.skips == "convolution"


def test_a_second_call_takes_the_baseline_from_the_folder(tmp_path: Path) -> None:
    _, first = prepared(tmp_path / "out", TINY)
    written = (tmp_path / "out" / "baseline" / "model.safetensors").stat().st_mtime_ns
    _, second = prepared(tmp_path / "out", TINY)
    assert (tmp_path / "out" / "baseline" / "model.safetensors").stat().st_mtime_ns == written
    for mine, theirs in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert first.validation == second.validation


def test_given_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    network = build_network(parse(TINY).network, channels=1, classes=10, seed=9)
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    _, baseline = prepared(tmp_path / "out", TINY, f"network.weights={tmp_path / 'mine.safetensors'}")
    for mine, theirs in zip(network.parameters(), baseline.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_target_beyond_reach_is_refused_with_the_most_that_can_go() -> None:
    with pytest.raises(UserError, match=r"at most 0\.\d{4}, which is what min_width = 3 leaves"):
        preflight(parse(TINY, ["episode.targets=[0.999]", "episode.min_width=3"]))
