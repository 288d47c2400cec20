"""`zeroout transfer`: the real command with tiny numbers, from the digits 0 to 4 to the digits 5 to 9."""

import json
from pathlib import Path

import pytest
import torch
from command import Zeroout
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from deploy.config import dump, load, parse
from deploy.folder import CampaignFolder
from deploy.latency import write_table
from deploy.prepare import preflight, prepare
from deploy.progress import PlainProgress
from deploy.report import write_report
from deploy.transfer import for_few_images
from env.channels import ChannelPlan
from env.compact_file import network_from_file
from env.data import DataConfig, load_dataset
from env.errors import UserError
from env.networks import NetworkConfig, build_network
from env.training import TrainConfig, train
from env.transfer import HOWS

pytestmark = pytest.mark.slow

TINY = """
[network]
width = 0.25
[data]
validation_share = 0.2
classes = "5,6,7,8,9"
train_per_class = 12
[transfer]
classes = 5
[baseline]
epochs = 4
batch_size = 20
learning_rate = 0.02
[episode]
step_minibatches = 1
recovery_minibatches = 1
batch_size = 20
[recovery]
epochs = 2
batch_size = 20
learning_rate = 0.02
"""
SMALL = NetworkConfig(name="small", width=0.25)
#: Filters of each layer of SMALL, and how many of them a share of 0.3 is.
WIDTHS, WEAK = (8, 8, 16, 16, 24, 24), (2, 2, 4, 4, 7, 7)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network that recognizes the digits 0 to 4."""
    data_config = DataConfig(classes="0,1,2,3,4")
    network = build_network(SMALL, channels=1, classes=5, seed=1)
    train(network, load_dataset(data_config), data_config, TrainConfig(epochs=2, batch_size=64), seed=0)
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes longest, and is not what most tests here are about."""
    monkeypatch.setattr("deploy.campaign.export", lambda *_, **__: [])


def before_training(out: Path) -> dict[str, Tensor]:
    """The network at the moment before it was trained on the new classes."""
    return load_file(out / "baseline" / "transferred.safetensors")


def kernels(state: dict[str, Tensor]) -> list[Tensor]:
    """The weights of the convolutions, in the network's order (a file's is that of the names' letters)."""
    convolutions = sorted((int(name.split(".")[1]), tensor) for name, tensor in state.items() if tensor.dim() == 4)
    return [tensor for _, tensor in convolutions]


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("how", HOWS)
def test_each_treatment_starts_from_the_old_body_with_a_new_head(
    zeroout: Zeroout, tmp_path: Path, source: Path, config: Path, how: str
) -> None:
    out = tmp_path / "out"
    what = ("--weights", source, "--from-classes", 5, "--treat", how, "--share", 0.3)
    assert zeroout("transfer", config, *what, "--compression", 0.8, "--steps", 2, "--out", out).code == 0
    old, new = load_file(source), before_training(out)
    assert new["classifier.weight"].shape[0] == 5
    assert not torch.isin(new["classifier.weight"], old["classifier.weight"]).any()
    if how == "prune":
        assert [len(kernel) for kernel in kernels(new)] == [w - k for w, k in zip(WIDTHS, WEAK, strict=True)]
        assert all(torch.isin(new[name], old[name]).all() for name in new if not name.startswith("classifier"))
    else:
        for (mine, theirs), weak in zip(zip(kernels(new), kernels(old), strict=True), WEAK, strict=True):
            changed = [index for index, kernel in enumerate(mine) if not torch.equal(kernel, theirs[index])]
            assert len(changed) == (0 if how == "none" else weak)
            copied = [any(torch.equal(mine[index], kernel) for kernel in theirs) for index in changed]
            assert all(copied) if how in "123" else not any(copied)
    result, facts = (json.loads((out / name).read_text()) for name in ("result.json", "baseline/baseline.json"))
    assert {key: result["transfer"][key] for key in ("how", "share", "classes")} == {
        "how": how, "share": 0.3, "classes": 5,
    }  # fmt: skip
    assert facts["transfer"]["head"] == ["classifier.weight", "classifier.bias"]
    baseline = network_from_file(str(out / "baseline" / "model.safetensors"))
    parameters = sum(parameter.numel() for parameter in baseline.parameters())
    assert result["transfer"]["parameters"] == parameters
    # compression is counted against the network with nothing removed, whatever the transfer removed
    whole = sum(parameter.numel() for parameter in build_network(SMALL, channels=1, classes=5).parameters())
    assert result["baseline"]["parameters"] == whole
    assert result["transfer"]["compression"] == 1 - parameters / whole
    assert (parameters < whole) == (how == "prune")
    (point,) = result["points"]
    assert point["compression"] == 1 - point["parameters"] / whole
    assert point["compression"] >= 0.8


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("how", ["prune", "3"])
def test_a_campaign_that_was_killed_between_two_products_ends_with_equal_bytes(
    zeroout: Zeroout, tmp_path: Path, source: Path, config: Path, how: str
) -> None:
    out = tmp_path / "out"
    what = ("--weights", source, "--from-classes", 5, "--treat", how, "--share", 0.3, "--steps", 2)
    assert zeroout("transfer", config, *what, "--compression", 0.7, "--out", out).code == 0
    products = [out / "result.json", *sorted((out / "recovered").glob("*.safetensors"))]
    products += [out / "baseline" / name for name in ("baseline.json", "model.safetensors", "transferred.safetensors")]
    first = {path: path.read_bytes() for path in products}
    trained = out / "baseline" / "baseline.pt"
    for lost in (products[:-1], [*products, trained]):  # in the training at its last epoch; in the transfer
        for path in lost:
            path.unlink()
        for path in (out / "recovered").glob("*.pt"):
            path.unlink()
        assert zeroout("resume", out).code == 0
        assert {path: path.read_bytes() for path in products} == first


