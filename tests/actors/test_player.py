import base64
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
import torch
from safetensors.torch import save as save_tensors
from told import Told
from torch import nn

import actors.player
import env.retraining
from actors.metrics import (
    PLAYER_ACCURACY,
    PLAYER_COMPRESSION,
    PLAYER_EPISODES,
    PLAYER_IMAGES,
    PLAYER_REFUSED_SNAPSHOTS,
    PLAYER_SECONDS,
    PLAYER_STEPS,
    PLAYER_WEIGHTS_AGE,
)
from actors.player import Brief, Player
from actors.rollout import Rollout, rollout
from actors.schedule import order
from actors.snapshot import Snapshot, snapshot_from_bytes, snapshot_to_bytes
from agents.cross_entropy import generation_size, next_offsets
from env.compact_file import network_from_bytes
from env.data import Dataset
from env.importance import FEATURES
from env.retraining import Metrics
from learner.replay.codec import seal
from learner.replay.ledger import Candidate, Ledger
from learner.replay.replay import Replay
from learner.replay.weights import WeightStore
from learner.sequence import collate

SEARCH = 3  # episodes of each group; the first is a teacher's
RECORD = {
    "id", "group", "actor", "policy", "epsilon", "sigma", "seed", "steps", "collapsed", "seconds", "phases",
    "weights_version", "begun_by", "steps_again", "return", "finished", "curve", "targets",
}  # fmt: skip
POINT = {"target", "compression", "parameters", "macs", "accuracy", "cross_entropy", "keep_bits"}


class KilledError(Exception):
    """Stands for kill -9."""


def played(player: Player) -> dict[str, Any]:
    record = player.play()
    assert record is not None
    return record


def skip_search(ledger: Ledger, episodes: int = SEARCH) -> None:
    """Let somebody else have played the whole search."""
    for episode in range(episodes):
        assert ledger.claim("another", 60.0) == episode
        assert ledger.complete(episode, json.dumps({"id": episode, "policy": "controller", "return": -1.0}))


def test_a_player_plays_what_the_schedule_says_and_records_it(brief: Brief, dataset: Dataset, ledger: Ledger) -> None:
    player = Player("actor-0", brief, dataset)
    records = [played(player) for _ in range(2)]
    assert [json.loads(line) for line in ledger.records()] == records
    for episode, record in enumerate(records):
        chosen = order(brief.schedule, episode, seed=brief.seed)
        assert set(record) == RECORD
        told = {name: record[name] for name in ("id", "group", "policy", "epsilon", "sigma", "seed")}
        assert told == {
            "id": episode,
            "group": "search",
            "policy": chosen.policy,
            "epsilon": chosen.epsilon,
            "sigma": chosen.sigma,
            "seed": chosen.seed,
        }
        assert (record["actor"], record["begun_by"], record["steps_again"]) == ("actor-0", "actor-0", 0)
        assert record["steps"] == 3 == len(record["curve"]) - 1
        assert record["seconds"] >= 0.99 * sum(record["phases"].values()) - 0.01 > 0
        assert all(len(point) == 2 for point in record["curve"])
        json.dumps(record, allow_nan=False)
    assert [record["policy"] for record in records] == ["taylor", "controller"]
    assert ledger.remaining() == brief.schedule.total - 2


def test_a_records_targets_say_which_filters_are_kept_and_what_that_costs(
    brief: Brief, dataset: Dataset, ledger: Ledger
) -> None:
    player = Player("actor-0", brief, dataset)
    targets = played(player)["targets"]
    assert [point["target"] for point in targets] == [0.5, 0.8]
    for point in targets:
        assert set(point) == POINT
        bits = np.frombuffer(base64.b64decode(point["keep_bits"]), np.uint8)
        kept = player.plan.kept_per_layer(torch.from_numpy(np.unpackbits(bits, count=player.plan.units)).bool())
        assert int(player.plan.parameters(kept)) == point["parameters"]
        assert point["compression"] == pytest.approx(1 - point["parameters"] / brief.measure.given)
        best = ledger.best(f"search/{point['target']}")
        assert best is not None
        assert best.score == pytest.approx(-point["cross_entropy"])
        assert json.loads(best.meta) == {"episode": 0, "policy": "taylor"}
        network = network_from_bytes(best.payload, brief.form)
        assert sum(parameter.numel() for parameter in network.parameters()) == point["parameters"]


