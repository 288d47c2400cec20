from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from env.augment import augment, normalise

IMAGES = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalising_is_as_worked_by_hand() -> None:
    images = torch.tensor([[[[0, 51]], [[255, 102]]]], dtype=torch.uint8)  # 0, 0.2 | 1, 0.4
    expected = torch.tensor([[[[-2.0, 0.0]], [[1.0, -0.2]]]])
    torch.testing.assert_close(normalise(images, (0.2, 0.5), (0.1, 0.5)), expected)


def moved(images: torch.Tensor, *, seed: int = 0, **how: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channels = images.shape[1]
    given: dict[str, Any] = {"flip": False, "shift_pixels": 0, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    return augment(images, **{**given, **how}, generator=generator).mul(255).round()


def test_augmenting_without_flip_and_shift_only_normalises() -> None:
    images = IMAGES
    assert torch.equal(moved(images), images.float())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), shift=st.integers(0, 3), flip=st.booleans())
def test_every_augmented_image_is_a_shifted_perhaps_mirrored_original(seed: int, shift: int, flip: bool) -> None:
    images = torch.randint(1, 256, (5, 3, 4, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    results = moved(images, seed=seed, flip=flip, shift_pixels=shift)
    for image, result in zip(images, results, strict=True):
        padded = torch.nn.functional.pad(image, [shift] * 4).float()
        windows = [padded[:, y : y + 4, x : x + 7] for y in range(2 * shift + 1) for x in range(2 * shift + 1)]
        candidates = windows + [window.flip(2) for window in windows if flip]
        assert any(torch.equal(result, candidate) for candidate in candidates)


def test_half_of_the_images_are_mirrored_and_shifts_are_uniform() -> None:
    images = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 255
    shifted = moved(images, shift_pixels=1).flatten(1).argmax(1).bincount(minlength=25).view(5, 5)[1:4, 1:4]
    assert shifted.sum() == 9000
    assert (shifted - 1000).abs().max() < 5 * 30  # 5 standard deviations of about 30
    images = images.roll(1, dims=3)
    mirrored = (moved(images, flip=True).flatten(1).argmax(1) == 11).sum().item()
    assert abs(mirrored - 4500) < 5 * 48


def test_the_seed_alone_decides_the_augmentation() -> None:
    images = IMAGES
    first = moved(images, seed=1, flip=True, shift_pixels=2)
    assert torch.equal(first, moved(images, seed=1, flip=True, shift_pixels=2))
    assert not torch.equal(first, moved(images, seed=2, flip=True, shift_pixels=2))
