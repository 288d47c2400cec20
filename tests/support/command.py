"""`zeroout` as a user types it, in the test's own process."""

import pytest

from deploy import cli

__all__ = ["zeroout"]


def zeroout(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command; its exit code."""
    monkeypatch.setattr("sys.argv", ["zeroout", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)
