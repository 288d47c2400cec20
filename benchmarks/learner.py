"""Learner speed: updates through the whole path from Redis and back, beside the bare update on tensors in memory.

`python -m benchmarks.learner --help` says what is compared and how.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.controller import Controller, ControllerConfig
from agents.discrete import Argmax, DiscreteConfig, DiscreteNetwork
from agents.ladder import Ladder
from agents.network import ActionRule, QNetwork
from benchmarks.step import cpu_name
from deploy.redis_server import EmbeddedServer
from env.channels import ChannelPlan
from env.importance import FEATURES
from env.measure import Measure
from env.networks import vgg16
from learner.learner import Learner, LearnerConfig
from learner.packing import MaskPacking, Packing, VectorPacking
from learner.replay.codec import encode
from learner.replay.connection import connect
from learner.replay.pipeline import PipelinedReplay
from learner.replay.replay import Item, Replay, ReplayConfig
from learner.sequence import EpisodeTrace, SequenceConfig, collate, cut

RESULTS = Path(__file__).parent / "results"
INPUTS, ACTIONS, HIDDEN = 512, 18, 512  # what R2D2's convolutions hand on, Atari's actions, the paper's LSTM

EPILOG = """\
The shapes:
  paper     64 sequences of 40 + 80 steps, LSTM 512, 18 actions; 512 numbers an observation stand for what the
            convolutions of the paper's network hand on
  campaign  16 sequences of 4 + 16 steps of the Controller on quarter-width VGG16 (1,056 filters), as campaigns do

The ways:
  whole     Learner.update over PipelinedReplay on the embedded server: sample, decode, collate, learn, priorities back
  serial    the same without the pipeline: sample, then learn, then write
  bare      Learner.learn on batches that are tensors in memory already: the bound
  rllib     RLlib's LSTM-DQN Learner.update (Ray 2.60, new API stack) with uniform EpisodeReplayBuffer, n_step 1, no
            burn-in, 80 steps; at the paper's shape alone, in a process of its own

Rounds are interleaved, in turning order; a ratio is of the times of the same round. In its turn each way makes one
update that is not timed, then some that are, and the pipeline is let run empty before the next way's turn. One thread
of torch: `whole` has the other core for fetching, decoding and the server, `bare` has no use for it. The floor of the
paper's shape is written on the page: operations of the LSTM alone, and what a large matrix product gives.

examples:
  python -m benchmarks.learner                  both shapes, all ways
  python -m benchmarks.learner --quick          a look; writes nothing
  python -m benchmarks.learner --device cuda --precision bfloat16
"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is learned, by which network, and how much of it at once."""

    network: QNetwork
    actions: ActionRule
    packing: Packing
    sequences: SequenceConfig
    learner: LearnerConfig
    episode: Callable[[np.random.Generator], EpisodeTrace]
    updates: int  # in a round


def paper(precision: str) -> Shape:
    """Kapturowski et al. 2019, table 2."""
    steps = 40 + 80 + 80

    def episode(random: np.random.Generator) -> EpisodeTrace:
        return EpisodeTrace(
            observations={"vector": random.standard_normal((steps + 1, INPUTS)).astype(np.float32)},
            actions=random.integers(ACTIONS, size=steps),
            rewards=random.standard_normal(steps).astype(np.float32),
            states=0.1 * random.standard_normal((steps, 2, HIDDEN)).astype(np.float32),
            terminated=False,
        )

    return Shape(
        network=DiscreteNetwork(DiscreteConfig(inputs=INPUTS, actions=ACTIONS, hidden_size=HIDDEN)),
        actions=Argmax(),
        packing=VectorPacking(INPUTS, ACTIONS),
        sequences=SequenceConfig(burn_in=40, unroll_length=80, sequence_period=40),
        learner=LearnerConfig(batch_size=64, n_step=5, learning_rate=1e-4, precision=precision),
        episode=episode,
        updates=2,
    )


