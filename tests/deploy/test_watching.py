"""A real campaign on a local Ray, watched as its users do: on /metrics, by Prometheus, and in TensorBoard's files."""

import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from dashboards import alerts, metric_names, panel_queries
from event_records import shown
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import HAVE_PROMETHEUS, asked, prometheus
from tiny_campaign import LIMIT_S, environment, episodes, started, tiny, wait_until

from actors.metrics import (
    LEARNER_SKIPPED,
    LEARNER_WAIT,
    METRICS,
    PLAYER_REFUSED_SNAPSHOTS,
    REPLAY_EVICTED,
    REPLAY_REFUSED,
    REPLAY_REJECTED,
)

pytestmark = pytest.mark.slow

#: A counter that never rose is not exported. A tiny campaign has no such troubles, and its learner may never wait.
MAY_NEVER_RISE = {
    metric.exported
    for metric in (
        LEARNER_SKIPPED,
        LEARNER_WAIT,
        PLAYER_REFUSED_SNAPSHOTS,
        REPLAY_EVICTED,
        REPLAY_REFUSED,
        REPLAY_REJECTED,
    )
}
EXPECTED = {metric.exported for metric in METRICS} - MAY_NEVER_RISE
RATIOS = {metric.exported for metric in METRICS if metric.name.endswith("_ratio")}
PHASES = {
    "decide",
    "compact",
    "retrain",
    "evaluate",
    "score",
    "recover",
    "snapshot",
    "insert",
}  # and wait, where it was needed
EPISODES = 1000

Samples = list[tuple[str, dict[str, str], float]]


@dataclass(frozen=True)
class Watched:
    """A campaign that runs until the tests are over."""

    out: Path
    discovery: Path  # Ray's list of nodes for Prometheus

    def scrape(self) -> Samples:
        """(name, labels, value) of everything on the nodes' /metrics endpoints."""
        if not self.discovery.exists():
            return []
        addresses = [address for group in json.loads(self.discovery.read_text()) for address in group["targets"]]
        return [sample for address in addresses for sample in scraped(f"http://{address}/metrics")]

    def missing(self) -> set[str]:
        """What is not exported yet: names of metrics, and actors without an episode."""
        found = self.scrape()
        played = {labels["actor"] for name, labels, _ in found if name == "ray_zeroout_episodes_total"}
        return (EXPECTED - {name for name, *_ in found}) | ({"actor-0", "actor-1"} - played)


def scraped(url: str) -> Samples:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
    except urllib.error.URLError:  # not up yet
        return []
    families = text_string_to_metric_families(text)
    return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    config = tiny(folder / "tiny.toml", episodes=EPISODES, dashboard=True)
    with tempfile.TemporaryDirectory(prefix="zo-", dir="/tmp", ignore_cleanup_errors=True) as rays:
        # a folder of its own, with a name short enough for Ray's sockets; and gauges that do not wait ten seconds
        around = environment() | {"RAY_TMPDIR": rays, "RAY_metrics_report_interval_ms": "3000"}
        campaign = Watched(folder / "out", Path(rays) / "ray" / "prom_metrics_service_discovery.json")
        with started(around, folder / "log", "run", config, "--out", campaign.out) as driver:
            until = time.monotonic() + LIMIT_S
            while (missing := campaign.missing()) and driver.poll() is None and time.monotonic() < until:
                time.sleep(1)  # a look takes its time, which is the campaign's too
            assert not missing, (missing, (folder / "log").read_text())
            yield campaign
            driver.terminate()  # Ray goes sooner when it is told than when it has to find out
            driver.wait(LIMIT_S)


