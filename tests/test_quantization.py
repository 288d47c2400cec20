"""The comparison of pruned and quantized networks, on tiny campaigns, and its arithmetic by hand."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_campaign import trained

from benchmarks import quantization
from benchmarks.quantization import NETWORKS, ratio, row, summary
from deploy.folder import CampaignFolder


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory: pytest.TempPathFactory) -> list[CampaignFolder]:
    """Two finished campaigns that differ in their seed."""
    found = [trained(tmp_path_factory.mktemp(f"seed-{seed}") / "out", (0.5, 0.8), seed=seed) for seed in (0, 1)]
    return found


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """The command with these arguments; threads are then as they were."""
    monkeypatch.setattr(sys, "argv", ["quantization", *map(str, words)])
    before = torch.get_num_threads()
    try:
        quantization.main()
    finally:
        torch.set_num_threads(before)


def test_two_campaigns_make_a_page_and_its_numbers(
    campaigns: list[CampaignFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [folder.path for folder in campaigns]
    before = [sorted(path.rglob("*")) for path in paths]
    run(monkeypatch, "--campaign", *paths, "--rounds", 3, "--out", tmp_path)
    text = (tmp_path / "quantization.md").read_text()
    assert text in capsys.readouterr().out
    told = json.loads((tmp_path / "quantization.json").read_text())
    assert [campaign["seed"] for campaign in told["campaigns"]] == [0, 1]
    assert [campaign["target"] for campaign in told["campaigns"]] == [0.8, 0.8]
    assert {"onnxruntime", "torch"} <= set(told["versions"])
    assert list(told["summary"]) == list(NETWORKS)
    for campaign, folder in zip(told["campaigns"], campaigns, strict=True):
        networks, result = campaign["networks"], json.loads(folder.result_json.read_text())
        assert networks["pruned"]["test_accuracy"] == pytest.approx(result["points"][1]["test_accuracy"], abs=0.005)
        assert abs(networks["pruned int8"]["test_accuracy"] - networks["pruned"]["test_accuracy"]) <= 0.02
        assert networks["baseline int8"]["bytes"] < 0.5 * networks["baseline"]["bytes"]
        assert campaign["largest_difference_to_campaign"] < 0.005
        assert campaign["calibration_images"] == 512
        assert networks["baseline"]["ratio"]["1"]["median"] == 1.0
        assert all(facts["latency"][batch]["n"] == 3 for facts in networks.values() for batch in ("1", "32"))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in lines if cells[1] == "2"] == list(NETWORKS)
    assert [cells[:2] for cells in lines if cells[0] in ("0", "1")] == [[s, n] for s in ("0", "1") for n in NETWORKS]
    assert {len(cells) for cells in lines} == {11, 10}
    assert all(all(cells) for cells in lines if cells[0] in ("0", "1", "pruned int8"))
    assert [sorted(path.rglob("*")) for path in paths] == before


def of(**changes: Any) -> dict[str, Any]:
    """A network of one campaign with figures that are easy to reckon with."""
    known = {"bytes": 100, "val_accuracy": 0.9, "test_accuracy": 0.8, "ms": 4.0, "ratio": 1.0, **changes}
    return {
        **{key: known[key] for key in ("bytes", "val_accuracy", "test_accuracy")},
        "latency": {batch: {"median_ms": known["ms"]} for batch in ("1", "32")},
        "ratio": {batch: {"median": known["ratio"]} for batch in ("1", "32")},
    }


def two() -> list[dict[str, Any]]:
    """Two campaigns in which all networks but one are alike."""
    first = dict.fromkeys(NETWORKS, of()) | {"pruned int8": of(bytes=20, test_accuracy=0.76, ms=1.0, ratio=4.0)}
    second = dict.fromkeys(NETWORKS, of(test_accuracy=0.9, ratio=2.0))
    second["pruned int8"] = of(bytes=30, test_accuracy=0.88, ms=2.0, ratio=3.0)
    return [{"seed": 7, "networks": first}, {"seed": 8, "networks": second}]


def test_means_deviations_and_ranges_over_campaigns_by_hand() -> None:
    found = summary(two())["pruned int8"]
    assert found["n"] == 2
    assert found["bytes"]["mean"] == 25
    assert found["test_accuracy"] == {"mean": pytest.approx(0.82), "sd": pytest.approx(0.12 / 2**0.5)}
    assert found["batch_32_ms"] == {"median": 1.5, "lowest": 1.0, "highest": 2.0}
    assert found["batch_1_ratio"] == {"median": 3.5, "lowest": 3.0, "highest": 4.0}


def test_a_change_is_paired_by_campaign_and_of_int8_told_from_float_too() -> None:
    campaigns = two()
    table = {"campaigns": campaigns, "summary": summary(campaigns)}
    cells = [cell.strip() for cell in row("pruned int8", table).split("|")[1:-1]]
    assert cells[:4] == ["pruned int8", "2", "90.00 (0.00)", "82.00 (8.49)"]
    # changes -4 and -2: mean -3, t = -3 with one degree of freedom
    assert cells[4:7] == ["-3.00 (0 of 2, p 0.205)", "-3.00 (0 of 2, p 0.205)", "25"]
    assert cells[7:9] == ["1.5 (1 to 2)", "3.5 (3 to 4)"]
    baseline = [cell.strip() for cell in row("baseline", table).split("|")[1:-1]]
    assert baseline[4:6] == ["", ""]


def test_a_single_campaign_has_no_deviation() -> None:
    found = summary([{"networks": dict.fromkeys(NETWORKS, of())}])["baseline"]
    assert found["test_accuracy"] == {"mean": 0.8, "sd": None}


def test_a_ratio_is_of_times_of_the_same_round() -> None:
    assert ratio([4.0, 40.0, 6.0], [2.0, 10.0, 2.0]) == {"median": 3.0, "quartile1": 2.5, "quartile3": 3.5}


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which these arguments are refused."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_compared_is_told(
    campaigns: list[CampaignFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (folder.path for folder in campaigns)
    twice = refused(monkeypatch, capsys, "--campaign", one, one)
    assert "--campaign: expected campaigns of different seeds, got 2 of seeds [0]" in twice
    said = refused(monkeypatch, capsys, "--campaign", one, two, "--compression", 0.6, "--out", tmp_path)
    assert "expected one of 0.5, 0.8, got 0.6" in said
    assert "no such folder" in refused(monkeypatch, capsys, "--campaign", tmp_path / "none")
    assert "--rounds must be at least 1" in refused(monkeypatch, capsys, "--campaign", one, "--rounds", 0)
    absent = refused(monkeypatch, capsys, "--campaign", one, "--out", tmp_path / "none")
    assert "--out must be a folder that is there" in absent
    assert list(tmp_path.iterdir()) == []


def test_campaigns_that_are_not_alike_or_not_finished_are_told(
    campaigns: list[CampaignFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = CampaignFolder(Path(shutil.copytree(campaigns[1].path, tmp_path / "out")))
    text = other.campaign_toml.read_text()
    other.campaign_toml.write_text(text.replace("width = 0.5", "width = 0.25"))
    said = refused(monkeypatch, capsys, "--campaign", campaigns[0].path, other.path)
    assert f"{other.path}, network.width: expected 0.5, as in {campaigns[0].path}, got 0.25" in said
    other.result_json.unlink()
    said = refused(monkeypatch, capsys, "--campaign", campaigns[0].path, other.path)
    assert f"campaign {other.path}: expected a finished campaign" in said
