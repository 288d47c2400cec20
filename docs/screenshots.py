"""Makes the pictures in this folder again, from a campaign that it runs: `make screenshots`, some minutes.

It needs chromium, chromedriver and prometheus on PATH, the last with its web pages (Debian's packages chromium,
chromium-driver and prometheus). Everything runs in a temporary folder, so that no picture shows a path.
"""

import io
import os
import re
import tempfile
from pathlib import Path
from urllib.parse import urlencode

from browser import Browser, chromium
from PIL import Image
from prometheus_server import asked, prometheus
from rich.console import Console
from selenium.webdriver.support.ui import WebDriverWait
from tiny_campaign import environment, episodes, started, wait_until

from deploy.status import read_status, render_status

DOCS = Path(__file__).parent
OUT = Path("runs/demo")  # as in README
# The demonstration, with two groups to compare the Controller with.
CAMPAIGN = ("--set", 'search.controls=["taylor", "random"]')
EPISODES = 3 * 48
QUERY = "sum by (actor) (rate(ray_zeroout_env_steps_total[1m]))"
LIMIT_S = 3600.0


def main() -> None:
    """Run the campaign, and photograph it on its way and at its end."""
    with tempfile.TemporaryDirectory(prefix="zo-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.chdir(folder)
        with chromium(folder / "profile") as browser:
            campaign(folder, browser)
            report(browser)


def campaign(folder: Path, browser: Browser) -> None:
    """Run a campaign to its end; on the way its status, and its throughput in Prometheus."""
    around = environment() | {"RAY_TMPDIR": str(folder)}
    discovery = folder / "ray" / "prom_metrics_service_discovery.json"
    with started(around, folder / "log", "run", "--out", folder / OUT, *CAMPAIGN) as driver:

        def played(share: float) -> bool:
            assert driver.poll() is None, (folder / "log").read_text()
            return len(episodes(folder / OUT)) >= share * EPISODES

        (folder / "prometheus").mkdir()
        with prometheus(discovery, folder / "prometheus") as url:
            wait_until(lambda: played(0.6), "most episodes are played", LIMIT_S)
            status(folder, browser)
            wait_until(lambda: played(0.9), "nearly all episodes are played", LIMIT_S)
            throughput(url, browser)
        assert driver.wait(LIMIT_S) == 0, (folder / "log").read_text()


def status(folder: Path, browser: Browser) -> None:
    """What `zeroout status --watch` shows, as rich draws a terminal."""
    console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True)
    render_status(read_status(OUT), console)
    page = folder / "status.svg"
    svg = console.export_svg(title=f"zeroout status {OUT} --watch")
    page.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))  # fonts of another server
    browser.open(page.as_uri(), width=1000)
    size = browser.evaluate(
        "return document.documentElement.getAttribute('viewBox').split(' ').slice(2).map(Math.ceil)"
    )
    browser.size(*size)
    save("status", browser)


def throughput(url: str, browser: Browser) -> None:
    """Steps a second of each actor, on Prometheus's own page."""
    assert asked(url, QUERY)
    query = {"g0.expr": QUERY, "g0.tab": 0, "g0.range_input": "5m"}
    browser.open(f"{url}/graph?{urlencode(query)}", width=1120, height=870)
    drawn = "return document.querySelectorAll('svg path').length >= 2"
    WebDriverWait(browser.driver, 60).until(lambda _: browser.evaluate(drawn))
    save("prometheus", browser)


def report(browser: Browser) -> None:
    """The report: on a desk in light and in dark, and on a phone."""
    for name, width, dark, heading in (
        ("report-light", 1120, False, "Result"),
        ("report-dark", 1120, True, "Accuracy against compression"),
        ("report-phone", 360, False, "Accuracy against compression"),
    ):
        browser.open((OUT / "report.html").absolute().as_uri(), width=width, height=1200, dark=dark)
        place = f"[...document.querySelectorAll('h2')].find(part => part.innerText === '{heading}')"
        browser.evaluate(f"window.scrollTo(0, {place}.offsetTop - 16)" if heading != "Result" else "")
        save(name, browser)


def save(name: str, browser: Browser) -> None:
    """Keep what the browser shows, in 256 colours: a third of the bytes."""
    with Image.open(io.BytesIO(browser.screenshot())) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(DOCS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
