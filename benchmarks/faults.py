"""What a campaign loses when anything of it is killed: real kills, on a Ray cluster of three nodes.

`python -m benchmarks.faults --help` says what is killed and what is looked at.
"""

import argparse
import contextlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from benchmarks.processes import descendants
from benchmarks.step import cpu_name
from deploy.folder import CampaignFolder, read_json
from deploy.redis_server import find_server
from learner.replay.connection import connect
from learner.replay.ledger import Ledger

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

EPILOG = """\
The cluster: a head without GPUs, where driver, learner and Redis are, and two nodes with one GPU each (invented ones:
the players compute on the CPU), each with one of the two players. Each campaign is a tiny one on digits, in which the
fault happens at seeded random moments:
  actor     kill -9 of a player's process
  learner   kill -9 of the learner's process
  raylet    kill -9 of a node's raylet, its players with it; another node joins 2 seconds later
  driver    kill -9 of `zeroout run`; then `zeroout resume`
  redis     kill -9 of the server, which is started again at once (append-only file, synchronous)
  outage    the same, but the server is gone for --outage-s seconds
  sigterm   SIGTERM to the driver; then `zeroout resume`
  ctrl-c    Ctrl+C twice to the driver; then `zeroout resume`
  disk      nothing can be written any more when the learner saves a checkpoint (a limit on the size of its files);
            then `zeroout resume`

What is looked at, from outside, ten times a second: the campaign finishes; every episode is recorded once; the best
cross-entropy of no target ever rises; the learner's count of updates goes back by no more than checkpoint_period, as
of its last heartbeat; and how long after the cause is gone every player has made another step (a learner that was
killed: another update too).
"""

UPDATES = 5  # checkpoint_period
TINY = f"""
seed = 3
[network]
width = 0.25
[data]
validation_share = 0.2
[baseline]
epochs = 2
batch_size = 64
[episode]
targets = [0.5, 0.8]
waypoints = 4
batch_size = 32
step_minibatches = 64
recovery_minibatches = 8
score_images = 64
step_images = 100
[search]
actors = 2
[sequence]
burn_in = 1
unroll_length = 2
sequence_period = 2
[replay]
min_sequences = 4
[learner]
batch_size = 4
checkpoint_period = {UPDATES}
[controller]
hidden_size = 16
[recovery]
epochs = 1
batch_size = 64
distillation = 0.0
[cluster]
gpus_per_actor = 1.0
lease_s = 60
"""
_FULL_BYTES = 8192  # less than a checkpoint, more than what Ray's log files of the process hold
_LIMIT_S = 300.0  # for anything that has to come; then the campaign is called lost
_POLL_S = 0.1
_NODE_AWAY_S = 2.0


class LostError(AssertionError):
    """Something did not come, or was not as it has to be."""


# ---- the cluster and the server ----


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """A Ray of three nodes on the loopback address, in processes of our own."""
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        # Ray takes 127.0.0.1 for the machine's outer address, unless it believes that there are no clusters here
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_health_check_period_ms": "1000",  # as deploy/cluster.yaml: a node that is gone is known after 5 s, not 15
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),  # for the workers
        "OMP_NUM_THREADS": "1",
    }
    from ray.cluster_utils import Cluster

    # a shell has its background jobs, and all that they start, ignore Ctrl+C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            add_node(made)
        yield made
    finally:
        made.shutdown()  # type: ignore[no-untyped-call]


def add_node(made: Any) -> None:
    """One with a GPU."""
    made.add_node(num_cpus=2, num_gpus=1, node_ip_address="127.0.0.1")


class Server:
    """A Redis that is given by URL, as on a cluster; here by a socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder / 'redis.sock'}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it has read what it had."""
        settings = ["port", "0", "unixsocket", "redis.sock", "appendonly", "yes", "appendfsync", "always", "save", ""]
        command = [str(find_server()), *(f"--{w}" if i % 2 == 0 else w for i, w in enumerate(settings))]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        wait_until(self._answers, "Redis answers")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), redis.Redis(unix_socket_path=str(self.folder / "redis.sock")) as it:
            return bool(it.ping())
        return False


# ---- a campaign, and what is seen of it from outside ----


