"""The report and a comparison as readers see them: in a real browser, on a desk, on a phone, in light and dark."""

import base64
import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import HOW, MISSING, Browser, chromium
from PIL import Image

from deploy.compare_page import write_page
from deploy.compare_table import compared
from deploy.finished import read_campaigns
from deploy.folder import CampaignFolder, read_json, versions, write_json
from deploy.report import write_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=HOW)]

DESK, PHONE = 1100, 360  # CSS pixels
LOOKS = [(DESK, False), (DESK, True), (PHONE, False), (PHONE, True)]
READABLE = 4.5  # WCAG 2.1, success criterion 1.4.3

TABLES = """
return [...document.querySelectorAll('table')].map(
  table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText.trim())));
"""
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth;"
# WCAG's contrast of each element that holds text, against the nearest background that is not transparent
CONTRASTS = """
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const linear = c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const paper = element => {
  const colour = numbers(getComputedStyle(element).backgroundColor);
  return colour.length === 3 || colour[3] > 0 ? colour : paper(element.parentElement);
};
const said = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
return [...document.body.querySelectorAll('*')].filter(said).map(element => {
  const [low, high] = [numbers(getComputedStyle(element).color), paper(element)].map(luminance).sort((a, b) => a - b);
  return [element.innerText.slice(0, 40), (high + 0.05) / (low + 0.05)];
});
"""


