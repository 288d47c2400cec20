import base64
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import redis
import torch
from safetensors.torch import save as save_tensors
from told import Told
from torch import nn

import actors.player
from actors.metrics import (
    PLAYER_ACCURACY,
    PLAYER_COMPRESSION,
    PLAYER_EPISODES,
    PLAYER_IMAGES,
    PLAYER_SECONDS,
    PLAYER_STEPS,
    PLAYER_WEIGHTS_AGE,
)
from actors.player import Brief, Player
from actors.rollout import Rollout, rollout
from actors.schedule import order
from agents.cross_entropy import generation_size, next_offsets
from env.compact_file import network_from_bytes
from env.data import Dataset
from env.retraining import Metrics
from learner.replay.ledger import Candidate, Ledger
from learner.replay.replay import Replay
from learner.replay.weights import WeightStore
from learner.sequence import collate

torch.set_num_threads(1)

SEARCH = 3  # episodes of each group; the first is a teacher's
RECORD = {
    "id", "group", "actor", "policy", "epsilon", "sigma", "seed", "steps", "collapsed", "seconds", "phases",
    "weights_version",
    "return", "finished", "curve", "targets",
}  # fmt: skip
POINT = {"target", "compression", "parameters", "macs", "accuracy", "cross_entropy", "keep_bits"}


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
        assert record["actor"] == "actor-0"
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


@pytest.mark.parametrize(("observation", "kinds"), [("features", 3), ("mask", 0)])
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
    class KilledError(Exception):
        """Stands for kill -9."""

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


def test_a_step_renews_the_lease_and_beats(
    brief: Brief, dataset: Dataset, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    player, renewed = Player("actor-0", brief, dataset), []
    monkeypatch.setattr(player.services.ledger, "renew", lambda *call: renewed.append(call))
    record = played(player)
    assert renewed == [(0, "actor-0", 60.0)] * 3
    beat = json.loads(ledger.beats()["actor-0"])
    assert (beat["episode"], beat["step"]) == (0, 3)
    assert [beat["compression"], beat["accuracy"]] == pytest.approx(record["curve"][-1], abs=1e-6)


def test_metrics_tell_of_every_step_and_of_the_episode(
    brief: Brief, dataset: Dataset, ledger: Ledger, client: redis.Redis
) -> None:
    told = Told()
    player = Player("actor-0", brief, dataset, metrics=told)
    WeightStore(client, brief.prefix).publish(7, b"newer than those that it plays with")
    player._version = 4
    player.services.weights.pull = lambda newer_than: None  # type: ignore[method-assign]
    record = played(player)
    assert (told[PLAYER_STEPS], told[PLAYER_EPISODES]) == (3, 1)
    assert told[PLAYER_IMAGES] == 16 * (3 + 2)  # one minibatch a step, and one to recover at each of two targets
    assert [told[PLAYER_COMPRESSION], told[PLAYER_ACCURACY]] == pytest.approx(record["curve"][-1], abs=1e-6)
    assert told[PLAYER_WEIGHTS_AGE] == 3
    seconds = told.by(PLAYER_SECONDS)
    assert seconds.pop("insert") > 0
    assert seconds == pytest.approx(record["phases"], abs=1e-3)


def test_an_episode_that_another_has_recorded_meanwhile_is_not_counted_again(
    brief: Brief, dataset: Dataset, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    player = Player("actor-0", brief, dataset, metrics=told)
    monkeypatch.setattr(player.services.ledger, "complete", lambda *_: False)
    played(player)
    assert (told[PLAYER_STEPS], told[PLAYER_EPISODES]) == (3, 0)
