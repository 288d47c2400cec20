"""A password given with --redis leaves the arguments of the process."""

import pytest

from deploy.process_list import without_password

SECRET = "redis://me:secret@host:6379/0"


@pytest.mark.parametrize(
    ("given", "left", "hidden"),
    [
        (
            ["-m", "deploy.cli", "run", "--redis", SECRET, "--out", "x"],
            ["-m", "deploy.cli", "run", "--out", "x"],
            SECRET,
        ),
        (["zeroout", "resume", f"--redis={SECRET}", "x"], ["zeroout", "resume", "x"], SECRET),
        (["run", "--redis", "unix:///s?password=secret"], ["run"], "unix:///s?password=secret"),
        (["run", "--redis", "redis://host", "--out", "x"], ["run", "--out", "x", "--redis", "redis://host"], None),
        (["run", "--redis=redis://host"], ["run", "--redis=redis://host"], None),
        (["run", "--redis", "redis://host", "--redis", SECRET], ["run"], SECRET),
        (["run", "--redis", SECRET, "--redis", "redis://host"], ["run", "--redis", "redis://host"], SECRET),
        (["run", "--redis"], ["run", "--redis", ""], None),
        (["run", "--set", "a=redis://me:x@h"], ["run", "--set", "a=redis://me:x@h"], None),
    ],
)
def test_a_url_with_a_password_is_taken_out_and_every_other_word_stays(
    given: list[str], left: list[str], hidden: str | None
) -> None:
    assert without_password(given) == (left, hidden)
