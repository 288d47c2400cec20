"""What the benchmarks' pages say of their rows, by hand; and benchmarks.transfer as the real command."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import campaigns, tables, tables_page, transfer, transfer_page
from benchmarks.campaigns import fingerprint, process, seconds_of
from benchmarks.ledger import Ledger
from benchmarks.paired import difference, spread
from benchmarks.replacement import ARMS, page
from benchmarks.transfer import FULL, Bench, Job
from deploy.campaign import run_campaign
from deploy.config import dump, load, parse
from deploy.progress import PlainProgress


def test_a_difference_is_paired_by_the_seeds_that_both_have() -> None:
    found = difference({0: 3.0, 1: 5.0, 2: 4.0, 7: 100.0}, {0: 2.0, 1: 2.0, 2: 2.0, 8: -100.0})
    assert found is not None
    assert (found.mean, found.wins, found.n) == (2.0, 3, 3)
    # differences 1, 3, 2: mean 2, standard error 1 / sqrt(3), t = 3.464 with 2 degrees of freedom
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    assert not found.sure
    assert str(found) == "+2.00 (3 of 3, p 0.074)"
    # differences 2.00, 2.01, 2.02: standard error 0.01 / sqrt(3), t = 348
    assert str(difference({0: 2.0, 1: 2.01, 2: 2.02}, dict.fromkeys(range(3), 0.0))) == "+2.01 (3 of 3, p < 0.001)"


def test_what_cannot_be_tested_has_no_p() -> None:
    assert difference({0: 1.0}, {1: 1.0}) is None
    for ours in ({0: 1.5}, {0: 1.5, 1: 2.5}):
        found = difference(ours, {0: 1.0, 1: 2.0})
        assert found is not None
        assert math.isnan(found.p)
        assert not found.sure
    assert spread({0: 1.0}) == "1.00"
    assert spread({0: 1.0, 1: 3.0}) == "2.00 (1.41)"


def row(arm: str, seed: int, test: float, **changes: Any) -> dict[str, Any]:
    return {
        "network": "vgg16", "width": 0.25, "seed": seed, "arm": arm, "machine": "a machine", "targets": [0.9],
        "images": 1000, "share": 0.2, "epochs": [4, 2, 3],
        "baseline_test": 0.80, "replaced_test": 0.81, "test": [test], **changes,
    }  # fmt: skip


def test_the_page_says_whether_the_claim_holds_by_either_drop() -> None:
    rows = [row(arm, seed, 0.70 + 0.001 * seed) for arm in ARMS for seed in range(4) if arm not in ("1", "2")]
    # from right before pruning replacement 1 drops less, from the baseline more
    rows += [row("1", seed, 0.69 + 0.002 * seed, replaced_test=0.78) for seed in range(4)]
    rows += [row("2", seed, 0.70 + 0.01 * (-1) ** seed) for seed in range(4)]
    said = page([row("1", 0, 0.1), *rows], "command")  # the first is an older row of the same arm and seed
    assert "1,000 training images, 4 epochs of baseline, 2 after the replacement of 20% of each layer, 3 of" in said
    assert "| no replacement | 4 | 81.00 (0.00) | 70.15 (0.13) | 10.85 (0.13) | - | 9.85 (0.13) | - |" in said
    assert "| replacement 1 | 4 | 78.00 (0.00) | 69.30 (0.26) | 8.70 (0.26) | +2.15 (4 of 4, p < 0.001) | 10.70" in said
    assert (
        "- replacement 1 at 90%: from right before pruning, it holds (+2.15, p < 0.001); from the baseline, it does "
        "not, the drop is larger (-0.85, p < 0.001)." in said
    )
    assert "- replacement 2 at 90%: from right before pruning, no difference is shown" in said
    assert "- replacement 3 at 90%: from right before pruning, too few seeds to say" in said  # all pairs differ alike


def test_rows_of_other_targets_or_shares_stand_in_other_tables() -> None:
    rows = [row("none", 0, 0.7), row("1", 0, 0.8, targets=[0.5]), row("2", 0, 0.9, share=0.4)]
    said = page(rows, "command")
    assert said.count("## vgg16") == 3
    assert "50% of the parameters removed" in said
    assert "replacement of 40%" in said


def test_a_fingerprint_is_of_what_was_changed_alone() -> None:
    plain = fingerprint(parse(""))
    assert fingerprint(parse("[episode]\nwaypoints = 16")) == plain  # the default
    assert fingerprint(parse("[episode]\nwaypoints = 8")) != plain
    assert fingerprint(parse("[cluster]\nlease_s = 8.0"), without=["cluster"]) == plain
    assert fingerprint(parse(""), beyond={"taught": "x"}) != plain


def test_rows_are_kept_as_they_come_and_the_last_of_a_fingerprint_counts(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "rows.jsonl"
    ledger = Ledger(file)
    assert ledger.row("a") is None
    ledger.add([{"fingerprint": "a", "seed": 0, "test": 0.1}, {"fingerprint": "a", "seed": 1, "test": 0.2}])
    ledger.add([{"fingerprint": "a", "seed": 0, "test": 0.3}])
    again = Ledger(file)
    assert again.rows == ledger.rows
    assert again.row("a", seed=0) == {"fingerprint": "a", "seed": 0, "test": 0.3}
    assert again.row("b") is None


def test_a_line_that_a_killed_process_left_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Ledger(file).add([{"fingerprint": "a"}])
    with file.open("a") as torn:
        torn.write('{"fingerprint": "b", "te')
    ledger = Ledger(file)
    assert [row["fingerprint"] for row in ledger.rows] == ["a"]
    ledger.add([{"fingerprint": "c"}])
    assert [json.loads(line)["fingerprint"] for line in file.read_text().splitlines()] == ["a", "c"]


def test_a_process_is_ended_when_time_is_over_and_its_seconds_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run-0.5"
    process(["-c", "import time; print('begun'); time.sleep(0.3)"], out, "first", math.inf)
    first = seconds_of(out)
    assert first > 0
    process(["-c", "import time; time.sleep(600)"], out, "second", time.time() + 0.5)
    assert 0.5 <= seconds_of(out) - first < 60
    process(["-c", "raise SystemExit(3)"], out, "third", math.inf)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "second: stopped; the same command goes on with it"
    assert said[1].startswith("third: ended with 3; see ")
    assert (tmp_path / "run-0.5.log").read_text() == "begun\n"


def cell(arm: str, seed: int, target: float, test: float, **changes: Any) -> dict[str, Any]:
    """A row of benchmarks.tables."""
    return {
        "network": "vgg16", "width": 1.0, "data": "CIFAR-10, JPEG copy", "seed": seed, "arm": arm, "epochs": [150, 50],
        "asked": [0.92, 0.95], "target": target, "compression": target + 0.0004, "macs_removed": 0.613,
        "validation": 0.91, "test": test, "baseline_validation": 0.94, "baseline_test": 0.93, "images": 1_234_567,
        "wall_s": 90.0, "device": "a card", "torch": "2.13", "commit": "abc-dirty", **changes,
    }  # fmt: skip


def test_the_page_of_tables_sets_every_arm_beside_the_controller_and_the_published() -> None:
    arms = {name: arm.about for name, arm in tables.ARMS.items()}
    rows = [cell("controller", seed, 0.92, 0.92 + 0.001 * seed) for seed in range(3)]
    rows += [cell("taylor", seed, 0.92, 0.91 + 0.002 * seed) for seed in range(3)]
    rows.insert(0, cell("taylor", 0, 0.92, 0.5))  # an older row of the same network
    said = tables_page.page([*rows, cell("gamma", 0, 0.92, 0.8, width=0.25)], arms, "command")
    assert "| Controller | 3 | 92.10 (0.10) | -0.90 (0.10) |  | 92.04 | 61.3 | 91.00 | 1,235 | 1.5 |" in said
    # differences 1.0, 0.9, 0.8: mean 0.9, standard error 0.058, t = 15.6 with 2 degrees of freedom
    assert "| Taylor repeated | 3 | 91.20 (0.20) | -1.80 (0.20) | +0.90 (3 of 3, p 0.004) |" in said
    assert "| vgg16 | 92.00% | the source (2022) | 92.45 | -1.07 | 92.10 (0.10) | -0.90 (0.10) | 3 |" in said
    assert "| vgg16 | 97.52% | the source (2022) | 91.32 | -2.20 |  |  | 0 |" in said  # visibly empty
    assert said.index("## vgg16, width 1:") < said.index("## vgg16, width 0.25:")
    assert (
        "--network vgg16 --width 1 --seeds 0 1 2 --targets 0.92,0.95 --arms taylor controller`, by versions abc."
        in said
    )
    assert said.count("### 93 % of the parameters removed") == 1  # at full width, where the source has a figure
    of_last = said[said.index("### 95 % of the parameters removed") :]
    assert "| random search |  |  |  |" in of_last
    assert "CLR-RNF at 94.95% 93.32, +0.30 points." in of_last


def test_what_began_from_another_machines_network_is_marked_and_paired_by_its_change() -> None:
    arms = {name: arm.about for name, arm in tables.ARMS.items()}
    rows = [cell("hrank", seed, 0.92, 0.91, baseline_test=0.95, device="another") for seed in range(2)]
    rows += [cell("controller", seed, 0.92, 0.92 + 0.01 * seed) for seed in range(2)]
    rows += [cell("taylor", seed, 0.92, 0.91) for seed in range(2)]
    said = tables_page.page(rows, arms, "command")
    assert "Before pruning 93.00 (0.00) on test, n 2." in said
    assert "On a card; torch 2.13." in said
    assert "Arms with a * were made, for some seeds, on another,\n" in said
    assert "not alike to the bit (95.00 (0.00) before pruning):\n" in said
    # -1 and 0 against -4 and -4
    assert "| HRank repeated * | 2 | 91.00 (0.00) | -4.00 (0.00) | +3.50 (2 of 2, p 0.090) |" in said
    assert "| Taylor repeated | 2 | 91.00 (0.00) | -2.00 (0.00) | +1.50 (2 of 2, p 0.205) |" in said


def test_the_source_s_agent_on_a_network_with_skips_begins_from_one_of_its_own() -> None:
    arms = {name: arm.about for name, arm in tables.ARMS.items()}
    rows = [cell("controller", 0, 0.92, 0.92, network="resnet18")]
    rows += [cell("hrank", 0, 0.92, 0.91, network="resnet18", baseline_test=0.95, device="another")]
    own = cell("source", 0, 0.92, 0.90, network="resnet18", baseline_test=0.91)
    said = tables_page.page([*rows, own], arms, "command")
    assert "Before pruning 93.00 on test, n 1." in said
    assert "not alike to the bit (95.00 before pruning):\n" in said
    assert "(91.00 before pruning): its change is from there." in said
    assert "| the source's agent | 1 | 90.00 | -1.00 | +0.00 (0 of 1) |" in said
    elsewhere = tables_page.page([*rows, {**own, "device": "another"}], arms, "command")
    assert "| the source's agent * | 1 | 90.00 | -1.00 |" in elsewhere
    assert "not alike to the bit (95.00 before pruning):\n" in elsewhere
    assert "Before pruning 91.00 on test, n 1." in tables_page.page([own], arms, "command")


def test_arms_of_tables_differ_in_what_they_say_alone(tmp_path: Path) -> None:
    def bench(network: str, data: str = "images") -> tables.Bench:
        return tables.Bench(
            protocol=tables.CPU, network=network, width=0.25, data=data, targets=(0.9, 0.95),
            ledger=Ledger(tmp_path / "rows.jsonl"), work=tmp_path, deadline_s=math.inf,
        )  # fmt: skip

    for protocol in tables.PROTOCOLS.values():
        every = replace(bench("resnet34"), protocol=protocol)
        assert [config.seed for arm in tables.ARMS for config in every.configs(3, arm, None)] == [3] * 15
    ours = bench("resnet18")
    marks = [ours.mark(config, arm) for arm in tables.ARMS for config in ours.configs(3, arm, None)]
    peers = [arm for arm in tables.ARMS.values() if arm.peer]
    assert len(set(marks)) == len(marks) == len(tables.ARMS) + len(peers)  # a peer has a run for each target
    elsewhere = bench("resnet18", "other-place")
    (one,), (other,) = (list(each.configs(3, "taylor", Path("weights"))) for each in (ours, elsewhere))
    assert ours.mark(one, "taylor") == elsewhere.mark(other, "taylor")
    (source,) = ours.configs(3, "source", None)
    assert (source.network.skips, source.controller.observation) == ("convolution", "mask")
    (source,) = bench("vgg16").configs(3, "source", None)
    assert source.network.skips == "coupled"  # it has no skips
    (controller,), (distilled,) = (list(ours.configs(3, arm, None)) for arm in ("controller", "distilled"))
    assert distilled.recovery.distillation == 0.5
    assert replace(distilled, recovery=controller.recovery) == controller
    assert ours.missing(3, "controller")
    ours.ledger.add([{"fingerprint": ours.mark(controller, "controller"), "target": 0.9}])
    assert ours.missing(3, "controller")
    ours.ledger.add([{"fingerprint": ours.mark(controller, "controller"), "target": 0.95}])
    assert not ours.missing(3, "controller")


def test_fingerprints_stay_as_they_were_though_a_default_has_changed() -> None:
    # as of the commit before recovery.distillation became 0.5
    known = {"recovery.distillation=0.0": "44136fa355b3", "recovery.distillation=0.5": "d5050790e411"}
    for override, mark in known.items():
        assert fingerprint(parse("", [override])) == mark


def moved(arm: str, seed: int, test: float, compressed: float, images: int = 10) -> dict[str, Any]:
    """A row of benchmarks.transfer."""
    return {
        "seed": seed, "images": images, "arm": arm, "test": test, "test_compressed": compressed, "compression": 0.9,
        "parameters": 1000, "updates": 300, "recovery_updates": 150, "machine": "a machine",
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip


def test_a_baseline_that_an_older_version_began_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dump(parse("[network]\nwidth = 0.25\n[baseline]\nepochs = 1\n"))
    asked, out = tmp_path / "asked.toml", tmp_path / "out"
    asked.write_text(config)
    out.mkdir()
    (out / "campaign.toml").write_text(config.replace('like = ""\n', ""))
    assert (out / "campaign.toml").read_text() != config
    monkeypatch.setattr("sys.argv", ["campaigns", str(asked), "--out", str(out), "--baseline"])
    campaigns.main()
    assert (out / "baseline" / "model.safetensors").is_file()


def test_the_page_of_transfer_says_where_replacement_helps_and_where_it_harms() -> None:
    rows = [moved("none", seed, 0.60, 0.50) for seed in range(4)]
    rows += [moved("1", seed, 0.62 + 0.002 * seed, 0.50 + 0.01 * (-1) ** seed) for seed in range(4)]
    rows += [moved("2", seed, 0.60 + 0.01 * (-1) ** seed, 0.46 - 0.002 * seed) for seed in range(4)]
    said = transfer_page.page(rows, "command")
    assert (
        "replacement helps in replacement 1 at 10 images a class, before compression (+2.30, p < 0.001) and harms in "
        "replacement 2 at 10 images a class, compressed (-4.30, p < 0.001); of 4 comparisons, 0.2 would look so by "
        "chance"
    ) in said
    assert "| none | 4 | 1,000 | 60.00 (0.00) | - | 90.00% | 50.00 (0.00) | - |" in said
    assert "| 1 | 4 | 1,000 | 62.30 (0.26) | +2.30 (4 of 4, p < 0.001) | 90.00% | 50.00 (1.15) | " in said
    assert "recovery after compression: 300 and 150." in said


def test_the_page_of_transfer_says_when_nothing_can_be_told() -> None:
    alone = [moved("none", seed, 0.60, 0.50) for seed in range(2)]
    assert "cannot be said yet" in transfer_page.verdict([*alone, moved("1", 0, 0.7, 0.6)])
    noise = [moved("1", seed, 0.60 + 0.01 * (-1) ** seed, 0.50 + 0.02 * (-1) ** seed) for seed in range(2)]
    assert "shows no difference from transfer alone in any of 2" in transfer_page.verdict([*alone, *noise])


def test_all_arms_of_transfer_have_as_many_updates_whatever_the_images(tmp_path: Path) -> None:
    bench = Bench(FULL, "images", Ledger(tmp_path / "rows.jsonl"), tmp_path, math.inf)
    for images in (10, 50, 250):
        for arm in ("none", "prune", "scratch"):
            config = bench.config(Job(seed=3, images=images, arm=arm))
            minibatches = 5 * images // config.baseline.batch_size
            assert config.baseline.epochs * minibatches == 300
            assert config.recovery.epochs * minibatches == 150
            assert (config.transfer.classes, bool(config.network.weights)) == (
                (0, False) if arm == "scratch" else (5, True)
            )
            assert config.data.chosen == ("dog", "frog", "horse", "ship", "truck")
            assert (config.seed, config.data.split_seed, config.data.train_per_class) == (3, 3, images)
    assert bench.source_config(3).data.chosen == ("airplane", "automobile", "bird", "cat", "deer")
    elsewhere = Bench(FULL, "elsewhere", Ledger(tmp_path / "rows.jsonl"), tmp_path / "work", math.inf)
    assert elsewhere.fingerprint(Job(seed=3, images=10, arm="1")) == bench.fingerprint(Job(seed=3, images=10, arm="1"))
    marks = {
        bench.fingerprint(Job(seed=s, images=10, arm=arm)) for s in (3, 4) for arm in ("1", "2", "none", "scratch")
    }
    assert len(marks) == 8


@pytest.mark.slow
def test_transfer_as_the_real_command_makes_its_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def process(command: Sequence[str], out: Path, what: str, _deadline_s: float) -> None:
        """Stands for a process of its own, whose imports take longer than what is asked for here."""
        ran.append(what)
        with (tmp_path / "log").open("a") as log:
            config, progress = load(Path(command[2])), PlainProgress(Console(file=log))
            run_campaign(out, config, redis_url="", progress=progress, deliver=False)

    monkeypatch.setattr("benchmarks.campaigns.process", process)
    monkeypatch.setattr("sys.argv", ["transfer", "--quick", "--jobs", "1", "--work", str(tmp_path)])
    pages = []
    for _ in range(2):
        transfer.main()
        pages.append(capsys.readouterr().out)
    assert ran == ["source, seed 0", "none, 10 images, seed 0", "1, 10 images, seed 0", "scratch, 10 images, seed 0"]
    rows = [json.loads(line) for line in (tmp_path / "quick" / "transfer.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["none", "1", "scratch"]
    assert all(row["updates"] == 40 and 0 < row["test"] <= 1 and row["compression"] >= 0.9 for row in rows)
    assert "\n| scratch | 1 | 51,461 | " in pages[0]
    assert pages[0].endswith(pages[1])  # the page again, and no more rows