@dataclass
class Campaign:
    """A campaign's driver, as a user runs it."""

    folder: Path
    server: Server
    address: str
    episodes: int
    driver: subprocess.Popen[bytes] | None = None

    @property
    def out(self) -> Path:
        """The campaign's folder."""
        return self.folder / "out"

    @property
    def log(self) -> str:
        """What all its drivers have printed."""
        return (self.folder / "log").read_text()

    def run(self, *changes: str) -> None:
        """`zeroout run`, in the background."""
        config = self.folder / "tiny.toml"
        config.write_text(TINY)
        sets = [f"cluster.ray_address={json.dumps(self.address)}", f"search.episodes={self.episodes}", *changes]
        self._start("run", config, "--out", self.out, *(word for one in sets for word in ("--set", one)))

    def resume(self, *options: str) -> None:
        """`zeroout resume`, in the background."""
        self._start("resume", self.out, *options)

    def wait(self) -> int:
        """The driver's exit status."""
        assert self.driver is not None
        try:
            return self.driver.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise LostError(f"the driver did not end within {_LIMIT_S} s:\n{self.log}") from None

    def end(self) -> None:
        """kill -9 of the driver, where it still runs."""
        if self.driver is not None:
            self.driver.kill()
            self.driver.wait()

    def recorded(self) -> list[int]:
        """The numbers of the episodes in the folder, in order of recording."""
        path = self.out / "episodes.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line)["id"] for line in lines if line.endswith("\n")]

    def wait_for(self, episodes: int) -> None:
        """Until so many are recorded."""
        wait_until(lambda: len(self.recorded()) >= episodes or self.ended(), f"{episodes} episodes are recorded")
        if self.ended():
            raise LostError(f"the driver ended before {episodes} episodes were recorded:\n{self.log}")

    def ended(self) -> bool:
        """Whether the driver's process has."""
        return self.driver is not None and self.driver.poll() is not None

    def _start(self, *arguments: object) -> None:
        environment = {**os.environ, "ZEROOUT_REDIS_URL": self.server.url}
        with (self.folder / "log").open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", *map(str, arguments)],
                cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


