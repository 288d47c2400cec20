"""The doctor's look at a server: ours, one that is set up wrongly, one that is not there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from shared_server import free_port, program, serving

from deploy import redis_doctor
from deploy.check import GIB, Check
from deploy.redis_doctor import server_checks

Given = tuple[str, redis.Redis]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Given]:
    """A server of the bundled program with an append-only file, and a client of it."""
    port = free_port()
    url = f"redis://127.0.0.1:{port}"
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--appendonly", "yes", "--save", ""]
    with serving(program("bundled"), tmp_path, *arguments, url=url), redis.Redis(port=port) as client:
        yield url, client


def found(url: str) -> dict[str, Check]:
    return {check.name: check for check in server_checks(url)}


def test_a_server_that_is_set_up_well_is_well_and_nothing_is_left_on_it(server: Given) -> None:
    url, client = server
    checks = found(url)
    assert list(checks) == [
        "redis server", "redis eviction", "redis log", "redis memory", "redis way", "redis rights",
    ]  # fmt: skip
    assert [check for check in checks.values() if not check.ok or check.remedy] == []
    assert "Valkey" in checks["redis server"].detail
    assert client.dbsize() == 0


@pytest.mark.parametrize(
    ("setting", "value", "name", "remedy"),
    [
        ("maxmemory-policy", "allkeys-lru", "redis eviction", "CONFIG SET maxmemory-policy noeviction"),
        ("appendonly", "no", "redis log", "CONFIG SET appendonly yes"),
        ("maxmemory", "100mb", "redis memory", "CONFIG SET maxmemory"),
    ],
)
def test_one_wrong_setting_is_one_wrong_line_with_the_command_that_mends_it(
    server: Given, setting: str, value: str, name: str, remedy: str
) -> None:
    url, client = server
    client.config_set(setting, value)
    (wrong,) = [check for check in found(url).values() if not check.ok]
    assert wrong.name == name
    assert remedy in wrong.remedy


def test_a_user_who_may_not_write_our_keys_is_told(server: Given) -> None:
    url, client = server
    client.acl_setuser("reader", enabled=True, passwords=["+long"], keys=["other:*"], categories=["+@all"])
    checks = found(url.replace("redis://", "redis://reader:long@"))
    assert not checks["redis rights"].ok
    assert "users.acl" in checks["redis rights"].remedy
    assert "long" not in " ".join(check.detail for check in checks.values())


def test_the_user_that_we_recommend_is_enough(server: Given) -> None:
    url, client = server
    texts = (Path(__file__).parents[2] / "deploy" / "users.acl").read_text().splitlines()
    (line,) = [text for text in texts if text.startswith("user zeroout ")]
    client.execute_command("ACL", "SETUSER", *line.replace("#PASSWORD_SHA256", ">secret").split()[1:])
    checks = found(url.replace("redis://", "redis://zeroout:secret@"))
    assert [check for check in checks.values() if not check.ok] == []


@pytest.mark.parametrize(
    "url", ["redis://me:secret@127.0.0.1:1/0", "redis://127.0.0.1:1/0?username=me&password=secret"]
)
def test_a_server_that_does_not_answer_is_one_line_without_its_password(url: str) -> None:
    (check,) = server_checks(url)
    assert not check.ok
    assert "127.0.0.1:1/0" in check.detail
    assert "gave no answer" in check.detail
    assert "secret" not in check.detail + check.remedy


@pytest.mark.parametrize(
    ("url", "ok", "detail"),
    [
        ("redis://cache.example:6379", False, "without TLS"),
        ("rediss://cache.example:6379", False, "without a password"),
        ("rediss://me:secret@cache.example:6379", True, "TLS and a password"),
        ("unix:///run/redis.sock", True, "inside this machine"),
        ("redis://localhost:6379", True, "inside this machine"),
    ],
)
def test_over_a_network_tls_and_a_password_are_asked_for(url: str, ok: bool, detail: str) -> None:
    check = redis_doctor._way(url)
    assert (check.ok, bool(check.remedy)) == (ok, not ok)
    assert detail in check.detail
    assert "secret" not in check.detail


@pytest.mark.parametrize(
    ("info", "ok"),
    [
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, True),
        ({"redis_version": "6.2.14"}, True),
        ({"redis_version": "5.0.7"}, False),
        ({}, True),  # it does not tell
    ],
)
def test_a_server_that_is_too_old_is_wrong(info: dict[str, Any], ok: bool) -> None:
    assert redis_doctor._version("here", info).ok is ok


def test_what_a_server_does_not_tell_is_not_held_against_it() -> None:
    checks = [redis_doctor._eviction({}), redis_doctor._log({}), redis_doctor._memory({})]
    assert all(check.ok and "not told" in check.detail for check in checks)


def test_a_log_that_cannot_be_written_is_wrong() -> None:
    check = redis_doctor._log({"aof_enabled": 1, "aof_last_write_status": "err"})
    assert not check.ok
    assert "disk" in check.remedy


def test_memory_that_is_nearly_full_is_wrong() -> None:
    assert redis_doctor._memory({"used_memory": GIB, "maxmemory": 3 * GIB}).ok
    assert not redis_doctor._memory({"used_memory": 2 * GIB + 1, "maxmemory": 3 * GIB}).ok
    assert redis_doctor._memory({"used_memory": GIB, "maxmemory": 0, "total_system_memory": 8 * GIB}).ok