def test_a_network_that_is_compact_from_the_start_is_exported_and_timed_beside_the_whole_one(
    zeroout: Zeroout, tmp_path: Path, source: Path, config: Path
) -> None:
    out = tmp_path / "out"
    what = ("--weights", source, "--from-classes", 5, "--treat", "prune", "--share", 0.3, "--steps", 2)
    ended = zeroout("transfer", config, *what, "--compression", 0.8, "--out", out)
    assert ended.code == 0
    line = "the weakest 30% of each layer's filters by rank were removed, which counts as compression"
    assert line in ended.output
    folder, path = CampaignFolder.open(out), out / "export" / "0.8.safetensors"
    assert line in write_report(folder).read_text().replace("&#x27;", "'").replace("&#39;", "'")
    rows = write_table(folder, [path], repeats=0)["rows"]
    assert [row["network"] for row in rows] == ["original", "0.8"]
    whole = build_network(SMALL, channels=1, classes=5)
    stored = sum(t.numel() * t.element_size() for t in (*whole.parameters(), *whole.buffers()))
    assert rows[0]["bytes"] > stored > rows[1]["bytes"]
    layers = json.loads(path.with_suffix(".json").read_text())["layers"]
    assert all(layer["after"] == len(layer["kept"]) <= layer["before"] for layer in layers)


def test_skip_convolutions_stand_between_what_the_transfer_has_left(tmp_path: Path) -> None:
    network = NetworkConfig(name="resnet18", width=0.1)
    save_file(build_network(network, channels=1, classes=5, seed=3).state_dict(), tmp_path / "w.safetensors")
    text = TINY.replace("width = 0.25", f'name = "resnet18"\nwidth = 0.1\nweights = "{tmp_path / "w.safetensors"}"')
    config = parse(text, ['network.skips="convolution"', 'transfer.how="prune"', "transfer.share=0.4"])
    folder, dataset = CampaignFolder.create(tmp_path / "out", dump(config)), preflight(config)
    with (tmp_path / "log").open("w") as log:
        baseline = prepare(folder, config, dataset, PlainProgress(Console(file=log)))
    skips = [name for name, _ in baseline.network.named_parameters() if name.endswith("shortcut.weight")]
    assert len(skips) == 5
    plan = ChannelPlan(baseline.network, torch.zeros(1, 1, 8, 8))
    whole = build_network(network, channels=1, classes=5)
    assert baseline.given["parameters"] == sum(parameter.numel() for parameter in whole.parameters())
    assert plan.costs(plan.widths)["parameters"] < baseline.given["parameters"]


