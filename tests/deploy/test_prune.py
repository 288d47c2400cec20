"""`zeroout prune`: the real command with tiny numbers; nothing but this process is needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from command import Zeroout
from PIL import Image

import deploy.limit
from deploy.config import load, parse
from deploy.folder import CampaignFolder
from env.compact_file import network_from_file
from env.errors import UserError

TINY = """
[network]
width = 0.25
[data]
validation_share = 0.2
[baseline]
epochs = 5
batch_size = 64
[episode]
step_minibatches = 2
recovery_minibatches = 4
[recovery]
epochs = 2
batch_size = 64
learning_rate = 0.05
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes longest, and is not what most tests here are about."""
    monkeypatch.setattr("deploy.campaign.export", lambda *_, **__: [])


def result_of(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def test_a_rule_prunes_to_the_asked_shares_of_the_asked_measure(zeroout: Zeroout, tmp_path: Path, config: Path) -> None:
    out = tmp_path / "out"
    asked = ("--compression", 0.6, "--compression", 0.8, "--measure", "macs")
    assert zeroout("prune", config, "--method", "gamma", *asked, "--steps", 4, "--out", out).code == 0
    result = result_of(out)
    assert [point["policy"] for point in result["points"]] == ["gamma", "gamma"]
    for point, target in zip(result["points"], (0.6, 0.8), strict=True):
        network = network_from_file(str(out / point["model"]))
        assert point["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert point["compression"] == 1 - point["macs"] / result["baseline"]["macs"]
        assert 0 <= point["compression"] - target <= 0.002 * target or "one filter is" in point["why_not_exact"]
        for name in ("safetensors", "onnx", "pt2", "json"):
            assert (out / "export" / f"{target}.{name}").stat().st_size > 0
    assert not (out / "redis").exists()
    assert len(CampaignFolder.open(out).read_episodes()) == 1


@pytest.mark.usefixtures("no_export")
def test_a_finished_campaign_resumes_to_the_same_result_and_a_cut_off_one_goes_on(
    zeroout: Zeroout, tmp_path: Path, config: Path
) -> None:
    out = tmp_path / "out"
    assert zeroout("prune", config, "--steps", 3, "--out", out).code == 0
    first, model = result_of(out), next((out / "recovered").glob("*.safetensors"))
    weights = model.read_bytes()
    assert zeroout("resume", out).code == 0
    assert result_of(out) == first
    # as if killed after the search: the same network is recovered again, bit for bit
    for path in [out / "result.json", *(out / "recovered").iterdir()]:
        path.unlink()
    assert zeroout("resume", out).code == 0
    assert result_of(out) == first
    assert model.read_bytes() == weights


@pytest.mark.usefixtures("no_export")
def test_max_drop_finds_the_smallest_network_that_loses_no_more(zeroout: Zeroout, tmp_path: Path, config: Path) -> None:
    out = tmp_path / "out"
    asked = ("--max-drop", 8.0, "--compression", 0.2, "--compression", 0.95, "--method", "taylor")
    ended = zeroout("prune", config, *asked, "--steps", 4, "--out", out)
    assert ended.code == 0
    result = result_of(out)
    (point,) = result["points"]
    baseline = result["baseline"]["val_accuracy"]
    lost = 100 * (baseline - point["val_accuracy"])
    assert lost <= 8.0
    tried = [json.loads(path.read_text()) for path in (out / "recovered").glob("*-0.*.json")]
    worse = [row for row in tried if 100 * (baseline - row["validation"]["accuracy"]) > 8.0]
    assert all(row["compression"] > point["compression"] for row in worse)
    nearest = min(row["compression"] for row in worse)
    stuck = "no filters allow a step between" in result["limit"]
    assert nearest - point["compression"] <= 0.002 or lost >= 8.0 - 0.2 or stuck
    assert f"{nearest:.2%} loses" in result["limit"]
    assert result["limit"] in ended.output
    assert zeroout("resume", out).code == 0
    assert result_of(out) == result


@pytest.mark.usefixtures("no_export")
def test_max_drop_says_when_the_highest_target_still_holds(zeroout: Zeroout, tmp_path: Path, config: Path) -> None:
    out = tmp_path / "out"
    assert zeroout("prune", config, "--max-drop", 99, "--compression", 0.3, "--out", out).code == 0
    result = result_of(out)
    assert result["points"][0]["target"] == 0.3
    assert "raise it to go further" in result["limit"]


def test_a_network_and_images_of_ones_own(zeroout: Zeroout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, shade in (("dark", 40), ("light", 160), ("bright", 240)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(16):
            Image.new("RGB", (10, 8), (shade, number, shade)).save(tmp_path / "images" / name / f"{number}.png")
    network = zoo.factory(channels=3, classes=3)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    config = tmp_path / "few.toml"
    config.write_text(
        '[data]\nvalidation_share = 0.2\ncache = "cache"\n[episode]\nbatch_size = 8\n[recovery]\nbatch_size = 8\n'
        "epochs = 1\n[baseline]\nbatch_size = 8\n"
    )
    monkeypatch.chdir(tmp_path)
    what = ("--model", "zoo:factory", "--weights", "weights.pt", "--data", "images")
    assert zeroout("prune", config, *what, "--compression", 0.5, "--out", "out").code == 0
    result = result_of(tmp_path / "out")
    assert result["baseline"]["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    resolved = load(tmp_path / "out" / "campaign.toml")
    assert (resolved.network.factory, resolved.network.weights) == ("zoo:factory", str(tmp_path / "weights.pt"))
    assert resolved.data.path == str(tmp_path / "images")
    (tmp_path / "weights.pt").unlink()  # all that came of it is in the folder
    (tmp_path / "out" / "result.json").unlink()
    assert zeroout("resume", "out").code == 0
    assert result_of(tmp_path / "out") == result
    description = json.loads((tmp_path / "out" / "export" / "0.5.json").read_text())
    assert "8" in json.dumps(description)
    assert "10" in json.dumps(description)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ('search.method="hope"', "search.method: expected controller | taylor"),
        ('episode.measure="grams"', "episode.measure: expected parameters | macs | bytes"),
        ("max_drop=-2.0", r"max_drop: expected points in \[0, 100\), or -1"),
        ("max_drop=nan", r"max_drop: expected points in \[0, 100\), or -1"),
    ],
)
def test_what_cannot_be_is_refused(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse(TINY, [override])


def test_a_rule_alone_has_no_controls_beside_it() -> None:
    with pytest.raises(UserError, match=r"search\.controls: expected none beside search\.method = gamma"):
        parse(TINY, ['search.method="gamma"', 'search.controls=["random"]'])


@pytest.mark.parametrize("method", ["cem", "untrained", "balanced"])
def test_others_than_rules_play_alone_too_and_go_on_where_they_stopped(
    zeroout: Zeroout, tmp_path: Path, config: Path, no_export: None, method: str
) -> None:
    out = tmp_path / "out"
    sets = ("--set", f'search.method="{method}"', "--set", "search.episodes=12", "--set", "episode.waypoints=4")
    assert zeroout("run", config, *sets, "--out", out).code == 0
    path = out / "episodes.jsonl"
    lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 12
    assert ("offsets" in records[0]) == (method == "cem")
    path.write_text("".join(f"{line}\n" for line in lines[:11]))
    for product in ("result.json", "report.html"):
        (out / product).unlink()
    assert zeroout("resume", out).code == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    # the last episode is the same: what it depends on is in the records of the others
    unlike = ("seconds", "phases", "finished")
    last, same = ({key: value for key, value in one.items() if key not in unlike} for one in (records[-1], again[-1]))
    assert last == same


@pytest.mark.usefixtures("no_export")
def test_a_limit_is_looked_for_by_the_rule_and_allocation_that_were_asked_for(
    zeroout: Zeroout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Path
) -> None:
    asked, heuristic = [], deploy.limit.heuristic

    def noted(name: str, *given: Any, **how: Any) -> Any:
        asked.append((name, how["allocation"]))
        return heuristic(name, *given, **how)

    monkeypatch.setattr(deploy.limit, "heuristic", noted)
    rule = ("--method", "uniform-l1", "--allocation", "balanced", "--max-drop", 30)
    assert zeroout("prune", config, *rule, "--steps", 4, "--out", tmp_path / "out").code == 0
    assert asked
    assert set(asked) == {("uniform-l1", "balanced")}
