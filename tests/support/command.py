"""What the fixture `zeroout` gives (tests/deploy/conftest.py): the command in the test's own process."""

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Ended", "Zeroout"]


class Ended(NamedTuple):
    """How the command ended, and what it wrote."""

    code: int
    error: str
    output: str


Zeroout = Callable[..., Ended]  # of the words behind `zeroout`
