"""Replay speed: ours on the embedded server, beside the replay servers and buffers that people use today.

`python -m benchmarks.replay --help` says what is compared and how.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.replay_systems import environments, payload
from benchmarks.replay_systems.page import report
from benchmarks.replay_systems.process import ROOT, WorkerError, WorkerProcess, server
from benchmarks.step import RESULTS, cpu_name
from learner.replay.codec import decode, encode

BATCH = 64
CAPACITY = 10_000
SIZES = (1_000, 10_000, 100_000, 1_000_000)
MEASURES = {"insert_one": ("insert", 1), "insert_batch": ("insert", BATCH), "sample": ("sample", BATCH)}
PEERS = ROOT / ".peers"
LONGEST_ERROR = 160

EPILOG = """\
The systems, each worker a process of its own, each Redis server one of its own with the embedded server's settings
(append-only file, written before each reply, synced every second):
  ours-unix, ours-tcp    learner.replay.Replay on the embedded server, by unix socket and by TCP on the loopback
  ours-pipelined         the same by unix socket behind learner.replay.PipelinedReplay, as a campaign's learner has it:
                         samples fetched ahead, inserts and priorities written behind and all acknowledged at the end of
                         the time measured; inserts that wait go together, so that one by one is not one by one there
  raw-unix, raw-tcp      GET and SET of the same bytes by the same client, pipelined by 64, no priorities, nothing
                         encoded or decoded: what server, wire and client allow
  reverb                 dm-reverb 0.14.0: prioritized table in a server process, gRPC on the loopback, fetched ahead
  torchrl, torchrl-bytes TorchRL 0.14.1's StoreStorage on Redis, by unix socket; uniform only, so it has no update. Each
                         array a tensor, or the whole sequence one tensor of bytes
  cpprb                  cpprb 11.0.0 in process: no server, no wire; the upper bound
  rllib                  RLlib's PrioritizedEpisodeReplayBuffer in process; a draw copies nothing

What is measured, in a full replay, where every insert evicts:
  insert_one             insert of one sequence a call, each acknowledged; arrays go in, encoding included
  insert_batch           the same, 64 a call
  sample                 a batch of 64 drawn by priority, arrays in hand, then 64 new priorities, one after the other
Latencies are of one call: insert of 1, sample of 64, update of 64. Bytes a sequence are what the server says that it
uses (Redis), and how its resident memory grew. The table of sizes has sequences of about 100 bytes, so that a million
fit, and a server filled anew for each size.

Rounds are interleaved, in turning order, so that whatever else runs on the machine meets all systems alike; the first
is thrown away, and each measurement is preceded by a fifth of its time unmeasured. A ratio pairs ours and the other in
the same round: above 1, ours is quicker.

Peers get virtual environments of their own under .peers/, made by the first run (3 GB, minutes); one that cannot be
installed or run is shown with the first line of its error. dm-reverb listens on all interfaces, so it is run in a
network namespace of its own, for which Linux asks for root. All systems hold their data at once: the larger sizes need
memory (a million in RLlib or dm-reverb are 5 to 7 GB), and filling stops where less than 4 GiB are left.

examples:
  python -m benchmarks.replay                               all of it, about half an hour
  python -m benchmarks.replay --quick                       a look, in minutes; writes nothing
  python -m benchmarks.replay --quick --only ours-unix raw-unix --sizes 1000
  python -m benchmarks.replay --skip rllib --sizes 1000 1000000
