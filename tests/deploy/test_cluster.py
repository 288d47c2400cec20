"""A Ray cluster of three nodes with invented GPUs: nothing is lost, whatever is killed; nodes that come are used.

The faults are those of `python -m benchmarks.faults`, whose table is committed; what it counts is asserted here.
"""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rich.console import Console

from benchmarks.faults import FAULTS, UPDATES, Campaign, Server, Watcher, add_node, cluster, suffer, wait_until
from deploy.cluster_doctor import cluster_checks
from deploy.doctor import run_doctor

pytestmark = pytest.mark.slow

CASES = {
    "while the driver runs": ["actor", "learner", "redis", "raylet", "outage", "actor", "learner"],
    "of the driver": ["driver", "sigterm", "disk", "ctrl-c"],
}


@pytest.fixture(scope="module")
def made() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROOUT_REDIS_URL", "")
        for name in ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "PYTHONPATH", "OMP_NUM_THREADS"):
            patch.setenv(name, "")  # set by the cluster; as before after it
        with cluster() as found:
            yield found


@pytest.mark.parametrize("faults", CASES.values(), ids=CASES)
def test_nothing_is_lost_that_was_won(made: Any, tmp_path: Path, faults: list[str]) -> None:
    row = suffer(faults, made, tmp_path / "campaign", episodes=60, seed=1, outage_s=5.0)
    # `suffer` raises unless the campaign finishes with every episode once
    assert row["recorded"] == row["episodes"] == 60
    assert row["rises"] == 0
    assert row["updates_lost"] <= UPDATES
    assert row["updates"] > 0
    assert len(row["back_s"]) == len(faults)
    assert not math.isnan(row["back_s"][0])


def test_every_fault_of_the_benchmark_is_tested() -> None:
    assert {fault for case in CASES.values() for fault in case} == set(FAULTS)


def test_a_node_that_joins_later_is_given_a_player(made: Any, tmp_path: Path) -> None:
    node = made.list_all_nodes()[-1]
    made.remove_node(node)
    server = Server(tmp_path)
    campaign = Campaign(tmp_path, server, made.address, 40)
    try:
        campaign.run()
        with Watcher(campaign) as watcher:
            campaign.wait_for(3)
            before = set(watcher.steps) - {"learner"}
            add_node(made)
            wait_until(lambda: len(watcher.steps.keys() - {"learner"}) == 2, "the second player plays")
            assert campaign.wait() == 0, campaign.log
        assert len(before) == 1
        assert sorted(campaign.recorded()) == list(range(40))
    finally:
        campaign.end()
        server.kill()


def test_players_that_no_node_has_room_for_are_told_of(made: Any, tmp_path: Path) -> None:
    server = Server(tmp_path)
    campaign = Campaign(tmp_path, server, made.address, 4)
    try:
        campaign.run("cluster.gpus_per_actor=8")
        expected = "no player has begun yet: each asks for 8 GPUs and 1 cores, the cluster has 2 and 6 in all"
        wait_until(lambda: expected in campaign.log, "it is said")
    finally:
        campaign.end()
        server.kill()


def test_a_redis_that_was_emptied_is_noticed_and_gone_on_with_only_when_asked(made: Any, tmp_path: Path) -> None:
    server = Server(tmp_path)
    campaign = Campaign(tmp_path, server, made.address, 24)
    try:
        campaign.run()
        campaign.wait_for(4)
        campaign.end()
        recorded = campaign.recorded()
        with redis.Redis(unix_socket_path=server.url.removeprefix("unix://")) as client:
            client.flushall()
        campaign.resume()
        assert campaign.wait() == 2
        last = campaign.log.splitlines()[-1]
        assert f"sequences inserted by the {len(recorded)} episodes in the folder, got 0 of them" in last
        assert "--refill-replay" in last
        campaign.resume("--refill-replay")
        assert campaign.wait() == 0, campaign.log
        assert campaign.recorded()[: len(recorded)] == recorded
        assert sorted(campaign.recorded()) == list(range(24))
    finally:
        campaign.end()
        server.kill()


def test_the_doctor_looks_at_every_node(made: Any, tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        checks = list(cluster_checks(made.address, server.url))
    finally:
        server.kill()
    by_name: dict[str, list[Any]] = {}
    for check in checks:
        by_name.setdefault(check.name, []).append(check)
    nodes = [name for name in by_name if name.startswith("node ")]
    assert by_name["cluster"][0].detail.startswith("3 nodes, 6 cores, 2 GPUs")
    assert len(nodes) == 3
    for name in nodes:
        versions, gpus, reached, _metrics = by_name[name]
        assert versions.ok, versions
        assert "Ray 2." in versions.detail
        assert reached.ok, reached
        # invented GPUs are what no driver lists
        assert gpus.ok == gpus.detail.startswith("0 GPUs offered")


def test_the_doctor_says_from_which_node_redis_cannot_be_reached(made: Any) -> None:
    checks = [
        check for check in cluster_checks(made.address, "redis://me:secret@127.0.0.1:1") if "redis" in check.detail
    ]
    assert len(checks) == 3
    assert not any(check.ok for check in checks)
    assert "secret" not in repr(checks)


def test_a_cluster_that_does_not_answer_is_one_wrong_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (check,) = cluster_checks("localhost:bad", None)
    assert not check.ok
    assert "ray start --head" in check.remedy
    screen = io.StringIO()
    assert run_doctor(Console(file=screen, width=200), ray_address="localhost:bad") == 2
    assert "wrong cluster: no answer at localhost:bad" in screen.getvalue()
