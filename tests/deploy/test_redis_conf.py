"""deploy/redis.conf and deploy/users.acl in a real server: all that Zeroout does passes, and nothing else."""

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from redis.exceptions import NoPermissionError
from shared_server import certificates, free_port, program, serving

from deploy.redis_server import _command
from env.errors import UserError
from learner.replay.codec import encode
from learner.replay.connection import check_server, connect
from learner.replay.ledger import Candidate, Ledger
from learner.replay.replay import Item, ReplayConfig
from learner.replay.shards import open_replay
from learner.replay.weights import WeightStore

ROOT = Path(__file__).parents[2]
CONF, ACL = ROOT / "deploy/redis.conf", ROOT / "deploy/users.acl"
PASSWORD = "correct-horse"
PREFIX = "zeroout:0123456789abcdef"


def with_password(acl: str) -> str:
    return acl.replace("PASSWORD_SHA256", hashlib.sha256(PASSWORD.encode()).hexdigest())


def settings(text: str) -> dict[str, str]:
    lines = (line.strip() for line in text.splitlines())
    return {line.split()[0]: line.partition(" ")[2].strip() for line in lines if line and not line.startswith("#")}


@pytest.fixture(scope="module", params=["redis-server with TLS", "bundled without TLS"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that was started with the files as they ship; paths, port and password are the test's."""
    name, _, tls = request.param.partition(" ")
    server, folder, port = program(name), tmp_path_factory.mktemp("shared"), free_port()
    (folder / "users.acl").write_text(with_password(ACL.read_text()))
    text = (
        CONF.read_text().replace("/etc/redis/tls", str(folder)).replace("/etc/redis/users.acl", f"{folder}/users.acl")
    )
    if tls == "with TLS":
        if refuses_tls(server):
            pytest.skip(f"{server} was built without TLS")
        certificates(folder)
        text = text.replace("tls-port 6379", f"tls-port {port}")
        found = f"rediss://zeroout:{PASSWORD}@127.0.0.1:{port}/0?ssl_ca_certs={folder}/ca.crt"
    else:
        text = re.sub(r"(?m)^tls-.*\n", "", text).replace("port 0", f"port {port}")
        found = f"redis://zeroout:{PASSWORD}@127.0.0.1:{port}/0"
    (folder / "redis.conf").write_text(text)
    with serving(server, folder, "redis.conf", url=found):
        yield found


def refuses_tls(server: Path) -> bool:
    asked = subprocess.run([server, "--port", "0", "--tls-port", "x"], capture_output=True, text=True, check=False)
    return "Bad directive" in asked.stdout + asked.stderr


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    with connect(url) as connected:
        yield connected


def play_whole_replay(client: redis.Redis, prefix: str, *, shards: int) -> None:
    config = ReplayConfig(shards=shards, min_sequences=1)
    replay = open_replay([client], prefix, config, np.random.default_rng(0))
    items = [Item(f"s{i}", encode({"x": np.arange(5 + i)}), 1.0 + i) for i in range(20)]
    assert replay.insert(items) == 20
    sample = replay.sample(7)
    assert sample is not None
    assert replay.update(sample.keys, np.full(7, 2.0)) == 7
    assert replay.reject(sample.keys[:1]) == 1
    assert replay.stats().size == replay.info().stats.size == 19


def play_whole_ledger(client: redis.Redis, prefix: str) -> None:
    ledger = Ledger(client, prefix)
    ledger.open("config", 4)
    assert ledger.claim("me", 60.0) == 0
    assert ledger.renew(0, "me", 60.0)
    assert ledger.in_flight() == [(0, "me")]
    assert ledger.save(0, "me", b"snapshot")
    assert ledger.snapshot(0) == b"snapshot"
    assert ledger.complete(0, json.dumps({"id": 0}), [Candidate("0.9", 1.0, b"mask", "{}")])
    assert ledger.claim("me", 60.0) == 1
    assert ledger.release(1, "me")
    assert ledger.restore([json.dumps({"id": 2})]) == 1
    ledger.open("config", 3)
    assert (ledger.remaining(), len(ledger.records()), ledger.slots()) == (1, 2, ["0.9"])
    best = ledger.best("0.9")
    assert best is not None
    assert best.payload == b"mask"
    ledger.beat("me", "{}")
    assert ledger.beats() == {"me": "{}"}
    ledger.request_stop()
    assert ledger.stop_requested()
    ledger.clear_stop()


def play_whole_weights(client: redis.Redis, prefix: str) -> None:
    weights = WeightStore(client, prefix)
    assert weights.publish(1, b"first")
    assert weights.pull(-1) == (1, b"first")
    client.set(f"{{{prefix}}}:weights:newest", b"broken")
    assert weights.publish(1, b"again")  # what cannot be read is deleted


def mend(client: redis.Redis, prefix: str) -> None:
    """What lies there and is not ours is found out about, and mended."""
    replay = open_replay([client], prefix, ReplayConfig(min_sequences=1), np.random.default_rng(0))
    replay.insert([Item(f"s{i}", encode({"x": np.arange(3)}), 1.0) for i in range(5)])
    client.delete(f"{{{prefix}}}:replay:state")
    client.hset(f"{{{prefix}}}:replay:data", "9:stray", b"x")
    assert replay.sample(2) is not None
    client.set(f"{{{prefix}}}:replay:clock", 1)
    with pytest.raises(UserError, match="expected a value of type zset"):
        replay.sample(2)


def test_the_whole_replay_ledger_and_weights_pass_with_just_the_commands_of_the_list(
    url: str, client: redis.Redis
) -> None:
    before = calls(client)
    with connect(url) as user:
        check_server(user, url)
        play_whole_replay(user, PREFIX, shards=1)
        play_whole_replay(user, f"{PREFIX}:sharded", shards=2)
        play_whole_ledger(user, PREFIX)
        play_whole_weights(user, PREFIX)
        mend(user, f"{PREFIX}:mended")
    # Not among them is what redis-py tries at a connection and goes on without: CLIENT SETINFO, which a server before
    # Redis 7.2 does not know, and which could not stand in the file.
    sent = {name for name, count in calls(client).items() if count > before.get(name, 0)}
    assert allowed() == sent | in_scripts()


def calls(client: redis.Redis) -> dict[str, int]:
    """How often each command was carried out."""
    stats: Any = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): counts["calls"] for name, counts in stats.items()}