"""


@dataclass
class System:
    """One line of the tables."""

    name: str
    title: str
    module: str
    transport: str = ""  # of the Redis server that it needs
    environment: str = ""  # the peer's own; ours where empty
    options: dict[str, Any] = field(default_factory=dict)
    sized: bool = True  # whether it is in the table of sizes
    note: str = ""


SYSTEMS = [
    System("ours-unix", "ours, unix socket", "ours", "unix", options={"pipelined": False}),
    System("ours-tcp", "ours, TCP", "ours", "tcp", options={"pipelined": False}, sized=False),
    System(
        "ours-pipelined",
        "ours, unix socket, pipelined",
        "ours",
        "unix",
        options={"pipelined": True},
        sized=False,
        note="sample fetched ahead",
    ),
    System("raw-unix", "raw GET/SET, unix socket", "raw", "unix", note="bytes only, uniform"),
    System("raw-tcp", "raw GET/SET, TCP", "raw", "tcp", sized=False, note="bytes only, uniform"),
    System("reverb", "dm-reverb", "reverb", environment="reverb", note="sample fetched ahead"),
    System("torchrl", "StoreStorage, arrays", "torchrl", "unix", "torchrl", {"as_bytes": False}, note="uniform"),
    System("torchrl-bytes", "StoreStorage, bytes", "torchrl", "unix", "torchrl", {"as_bytes": True}, note="uniform"),
    System("cpprb", "cpprb", "cpprb", environment="cpprb", note="in process"),
    System("rllib", "RLlib", "rllib", note="in process, no copy"),
]


class Bench:
    """The systems that still run, and what they have shown."""

    def __init__(self, workers: dict[str, WorkerProcess], results: dict[str, dict[str, Any]]) -> None:
        self.workers, self.results = workers, results

    def each(self, do: Callable[[str, WorkerProcess], None], names: Sequence[str]) -> None:
        """Call `do` for each of `names` that runs; one that fails is shown as such and left out from then on."""
        for name in names:
            if name not in self.workers:
                continue
            try:
                do(name, self.workers[name])
            except WorkerError as error:
                self.failed(name, str(error))

    def failed(self, name: str, why: str) -> None:
        """Note it; what the system has shown before stays."""
        why = why.replace(f"{ROOT}/", "")
        why = why if len(why) <= LONGEST_ERROR else f"{why[:LONGEST_ERROR]} ..."
        print(f"{name}: {why}", flush=True)
        self.results[name]["error"] = why
        self.workers.pop(name, None)


@contextmanager
def started(systems: Sequence[System]) -> Iterator[Bench]:
    """All systems that can be started, ended at the end."""
    results: dict[str, dict[str, Any]] = {
        system.name: {"title": system.title, "note": system.note, "rounds": [], "sizes": {}} for system in systems
    }
    bench = Bench({}, results)
    with ExitStack() as stack:
        for system in systems:
            try:
                python = environments.python_of(system.environment, PEERS) if system.environment else sys.executable
                options = dict(system.options)
                if system.transport:
                    options["url"] = stack.enter_context(server(system.transport))
                bench.workers[system.name] = stack.enter_context(WorkerProcess(Path(python), system.module, options))
            except environments.InstallError as error:
                bench.failed(system.name, str(error))
        yield bench


def filled(bench: Bench, names: Sequence[str], file: Path, size: int, limit_s: float) -> dict[str, dict[str, Any]]:
    """Open and fill each of `names` with `size` sequences of `file`: {name: its reply}, checked for what it holds."""
    replies: dict[str, dict[str, Any]] = {}

    def fill(name: str, worker: WorkerProcess) -> None:
        worker.ask("open", payload=str(file), capacity=size)
        reply = worker.ask("fill", count=size, limit_s=limit_s, wait_s=2 * limit_s + 300)
        worker.ask("check", batch=BATCH)
        print(f"{name}: {size:,} sequences in {reply['seconds']:.1f} s {reply['stopped']}", flush=True)
        replies[name] = reply

    bench.each(fill, names)
    return replies


def measured_round(bench: Bench, names: Sequence[str], seconds: float) -> dict[str, dict[str, Any]]:
    """{name: {measure: reply}} of one round."""
    replies: dict[str, dict[str, Any]] = {name: {} for name in names}

    def measure(key: str, name: str, worker: WorkerProcess) -> None:
        what, batch = MEASURES[key]
        replies[name][key] = worker.ask("measure", what=what, batch=batch, seconds=seconds)

    for key in MEASURES:
        bench.each(partial(measure, key), names)
    return {name: reply for name, reply in replies.items() if len(reply) == len(MEASURES)}


def rounds_of(bench: Bench, names: Sequence[str], count: int, seconds: float) -> Iterator[dict[str, dict[str, Any]]]:
    """`count` rounds in turning order, after one that is thrown away."""
    for turn in range(count + 1):
        cut = turn % max(len(names), 1)
        replies = measured_round(bench, [*names[cut:], *names[:cut]], seconds)
        if turn:
            print(f"round {turn} of {count}", flush=True)
            yield replies


def compare(bench: Bench, file: Path, given: argparse.Namespace) -> None:
    """The table of speeds: full sequences, all systems."""
    names = list(bench.results)
    for name, reply in filled(bench, names, file, given.capacity, given.fill_limit).items():
        bench.results[name]["filled"] = reply
    for number, replies in enumerate(rounds_of(bench, names, given.rounds, given.seconds)):
        for name, reply in replies.items():
            bench.results[name]["rounds"].append({"round": number, **reply})


def compare_sizes(bench: Bench, file: Path, given: argparse.Namespace, names: Sequence[str]) -> None:
    """The table of sizes: small sequences."""
    for size in given.sizes:
        replies = filled(bench, names, file, size, given.fill_limit)
        for name, reply in replies.items():
            bench.results[name]["sizes"][size] = {"filled": reply, "rounds": []}
        full = [name for name, reply in replies.items() if not reply["stopped"]]
        for number, reply_of in enumerate(rounds_of(bench, full, given.size_rounds, given.seconds)):
            for name, reply in reply_of.items():
                bench.results[name]["sizes"][size]["rounds"].append({"round": number, **reply})


def floor(sequences: list[dict[str, np.ndarray]], small: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """What a sequence costs before any server: its bytes, and the codec in CPU time on this machine."""
    payloads = [encode(sequence) for sequence in sequences]
    block = np.ones(64 << 20, np.uint8)
    return {
        "array_bytes": sum(array.nbytes for array in sequences[0].values()),
        "payload_bytes": len(payloads[0]),
        "small_payload_bytes": len(encode(small[0])),
        "encode_us": least_cpu_s(lambda: [encode(sequence) for sequence in sequences]) / len(sequences) * 1e6,
        "decode_us": least_cpu_s(lambda: [decode(payload) for payload in payloads]) / len(payloads) * 1e6,
        "copy_gb_per_s": block.nbytes / least_cpu_s(block.copy) / 1e9,
    }


def least_cpu_s(call: Callable[[], object], passes: int = 5) -> float:
    """CPU seconds of the quickest of `passes` calls."""
    times = []
    for _ in range(passes):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return min(times)


def about(systems: Sequence[System], given: argparse.Namespace) -> dict[str, Any]:
    """Machine, load and versions."""
    with server("unix") as url, redis.Redis.from_url(url) as client:
        info = client.info("server")
    wanted = {"reverb": ("dm-reverb", "tensorflow"), "torchrl": ("torchrl", "tensordict"), "cpprb": ("cpprb",)}
    found = environments.versions(Path(sys.executable), ("redis", "hiredis", "numpy", "ray", "torch"))
    for name in sorted({s.environment for s in systems} & set(wanted)):
        python = PEERS / name / "bin" / "python"
        found |= environments.versions(python, wanted[name]) if python.exists() else {}
    kind = "Valkey" if "valkey_version" in info else "Redis"
    return {
        "machine": cpu_name(), "cores": os.cpu_count(), "load at the start": round(os.getloadavg()[0], 1),
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "Python": platform.python_version(), "server": f"{kind} {info.get('valkey_version', info['redis_version'])}",
        **found, "n": given.rounds, "n for sizes": given.size_rounds, "seconds a measurement": given.seconds,
        "sequences held": given.capacity,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """What was asked for, checked."""
    names = [system.name for system in SYSTEMS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SYSTEM", help="these systems only")
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="SYSTEM", help="all but these")
    parser.add_argument("--rounds", type=int, default=9, help="n of every median (default 9)")
    parser.add_argument("--size-rounds", type=int, default=5, help="the same for the table of sizes (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (default 1)")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="sequences held (default 10000)")
    parser.add_argument("--sizes", type=int, nargs="*", default=None, help="of the table of sizes (default 1e3 to 1e6)")
    parser.add_argument("--fill-limit", type=float, default=300.0, help="seconds to fill one system (default 300)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 0.2 s, sizes 1e3 and 1e4; writes nothing")
    given = parser.parse_args()
    if given.quick:
        given.rounds = given.size_rounds = 3
        given.seconds = 0.2
    if given.sizes is None:
        given.sizes = list(SIZES[:2] if given.quick else SIZES)
    if min(given.rounds, given.size_rounds) < 1 or min(given.sizes, default=BATCH) < BATCH or given.capacity < BATCH:
        parser.error(f"rounds are at least 1, --capacity and --sizes at least {BATCH}")
    return given


def main() -> None:
    """Measure, print, write."""
    given = arguments()
    systems = [system for system in SYSTEMS if system.name in given.only and system.name not in given.skip]
    sequences, small = payload.full_sequences(), payload.small_sequences()
    run: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.replay", *sys.argv[1:]]),
        "payload": payload.ABOUT,
    }
    with tempfile.TemporaryDirectory(prefix="zeroout-benchmark-") as folder:
        files = Path(folder) / "full.npz", Path(folder) / "small.npz"
        payload.write(files[0], sequences)
        payload.write(files[1], small)
        with started(systems) as bench:
            run["about"] = about(systems, given)
            run["floor"] = floor(sequences, small)
            compare(bench, files[0], given)
            compare_sizes(bench, files[1], given, [system.name for system in systems if system.sized])
            run["about"]["load at the end"] = round(os.getloadavg()[0], 1)
            run["systems"] = bench.results
    run = json.loads(json.dumps(run))  # the page is made of nothing but what is stored
    page = report(run)
    print(page)
    if not given.quick:
        (RESULTS / "replay.json").write_text(json.dumps(run, indent=1) + "\n")
        (RESULTS / "replay.md").write_text(page)


if __name__ == "__main__":
    main()
