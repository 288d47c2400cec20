import pytest
import redis

from learner.replay.codec import PayloadError
from learner.replay.weights import WeightStore


@pytest.fixture
def store(client: redis.Redis, prefix: str) -> WeightStore:
    return WeightStore(client, prefix)


def test_an_empty_store_gives_nothing(store: WeightStore) -> None:
    assert store.pull(-1) is None


def test_only_newer_weights_are_pulled(store: WeightStore) -> None:
    assert store.publish(0, b"zero")
    assert store.pull(-1) == (0, b"zero")
    assert store.pull(0) is None
    assert store.publish(9, b"nine")
    assert store.publish(10, b"ten")
    assert store.pull(9) == (10, b"ten")
    assert store.pull(10) is None


def test_an_older_version_never_replaces_a_newer_one(store: WeightStore) -> None:
    store.publish(10, b"ten")
    assert not store.publish(9, b"nine")
    assert store.publish(10, b"again")  # the reply was lost: the same call again is a success
    assert store.pull(-1) == (10, b"ten")


def test_after_clear_a_lower_version_is_the_newest(store: WeightStore) -> None:
    store.publish(10, b"ten")
    store.clear()
    assert store.pull(-1) is None
    assert store.publish(9, b"nine")
    assert store.pull(-1) == (9, b"nine")


def test_a_poisoned_value_is_refused(store: WeightStore, client: redis.Redis, prefix: str) -> None:
    store.publish(4, b"four")
    key = f"{{{prefix}}}:weights:newest"
    sealed = client.get(key)
    client.set(key, sealed[:-1] + b"?")
    with pytest.raises(PayloadError, match="crc32"):
        store.pull(-1)
    client.set(f"{{{prefix}}}:weights:version", 5)
    client.set(key, sealed)
    with pytest.raises(PayloadError, match="expected version 5, got version 4"):
        store.pull(-1)
    client.delete(key)
    with pytest.raises(PayloadError, match="got 0 bytes"):
        store.pull(-1)


def test_a_negative_version_is_an_error(store: WeightStore) -> None:
    with pytest.raises(ValueError, match="version must be >= 0, got -1"):
        store.publish(-1, b"")


@pytest.mark.parametrize(
    ("version", "newest"),
    [(b"4", b"garbage"), (b"1000000000", b"garbage"), (b"none", b"garbage"), (b"1000000000", None), (None, None)],
)
def test_what_cannot_be_read_is_refused_and_replaced_by_the_next_publication(
    store: WeightStore, client: redis.Redis, prefix: str, version: bytes | None, newest: bytes | None
) -> None:
    store.publish(4, b"four")
    for name, value in (("version", version), ("newest", newest)):
        key = f"{{{prefix}}}:weights:{name}"
        client.delete(key)
        if value is not None:
            client.set(key, value)
        elif version is None:
            client.lpush(key, b"a list")
    with pytest.raises(PayloadError):
        store.pull(3)
    assert store.publish(5, b"five")
    assert store.pull(3) == (5, b"five")


def test_the_version_is_told_without_the_weights(store: WeightStore, client: redis.Redis, prefix: str) -> None:
    assert store.version() is None
    store.publish(4, b"four")
    assert store.version() == 4
    key = f"{{{prefix}}}:weights:version"
    client.set(key, b"none")
    assert store.version() is None
    client.delete(key)
    client.lpush(key, b"a list")
    assert store.version() is None
