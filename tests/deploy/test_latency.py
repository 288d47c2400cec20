"""Latencies are measured by turns, beside the original as it was given, and told with n and spread."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from finished_campaign import brought, finished
from torch import Tensor

from deploy.export import export
from deploy.folder import CampaignFolder
from deploy.latency import Latency, measure, write_table
from env.compact_file import network_to_bytes
from env.errors import UserError

IMAGES = torch.zeros(1, 1, 1, 1)


class Workshop:
    """Calls that take known times on a clock of their own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def call(self, name: str, seconds: list[float]) -> Callable[[Tensor], object]:
        """A call that takes these seconds in turn, the last of them ever after."""
        taken = iter(seconds)

        def work(images: Tensor) -> None:
            self.order.append(name)
            self.now_s += next(taken, seconds[-1])

        return work


def test_median_and_quartiles_are_those_of_the_timed_calls_in_milliseconds() -> None:
    shop = Workshop()
    warm_up = [9.0, 9.0, 9.0]
    calls = {"a": shop.call("a", [*warm_up, 0.005, 0.001, 0.004, 0.002, 0.003]), "b": shop.call("b", [1.0])}
    measured = measure(calls, dict.fromkeys(calls, IMAGES), repeats=5, budget_s=1e9, clock=shop.clock)
    assert measured["a"].n == 5
    assert measured["a"].median_ms == pytest.approx(3)
    assert (measured["a"].quartile1_ms, measured["a"].quartile3_ms) == pytest.approx((2, 4))
    assert measured["b"].median_ms == pytest.approx(1000)


def test_calls_take_turns_and_each_begins_a_round_as_often_as_the_others() -> None:
    shop = Workshop()
    calls = {name: shop.call(name, [0.001]) for name in "abc"}
    measure(calls, dict.fromkeys(calls, IMAGES), repeats=3, clock=shop.clock)
    assert "".join(shop.order[-9:]) == "abc" + "bca" + "cab"


def test_slow_networks_are_timed_less_often_but_never_less_than_five_times() -> None:
    for seconds, rounds in ((1.0, 11), (100.0, 5), (0.01, 50)):
        shop = Workshop()
        calls = {"a": shop.call("a", [seconds])}
        assert measure(calls, {"a": IMAGES}, repeats=50, budget_s=10.5, clock=shop.clock)["a"].n == rounds


def test_one_repeat_is_its_own_quartile() -> None:
    shop = Workshop()
    measured = measure({"a": shop.call("a", [0.25])}, {"a": IMAGES}, repeats=1, clock=shop.clock)
    assert measured["a"] == Latency(median_ms=250, quartile1_ms=250, quartile3_ms=250, n=1)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    """So that a measurement that leaves one behind is seen."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_the_table_has_the_original_and_each_file_by_runtime(exported: tuple[CampaignFolder, list[Path]]) -> None:
    folder, paths = exported
    table = write_table(folder, paths, repeats=2)
    rows = {(row["network"], row["runtime"]): row for row in table["rows"]}
    assert list(rows) == [
        (network, runtime)
        for network in ("original", "0.8")
        for runtime in ("torch, eager", "onnxruntime", "torch.export")
    ]
    assert rows["original", "torch, eager"]["parameters"] == 9000
    assert rows["0.8", "torch.export"]["macs"] == 70000
    assert rows["0.8", "torch.export"]["bytes"] == (folder.export / "0.8.pt2").stat().st_size
    for row in table["rows"]:
        reference = rows["original", row["runtime"]]["latency"]
        for batch in ("1", "32"):
            latency = row["latency"][batch]
            assert latency["n"] == 2
            assert 0 < latency["quartile1_ms"] <= latency["median_ms"] <= latency["quartile3_ms"]
            assert row["speedup"][batch] == pytest.approx(reference[batch]["median_ms"] / latency["median_ms"])
    assert json.loads((folder.export / "table.json").read_text()) == json.loads(json.dumps(table))
    assert table["machine"]["cores"] >= 1
    assert table["versions"]["torch"] == torch.__version__
    assert torch.get_num_threads() == 2


def test_the_original_is_measured_without_the_skip_convolutions_that_were_added(tmp_path: Path) -> None:
    folder = finished(tmp_path / "out", brought("residual", skips="convolution"))
    table = write_table(folder, export(folder, formats=["safetensors"]), repeats=1)
    as_given = brought("residual", skips="coupled")
    assert table["rows"][0]["network"] == "original"
    assert table["rows"][0]["bytes"] == len(network_to_bytes(as_given.build(), as_given))
    assert table["rows"][0]["bytes"] < (folder.baseline / "model.safetensors").stat().st_size


def test_nothing_is_timed_with_no_repeats(campaign: CampaignFolder) -> None:
    paths = export(campaign, compression=0.5, formats=["safetensors"])
    table = write_table(campaign, paths, repeats=0)
    assert [(row["network"], row["runtime"]) for row in table["rows"]] == [
        ("original", "torch, eager"), ("0.5", "torch, eager")
    ]  # fmt: skip
    assert not any("latency" in row or "speedup" in row for row in table["rows"])


def test_no_files_make_an_empty_table(campaign: CampaignFolder) -> None:
    campaign.export.mkdir()
    assert write_table(campaign, [], repeats=3)["rows"] == []


def test_repeats_below_0_are_the_users_mistake(campaign: CampaignFolder) -> None:
    with pytest.raises(UserError, match="--repeats: expected at least 0, got -1"):
        write_table(campaign, [], repeats=-1)
