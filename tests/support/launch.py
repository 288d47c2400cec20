"""What tests of launch files and documents share: their text, and our command line as a parser that runs nothing."""

import shlex
from pathlib import Path
from typing import Any

import click
import typer
import yaml

from deploy import cli
from deploy.config import CampaignConfig, load

__all__ = ["IMAGE_ROOT", "ROOT", "campaign_of", "parse_command", "read_yaml"]

ROOT = Path(__file__).parents[2]
IMAGE_ROOT = "/opt/zeroout"  # the checkout in the image


def read_yaml(path: str) -> Any:
    """The one document in a YAML file of the checkout."""
    return yaml.safe_load((ROOT / path).read_text())


def parse_command(line: str) -> tuple[str, dict[str, Any]]:
    """The name and the parameters of a `zeroout ...` or `python -m deploy.cli ...` line; click's error for any other.

    Nothing of it is run.
    """
    words = shlex.split(line)
    start = 1 if words[0] == "zeroout" else 3
    assert words[:start] in (["zeroout"], ["python", "-m", "deploy.cli"]), line
    command: Any = typer.main.get_command(cli.app)
    name, sub, rest = command.resolve_command(click.Context(command), words[start:])
    return name, sub.make_context(name, rest).params


def campaign_of(parameters: dict[str, Any]) -> CampaignConfig:
    """The campaign that a `run` line names, read as the command would; its file is one of ours."""
    path = str(parameters["config"]).removeprefix(f"{IMAGE_ROOT}/")
    return load(ROOT / path, parameters["overrides"] or [])
