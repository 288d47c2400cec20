"""What others published stands beside a campaign only where it can be compared with it."""

from typing import Any

import pytest

from deploy.published import Published, published_beside

COMPARABLE: dict[str, Any] = {
    "network": {"name": "vgg16", "width": 1.0, "factory": ""},
    "data": {"source": "cifar10", "train_limit": 0, "image_size": 0},
    "episode": {"measure": "parameters"},
    "transfer": {"classes": 0},
}


def test_the_sources_points_stand_beside_the_same_network_and_images() -> None:
    points = [point for point in published_beside(COMPARABLE) if point.is_source]
    assert [(point.compression, point.accuracy) for point in points] == [
        (0.7002, 0.9291),
        (0.92, 0.9245),
        (0.9301, 0.9214),
        (0.9752, 0.9132),
    ]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("network", "name", "small"),
        ("network", "width", 0.25),
        ("network", "factory", "theirs:network"),
        ("data", "source", "folder"),
        ("data", "train_limit", 1000),
        ("data", "image_size", 16),
        ("data", "classes", "cat,dog"),
        ("data", "train_per_class", 10),
        ("transfer", "classes", 100),
        ("episode", "measure", "macs"),
    ],
)
def test_nothing_stands_beside_another_task(section: str, key: str, value: object) -> None:
    assert published_beside({**COMPARABLE, section: {**COMPARABLE[section], key: value}}) == ()


def test_each_of_the_sources_networks_has_its_points() -> None:
    for name in ("resnet18", "resnet34"):
        assert any(point.is_source for point in published_beside({**COMPARABLE, "network": {"name": name}}))
    by_macs = {**COMPARABLE, "network": {"name": "resnet56"}, "episode": {"measure": "macs"}}
    assert [round(point.compression, 3) for point in published_beside(by_macs)] == [0.524, 0.608]


def test_a_change_alone_is_drawn_from_the_campaigns_own_baseline() -> None:
    point = Published(who="they", compression=0.9, change=-0.5)
    assert point.height(0.93) == pytest.approx(0.925)
    assert point.height(None) is None
    assert Published(who="they", compression=0.9, accuracy=0.9, change=-0.5).height(0.93) == 0.9


def test_an_empty_configuration_is_the_digits_and_has_none() -> None:
    assert published_beside({}) == ()
