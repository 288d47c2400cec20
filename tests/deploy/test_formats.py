"""A network is the same in every format, and each file can be taken away by a stranger."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from finished_campaign import TINY, brought, compacted
from safetensors import safe_open
from torch import nn

from deploy.folder import CampaignFolder
from deploy.formats import FORMATS, Source, load_exported
from env.compact_file import NetworkForm, form_of_file, network_from_file
from env.networks import NetworkConfig

FORMS = {
    "vgg16": NetworkForm(network=NetworkConfig(name="vgg16", width=0.1), channels=3, classes=7, image_size=16),
    "residual": brought("residual"),
    "residual with skip convolutions": brought("residual", skips="convolution"),
    "viewing": brought("viewing"),
}


def assert_agrees(path: Path, network: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """The file runs at any batch size, with the network's logits."""
    run = load_exported(path, path.suffix.removeprefix("."))
    for batch in (1, 3, 32):
        images = torch.randn(batch, *image_shape)
        with torch.inference_mode():
            expected = network(images)
        torch.testing.assert_close(run(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_format_of_a_compact_network_runs_at_any_batch_size_and_agrees(form: NetworkForm, tmp_path: Path) -> None:
    _, compact, _ = compacted(form)
    source = Source(compact, form, (form.channels, form.image_size, form.image_size))
    for name in reversed(FORMATS):
        path = tmp_path / f"network.{name}"
        path.write_bytes(source.encode(name))
        assert_agrees(path, compact, source.image_shape)
    assert all(parameter.requires_grad for parameter in compact.parameters())


def test_the_files_of_an_export_run_at_any_batch_size_and_agree(exported: tuple[CampaignFolder, list[Path]]) -> None:
    _, compact, _ = compacted(TINY)
    for path in exported[1]:
        assert_agrees(path, compact, (1, 8, 8))


def test_files_are_the_same_each_time_and_name_no_folder_of_this_machine(
    exported: tuple[CampaignFolder, list[Path]],
) -> None:
    folder, paths = exported
    model = str(folder.recovered / "search-0.8.safetensors")
    description = json.loads((folder.export / "0.8.json").read_text())
    description.pop("files")
    again = Source(network_from_file(model), form_of_file(model), (1, 8, 8), description)
    for path, name in zip(paths, FORMATS, strict=True):
        first = path.read_bytes()
        assert first == again.encode(name)
        assert str(Path(__file__).parents[2]).encode() not in first
        assert b"site-packages" not in first


def test_a_program_runs_where_our_code_cannot_be_imported(
    exported: tuple[CampaignFolder, list[Path]], tmp_path: Path
) -> None:
    folder, _ = exported
    path = folder.export / "0.8.pt2"
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
    network = network_from_file(str(folder.recovered / "search-0.8.safetensors"))
    for logits in torch.load(tmp_path / "logits.pt"):
        with torch.inference_mode():
            torch.testing.assert_close(logits, network(images[: len(logits)]), rtol=1e-4, atol=1e-5)


def test_normalisation_and_classes_are_inside_each_file(exported: tuple[CampaignFolder, list[Path]]) -> None:
    import onnxruntime

    folder, paths = exported
    st, onnx, pt2 = paths
    with safe_open(st, framework="pt") as file:
        inside = [json.loads(file.metadata()["zeroout"])["description"]]
    metadata = onnxruntime.InferenceSession(str(onnx)).get_modelmeta().custom_metadata_map
    inside.append(json.loads(metadata["description"]))
    extra = {"description.json": ""}
    torch.export.load(pt2, extra_files=extra)
    inside.append(json.loads(extra["description.json"]))
    beside = json.loads((folder.export / "0.8.json").read_text())
    beside.pop("files")
    assert inside == [beside] * 3


def test_the_onnx_file_names_its_batch_dimension(exported: tuple[CampaignFolder, list[Path]]) -> None:
    import onnxruntime

    folder, _ = exported
    session = onnxruntime.InferenceSession(str(folder.export / "0.8.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    assert session.get_outputs()[0].shape == ["batch", 10]