def allowed() -> set[str]:
    """The commands that users.acl grants."""
    return set(re.findall(r"\+([a-z|]+)", ACL.read_text()))


def in_scripts() -> set[str]:
    """The commands that our Lua files name."""
    scripts = "".join(path.read_text() for path in (ROOT / "learner/replay").glob("*.lua"))
    return {name.lower() for name in re.findall(r"(?:call|write)\('([A-Z]+)'", scripts)}


@pytest.mark.parametrize(
    "command",
    [
        "CONFIG GET requirepass", "CONFIG SET dir /tmp", "ACL LIST", "KEYS *", "SCAN 0", "FLUSHALL", "FLUSHDB",
        "SCRIPT FLUSH", "EVAL return 0", "MONITOR", "CLIENT LIST", "SHUTDOWN", "SUBSCRIBE x",
        "PUBLISH x y", "SLAVEOF 127.0.0.1 1", "MODULE LIST", "RENAME {zeroout:a}:b {zeroout:a}:c", "SAVE", "SELECT 1",
    ],
)  # fmt: skip
def test_a_command_outside_the_list_is_refused(client: redis.Redis, command: str) -> None:
    with pytest.raises(NoPermissionError):
        client.execute_command(*(["EVAL", "return 0", "0"] if command.startswith("EVAL") else command.split()))


@pytest.mark.parametrize("key", ["other", "zeroout:0123456789abcdef:x", "{zeroout}:x", "{other:1}:x"])
def test_a_key_outside_the_prefix_is_refused_also_within_a_script(client: redis.Redis, key: str) -> None:
    sha = client.script_load("return redis.call('GET', ARGV[1])")
    for command in (("GET", key), ("SET", key, "1"), ("EVALSHA", sha, "1", key, "{zeroout:a}:x")):
        with pytest.raises(NoPermissionError):
            client.execute_command(*command)
    with pytest.raises(redis.ResponseError, match=r"(?i)can't access|permission|ACL failure"):
        client.evalsha(sha, 0, key)


@pytest.mark.parametrize("who", ["zeroout:wrong@", ":correct-horse@", "default:correct-horse@", ""])
def test_nobody_else_gets_in(url: str, who: str) -> None:
    other = url.replace(f"zeroout:{PASSWORD}@", who)
    with connect(other) as client, pytest.raises(UserError, match="accepts the user and password") as caught:
        check_server(client, other)
    assert PASSWORD not in str(caught.value)


def test_the_users_file_without_a_password_in_it_starts_no_server(tmp_path: Path) -> None:
    started = subprocess.run(
        [program("bundled"), "--port", "0", "--unixsocket", "s", "--aclfile", ACL],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert started.returncode != 0
    assert "hexadecimal" in started.stdout


def test_the_log_of_writes_is_the_embedded_servers_but_for_who_syncs_it() -> None:
    words = _command(Path("server"), Path("socket"))[1:]
    embedded = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    shared = settings(CONF.read_text())
    for name in ("appendonly", "save", "maxmemory-policy", "rdbcompression", "auto-aof-rewrite-min-size"):
        assert shared[name].strip('"') == embedded[name]
    assert (embedded["appendfsync"], shared["appendfsync"]) == ("no", "everysec")


def test_it_listens_on_loopback_and_encrypted_only() -> None:
    shared = settings(CONF.read_text())
    assert (shared["bind"], shared["port"], shared["protected-mode"]) == ("127.0.0.1", "0", "yes")
    assert int(shared["tls-port"]) > 0
