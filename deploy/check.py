"""A line of `zeroout doctor`; imports nothing, so that it can be made where much is broken."""

from dataclasses import dataclass

__all__ = ["GIB", "Check"]

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was looked at, and how it is."""

    name: str
    ok: bool
    detail: str  # what was found
    remedy: str = ""  # the command, or the act, that mends it; empty when ok
