import pickle

import pytest

from env.errors import NonFiniteError, UserError, ZerooutError, first_line


def an_error() -> UserError:
    return UserError("episode.targets", expected="at most 0.9", got="0.95", remedy="lower it")


def test_a_user_error_is_one_line_that_names_the_thing_both_values_and_the_remedy() -> None:
    assert str(an_error()) == "episode.targets: expected at most 0.9, got 0.95; lower it"


def test_a_user_error_survives_a_pickle() -> None:
    back = pickle.loads(pickle.dumps(an_error()))
    assert type(back) is UserError
    assert str(back) == str(an_error())
    assert (back.what, back.expected, back.got, back.remedy) == ("episode.targets", "at most 0.9", "0.95", "lower it")


def test_a_non_finite_error_survives_a_pickle() -> None:
    back = pickle.loads(pickle.dumps(NonFiniteError("loss is NaN")))
    assert type(back) is NonFiniteError
    assert str(back) == "loss is NaN"


@pytest.mark.parametrize("error", [an_error(), NonFiniteError("loss")])
def test_every_error_of_ours_is_caught_as_one(error: Exception) -> None:
    with pytest.raises(ZerooutError):
        raise error


@pytest.mark.parametrize(
    ("said", "line"),
    [("one\ntwo", "one"), ("", ""), ("\n  late\n", "late"), ("\x1b[1mbold\x1b[0m word", "bold word")],
)
def test_of_what_others_say_the_first_line_is_told_without_colours(said: str, line: str) -> None:
    assert first_line(ValueError(said)) == line
