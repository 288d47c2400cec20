"""What `zeroout doctor --ray-address` looks at: every node of a Ray cluster, each from a task that runs on it."""

import logging
import platform
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import redis
import torch
from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.check import Check
from deploy.doctor import nearest_existing
from deploy.ray_address import check_ray_address, no_cluster
from deploy.storage import probe
from env.errors import UserError
from learner.replay.connection import connect, redact

__all__ = ["cluster_checks"]

_ANSWER_S = 90.0  # a node starts a worker that imports torch first
_PATIENCE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class NodeFindings:
    """What a node says of itself."""

    versions: dict[str, str]
    cuda: str  # that torch was built for; "" for none
    gpus: int  # that nvidia-smi lists; torch shows a task none that has asked Ray for none
    redis: str  # "" where it was reached, or was not asked for; else why not
    storage: str  # "" where the campaign's folder can be written; else why not


def cluster_checks(address: str, redis_url: str | None, out: str) -> Iterator[Check]:
    """Look at a cluster that runs, and at each of its nodes; a node that does not answer is a line too.

    `out` is where the campaign will lie, a folder or a URI. Raises UserError where no cluster answers.
    """
    check_ray_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        raise no_cluster(address, str(error).splitlines()[0]) from error
    try:
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        alive = [node for node in nodes if node["Alive"]]
        yield _size(alive, len(nodes) - len(alive))
        yield _token()
        mine = own_findings(None, out).versions
        asked = [(node, _ask(node, redis_url, out)) for node in alive]
        for node, answer in asked:
            yield from _node(node, answer, mine, redis_url, out)
    finally:
        ray.shutdown()


def own_findings(redis_url: str | None, out: str) -> NodeFindings:
    """What this process's node has; called on every node."""
    listed = ""
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False
        ).stdout  # fmt: skip
    release = torch.__version__.partition("+")[0]  # a head without GPUs may have another build of the same
    return NodeFindings(
        versions={"Python": platform.python_version(), "torch": release, "Ray": ray.__version__},
        cuda=torch.version.cuda or "",
        gpus=len(listed.splitlines()),
        redis=_why_not_reached(redis_url) if redis_url else "",
        storage=_why_not_written(out),
    )


def _why_not_reached(url: str) -> str:
    try:
        with connect(url, patience_s=_PATIENCE_S) as client:
            client.ping()
    except redis.RedisError as error:
        return redact(str(error)) or type(error).__name__
    return ""


def _why_not_written(out: str) -> str:
    """A URI is written to; of a folder the nearest that is there has to take a file."""
    try:
        if "://" in out:
            probe(out)
        else:
            with tempfile.TemporaryFile(dir=nearest_existing(Path(out).absolute())):
                pass
    except UserError as error:
        return error.got
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _ask(node: dict[str, Any], redis_url: str | None, out: str) -> Any:
    """A task on the node, whatever else runs there."""
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(own_findings).options(num_cpus=0, scheduling_strategy=here, max_retries=0)
    return task.remote(redis_url, out)


def _size(alive: list[dict[str, Any]], dead: int) -> Check:
    total = {kind: sum(node["Resources"].get(kind, 0.0) for node in alive) for kind in ("CPU", "GPU")}
    gone = f"; {dead} gone" if dead else ""
    detail = f"{len(alive)} nodes, {total['CPU']:g} cores, {total['GPU']:g} GPUs{gone}"
    ok = total["CPU"] > 0
    return Check(name="cluster", ok=ok, detail=detail, remedy="" if ok else "ray start --num-cpus N on its nodes")


def _token() -> Check:
    on = get_authentication_mode() != AuthenticationMode.DISABLED
    off = "off: whoever reaches Ray's ports runs code here; keep its network closed (SECURITY.md), or set RAY_AUTH_MODE"
    return Check(name="token", ok=True, detail="asked for" if on else off)


def _node(node: dict[str, Any], answer: Any, mine: dict[str, str], redis_url: str | None, out: str) -> Iterator[Check]:
    name = f"node {node['NodeManagerAddress']} {node['NodeID'][:6]}"
    try:
        found: NodeFindings = ray.get(answer, timeout=_ANSWER_S)
    except ray.exceptions.GetTimeoutError:
        detail = f"no answer in {_ANSWER_S:g} s"
        yield Check(name=name, ok=False, detail=detail, remedy="ray status, and the node's logs in /tmp/ray")
        return
    except ray.exceptions.RayError as error:
        remedy = "install Zeroout on it (deploy/Dockerfile), or run this by ray job submit --working-dir ."
        yield Check(name=name, ok=False, detail=str(error).strip().splitlines()[-1], remedy=remedy)
        return
    yield _versions(name, found.versions, mine)
    yield _gpus(name, found, node["Resources"].get("GPU", 0.0))
    if redis_url is not None:
        remedy = "" if not found.redis else "open the way from this node to the server (bind, firewall, DNS)"
        detail = f"redis cannot be reached: {found.redis}" if found.redis else "redis is reached"
        yield Check(name=name, ok=not found.redis, detail=detail, remedy=remedy)
    yield _storage(name, found.storage, out, is_this=node["NodeID"] == ray.get_runtime_context().get_node_id())
    yield _metrics(name, node)


def _versions(name: str, found: dict[str, str], mine: dict[str, str]) -> Check:
    other = [f"{what} {found[what]}, here {version}" for what, version in mine.items() if found[what] != version]
    alike = ", ".join(f"{what} {version}" for what, version in found.items())
    remedy = "" if not other else "install the same on every node (deploy/Dockerfile)"
    return Check(name=name, ok=not other, detail="; ".join(other) or alike, remedy=remedy)


def _gpus(name: str, found: NodeFindings, offered: float) -> Check:
    """What Ray hands out has to be there, and torch has to be able to use it."""
    detail = f"{offered:g} GPUs offered by Ray, {found.gpus} listed by nvidia-smi"
    if found.gpus < offered:
        remedy = "ray start there with --num-gpus as nvidia-smi lists, or mend the driver"
        return Check(name=name, ok=False, detail=detail, remedy=remedy)
    if found.gpus and not found.cuda:
        remedy = "install a CUDA build of torch there: https://pytorch.org/get-started/locally"
        return Check(name=name, ok=False, detail=f"{detail}; torch is built without CUDA", remedy=remedy)
    return Check(name=name, ok=True, detail=detail)


def _storage(name: str, trouble: str, out: str, *, is_this: bool) -> Check:
    """Who runs the driver writes the campaign's folder; of another node it is only told."""
    if not trouble:
        return Check(name=name, ok=True, detail=f"{out} can be written")
    detail = f"{out} cannot be written ({trouble})"
    if is_this:
        return Check(name=name, ok=False, detail=detail, remedy="mount it, or correct its rights or the credentials")
    return Check(name=name, ok=True, detail=f"{detail}: no node to start a campaign on")


def _metrics(name: str, node: dict[str, Any]) -> Check:
    """Where Prometheus reads; told on the address that Ray's service discovery gives it."""
    where = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(where, timeout=_PATIENCE_S) as answer:
            size = len(answer.read())
    except OSError as error:
        remedy = "pip install 'ray[default]' there, and open that port (ray start --metrics-export-port) to Prometheus"
        return Check(name=name, ok=False, detail=f"no metrics at {where} ({error})", remedy=remedy)
    return Check(name=name, ok=True, detail=f"metrics at {where}, {size} bytes")
