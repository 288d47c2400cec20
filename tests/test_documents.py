"""What README and SECURITY.md tell people to type, and the tests and files that they name, are there."""

import re
import shlex
from pathlib import Path

import click
import pytest
from launch import ROOT, campaign_of, parse_command
from PIL import Image

README, SECURITY = ((ROOT / name).read_text() for name in ("README.md", "SECURITY.md"))


def cluster_lines() -> list[str]:
    """The commands of README's part on clusters."""
    part = README.partition("### On a cluster")[2].partition("\n## ")[0]
    return [line for block in re.findall(r"```sh\n(.*?)```", part, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in cluster_lines() if re.search(r"zeroout run|deploy\.cli", line)])
def test_every_command_on_a_cluster_is_ours_with_a_campaign_of_ours(line: str) -> None:
    name, parameters = parse_command(re.search(r"(zeroout|python -m deploy\.cli) run.*", line)[0])  # type: ignore[index]
    assert (name, parameters["ray_address"]) == ("run", "auto")
    campaign_of(parameters)


@pytest.mark.parametrize("line", [line for line in cluster_lines() if re.search(r"(^| )ray ", line)])
def test_every_command_of_ray_on_a_cluster_is_rays(line: str) -> None:
    from ray.scripts.scripts import cli

    words = shlex.split(line)
    words = words[words.index("ray") + 1 :]
    command: click.Command = cli
    while isinstance(command, click.Group):
        _, found, words = command.resolve_command(click.Context(command), words)
        assert found is not None
        command = found
    command.make_context(str(command.name), words)


def test_every_file_named_on_a_cluster_is_there() -> None:
    named = {word for line in cluster_lines() for word in shlex.split(line) if word.startswith("deploy/")}
    assert len(named) >= 7
    for word in named - {"deploy/.env"}:
        assert (ROOT / word).is_file()


def test_every_link_within_the_tree_leads_somewhere() -> None:
    for document in (README, SECURITY):
        for target in re.findall(r"\]\(([^)#:]+)\)", document):
            assert (ROOT / target).exists(), target


def test_every_picture_in_docs_is_small_and_shown_in_words_too() -> None:
    shown = dict(re.findall(r'<img src="(docs/[^"]+)" alt="([^"]+)"', README))
    pictures = {f"docs/{path.name}": path for path in (ROOT / "docs").glob("*.png")}
    assert shown.keys() == pictures.keys()
    assert len(pictures) == 5
    for name, path in pictures.items():
        assert len(shown[name]) > 5
        assert path.stat().st_size < 300_000, name
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20, f"{name} is blank"


def test_every_test_that_the_security_document_names_is_there() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", SECURITY)
    assert len(named) >= 20
    for path, name in named:
        assert f"def {name}(" in Path(ROOT / path).read_text(), f"{path}::{name}"
