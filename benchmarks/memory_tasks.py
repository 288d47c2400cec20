"""Does the learner learn what needs memory? Two tasks that nobody here made up, with and without the recurrent state.

`python -m benchmarks.memory_tasks --help` says what is compared and how.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from actors.play import play
from actors.schedule import ScheduleConfig, epsilon_ladder
from agents.discrete import Argmax, DiscreteConfig, DiscreteNetwork, EpsilonGreedy
from benchmarks.step import cpu_name
from deploy.redis_server import EmbeddedServer
from env.seeds import derive_seed
from learner.learner import Learner, LearnerConfig, first_priorities
from learner.packing import VectorPacking
from learner.replay.codec import encode
from learner.replay.connection import connect
from learner.replay.replay import Item, Replay, ReplayConfig
from learner.sequence import SequenceConfig, cut

RESULTS = Path(__file__).parent / "results" / "memory-tasks"
LADDER = ScheduleConfig(actors=8)  # episodes take the places of R2D2's epsilon ladder in turn
TEST_EPISODES = 100

EPILOG = """\
The tasks:
  cartpole  Gymnasium's CartPole-v1 with both velocities hidden: cart position and pole angle are all that is seen.
            To reach: mean return >= 450 (of 500) over 100 greedy episodes.
  tmaze     The T-maze of Bakker 2002 ("Reinforcement Learning with Long Short-Term Memory"), corridor of 20: the first
            observation alone says whether to turn up or down at the far end. To reach: 98 of 100 right. Exploratory
            actions are repeated (Dabney et al. 2021): drawn one by one, one seed of five never came to the junction.

The arms: `memory`, and `zeroed`, the same learner whose recurrent state is zeroed before every step, in playing and in
learning; it has the same number of updates and is meant to fail.

Nothing is made for these tasks but the environments and their settings: episodes are played by actors/play.py, cut by
learner/sequence.py, given first priorities by the network that played them, kept in Redis by learner/replay, and
learned from by learner/learner.py, which takes its turns when the replay's rate limiter lets it.

Every so many updates, 10 greedy episodes are played on seeds that nothing else uses. An arm stops when two of these
judgements in a row reach the task's mark, or when its updates are used up. Then come the 100 test episodes, on seeds of
their own. Training, judging and testing never share a seed.

examples:
  python -m benchmarks.memory_tasks                    both tasks, both arms, seeds 0 to 4; goes on where it stopped
  python -m benchmarks.memory_tasks --task tmaze --seeds 7 --out /tmp/look
"""


class HiddenVelocities(gym.ObservationWrapper[dict[str, np.ndarray], int, np.ndarray]):
    """CartPole-v1 that shows cart position and pole angle alone, in units of about what a balanced pole sways by."""

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))
        self.observation_space = gym.spaces.Dict({"vector": gym.spaces.Box(-16.0, 16.0, (2,), np.float32)})

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        """float32 [2]."""
        return {"vector": (observation[[0, 2]] / np.array([0.3, 0.05])).astype(np.float32)}


class TMaze(gym.Env[dict[str, np.ndarray], int]):
    """Bakker 2002, section 4: a corridor of `length` squares east to a T-junction, a sign at its beginning.

    Observation float32 [3]: 011 or 110 at the start (up or down), 101 in the corridor, 010 at the junction. Actions:
    north, east, south, west. The right turn pays 4, the wrong one -0.1, and both end the episode; standing still
    (walking against a wall) costs 0.1. After 5 * length steps the episode is cut short.
    """

    def __init__(self, length: int = 20) -> None:
        self.length = length
        self.observation_space = gym.spaces.Dict({"vector": gym.spaces.Box(0.0, 1.0, (3,), np.float32)})
        self.action_space = gym.spaces.Discrete(4)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Stand at the sign."""
        super().reset(seed=seed)
        self._place = self._steps = 0
        self._up = bool(self.np_random.integers(2))
        return self._seen(), {}

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Walk one square, or turn at the junction."""
        self._steps += 1
        cut_short = self._steps >= 5 * self.length
        if self._place == self.length and action in (0, 2):
            return self._seen(), 4.0 if (action == 0) == self._up else -0.1, True, False, {}
        before = self._place
        self._place = min(max(before + {1: 1, 3: -1}.get(int(action), 0), 0), self.length)
        return self._seen(), 0.0 if self._place != before else -0.1, False, cut_short, {}

    def _seen(self) -> dict[str, np.ndarray]:
        if self._place == 0:
            seen = (0, 1, 1) if self._up else (1, 1, 0)
        else:
            seen = (0, 1, 0) if self._place == self.length else (1, 0, 1)
        return {"vector": np.array(seen, np.float32)}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, what counts as reaching it, and the settings that it is learned with."""

    make: Callable[[], gym.Env[Any, Any]]
    inputs: int
    actions: int
    score: Callable[[float], float]  # of an episode, by its return
    goal: float  # mean score of the test episodes
    mark: float  # mean score of a judgement's episodes that lets an arm stop
    updates: int  # at most
    judge_period: int  # updates between two judgements
    learner: LearnerConfig
    sequences: SequenceConfig
    replay: ReplayConfig
    longest_repeat: int = 1  # of an exploratory action


