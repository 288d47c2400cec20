"""Int8 files: smaller, per channel, nearly as accurate, the same each time, and told with what they cost."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command import Zeroout
from finished_campaign import brought, compacted, finished, no_failures, trained

from deploy import quantize
from deploy.folder import CampaignFolder
from deploy.formats import INT8, Source, load_exported
from deploy.latency import write_table
from deploy.quantize import CALIBRATION_IMAGES, accuracy, calibration_images, export_int8
from env.augment import normalise
from env.compact_file import NetworkForm, form_of_file, network_from_file
from env.data import DataConfig, Dataset, load_dataset
from env.errors import UserError, ZerooutError

DIGITS = load_dataset(DataConfig())
TOLERANCE = 0.02  # of accuracy on 269 test images: five of them


@pytest.fixture(scope="session")
def quantized_once(tmp_path_factory: pytest.TempPathFactory) -> CampaignFolder:
    """A campaign with trained networks, exported in int8; not to be changed."""
    folder = trained(tmp_path_factory.mktemp("quantized") / "out")
    export_int8(folder, warn=no_failures)
    return folder


@pytest.fixture
def quantized(quantized_once: CampaignFolder, tmp_path: Path) -> CampaignFolder:
    """A copy of such a campaign."""
    return CampaignFolder(Path(shutil.copytree(quantized_once.path, tmp_path / "out")))


@pytest.fixture(scope="session")
def float_onnx(quantized_once: CampaignFolder) -> bytes:
    """The baseline of that campaign as a float ONNX file."""
    path = str(quantized_once.baseline / "model.safetensors")
    return Source(network_from_file(path), form_of_file(path), (1, 8, 8)).encode("onnx")


@pytest.fixture
def quickly(quantized_once: CampaignFolder, float_onnx: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is traced and quantized in this test: every ONNX file is that of another network."""
    made = (quantized_once.export / f"0.5.{INT8}").read_bytes()
    monkeypatch.setattr(Source, "encode", lambda source, name: float_onnx)
    monkeypatch.setattr(quantize, "quantize", lambda model, images: made)


def facts_of(folder: CampaignFolder, network: str) -> dict[str, Any]:
    """What the description beside an int8 file says of it."""
    facts: dict[str, Any] = json.loads((folder.export / f"{network}.json").read_text())["files"][f"{network}.{INT8}"]
    return facts


def test_the_baseline_and_every_point_are_written(quantized: CampaignFolder) -> None:
    names = ["0.5.int8.onnx", "0.5.json", "baseline.int8.onnx", "baseline.json"]
    assert sorted(os.listdir(quantized.export)) == names


@pytest.mark.usefixtures("quickly")
def test_one_point_is_chosen_by_its_compression(campaign: CampaignFolder) -> None:
    paths = export_int8(campaign, compression=0.8, warn=no_failures)
    assert [path.name for path in paths] == ["baseline.int8.onnx", "0.8.int8.onnx"]
    with pytest.raises(UserError, match=r"--compression: expected one of 0\.5, 0\.8, got 0\.6"):
        export_int8(campaign, compression=0.6, warn=no_failures)


def test_a_file_is_smaller_than_the_float_one(quantized: CampaignFolder, float_onnx: bytes) -> None:
    assert facts_of(quantized, "baseline")["bytes"] < 0.4 * len(float_onnx)
    assert (quantized.export / f"baseline.{INT8}").stat().st_size == facts_of(quantized, "baseline")["bytes"]


@pytest.mark.parametrize("network", ["baseline", "0.5"])
def test_a_file_runs_at_any_batch_size(network: str, quantized: CampaignFolder) -> None:
    run = load_exported(quantized.export / f"{network}.{INT8}", INT8)
    images = normalise(DIGITS.test.images[:32], DIGITS.mean, DIGITS.std)
    together = run(images)
    assert together.shape == (32, 10)
    for batch in (1, 3):
        torch.testing.assert_close(run(images[:batch]), together[:batch], rtol=1e-3, atol=1e-3)


