"""Exported files are read back and compared before they take their names, and say what a stranger must know."""

import base64
import errno
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from deploy import cli
from deploy.config import CampaignConfig, dump
from deploy.export import FORMATS, Source, export, load_exported
from deploy.folder import CampaignFolder
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, network_from_file, network_to_bytes
from env.data import load_dataset
from env.errors import UserError, ZerooutError
from env.networks import NetworkConfig

#: Networks as people bring them; `factory` names a function of this module.
MODULE = '''
import torch
from torch import nn


class Depthwise(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.point = nn.Sequential(nn.Conv2d(12, 20, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU())
        self.classifier = nn.Linear(20, classes)

    def forward(self, images):
        return self.classifier(self.point(self.deep(self.stem(images))).mean((2, 3)))


class Viewing(Depthwise):
    """Flattens feature maps with `view`, which channels innermost in memory do not allow."""

    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        self.classifier = nn.Linear(20 * 64, classes)

    def forward(self, images):
        maps = self.point(self.deep(self.stem(images)))
        return self.classifier(maps.view(maps.shape[0], -1))


class Deciding(Depthwise):
    """Takes a branch by the values of its images: no program can be traced."""

    def forward(self, images):
        return super().forward(images * 2 if float(images.sum()) > 0 else images)


def depthwise(*, channels, classes):
    return Depthwise(channels, classes)


def viewing(*, channels, classes):
    return Viewing(channels, classes)


def deciding(*, channels, classes):
    return Deciding(channels, classes)
'''


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "brought", raising=False)