@dataclass
class Watcher:
    """Looks at a campaign from outside, in a thread, until it is told to stop."""

    campaign: Campaign
    updates: int = 0
    updates_lost: int = 0  # the most that the count ever went back by
    rises: int = 0  # of a target's best cross-entropy
    steps: dict[str, list[float]] = field(default_factory=dict)  # when each worker was seen to have gone on

    def __enter__(self) -> "Watcher":
        """Begin."""
        self._best: dict[float, float] = {}
        self._seen: dict[str, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def learner_gone(self) -> None:
        """Called when the learner has just been killed: what it learned after its last checkpoint is lost."""
        saved = max((int(path.name[7:15]) for path in self.campaign.out.glob("checkpoints/update-*")), default=0)
        self.updates_lost = max(self.updates_lost, self.updates - saved)

    def went_on(self, since: float, workers: Sequence[str]) -> bool:
        """Whether each of the workers was seen to go on after `since`."""
        return all(any(moment > since for moment in self.steps.get(name, [])) for name in workers)

    def _watch(self) -> None:
        while not self._over.wait(_POLL_S):
            self._look_at_frontier()
            with contextlib.suppress(redis.RedisError, OSError, ValueError):
                self._look_at_workers()

    def _look_at_workers(self) -> None:
        prefix = CampaignFolder(self.campaign.out).redis_prefix()
        if prefix is None:
            return
        with contextlib.closing(connect(self.campaign.server.url, patience_s=_POLL_S)) as client:
            beats = Ledger(client, prefix).beats()
        for worker, text in beats.items():
            if self._seen.get(worker) != text:
                self._seen[worker] = text
                self.steps.setdefault(worker, []).append(time.monotonic())
        updates = json.loads(beats.get("learner", "{}")).get("updates", self.updates)
        self.updates_lost = max(self.updates_lost, self.updates - updates)
        self.updates = updates

    def _look_at_frontier(self) -> None:
        path = self.campaign.out / "frontier.json"
        if not path.is_file():
            return
        for row in read_json(path)["targets"]:
            best = row["best"]["cross_entropy"] if row["best"] else float("inf")
            self.rises += best > self._best.get(row["target"], float("inf"))
            self._best[row["target"]] = best


# ---- what is done to it ----


@dataclass(frozen=True)
class Scene:
    """A campaign that runs, its cluster, and the luck of this fault."""

    campaign: Campaign
    watcher: Watcher
    cluster: Any
    luck: random.Random
    outage_s: float


def kill_actor(scene: Scene) -> float:
    """Return when its cause is gone, as all faults do: at once, since Ray starts the process again."""
    kill_process(scene, "ray::EpisodeActor")
    return time.monotonic()


def kill_learner(scene: Scene) -> float:
    """See `kill_actor`."""
    kill_process(scene, "ray::Learner")
    scene.watcher.learner_gone()
    return time.monotonic()


def kill_raylet(scene: Scene) -> float:
    """A node that has a GPU; another one joins."""
    node = scene.luck.choice(sorted(scene.cluster.worker_nodes, key=lambda found: found.unique_id))
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    time.sleep(_NODE_AWAY_S)
    scene.cluster.remove_node(node, allow_graceful=False)
    add_node(scene.cluster)
    return time.monotonic()


def kill_driver(scene: Scene) -> float:
    """And resume."""
    return interrupt(scene, [signal.SIGKILL], -signal.SIGKILL)


def terminate_driver(scene: Scene) -> float:
    """And resume."""
    return interrupt(scene, [signal.SIGTERM], 130)


def interrupt_driver_twice(scene: Scene) -> float:
    """And resume."""
    return interrupt(scene, [signal.SIGINT, signal.SIGINT], 130)


def interrupt(scene: Scene, signals: list[signal.Signals], status: int) -> float:
    """Signals to the driver, which has to end with this status; and resume."""
    driver = scene.campaign.driver
    assert driver is not None
    for number in signals:
        driver.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(0.3)
    if scene.campaign.wait() != status:
        raise LostError(f"the driver ended with {driver.returncode}, not {status}:\n{scene.campaign.log}")
    scene.watcher.learner_gone()
    scene.campaign.resume()
    return time.monotonic()


def kill_redis(scene: Scene) -> float:
    """And start it again at once."""
    return away(scene, 0.0)


def outage(scene: Scene) -> float:
    """And start it again after a while."""
    return away(scene, scene.outage_s)


def away(scene: Scene, seconds: float) -> float:
    """kill -9 of Redis, and its start after so long."""
    scene.campaign.server.kill()
    time.sleep(seconds)
    scene.campaign.server.start()
    return time.monotonic()


def fill_disk(scene: Scene) -> float:
    """No file of the learner's may grow beyond what it has: its next checkpoint fails. And resume, with room again."""
    for pid in processes("ray::Learner"):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FULL_BYTES, resource.RLIM_INFINITY))
    if scene.campaign.wait() != 2 or "make room there and resume" not in scene.campaign.log:
        raise LostError(f"no clear message of a full disk:\n{scene.campaign.log}")
    scene.watcher.learner_gone()
    scene.campaign.resume()
    return time.monotonic()


FAULTS: dict[str, Callable[[Scene], float]] = {
    "actor": kill_actor,
    "learner": kill_learner,
    "raylet": kill_raylet,
    "driver": kill_driver,
    "redis": kill_redis,
    "outage": outage,
    "sigterm": terminate_driver,
    "ctrl-c": interrupt_driver_twice,
    "disk": fill_disk,
}
PLAYERS = ("actor-0", "actor-1")
#: Who has to go on after it; the players, where it is not said.
CONCERNED = {"learner": (*PLAYERS, "learner")}


def kill_process(scene: Scene, title: str) -> None:
    """kill -9 one of those with this title that this process's cluster has."""
    done = scene.campaign.out / "result.json"
    wait_until(lambda: processes(title) or done.is_file(), f"{title} runs")
    found = processes(title)
    if not found:
        raise LostError(f"the campaign was over before {title} could be killed: give it more episodes")
    os.kill(scene.luck.choice(found), signal.SIGKILL)


def processes(title: str) -> list[int]:
    """Those below this process whose command line begins so."""
    return sorted(pid for pid, line in descendants(os.getpid()).items() if line.startswith(title))


