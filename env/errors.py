"""The errors a user can meet, one line each.

ZerooutError
├── UserError        the user's mistake: the command line prints it and exits with 2
└── NonFiniteError   a loss or gradient that is NaN or infinite; the last good state is kept
"""

import re

__all__ = ["NonFiniteError", "UserError", "ZerooutError", "first_line"]


class ZerooutError(Exception):
    """Anything that Zeroout raises on purpose."""


class UserError(ZerooutError):
    """A mistake in what the user gave: names the thing, what was expected, what was got and the remedy."""

    def __init__(self, what: str, *, expected: str, got: str, remedy: str) -> None:
        super().__init__(what, expected, got, remedy)
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, got {self.got}; {self.remedy}"

    def __reduce__(self) -> tuple[object, tuple[str, str, str, str]]:
        return _rebuild_user_error, (self.what, self.expected, self.got, self.remedy)


def _rebuild_user_error(what: str, expected: str, got: str, remedy: str) -> UserError:
    return UserError(what, expected=expected, got=got, remedy=remedy)


class NonFiniteError(ZerooutError):
    """A loss or gradient became NaN or infinite."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in a line and without colours; empty where it says nothing."""
    return (re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [""])[0].strip()
