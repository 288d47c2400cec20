"""A real Prometheus that scrapes a real campaign with the configuration that comes with the project."""

import contextlib
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from dashboards import PROMETHEUS, RULES

HAVE_PROMETHEUS = shutil.which("prometheus") is not None


@contextlib.contextmanager
def prometheus(discovery: Path, folder: Path) -> Iterator[str]:
    """Our configuration in a Prometheus of its own, that scrapes this campaign every second; the address of its pages.

    Args:
        discovery: Ray's list of nodes.
        folder: for its data and log.

    """
    config = yaml.safe_load(PROMETHEUS.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(discovery)]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [f"--config.file={path}", f"--web.listen-address={address}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["prometheus", *options], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait()


def asked(url: str, query: str) -> list[dict[str, Any]]:
    """The result of an instant query, empty while the server is not up; AssertionError where it does not parse."""
    try:
        with urllib.request.urlopen(
            f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}", timeout=10
        ) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return result
    except urllib.error.HTTPError as error:
        if error.code == 503:  # it is still starting
            return []
        raise AssertionError(f"{query}: {error.read().decode()}") from error
    except urllib.error.URLError:
        return []
