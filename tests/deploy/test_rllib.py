"""R2D2 behind RLlib's interface and under Tune: tiny numbers on a local Ray."""

import json
import math
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from deploy.redis_server import running_url
from deploy.rllib import R2D2, R2D2Config
from env.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EPISODES = 40  # more than a test waits for


def tiny(*, seed: Any = 3, targets: Any = (0.5,)) -> R2D2Config:
    return (
        R2D2Config()
        .environment(
            "Compression-v0",
            env_config={
                "network": {"width": 0.2},
                "data": {"validation_share": 0.2, "train_limit": 200},
                "baseline": {"epochs": 1, "batch_size": 32},
                "episode": {
                    "targets": targets,
                    "waypoints": 3,
                    "batch_size": 16,
                    "step_minibatches": 1,
                    "recovery_minibatches": 1,
                    "step_images": 40,
                    "score_images": 32,
                },
            },
        )
        .training(
            lr=1e-3,
            controller={"hidden_size": 8},
            sequence={"burn_in": 1, "unroll_length": 2, "sequence_period": 2},
            replay={"min_sequences": 1},
            learner={"batch_size": 2},
            search={"episodes": EPISODES},
        )
        .env_runners(num_env_runners=2)
        .debugging(seed=seed)
    )


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray with room for two trials, each a driver and an actor."""
    with pytest.MonkeyPatch.context() as patch:
        results = tmp_path_factory.mktemp("results")  # where RLlib makes a folder for each algorithm
        patch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(results))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("ZEROOUT_REDIS_URL", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@dataclass
class Played:
    """An algorithm that was trained twice, saved and stopped."""

    results: list[dict[str, Any]]
    records: list[dict[str, Any]]  # the ledger's, when it was stopped
    folder: Path
    path: Path  # of the checkpoint

    def saved(self) -> dict[str, Any]:
        state: dict[str, Any] = pickle.loads((self.path / "algorithm_state.pkl").read_bytes())
        return state


@pytest.fixture(scope="module")
def played(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Played:
    algo = tiny().build_algo()
    results = [algo.train(), algo.train()]
    _wait_for_an_update(algo)
    path = Path(algo.save_to_path(str(tmp_path_factory.mktemp("saved") / "checkpoint")))
    records = [json.loads(text) for text in algo._watch.ledger.records()]
    algo.stop()
    algo.stop()
    return Played(results, records, algo.campaign_folder, path)


def _wait_for_an_update(algo: R2D2) -> None:
    """A learner whose process starts slowly may have learned nothing yet when two episodes are played."""
    deadline = time.monotonic() + 60
    while not json.loads(algo._watch.ledger.beats().get("learner", "{}")).get("updates"):
        assert time.monotonic() < deadline, "the learner made no update in 60 s"
        time.sleep(0.05)


@pytest.fixture
def build(local_ray: None) -> Iterator[Callable[[Callable[[], R2D2]], R2D2]]:
    """Makes algorithms that are stopped after the test."""
    made: list[R2D2] = []

    def building(make: Callable[[], R2D2]) -> R2D2:
        made.append(make())
        return made[-1]

    yield building
    for algo in made:
        algo.stop()


def test_each_train_plays_at_least_one_episode_and_its_result_has_rllibs_keys(played: Played) -> None:
    before = 0
    for iteration, result in enumerate(played.results, start=1):
        runners = result["env_runners"]
        assert runners["num_episodes"] >= 1
        assert runners["num_episodes_lifetime"] == before + runners["num_episodes"]
        before = runners["num_episodes_lifetime"]
        assert result["num_env_steps_sampled_lifetime"] == runners["num_env_steps_sampled_lifetime"] == 3 * before
        assert runners["episode_len_mean"] == 3.0
        assert result["training_iteration"] == iteration
        assert result["time_total_s"] > 0
        assert result["config"]["num_env_runners"] == 2
        assert {"total_loss", "num_grad_updates_lifetime"} <= set(result["learners"]["default_policy"])
        assert 0.5 <= result["frontier"]["0.5"]["compression"] < 0.6
        assert not result["done"]


def test_returns_are_those_in_the_ledger(played: Played) -> None:
    for result in played.results:
        runners = result["env_runners"]
        returns = [record["return"] for record in played.records[: runners["num_episodes_lifetime"]]]
        assert runners["episode_return_mean"] == pytest.approx(math.fsum(returns) / len(returns))
        assert (runners["episode_return_min"], runners["episode_return_max"]) == (min(returns), max(returns))


def test_stop_leaves_no_actor_and_no_server(played: Played) -> None:
    assert ray.util.list_named_actors(all_namespaces=True) == []
    assert running_url(played.folder / "redis") is None


def test_a_fresh_algorithm_goes_on_from_a_checkpoint(
    played: Played, build: Callable[[Callable[[], R2D2]], R2D2]
) -> None:
    algo = build(tiny().build_algo)
    algo.restore_from_path(str(played.path))
    restored, saved = algo.get_state(), played.saved()
    assert (restored["training_iteration"], restored["time_total_s"]) == (2, saved["time_total_s"])
    for name in ("controller", "target"):
        theirs, mine = (state["campaign"]["learner"][name] for state in (saved, restored))
        assert list(theirs) == list(mine)
        assert all(torch.equal(theirs[key], mine[key]) for key in theirs)
    assert restored["campaign"]["learner"]["updates"] == saved["campaign"]["learner"]["updates"] > 0
    for name in ("episodes", "frontier", "replay", "baseline"):
        assert restored["campaign"][name] == saved["campaign"][name]
    result = algo.train()
    assert result["training_iteration"] == 3
    assert result["env_runners"]["num_episodes_lifetime"] > played.results[-1]["env_runners"]["num_episodes_lifetime"]
    assert result["time_total_s"] > saved["time_total_s"]


def test_a_checkpoint_whose_replay_is_gone_or_empty_says_so_in_a_line(played: Played, tmp_path: Path) -> None:
    data = Path(played.saved()["campaign"]["replay"]["data"])
    shutil.move(data, tmp_path / "elsewhere")
    try:
        with pytest.raises(
            UserError, match=r"the replay zeroout:\w+ of this checkpoint: expected its data in .*, got no"
        ):
            R2D2.from_checkpoint(str(played.path))
        data.mkdir()
        with pytest.raises(UserError, match=r"expected at least the \d+ sequences .*, got 0 at a server of the camp"):
            R2D2.from_checkpoint(str(played.path))
    finally:
        shutil.rmtree(data, ignore_errors=True)
        shutil.move(tmp_path / "elsewhere", data)


def test_a_checkpoint_of_another_server_or_with_other_settings_is_refused(
    played: Played, build: Callable[[Callable[[], R2D2]], R2D2], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="this checkpoint: expected an algorithm with the settings"):
        build(tiny(seed=4).build_algo).restore_from_path(str(played.path))
    monkeypatch.setenv("ZEROOUT_REDIS_URL", "redis://me:secret@127.0.0.1:1/0")
    with pytest.raises(UserError, match=re.escape("(a server of the campaign's own), got redis://me:***@127")):
        R2D2.from_checkpoint(str(played.path))


@pytest.mark.parametrize(
    ("settings", "scheduler"),
    [
        ({"seed": tune.grid_search([0, 1])}, None),
        (
            {"targets": tune.grid_search([[0.4], [0.5]])},
            ASHAScheduler(metric="env_runners/episode_return_mean", mode="max", max_t=2, grace_period=1),
        ),
    ],
)
def test_tune_runs_trials_to_their_end_with_the_keys_in_results_and_logs(
    local_ray: None, tmp_path: Path, settings: dict[str, Any], scheduler: Any
) -> None:
    tuner = tune.Tuner(
        R2D2,
        param_space=tiny(**settings).env_runners(num_env_runners=1),
        tune_config=tune.TuneConfig(scheduler=scheduler),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path),
            stop={"training_iteration": 2},
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            verbose=0,
        ),
    )
    results = tuner.fit()
    assert not results.errors
    assert len(results) == 2
    for result in results:
        assert result.metrics["env_runners"]["num_episodes_lifetime"] >= result.metrics["training_iteration"]
        logged = Path(result.path)
        lines = [json.loads(line) for line in (logged / "result.json").read_text().splitlines()]
        assert lines[-1]["env_runners"]["episode_return_mean"] == result.metrics["env_runners"]["episode_return_mean"]
        assert "env_runners/episode_return_mean" in (logged / "progress.csv").read_text().splitlines()[0]
        assert list(logged.glob("events.out.tfevents*"))
        assert (Path(result.checkpoint.path) / "algorithm_state.pkl").is_file()
    assert ray.util.list_named_actors(all_namespaces=True) == []


def test_the_last_episode_ends_the_training_and_another_train_says_so(
    build: Callable[[Callable[[], R2D2]], R2D2],
) -> None:
    algo = build(tiny().training(search={"episodes": 2}).build_algo)
    while not (result := algo.train())["done"]:
        pass
    assert result["env_runners"]["num_episodes_lifetime"] == 2
    assert (algo.campaign_folder / "candidates" / "search-0.5.safetensors").is_file()
    with pytest.raises(UserError, match=r"train\(\): expected at most the 2 episodes"):
        algo.train()


def test_on_a_given_server_a_checkpoint_is_gone_on_with_once_the_first_algorithm_is_stopped(
    build: Callable[[Callable[[], R2D2]], R2D2], redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ZEROOUT_REDIS_URL", redis_url)
    algo = build(tiny().build_algo)
    played = algo.train()["env_runners"]["num_episodes_lifetime"]
    path = algo.save_to_path(str(tmp_path / "checkpoint"))
    again = build(lambda: R2D2.from_checkpoint(path))
    reference = again.get_state()["campaign"]["replay"]
    assert (reference["server"], reference["data"]) == (redis_url, "")
    with pytest.raises(UserError, match="expected no other algorithm that uses it, got one that is running"):
        again.train()
    algo.stop()
    assert again.train()["env_runners"]["num_episodes_lifetime"] > played


def test_the_example_in_the_readme_runs(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "R2D2Config" in block]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert ray.util.list_named_actors(all_namespaces=True) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda c: c.training(lr=-1.0), "lr: expected above 0, got -1.0"),
        (lambda c: c.debugging(seed=0.5), "seed: expected a whole number, got 0.5"),
        (lambda c: c.training(gamma=2.0), "gamma: expected in (0, 1], got 2.0"),
        (lambda c: c.training(lr=[[0, 1e-3], [9, 1e-4]]), "lr: expected a number, got [[0, 0.001], [9, 0.0001]]"),
        (lambda c: c.env_runners(num_env_runners=0), "num_env_runners: expected at least 1, got 0"),
        (lambda c: c.training(learner={"n_stp": 3}), "did you mean learner.n_step?"),
        (lambda c: c.training(learner={"learning_rate": 1.0}), "use RLlib's own setting, lr"),
        (lambda c: c.training(search={"controls": ["random"]}), "search.controls: expected nothing here"),
        (lambda c: c.training(replay=5), "replay: expected a table of settings (a dict), got 5"),
        (lambda c: c.environment("CartPole-v1"), "env: expected Compression-v0, got 'CartPole-v1'"),
        (lambda c: c.environment(env_config={"netwrk": {}}), "did you mean network?"),
        (lambda c: c.environment(env_config={"episode": {"targets": [1.5]}}), "episode.targets: expected shares"),
        (lambda c: c.learners(num_learners=4), "setting num_learners: expected RLlib's default 0, since R2D2"),
        (lambda c: c.evaluation(evaluation_interval=1), "setting evaluation_interval: expected RLlib's default None"),
        (lambda c: c.update_from_dict({"sequense": {}}), "did you mean sequence?"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(wrong: Callable[[R2D2Config], R2D2Config], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        wrong(tiny()).build_algo()
    assert "\n" not in str(raised.value)


def test_settings_that_are_not_given_are_a_campaigns_defaults() -> None:
    campaign = R2D2Config().campaign()
    assert (campaign.search.actors, campaign.learner.learning_rate, campaign.learner.discount) == (2, 3e-3, 1.0)
    assert tiny(seed=5).campaign().seed == 5
    assert tiny().campaign().learner.learning_rate == 1e-3