def test_the_accuracies_are_those_of_the_file_and_near_those_in_float(quantized: CampaignFolder) -> None:
    result = json.loads(quantized.result_json.read_text())
    for network, known in (("baseline", result["baseline"]), ("0.5", result["points"][0])):
        run, told = load_exported(quantized.export / f"{network}.{INT8}", INT8), facts_of(quantized, network)
        assert known["test_accuracy"] > 0.85
        for key, split in (("val_accuracy", DIGITS.validation), ("test_accuracy", DIGITS.test)):
            right = run(normalise(split.images, DIGITS.mean, DIGITS.std)).argmax(1) == split.labels
            assert told[key] == pytest.approx(float(right.float().mean()))
            assert abs(told[key] - known[key]) <= TOLERANCE


def test_accuracy_counts_the_last_batch_that_is_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_JUDGED", 50)
    seen = []

    def always_three(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return torch.eye(10)[[3] * len(images)]

    threes = int((DIGITS.test.labels == 3).sum())
    assert accuracy(always_three, DIGITS.test, DIGITS) == threes / len(DIGITS.test)
    assert seen == [50] * 5 + [19]


def test_weights_have_a_scale_for_each_channel_and_stay_within_seven_bits(quantized: CampaignFolder) -> None:
    graph = onnx.load(quantized.export / f"baseline.{INT8}").graph
    values = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    operators = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert [node.op_type for node in operators] == ["Conv"] * 6 + ["Gemm"]
    for node in operators:
        assert maker[node.input[0]].op_type == "DequantizeLinear"
        weight, scale, _ = (values[name] for name in maker[node.input[1]].input)
        assert weight.dtype == np.int8
        assert np.abs(weight.astype(int)).max() <= 64
        assert scale.shape == (weight.shape[0],)
        assert len(set(scale.tolist())) > 1


def test_batch_norm_and_relu_are_gone_into_the_convolutions(quantized: CampaignFolder) -> None:
    graph = onnx.load(quantized.export / f"baseline.{INT8}").graph
    assert not {"BatchNormalization", "Relu"} & {node.op_type for node in graph.node}


def test_the_same_bytes_come_each_time(float_onnx: bytes) -> None:
    first, second = (quantize.quantize(float_onnx, calibration_images(DIGITS, seed=0)) for _ in range(2))
    assert first == second


def test_a_file_names_no_folder_of_this_machine(quantized: CampaignFolder) -> None:
    data = (quantized.export / f"0.5.{INT8}").read_bytes()
    for folder in (tempfile.gettempdir(), str(Path(__file__).parents[2]), "site-packages"):
        assert folder.encode() not in data


def test_nothing_stays_in_the_folder_for_temporary_files(
    float_onnx: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    quantize.quantize(float_onnx, calibration_images(DIGITS, seed=0))
    assert os.listdir(tmp_path) == []


def test_calibration_images_are_drawn_by_the_seed_from_training_and_not_augmented() -> None:
    images = calibration_images(DIGITS, seed=3)
    assert images.shape == (CALIBRATION_IMAGES, 1, 8, 8)
    assert torch.equal(images, calibration_images(DIGITS, seed=3))
    assert not torch.equal(images, calibration_images(DIGITS, seed=4))
    known = {image.numpy().tobytes() for image in normalise(DIGITS.train.images, DIGITS.mean, DIGITS.std)}
    assert len({image.numpy().tobytes() for image in images} & known) > 500  # a few digits are there twice


@pytest.mark.usefixtures("quickly")
def test_where_there_are_fewer_training_images_all_are_used_and_that_is_told(tmp_path: Path) -> None:
    folder = finished(tmp_path / "out", brought("depthwise"))
    text = folder.campaign_toml.read_text()
    folder.campaign_toml.write_text(text.replace("train_limit = 0", "train_limit = 20"))
    export_int8(folder, warn=no_failures)
    assert facts_of(folder, "0.5")["calibration_images"] == 20


def test_the_description_is_inside_and_beside_with_how_it_was_calibrated(quantized: CampaignFolder) -> None:
    model = onnx.load(quantized.export / f"0.5.{INT8}")
    inside = {entry.key: entry.value for entry in model.metadata_props}
    assert list(inside) == ["description"]
    beside = json.loads((quantized.export / "0.5.json").read_text())
    files = beside.pop("files")
    assert json.loads(inside["description"]) == beside
    assert files[f"0.5.{INT8}"]["calibration_images"] == CALIBRATION_IMAGES
    assert files[f"0.5.{INT8}"]["format"] == INT8
    assert "removed" in beside["what"]
    baseline = json.loads((quantized.export / "baseline.json").read_text())
    assert "before zeroout removed anything" in baseline["what"]
    assert baseline["compact"]["compression"] == 0.0
    assert all(layer["before"] == layer["after"] for layer in baseline["layers"])


def test_the_command_prints_accuracies_beside_float_and_keeps_them_in_the_table(
    quantized: CampaignFolder, zeroout: Zeroout
) -> None:
    code, error, output = zeroout("export", quantized.path, "--repeats", 0, "--int8", "--format", "safetensors")
    assert (code, error) == (0, "")
    assert [line.rpartition("/")[2] for line in output.splitlines() if line.startswith("/")] == [
        "0.5.safetensors", "0.5.onnx", "baseline.int8.onnx", "0.5.int8.onnx",
    ]  # fmt: skip
    rows = json.loads((quantized.export / "table.json").read_text())["rows"]
    assert [(row["network"], row["runtime"]) for row in rows] == [
        ("original", "torch, eager"), ("original", "onnxruntime"), ("original", "onnxruntime, int8"),
        ("0.5", "torch, eager"), ("0.5", "onnxruntime"), ("0.5", "onnxruntime, int8"),
    ]  # fmt: skip
    result = json.loads(quantized.result_json.read_text())
    for row in rows:
        known = result["baseline"] if row["network"] == "original" else result["points"][0]
        if row["format"] == INT8:
            known = facts_of(quantized, "baseline" if row["network"] == "original" else "0.5")
        assert {row[key] == known[key] for key in ("val_accuracy", "test_accuracy")} == {True}
        assert {"parameters", "macs", "bytes"} <= set(row)
    lines = [line.split() for line in output.splitlines() if line.strip().startswith(("original ", "0.5 "))]
    kinds = [(line[0], line[1]) for line in lines if line[1] in ("float32", "int8")]
    assert kinds == [(network, kind) for network in ("original", "0.5") for kind in ("float32", "int8")]


def test_int8_is_timed_beside_the_original_in_float(quantized: CampaignFolder) -> None:
    path = quantized.export / f"0.5.{INT8}"
    original, row = write_table(quantized, [path], repeats=1)["rows"]
    assert (original["network"], original["format"]) == ("original", "onnx")
    for batch in ("1", "32"):
        speedup = original["latency"][batch]["median_ms"] / row["latency"][batch]["median_ms"]
        assert row["speedup"][batch] == pytest.approx(speedup)


@pytest.mark.usefixtures("quickly")
def test_where_skip_convolutions_were_added_the_baseline_stands_beside_itself(tmp_path: Path) -> None:
    folder = finished(tmp_path / "out", brought("residual", skips="convolution"))
    paths = export_int8(folder, warn=no_failures)
    rows = write_table(folder, paths, repeats=0)["rows"]
    assert [(row["network"], row["format"]) for row in rows] == [
        ("original", "onnx"), ("baseline", "onnx"), ("baseline", INT8), ("0.5", INT8),
    ]  # fmt: skip
    assert [row["test_accuracy"] for row in rows[:2]] == [None, 0.7]
    network = network_from_file(str(folder.baseline / "model.safetensors"))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert [row["parameters"] for row in rows] == [9000, parameters, parameters, 4001]


@pytest.mark.parametrize(
    "form", [brought("residual", skips="convolution"), brought("viewing")], ids=lambda f: f.network.factory
)
def test_sums_depthwise_convolutions_and_views_are_quantized_too(form: NetworkForm, tmp_path: Path) -> None:
    _, network, _ = compacted(form)
    images = calibration_images(DIGITS, seed=0)
    path = tmp_path / f"any.{INT8}"
    path.write_bytes(quantize.quantize(Source(network, form, (1, 8, 8)).encode("onnx"), images))
    with torch.inference_mode():
        expected = network(images[:32])
    difference = load_exported(path, INT8)(images[:32]) - expected
    assert difference.square().mean() < 0.1**2 * expected.square().mean()


def test_a_campaign_that_is_not_finished_is_told(campaign: CampaignFolder, zeroout: Zeroout) -> None:
    campaign.result_json.unlink()
    code, error, _ = zeroout("export", campaign.path, "--repeats", 0, "--int8")
    assert code == 2
    assert error.strip().endswith(f"got none yet; zeroout resume {campaign.path}")
    assert len(error.splitlines()) == 1


def gone(folder: CampaignFolder) -> None:
    """The configuration now names a folder of images that is not there."""
    text = folder.campaign_toml.read_text()
    for old, new in (('source = "digits"', 'source = "folder"'), ('path = ""', 'path = "/nowhere/images"')):
        assert old in text
        text = text.replace(old, new, 1)
    folder.campaign_toml.write_text(text)


def test_images_that_are_gone_are_told_in_a_line_and_the_float_files_are_written(
    quantized: CampaignFolder, zeroout: Zeroout
) -> None:
    before = (quantized.export / f"0.5.{INT8}").read_bytes()
    gone(quantized)
    code, error, output = zeroout("export", quantized.path, "--repeats", 0, "--int8", "--format", "safetensors")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert "export --int8: expected the campaign's images" in error
    assert "/nowhere/images" in error
    assert "put the images back" in error
    assert "0.5.onnx" in output
    assert (quantized.export / "table.json").is_file()
    assert (quantized.export / f"0.5.{INT8}").read_bytes() == before


def test_images_that_have_changed_since_are_told(quantized: CampaignFolder) -> None:
    failures: list[ZerooutError] = []
    other = load_dataset(DataConfig(split_seed=1))
    assert export_int8(quantized, dataset=other, warn=failures.append) == []
    (failure,) = failures
    assert "expected the images that the campaign was trained with" in str(failure)


def test_a_network_that_cannot_be_onnx_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    failures: list[ZerooutError] = []
    folder = finished(tmp_path / "out", brought("counting"))
    assert export_int8(folder, warn=failures.append) == []
    for failure, name in zip(failures, ("baseline", "0.5"), strict=True):
        assert f"{name}.{INT8}: expected a network that torch.onnx can write for any batch of images" in str(failure)
        assert str(failure).endswith("or leave --int8 out")
        assert "\n" not in str(failure)


def test_what_cannot_be_quantized_is_told_in_a_line_and_an_earlier_file_stays(
    quantized: CampaignFolder, quickly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(model: bytes, images: torch.Tensor) -> bytes:
        raise ValueError("an odd operator\nand a page of advice")

    before = (quantized.export / f"0.5.{INT8}").read_bytes()
    monkeypatch.setattr(quantize, "quantize", odd)
    failures: list[ZerooutError] = []
    assert export_int8(quantized, warn=failures.append) == []
    assert len(failures) == 2
    for failure in failures:
        assert isinstance(failure, UserError)
        assert "got ValueError: an odd operator; " in str(failure)
    assert (quantized.export / f"0.5.{INT8}").read_bytes() == before


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("logits", "said"),
    [(torch.full((1, 10), torch.nan), "its logits for 3 image(s)"), (None, "cannot be run (RuntimeError: no kernel)")],
)
def test_a_file_that_does_not_run_never_takes_its_name(
    logits: torch.Tensor | None, said: str, quantized: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        assert path.name.endswith(".tmp")
        if logits is None:
            raise RuntimeError("no kernel")
        return lambda images: logits.expand(len(images), -1)

    (quantized.export / f"0.5.{INT8}").unlink()
    monkeypatch.setattr(quantize, "load_exported", load)
    failures: list[ZerooutError] = []
    assert export_int8(quantized, warn=failures.append) == []
    assert all(said in str(failure) for failure in failures)
    assert sorted(os.listdir(quantized.export)) == ["0.5.json", "baseline.int8.onnx", "baseline.json"]


def test_quantizing_says_nothing_on_the_terminal(float_onnx: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    quantize.quantize(float_onnx, calibration_images(DIGITS, seed=0))
    assert capfd.readouterr() == ("", "")


def test_a_network_that_cannot_be_run_for_calibration_is_told(
    quantized: CampaignFolder, float_onnx: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load_from_string(float_onnx)
    model.graph.node[-1].domain = "of.nobody"
    monkeypatch.setattr(Source, "encode", lambda source, name: model.SerializeToString())
    failures: list[ZerooutError] = []
    assert export_int8(quantized, warn=failures.append) == []
    assert all("expected a network that onnxruntime can quantize" in str(failure) for failure in failures)
    assert all(len(str(failure)) < 600 and "\n" not in str(failure) for failure in failures)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("quickly")
def test_images_given_are_those_used(campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(config: DataConfig) -> Dataset:
        raise AssertionError("images were loaded again")

    monkeypatch.setattr(quantize, "load_dataset", never)
    assert len(export_int8(campaign, dataset=DIGITS, warn=no_failures)) == 3