def test_only_networks_that_are_better_than_the_best_are_sent(
    brief: Brief, dataset: Dataset, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player("actor-0", brief, dataset)
    best = {"search/0.5": -1e9, "search/0.8": 1.0}  # one that everybody beats, one that nobody does
    for number, (slot, score) in enumerate(best.items()):
        ledger.complete(5 - number, json.dumps({"id": 5 - number}), [Candidate(slot, score, b"best", "{}")])
    sent: list[Candidate] = []
    complete = player.services.ledger.complete

    def noted(episode: int, record: str, candidates: Sequence[Candidate] = ()) -> bool:
        sent.extend(candidates)
        return complete(episode, record, candidates)

    monkeypatch.setattr(player.services.ledger, "complete", noted)
    played(player)
    assert [candidate.slot for candidate in sent] == ["search/0.5"]
    assert ledger.best("search/0.8") == Candidate("search/0.8", 1.0, b"best", "{}")


@pytest.mark.parametrize(("observation", "kinds"), [("features", len(FEATURES)), ("mask", 0)])
def test_its_sequences_are_what_the_learner_reads(
    brief: Brief, dataset: Dataset, ledger: Ledger, replay: Replay, observation: str, kinds: int
) -> None:
    brief = replace(brief, controller=replace(brief.controller, observation=observation))
    player = Player("actor-0", brief, dataset)
    record = played(player)
    assert (replay.stats().size, replay.stats().inserted) == (2, 2)
    sample = replay.sample(64)  # both sequences among them, but for 1 in 2 ** 60
    assert sample is not None
    batch = collate(sample.arrays, brief.sequences, brief.packing(player.plan), hidden=5)
    by_start = {int(start): b for b, start in enumerate(batch.step[0])}
    assert set(by_start) == {0, 1}
    curve = batch.observations.accuracy[1:, by_start[0]], batch.observations.accuracy[:, by_start[1]]
    expected = [accuracy for _, accuracy in record["curve"]]
    assert [part.tolist() for part in curve] == [
        pytest.approx(expected[:3], abs=1e-5),
        pytest.approx(expected, abs=1e-5),
    ]


def test_an_episode_played_again_after_a_crash_before_its_record_is_in_the_replay_once(
    brief: Brief, dataset: Dataset, ledger: Ledger, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> bool:
        raise KilledError

    first = Player("actor-0", brief, dataset)
    monkeypatch.setattr(first.services.ledger, "complete", killed)
    with pytest.raises(KilledError):
        first.play()
    assert replay.stats().size == 2
    assert ledger.records() == []
    assert ledger.in_flight() == [(0, "actor-0")]
    second = Player("actor-0", brief, dataset)
    assert ledger.in_flight() == []
    assert played(second)["id"] == 0
    assert (replay.stats().size, replay.stats().inserted) == (2, 2)
    assert [json.loads(line)["id"] for line in ledger.records()] == [0]


def test_a_restarted_player_gives_back_what_it_had_claimed_and_nothing_of_others(
    brief: Brief, dataset: Dataset, ledger: Ledger
) -> None:
    assert [ledger.claim(owner, 60.0) for owner in ("actor-0", "actor-1", "actor-0")] == [0, 1, 2]
    player = Player("actor-0", brief, dataset)
    assert ledger.in_flight() == [(1, "actor-1")]
    assert played(player)["id"] == 0


def test_when_nothing_is_free_nothing_is_played(brief: Brief, dataset: Dataset, ledger: Ledger) -> None:
    player = Player("actor-0", brief, dataset)
    for _ in range(brief.schedule.total):
        ledger.claim("another", 60.0)
    assert player.play() is None
    assert ledger.records() == []


def test_the_same_episode_is_the_same_whoever_plays_it(
    brief: Brief, dataset: Dataset, ledger: Ledger, client: redis.Redis
) -> None:
    elsewhere = replace(brief, prefix=f"{brief.prefix}-elsewhere")
    Ledger(client, elsewhere.prefix).open("test", brief.schedule.total)
    players = Player("actor-0", brief, dataset), Player("actor-1", elsewhere, dataset)
    for one, other in ((played(players[0]), played(players[1])) for _ in range(2)):
        assert one["curve"] == other["curve"]
        assert one["targets"] == other["targets"]


def test_new_weights_are_pulled_before_an_episode_and_the_record_tells_their_version(
    brief: Brief, dataset: Dataset, ledger: Ledger, client: redis.Redis
) -> None:
    player = Player("actor-0", brief, dataset)
    learned = brief.fresh_controller(player.plan)
    for parameter in learned.parameters():
        nn.init.normal_(parameter, std=0.3)
    WeightStore(client, brief.prefix).publish(7, save_tensors(learned.state_dict()))
    assert [played(player)["weights_version"] for _ in range(2)] == [0, 7]  # a teacher's, then the Controller's own
    for mine, theirs in zip(player._controller.parameters(), learned.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(player._fresh.parameters(), brief.fresh_controller(player.plan).parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("stored", [b"garbage", save_tensors({"other": torch.zeros(3)})])
def test_weights_that_are_none_or_another_controllers_are_left_and_the_player_goes_on(
    brief: Brief, dataset: Dataset, ledger: Ledger, client: redis.Redis, caplog: pytest.LogCaptureFixture, stored: bytes
) -> None:
    player = Player("actor-0", brief, dataset)
    WeightStore(client, brief.prefix).publish(7, stored)
    assert [played(player)["weights_version"] for _ in range(2)] == [0, 0]
    assert "those of version 0 stay" in caplog.text


def test_every_worker_starts_from_the_same_controller_and_leaves_the_global_generator_alone(
    brief: Brief, dataset: Dataset, ledger: Ledger
) -> None:
    plan = Player("actor-0", brief, dataset).plan
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, other = brief.fresh_controller(plan), brief.fresh_controller(plan)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_teacher_that_asks_for_more_than_the_features_feeds_the_replay_as_others_do(
    brief: Brief, dataset: Dataset, ledger: Ledger, replay: Replay
) -> None:
    brief = replace(brief, schedule=replace(brief.schedule, teacher_rules=("hrank",)))
    player = Player("actor-0", brief, dataset)
    assert played(player)["policy"] == "hrank"
    assert "importance" in player.env.observation_space.spaces
    assert replay.stats().inserted == 2
    assert played(player)["policy"] == "controller"
    assert "importance" not in player.env.observation_space.spaces


def test_controls_do_not_feed_the_replay(brief: Brief, dataset: Dataset, ledger: Ledger, replay: Replay) -> None:
    skip_search(ledger)
    record = played(Player("actor-0", brief, dataset))
    assert (record["group"], record["policy"]) == ("cem", "cem")
    assert replay.stats().inserted == 0
    assert ledger.best("search/0.8") is None
    assert ledger.best("cem/0.8") is not None


def test_the_cross_entropy_method_goes_on_from_the_records_of_its_own_episodes(
    brief: Brief, dataset: Dataset, ledger: Ledger
) -> None:
    brief = replace(brief, schedule=replace(brief.schedule, episodes=11))
    ledger.open("test", 22)
    skip_search(ledger, 11)
    player = Player("actor-0", brief, dataset)
    random, finished = np.random.default_rng(0), []
    for episode in range(11, 21):
        offsets, reward = random.standard_normal(len(player.plan.layers)) + 5, float(random.standard_normal())
        finished.append((offsets, reward))
        assert ledger.claim("another", 60.0) == episode
        line = {"id": episode, "policy": "cem", "return": reward, "offsets": offsets.tolist()}
        assert ledger.complete(episode, json.dumps(line))
    record = played(player)
    assert set(record) == RECORD | {"offsets"}
    layers, seed = len(player.plan.layers), order(brief.schedule, 21, seed=brief.seed).seed
    assert record["offsets"] == next_offsets(finished, layers, seed=seed, generation=generation_size(11)).tolist()
    assert np.mean(record["offsets"]) > 1  # half way from 0 to about 5


def test_players_of_the_search_wait_for_a_learner_that_is_behind_and_controls_do_not(
    brief: Brief, dataset: Dataset, ledger: Ledger, replay: Replay
) -> None:
    brief = replace(brief, replay=replace(brief.replay, replay_ratio=100.0, replay_ratio_tolerance=150.0))
    player = Player("actor-0", brief, dataset)
    assert played(player)["id"] == 0  # two sequences: 200 more to be sampled than were
    assert player.play() is None
    assert ledger.in_flight() == []
    for episode in range(1, SEARCH):
        ledger.complete(episode, json.dumps({"id": episode, "policy": "controller"}))
    assert played(player)["group"] == "cem"


def test_a_network_whose_cross_entropy_is_nan_is_neither_a_candidate_nor_in_the_record(
    brief: Brief, dataset: Dataset, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Rollout:
        result = rollout(*args, **options)
        first, second = result.reached
        return replace(result, reached=[first, replace(second, metrics=Metrics(accuracy=0.1, cross_entropy=math.nan))])

    monkeypatch.setattr(actors.player, "rollout", broken)
    record = played(Player("actor-0", brief, dataset))
    assert [point["target"] for point in record["targets"]] == [0.5]
    assert ledger.best("search/0.5") is not None
    assert ledger.best("search/0.8") is None
    assert len(ledger.records()) == 1


def test_a_step_beats(brief: Brief, dataset: Dataset, ledger: Ledger) -> None:
    record = played(Player("actor-0", brief, dataset))
    beat = json.loads(ledger.beats()["actor-0"])
    assert (beat["episode"], beat["step"]) == (0, 3)
    assert [beat["compression"], beat["accuracy"]] == pytest.approx(record["curve"][-1], abs=1e-6)


@pytest.mark.parametrize("passing_s", [0.0, 7.0, 11.0])
def test_a_lease_is_renewed_when_a_sixth_of_it_is_over(
    brief: Brief, dataset: Dataset, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, passing_s: float
) -> None:
    # a step has one minibatch, the second and the third have one more to recover a target: eight looks at the clock
    player, renewed, now = Player("actor-0", brief, dataset), [], 0.0
    monkeypatch.setattr(player.services.ledger, "renew", lambda *call: renewed.append((now, *call)))
    keep = player._keep_lease

    def later(episode: int) -> None:
        nonlocal now
        now += passing_s
        keep(episode)

    monkeypatch.setattr(player, "_keep_lease", later)
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    monkeypatch.setattr(actors.player, "time", clock)
    played(player)
    looks = [passing_s * (n + 1) for n in range(8)]
    due = {0.0: [], 7.0: looks[1::2], 11.0: looks}[passing_s]  # a sixth of 60 s is 10 s
    assert renewed == [(when, 0, "actor-0", 60.0) for when in due]


def test_a_retraining_that_lasts_longer_than_the_lease_keeps_it(
    brief: Brief, dataset: Dataset, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease_s = 0.4
    slow = replace(brief, lease_s=lease_s, episode=replace(brief.episode, recovery_minibatches=4))
    player = Player("actor-0", slow, dataset)
    update = env.retraining.update

    def slowly(*args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(lease_s / 2)
        assert ledger.claim("another", 60.0) != 0, "the lease has run out"
        return update(*args, **kwargs)

    monkeypatch.setattr(env.retraining, "update", slowly)
    assert played(player)["id"] == 0


def test_metrics_tell_of_every_step_and_of_the_episode(
    brief: Brief, dataset: Dataset, ledger: Ledger, client: redis.Redis
) -> None:
    told = Told()
    player = Player("actor-0", brief, dataset, metrics=told)
    WeightStore(client, brief.prefix).publish(7, b"newer than those that it plays with")
    player._version = 4
    player.services.weights.pull = lambda newer_than: None  # type: ignore[method-assign]
    looks: list[int | None] = []
    version = player.services.weights.version

    def look() -> int | None:
        looks.append(version())
        return looks[-1]

    player.services.weights.version = look  # type: ignore[method-assign]
    record = played(player)
    assert (told[PLAYER_STEPS], told[PLAYER_EPISODES]) == (3, 1)
    assert told[PLAYER_IMAGES] == 16 * (3 + 2)  # one minibatch a step, and one to recover at each of two targets
    assert [told[PLAYER_COMPRESSION], told[PLAYER_ACCURACY]] == pytest.approx(record["curve"][-1], abs=1e-6)
    assert told[PLAYER_WEIGHTS_AGE] == 3
    assert looks == [7]  # three quick steps, which no scrape tells apart
    seconds = told.by(PLAYER_SECONDS)
    assert seconds.pop("insert") > 0
    assert seconds.pop("snapshot") > 0
    assert seconds == pytest.approx(record["phases"], abs=1e-3)


def test_an_episode_that_another_has_recorded_meanwhile_is_not_counted_again(
    brief: Brief, dataset: Dataset, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    player = Player("actor-0", brief, dataset, metrics=told)
    monkeypatch.setattr(player.services.ledger, "complete", lambda *_: False)
    played(player)
    assert (told[PLAYER_STEPS], told[PLAYER_EPISODES]) == (3, 0)


PERIOD, STEPS = 3, 7
#: What an episode that was taken up may say otherwise than one that was not.
UNLIKE = ("actor", "begun_by", "steps_again", "seconds", "phases", "finished")


def longer(brief: Brief) -> Brief:
    """With episodes of seven steps, of which the fourth and the last reach targets, by everybody who can decide."""
    controls = ("cem", "random", "untrained", "hrank")
    return replace(
        brief,
        episode=replace(brief.episode, waypoints=STEPS),
        schedule=replace(brief.schedule, snapshot_period=PERIOD, controls=controls),
        replay=replace(brief.replay, replay_ratio_tolerance=1e6),  # nobody learns here
    )


def killed_after(player: Player, steps: int, monkeypatch: pytest.MonkeyPatch, *, saved: bool = False) -> int:
    """Let the player play so many steps and die, before or after the last one's snapshot; returns the steps played."""
    ledger, beat, save = player.services.ledger, player.services.ledger.beat, player._save
    left = steps

    def count(worker: str, fields: str) -> None:
        nonlocal left
        beat(worker, fields)
        left -= 1
        if left == 0 and not saved:
            raise KilledError

    def keep(*call: Any) -> None:
        save(*call)
        if left <= 0:
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "beat", count)
        patched.setattr(player, "_save", keep)
        with pytest.raises(KilledError):
            player.play()
    ((episode, _),) = ledger.in_flight()
    assert ledger.release(episode, player.name)  # as its restart does
    return steps - left


def publish(client: redis.Redis, brief: Brief, player: Player, version: int) -> None:
    """Weights of a Controller that has learned `version` times."""
    learned = brief.fresh_controller(player.plan)
    generator = torch.Generator().manual_seed(version)
    for parameter in learned.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    WeightStore(client, brief.prefix).publish(version, save_tensors(learned.state_dict()))


def sequences(client: redis.Redis, brief: Brief) -> dict[bytes, tuple[bytes, bytes]]:
    """Payload, and weight with its state in the race, of all that the replay holds."""
    data, weight = (client.hgetall(f"{{{brief.prefix}}}:replay:{name}") for name in ("data", "weight"))
    return {key: (data[key], weight[key].split()[0]) for key in data}


def alike(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in UNLIKE}


def test_an_episode_whose_players_are_killed_is_bit_for_bit_the_one_without(
    brief: Brief, dataset: Dataset, ledger: Ledger, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = longer(brief)
    quiet = replace(brief, prefix=f"{brief.prefix}-quiet")
    ledger.open("test", brief.schedule.total)
    undisturbed = Ledger(client, quiet.prefix)
    undisturbed.open("test", brief.schedule.total)
    calm, told = Player("calm", quiet, dataset), Told()
    players = [Player(f"actor-{i}", brief, dataset, metrics=told) for i in range(2)]
    random, taken_up = np.random.default_rng(0), 0
    for episode in range(brief.schedule.total):
        for whose in (quiet, brief):
            publish(client, whose, calm, 10 * episode + 1)
        expected, steps = played(calm), 0
        for life in range(2):
            before = ledger.snapshot(episode)
            last = int(random.integers(1, PERIOD + 1))
            made = killed_after(players[life], last, monkeypatch, saved=bool(random.integers(2)))
            assert made <= PERIOD
            steps += made
            if ledger.snapshot(episode) != before:
                publish(client, brief, calm, 10 * episode + 2 + life)  # who goes on must not play with these
        taken_up += ledger.snapshot(episode) is not None
        already = told[PLAYER_STEPS]
        record = played(players[0])
        assert alike(record) == alike(expected)
        assert record["steps"] + record["steps_again"] == steps + told[PLAYER_STEPS] - already
        assert record["steps_again"] <= PERIOD * 2
        assert ledger.snapshot(episode) is None
    assert taken_up > brief.schedule.total // 2
    slots = undisturbed.slots()
    assert ledger.slots() == slots
    assert len(slots) == 2 * len(brief.schedule.groups)
    for slot in slots:
        mine, theirs = ledger.best(slot), undisturbed.best(slot)
        assert mine == theirs
    assert sequences(client, brief) == sequences(client, quiet)
    assert client.hlen(f"{{{brief.prefix}}}:ledger:snapshots") == 0


@pytest.mark.slow
def test_a_player_killed_for_real_is_taken_over_where_its_last_snapshot_was(
    brief: Brief, dataset: Dataset, ledger: Ledger, client: redis.Redis, tmp_path: Path
) -> None:
    brief = longer(brief)
    ledger.open("test", brief.schedule.total)
    file, root = tmp_path / "brief", Path(__file__).parents[2]
    file.write_bytes(pickle.dumps(brief))
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    script = root / "tests" / "support" / "doomed_player.py"
    ended = subprocess.run([sys.executable, script, file, "5"], env=environment, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert ledger.in_flight() == [(0, "killed")]
    assert ledger.release(0, "killed")
    told = Told()
    record = played(Player("actor-0", brief, dataset, metrics=told))
    # the fourth step reached a target, and its snapshot is the newest
    assert (record["id"], record["begun_by"], record["steps_again"]) == (0, "killed", 1)
    assert (record["actor"], record["steps"], told[PLAYER_STEPS]) == ("actor-0", STEPS, 3)
    assert record["seconds"] >= 0.99 * sum(record["phases"].values()) - 0.01
    quiet = replace(brief, prefix=f"{brief.prefix}-quiet")
    Ledger(client, quiet.prefix).open("test", brief.schedule.total)
    assert alike(record) == alike(played(Player("calm", quiet, dataset)))


def test_what_the_cross_entropy_method_tries_stays_when_others_have_finished_meanwhile(
    brief: Brief, dataset: Dataset, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = longer(brief)
    skip_search(ledger)
    player, drawn = Player("actor-0", brief, dataset), iter((0.25, 0.5))
    monkeypatch.setattr(actors.player, "next_candidate", lambda *_, **__: np.full(len(player.plan.layers), next(drawn)))
    assert killed_after(player, 3, monkeypatch, saved=True) == 3
    assert set(played(player)["offsets"]) == {0.25}


def test_an_episode_killed_before_its_first_snapshot_begins_anew_and_one_killed_at_its_end_goes_on_from_its_last(
    brief: Brief, dataset: Dataset, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief, told = longer(brief), Told()
    first, second = Player("actor-0", brief, dataset), Player("actor-1", brief, dataset, metrics=told)
    assert killed_after(first, 1, monkeypatch) == 1
    record = played(second)
    assert (record["begun_by"], record["steps_again"], told[PLAYER_STEPS]) == ("actor-1", 1, STEPS)
    assert killed_after(first, STEPS, monkeypatch) == STEPS
    record = played(second)
    assert (record["begun_by"], record["steps_again"], told[PLAYER_STEPS]) == ("actor-0", 1, STEPS + 1)
    assert len(record["targets"]) == 2


def test_with_period_0_there_are_no_snapshots(brief: Brief, dataset: Dataset, ledger: Ledger) -> None:
    brief = replace(brief, schedule=replace(brief.schedule, snapshot_period=0))
    player = Player("actor-0", brief, dataset)
    player.services.ledger.save = lambda *_: pytest.fail("saved")  # type: ignore[method-assign]
    assert played(player)["steps_again"] == 0


def fingerprint(player: Player) -> str:
    return player.brief.fingerprint(order(player.brief.schedule, 0, seed=player.brief.seed))


def empty(data: bytes, player: Player) -> bytes:
    """What says that it is the snapshot of episode 0, and is sealed, but holds nothing."""
    text = json.dumps({"format": 1, "fingerprint": fingerprint(player)})
    return seal(b"ZOSN", len(text), text.encode() + save_tensors({}))


def forged(
    spoil: Callable[[Snapshot], None],
) -> Callable[[bytes, Player], bytes]:
    """A snapshot of episode 0 in which one thing was changed, sealed again."""

    def change(data: bytes, player: Player) -> bytes:
        known = {"fingerprint": fingerprint(player), "recognizer": player.env.recognizer}
        snapshot = snapshot_from_bytes(data, **known)
        spoil(snapshot)
        return snapshot_to_bytes(snapshot, **known)

    return change


def lose_a_step(snapshot: Snapshot) -> None:
    course = snapshot.underway.course
    for entries in (course.observations, course.actions, course.rewards, course.states):
        del entries[-1]


def widen_the_actions(snapshot: Snapshot) -> None:
    snapshot.underway.course.actions[:] = [np.append(one, np.int8(0)) for one in snapshot.underway.course.actions]


def lose_a_weight(snapshot: Snapshot) -> None:
    dict.popitem(snapshot.weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told_as"),
    [
        (lambda data, _: b"garbage", "payload: expected a header"),
        (lambda data, _: data[:-1] + bytes([data[-1] ^ 1]), "payload's crc32"),
        (empty, "KeyError"),
        (forged(lose_a_step), "ValueError: course: expected 2 steps"),
        (forged(widen_the_actions), "ValueError: course: expected observations, actions"),
        (forged(lose_a_weight), "RuntimeError: Error(s) in loading state_dict"),
    ],
)
def test_a_snapshot_that_is_none_is_named_and_counted_and_the_episode_begins_anew(
    brief: Brief,
    dataset: Dataset,
    ledger: Ledger,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[bytes, Player], bytes],
    told_as: str,
) -> None:
    brief, told = longer(brief), Told()
    player = Player("actor-0", brief, dataset, metrics=told)
    killed_after(player, 3, monkeypatch, saved=True)
    data = ledger.snapshot(0)
    assert data is not None
    client.hset(f"{{{brief.prefix}}}:ledger:snapshots", "0", change(data, player))
    record = played(player)
    assert (record["steps"], record["steps_again"], told[PLAYER_REFUSED_SNAPSHOTS]) == (STEPS, 3, 1)
    assert "episode 0: its snapshot is refused, it begins anew: " + told_as in caplog.text
    assert ledger.snapshot(0) is None


def test_a_snapshot_of_another_episode_or_campaign_is_refused(
    brief: Brief,
    dataset: Dataset,
    ledger: Ledger,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    brief = longer(brief)
    other = replace(brief, prefix=f"{brief.prefix}-other")
    elsewhere = Ledger(client, other.prefix)
    elsewhere.open("test", brief.schedule.total)
    killed_after(Player("actor-0", other, dataset), 3, monkeypatch, saved=True)
    theirs = elsewhere.snapshot(0)
    assert theirs is not None
    client.hset(f"{{{brief.prefix}}}:ledger:snapshots", "0", theirs)
    assert played(Player("actor-0", brief, dataset))["begun_by"] == "actor-0"
    assert "snapshot's fingerprint: expected" in caplog.text


def test_a_snapshot_that_the_server_does_not_take_is_said_and_the_episode_goes_on(
    brief: Brief,
    dataset: Dataset,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    player = Player("actor-0", brief, dataset)
    monkeypatch.setattr(player.services.ledger, "save", lambda *_: False)
    assert played(player)["steps"] == 3
    assert "bytes is not kept" in caplog.text
