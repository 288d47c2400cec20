import numpy as np
import pytest

from agents.cross_entropy import generation_size, next_offsets

Episodes = list[tuple[np.ndarray, float]]


def noise(seed: int, layers: int = 3) -> np.ndarray:
    return 0.4 * np.random.default_rng(seed).standard_normal(layers)


def episodes(returns: list[float]) -> Episodes:
    """The i-th tried (i, -i, 2i)."""
    return [(np.array([i, -i, 2.0 * i]), value) for i, value in enumerate(returns)]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_first_ten_are_drawn_around_zero(count: int) -> None:
    finished = episodes([float(i) for i in range(count)])
    np.testing.assert_array_equal(next_offsets(finished, 3, seed=7), noise(7))


@pytest.mark.parametrize("count", [10, 11, 19])
def test_then_the_mean_moves_half_way_to_the_best_five(count: int) -> None:
    # best are episodes 1, 3, 5, 7, 9: their mean is (5, -5, 10)
    finished = episodes([i % 2 + i / 100 for i in range(10)] + [99.0] * (count - 10))
    np.testing.assert_allclose(next_offsets(finished, 3, seed=7) - noise(7), [2.5, -2.5, 5.0])


def test_after_twenty_it_moves_half_way_again() -> None:
    # first to episodes 5 to 9 (mean 7), then to 15 to 19 (mean 17): 3.5, then 3.5 + (17 - 3.5) / 2
    finished = episodes([float(i) for i in range(20)])
    np.testing.assert_allclose(next_offsets(finished, 3, seed=7) - noise(7), [10.25, -10.25, 20.5])


def test_the_best_of_the_last_twenty_count_and_older_ones_do_not() -> None:
    # the third move sees episodes 10 to 29 only; of them the best are 10 to 14 (mean 12)
    finished = episodes([100.0 + i for i in range(10)] + [50.0] * 5 + [1.0] * 15)
    first, second = 3.5, 3.5 + (7 - 3.5) / 2  # twice to 5 to 9
    third = second + (12 - second) / 2
    assert first < second
    np.testing.assert_allclose((next_offsets(finished, 3, seed=7) - noise(7))[0], third)


def test_the_seed_decides_the_draw_and_nothing_is_remembered() -> None:
    finished = episodes([float(i) for i in range(13)])
    again = next_offsets(finished, 3, seed=1)
    np.testing.assert_array_equal(next_offsets(finished, 3, seed=1), again)
    assert not np.array_equal(next_offsets(finished, 3, seed=2), again)
    assert again.dtype == np.float64
    np.testing.assert_array_equal(finished[5][0], [5, -5, 10])


@pytest.mark.parametrize("start", [0, 1000, 2000])
def test_it_finds_the_optimum_of_a_quadratic(start: int) -> None:
    optimum = np.array([1.0, -0.7, 0.4, 0.0, 0.9])
    finished: Episodes = []
    for episode in range(300):
        offsets = next_offsets(finished, 5, seed=start + episode)
        finished.append((offsets, -float(((offsets - optimum) ** 2).sum())))
    late = np.mean([offsets for offsets, _ in finished[-50:]], axis=0)
    np.testing.assert_allclose(late, optimum, atol=0.2)  # 50 draws: standard error 0.06


@pytest.mark.parametrize(("episodes", "size"), [(1, 3), (12, 3), (16, 4), (23, 5), (40, 10), (1000, 10)])
def test_few_episodes_have_small_generations(episodes: int, size: int) -> None:
    assert generation_size(episodes) == size


def test_a_small_generation_moves_early_to_the_best_quarter_of_the_last_two() -> None:
    # of four the best two are 2 and 3 (mean 2.5), of eight 6 and 7 (mean 6.5)
    finished = episodes([float(i) for i in range(8)])
    np.testing.assert_allclose((next_offsets(finished[:4], 3, seed=7, generation=4) - noise(7))[0], 1.25)
    np.testing.assert_allclose((next_offsets(finished, 3, seed=7, generation=4) - noise(7))[0], 1.25 + (6.5 - 1.25) / 2)
