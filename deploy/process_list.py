"""A password given with --redis is taken out of the process list, and so out of Ray's list of jobs. Called by `cli.py`.

Every user of a machine may read the arguments of its processes, and Ray keeps the driver's for its dashboard. The
environment can be read by the same user (and root) only.
"""

import os
import sys
from collections.abc import Sequence

__all__ = ["REDIS_VARIABLE", "hide_password", "without_password"]

REDIS_VARIABLE = "ZEROOUT_REDIS_URL"
_OPTION = "--redis"


def hide_password() -> None:
    """Start this program anew in its own place, with a --redis URL that holds a password moved to the environment.

    Returns where there is none. While Python starts the password can be seen: $ZEROOUT_REDIS_URL never shows it.
    """
    arguments, url = without_password(sys.orig_argv[1:])
    if url is not None:
        os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, REDIS_VARIABLE: url})


def without_password(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the arguments without `--redis URL` (or `--redis=URL`) where it holds a password, and that URL or None.

    Of several the last one counts, as for the command line itself.
    """
    others: list[str] = []
    plain: list[str] = []
    hidden = None
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option != _OPTION:
            others.append(word)
            continue
        url = value if equals else next(words, "")
        if _holds_password(url):
            plain, hidden = [], url
        else:
            plain = [word] if equals else [word, url]
    return [*others, *plain], hidden


def _holds_password(url: str) -> bool:
    from learner.replay.connection import redact  # 0.2 s, which a command without --redis need not wait

    return redact(url) != url
