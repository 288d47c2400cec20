"""Exported files are read back and compared before they are called done."""

import json
from pathlib import Path

import pytest
import torch

from deploy.config import CampaignConfig, dump
from deploy.export import export, onnx_bytes
from deploy.folder import CampaignFolder
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, network_from_file, network_to_bytes
from env.errors import UserError, ZerooutError
from env.networks import NetworkConfig


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignFolder:
    """A finished campaign with one compact network at each of two targets."""
    folder = CampaignFolder.create(tmp_path / "out", dump(CampaignConfig()))
    folder.recovered.mkdir()
    form = NetworkForm(network=NetworkConfig(width=0.2), channels=1, classes=10, image_size=8)
    network = form.build(seed=1)
    plan = ChannelPlan(network, torch.zeros(1, 1, 8, 8))
    points = []
    for target, seed in ((0.5, 1), (0.8, 2)):
        keep_mask = torch.rand(plan.units, generator=torch.Generator().manual_seed(seed)) > target / 2
        model = folder.recovered / f"search-{target}.safetensors"
        model.write_bytes(network_to_bytes(plan.compact(network, keep_mask), form))
        points.append({"target": target, "model": f"recovered/{model.name}"})
    folder.result_json.write_text(json.dumps({"points": points}))
    return folder


def test_every_point_is_written_in_every_format(campaign: CampaignFolder) -> None:
    paths = export(campaign)
    assert sorted(path.name for path in paths) == ["0.5.onnx", "0.5.safetensors", "0.8.onnx", "0.8.safetensors"]
    assert all(path.is_file() for path in paths)


def test_onnx_takes_any_batch_size_and_agrees_with_the_network(campaign: CampaignFolder) -> None:
    import onnxruntime

    (path,) = export(campaign, compression=0.8, formats=["onnx"])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    network = network_from_file(str(campaign.recovered / "search-0.8.safetensors"))
    for batch in (1, 2, 7):
        images = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            expected = network(images).numpy()
        assert session.run(None, {"images": images.numpy()})[0] == pytest.approx(expected, abs=1e-4)


def test_a_file_that_disagrees_is_removed_and_said_so(
    campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = NetworkForm(network=NetworkConfig(width=0.2), channels=1, classes=10, image_size=8).build(seed=7)
    monkeypatch.setattr("deploy.export.onnx_bytes", lambda network, example: onnx_bytes(other, example))
    with pytest.raises(ZerooutError, match="its logits differ"):
        export(campaign, compression=0.5, formats=["onnx"])
    assert not (campaign.export / "0.5.onnx").exists()


def test_a_point_or_format_that_is_not_there_is_named(campaign: CampaignFolder) -> None:
    with pytest.raises(UserError, match=r"one of 0\.5, 0\.8"):
        export(campaign, compression=0.65)
    with pytest.raises(UserError, match=r"safetensors \| onnx"):
        export(campaign, formats=["tflite"])
