import re

import pytest
from told import Told

from actors.metrics import METRICS, NO_METRICS, REPLAY_INSERTED, REPLAY_SIZE, Metric, Tally

UNITS = ("_seconds", "_bytes", "_ratio", "_nats")  # Prometheus's base units, and that of a cross-entropy


def test_no_name_is_used_twice() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS) > 25


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_prometheuss_rules(metric: Metric) -> None:
    assert re.fullmatch(r"zeroout_[a-z]+(_[a-z]+)*", metric.name)
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))  # the exporter's own endings
    assert not re.search(r"_(ms|milliseconds|minutes|mb|kb|percent)(_|$)", metric.name)
    for unit in UNITS:
        assert metric.name.endswith(unit) or f"{unit}_" not in f"{metric.name}_", "the unit is last"
    assert metric.description
    assert len(metric.by) <= 1
    assert not set(metric.by) & {"campaign", "actor"}


def test_ray_exports_counters_with_total() -> None:
    assert REPLAY_INSERTED.exported == "ray_zeroout_replay_inserted_sequences_total"
    assert REPLAY_SIZE.exported == "ray_zeroout_replay_size_sequences"


def test_a_tally_counts_what_came_since_the_first_look() -> None:
    told = Told()
    tally = Tally(told, REPLAY_INSERTED)
    for total in (100, 103, 103, 110):
        tally.look(total)
    assert told[REPLAY_INSERTED] == 10
    tally.look(2)  # a server that lost everything begins anew
    tally.look(5)
    assert told[REPLAY_INSERTED] == 13


def test_no_metrics_listens_to_nothing() -> None:
    NO_METRICS.add(REPLAY_INSERTED, 3)
    NO_METRICS.set(REPLAY_SIZE, 3)
