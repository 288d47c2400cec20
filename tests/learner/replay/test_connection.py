import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import BusyLoadingError, NoPermissionError, OutOfMemoryError

from deploy.redis_server import EmbeddedServer
from env.errors import UserError
from learner.replay.connection import Command, check_server, connect, namespace, redact, retrying, streamed

_URL = "redis://me:secret@host:1/0"


@pytest.fixture(scope="module")
def own_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose settings these tests may change."""
    with EmbeddedServer(tmp_path_factory.mktemp("own")) as server:
        yield server.url


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:secret@host", "redis://:***@host"),
        ("rediss://me:se@c:re/t@host:1/2?x=1", "rediss://me:***@host:1/2?x=1"),
        ("unix:///tmp/a.sock?db=1&password=secret&x=1", "unix:///tmp/a.sock?db=1&password=***&x=1"),
        ("rediss://host?ssl_password=secret", "rediss://host?ssl_password=***"),
        ("redis://secret@host:1", "redis://***@host:1"),
        ("me:secret@host:1", "me:***@host:1"),
        ("secret@host", "***@host"),
        ("Error 111 connecting to host:6379.", "Error 111 connecting to host:6379."),
    ],
)
def test_a_password_is_redacted_wherever_it_stands(url: str, safe: str) -> None:
    assert redact(url) == safe


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret@host",
        "redis://me:secret/x@host:1",
        "redis://me:secret#x@host:1",
        "me:secret@host",
        "redis://[x",
    ],
)
def test_a_url_that_is_none_is_the_users_mistake(url: str) -> None:
    with pytest.raises(UserError, match="redis://, rediss:// or unix://") as caught:
        connect(url)
    assert "secret" not in str(caught.value)


def test_a_healthy_server_passes_the_check(client: redis.Redis, redis_url: str) -> None:
    check_server(client, redis_url)


def test_no_server_is_one_clear_line(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/none.sock?password=secret"
    with connect(url) as client, pytest.raises(UserError, match="expected a server that answers") as caught:
        check_server(client, url)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_an_evicting_policy_is_refused_also_without_maxmemory(own_url: str, policy: str) -> None:
    with connect(own_url) as client:
        client.config_set("maxmemory-policy", policy)
        with pytest.raises(UserError, match=f"expected maxmemory-policy noeviction, got {policy}"):
            check_server(client, own_url)
        client.config_set("maxmemory-policy", "noeviction")
        check_server(client, own_url)


def test_a_wrong_or_missing_password_is_refused_at_once(own_url: str) -> None:
    with connect(own_url) as owner:
        owner.config_set("requirepass", "right")
        try:
            for url in (f"{own_url}?password=wrong", own_url):
                start = time.monotonic()
                with (
                    connect(url, patience_s=60.0) as client,
                    pytest.raises(UserError, match="accepts the user and password") as e,
                ):
                    check_server(client, url)
                assert time.monotonic() - start < 3.0
                assert "password=wrong" not in str(e.value)
            with connect(f"{own_url}?password=right") as client:
                check_server(client, own_url)
        finally:
            owner.config_set("requirepass", "")


def test_a_user_who_may_not_read_the_policy_is_trusted_with_a_warning(
    own_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(own_url) as owner:
        owner.execute_command("ACL", "SETUSER", "actor", "on", ">pw", "~{p}*", "-@all", "+@write", "+ping")
    url = f"{own_url}?username=actor&password=pw"
    with connect(url) as client, caplog.at_level(logging.WARNING):
        check_server(client, url)
        with pytest.raises(NoPermissionError):
            client.config_get("maxmemory-policy")
    assert "must be noeviction" in caplog.text


def test_a_server_busy_with_a_long_script_is_waited_for(own_url: str) -> None:
    def keep_busy() -> None:
        with connect(own_url) as other:
            other.eval("local n = 0 while n < 1e8 do n = n + 1 end", 0)

    with connect(own_url, patience_s=20.0) as client:
        client.config_set("lua-time-limit", 1)
        thread = threading.Thread(target=keep_busy)
        thread.start()
        with redis.Redis.from_url(own_url, retry=None) as impatient, pytest.raises(redis.ResponseError, match="BUSY"):  # noqa: PT012
            while thread.is_alive():
                impatient.ping()
        assert retrying(lambda: client.set("x", 1), 20.0, url=own_url)
        thread.join()


@pytest.mark.parametrize(
    "error", [redis.ConnectionError("x"), redis.TimeoutError("x"), BusyLoadingError("x"), OutOfMemoryError("x")]
)
def test_a_passing_outage_is_sat_out(error: Exception) -> None:
    outcomes: list[Exception | int] = [error, error, 7]

    def call() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert retrying(call, 5.0, url=_URL) == 7


def test_after_the_deadline_the_user_is_told_without_the_password() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise redis.ConnectionError("Connection refused\n")

    with pytest.raises(UserError, match=r"redis://me:\*\*\*@host:1/0: .* got Connection refused") as caught:
        retrying(call, 0.3, url=_URL)
    assert len(calls) >= 3
    assert "secret" not in str(caught.value)


def test_no_time_is_lost_on_what_waiting_does_not_mend() -> None:
    calls = []

    def call(error: Exception) -> None:
        calls.append(error)
        raise error

    with pytest.raises(UserError, match="accepts the user and password"):
        retrying(lambda: call(redis.AuthenticationError("WRONGPASS")), 60.0, url=_URL)
    with pytest.raises(redis.ResponseError):
        retrying(lambda: call(redis.ResponseError("ERR")), 60.0, url=_URL)
    assert len(calls) == 2


def test_a_prefix_becomes_one_hash_tag() -> None:
    assert namespace("run-1") == "{run-1}"
    for wrong in ("", "a{b", "a b"):
        with pytest.raises(UserError, match="a name without braces or blanks"):
            namespace(wrong)


def _again(command: Command) -> str:
    return f"again {command[1].decode() if isinstance(command[1], bytes) else command[1]}"


def test_streamed_commands_go_ahead_and_are_answered_in_order(client: redis.Redis) -> None:
    made: list[int] = []

    def commands() -> Iterator[Command]:
        for number in range(7):
            made.append(number)
            yield "ECHO", number

    ahead = [(answer, len(made)) for answer in streamed(client, commands(), lambda _: pytest.fail("no error"), ahead=3)]
    assert ahead == [(b"%d" % number, min(number + 3, 7)) for number in range(7)]


def test_a_stream_of_nothing_is_empty(client: redis.Redis) -> None:
    assert list(streamed(client, [], _again, ahead=3)) == []


def test_from_the_first_error_on_every_command_is_asked_for_again(client: redis.Redis) -> None:
    commands = [("ECHO", 0), ("NOSUCH", 1), ("ECHO", 2), ("ECHO", 3), ("ECHO", 4)]
    answers = list(streamed(client, commands, _again, ahead=2))
    assert answers == [b"0", "again 1", "again 2", "again 3", "again 4"]
    assert client.echo("sound") == b"sound"


def test_a_stream_whose_connection_is_lost_goes_on_by_asking_again(client: redis.Redis, redis_url: str) -> None:
    def commands() -> Iterator[Command]:
        for number in range(6):
            if number == 4:
                with connect(redis_url) as other:
                    mine = [int(one["id"]) for one in other.client_list() if one["name"] == "streaming"]
                    other.client_kill_filter(_id=str(mine[0]))
            yield ("CLIENT", "SETNAME", "streaming") if number == 0 else ("ECHO", number)

    answers = list(streamed(client, commands(), _again, ahead=1))
    assert answers == [b"OK", b"1", b"2", b"3", "again 4", "again 5"]


def test_a_stream_that_finds_no_server_asks_again_for_everything(tmp_path: Path) -> None:
    with connect(f"unix://{tmp_path}/none.sock", patience_s=0.0) as client:
        assert list(streamed(client, [("ECHO", 0), ("ECHO", 1)], _again, ahead=2)) == ["again 0", "again 1"]


def test_answers_of_a_stream_that_is_given_up_reach_nobody_else(client: redis.Redis) -> None:
    answers = streamed(client, (("ECHO", number) for number in range(9)), _again, ahead=4)
    assert next(answers) == b"0"
    answers.close()
    assert client.echo("mine") == b"mine"
