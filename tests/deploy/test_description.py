"""The description beside an exported network says what a stranger must know, and no more than is known."""

import base64
import json
from pathlib import Path

import torch
from finished_campaign import TINY, compacted, finished, no_failures

from deploy.config import CampaignConfig
from deploy.export import export
from deploy.folder import CampaignFolder
from env.channels import ChannelPlan
from env.data import load_dataset
from env.errors import ZerooutError


def test_the_description_says_how_images_go_in_and_what_became_of_each_layer(campaign: CampaignFolder) -> None:
    export(campaign, compression=0.5, formats=["safetensors"], warn=no_failures)
    said = json.loads((campaign.export / "0.5.json").read_text())
    digits = load_dataset(CampaignConfig().data)
    assert said["input"]["shape"] == ["batch", 1, 8, 8]
    assert (tuple(said["input"]["mean"]), tuple(said["input"]["std"])) == (digits.mean, digits.std)
    assert said["output"]["classes"] == list(digits.classes)
    assert said["compact"]["test_accuracy"] == 0.5
    assert said["original"]["parameters"] == 9000
    network, compact, keep_mask = compacted(TINY)
    plan = ChannelPlan(network, torch.zeros(1, 1, 8, 8))
    kept = [set(layer["kept"]) for layer in said["layers"]]
    for layer, told, indices in zip(plan.layers, said["layers"], kept, strict=True):
        units = keep_mask[layer.first : layer.first + layer.units]
        assert indices == set(units.nonzero().flatten().tolist())
        assert (told["before"], told["after"]) == (layer.units, int(units.sum()))
    assert said["modules"]["classifier"] == repr(compact.get_submodule("classifier"))


def test_the_description_lists_the_files_that_are_there_with_how_far_they_differ(
    exported: tuple[CampaignFolder, list[Path]],
) -> None:
    folder, paths = exported
    st, onnx, pt2 = paths
    files = json.loads((folder.export / "0.8.json").read_text())["files"]
    assert {name: facts["bytes"] for name, facts in files.items()} == {
        path.name: path.stat().st_size for path in (st, onnx, pt2)
    }
    # the description's length moves the tensors behind it in memory, which may turn the last bit of a sum
    assert files[st.name]["largest_difference"] < 1e-6
    onnx.unlink()
    export(folder, compression=0.8, formats=["safetensors"], warn=no_failures)
    now = json.loads((folder.export / "0.8.json").read_text())["files"]
    assert set(now) == {st.name, pt2.name}
    assert now[pt2.name] == files[pt2.name]


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


def test_masks_of_another_plan_are_not_told_as_kept_filters(campaign: CampaignFolder) -> None:
    frontier = json.loads(campaign.frontier_json.read_text())
    for target in frontier["targets"]:
        target["groups"]["search"]["keep_bits"] = base64.b64encode(b"\xff" * 9).decode()
    campaign.frontier_json.write_text(json.dumps(frontier))
    export(campaign, formats=["safetensors"], warn=no_failures)
    said = json.loads((campaign.export / "0.5.json").read_text())
    assert [layer["kept"] for layer in said["layers"]] == [None] * len(said["layers"])
    assert all(layer["after"] <= layer["before"] for layer in said["layers"])
