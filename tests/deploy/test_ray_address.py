"""An address is looked at before Ray tries it for minutes."""

import io
import socket

import pytest
from ray._private import services
from rich.console import Console

from deploy import doctor
from deploy.ray_address import check_ray_address
from env.errors import UserError


@pytest.mark.parametrize("address", ["", "local"])
def test_a_ray_of_one_s_own_needs_no_answer(address: str) -> None:
    check_ray_address(address)


def test_auto_is_where_ray_finds_a_cluster_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(services, "canonicalize_bootstrap_address_or_die", lambda asked: found)
        check_ray_address("auto")
    with pytest.raises(UserError, match=r"--ray-address auto: .*no answer"):
        check_ray_address("auto")  # what a cluster that was killed leaves


def test_auto_without_a_cluster_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(asked: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(services, "canonicalize_bootstrap_address_or_die", none)
    with pytest.raises(UserError, match=r"--ray-address auto: .*got Could not find any running Ray instance\.;"):
        check_ray_address("auto")


def test_an_address_that_answers_is_fine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_ray_address(f"127.0.0.1:{port}")
        check_ray_address(f"ray://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("address", "got"),
    [("127.0.0.1:1", "no answer"), ("127.0.0.1", "no HOST:PORT"), (":6379", "no HOST:PORT"), ("a:b", "no HOST:PORT"),
     ("127.0.0.1:99999999", "no answer")],
)  # fmt: skip
def test_one_that_does_not_is_one_line_with_what_mends_it(address: str, got: str) -> None:
    with pytest.raises(UserError, match=got) as caught:
        check_ray_address(address)
    assert "ray start --head" in str(caught.value)


def test_the_doctor_has_a_line_for_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_checks", lambda *_: iter([("cluster", lambda: doctor._cluster("127.0.0.1:1", None, "."))])
    )
    screen = io.StringIO()
    assert doctor.run_doctor(Console(file=screen, width=200), ray_address="127.0.0.1:1") == 2
    assert screen.getvalue().startswith("wrong cluster: --ray-address 127.0.0.1:1: expected HOST:PORT")