def campaign(precision: str) -> Shape:
    """A Controller's sequences on quarter-width VGG16, with every default."""
    plan = ChannelPlan(vgg16(width=0.25), torch.zeros(1, 3, 32, 32))
    measure = Measure("parameters", int(plan.parameters(plan.widths)))
    ladder = Ladder(plan, measure=measure, targets=(0.9,), waypoints=16, min_width=2)

    def episode(random: np.random.Generator) -> EpisodeTrace:
        steps, alive = len(ladder), [torch.ones(plan.units, dtype=torch.bool)]
        for step in range(steps):
            scores = torch.from_numpy(random.standard_normal(plan.units))
            alive.append(alive[-1] & ~ladder.cut(scores[None], alive[-1][None], torch.tensor([step]))[0])
        masks = torch.stack(alive)
        return EpisodeTrace(
            observations={
                "accuracy": random.random((steps + 1, 1)).astype(np.float32),
                "compression": ladder.compression(masks).float().numpy()[:, None],
                "keep_mask": masks.numpy(),
                "features": random.standard_normal((steps + 1, plan.units, len(FEATURES))).astype(np.float32),
            },
            actions=(masks[:-1] & ~masks[1:]).numpy(),
            rewards=random.standard_normal(steps).astype(np.float32),
            states=np.zeros((steps, 2, ControllerConfig().hidden_size), np.float32),
            terminated=True,
        )

    return Shape(
        network=Controller(ControllerConfig(), plan),
        actions=ladder,
        packing=MaskPacking(plan.units, len(FEATURES)),
        sequences=SequenceConfig(),
        learner=LearnerConfig(precision=precision),
        episode=episode,
        updates=10,
    )


SHAPES: dict[str, Callable[[str], Shape]] = {"paper": paper, "campaign": campaign}


@contextlib.contextmanager
def ways(shape: Shape, device: torch.device) -> Iterator[tuple[dict[str, Callable[[], object]], Callable[[], None]]]:
    """What makes one update, by way, and what waits for the pipeline to have nothing left to do."""
    random = np.random.default_rng(0)
    sequences = [s for _ in range(48) for s in cut(shape.episode(random), shape.sequences, shape.packing)]
    items = [Item(str(number), encode(sequence), 1.0) for number, sequence in enumerate(sequences)]
    config = ReplayConfig(min_sequences=1, replay_ratio=1e9)
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server, connect(server.url) as client:
        serial, inner = (Replay(client, "bench", config, np.random.default_rng(seed)) for seed in (1, 2))
        serial.insert(items)
        with PipelinedReplay(inner, shape.learner.batch_size) as pipelined:
            whole = learner_of(shape, pipelined, device)
            pipelined.prepare = whole.prepare
            made = {
                "whole": whole.update,
                "serial": learner_of(shape, serial, device).update,
                "bare": bare(shape, sequences, device),
            }
            yield made, pipelined.flush


def learner_of(shape: Shape, replay: Any, device: torch.device) -> Learner:
    """A learner of its own for each way, all from the same weights."""
    network = type(shape.network)(
        shape.network.config, *([shape.actions.plan] if isinstance(shape.actions, Ladder) else [])
    )
    network.load_state_dict(shape.network.state_dict())
    return Learner(network.to(device), shape.actions, replay, shape.learner, shape.sequences, shape.packing)


def bare(shape: Shape, sequences: Sequence[Mapping[str, np.ndarray]], device: torch.device) -> Callable[[], object]:
    """Updates on four batches that are on the device already."""
    learner, size = learner_of(shape, None, device), shape.learner.batch_size
    random = np.random.default_rng(3)
    batches = []
    for _ in range(4):
        chosen = [sequences[i] for i in random.integers(len(sequences), size=size)]
        hidden = shape.network.hidden_size
        batches.append(collate(chosen, shape.sequences, shape.packing, hidden=hidden).to(device))
    weights, turn = torch.ones(size, device=device), iter(range(10**9))
    return lambda: learner.learn(batches[next(turn) % len(batches)], weights)


