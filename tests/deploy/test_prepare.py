"""The baseline: trained or loaded once, counted as the user gave it."""

import math
import re
import sys
import types
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from command import Zeroout
from rich.console import Console
from safetensors.torch import save_file

from deploy.config import CampaignConfig, dump, parse
from deploy.folder import CampaignFolder
from deploy.prepare import Baseline, preflight, prepare
from deploy.progress import PlainProgress
from env.errors import UserError
from env.networks import build_network

TINY = """
[network]
name = "resnet18"
width = 0.05
[data]
validation_share = 0.2
[baseline]
epochs = 1
batch_size = 64
"""


def prepared(tmp_path: Path, text: str, *overrides: str) -> tuple[CampaignConfig, Baseline]:
    config = parse(text, overrides)
    folder = CampaignFolder.create(tmp_path, dump(config))
    with (tmp_path.parent / "log").open("w") as log:
        return config, prepare(folder, config, preflight(config), PlainProgress(Console(file=log)))


def parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_skip_convolutions_are_added_to_the_trained_network_and_do_not_count_as_given(tmp_path: Path) -> None:
    config, baseline = prepared(tmp_path / "out", TINY, "network.skips=convolution")
    plain = build_network(parse(TINY).network, channels=1, classes=10)
    added = [name for name, _ in baseline.network.named_parameters() if name not in dict(plain.named_parameters())]
    assert baseline.given["parameters"] == parameters(plain)
    assert parameters(baseline.network) > baseline.given["parameters"]
    assert added
    assert all("shortcut" in name for name in added)
    assert config.network.skips == "convolution"


def test_a_second_call_takes_the_baseline_from_the_folder(tmp_path: Path) -> None:
    _, first = prepared(tmp_path / "out", TINY)
    written = (tmp_path / "out" / "baseline" / "model.safetensors").stat().st_mtime_ns
    _, second = prepared(tmp_path / "out", TINY)
    assert (tmp_path / "out" / "baseline" / "model.safetensors").stat().st_mtime_ns == written
    for mine, theirs in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert first.validation == second.validation


def test_given_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    network = build_network(parse(TINY).network, channels=1, classes=10, seed=9)
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    _, baseline = prepared(tmp_path / "out", TINY, f"network.weights={tmp_path / 'mine.safetensors'}")
    for mine, theirs in zip(network.parameters(), baseline.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_target_beyond_reach_is_refused_with_the_most_that_can_go() -> None:
    with pytest.raises(UserError, match=r"at most 0\.\d{4}, which is what min_width = 3 leaves"):
        preflight(parse(TINY, ["episode.targets=[0.999]", "episode.min_width=3"]))


@pytest.mark.parametrize(("measure", "width"), [("macs", 2), ("parameters", 200)])
def test_work_that_is_not_counted_is_a_warning_where_targets_are_macs(
    monkeypatch: pytest.MonkeyPatch, measure: str, width: int
) -> None:
    bring(monkeypatch, width)
    said: list[str] = []
    changes = ["network.factory=own:half_functional", f"episode.measure={measure}", "episode.targets=[0.2]"]
    preflight(parse(TINY, changes), warn=said.append)
    assert [line[:37] for line in said] == (
        ["episode.measure = macs: 648 more MACs "[:37]] if measure == "macs" else []
    )


def test_macs_are_refused_where_most_of_them_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, 200)
    line = r"episode\.measure: expected parameters or bytes .*, got macs, though .* lie outside"
    with pytest.raises(UserError, match=line):
        preflight(parse(TINY, ["network.factory=own:half_functional", "episode.measure=macs"]))