def wait_until(condition: Callable[[], object], what: str) -> None:
    """LostError where it does not come."""
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise LostError(f"waited {_LIMIT_S} s until {what}")
        time.sleep(_POLL_S / 2)


# ---- one fault after the other in one campaign ----


def suffer(
    faults: Sequence[str], made: Any, folder: Path, *, episodes: int, seed: int, outage_s: float
) -> dict[str, Any]:
    """Play a campaign in which these faults happen, one after the other, at random moments; what was lost.

    Raises LostError where it does not finish, or an episode is missing or there twice.
    """
    folder.mkdir(parents=True)
    luck = random.Random(f"{faults} {seed}")
    server = Server(folder)
    campaign = Campaign(folder, server, made.address, episodes)
    back: list[float] = []
    try:
        campaign.run()
        with Watcher(campaign) as watcher:
            scene = Scene(campaign, watcher, made, luck, outage_s)
            moments = sorted(luck.sample(range(1, episodes // 2), len(faults)))
            for fault, moment in zip(faults, moments, strict=True):
                campaign.wait_for(moment)
                time.sleep(luck.uniform(0.0, 1.0))
                gone = FAULTS[fault](scene)
                back.append(seconds_until_back(watcher, gone, CONCERNED.get(fault, PLAYERS)))
            status = campaign.wait()
        if status:
            raise LostError(f"the driver ended with {status}:\n{campaign.log}")
        recorded = campaign.recorded()
        if sorted(recorded) != list(range(episodes)):
            raise LostError(f"expected the episodes 0 to {episodes - 1} once each, got {sorted(recorded)}")
        return {
            "faults": list(faults),
            "episodes": episodes,
            "recorded": len(recorded),
            "updates": watcher.updates,
            "updates_lost": watcher.updates_lost,
            "rises": watcher.rises,
            "back_s": [round(seconds, 1) for seconds in back],
        }
    finally:
        campaign.end()
        server.kill()


def seconds_until_back(watcher: Watcher, since: float, workers: Sequence[str]) -> float:
    """From the moment that the cause is gone until all workers have gone on; NaN where the campaign ended before."""
    campaign = watcher.campaign
    wait_until(lambda: watcher.went_on(since, workers) or campaign.ended(), f"{workers} go on")
    if not watcher.went_on(since, workers):
        return math.nan
    return max(min(moment for moment in watcher.steps[name] if moment > since) for name in workers) - since


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The table, as Markdown."""
    import ray
    import torch

    lines = [
        "# What is lost when something is killed",
        "",
        f"`{command}` (`--help` says what is killed and what is looked at)",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores; Ray {ray.__version__}, torch {torch.__version__}, Python "
        f"{sys.version.split()[0]}. All nodes, the server and other work share these cores: seconds are upper bounds.",
        "",
        "| killed | times | episodes recorded once | updates lost at most | best ever worse | seconds until back |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        back = ", ".join("ended before" if math.isnan(seconds) else f"{seconds:.1f}" for seconds in row["back_s"])
        lines.append(
            f"| {row['faults'][0]} | {len(row['faults'])} | {row['recorded']} of {row['episodes']} "
            f"| {row['updates_lost']} of {row['updates']} | {row['rises']} times | {back} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="default: all; rows of others stay"
    )
    parser.add_argument("--moments", type=int, default=3, help="of each fault (default 3)")
    parser.add_argument("--episodes", type=int, default=48, help="of each campaign (default 48)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--outage-s", type=float, default=60.0, help="how long Redis is gone (default 60)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where faults.json and faults.md are written")
    given = parser.parse_args()
    given.results.mkdir(parents=True, exist_ok=True)
    kept = given.results / "faults.json"
    rows = {row["faults"][0]: row for row in read_json(kept)} if kept.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, cluster() as made:
        for name in given.faults:
            rows[name] = suffer(
                [name] * given.moments, made, Path(folder) / name,
                episodes=given.episodes, seed=given.seed, outage_s=given.outage_s,
            )  # fmt: skip
            print(rows[name], flush=True)
            kept.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    text = page([rows[name] for name in FAULTS if name in rows], "python -m benchmarks.faults")
    (given.results / "faults.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