def mistake(zeroout: Zeroout, out: Path, *arguments: object) -> str:
    """Run a transfer that must be refused: one line, exit 2, no folder made; returns the line."""
    ended = zeroout("transfer", *arguments, "--out", out)
    assert ended.code == 2
    lines = [line for line in ended.error.splitlines() if line]
    assert len(lines) == 1, lines
    assert not out.exists()
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--share", 1.5), "transfer.share: expected a share above 0 and below 1, got 1.5"),
        (("--share", 0.0), "transfer.share: expected a share above 0 and below 1, got 0.0"),
        (("--share", 0.001, "--treat", 2), "transfer.share: expected at least 0.042, one filter of the widest layer"),
        (("--share", 0.6, "--treat", 1), "transfer.share: expected at most 0.5 for replacement 1"),
        (("--treat", 4), "transfer.how: expected one of none, prune"),
        (("--weights", "nowhere.pt"), "nowhere.pt: expected a file, got no such file"),
        (("--from-classes", 7), "got another: its classifier.weight is [5, 24], not [7, 24]; set transfer.classes"),
        (("--from-classes", 1), "transfer.classes: expected a whole number of at least 2"),
        (("--classes", "5"), "data.classes: expected two or more different names"),
        (("--classes", "5,6,5"), "data.classes: expected two or more different names"),
        (("--classes", "5,six"), "data.classes: expected names of these images' classes (0, 1, 2"),
        (("--set", "data.train_per_class=0.5"), "key data.train_per_class"),
        (("--set", "data.train_per_class=-1"), "data.train_per_class: expected a whole number of at least 0, got -1"),
        (("--share", 0.3), "--share: expected --treat beside it, got none"),
        (("--images-per-class", 500), "the training images of class "),
        (("--images-per-class", 3), "training images: expected at least one batch of 20, got 15"),
        (("--set", "data.train_per_class=0", "--set", "data.train_limit=4"), "data.train_limit: expected at least one"),
        (("--set", "data.train_limit=40"), "data.train_per_class: expected 0 beside data.train_limit"),
        (("--treat", "prune", "--share", 0.5, "--compression", 0.2), "episode.targets: expected above 0."),
        (("--compression", 1.5), "--compression: expected a share inside (0, 1), got 1.5"),
        (("--treat", "prune", "--set", 'replacement.how="reinit"'), "replacement.how: expected another after"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_made(
    zeroout: Zeroout,
    tmp_path: Path,
    source: Path,
    config: Path,
    arguments: tuple[object, ...],
    named: str,
) -> None:
    whole = (config, "--weights", source, "--from-classes", 5, *arguments)
    assert named in mistake(zeroout, tmp_path / "out", *whole)


def test_what_comes_from_where_must_be_said(zeroout: Zeroout, tmp_path: Path, source: Path) -> None:
    assert "--weights: expected the state dict" in mistake(zeroout, tmp_path / "out", "--from-classes", 5)
    assert "--from-classes: expected how many" in mistake(zeroout, tmp_path / "out", "--weights", source)


@pytest.mark.usefixtures("no_export")
def test_without_a_config_trainings_are_fitted_to_few_images(
    zeroout: Zeroout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path
) -> None:
    monkeypatch.setattr("deploy.transfer._LEAST_UPDATES", {"baseline": 45, "recovery": 43})
    what = ("--weights", source, "--from-classes", 5, "--classes", "9,8", "--images-per-class", 5, "--steps", 1)
    sets = ("--set", "network.width=0.25", "--set", "recovery.batch_size=5")
    assert zeroout("transfer", *what, *sets, "--compression", 0.5, "--out", tmp_path / "out").code == 0
    resolved = load(tmp_path / "out" / "campaign.toml")
    assert (resolved.data.chosen, resolved.data.train_per_class) == (("9", "8"), 5)
    assert (resolved.baseline.batch_size, resolved.episode.batch_size, resolved.recovery.batch_size) == (2, 2, 5)
    assert (resolved.baseline.epochs, resolved.recovery.epochs) == (20, 20)
    assert resolved.baseline.learning_rate == resolved.recovery.learning_rate == 0.02


def test_few_images_make_small_batches_and_more_epochs_and_many_change_nothing() -> None:
    config = parse("[baseline]\nepochs = 20\nbatch_size = 64\n[recovery]\nepochs = 9\nbatch_size = 64")
    assert for_few_images(config, 50) == [
        "episode.batch_size=8",
        "baseline.batch_size=8",
        "baseline.epochs=50",  # of 6 minibatches
        "recovery.batch_size=8",
        "recovery.epochs=25",
    ]
    assert for_few_images(config, 2)[:3] == ["episode.batch_size=2", "baseline.batch_size=2", "baseline.epochs=300"]
    assert parse(dump(config), for_few_images(config, 10_000)) == config


def test_a_replacement_may_follow_a_transfer(tmp_path: Path) -> None:
    parse(TINY, ['transfer.how="prune"', 'replacement.how="2"'])
    with pytest.raises(UserError, match=r"replacement\.how: expected another after transfer\.how = prune"):
        parse(TINY, ['transfer.how="prune"', 'replacement.how="reinit"'])
