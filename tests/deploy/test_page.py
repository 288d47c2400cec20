"""The page's pieces are HTML that is escaped and reachable without a mouse."""

from deploy.page import disclosure, page, picture, strip, table


def test_a_table_scrolls_by_keyboard_and_has_a_name() -> None:
    html = table("A & B", ("x",), [["<1>"]])
    assert '<div class=wide role=region tabindex=0 aria-label="A &amp; B">' in html
    assert "<th scope=col>x</th>" in html
    assert "<td>&lt;1&gt;</td>" in html


def test_a_picture_offers_the_form_that_fits() -> None:
    images = {(dark, narrow): bytes([dark, narrow]) for dark in (False, True) for narrow in (False, True)}
    html = picture("what it shows", images)
    assert html.index("prefers-color-scheme: dark) and (max-width: 40rem") < html.index('media="(max-width: 40rem)"')
    for data in ("AAA=", "AAE=", "AQA=", "AQE="):
        assert html.count(f"data:image/png;base64,{data}") == 1
    assert 'src="data:image/png;base64,AAA=" alt="what it shows"' in html


def test_a_strip_says_in_words_what_it_shows() -> None:
    html = strip([1, 2, 4], 3, 5)
    assert 'aria-label="3 of 5 kept" viewBox="0 0 5 1"' in html
    assert 'd="M1 0h2v1h-2zM4 0h1v1h-1z"' in html
    assert 'd=""' in strip([], 0, 5)


def test_a_disclosure_is_open_when_told() -> None:
    assert disclosure("s", "<p>", is_open=True) == "<details open><summary>s</summary><p></details>"
    assert disclosure("<", "", is_open=False) == "<details><summary>&lt;</summary></details>"


def test_a_page_may_load_nothing() -> None:
    html = page("t & u", ["<p>body</p>"])
    assert "default-src 'none'" in html
    assert "<title>t &amp; u · Zeroout</title>" in html
    assert html.count("<p>body</p>") == 1
