import hashlib

from hypothesis import given
from hypothesis import strategies as st

from env.seeds import derive_seed


def test_a_seed_is_the_first_eight_bytes_of_the_hash_of_its_path_less_two_bits() -> None:
    digest = hashlib.sha256(b"7/retrain/3").digest()
    assert derive_seed(7, "retrain", 3) == int.from_bytes(digest[:8], "little") // 4


def test_campaigns_stay_reproducible_across_versions() -> None:
    assert derive_seed(0) == 1016672496951950103
    assert derive_seed(7, "retrain", 3) == 1364503767912753268


@given(st.integers(), st.lists(st.text() | st.integers(), max_size=3))
def test_a_seed_fits_every_generator(seed: int, path: list[str | int]) -> None:
    assert 0 <= derive_seed(seed, *path) < 2**62
    assert derive_seed(seed, *path) == derive_seed(seed, *path)


def test_seeds_of_different_paths_differ() -> None:
    paths = [(seed, name, step) for seed in range(5) for name in ("retrain", "recovery", "scores") for step in range(7)]
    assert len({derive_seed(seed, name, step) for seed, name, step in paths}) == len(paths) == 105


def test_the_order_and_the_length_of_a_path_matter() -> None:
    assert len({derive_seed(1), derive_seed(1, 2), derive_seed(2, 1), derive_seed(1, 2, 1), derive_seed(12)}) == 5
