"""The files that launch a cluster: each by its own schema, and against what is in the tree."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
from launch import IMAGE_ROOT, ROOT, campaign_of, parse_command, read_yaml
from shared_server import free_port, program, serving

from learner.replay.connection import connect

COMPOSE = read_yaml("deploy/docker-compose.yaml")
CLUSTER = read_yaml("deploy/cluster.yaml")
JOB = read_yaml("deploy/kuberay/rayjob.yaml")
RAY_CLUSTER = read_yaml("deploy/kuberay/raycluster.yaml")
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTP]i?)?")  # of Kubernetes, without exponents
#: files of the monitoring, which compose mounts
MONITORING = ("deploy/prometheus/", "deploy/grafana/")


def instructions(name: str) -> list[str]:
    """What stands behind each instruction of this name in the Dockerfile, continued lines joined."""
    lines = re.sub(r"(?m)^#.*\n", "", DOCKERFILE).replace("\\\n", " ").splitlines()
    return [line.partition(" ")[2].strip() for line in lines if line.startswith(f"{name} ")]


def pip_commands() -> list[list[str]]:
    """The arguments of every pip in the Dockerfile."""
    found = re.findall(r"\bpip (install [^;&|]*)", " ; ".join(instructions("RUN")))
    return [shlex.split(command) for command in found]


# ---- Dockerfile ----


def test_everything_that_is_copied_is_there_and_reaches_the_builder() -> None:
    sent = re.findall(r"(?m)^!(.*)$", (ROOT / ".dockerignore").read_text())
    for line in instructions("COPY"):
        *sources, _ = shlex.split(line)
        for source in sources:
            assert (ROOT / source).exists()
            assert source in sent


def test_the_image_installs_the_pinned_torch_first_as_the_makefile_does() -> None:
    pinned = re.search(r"torch==\S+", (ROOT / "Makefile").read_text())
    assert pinned is not None
    commands = pip_commands()
    assert [pinned[0] in command for command in commands] == [True, True, False]
    assert commands[-1][-4:] == ["-c", "constraints.txt", "-e", "."]


def test_every_pip_command_is_one_that_pip_takes() -> None:
    # Offline: torch is here already, and of the project only the metadata are made, by what is installed here.
    for command in pip_commands():
        dry = [*command, "--dry-run", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
        dry = [word for word in dry if not word.startswith("https://") and word != "--index-url"]
        ended = subprocess.run(
            [sys.executable, "-m", "pip", *dry], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == 0, ended.stderr


def test_the_builds_commands_are_a_shells_and_an_unknown_device_ends_it(tmp_path: Path) -> None:
    chosen, torch = instructions("RUN"), ""
    for command in chosen:
        assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0
        torch = command if command.startswith("case") else torch
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@"\n')  # says what it was asked, in place of an install of gigabytes
    pip.chmod(0o700)
    for device, code, said in (
        ("cpu", 0, "whl/cpu"),
        ("gpu", 0, "torch=="),
        ("tpu", 1, "expected cpu or gpu, got tpu"),
    ):
        environment = {"DEVICE": device, "PATH": f"{tmp_path}:/bin:/usr/bin"}
        ended = subprocess.run(["sh", "-c", torch], env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == code
        assert said in ended.stdout + ended.stderr
        assert ("whl/cpu" in ended.stdout) == (device == "cpu")


def test_the_image_runs_as_an_ordinary_user_from_a_pinned_base() -> None:
    assert instructions("USER") == ["zeroout"]
    assert "useradd" in instructions("RUN")[0]
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in instructions("FROM"))
    (start,) = instructions("CMD")
    command, *rest = json.loads(start)
    assert (command, rest) == ("zeroout", ["--help"])
    (workdir,) = instructions("WORKDIR")
    assert workdir == IMAGE_ROOT


def test_no_secret_reaches_the_image_or_git() -> None:
    assert "**/.env" in (ROOT / ".dockerignore").read_text().splitlines()
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    for line in (ROOT / "deploy/env.example").read_text().splitlines():
        assert line.startswith("#") or line.endswith("="), "a value in the example is one that somebody will use"


# ---- compose ----


def test_compose_has_its_services_from_pinned_images() -> None:
    assert set(COMPOSE["services"]) == {"ray-head", "ray-worker", "redis", "prometheus", "grafana"}
    for service in COMPOSE["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", service["image"])


def test_compose_publishes_on_loopback_only() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in published)
    assert not any("network_mode" in service for service in COMPOSE["services"].values())


def mounted() -> list[str]:
    """Files and folders of the checkout that compose mounts."""
    sources = [
        volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service.get("volumes", [])
    ]
    named = set(COMPOSE["volumes"])
    return sorted(f"deploy/{source.removeprefix('./')}" for source in sources if source not in named)


@pytest.mark.parametrize("path", mounted())
def test_what_compose_mounts_is_in_the_tree(path: str) -> None:
    if path.startswith(MONITORING) and not any((ROOT / folder).exists() for folder in MONITORING):
        pytest.skip("this checkout has no monitoring")
    assert (ROOT / path).exists()


def test_compose_builds_the_dockerfile_of_this_tree() -> None:
    build = COMPOSE["services"]["ray-head"]["build"]
    context = (ROOT / "deploy" / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    assert set(build["args"]) == set(re.findall(r"(?m)^ARG (\w+)", DOCKERFILE))


def test_every_secret_of_compose_comes_from_the_file_and_is_asked_for() -> None:
    text = (ROOT / "deploy/docker-compose.yaml").read_text()
    example = set(re.findall(r"(?m)^(\w+)=", (ROOT / "deploy/env.example").read_text()))
    assert set(re.findall(r"\$\{(\w+):\?", text)) == example
    assert set(re.findall(r"\$\{(\w+)", text)) - example == {"DEVICE"}


@pytest.mark.parametrize("line", [COMPOSE["services"][name]["command"] for name in ("ray-head", "ray-worker")])
def test_the_ray_commands_of_compose_are_rays(line: str) -> None:
    assert_ray_start(shlex.split(line))


def assert_ray_start(words: list[str]) -> None:
    """The words are options of `ray start`; nothing is started."""
    from ray.scripts.scripts import start

    assert words[:2] == ["ray", "start"]
    start.make_context("start", list(words[2:]))


@pytest.fixture
def composed_redis(tmp_path: Path) -> Iterator[int]:
    """Compose's own command for Redis, its paths and port in this test's folder; yields the port."""
    server, port = program("redis-server"), free_port()
    shell, option, script = COMPOSE["services"]["redis"]["command"]
    for name in ("redis.conf", "users.acl"):
        shutil.copy(ROOT / "deploy" / name, tmp_path)
    places = {"/etc/zeroout": str(tmp_path), "/tmp/users.acl": f"{tmp_path}/made.acl", "/data": str(tmp_path)}
    for place, here in places.items():
        script = script.replace(place, here)
    script = script.replace("$$", "$").replace("0.0.0.0", "127.0.0.1").replace("--port 6379", f"--port {port}")
    script = script.replace("redis-server ", f"{server} ")
    script = f"REDIS_PASSWORD=pass; {script}"
    with serving(Path(shell), tmp_path, option, script, url=f"redis://127.0.0.1:{port}/0"):
        yield port


def test_redis_in_compose_lets_only_our_user_in(composed_redis: int, tmp_path: Path) -> None:
    with connect(f"redis://zeroout:pass@127.0.0.1:{composed_redis}/0") as client:
        assert client.ping()
    assert hashlib.sha256(b"pass").hexdigest() in (tmp_path / "made.acl").read_text()


# ---- ray up ----


def test_the_cluster_file_is_valid_by_rays_own_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)


def test_the_head_is_on_demand_and_the_workers_are_gpus_on_spot() -> None:
    types = CLUSTER["available_node_types"]
    head, worker = types[CLUSTER["head_node_type"]], types["gpu-worker"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert worker["resources"]["GPU"] >= 1
    assert 0 < worker["min_workers"] <= worker["max_workers"] <= CLUSTER["max_workers"]


def test_the_ray_commands_of_the_cluster_file_are_rays_and_want_the_token() -> None:
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        line = CLUSTER[name][-1]
        assert line.startswith("export RAY_AUTH_MODE=token")
        words = shlex.split(line)
        assert_ray_start(["ray", *words[words.index(".venv/bin/ray") + 1 :]])


def test_the_commands_of_the_cluster_file_are_a_shells_and_show_no_secret() -> None:
    for name in ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for line in CLUSTER[name]:
            assert subprocess.run(["sh", "-n", "-c", line], check=False).returncode == 0
            assert not re.search(r"rediss?://|TOKEN=", line)


# ---- KubeRay ----


@pytest.mark.parametrize(("document", "kind"), [(JOB, "RayJob"), (RAY_CLUSTER, "RayCluster")])
def test_the_custom_resources_are_those_of_kuberay(document: dict[str, Any], kind: str) -> None:
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    assert re.fullmatch(r"[a-z][a-z0-9-]*", document["metadata"].get("name") or document["metadata"]["generateName"])


def test_a_job_gets_the_cluster_that_also_stands_alone_at_our_ray_version() -> None:
    assert JOB["spec"]["rayClusterSpec"] == RAY_CLUSTER["spec"]
    assert f"ray=={RAY_CLUSTER['spec']['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()


def groups() -> list[dict[str, Any]]:
    return [RAY_CLUSTER["spec"]["headGroupSpec"], *RAY_CLUSTER["spec"]["workerGroupSpecs"]]


def test_every_group_has_what_kuberay_requires() -> None:
    for group in groups():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["name"]
        assert re.search(r":\d+\.\d+\.\d+", container["image"])
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    for group in groups()[1:]:
        assert group["groupName"]
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_resources_are_quantities_and_what_is_asked_is_the_limit() -> None:
    for group in groups():
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        for quantity in resources["limits"].values():
            assert QUANTITY.fullmatch(quantity)


def test_pods_run_as_the_images_user_without_privileges() -> None:
    for group in groups():
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert f"--uid {spec['securityContext']['runAsUser']} " in DOCKERFILE
        assert spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_manifests_hold_no_secret_and_want_the_token() -> None:
    variables = {entry["name"]: entry for entry in groups()[0]["template"]["spec"]["containers"][0]["env"]}
    assert list(variables.pop("ZEROOUT_REDIS_URL")["valueFrom"]) == ["secretKeyRef"]
    assert {name: entry["value"] for name, entry in variables.items()} == {"RAY_health_check_period_ms": "1000"}
    assert RAY_CLUSTER["spec"]["authOptions"] == {"mode": "token"}


def test_the_jobs_entrypoint_is_our_command_on_a_campaign_that_the_workers_can_play() -> None:
    name, parameters = parse_command(JOB["spec"]["entrypoint"])
    assert (name, parameters["ray_address"]) == ("run", "auto")
    config = campaign_of(parameters)
    worker = groups()[1]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.search.actors * config.cluster.gpus_per_actor <= worker["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert config.cluster.cpus_per_actor <= int(limits["cpu"])
    (mount,) = worker["template"]["spec"]["containers"][0]["volumeMounts"]
    assert Path(parameters["out"]).is_relative_to(mount["mountPath"])