class HalfFunctional(torch.nn.Module):
    """Two convolutions, and a third that is never called: a function takes its weight."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(1, 20, 3, padding=1), torch.nn.Conv2d(20, 20, 1)
        self.classifier = torch.nn.Linear(20, classes)
        self.third = torch.nn.Conv2d(1, width, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(torch.relu(self.second(torch.relu(self.first(images)))).mean((2, 3)))
        return cast(torch.Tensor, logits + F.conv2d(images, self.third.weight).mean((1, 2, 3))[:, None])


def bring(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Let `own:half_functional` make a HalfFunctional whose third convolution has so many filters."""
    own = types.SimpleNamespace(half_functional=lambda *, channels, classes: HalfFunctional(width, classes))
    monkeypatch.setitem(sys.modules, "own", own)  # type: ignore[arg-type]


def test_a_baseline_has_no_teacher() -> None:
    with pytest.raises(
        UserError, match=r"baseline\.distillation: .*has none itself, got 0\.5; .*recovery\.distillation"
    ):
        preflight(parse(TINY, ["baseline.distillation=0.5"]))


def mistake(zeroout: Zeroout, *words: object) -> tuple[int, str]:
    """Run the command, which must fail: its exit code, and its one line of error."""
    ended = zeroout(*words)
    lines = ended.error.splitlines()
    assert len(lines) == 1, lines
    return ended.code, lines[0]


@pytest.mark.parametrize(
    "wrong",
    ["baseline.learning_rate=nan", "recovery.learning_rate=inf", "recovery.momentum=nan", "baseline.momentum=1e9"],
)
def test_an_impossible_rate_is_one_line_in_the_users_own_words(zeroout: Zeroout, tmp_path: Path, wrong: str) -> None:
    key = wrong.partition("=")[0]
    code, line = mistake(zeroout, "run", "--out", tmp_path / "out", "--set", wrong)
    assert code == 2
    assert line.startswith(f"zeroout: {key}: expected a ")
    assert f"; set {key}, for instance to its default" in line
    assert not (tmp_path / "out").exists()


def test_a_diverging_baseline_says_what_to_change_and_goes_on_once_that_is_changed(
    zeroout: Zeroout, tmp_path: Path
) -> None:
    out, given = tmp_path / "out", tmp_path / "given.toml"
    # decayed by several times their size in each update, the weights overflow once the rate has risen
    absurd = "epochs = 8\nlearning_rate = 10.0\nwarmup_share = 0.9\nweight_decay = 1.0"
    given.write_text(
        f"[network]\nwidth = 0.25\n[data]\nvalidation_share = 0.2\n[baseline]\n{absurd}\nbatch_size = 64\n"
    )
    code, line = mistake(zeroout, "run", given, "--out", out)
    checkpoint = out / "baseline" / "baseline.pt"
    assert code == 1
    assert re.search(r"not finite in epoch [2-8] at learning rate \d", line)
    assert "try a lower baseline.learning_rate" in line
    assert f"is kept in {checkpoint}, and training goes on from there. " in line
    assert f"To go on: change that in {out / 'campaign.toml'}, and zeroout resume {out}" in line
    epoch = torch.load(checkpoint, weights_only=True)["epoch"]
    assert epoch >= 1

    changed = "baseline.learning_rate=0.01"
    code, line = mistake(zeroout, "run", given, "--out", out, "--set", changed)
    assert code == 2
    assert "holds another campaign; baseline.learning_rate" in line
    assert "another --out" in line

    config = parse(given.read_text(), [changed, "baseline.weight_decay=0.0"])
    (out / "campaign.toml").write_text(dump(config))
    code, line = mistake(zeroout, "resume", out)
    assert code == 2
    assert f"checkpoint {checkpoint}: expected this training, with baseline.weight_decay 0.0, got 1.0" in line
    assert "remove that file to train anew" in line

    config = parse(given.read_text(), [changed])
    (out / "campaign.toml").write_text(dump(config))
    with (tmp_path / "log").open("w") as log:
        folder = CampaignFolder.open(out)
        baseline = prepare(folder, config, preflight(config), PlainProgress(Console(file=log)))
    assert f"epoch {epoch + 1}/8" in (tmp_path / "log").read_text()
    assert math.isfinite(baseline.validation.cross_entropy)
