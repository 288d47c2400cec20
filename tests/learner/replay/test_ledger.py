import json
import threading
import time

import pytest
import redis

from env.errors import UserError
from learner.replay.connection import connect
from learner.replay.ledger import Candidate, Ledger


@pytest.fixture
def ledger(client: redis.Redis, prefix: str) -> Ledger:
    ledger = Ledger(client, prefix)
    ledger.open("config-1", 3)
    return ledger


def _record(episode: int, **more: object) -> str:
    return json.dumps({"id": episode, **more})


def test_episodes_are_claimed_lowest_first_and_only_once(ledger: Ledger) -> None:
    assert [ledger.claim(owner, 60) for owner in "abcd"] == [0, 1, 2, None]
    assert ledger.in_flight() == [(0, "a"), (1, "b"), (2, "c")]
    assert ledger.remaining() == 3


def test_opening_again_changes_nothing_and_more_episodes_are_appended(ledger: Ledger) -> None:
    assert ledger.claim("a", 60) == 0
    assert ledger.complete(0, _record(0))
    assert ledger.claim("a", 60) == 1
    ledger.open("config-1", 3)
    assert ledger.remaining() == 2
    ledger.open("config-1", 5)
    assert ledger.remaining() == 4
    assert [ledger.claim("b", 60) for _ in range(4)] == [2, 3, 4, None]


def test_fewer_episodes_withdraw_what_nobody_plays(ledger: Ledger) -> None:
    ledger.open("config-1", 6)
    assert ledger.complete(5, _record(5))
    ledger.open("config-1", 2)
    assert ledger.remaining() == 2
    ledger.open("config-1", 7)
    assert ledger.remaining() == 6  # not episode 5: it is done


def test_another_configuration_under_the_prefix_is_the_users_mistake(ledger: Ledger) -> None:
    with pytest.raises(UserError, match=r"expected the configuration config-2, got another campaign's, config-1"):
        ledger.open("config-2", 3)
    assert ledger.remaining() == 3


def test_an_expired_lease_returns_the_episode_and_the_old_owner_has_lost_it(ledger: Ledger) -> None:
    assert ledger.claim("dead", 0.03) == 0
    assert ledger.claim("b", 60) == 1
    time.sleep(0.05)
    assert ledger.claim("c", 60) == 0
    assert not ledger.renew(0, "dead", 60)
    assert not ledger.release(0, "dead")
    assert ledger.in_flight() == [(0, "c"), (1, "b")]


def test_a_renewed_lease_lasts(ledger: Ledger) -> None:
    assert ledger.claim("a", 0.05) == 0
    assert ledger.renew(0, "a", 60)
    time.sleep(0.07)
    assert ledger.claim("b", 60) == 1


def test_a_released_episode_is_free_at_once(ledger: Ledger) -> None:
    assert ledger.claim("a", 60) == 0
    assert ledger.release(0, "a")
    assert not ledger.release(0, "a")
    assert ledger.claim("b", 60) == 0


def test_the_first_completion_counts_from_anybody_and_the_second_changes_nothing(ledger: Ledger) -> None:
    assert ledger.claim("slow", 0.02) == 0
    time.sleep(0.04)
    assert ledger.claim("quick", 60) == 0
    assert ledger.complete(0, _record(0, by="slow"), [Candidate("90", 0.5, b"slow", "{}")])
    assert not ledger.complete(0, _record(0, by="quick"), [Candidate("90", 0.9, b"quick", "{}")])
    assert ledger.records() == [_record(0, by="slow")]
    assert ledger.best("90") == Candidate("90", 0.5, b"slow", "{}")
    assert ledger.in_flight() == []
    assert not ledger.release(0, "quick")
    assert ledger.remaining() == 2
    assert ledger.claim("a", 60) == 1


def test_records_come_in_the_order_of_completion(ledger: Ledger) -> None:
    for episode in (2, 0, 1):
        ledger.complete(episode, _record(episode))
    assert ledger.records() == [_record(2), _record(0), _record(1)]
    assert ledger.records(2) == [_record(1)]
    assert ledger.records(3) == []
    assert ledger.remaining() == 0


def test_the_best_candidate_of_each_slot_stays(ledger: Ledger) -> None:
    assert ledger.best("80") is None
    assert ledger.best_score("80") is None
    ledger.complete(0, _record(0), [Candidate("80", -1e-300, b"\x00\xff", "m"), Candidate("90", 0.1 + 0.2, b"", "")])
    ledger.complete(1, _record(1), [Candidate("80", 1e-300, b"new", "n"), Candidate("90", 0.3, b"lower", "")])
    ledger.complete(2, _record(2), [Candidate("80", 1e-300, b"equal", "n")])
    assert ledger.best("80") == Candidate("80", 1e-300, b"new", "n")
    assert ledger.best("90") == Candidate("90", 0.1 + 0.2, b"", "")
    assert (ledger.best_score("80"), ledger.best_score("90")) == (1e-300, 0.1 + 0.2)
    ledger.open("config-1", 5)
    ledger.complete(3, _record(3), [Candidate("95", 9.0, b"nine", "")])
    ledger.complete(4, _record(4), [Candidate("95", 10.0, b"ten", "")])  # as numbers, not as text
    assert ledger.best("95") == Candidate("95", 10.0, b"ten", "")
    assert ledger.slots() == ["80", "90", "95"]


