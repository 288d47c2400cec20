"""Exported files are read back and compared before they take their names; what cannot be written is told."""

import errno
import json
import os
from pathlib import Path

import pytest
from command import Zeroout
from finished_campaign import TINY, brought, finished, no_failures
from rich.console import Console

from deploy import cli
from deploy.export import export
from deploy.folder import CampaignFolder
from deploy.formats import FORMATS, Source
from env.errors import UserError, ZerooutError


def names(folder: CampaignFolder) -> list[str]:
    return sorted(os.listdir(folder.export))


def test_every_point_is_written_in_every_format_asked_with_a_description(campaign: CampaignFolder) -> None:
    paths = export(campaign, formats=["safetensors", "pt2"], warn=no_failures)
    expected = [f"{target}.{name}" for target in (0.5, 0.8) for name in ("safetensors", "pt2")]
    assert [path.name for path in paths] == expected
    assert names(campaign) == sorted([*expected, "0.5.json", "0.8.json"])


def test_one_point_is_written_in_every_format_there_is(exported: tuple[CampaignFolder, list[Path]]) -> None:
    folder, paths = exported
    assert [path.name for path in paths] == ["0.8.safetensors", "0.8.onnx", "0.8.pt2"]
    assert names(folder) == ["0.8.json", "0.8.onnx", "0.8.pt2", "0.8.safetensors"]


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


def test_a_forward_that_fixes_the_number_of_images_is_told_with_what_to_change(tmp_path: Path) -> None:
    failures: list[ZerooutError] = []
    paths = export(finished(tmp_path / "out", brought("counting")), warn=failures.append)
    assert [path.name for path in paths] == ["0.5.safetensors"]
    assert len(failures) == 2
    for failure in failures:
        assert "for any batch of images, got a forward that fixes how many there are; " in str(failure)
        assert "from x.shape[0], not from len(x)" in str(failure)


def test_a_campaign_ends_with_the_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path / "out", brought("counting"))
    export(folder)
    result = json.loads(folder.result_json.read_text())
    cli._print_result(Console(width=200), folder, {**result, "measure": "parameters", "comparison": result["points"]})
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"not among the models: 0.5.onnx, 0.5.pt2; zeroout export {folder.path} says why"


def test_the_command_tells_what_it_could_not_write_and_does_not_end_with_0(zeroout: Zeroout, tmp_path: Path) -> None:
    folder = finished(tmp_path / "out", brought("deciding"))
    code, error, output = zeroout("export", folder.path, "--repeats", 0)
    assert code == 2
    assert "0.5.safetensors" in output
    assert len(error.strip().splitlines()) == 2
    assert "export can write" in error


def test_a_file_that_disagrees_is_not_written_and_an_earlier_one_stays(
    campaign: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = export(campaign, compression=0.5, formats=["safetensors"], warn=no_failures)
    good, encode = path.read_bytes(), Source.encode
    other = Source(TINY.build(seed=7), TINY, (1, 8, 8))
    monkeypatch.setattr(Source, "encode", lambda self, name: encode(other, name))
    failures: list[ZerooutError] = []
    assert export(campaign, formats=["safetensors"], warn=failures.append) == []
    assert all("its logits differ" in str(failure) for failure in failures)
    assert not any(isinstance(failure, UserError) for failure in failures)
    assert len(failures) == 2
    assert path.read_bytes() == good
    assert names(campaign) == ["0.5.json", "0.5.safetensors", "0.8.json"]


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
    monkeypatch.setattr(Source, "encode", lambda self, name: b"any")
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
