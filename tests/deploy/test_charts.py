"""The pictures are drawn from whatever there is, and show it."""

import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.canvas import Form
from deploy.charts import frontier_image, frontier_png, learning_image, learning_png, throughput_image
from deploy.published import Published

RESULT = {
    "baseline": {"val_accuracy": 0.818, "test_accuracy": 0.813, "parameters": 900_000, "macs": 20_000_000},
    "points": [
        {"target": 0.9, "compression": 0.9003, "val_accuracy": 0.78, "test_accuracy": 0.772, "policy": "controller"}
    ],
    "comparison": [{"target": 0.9, "compression": 0.9, "val_accuracy": 0.76, "test_accuracy": None, "group": "taylor"}],
}


@pytest.fixture
def records() -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [record(id, group, rng) for id, group in enumerate(("search", "taylor", "random", "cem", "new") * 4)]


def record(id: int, group: str, rng: random.Random) -> dict[str, Any]:
    curve = [[c, 0.81 - 0.3 * c**6 + rng.gauss(0, 0.01)] for c in (0.0, 0.3, 0.6, 0.8, 0.9003, 0.9502)]
    targets = [
        {"target": t, "compression": c, "accuracy": a, "cross_entropy": 2 * (1 - a), "keep_bits": "AA=="}
        for t, (c, a) in zip((0.9, 0.95), curve[-2:], strict=True)
    ]
    return {
        "id": id, "group": group, "actor": "actor-0", "policy": group, "seed": id, "steps": 5, "seconds": 13.0,
        "return": -2 * (1 - curve[-1][1]), "curve": curve, "targets": targets,
    }  # fmt: skip


def pixels(png: bytes) -> np.ndarray:
    """Return <uint8>[height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def has_colour(png: bytes, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(pixels(png).astype(int) - wanted).sum(axis=2) < 12).any())


def test_the_pictures_are_written_as_files(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    frontier_png(tmp_path / "frontier.png", records, RESULT)
    learning_png(tmp_path / "learning.png", records)
    for name in ("frontier.png", "learning.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            assert image.width >= 1000


def test_each_group_shows_in_its_colour(records: list[dict[str, Any]]) -> None:
    for png in (frontier_image(records, RESULT), learning_image(records)):
        assert all(has_colour(png, colour) for colour in ("#D55E00", "#0072B2", "#8A8A8A", "#009E73", "#E69F00"))


def test_the_dark_pictures_are_dark_and_the_light_ones_light(records: list[dict[str, Any]]) -> None:
    dark = Form(dark=True)
    assert pixels(frontier_image(records, RESULT, form=dark)).mean() < 80
    assert pixels(learning_image(records, form=dark)).mean() < 80
    assert pixels(throughput_image(records, form=dark)).mean() < 80
    assert pixels(frontier_image(records, RESULT)).mean() > 200


def test_the_pictures_for_phones_are_narrower_than_high(records: list[dict[str, Any]]) -> None:
    narrow = Form(narrow=True)
    pictures = (
        frontier_image(records, RESULT, form=narrow),
        learning_image(records, form=narrow),
        throughput_image(records, form=narrow),
    )
    for png in pictures:
        height, width, _ = pixels(png).shape
        assert width < height


def test_published_points_and_heuristics_of_the_search_add_to_the_picture(records: list[dict[str, Any]]) -> None:
    bare = frontier_image(records, RESULT)
    assert frontier_image(records, RESULT, published=[Published(who="they", compression=0.93, accuracy=0.8)]) != bare
    assert frontier_image([{**record, "policy": "gamma"} for record in records], RESULT) != bare


def test_each_actor_has_a_line_of_its_own(records: list[dict[str, Any]]) -> None:
    actors = [{**record, "actor": f"actor-{record['id'] % 2}"} for record in records]
    png = throughput_image(actors)
    assert has_colour(png, "#D55E00")
    assert has_colour(png, "#0072B2")
    assert not has_colour(throughput_image(records), "#0072B2")


def test_the_result_adds_to_the_picture(records: list[dict[str, Any]]) -> None:
    assert frontier_image(records, RESULT) != frontier_image(records, None)


@pytest.mark.parametrize("result", [None, {}, {"baseline": {}, "points": []}, RESULT])
def test_pictures_are_drawn_before_the_first_episode(result: dict[str, Any] | None) -> None:
    assert pixels(frontier_image([], result)).shape[2] == 3
    assert pixels(learning_image([])).shape[2] == 3


def test_a_collapsed_episode_hurts_no_picture(records: list[dict[str, Any]]) -> None:
    records[0] = {**records[0], "return": None, "curve": [[0.0, 0.8], [1.0, None]]}
    records[0]["targets"] = [{**records[0]["targets"][0], "accuracy": None, "cross_entropy": None}]
    frontier_image(records, RESULT)
    learning_image(records)
    throughput_image([{**records[0], "seconds": 0.0}])


def test_no_other_module_of_ours_imports_matplotlib_or_ray_at_once() -> None:
    modules = "folder, frontier, progress, report, status, doctor"
    code = f"import sys; from deploy import {modules}; assert not {{'matplotlib', 'ray', 'torch'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