TASKS: dict[str, Task] = {
    "cartpole": Task(
        make=HiddenVelocities,
        inputs=2,
        actions=2,
        score=lambda total: total,
        goal=450.0,
        mark=495.0,
        updates=10_000,
        judge_period=250,
        # the target network is copied far more often than the paper's 2500: all of it takes a few thousand updates
        learner=LearnerConfig(
            batch_size=32, learning_rate=5e-4, adam_epsilon=1e-5, discount=0.99, n_step=5, target_update_period=50
        ),
        sequences=SequenceConfig(burn_in=10, unroll_length=20, sequence_period=10),
        replay=ReplayConfig(capacity_sequences=5_000, replay_ratio=32.0, replay_ratio_tolerance=64.0, min_sequences=50),
    ),
    "tmaze": Task(
        make=TMaze,
        inputs=3,
        actions=4,
        score=lambda total: float(total > 1.0),  # the right turn pays 4, and no walk loses more than 10 tenths of it
        goal=0.98,
        mark=1.0,
        updates=6_000,
        judge_period=250,
        learner=LearnerConfig(
            batch_size=32, learning_rate=1e-3, adam_epsilon=1e-5, discount=0.98, n_step=5, target_update_period=200
        ),
        sequences=SequenceConfig(burn_in=10, unroll_length=30, sequence_period=15),
        replay=ReplayConfig(capacity_sequences=5_000, replay_ratio=32.0, replay_ratio_tolerance=64.0, min_sequences=50),
        longest_repeat=20,  # to and fro costs nothing, and single steps seldom find the junction
    ),
}


@dataclass
class Judgement:
    """Greedy episodes in the course of learning."""

    updates: int
    env_steps: int
    mean_score: float


@dataclass
class Run:
    """One arm with one seed."""

    task: str
    arm: str
    seed: int
    settings: dict[str, Any]
    curve: list[Judgement] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # of the test episodes
    returns: list[float] = field(default_factory=list)
    delta_q: list[tuple[int, float, float]] = field(default_factory=list)  # (updates, first, last learned step)
    updates: int = 0
    env_steps: int = 0
    episodes: int = 0
    seconds: float = 0.0


