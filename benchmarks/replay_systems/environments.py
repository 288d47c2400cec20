"""The peers' own virtual environments, made where they are missing and used again where they are not."""

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# The exact pin of torch comes first and alone: any other spelling may fetch another build of several gigabytes.
# What torchrl and tensordict need besides is named, because they are installed without their own dependencies.
# The peer's client library is ours, with the same parser; gymnasium is what importing our codec asks for.
_OURS = [
    f"{name}=={metadata.version(name)}" for name in ("redis", "hiredis", "gymnasium") if importlib.util.find_spec(name)
]
RECIPES: dict[str, list[list[str]]] = {
    "reverb": [["dm-reverb[tensorflow]==0.14.0"]],
    "torchrl": [
        ["torch==2.13.0"],
        ["--no-deps", "torchrl==0.14.1", "tensordict==0.14.3", "hoptorch>=0.1.4"],
        [
            *_OURS, "numpy", "cloudpickle", "packaging", "importlib_metadata", "orjson", "pyvers>=0.2,<0.3",
        ],
    ],
    "cpprb": [["cpprb==11.0.0"]],
}  # fmt: skip
_INSTALL_WAIT_S = 1800


class InstallError(Exception):
    """An environment cannot be made; the message is pip's first error."""


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of the peer `name` in `folder`, which is filled as its recipe says."""
    home = folder / name
    python, stamp = home / "bin" / "python", home / "recipe.txt"
    recipe = repr(RECIPES[name])
    if stamp.exists() and stamp.read_text() == recipe:
        return python
    print(f"making the environment of {name} in {home} (minutes, once)", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(home)])
    for packages in RECIPES[name]:
        print(f"  pip install {' '.join(packages)}", flush=True)
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])
    stamp.write_text(recipe)
    return python


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The installed versions of packages; those that are not there are left out."""
    program = (
        "import json, sys\nfrom importlib import metadata\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try:\n        found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError:\n        pass\nprint(json.dumps(found))"
    )
    answer = subprocess.run([str(python), "-c", program, *names], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_WAIT_S)
    except subprocess.TimeoutExpired:
        raise InstallError(f"pip took more than {_INSTALL_WAIT_S} s") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines or ["no message"]
        raise InstallError(errors[0])
