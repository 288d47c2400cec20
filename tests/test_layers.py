"""The rooms import in one direction, and ray, redis and gymnasium only where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("env", "agents", "learner", "actors", "deploy")
#: library -> folders whose modules may import it
ONLY_IN = {
    "ray": ("actors", "deploy"),
    "redis": ("learner/replay", "deploy"),
    "gymnasium": ("env", "actors"),
}


def imported(source: str) -> Iterator[str]:
    """Dotted names of everything that a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def faults(path: str, source: str) -> list[str]:
    """What a module at `path` (relative to the root) may not import, but does."""
    room, wrong = path.split("/")[0], []
    for name in imported(source):
        top = name.split(".")[0]
        if top in ROOMS and ROOMS.index(top) > ROOMS.index(room):
            wrong.append(f"{path} imports {name}, a room to its right")
        if top in ONLY_IN and not any(path.startswith(f"{folder}/") for folder in ONLY_IN[top]):
            wrong.append(f"{path} imports {name}, which belongs to {' and '.join(ONLY_IN[top])}")
    return wrong


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_rooms_to_its_left_only(path: Path) -> None:
    assert not faults(str(path.relative_to(ROOT)), path.read_text())


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("env/x.py", "from agents.ladder import Ladder"),
        ("learner/x.py", "import actors.player"),
        ("agents/x.py", "def f():\n    import learner"),
        ("learner/x.py", "import redis"),
        ("learner/learner.py", "from ray.util import metrics"),
        ("deploy/x.py", "import gymnasium as gym"),
    ],
)
def test_a_wrong_import_is_found_wherever_it_hides(path: str, source: str) -> None:
    assert len(faults(path, source)) == 1


def test_a_right_import_is_not_a_fault() -> None:
    assert not faults("deploy/x.py", "import ray, redis\nfrom env.channels import ChannelPlan\nimport rayon")
    assert not faults("learner/replay/x.py", "import redis\nfrom agents import ladder")
