"""The driver tells the frontier, the episodes, and Redis's memory."""

import time
from pathlib import Path

import redis
from told import Told

from actors.metrics import (
    EPISODES_PLANNED,
    EPISODES_RECORDED,
    FRONTIER_ACCURACY,
    FRONTIER_CROSS_ENTROPY,
    LAST_EPISODE,
    REDIS_MAX_BYTES,
    REDIS_USED_BYTES,
)
from deploy.event_files import EventFiles
from deploy.progress import SearchSnapshot
from deploy.telemetry import Telemetry
from learner.replay.connection import connect, memory_bytes

SNAPSHOT = SearchSnapshot(
    done=7,
    total=24,
    actors=[],
    learner_updates=3,
    learner_loss=None,
    replay_size=0,
    best=[(0.5, "taylor", 0.25, 0.95), (0.875, "controller", 0.5, 0.75)],
    seconds_elapsed=1.0,
    seconds_left=None,
)
RECORD = {"id": 0, "group": "search", "return": -1.0, "seconds": 4.0, "phases": {}, "finished": 2e9, "targets": []}


def test_a_look_tells_the_frontier_by_target_and_how_far_the_campaign_is(tmp_path: Path) -> None:
    told = Told()
    with EventFiles(tmp_path, []) as events:
        Telemetry(told, events, lambda: (1000, 4000)).look(SNAPSHOT, {})
    assert told.by(FRONTIER_ACCURACY) == {"0.5": 0.95, "0.875": 0.75}
    assert told.by(FRONTIER_CROSS_ENTROPY) == {"0.5": 0.25, "0.875": 0.5}
    assert (told[EPISODES_RECORDED], told[EPISODES_PLANNED]) == (7, 24)
    assert (told[REDIS_USED_BYTES], told[REDIS_MAX_BYTES]) == (1000, 4000)


def test_the_last_episode_is_the_drivers_start_before_there_is_one(tmp_path: Path) -> None:
    told = Told()
    with EventFiles(tmp_path, []) as events:
        telemetry = Telemetry(told, events, lambda: None)
        assert abs(told[LAST_EPISODE] - time.time()) < 60
        telemetry.episodes([RECORD])
        telemetry.look(SNAPSHOT, {})
    assert told[LAST_EPISODE] == 2e9
    assert REDIS_USED_BYTES not in {metric for metric, _ in told.gauges}


def test_a_server_says_what_memory_it_uses_and_one_that_is_away_or_does_not_say_is_no_error(
    client: redis.Redis, tmp_path: Path
) -> None:
    found = memory_bytes(client)
    assert found is not None
    assert found[0] > 100_000
    assert found[1] == 0  # the embedded server has no limit
    assert memory_bytes(connect(f"unix://{tmp_path}/none.sock", patience_s=0.1)) is None
