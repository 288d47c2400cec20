import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis
import torch
from told import Told

from actors.metrics import (
    LEARNER_DELTA_Q,
    LEARNER_LOSS,
    LEARNER_PRIORITY,
    LEARNER_UPDATES,
    LEARNER_WAIT,
    REPLAY_BYTES,
    REPLAY_INSERTED,
    REPLAY_REFUSED,
    REPLAY_SAMPLED,
    REPLAY_SIZE,
    REPLAY_WAITING,
)
from actors.player import Brief, Player
from actors.trainer import Trainer
from env.data import Dataset
from env.errors import NonFiniteError, UserError
from learner import checkpoint
from learner.replay.codec import decode, encode
from learner.replay.ledger import Ledger
from learner.replay.replay import Item, Replay
from learner.replay.weights import WeightStore


@pytest.fixture
def learning(brief: Brief) -> Brief:
    """The campaign with a learner that publishes and saves after every update, a few in all."""
    learner = replace(brief.learner, batch_size=2, publish_period=1, checkpoint_period=2, delta_q_period=1)
    return replace(brief, learner=learner, replay=replace(brief.replay, replay_ratio=4.0, replay_ratio_tolerance=0.0))


def run_until(trainer: Trainer, ledger: Ledger, updates: int) -> int:
    """Let the trainer run in a thread and ask it to stop when it has made so many updates."""
    made: list[int] = []
    thread = threading.Thread(target=lambda: made.append(trainer.run()))
    thread.start()
    deadline = time.monotonic() + 60
    while trainer.learner.updates < updates and time.monotonic() < deadline:
        time.sleep(0.02)
    ledger.request_stop()
    thread.join(60)
    return made[0]


def test_a_trainer_learns_what_players_insert_publishes_saves_and_says_so(
    learning: Brief,
    dataset: Dataset,
    ledger: Ledger,
    replay: Replay,
    client: redis.Redis,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "zeroout")
    Player("actor-0", learning, dataset).play()  # two sequences: at four each and two a batch, four updates
    trainer = Trainer(learning, tmp_path)
    assert run_until(trainer, ledger, 4) == 4
    assert replay.stats().sampled == 8
    assert WeightStore(client, learning.prefix).pull(3) is not None
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    assert saved["updates"] == 4
    beat = json.loads(ledger.beats()["learner"])
    assert beat["updates"] == 4
    assert "4 updates: loss " in caplog.text
    assert "Delta Q" in caplog.text
    assert {"loss", "mean_priority", "replay", "skipped", "delta_q_first", "delta_q_last"} <= set(beat)


def test_a_trainer_goes_on_from_its_checkpoint(
    learning: Brief, dataset: Dataset, ledger: Ledger, tmp_path: Path
) -> None:
    Player("actor-0", learning, dataset).play()
    first = Trainer(learning, tmp_path)
    run_until(first, ledger, 4)
    second = Trainer(learning, tmp_path)
    assert second.learner.updates == 4
    for mine, theirs in zip(
        second.learner.controller.state_dict().values(), first.learner.controller.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    second.replay.close()


def test_a_checkpoint_of_another_controller_is_named_and_left_alone(
    learning: Brief, ledger: Ledger, tmp_path: Path
) -> None:
    first = Trainer(learning, tmp_path)
    state = first.learner.state_dict()
    first.replay.close()
    state["controller"] = {name: tensor for name, tensor in state["controller"].items() if name != "lstm.weight_ih_l0"}
    saved = checkpoint.save(tmp_path, state, 7)
    with pytest.raises(UserError, match=r"checkpoints in .*lstm\.weight_ih_l0.*versions\.json"):
        Trainer(learning, tmp_path)
    assert (saved / "state.pt").is_file()


def test_a_trainer_saves_when_asked_beside_its_run(
    learning: Brief, dataset: Dataset, ledger: Ledger, tmp_path: Path
) -> None:
    learning = replace(learning, learner=replace(learning.learner, checkpoint_period=1000))
    Player("actor-0", learning, dataset).play()
    trainer = Trainer(learning, tmp_path)
    trainer.save()  # nothing runs yet: there is nothing to write
    assert checkpoint.load_newest(tmp_path) is None
    thread = threading.Thread(target=trainer.run)
    thread.start()
    deadline = time.monotonic() + 60
    while trainer.learner.updates < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    trainer.save()
    saved = checkpoint.load_newest(tmp_path)
    ledger.request_stop()
    thread.join(60)
    assert saved is not None
    assert saved["updates"] == 4


def test_when_nothing_but_bad_sequences_come_the_last_good_weights_are_saved_and_the_error_says_which(
    learning: Brief, dataset: Dataset, ledger: Ledger, replay: Replay, tmp_path: Path
) -> None:
    learning = replace(learning, learner=replace(learning.learner, max_bad_updates=2))
    Player("actor-0", learning, dataset).play()
    sample = replay.sample(1)
    assert sample is not None
    poisoned = {name: array.copy() for name, array in sample.arrays[0].items()}
    poisoned["rewards"][:] = 1e38  # finite, but its square is not
    replay.update(sample.keys, np.zeros(1))
    replay.insert([Item(f"bad{number}", encode(poisoned), 1e6) for number in range(9)])
    trainer = Trainer(learning, tmp_path)
    with pytest.raises(NonFiniteError, match=r"2 updates in a row were skipped, the last on sequences .*bad\d"):
        trainer.run()
    saved = checkpoint.load_newest(tmp_path)
    assert saved is not None
    assert saved["updates"] == trainer.learner.updates
    assert all(tensor.isfinite().all() for tensor in saved["controller"].values())


def test_first_priorities_are_td_errors_and_not_all_alike(
    learning: Brief, dataset: Dataset, ledger: Ledger, client: redis.Redis, replay: Replay
) -> None:
    Player("actor-0", learning, dataset).play()
    records = client.hgetall(replay.race.weight)
    weights = {float(record.split()[0]) for record in records.values()}
    assert len(weights) == 2
    assert all(0 < weight < 1e3 for weight in weights)
    payloads = client.hgetall(replay.race.data).values()
    assert all("later_states" in decode(payload) for payload in payloads)


def test_metrics_tell_of_updates_and_of_the_replay(
    learning: Brief, dataset: Dataset, ledger: Ledger, replay: Replay, tmp_path: Path
) -> None:
    told = Told()
    trainer = Trainer(learning, tmp_path, metrics=told)
    trainer._learn_until(time.monotonic() + 0.15)  # the replay is empty: it waits
    Player("actor-0", learning, dataset).play()  # two sequences: at four each and two a batch, four updates
    assert run_until(trainer, ledger, 4) == 4
    beat, stats = json.loads(ledger.beats()["learner"]), replay.stats()
    assert told[LEARNER_UPDATES] == 4
    assert (told[REPLAY_INSERTED], told[REPLAY_SAMPLED]) == (2, 8)
    assert (told[REPLAY_SIZE], told[REPLAY_BYTES]) == (2, stats.bytes)
    assert told.by(REPLAY_WAITING) == {"learner": 1, "actors": 0}
    assert told[REPLAY_REFUSED] > 0
    assert told[LEARNER_WAIT] > 0
    assert (told[LEARNER_LOSS], told[LEARNER_PRIORITY]) == (beat["loss"], beat["mean_priority"])
    assert told.by(LEARNER_DELTA_Q) == {"first": beat["delta_q_first"], "last": beat["delta_q_last"]}