def rllib_worker() -> None:
    """RLlib's update, once for each line on standard input; prints its seconds."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import gymnasium as gym
    import ray
    from ray.rllib.algorithms.dqn import DQNConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    class Noise(gym.Env[np.ndarray, int]):
        observation_space = gym.spaces.Box(-5, 5, (INPUTS,), np.float32)
        action_space = gym.spaces.Discrete(ACTIONS)

        def __init__(self, config: object = None) -> None:
            self.random = np.random.default_rng(0)

        def seen(self) -> np.ndarray:
            return self.random.standard_normal(INPUTS, dtype=np.float32).clip(-5, 5)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
            self.steps = 0
            return self.seen(), {}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            self.steps += 1
            return self.seen(), 0.0, self.steps >= 120, False, {}

    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    model = DefaultModelConfig(
        use_lstm=True, lstm_cell_size=HIDDEN, max_seq_len=80, fcnet_hiddens=[HIDDEN], head_fcnet_hiddens=[HIDDEN]
    )
    buffer = {"type": "EpisodeReplayBuffer", "capacity": 100_000}
    algorithm = (
        DQNConfig()
        .environment(Noise)
        .env_runners(num_env_runners=0)
        .learners(num_learners=0)
        .rl_module(model_config=model)
        .training(n_step=1, double_q=True, dueling=True, lr=1e-4, replay_buffer_config=buffer)
        .build_algo()
    )
    replay = algorithm.local_replay_buffer
    replay.add(algorithm.env_runner.sample(num_timesteps=1200, random_actions=False))
    print(json.dumps("ready"), flush=True)
    for _line in sys.stdin:
        since = time.perf_counter()
        # about 64 sequences of 80 steps; some are cut short where an episode ends
        episodes = replay.sample(
            num_items=64 * 80, batch_length_T=80, n_step=1, gamma=0.997, sample_episodes=True, lookback=1
        )
        algorithm.learner_group.update(episodes=episodes)
        print(json.dumps(time.perf_counter() - since), flush=True)
    ray.shutdown()


class RLlib:
    """RLlib's learner in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.learner", "--rllib-worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.works = self._answer() == "ready"

    def seconds(self) -> float:
        """Wall seconds of one sample and update."""
        assert self._process.stdin is not None
        self._process.stdin.write("once\n")
        self._process.stdin.flush()
        return float(self._answer() or "nan")

    def close(self) -> None:
        """End the process, which ends its Ray."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        """The next line that is JSON: Ray prints lines of its own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
        return None


def timed(
    made: Mapping[str, Callable[[], object]],
    shape: Shape,
    rounds: int,
    device: torch.device,
    rllib: RLlib | None,
    finish: Callable[[], None],
) -> dict[str, list[float]]:
    """Seconds of an update by way, one figure for each round after a first that is thrown away.

    `finish` waits for what is still being fetched, so that it is not done in another way's time.
    """
    times: dict[str, list[float]] = {name: [] for name in made}
    if rllib is not None:
        times["rllib"] = []
    names = list(times)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            spent = rllib.seconds() if name == "rllib" and rllib else sustained(made[name], shape.updates, device)
            finish()
            if number:
                times[name].append(spent)
        print(f"  round {number} of {rounds}: " + ", ".join(f"{n} {t[-1]:.4f} s" for n, t in times.items() if t))
    return times


def sustained(update: Callable[[], object], updates: int, device: torch.device) -> float:
    """Seconds of one update in the middle of a run: one more goes before, in whose time the first sample is fetched."""
    once(update, 1, device)
    return once(update, updates, device)


def once(update: Callable[[], object], updates: int, device: torch.device) -> float:
    """Seconds of one update, mean of `updates` in a row."""
    since = time.perf_counter()
    for _ in range(updates):
        if update() is None:
            raise RuntimeError("an update was skipped: the benchmark's data should allow every one")
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - since) / updates


