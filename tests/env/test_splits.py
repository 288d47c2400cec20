import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from env.errors import UserError
from env.splits import Split, draw_share, shuffled, take_turns


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2)),
    ],
)
def test_a_split_refuses_other_shapes_and_types(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        Split(images, labels)


def test_taking_follows_the_indices() -> None:
    split = Split(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([5, 6, 7]))
    taken = split.take(torch.tensor([2, 0]))
    assert taken.images.flatten().tolist() == [2, 0]
    assert taken.labels.tolist() == [7, 5]
    assert len(taken) == 2


@given(counts=st.lists(st.integers(2, 9), min_size=2, max_size=4), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_a_share_of_each_class_is_drawn_and_at_least_one_is_left(counts: list[int], share: float, seed: int) -> None:
    labels = shuffled(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), generator(seed))
    indices = torch.arange(len(labels)).flip(0)
    rest, drawn = draw_share(indices, labels, share, generator(seed), [str(label) for label in range(len(counts))])
    assert sorted(torch.cat([rest, drawn]).tolist()) == list(range(len(labels)))
    for label, count in enumerate(counts):
        assert (labels[drawn] == label).sum() == min(max(1, round(share * count)), count - 1)


def test_a_class_that_cannot_be_parted_is_named() -> None:
    with pytest.raises(UserError, match="class emu: expected at least 3"):
        draw_share(torch.arange(5), torch.tensor([0, 1, 0, 1, 2]), 0.5, generator(), ["cat", "dog", "emu"])


def test_classes_take_turns_until_they_have_no_more() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    order = take_turns(labels, generator())
    assert sorted(order.tolist()) == list(range(7))
    turns = labels[order].tolist()
    assert [sorted(turns[:3]), sorted(turns[3:5]), turns[5:]] == [[0, 1, 2], [0, 1], [0, 0]]
    assert take_turns(labels, generator(1)).tolist() != order.tolist()
