"""A headless Chromium that opens a page as a reader does, at a width and in light or dark."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

#: Why no page can be opened here; empty where it can.
MISSING = ", ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)
HOW = f"{MISSING} not on PATH (Debian: apt-get install chromium chromium-driver)"


@dataclass(frozen=True, kw_only=True)
class Log:
    """What the console said and which requests failed; and the URLs of all requests, the page's own included."""

    complaints: list[str]
    requests: list[str]


@dataclass(frozen=True)
class Browser:
    """A browser with one page."""

    driver: webdriver.Chrome

    def open(self, url: str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a page into a window of this many CSS pixels; its messages begin anew."""
        self.size(width, height)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.log()
        self.driver.get(url)

    def size(self, width: int, height: int) -> None:
        """Make the window so large, at one pixel a CSS pixel."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def log(self) -> Log:
        """What happened since the page was opened, or since the last look."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        failed = [json.dumps(event["params"]) for event in events if event["method"] == "Network.loadingFailed"]
        asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        return Log(complaints=said + failed, requests=[params["request"]["url"] for params in asked])

    def evaluate(self, script: str) -> Any:
        """What a script returns in the page."""
        return self.driver.execute_script(script)

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return self.driver.get_screenshot_as_png()


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser of our own, with its profile in an empty folder, that keeps a log of console and network."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which does not work for root, as in a container
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
