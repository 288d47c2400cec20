"""One process of a replay's campaign, for tests that kill it or run many: `python replay_worker.py ROLE URL PREFIX N`.

Says one line of JSON at its end, or "inserting" once it does where there is no end.
"""

import json
import sys

import numpy as np

from learner.replay.codec import encode
from learner.replay.connection import connect
from learner.replay.replay import Item, Replay, ReplayConfig
from learner.replay.shards import ShardedReplay, open_replay

WRITERS, BATCHES, BATCH, UPDATES = 8, 30, 5, 40


def items(writer: int, batch: int) -> list[Item]:
    """What writer `writer` inserts in its `batch`-th call."""
    return [Item(f"{writer}-{batch}-{i}", encode({"x": np.zeros(250, np.float32)}), 1.0) for i in range(BATCH)]


def main() -> None:
    """Insert for ever ("flood"), insert BATCHES batches ("write"), or sample and update ("learn")."""
    role, url, prefix, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    config = ReplayConfig(capacity_sequences=100_000, min_sequences=1, replay_ratio=1e9, priority_exponent=1.0)
    with connect(url, patience_s=20.0) as client:
        replay = open_replay([client], prefix, config, np.random.default_rng(number))
        if role == "flood":
            _say("inserting")
            batch = 0
            while True:
                replay.insert(items(number, batch))
                batch += 1
        if role == "write":
            _say(json.dumps([replay.insert(items(number, batch)) for batch in range(BATCHES)]))
        else:
            _say(json.dumps(_learn(replay, number)))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _learn(replay: Replay | ShardedReplay, number: int) -> dict[str, list[str]]:
    """Sample; of what is drawn, give every key whose generation has this learner's parity the priority 2 + number."""
    drawn: list[str] = []
    mine: set[str] = set()
    while len(drawn) < 16 * UPDATES:
        sample = replay.sample(16)
        if sample is None:
            continue
        drawn += sample.keys
        keys = [key for key in sample.keys if int(key.split(":")[0]) % 2 == number]
        assert replay.update(keys, np.full(len(keys), 2.0 + number)) == len(keys)
        mine |= set(keys)
    return {"drawn": drawn, "mine": sorted(mine)}


if __name__ == "__main__":
    main()