def test_lost_records_are_restored_once(ledger: Ledger) -> None:
    ledger.complete(1, _record(1))
    assert ledger.claim("a", 60) == 0
    lost = [_record(0, x=1), _record(1, x=1), _record(2, x=1)]
    assert ledger.restore(lost) == 2
    assert ledger.restore(lost) == 0
    assert ledger.records() == [_record(1), _record(0, x=1), _record(2, x=1)]
    assert (ledger.remaining(), ledger.in_flight()) == (0, [])
    assert not ledger.complete(0, _record(0))


def test_the_newest_snapshot_of_an_episode_stays_until_it_is_recorded(
    ledger: Ledger, client: redis.Redis, prefix: str
) -> None:
    assert ledger.claim("a", 60) == 0
    assert ledger.snapshot(0) is None
    assert ledger.save(0, "a", b"first")
    assert ledger.save(0, "a", b"\x00second")
    assert ledger.snapshot(0) == b"\x00second"
    assert ledger.release(0, "a")
    assert ledger.snapshot(0) == b"\x00second"
    assert ledger.claim("b", 60) == 0
    assert ledger.complete(0, _record(0))
    assert ledger.claim("b", 60) == 1
    assert ledger.save(1, "b", b"third")
    assert ledger.restore([_record(1)]) == 1
    assert client.exists(f"{{{prefix}}}:ledger:snapshots") == 0


def test_only_the_owner_saves_and_nobody_after_the_record(ledger: Ledger) -> None:
    assert not ledger.save(0, "a", b"nobody's")
    assert ledger.claim("slow", 0.02) == 0
    time.sleep(0.04)
    assert ledger.claim("quick", 60) == 0
    assert ledger.save(0, "quick", b"quick")
    assert not ledger.save(0, "slow", b"slow")
    assert ledger.snapshot(0) == b"quick"
    assert ledger.complete(0, _record(0, by="slow"))
    assert not ledger.save(0, "quick", b"late")
    assert ledger.snapshot(0) is None


def test_a_snapshot_above_the_limit_is_not_sent(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.replay.ledger.MAX_SNAPSHOT_BYTES", 5)
    assert ledger.claim("a", 60) == 0
    assert ledger.save(0, "a", b"small")
    assert not ledger.save(0, "a", b"larger")
    assert ledger.snapshot(0) == b"small"


def test_snapshots_of_withdrawn_episodes_go_with_them(ledger: Ledger) -> None:
    for episode, owner in enumerate("abc"):
        assert ledger.claim(owner, 60) == episode
        assert ledger.save(episode, owner, b"snapshot")
    assert ledger.release(1, "b")
    ledger.open("config-1", 1)
    assert [ledger.snapshot(episode) for episode in range(3)] == [b"snapshot", None, b"snapshot"]
    assert ledger.release(2, "c")  # withdrawn while it was played
    assert ledger.snapshot(2) is None


def test_a_stop_is_seen_by_all_until_it_is_cleared(ledger: Ledger, client: redis.Redis, prefix: str) -> None:
    other = Ledger(client, prefix)
    assert not other.stop_requested()
    ledger.request_stop()
    assert other.stop_requested()
    ledger.clear_stop()
    assert not other.stop_requested()


def test_the_newest_heartbeat_of_each_worker_is_kept(ledger: Ledger) -> None:
    ledger.beat("a", '{"n": 1}')
    ledger.beat("b", '{"n": 2}')
    ledger.beat("a", '{"n": 3}')
    assert ledger.beats() == {"a": '{"n": 3}', "b": '{"n": 2}'}


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"id": "0"}', '{"id": 1}', '{"id": true}'])
def test_a_record_that_is_not_this_episodes_is_an_error(ledger: Ledger, record: str) -> None:
    with pytest.raises(ValueError, match="record must"):
        ledger.complete(0, record)
    assert ledger.records() == []


def test_a_score_or_lease_that_is_no_number_is_an_error(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="score of slot '90' must be finite, got nan"):
        ledger.complete(0, _record(0), [Candidate("90", float("nan"), b"", "")])
    with pytest.raises(ValueError, match="lease_s must be finite and > 0, got 0"):
        ledger.claim("a", 0)


def test_a_repeated_call_whose_reply_was_lost_answers_as_the_first(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "same-call")
    assert [ledger.claim("a", 60), ledger.claim("a", 60)] == [0, 0]
    assert [ledger.complete(0, _record(0)), ledger.complete(0, _record(0))] == [True, True]
    assert ledger.records() == [_record(0)]


def test_many_owners_with_short_leases_record_every_episode_exactly_once(
    ledger: Ledger, redis_url: str, prefix: str
) -> None:
    ledger.open("config-1", 120)
    accepted: list[int] = []

    def play(number: int) -> None:
        with connect(redis_url) as client:
            mine = Ledger(client, prefix)
            while mine.remaining():
                episode = mine.claim(f"owner-{number}", 0.01)
                if episode is None:
                    time.sleep(0.005)
                    continue
                if (episode + number) % 3 == 0:
                    continue  # this owner "dies": the lease runs out
                if episode % 5 == 0:
                    time.sleep(0.02)  # the lease is lost, the work is finished all the same
                if mine.complete(episode, _record(episode)):
                    accepted.append(episode)

    threads = [threading.Thread(target=play, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(accepted) == list(range(120))
    assert sorted(json.loads(record)["id"] for record in ledger.records()) == list(range(120))