def quartiles(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def row(name: str, times: Mapping[str, list[float]]) -> str:
    """A line of the table."""
    cells = [
        quartiles([1 / t for t in times[way]]) if way in times else "-" for way in ("bare", "whole", "serial", "rllib")
    ]
    for way in ("whole", "serial"):
        cells.append(quartiles([b / t for b, t in zip(times["bare"], times[way], strict=True)]))
    cells.append(
        quartiles([r / t for r, t in zip(times["rllib"], times["whole"], strict=True)]) if "rllib" in times else "-"
    )
    return f"| {name} | " + " | ".join(cells) + " |"


def lstm_gflop(shape: Shape) -> float:
    """Operations of the paper-shaped LSTM in an update: burn-in and unroll of two networks, backward of one."""
    cuts, hidden = shape.sequences, shape.network.hidden_size
    forward = 2 * 4 * hidden * (hidden + hidden) * shape.learner.batch_size
    return forward * (2 * cuts.burn_in + (2 + 2) * (cuts.unroll_length + 1)) / 1e9


def matmul_gflops(device: torch.device) -> float:
    """What a large float32 matrix product reaches here."""
    a = torch.randn(1024, 1024, device=device)
    return 2 * 1024**3 / min(once(lambda: a @ a, 4, device) for _ in range(5)) / 1e9


def report(measured: Mapping[str, Mapping[str, list[float]]], about: str, command: str) -> str:
    """The page."""
    lines = [
        "# Learner speed",
        "",
        f"`{command}`",
        "",
        about,
        "",
        "Updates/s: median (quartiles) over rounds; ratios are paired by round, above 1 ours is quicker. What the ways",
        "and shapes are: `python -m benchmarks.learner --help`. RLlib's update is a smaller one (no burn-in, n_step 1,",
        "uniform replay): its column says what a user of its LSTM-DQN pays, not the same work.",
        "",
        "| shape | bare, updates/s | whole | serial | rllib | whole : bare | serial : bare | whole : rllib |",
        "|---|---|---|---|---|---|---|---|",
        *(row(name, times) for name, times in measured.items()),
        "",
        "## Aim",
        "",
    ]
    for name, times in measured.items():
        ratio = statistics.median(b / t for b, t in zip(times["bare"], times["whole"], strict=True))
        lines.append(
            f"- {name}: whole at least 0.9 of bare: {'reached' if ratio >= 0.9 else '**missed**'}, {ratio:.3f}"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learner",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, help="only this one (default: both)")
    parser.add_argument("--rounds", type=int, default=9, help="n of every median (default 9)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-rllib", action="store_true", help="leave RLlib out")
    parser.add_argument("--quick", action="store_true", help="2 rounds without RLlib; writes nothing")
    parser.add_argument("--rllib-worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rllib_worker:
        rllib_worker()
        return
    torch.set_num_threads(1)
    device, rounds = torch.device(given.device), 2 if given.quick else given.rounds
    measured: dict[str, dict[str, list[float]]] = {}
    about = [
        f"{cpu_name()}, {os.cpu_count()} cores, load at the start {os.getloadavg()[0]:.1f}; device {device}, "
        f"precision {given.precision}, one thread; torch {torch.__version__}, Python {platform.python_version()}; "
        f"n {rounds}; float32 matrix product {matmul_gflops(device):.0f} GFLOP/s."
    ]
    for name in [given.shape] if given.shape else SHAPES:
        shape = SHAPES[name](given.precision)
        rllib = RLlib() if name == "paper" and not (given.quick or given.no_rllib) else None
        print(name, flush=True)
        with ways(shape, device) as (made, finish):
            measured[name] = timed(made, shape, rounds, device, rllib if rllib and rllib.works else None, finish)
        if rllib is not None:
            rllib.close()
        if name == "paper":
            about.append(f"Floor of the paper's shape: its LSTM alone is {lstm_gflop(shape):.0f} GFLOP an update.")
    text = report(measured, "\n".join(about), " ".join(["python -m benchmarks.learner", *sys.argv[1:]]))
    print(text)
    if not given.quick:
        stem = f"learner-{device.type}" + ("" if given.precision == "float32" else f"-{given.precision}")
        (RESULTS / f"{stem}.md").write_text(text)
        (RESULTS / f"{stem}.json").write_text(json.dumps({"about": about, "seconds": measured}, indent=1))


if __name__ == "__main__":
    main()
