"""Filter replacement in a campaign: the real command with tiny numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Zeroout

from deploy.config import load
from env.compact_file import network_from_file
from env.recognizer import Body, Recognizer
from env.replacement import TREATMENTS

TINY = """
[network]
width = 0.25
[data]
validation_share = 0.2
[baseline]
epochs = 4
batch_size = 64
[replacement]
share = 0.25
images = 60
[replacement_training]
epochs = 1
batch_size = 64
[search]
method = "hrank"
[episode]
targets = [0.6]
waypoints = 1
step_minibatches = 2
recovery_minibatches = 2
rank_images = 60
[recovery]
epochs = 1
batch_size = 64
"""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes longest."""
    monkeypatch.setattr("deploy.campaign.export", lambda *_, **__: [])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def result_of(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def test_filters_are_replaced_trained_on_and_then_pruned(zeroout: Zeroout, tmp_path: Path, config: Path) -> None:
    asked = ("--method", "hrank", "--compression", 0.6, "--steps", 1)
    outs = {how: tmp_path / f"out{how}" for how in ("", "none", "2")}
    weights = outs[""] / "baseline" / "model.safetensors"
    printed = ""
    for how, out in outs.items():
        given = ("--replace", how, "--share", 0.25) if how else ()
        sets = () if not how else ("--set", f"network.weights={json.dumps(str(weights))}")
        ended = zeroout("prune", config, *asked, *given, *sets, "--out", out)
        assert ended.code == 0
        printed += ended.output
    results = {how: result_of(out) for how, out in outs.items()}
    assert "replacement" not in results[""]
    assert not (outs[""] / "baseline" / "replaced.json").exists()
    for how in ("none", "2"):
        row = results[how]["replacement"]
        assert (row["how"], row["share"]) == (how, 0.25)
        assert results[how]["baseline"] == results[""]["baseline"]  # that of the network as it was
        assert f"after replacement {how}" in printed
        assert f"<td>after replacement {how}" in (outs[how] / "report.html").read_text()
        facts = json.loads((outs[how] / "baseline" / "replaced.json").read_text())
        assert row["val_accuracy"] == facts["validation"]["accuracy"]
        trained = network_from_file(str(outs[how] / "baseline" / "replaced.safetensors"))
        assert sum(parameter.numel() for parameter in trained.parameters()) == results[how]["baseline"]["parameters"]
        (point,) = results[how]["points"]
        assert point["policy"] == f"hrank after replacement {how}"
        assert point["compression"] >= 0.6
        # it was decided by another draw of the same images' rank
        assert point["agreement"]["rank"] > max(0.7, point["agreement"]["chance"])
    at_once = {how: json.loads((outs[how] / "baseline" / "replaced.json").read_text()) for how in ("none", "2")}
    assert at_once["none"]["validation_at_once"]["accuracy"] == results[""]["baseline"]["val_accuracy"]
    assert at_once["2"]["validation_at_once"] != at_once["none"]["validation_at_once"]


def test_a_campaign_cut_off_after_any_product_ends_in_the_same_network(
    zeroout: Zeroout, tmp_path: Path, config: Path
) -> None:
    out = tmp_path / "out"
    assert zeroout("prune", config, "--replace", "1", "--method", "hrank", "--out", out).code == 0
    first, model = result_of(out), next((out / "recovered").glob("*.safetensors"))
    weights = model.read_bytes()
    for gone in (["result.json"], ["result.json", "baseline/replaced.json", "baseline/replaced.safetensors"]):
        for path in [*(out / name for name in gone), *(out / "recovered").iterdir(), *(out / "candidates").iterdir()]:
            path.unlink(missing_ok=True)
        (out / "episodes.jsonl").unlink()
        assert zeroout("resume", out).code == 0
        assert {**result_of(out), "seconds": 0} == {**first, "seconds": 0}
        assert model.read_bytes() == weights


@pytest.mark.parametrize("method", ["fpgm", "l2"])
def test_other_importances_prune_too_and_are_looked_at_again_after_each_step(
    zeroout: Zeroout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Path, method: str
) -> None:
    out = tmp_path / "out"
    asked = ("--method", method, "--allocation", "balanced", "--steps", 3)
    looked_at = []
    importance = Recognizer.importance

    def noted(self: Recognizer, name: str, body: Body, **given: Any) -> torch.Tensor:
        looked_at.append((name, int(body.keep_mask.sum())))
        return importance(self, name, body, **given)

    with monkeypatch.context() as patched:
        patched.setattr(Recognizer, "importance", noted)
        assert zeroout("prune", config, *asked, "--out", out).code == 0
    assert result_of(out)["points"][0]["policy"] == method
    assert load(out / "campaign.toml").search.allocation == "balanced"
    in_the_episode = [kept for name, kept in looked_at if name == method][:3]  # before each of the three steps
    assert in_the_episode == sorted(set(in_the_episode), reverse=True)


def test_what_the_file_says_stays_where_no_option_says_otherwise(
    zeroout: Zeroout, tmp_path: Path, config: Path
) -> None:
    config.write_text(
        TINY.replace("[replacement]", '[replacement]\nhow = "2"').replace('"hrank"', '"l2"\nallocation = "global"')
    )
    assert zeroout("prune", config, "--steps", 1, "--out", tmp_path / "file").code == 0
    found = load(tmp_path / "file" / "campaign.toml")
    assert (found.search.method, found.search.allocation) == ("l2", "global")
    assert (found.replacement.how, found.replacement.share) == ("2", 0.25)
    assert result_of(tmp_path / "file")["points"][0]["policy"] == "l2 after replacement 2"


@pytest.mark.parametrize("broken", ["{}", "no JSON", '{"how": "1"}'])
def test_a_broken_or_other_product_is_made_anew(zeroout: Zeroout, tmp_path: Path, config: Path, broken: str) -> None:
    out = tmp_path / "out"
    assert zeroout("prune", config, "--replace", "2", "--steps", 1, "--out", out).code == 0
    first = result_of(out)
    (out / "result.json").unlink()
    product = out / "baseline" / "replaced.json"
    whole = product.read_text()
    if broken == "no JSON":
        (out / "baseline" / "replaced.safetensors").write_bytes(b"short")
    else:
        product.write_text(broken)
    assert zeroout("resume", out).code == 0
    assert product.read_text() == whole
    assert {**result_of(out), "seconds": 0} == {**first, "seconds": 0}


def test_an_importance_that_fails_costs_no_result(
    zeroout: Zeroout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Path
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a map of three dimensions")

    monkeypatch.setattr("deploy.recover.importances", fails)
    ended = zeroout("prune", config, "--method", "l2", "--steps", 1, "--out", tmp_path / "out")
    assert ended.code == 0
    assert "agreement" not in result_of(tmp_path / "out")["points"][0]
    assert "cannot be compared with what was kept: a map of three dimensions" in ended.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--replace", "4"), f"replacement.how: expected one of {', '.join(TREATMENTS)}, or nothing, got '4'"),
        (("--replace", "1", "--share", "1.5"), "replacement.share: expected a share above 0 and below 1, got 1.5"),
        (("--replace", "1", "--share", "0.7"), "replacement.share: expected at most 0.5 for replacement 1"),
        (("--replace", "2", "--share", "0.01"), "replacement.share: expected at least 0.042, one filter of the widest"),
        (("--share", "0.3"), "--share: expected --replace beside it, got none"),
        (("--allocation", "fair"), "search.allocation: expected global | uniform | balanced, with search.method"),
        (("--method", "random", "--allocation", "uniform"), "got 'uniform' with random"),
        (("--replace", "1", "--set", "replacement_training.batch_size=5000"), "training images: expected at least one"),
        (("--replace", "1", "--set", "replacement_training.epochs=0"), "replacement_training.epochs: expected"),
    ],
)
def test_a_mistake_is_one_line(
    zeroout: Zeroout,
    tmp_path: Path,
    config: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    ended = zeroout("prune", config, *arguments, "--out", tmp_path / "out")
    assert ended.code == 2
    assert said in ended.error
    assert "\n" not in ended.error.strip()
