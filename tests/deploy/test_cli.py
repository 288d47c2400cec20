"""The command line: what a user can get wrong is one line, exit 2, and nothing there is touched."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Zeroout
from PIL import Image

from deploy.redis_server import find_server

IMAGES_A_CLASS = 12


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two classes of 8x8 pictures."""
    for name, shade in (("dark", 40), ("light", 200)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(IMAGES_A_CLASS):
            Image.new("RGB", (8, 8), (shade, shade + number, shade)).save(folder / f"{number}.png")
    return tmp_path / "images"


def a_mistake(run: Zeroout, out: Path, *arguments: object) -> str:
    """Run a campaign that must be refused: one line, exit 2, no folder made; returns the line."""
    code, error, _ = run("run", "--out", out, *arguments)
    assert code == 2, error
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line]
    assert len(lines) == 1, error
    assert all(word in lines[0] for word in ("zeroout: ", "expected ", "got "))
    assert not out.exists()
    return lines[0]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("episode.target=[0.9]", "episode.target"),
        ("search.actors=two", "search.actors"),
        ("episode.targets=[1.5]", "episode.targets"),
        ("episode.targets=[0.0]", "episode.targets"),
        ("episode.targets=[0.99999]", "min_width"),
        ("baseline.epochs=-1", "baseline.epochs"),
        ("data.source=folder", "data.path"),
        ("episode.batch_size=5000", "batch"),
        ("network.weights=no/such/file.safetensors", "no/such/file.safetensors"),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_made(
    zeroout: Zeroout, tmp_path: Path, override: str, named: str
) -> None:
    assert named in a_mistake(zeroout, tmp_path / "out", "--set", override)


def test_a_missing_config_is_named(zeroout: Zeroout, tmp_path: Path) -> None:
    assert "none.toml" in a_mistake(zeroout, tmp_path / "out", tmp_path / "none.toml")


def folder_arguments(images: Path, cache: Path) -> list[str]:
    return ["--set", "data.source=folder", "--set", f"data.path={images}", "--set", f"data.cache={cache}"]


def test_a_data_path_that_is_missing_empty_or_damaged_is_named(zeroout: Zeroout, tmp_path: Path, images: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert "nowhere" in a_mistake(zeroout, out, *folder_arguments(tmp_path / "nowhere", cache))
    (tmp_path / "empty").mkdir()
    assert "empty" in a_mistake(zeroout, out, *folder_arguments(tmp_path / "empty", cache))
    damaged = images / "dark" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert str(damaged) in a_mistake(zeroout, out, *folder_arguments(images, cache))


def test_fewer_images_than_a_batch_are_named(zeroout: Zeroout, tmp_path: Path, images: Path) -> None:
    line = a_mistake(
        zeroout, tmp_path / "out", *folder_arguments(images, tmp_path / "cache"), "--set", "data.validation_share=0.2"
    )
    assert "batch" in line


def test_weights_that_do_not_fit_are_named(zeroout: Zeroout, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"something.else": torch.zeros(3)}, tmp_path / "weights.safetensors")
    line = a_mistake(zeroout, tmp_path / "out", "--set", f"network.weights={tmp_path / 'weights.safetensors'}")
    assert "something.else" in line


@contextlib.contextmanager
def a_server(folder: Path, *options: str) -> Iterator[str]:
    """A server with these options, on a unix socket."""
    socket = folder / "s"
    command = [str(find_server()), "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", ""]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"unix://{socket}"
    finally:
        server.terminate()
        server.wait(10)


def test_a_redis_that_does_not_answer_refuses_or_may_evict_is_named(
    zeroout: Zeroout, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "out"
    assert "127.0.0.1:1" in a_mistake(zeroout, out, "--redis", "redis://127.0.0.1:1/0")
    with a_server(tmp_path_factory.mktemp("a"), "--requirepass", "right") as url:
        line = a_mistake(zeroout, out, "--redis", url.replace("unix://", "unix://:wrong@"))
        assert "wrong" not in line.replace("Wrong", "").replace("WRONGPASS", "")
    with a_server(tmp_path_factory.mktemp("b"), "--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru") as url:
        assert "noeviction" in a_mistake(zeroout, out, "--redis", url)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_of_another_campaign_is_refused_and_left_as_it_is(zeroout: Zeroout, tmp_path: Path) -> None:
    from deploy.config import dump, parse
    from deploy.folder import CampaignFolder

    CampaignFolder.create(tmp_path / "out", dump(parse("seed = 7")))
    before = contents(tmp_path / "out")
    code, error, _ = zeroout("run", "--out", tmp_path / "out")
    assert code == 2
    assert "another campaign" in error
    assert contents(tmp_path / "out") == before


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(zeroout: Zeroout, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, error, _ = zeroout("run", "--out", tmp_path)
    assert code == 2
    assert "thesis.txt" in error
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("command", ["resume", "status", "report", "export"])
def test_a_folder_that_is_no_campaign_is_an_error_never_a_fresh_start(
    zeroout: Zeroout, tmp_path: Path, command: str
) -> None:
    code, error, _ = zeroout(command, tmp_path / "nothing")
    assert code == 2
    assert "campaign folder" in error
    assert not (tmp_path / "nothing").exists()


def test_an_unfinished_campaign_cannot_be_exported_but_has_a_status(zeroout: Zeroout, tmp_path: Path) -> None:
    from deploy.config import dump, parse
    from deploy.folder import CampaignFolder

    CampaignFolder.create(tmp_path / "out", dump(parse("[search]\nepisodes = 9")))
    code, error, _ = zeroout("export", tmp_path / "out")
    assert code == 2
    assert "zeroout resume" in error
    status = json.loads(zeroout("status", tmp_path / "out", "--json").output)
    assert (status["stage"], status["episodes"], status["episodes_total"]) == ("prepare", 0, 9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["run", "resume", "status", "report", "compare", "export", "doctor"]),
        (["run", "--help"], ["CONFIG.toml", "--out", "--set", "--redis", "--controls", "Examples"]),
    ],
)
def test_help_names_every_command_and_teaches_run(zeroout: Zeroout, arguments: list[str], words: list[str]) -> None:
    code, _, output = zeroout(*arguments)
    assert code == 0
    assert all(word in output for word in words), output
