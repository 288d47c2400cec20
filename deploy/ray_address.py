"""Where a Ray cluster is: looked at before Ray is, which tries an address that nobody answers for minutes."""

import socket

from ray._private import services

from env.errors import UserError, first_line

__all__ = ["check_ray_address", "no_cluster"]

_ANSWER_S = 5.0


def check_ray_address(address: str) -> None:
    """UserError unless a cluster answers at HOST:PORT, or where `auto` finds one; "" and "local" start their own."""
    if address in ("", "local"):
        return
    asked = address
    if asked == "auto":
        try:
            address = services.canonicalize_bootstrap_address_or_die("auto")  # what ray.init would take
        except ConnectionError as error:
            raise no_cluster(asked, first_line(error)) from error
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise no_cluster(asked, "no HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise no_cluster(asked, f"no answer ({error})") from error


def no_cluster(address: str, got: str) -> UserError:
    """What to say where there is none."""
    return UserError(
        f"--ray-address {address}",
        expected="HOST:PORT of a Ray cluster that runs, or auto on a node of one",
        got=got,
        remedy="ray start --head there, or correct the address",
    )