class Trial:
    """One arm with one seed, while it is learned: the actors' turn, the learner's turn, a judgement now and then."""

    def __init__(self, name: str, arm: str, seed: int, replay: Replay) -> None:
        self.task, self.seed, self.replay = TASKS[name], seed, replay
        self.packing = VectorPacking(self.task.inputs, self.task.actions)
        torch.manual_seed(derive_seed(seed, "network"))
        config = DiscreteConfig(inputs=self.task.inputs, actions=self.task.actions, memory=arm == "memory")
        self.network = DiscreteNetwork(config)
        self.learner = Learner(self.network, Argmax(), replay, self.task.learner, self.task.sequences, self.packing)
        self.run = Run(name, arm, seed, settings_of(name))
        self.env = self.task.make()

    def learn(self) -> None:
        """Play and learn in turns until two judgements in a row reach the mark, or the updates are used up."""
        while self.learner.updates < self.task.updates and not self._reached():
            self._play()
            while self.learner.updates < self.task.updates and (report := self.learner.update()) is not None:
                if report.delta_q is not None and report.updates % self.task.judge_period == 0:
                    self.run.delta_q.append((report.updates, *report.delta_q))
                if report.updates % self.task.judge_period == 0:
                    self._judge()
        self.run.updates = self.learner.updates

    def test(self) -> None:
        """The 100 episodes that count."""
        self.run.returns = list(self._greedy("test", TEST_EPISODES))
        self.run.scores = [self.task.score(total) for total in self.run.returns]

    def _play(self) -> None:
        number = self.run.episodes
        epsilon = epsilon_ladder(number % LADDER.actors, LADDER)
        actor = EpsilonGreedy(
            self.network,
            epsilon=epsilon,
            seed=derive_seed(self.seed, "explore", number),
            longest_repeat=self.task.longest_repeat,
        )
        trace = play(self.env, actor, seed=derive_seed(self.seed, "play", number) % 2**31)
        sequences = cut(trace, self.task.sequences, self.packing)
        priorities = first_priorities(
            self.network, Argmax(), sequences, self.task.learner, self.task.sequences, self.packing
        )
        self.replay.insert(
            [
                Item(f"{number}.{index}", encode(sequence), priority)
                for index, (sequence, priority) in enumerate(zip(sequences, priorities.tolist(), strict=True))
            ]
        )
        self.run.episodes += 1
        self.run.env_steps += len(trace)

    def _judge(self) -> None:
        scores = [self.task.score(total) for total in self._greedy(f"judge {self.learner.updates}", 10)]
        self.run.curve.append(Judgement(self.learner.updates, self.run.env_steps, float(np.mean(scores))))

    def _greedy(self, what: str, episodes: int) -> Iterator[float]:
        for number in range(episodes):
            seed = derive_seed(self.seed, what, number) % 2**31
            yield float(play(self.env, EpsilonGreedy(self.network), seed=seed).rewards.sum())

    def _reached(self) -> bool:
        last = self.run.curve[-2:]
        return len(last) == 2 and all(judgement.mean_score >= self.task.mark for judgement in last)


def settings_of(name: str) -> dict[str, Any]:
    """What a result depends on, so that another one is not taken for it."""
    task = TASKS[name]
    parts = {"learner": task.learner, "sequences": task.sequences, "replay": task.replay}
    limits = {"updates": task.updates, "mark": task.mark, "longest_repeat": task.longest_repeat}
    return {**{key: asdict(value) for key, value in parts.items()}, **limits}


def run_one(job: tuple[str, str, int]) -> Run:
    """Learn and test one arm with one seed, beside a server of its own."""
    name, arm, seed = job
    torch.set_num_threads(1)
    since = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server, connect(server.url) as client:
        replay = Replay(client, "memory", TASKS[name].replay, np.random.default_rng(derive_seed(seed, "replay")))
        trial = Trial(name, arm, seed, replay)
        trial.learn()
        trial.test()
    trial.run.seconds = time.perf_counter() - since
    return trial.run


def file_of(out: Path, job: tuple[str, str, int]) -> Path:
    """Where a run's result lies."""
    return out / "{}-{}-{}.json".format(*job)


def is_there(path: Path, name: str) -> bool:
    """Whether this very run, with these settings, is finished already."""
    return path.is_file() and json.loads(path.read_text())["settings"] == json.loads(json.dumps(settings_of(name)))


