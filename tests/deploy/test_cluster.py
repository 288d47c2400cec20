"""A Ray cluster of three nodes with invented GPUs: nothing is lost, whatever is killed; nodes that come are used.

The faults are those of `python -m benchmarks.faults`, whose table is committed; what it counts is asserted here.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from benchmarks.faults import FAULTS, ROOT, UPDATES, Campaign, Server, Watcher, add_node, cluster, suffer, wait_until

pytestmark = pytest.mark.slow

CASES = {
    "while the driver runs": ["actor", "learner", "redis", "raylet", "outage"],
    "of the driver": ["driver", "sigterm", "disk", "ctrl-c"],
}


@pytest.fixture(scope="module")
def made() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROOUT_REDIS_URL", "")
        for name in ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "PYTHONPATH", "OMP_NUM_THREADS"):
            patch.setenv(name, "")  # set by the cluster; as before after it
        patch.setenv("RAY_health_check_period_ms", "1000")
        with cluster() as found:
            yield found


@pytest.mark.timeout(1200)  # five restarts of drivers, which a busy machine has needed 600 s for
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
    campaign = Campaign(tmp_path, server, made.address, 20)
    try:
        campaign.run()
        with Watcher(campaign) as watcher:
            campaign.wait_for(3)
            before = set(watcher.steps) - {"learner"}
            add_node(made)
            wait_until(lambda: len(watcher.steps.keys() - {"learner"}) == 2, "the second player plays")
            assert campaign.wait() == 0, campaign.log
        assert len(before) == 1
        assert sorted(campaign.recorded()) == list(range(20))
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
    campaign = Campaign(tmp_path, server, made.address, 16)
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
        assert sorted(campaign.recorded()) == list(range(16))
    finally:
        campaign.end()
        server.kill()


def doctor(made: Any, redis_url: str, out: Path) -> list[str]:
    """The lines of the real command, in a process of its own, as Ray is imported here already."""
    line = [sys.executable, "-m", "deploy.cli", "doctor", "--ray-address", made.address, "--redis", redis_url]
    line += ["--out", str(out)]
    shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert shown.returncode == 2, shown.stdout + shown.stderr  # invented GPUs are wrong
    return shown.stdout.splitlines()


def test_the_doctor_looks_at_every_node(made: Any, tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        lines = doctor(made, server.url, tmp_path / "campaign")
    finally:
        server.kill()
    # earlier tests have killed nodes, which Ray remembers
    assert [line for line in lines if line.startswith("ok    cluster: 3 nodes, 6 cores, 2 GPUs")]
    nodes = [line for line in lines if " node 127.0.0.1 " in line]
    assert len([line for line in nodes if line.startswith("ok ") and "Python 3" in line and "Ray 2" in line]) == 3
    assert len([line for line in nodes if line.startswith("ok ") and line.endswith("redis is reached")]) == 3
    assert len([line for line in nodes if line.startswith("ok ") and "0 GPUs offered by Ray, 0 listed" in line]) == 1
    assert len([line for line in nodes if line.startswith("ok ") and line.endswith("campaign can be written")]) == 3
    # invented ones are what no driver lists
    assert len([line for line in nodes if line.startswith("wrong") and "1 GPUs offered by Ray, 0 listed" in line]) == 2
    assert [line for line in lines if line.startswith("wrong redis")] == []


def test_the_doctor_says_from_which_node_redis_or_the_campaign_s_folder_cannot_be_reached(made: Any) -> None:
    lines = doctor(made, "redis://me:secret@127.0.0.1:1", Path("/proc/campaign"))
    assert len([line for line in lines if line.startswith("wrong node") and "redis cannot be reached" in line]) == 3
    assert len([line for line in lines if line.startswith("wrong redis server")]) == 1
    assert "secret" not in "\n".join(lines)
    # the driver runs on one of the three, and writes it there
    assert len([line for line in lines if line.startswith("wrong node") and "/proc/campaign cannot be" in line]) == 1
    assert len([line for line in lines if line.endswith("no node to start a campaign on")]) == 2
