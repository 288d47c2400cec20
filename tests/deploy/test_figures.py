"""Numbers read as a report's readers expect; what is not known is left empty."""

from deploy.figures import change, count, fixed, percent, spread


def test_numbers_are_written_for_readers() -> None:
    assert percent(0.90042) == "90.04 %"
    assert percent(0.9, 0) == "90 %"
    assert (change(0.9, 0.93), change(0.95, 0.93)) == ("-3.00", "+2.00")
    assert count(1234567) == "1,234,567"
    assert fixed(1.23456) == "1.235"
    assert spread("1.2", "0.1") == "1.2 ± 0.1"


def test_what_is_not_known_is_empty() -> None:
    assert [percent(None), change(None, 0.9), change(0.9, None), count(None), fixed(None)] == [""] * 5
    assert spread("1.2", "") == "1.2"
    assert spread("", "") == ""