def finished(jobs: list[tuple[str, str, int]], out: Path, processes: int) -> Iterator[Run]:
    """Run what is missing, each in a process of its own, and yield it when it is written."""
    missing = [job for job in jobs if not is_there(file_of(out, job), job[0])]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there already", flush=True)
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        for run in pool.imap_unordered(run_one, missing):
            path = file_of(out, (run.task, run.arm, run.seed))
            beside = path.with_suffix(".part")
            beside.write_text(json.dumps(asdict(run)))
            beside.rename(path)
            yield run


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Score against environment steps, a line for each seed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["task"] for run in runs))
    figure = Figure(figsize=(5.0 * len(names), 3.6), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        for arm, colour in (("memory", "#1f6fb2"), ("zeroed", "#b2521f")):
            mine = [run for run in runs if (run["task"], run["arm"]) == (name, arm)]
            for number, run in enumerate(mine):
                steps = [judgement["env_steps"] for judgement in run["curve"]]
                scores = [judgement["mean_score"] for judgement in run["curve"]]
                axes.plot(steps, scores, color=colour, alpha=0.7, label=arm if number == 0 else None)
        axes.axhline(TASKS[name].goal, color="#777777", linestyle=":", label="to reach")
        axes.set(title=name, xlabel="environment steps", ylabel="mean score, 10 greedy episodes")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def row(name: str, arm: str, runs: list[dict[str, Any]]) -> str:
    """A line of the table: the test scores of an arm over its seeds."""
    means = [float(np.mean(run["scores"])) for run in runs]
    goal = TASKS[name].goal
    reached = sum(mean >= goal for mean in means)
    middle = np.median([run["env_steps"] for run in runs])
    updates = np.median([run["updates"] for run in runs])
    each = ", ".join(f"{mean:.2f}" for mean in means)
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    return (
        f"| {name} | {arm} | {goal:g} | {np.mean(means):.2f} ({spread:.2f}) | {each} | {reached} of {len(means)} | "
        f"{updates:.0f} | {middle:.0f} |"
    )


def table(runs: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# What needs memory is learned",
        "",
        "`python -m benchmarks.memory_tasks` (`--help` says what the tasks and arms are)",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores, one thread a run; torch {torch.__version__}, gymnasium "
        f"{gym.__version__}, Python {platform.python_version()}. Every run's settings lie in its JSON file beside.",
        "",
        "Test score: mean of 100 greedy episodes on fresh seeds (return for cartpole, share of right turns for tmaze); "
        "mean over seeds (standard deviation), then each seed.",
        "",
        "| task | recurrent state | to reach | test score | by seed | reached | updates, median | env steps, median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    arms = list(dict.fromkeys((run["task"], run["arm"]) for run in runs))
    lines += [row(*arm, [run for run in runs if (run["task"], run["arm"]) == arm]) for arm in arms]
    stale = [run for run in runs if run["arm"] == "memory" and run["delta_q"]]
    lines += ["", "Delta Q (R2D2, section 3), median over all measurements at the first and the last learned step:", ""]
    for name in dict.fromkeys(run["task"] for run in stale):
        pairs = np.array([point[1:] for run in stale if run["task"] == name for point in run["delta_q"]])
        lines.append(f"- {name}: {np.median(pairs[:, 0]):.3f} and {np.median(pairs[:, 1]):.3f} (n {len(pairs)})")
    return "\n".join([*lines, "", "![scores against environment steps](curves.png)", ""])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_tasks",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, help="only this one (default: both)")
    parser.add_argument("--arm", choices=("memory", "zeroed"), help="only this one (default: both)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default 0 1 2 3 4")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results lie")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    tasks = [given.task] if given.task else list(TASKS)
    arms = [given.arm] if given.arm else ["memory", "zeroed"]
    jobs = [(task, arm, seed) for task in tasks for arm in arms for seed in given.seeds]
    for run in finished(jobs, given.out, given.processes):
        print(
            f"{run.task}, {run.arm}, seed {run.seed}: test score {np.mean(run.scores):.2f} after {run.updates} "
            f"updates, {run.env_steps} env steps, {run.episodes} episodes, {run.seconds:.0f} s",
            flush=True,
        )
    runs = [json.loads(file_of(given.out, job).read_text()) for job in jobs]
    draw(runs, given.out / "curves.png")
    (given.out / "README.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
