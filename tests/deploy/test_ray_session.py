"""What actors ask Ray for."""

import pytest

from deploy.config import parse
from deploy.ray_session import gpus_each


@pytest.mark.parametrize(
    ("asked", "address", "there", "each"),
    [
        (-1, "", 0, 0), (-1, "", 1, 0.5), (-1, "", 8, 1),  # a local Ray's two actors share what is there
        (-1, "host:6379", 0, 0), (-1, "host:6379", 1, 1),  # more nodes may join a cluster
        (0, "", 8, 0), (0.25, "", 0, 0.25), (2, "host:6379", 1, 2),
    ],
)  # fmt: skip
def test_an_actor_has_a_gpu_where_there_are_any_unless_it_is_said(
    asked: float, address: str, there: float, each: float
) -> None:
    values = ["search.actors=2", f"cluster.gpus_per_actor={asked}", f'cluster.ray_address="{address}"']
    assert gpus_each(parse("", values), there) == each
