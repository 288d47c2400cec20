"""`--like`: as wide as a network that was pruned before, by hand and by the real command on digits."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from command import Zeroout
from torch import nn

from deploy.folder import CampaignFolder
from deploy.like import removed_in, widths_like
from env.channels import MEASURES, ChannelPlan
from env.compact_file import NetworkForm, network_from_file, network_to_bytes
from env.errors import UserError
from env.networks import NetworkConfig

FORM = NetworkForm(network=NetworkConfig(name="small", width=0.25), channels=1, classes=10, image_size=8)
KEPT = [5, 8, 9, 4, 24, 2]  # of 8, 8, 16, 16, 24, 24
TINY = """
[network]
width = 0.25
[baseline]
epochs = 5
[episode]
step_minibatches = 2
recovery_minibatches = 4
[recovery]
epochs = 2
"""


def whole(form: NetworkForm = FORM) -> tuple[nn.Module, ChannelPlan]:
    network = form.build().eval()
    return network, ChannelPlan(network, torch.zeros(1, form.channels, form.image_size, form.image_size))


def pruned(path: Path, form: NetworkForm = FORM, kept: Sequence[int] = KEPT) -> str:
    """A file of a network of whose layers the first `kept` filters are left, and all of the layers after them."""
    network, plan = whole(form)
    mask = torch.ones(plan.units, dtype=torch.bool)
    for layer, count in zip(plan.layers, kept, strict=False):
        mask[layer.first + count : layer.first + layer.units] = False
    path.write_bytes(network_to_bytes(plan.compact(network, mask), form))
    return str(path)


def test_a_file_says_how_wide_its_layers_are_and_how_much_is_gone(tmp_path: Path) -> None:
    file = pruned(tmp_path / "compact.safetensors")
    network, plan = whole()
    assert widths_like(file, FORM.network, plan, network).tolist() == KEPT
    for measure in MEASURES:
        removed = 1 - int(plan.cost(measure, torch.tensor(KEPT))) / int(plan.cost(measure, plan.widths))
        assert removed_in(file, measure) == math.floor(removed * 1e6) / 1e6
    convolved = NetworkForm(
        network=NetworkConfig(name="resnet18", width=0.1, skips="convolution"), channels=1, classes=10, image_size=8
    )
    assert (
        removed_in(pruned(tmp_path / "whole.safetensors", convolved, kept=[]), "parameters") < 0
    )  # has more than given
    before = sum(parameter.numel() for parameter in network.parameters())
    after = sum(parameter.numel() for parameter in network_from_file(file).parameters())
    assert removed_in(file, "parameters") == pytest.approx(1 - after / before, abs=1e-6)


def test_a_network_of_another_kind_is_refused(tmp_path: Path) -> None:
    network, plan = whole()
    for kind in (NetworkConfig(name="small", width=1.0), NetworkConfig(name="vgg16", width=0.25)):
        size = 32 if kind.name == "vgg16" else 8
        other = pruned(
            tmp_path / "other.safetensors", NetworkForm(network=kind, channels=1, classes=10, image_size=size), []
        )
        with pytest.raises(
            UserError, match=rf"search.like .*, got one of {kind.name}, width .* this is small, width 0.25"
        ):
            widths_like(other, FORM.network, plan, network)
    narrow = plan.compact(network, torch.arange(plan.units) % 2 == 0)  # as what --treat prune has narrowed
    with pytest.raises(UserError, match=r"no layer wider than here, got 5 filters in .*, which has 4 here"):
        widths_like(
            pruned(tmp_path / "compact.safetensors"), FORM.network, ChannelPlan(narrow, torch.zeros(1, 1, 8, 8)), narrow
        )
    with pytest.raises(UserError, match=r"model .*: expected a compact network saved by zeroout"):
        removed_in(str(tmp_path / "missing.safetensors"), "parameters")


@pytest.mark.slow
def test_prune_ends_with_the_widths_of_the_file(
    zeroout: Zeroout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("deploy.campaign.export", lambda *_, **__: [])
    (tmp_path / "tiny.toml").write_text(TINY)
    file, out = pruned(tmp_path / "compact.safetensors"), tmp_path / "out"
    monkeypatch.chdir(tmp_path)  # a relative path still holds for a resume from elsewhere
    asked = ("prune", "tiny.toml", "--method", "uniform-l1", "--like", "compact.safetensors", "--steps", 3)
    assert zeroout(*asked, "--out", out).code == 0
    (point,) = json.loads((out / "result.json").read_text())["points"]
    network, plan = whole()
    assert widths_like(str(out / point["model"]), FORM.network, plan, network).tolist() == KEPT
    assert point["target"] == removed_in(file, "parameters")
    assert len(CampaignFolder.open(out).read_episodes()) == 1
    Path(file).unlink()  # what it said is in the folder
    assert zeroout("resume", out).code == 0
    (out / "episodes.jsonl").unlink()
    refused = zeroout("resume", out)
    assert refused.code == 2
    assert "compact.safetensors" in refused.error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--like", "missing.safetensors"), "missing.safetensors: expected a compact network saved by zeroout"),
        (("--like", "missing.safetensors", "--compression", 0.5), "expected a compact network saved by zeroout"),
        (("--like", "compact.safetensors", "--allocation", "uniform"), "search.like: expected no search.allocation"),
        (("--like", "compact.safetensors", "--max-drop", 1.0), "search.like: expected no max_drop beside it"),
        (("--like", "whole.safetensors"), "what is removed in --like whole.safetensors: expected a share inside"),
        (("--like", "compact.safetensors", "--method", "random"), "search.like: .* search.method = 'random'"),
    ],
)
def test_a_mistake_is_one_line(
    zeroout: Zeroout,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    pruned(tmp_path / "compact.safetensors")
    pruned(tmp_path / "whole.safetensors", kept=[])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    ended = zeroout("prune", "tiny.toml", *arguments, "--out", "out")
    assert ended.code == 2
    assert re.search(said, " ".join(ended.error.split()))
    assert not (tmp_path / "out").exists()