def compacted(form: NetworkForm, seed: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """The network with batch-norm statistics of its own, a compact form of it, and the mask between them."""
    torch.manual_seed(seed)
    network = form.build(seed=seed)
    images = torch.randn(5, form.channels, form.image_size, form.image_size)
    with torch.no_grad():
        network.train()(images)
    plan = ChannelPlan(network.eval(), images[:1])
    keep_mask = torch.rand(plan.units) < 0.6
    keep_mask[[layer.first for layer in plan.layers]] = True
    return network, plan.compact(network, keep_mask).eval(), keep_mask


def finished(path: Path, form: NetworkForm, targets: tuple[float, ...] = (0.5,)) -> CampaignFolder:
    """A finished campaign with one compact network at each target."""
    folder = CampaignFolder.create(path, dump(CampaignConfig(network=form.network)))
    folder.recovered.mkdir()
    folder.baseline.mkdir()
    points, frontier = [], []
    for seed, target in enumerate(targets, start=1):
        network, compact, keep_mask = compacted(form, seed=3)
        model = folder.recovered / f"search-{target}.safetensors"
        model.write_bytes(network_to_bytes(compact, form))
        (folder.baseline / "model.safetensors").write_bytes(network_to_bytes(network, form))
        points.append(
            {
                "target": target, "group": "search", "policy": "controller", "episode": seed, "compression": target,
                "parameters": 4000 + seed, "macs": 70000, "val_accuracy": 0.75, "test_accuracy": 0.5,
                "model": f"recovered/{model.name}",
            }
        )  # fmt: skip
        bits = base64.b64encode(np.packbits(keep_mask.numpy()).tobytes()).decode()
        frontier.append({"groups": {"search": {**points[-1], "keep_bits": bits}}})
    baseline = {"parameters": 9000, "macs": 99000, "val_accuracy": 0.8, "test_accuracy": 0.7}
    folder.result_json.write_text(json.dumps({"baseline": baseline, "points": points}))
    folder.frontier_json.write_text(json.dumps({"targets": frontier}))
    return folder


def brought(function: str) -> NetworkForm:
    return NetworkForm(network=NetworkConfig(factory=f"brought:{function}"), channels=1, classes=10, image_size=8)


TINY = brought("depthwise")
FORMS = {
    "vgg16": NetworkForm(network=NetworkConfig(name="vgg16", width=0.1), channels=3, classes=7, image_size=16),
    "resnet18": NetworkForm(network=NetworkConfig(name="resnet18", width=0.1), channels=3, classes=5, image_size=8),
    "resnet18 with skip convolutions": NetworkForm(
        network=NetworkConfig(name="resnet18", width=0.1, skips="convolution"), channels=3, classes=5, image_size=8
    ),
    "depthwise": TINY,
    "viewing": brought("viewing"),
}


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignFolder:
    return finished(tmp_path / "out", TINY, (0.5, 0.8))


def names(folder: CampaignFolder) -> list[str]:
    return sorted(os.listdir(folder.export))


def no_failures(failure: ZerooutError) -> None:
    raise failure


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_format_of_a_compact_network_runs_at_any_batch_size_and_agrees(form: NetworkForm, tmp_path: Path) -> None:
    _, compact, _ = compacted(form, seed=3)
    source = Source(compact, form, (form.channels, form.image_size, form.image_size))
    for name in reversed(FORMATS):
        path = tmp_path / f"network.{name}"
        path.write_bytes(source.encode(name))
        run = load_exported(path, name)
        for batch in (1, 3, 32):
            images = torch.randn(batch, *source.image_shape)
            with torch.inference_mode():
                expected = compact(images)
            torch.testing.assert_close(run(images), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in compact.parameters())


def test_every_point_is_written_in_every_format_with_a_description(campaign: CampaignFolder) -> None:
    paths = export(campaign, warn=no_failures)
    expected = [f"{target}.{name}" for target in (0.5, 0.8) for name in ("safetensors", "onnx", "pt2")]
    assert [path.name for path in paths] == expected
    assert names(campaign) == sorted([*expected, "0.5.json", "0.8.json"])


def test_a_program_runs_where_our_code_cannot_be_imported(campaign: CampaignFolder, tmp_path: Path) -> None:
    (path,) = export(campaign, compression=0.5, formats=["pt2"], warn=no_failures)
    images = torch.randn(32, 1, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    stranger = f"""
import importlib.util, json, sys
sys.path += {sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})!r}
assert not any(importlib.util.find_spec(room) for room in ("env", "agents", "learner", "actors", "deploy"))
import torch
extra = {{"description.json": ""}}
network = torch.export.load({str(path)!r}, extra_files=extra).module()
assert json.loads(extra["description.json"])["input"]["mean"]
images = torch.load({str(tmp_path / "images.pt")!r})
logits = [network(images[:n]) for n in (1, 3, 32)]
assert not any(part.requires_grad for part in logits)
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    # -S: no .pth file is read, so that an editable install of ours is not on the path; -I: nor is any folder
    subprocess.run([sys.executable, "-I", "-S", "-c", stranger], cwd=tmp_path, check=True, timeout=120)
    network = network_from_file(str(campaign.recovered / "search-0.5.safetensors"))
    for logits in torch.load(tmp_path / "logits.pt"):
        with torch.inference_mode():
            torch.testing.assert_close(logits, network(images[: len(logits)]), rtol=1e-4, atol=1e-5)


def test_files_are_the_same_each_time_and_name_no_folder_of_this_machine(campaign: CampaignFolder) -> None:
    _, compact, _ = compacted(TINY, seed=3)
    for name in FORMATS:
        first, second = (Source(compact, TINY, (1, 8, 8), {"what": "a network"}).encode(name) for _ in range(2))
        assert first == second
        assert str(Path(__file__).parents[2]).encode() not in first
        assert b"site-packages" not in first


def test_the_description_says_how_images_go_in_and_what_became_of_each_layer(campaign: CampaignFolder) -> None:
    export(campaign, compression=0.5, formats=["safetensors"], warn=no_failures)
    said = json.loads((campaign.export / "0.5.json").read_text())
    digits = load_dataset(CampaignConfig().data)
    assert said["input"]["shape"] == ["batch", 1, 8, 8]
    assert (tuple(said["input"]["mean"]), tuple(said["input"]["std"])) == (digits.mean, digits.std)
    assert said["output"]["classes"] == list(digits.classes)
    assert said["compact"]["test_accuracy"] == 0.5
    assert said["original"]["parameters"] == 9000
    network, compact, keep_mask = compacted(TINY, seed=3)
    plan = ChannelPlan(network, torch.zeros(1, 1, 8, 8))
    kept = [set(layer["kept"]) for layer in said["layers"]]
    for layer, told, indices in zip(plan.layers, said["layers"], kept, strict=True):
        units = keep_mask[layer.first : layer.first + layer.units]
        assert indices == set(units.nonzero().flatten().tolist())
        assert (told["before"], told["after"]) == (layer.units, int(units.sum()))
    assert said["modules"]["classifier"] == repr(compact.get_submodule("classifier"))


def test_the_description_lists_the_files_that_are_there_with_how_far_they_differ(campaign: CampaignFolder) -> None:
    (first,) = export(campaign, compression=0.5, formats=["safetensors"], warn=no_failures)
    (second,) = export(campaign, compression=0.5, formats=["pt2"], warn=no_failures)
    files = json.loads((campaign.export / "0.5.json").read_text())["files"]
    assert {name: facts["bytes"] for name, facts in files.items()} == {
        path.name: path.stat().st_size for path in (first, second)
    }
    assert files[first.name]["largest_difference"] == 0.0
    first.unlink()
    export(campaign, compression=0.5, formats=["pt2"], warn=no_failures)
    assert set(json.loads((campaign.export / "0.5.json").read_text())["files"]) == {second.name}


def test_normalisation_and_classes_are_inside_each_file(campaign: CampaignFolder) -> None:
    import onnxruntime

    st, onnx, pt2 = export(campaign, compression=0.8, warn=no_failures)
    with safe_open(st, framework="pt") as file:
        inside = [json.loads(file.metadata()["zeroout"])["description"]]
    metadata = onnxruntime.InferenceSession(str(onnx)).get_modelmeta().custom_metadata_map
    inside.append(json.loads(metadata["description"]))
    extra = {"description.json": ""}
    torch.export.load(pt2, extra_files=extra)
    inside.append(json.loads(extra["description.json"]))
    beside = json.loads((campaign.export / "0.8.json").read_text())
    beside.pop("files")
    assert inside == [beside] * 3


def test_the_onnx_file_names_its_batch_dimension(campaign: CampaignFolder) -> None:
    import onnxruntime

    (path,) = export(campaign, compression=0.8, formats=["onnx"], warn=no_failures)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    assert session.get_outputs()[0].shape == ["batch", 10]


def test_without_images_all_but_their_normalisation_is_told(tmp_path: Path) -> None:
    folder = finished(tmp_path / "out", TINY)
    text = folder.campaign_toml.read_text()
    folder.campaign_toml.write_text(
        text.replace('source = "digits"', 'source = "folder"').replace('path = ""', f'path = "{tmp_path}/none"')
    )
    failures: list[ZerooutError] = []
    paths = export(folder, formats=["safetensors"], warn=failures.append)
    assert [path.name for path in paths] == ["0.5.safetensors"]
    assert "no such path" in str(failures[0])
    assert json.loads((folder.export / "0.5.json").read_text())["input"]["mean"] is None
    digits = load_dataset(CampaignConfig().data)
    export(folder, formats=["safetensors"], dataset=digits, warn=no_failures)
    export(folder, formats=["safetensors"], warn=no_failures)  # from the description, the images being away again
    assert json.loads((folder.export / "0.5.json").read_text())["input"]["mean"] == list(digits.mean)


def test_a_network_that_no_program_can_be_traced_of_is_written_as_safetensors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path / "out", brought("deciding"))
    paths = export(folder)
    assert [path.name for path in paths] == ["0.5.safetensors"]
    assert names(folder) == ["0.5.json", "0.5.safetensors"]
    lines = [record.getMessage() for record in caplog.records if record.name == "deploy.export"]
    for line, name in zip(lines, ("0.5.onnx", "0.5.pt2"), strict=True):
        assert name in line
        assert "data-dependent" in line
        assert "\n" not in line
    assert capfd.readouterr() == ("", "")


def test_the_command_tells_what_it_could_not_write_and_does_not_end_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished(tmp_path / "out", brought("deciding"))
    monkeypatch.setattr(sys, "argv", ["zeroout", "export", str(folder.path), "--repeats", "0"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    output, error = capsys.readouterr()
    assert "0.5.safetensors" in output
    assert len(error.strip().splitlines()) == 2
    assert "export can write" in error


def test_a_file_that_disagrees_is_not_written_and_an_earlier_one_stays(
    campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = export(campaign, compression=0.5, formats=["pt2"], warn=no_failures)
    good, encode = path.read_bytes(), Source.encode
    other = Source(TINY.build(seed=7), TINY, (1, 8, 8))
    monkeypatch.setattr(Source, "encode", lambda self, name: encode(other, name))
    failures: list[ZerooutError] = []
    assert export(campaign, formats=["pt2"], warn=failures.append) == []
    assert all("its logits differ" in str(failure) for failure in failures)
    assert not any(isinstance(failure, UserError) for failure in failures)
    assert len(failures) == 2
    assert path.read_bytes() == good
    assert names(campaign) == ["0.5.json", "0.5.pt2", "0.8.json"]


def test_a_file_that_cannot_be_loaded_is_not_written(campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "encode", lambda self, name: b"no network at all")
    failures: list[ZerooutError] = []
    assert export(campaign, compression=0.5, warn=failures.append) == []
    assert len(failures) == 3
    assert all("cannot be loaded back" in str(failure) and "\n" not in str(failure) for failure in failures)
    assert names(campaign) == ["0.5.json"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_has_no_name_before_it_was_compared(
    name: str, campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def killed(path: Path, name: str) -> None:
        seen.append(names(campaign))
        raise KeyboardInterrupt

    monkeypatch.setattr("deploy.export.load_exported", killed)
    with pytest.raises(KeyboardInterrupt):
        export(campaign, compression=0.5, formats=[name])
    assert [entry.startswith(f".0.5.{name}.") and entry.endswith(".tmp") for entry in seen[0]] == [True]


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(
    campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"writing .*0\.5\.safetensors: .* No space left on device; make room"):
        export(campaign, compression=0.5)
    assert names(campaign) == []


def test_an_export_folder_that_cannot_be_made_is_one_clear_line(campaign: CampaignFolder) -> None:
    campaign.export.write_text("a file where the folder goes")
    with pytest.raises(UserError, match=r"writing .*export: .* File exists"):
        export(campaign)


def test_a_point_or_format_that_is_not_there_is_named(campaign: CampaignFolder) -> None:
    for absent in (0.65, float("nan")):
        with pytest.raises(UserError, match=r"one of 0\.5, 0\.8"):
            export(campaign, compression=absent)
    with pytest.raises(UserError, match=r"safetensors \| onnx \| pt2, got 'tflite'"):
        export(campaign, formats=["tflite"])
    assert not campaign.export.exists()


@pytest.mark.parametrize("missing", ["recovered/search-0.5.safetensors", "baseline/model.safetensors"])
def test_a_missing_network_is_named_with_what_makes_it_anew(missing: str, campaign: CampaignFolder) -> None:
    (campaign.path / missing).unlink()
    with pytest.raises(UserError, match=rf"{missing}: .* no such file; zeroout resume {campaign.path}"):
        export(campaign)


@pytest.mark.parametrize("result", [{}, [], {"points": []}, {"points": [{"target": 0.5}]}])
def test_a_result_without_networks_is_told(result: object, campaign: CampaignFolder) -> None:
    campaign.result_json.write_text(json.dumps(result))
    for compression in (None, 0.5):
        with pytest.raises(UserError, match=r"result\.json: expected points, each with its target and model"):
            export(campaign, compression=compression)


def test_masks_of_another_plan_are_not_told_as_kept_filters(campaign: CampaignFolder) -> None:
    frontier = json.loads(campaign.frontier_json.read_text())
    for target in frontier["targets"]:
        target["groups"]["search"]["keep_bits"] = base64.b64encode(b"\xff" * 9).decode()
    campaign.frontier_json.write_text(json.dumps(frontier))
    export(campaign, formats=["safetensors"], warn=no_failures)
    said = json.loads((campaign.export / "0.5.json").read_text())
    assert [layer["kept"] for layer in said["layers"]] == [None] * len(said["layers"])
    assert all(layer["after"] <= layer["before"] for layer in said["layers"])
