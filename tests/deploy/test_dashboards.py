"""The dashboard, the alerts and the provisioning files hold together, and name only metrics that we export."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards import DEPLOY, PROMETHEUS, RULES, alerts, dashboard, metric_names, panel_queries, panels

from actors.metrics import METRICS

EXPORTED = {metric.exported: metric for metric in METRICS}
#: Ray's own metrics that the dashboard shows; tests/deploy/test_watching.py sees them on a real node.
OF_RAY = {"ray_node_cpu_count", "ray_node_cpu_utilization"}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on PATH (Debian: apt-get install prometheus)"
)


def test_the_dashboard_has_the_uid_that_rays_dashboard_is_told_to_frame() -> None:
    read = dashboard()
    assert read["uid"] == "zeroout"
    readme = (DEPLOY.parent / "README.md").read_text()
    assert "RAY_GRAFANA_DEFAULT_DASHBOARD_UID=zeroout" in readme
    # what Ray's dashboard passes in the address of the frame
    variables = {variable["name"]: variable for variable in read["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["SessionName"]["allValue"] == ".+"
    assert set(variables) == {"datasource", "SessionName", "campaign"}


def test_throughput_by_actor_comes_first() -> None:
    first = min(panels(), key=lambda panel: (panel["gridPos"]["y"], panel["gridPos"]["x"]))
    (target,) = first["targets"]
    assert re.fullmatch(r"sum by \(actor\) \(rate\(ray_zeroout_env_steps_total\{[^}]*\}\[1m\]\)\)", target["expr"])
    assert target["legendFormat"] == "{{actor}}"


def test_panels_have_numbers_of_their_own_and_do_not_lie_on_each_other() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    # Ray's overview page frames these two of whatever dashboard has the uid
    assert {24: "Nodes", 41: "CPU in use"}.items() <= {panel["id"]: panel["title"] for panel in everything}.items()
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_asks_the_chosen_data_source_and_campaign() -> None:
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            for name, selector in re.findall(r"(ray_[a-z_]+)(\{[^}]*\})?", target["expr"]):
                assert 'SessionName=~"$SessionName"' in selector
                assert ('campaign="$campaign"' in selector) == name.startswith("ray_zeroout_")


def test_every_metric_is_shown_and_no_other_is_named() -> None:
    shown = set().union(*map(metric_names, panel_queries()))
    assert shown == set(EXPORTED) | OF_RAY
    for rule in alerts().values():
        assert metric_names(rule["expr"]) <= set(EXPORTED)
    for variable in dashboard()["templating"]["list"]:
        assert metric_names(variable.get("definition", "")) <= set(EXPORTED)


def test_counters_are_asked_for_rates_and_gauges_are_not() -> None:
    for query in [*panel_queries(), *(rule["expr"] for rule in alerts().values())]:
        for name in metric_names(query) & set(EXPORTED):
            rated = re.search(rf"(rate|increase)\({name}(\{{[^}}]*\}})?\[\d+m\]\)", query) is not None
            assert rated == (EXPORTED[name].kind == "counter"), query


def test_queries_group_by_labels_that_their_metrics_have() -> None:
    for query in panel_queries():
        grouped = set(re.findall(r"by \(([a-z]+)\)", query))
        for name in metric_names(query) & set(EXPORTED):
            assert grouped <= {"campaign", "actor", *EXPORTED[name].by}, query


def test_prometheus_reads_rays_list_of_nodes_and_the_alerts() -> None:
    config = yaml.safe_load(PROMETHEUS.read_text())
    assert [PROMETHEUS.parent / name for name in config["rule_files"]] == [RULES]
    (job,) = config["scrape_configs"]
    nodes = {"files": ["/tmp/ray/prom_metrics_service_discovery.json"], "refresh_interval": "10s"}
    assert job["file_sd_configs"] == [nodes]
    for rule in alerts().values():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_grafana_is_given_the_data_source_that_ray_asks_for_and_the_dashboards_folder() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["name"], source["type"]) == ("Prometheus", "prometheus")  # RAY_PROMETHEUS_NAME's default
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "zeroout.yml").read_text())["providers"]
    assert provider["options"] == {"path": "$ZEROOUT_DASHBOARDS"}
    readme = (DEPLOY.parent / "README.md").read_text()
    for named in ("ZEROOUT_DASHBOARDS=", "deploy/grafana/provisioning", "deploy/grafana/grafana.ini"):
        assert named in readme
    assert "allow_embedding = true" in (DEPLOY / "grafana" / "grafana.ini").read_text()


@needs_promtool
def test_promtool_takes_the_configuration_and_the_alerts(tmp_path: Path) -> None:
    checked = subprocess.run(
        ["promtool", "check", "config", str(PROMETHEUS)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(alerts())} rules found" in checked.stdout


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    inside = ",".join(f'{key}="{value}"' for key, value in {"campaign": "demo-1234", **labels}.items())
    return {"series": f"{name}{{{inside}}}", "values": values}


QUIET = [  # two actors that step, an episode a minute, a Redis with room
    series("ray_zeroout_env_steps_total", "0+10x30", actor="actor-0"),
    series("ray_zeroout_env_steps_total", "0+10x30", actor="actor-1"),
    series("ray_zeroout_last_episode_timestamp_seconds", "0+60x30"),
    series("ray_zeroout_recorded_episodes", "0+1x30"),
    series("ray_zeroout_planned_episodes", "100x30"),
    series("ray_zeroout_redis_used_bytes", "50x30"),
    series("ray_zeroout_redis_max_bytes", "100x30"),
]


@needs_promtool
@pytest.mark.parametrize(
    ("changed", "fires"),
    [
        ([], set()),
        ([series("ray_zeroout_last_episode_timestamp_seconds", "0x30")], {"ZerooutNoEpisodes"}),
        (
            [series("ray_zeroout_env_steps_total", "50x30", actor=f"actor-{number}") for number in range(2)],
            {"ZerooutStandsStill"},
        ),
        ([series("ray_zeroout_env_steps_total", "50x30", actor="actor-1")], set()),  # the other one goes on
        ([series("ray_zeroout_redis_used_bytes", "95x30")], {"ZerooutRedisAlmostFull"}),
        # no limit: 0 is not divided by
        ([series("ray_zeroout_redis_max_bytes", "0x30"), series("ray_zeroout_redis_used_bytes", "95x30")], set()),
    ],
)
def test_an_alert_fires_for_what_it_is_for_and_for_nothing_else(
    tmp_path: Path, changed: list[dict[str, str]], fires: set[str]
) -> None:
    replaced = {one["series"] for one in changed}
    kept = [one for one in QUIET if one["series"] not in replaced]
    expected: list[dict[str, Any]] = [
        {"eval_time": "25m", "alertname": name, "exp_alerts": [fired(name)] if name in fires else []}
        for name in alerts()
    ]
    case = {"interval": "1m", "input_series": [*kept, *changed], "alert_rule_test": expected}
    path = tmp_path / "test.yml"
    path.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [case]}))
    ran = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def fired(name: str) -> dict[str, Any]:
    """The alert as promtool expects it, its texts filled in."""
    value = {"ZerooutNoEpisodes": "25m 0s", "ZerooutRedisAlmostFull": "95%"}.get(name, "")
    rule = alerts()[name]
    texts = {
        key: re.sub(r"\{\{ \$value[^}]*\}\}", value, text.replace("{{ $labels.campaign }}", "demo-1234"))
        for key, text in rule["annotations"].items()
    }
    return {"exp_labels": {**rule["labels"], "campaign": "demo-1234"}, "exp_annotations": texts}