@pytest.fixture(scope="module")
def report(
    exported_once: tuple[CampaignFolder, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """The report's URL, and result.json: of a campaign with everything that a report shows, and with long names."""
    folder = tmp_path_factory.mktemp("browsed") / ("a-campaign-with-a-name-that-no-phone-has-a-line-for" * 2)
    campaign = CampaignFolder(Path(shutil.copytree(exported_once[0].path, folder)))
    rng = random.Random(0)
    campaign.append_episode([episode(id, rng) for id in range(12)])
    write_json(campaign.versions_json, versions())
    result = read_json(campaign.result_json)
    write_json(
        campaign.result_json, {**result, "comparison": result["points"], "episodes": 12, "seconds": 90, "seed": 1}
    )
    return write_report(campaign).as_uri(), read_json(campaign.result_json)


def episode(id: int, rng: random.Random) -> dict[str, Any]:
    group = ("search", "taylor", "a-group-with-a-long-name-of-its-own")[id % 3]
    targets = [
        {"target": t, "compression": t, "accuracy": 0.8 - t / 5, "cross_entropy": rng.random(), "keep_bits": "AA=="}
        for t in (0.5, 0.8)
    ]
    return {
        "id": id, "group": group, "actor": f"actor-{id % 2}", "policy": "gamma" if id == 0 else group, "seed": id,
        "steps": 4, "seconds": 2.0 + rng.random(), "return": -rng.random(), "phases": {"retrain": 1.5, "score": 0.5},
        "curve": [[0.0, 0.8], [0.5, 0.7], [0.8, 0.6]], "targets": targets,
    }  # fmt: skip


@pytest.fixture(scope="module")
def comparison(report: tuple[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a page with that campaign, another seed of it and one that does not compare."""
    first = Path(report[0].removeprefix("file://")).parent
    folders = [first, *(shutil.copytree(first, tmp_path_factory.mktemp("compared") / f"{n}{first.name}") for n in "ab")]
    for seed, folder in enumerate(folders):
        write_json(folder / "result.json", {**report[1], "seed": seed, "episodes": 12 + seed // 2})
    (folders[2] / "campaign.toml").write_text("[data]\nsource = 'folder'\npath = '/somewhere/else'\n")
    page = tmp_path_factory.mktemp("page") / "comparison.html"
    write_page(page, compared(*read_campaigns({str(path): CampaignFolder(path) for path in folders})))
    return page.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_it_opens_without_a_complaint_and_asks_for_nothing_else(
    browser: Browser, report: tuple[str, dict[str, Any]], width: int, dark: bool
) -> None:
    browser.open(report[0], width=width, dark=dark)
    log = browser.log()
    assert log.complaints == []
    assert report[0] in log.requests
    assert [url for url in log.requests if url != report[0] and not url.startswith("data:")] == []


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_it_fits_the_window_and_every_picture_is_the_one_for_it(
    browser: Browser, report: tuple[str, dict[str, Any]], width: int, dark: bool
) -> None:
    browser.open(report[0], width=width, dark=dark)
    # but for a scroll bar; and not wider, as a phone lays out what says nothing of its viewport
    assert width - 30 < browser.evaluate("return document.documentElement.clientWidth") <= width
    assert browser.evaluate(OVERFLOW) <= 0
    for script in ("naturalHeight > image.naturalWidth", "alt.length > 10", "complete"):
        found = browser.evaluate(f"return [...document.images].map(image => image.{script})")
        assert found == [width == PHONE or "naturalHeight" not in script] * 3, script
    sources = browser.evaluate("return [...document.images].map(image => image.currentSrc)")
    means = [np.asarray(Image.open(io.BytesIO(decoded(source))).convert("L")).mean() for source in sources]
    assert all(mean < 80 if dark else mean > 200 for mean in means)


def decoded(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def test_the_numbers_are_those_of_result_json(browser: Browser, report: tuple[str, dict[str, Any]]) -> None:
    url, result = report
    browser.open(url, width=PHONE)
    header, baseline, *rows = browser.evaluate(TABLES)[0]
    places = {name: header.index(name) for name in ("parameters", "MACs", "validation", "test")}

    def numbers(row: list[str]) -> dict[str, float]:
        return {name: float(row[place].replace(",", "").rstrip(" %")) for name, place in places.items()}

    assert len(rows) == len(result["points"]) == 2
    for row, known in zip([baseline, *rows], [result["baseline"], *result["points"]], strict=True):
        assert numbers(row) == {
            "parameters": known["parameters"],
            "MACs": known["macs"],
            "validation": pytest.approx(100 * known["val_accuracy"], abs=0.005),
            "test": pytest.approx(100 * known["test_accuracy"], abs=0.005),
        }


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out_from_its_background(
    browser: Browser, report: tuple[str, dict[str, Any]], dark: bool
) -> None:
    browser.open(report[0], width=DESK, dark=dark)
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [(text, ratio) for text, ratio in contrasts if ratio < READABLE] == []


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_a_screenshot_shows_something_on_the_right_paper(
    browser: Browser, report: tuple[str, dict[str, Any]], width: int, dark: bool
) -> None:
    browser.open(report[0], width=width, dark=dark)
    shot = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
    paper = (21, 24, 29) if dark else (255, 255, 255)
    on_paper = (shot == paper).all(axis=2).mean()
    assert shot.shape[1] == width
    assert 0.5 < on_paper < 0.99
    assert len(np.unique(shot.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_a_comparison_is_as_readable(browser: Browser, comparison: str, width: int, dark: bool) -> None:
    browser.open(comparison, width=width, dark=dark)
    log = browser.log()
    assert log.complaints == []
    assert [url for url in log.requests if url != comparison and not url.startswith("data:")] == []
    assert browser.evaluate(OVERFLOW) <= 0
    assert len(browser.evaluate(TABLES)) == 3
    assert [(text, ratio) for text, ratio in browser.evaluate(CONTRASTS) if ratio < READABLE] == []
    (source,) = browser.evaluate("return [...document.images].map(image => image.currentSrc)")
    picture = Image.open(io.BytesIO(decoded(source))).convert("L")
    assert (picture.height > picture.width) == (width == PHONE)
    assert np.asarray(picture).mean() < 80 if dark else np.asarray(picture).mean() > 200


def test_what_does_not_fit_scrolls_within_itself(browser: Browser, report: tuple[str, dict[str, Any]]) -> None:
    browser.open(report[0], width=PHONE)
    wide = browser.evaluate(
        "return [...document.querySelectorAll('.wide')].map(part => [part.scrollWidth > part.clientWidth,"
        " getComputedStyle(part).overflowX, part.tabIndex, part.getAttribute('aria-label').length > 0])"
    )
    assert [True, "auto", 0, True] in wide
    assert {tuple(part[1:]) for part in wide} == {("auto", 0, True)}


def test_a_page_that_is_wrong_would_be_found(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        "<meta name=viewport content='width=device-width'><body style='background: white'><img src='missing.png'>"
        "<p style='width: 900px; color: #ccc'>faint</p><script>nowhere()</script>"
    )
    browser.open(page.as_uri(), width=PHONE)
    log = browser.log()
    assert any("nowhere is not defined" in complaint for complaint in log.complaints)
    assert any("ERR_FILE_NOT_FOUND" in complaint for complaint in log.complaints)
    assert any(url.endswith("missing.png") for url in log.requests)
    assert browser.evaluate(OVERFLOW) > 0
    assert [text for text, ratio in browser.evaluate(CONTRASTS) if ratio < READABLE] == ["faint"]