def test_every_metric_is_on_the_endpoint_with_sane_values(watched: Watched) -> None:
    ours = [sample for sample in watched.scrape() if sample[0] in EXPECTED]
    recorded = len(episodes(watched.out))
    assert {labels["campaign"][:-5] for _, labels, _ in ours} == {"out"}
    for name, _, value in ours:
        assert value >= 0
        assert value <= 1 or name not in RATIOS, name
    for actor in ("actor-0", "actor-1"):
        mine = {name: value for name, labels, value in ours if labels.get("actor") == actor}
        steps, played = mine["ray_zeroout_env_steps_total"], mine["ray_zeroout_episodes_total"]
        # Each step trains on two minibatches of 32; recovering, at two targets an episode, on four. Ray takes a
        # process's metrics one after the other, so that they may be some steps apart.
        assert 4 * played - 8 <= steps <= 4 * played + 16
        assert mine["ray_zeroout_retrained_images_total"] == pytest.approx(64 * steps + 256 * played, abs=1024)
        assert by_label(ours, "ray_zeroout_phase_seconds_total", "phase", actor).keys() >= PHASES
        assert all(value > 0 for value in by_label(ours, "ray_zeroout_phase_seconds_total", "phase", actor).values())
    once = {name: value for name, _, value in ours}
    assert once["ray_zeroout_planned_episodes"] == EPISODES
    assert 0 < once["ray_zeroout_recorded_episodes"] <= recorded
    assert once["ray_zeroout_replay_sampled_sequences_total"] > 0
    assert by_label(ours, "ray_zeroout_frontier_accuracy_ratio", "target").keys() == {"0.5", "0.8"}
    assert by_label(ours, "ray_zeroout_replay_waiting", "who").keys() == {"learner", "actors"}
    assert by_label(ours, "ray_zeroout_learner_delta_q", "place").keys() == {"first", "last"}


def by_label(samples: Samples, name: str, label: str, actor: str | None = None) -> dict[str, float]:
    """The values of one metric by one of its labels."""
    return {labels[label]: value for found, labels, value in samples if found == name and labels.get("actor") == actor}


def test_the_panels_name_nothing_that_a_node_does_not_export(watched: Watched) -> None:
    named = set().union(*map(metric_names, panel_queries())) - MAY_NEVER_RISE

    def missing() -> set[str]:
        return named - {name for name, *_ in watched.scrape()}

    wait_until(lambda: not missing(), "every metric of the dashboard is exported", 30.0)


@pytest.mark.skipif(not HAVE_PROMETHEUS, reason="prometheus is not on PATH (Debian: apt-get install)")
def test_a_prometheus_that_is_there_before_ray_sees_it_come(tmp_path: Path) -> None:
    discovery = tmp_path / "ray" / "nodes.json"
    with prometheus(discovery, tmp_path) as url:
        wait_until(lambda: asked(url, "vector(1)"), "Prometheus is up", 60.0)
        discovery.parent.mkdir()
        discovery.write_text(json.dumps([{"targets": [url.removeprefix("http://")]}]))  # its own pages will do
        wait_until(lambda: asked(url, 'up{job="ray"} == 1'), "the list of nodes is read", 60.0)


@pytest.mark.skipif(not HAVE_PROMETHEUS, reason="prometheus is not on PATH (Debian: apt-get install)")
def test_prometheus_answers_every_query_of_the_dashboard_and_the_alerts(watched: Watched, tmp_path: Path) -> None:
    with prometheus(watched.discovery, tmp_path) as url:
        wait_until(lambda: asked(url, "rate(ray_zeroout_env_steps_total[1m])"), "Prometheus has two scrapes", 60.0)
        (found,) = asked(url, "ray_zeroout_recorded_episodes")
        campaign, session = found["metric"]["campaign"], found["metric"]["SessionName"]
        for query in panel_queries():
            filled = query.replace("$campaign", campaign).replace("$SessionName", session)
            answer = asked(url, filled)  # raises where it does not parse
            if not metric_names(query) & (MAY_NEVER_RISE | {"ray_zeroout_redis_max_bytes"}):  # there is no limit
                assert answer, filled
        for rule in alerts().values():  # at first no counter has risen between two scrapes
            wait_until(lambda expr=rule["expr"]: asked(url, expr) == [], f"quiet: {rule['expr']}", 60.0)
        by_actor = asked(url, "sum by (actor) (rate(ray_zeroout_env_steps_total[1m]))")
        assert {one["metric"]["actor"] for one in by_actor} == {"actor-0", "actor-1"}


def test_tensorboard_is_shown_the_episodes_that_are_recorded(watched: Watched) -> None:
    before = len(episodes(watched.out))
    points = shown(watched.out / "tensorboard" / "search")
    steps = [step for step, _ in points["return"]]
    assert steps == list(range(1, len(steps) + 1))
    assert before - 1 <= len(steps)  # the one recorded last may be about to be written
    recorded = episodes(watched.out)[: len(steps)]
    assert [record["return"] for record in recorded] == [value for _, value in points["return"]]
    assert "loss" in shown(watched.out / "tensorboard" / "learner")
