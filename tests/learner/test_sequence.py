from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from env.errors import UserError
from learner.packing import MaskPacking
from learner.replay.codec import decode, encode
from learner.sequence import Batch, EpisodeTrace, ForeignSequenceError, SequenceConfig, collate
from learner.sequence import cut as cut_with

FILTERS, KINDS, HIDDEN = 11, 3, 5
PACKING = MaskPacking(FILTERS, KINDS)
Arrays = dict[str, np.ndarray]


def episode(steps: int, *, seed: int = 0, terminated: bool = True, filters: int = FILTERS) -> EpisodeTrace:
    """A random episode in which every number tells its own step apart from the others."""
    random = np.random.default_rng(seed)
    keep_mask = np.ones((steps + 1, filters), bool)
    keep_mask[0] = random.random(filters) < 0.9
    actions = np.zeros((steps, filters), bool)
    for t in range(steps):
        actions[t] = keep_mask[t] & (random.random(filters) < 0.2)
        keep_mask[t + 1] = keep_mask[t] & ~actions[t]
    return EpisodeTrace(
        observations={
            "accuracy": np.arange(steps + 1, dtype=np.float32)[:, None],
            "compression": 100 + np.arange(steps + 1, dtype=np.float32)[:, None],
            "keep_mask": keep_mask.astype(np.int8),
            "features": random.standard_normal((steps + 1, filters, KINDS)).astype(np.float16),
        },
        actions=actions,
        rewards=1000 + np.arange(steps, dtype=np.float32),
        states=random.standard_normal((steps, 2, HIDDEN)).astype(np.float32),
        terminated=terminated,
    )


def collated(sequences: list[Arrays], config: SequenceConfig) -> Batch:
    return collate(sequences, config, PACKING, hidden=HIDDEN)


def cut(trace: EpisodeTrace, config: SequenceConfig) -> list[Arrays]:
    return cut_with(trace, config, PACKING)


@st.composite
def configs(draw: st.DrawFn) -> SequenceConfig:
    unroll = draw(st.integers(1, 7))
    period = draw(st.integers(1, unroll))
    return SequenceConfig(burn_in=draw(st.integers(0, period)), unroll_length=unroll, sequence_period=period)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unroll_length": 0}, "sequence.unroll_length: expected at least 1, got 0"),
        ({"sequence_period": 0, "burn_in": 0}, "sequence.sequence_period: expected 1 to 16, got 0"),
        ({"sequence_period": 17}, "sequence.sequence_period: expected 1 to 16, got 17"),
        ({"burn_in": -1}, "sequence.burn_in: expected 0 to sequence_period=8, got -1"),
        ({"burn_in": 9}, "sequence.burn_in: expected 0 to sequence_period=8, got 9"),
    ],
)
def test_a_wrong_configuration_is_named_with_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        SequenceConfig(**changes)
    assert str(caught.value) == f"{message}; change one of them"


def test_an_episode_of_seven_steps_by_hand() -> None:
    trace = episode(7)
    first, second, third = cut(trace, SequenceConfig(burn_in=1, unroll_length=3, sequence_period=2))
    assert [s["place"].tolist() for s in (first, second, third)] == [[0, 0, 0], [2, 1, 0], [4, 1, 1]]
    assert first["rewards"].tolist() == [1000, 1001, 1002]
    assert second["rewards"].tolist() == [1001, 1002, 1003, 1004]
    assert third["rewards"].tolist() == [1003, 1004, 1005, 1006]
    assert third["accuracy"].tolist() == [3, 4, 5, 6, 7]
    assert second["compression"].tolist() == [101, 102, 103, 104, 105]
    assert np.array_equal(second["features"], trace.observations["features"][1:6])
    assert np.array_equal(first["state"], trace.states[0])
    assert np.array_equal(third["state"], trace.states[3])


def test_an_episode_shorter_than_a_sequence_is_one_sequence() -> None:
    (only,) = cut(episode(5), SequenceConfig())
    assert only["place"].tolist() == [0, 0, 1]
    assert len(only["rewards"]) == 5


def test_an_episode_without_a_step_has_no_sequence() -> None:
    assert cut(episode(0), SequenceConfig()) == []


@given(st.integers(1, 30), configs())
def test_every_step_is_learned_from_and_every_overlap_is_as_long_as_the_period_says(
    steps: int, config: SequenceConfig
) -> None:
    sequences = cut(episode(steps), config)
    learned = [
        range(int(start), int(start) + len(s["rewards"]) - int(burnt))
        for s in sequences
        for start, burnt, _ in [s["place"]]
    ]
    assert set().union(*learned) == set(range(steps))
    assert [steps_of.start for steps_of in learned] == [i * config.sequence_period for i in range(len(learned))]
    # all but the last are whole, so neighbours share unroll_length - sequence_period steps, and none is superfluous
    assert all(len(steps_of) == config.unroll_length for steps_of in learned[:-1])
    assert all(steps_of.stop < steps for steps_of in learned[:-1])


@given(st.integers(1, 30), configs())
def test_only_the_first_sequence_has_no_burn_in_and_the_state_is_that_of_the_first_real_step(
    steps: int, config: SequenceConfig
) -> None:
    trace = episode(steps)
    for number, sequence in enumerate(cut(trace, config)):
        start, burnt, _ = sequence["place"]
        assert burnt == (config.burn_in if number else 0)
        assert np.array_equal(sequence["state"], trace.states[start - burnt])


@given(st.integers(1, 30), configs(), st.integers(0, 2**32), st.sampled_from([1, 7, 8, 9, 17]))
def test_masks_and_actions_come_back_through_the_codec_from_the_first_mask_and_the_zeroed_indices(
    steps: int, config: SequenceConfig, seed: int, filters: int
) -> None:
    trace, packing = episode(steps, seed=seed, filters=filters), MaskPacking(filters, KINDS)
    sequences = [decode(encode(sequence)) for sequence in cut_with(trace, config, packing)]
    batch = collate(sequences, config, packing, hidden=HIDDEN)
    masks, actions = batch.observations.keep_mask.numpy(), batch.actions.numpy()
    for b, sequence in enumerate(sequences):
        start, burnt, _ = sequence["place"]
        stop = start + int(batch.length[b])
        here = slice(config.burn_in - burnt, config.burn_in + stop - start + 1)
        assert np.array_equal(masks[here, b], trace.observations["keep_mask"][start - burnt : stop + 1])
        assert np.array_equal(actions[: stop - start, b], trace.actions[start:stop])


@given(st.integers(1, 30), configs(), st.booleans())
def test_bursts_stand_at_the_same_index_with_and_without_burn_in(
    steps: int, config: SequenceConfig, terminated: bool
) -> None:
    trace = episode(steps, terminated=terminated)
    sequences = cut(trace, config)
    batch = collated(sequences, config)
    assert batch.observations.accuracy.shape == (config.burn_in + config.unroll_length + 1, len(sequences))
    for b, sequence in enumerate(sequences):
        start, burnt, _ = sequence["place"].tolist()
        length = int(batch.length[b])
        real = np.arange(start, start + length)
        learned = batch.observations[config.burn_in :]
        assert learned.accuracy[: length + 1, b].tolist() == [*real, start + length]
        assert learned.compression[: length + 1, b].tolist() == [*(real + 100), start + length + 100]
        assert np.array_equal(
            learned.features[: length + 1, b], trace.observations["features"][start : start + length + 1]
        )
        before = batch.observations[config.burn_in - burnt : config.burn_in]
        assert before.accuracy[:, b].tolist() == list(range(start - burnt, start))
        assert batch.rewards[:length, b].tolist() == (real + 1000).tolist()
        assert batch.valid[:, b].tolist() == [True] * length + [False] * (config.unroll_length - length)
        assert batch.step[:, b].tolist() == list(range(start, start + config.unroll_length + 1))
        assert bool(batch.burnt[b]) == (burnt > 0)
        assert np.array_equal(torch.stack(batch.state)[:, b], trace.states[start - burnt])


@given(st.integers(1, 30), configs(), st.booleans())
def test_terminated_stands_at_the_episodes_own_end_alone(steps: int, config: SequenceConfig, terminated: bool) -> None:
    batch = collated(cut(episode(steps, terminated=terminated), config), config)
    ended = [int(batch.step[t, b]) for t, b in batch.terminated.nonzero().tolist() if bool(batch.valid[t, b])]
    assert len(ended) == int(batch.terminated.sum())
    assert ended == [steps - 1] * len(ended)
    assert bool(ended) == terminated


def test_padding_holds_nothing() -> None:
    config = SequenceConfig(burn_in=2, unroll_length=7, sequence_period=3)
    batch = collated(cut(episode(5), config), config)
    assert batch.length.tolist() == [5]
    for padded in (slice(0, 2), slice(8, None)):
        assert batch.observations.accuracy[padded].eq(0).all()
        assert batch.observations.features[padded].eq(0).all()
        assert batch.observations.keep_mask[padded].all()
    assert not batch.actions[5:].any()
    assert batch.rewards[5:].eq(0).all()


CONFIG = SequenceConfig(burn_in=2, unroll_length=5, sequence_period=3)


def changed(name: str, index: int | tuple[int, ...], value: float) -> Callable[[Arrays], None]:
    def change(sequence: Arrays) -> None:
        sequence[name] = sequence[name].copy()
        sequence[name][index] = value

    return change


def replaced(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    def change(sequence: Arrays) -> None:
        sequence[name] = make(sequence[name])

    return change


POISON: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "a missing array": (lambda s: s.pop("state"), "state: expected .*, got nothing"),
    "no rewards at all": (lambda s: s.pop("rewards"), "rewards|zeroed_per_step"),
    "an array too many": (lambda s: s.update(extra=np.zeros(3)), "extra: expected no such array"),
    "nothing": (lambda s: s.clear(), "first_mask: expected .*, got nothing"),
    "another network's mask": (replaced("first_mask", lambda a: a[:1]), "first_mask"),
    "another network's features": (replaced("features", lambda a: a[:, :7]), "features"),
    "fewer features": (replaced("features", lambda a: a[..., :1]), "features"),
    "flat features": (replaced("features", lambda a: a[..., 0]), "features"),
    "another Controller's state": (replaced("state", lambda a: a[:, :4]), "state"),
    "half a state": (replaced("state", lambda a: a[:1]), "state"),
    "a scalar": (replaced("rewards", lambda a: a.sum()), "zeroed_per_step|rewards|accuracy"),
    "another dtype": (replaced("zeroed", lambda a: a.astype(np.float32)), "zeroed: expected .*int32.*, got .*float32"),
    "a wrong place": (replaced("place", lambda a: a[:2]), "place"),
    "fewer accuracies": (replaced("accuracy", lambda a: a[:-1]), "accuracy"),
    "an index too high": (changed("zeroed", 0, FILTERS), "zeroed: expected 0 to 10, got .* to 11"),
    "an index below 0": (changed("zeroed", 0, -1), "zeroed: expected 0 to 10, got -1"),
    "a count below 0": (changed("zeroed_per_step", 0, -1), "zeroed_per_step"),
    "a count too high": (changed("zeroed_per_step", 0, 99), "zeroed_per_step"),
    "a start below 0": (changed("place", 0, -3), "place"),
    "another burn-in": (changed("place", 1, 1), "place: expected a burn-in of 2 steps, none at 0, got 1 before 3"),
    "a burn-in at the start": (changed("place", 0, 0), "place"),
    "a NaN accuracy": (changed("accuracy", 0, np.nan), "accuracy: expected finite numbers"),
    "an infinite compression": (changed("compression", 0, np.inf), "compression: expected finite numbers"),
    "a NaN reward": (changed("rewards", 1, np.nan), "rewards: expected finite numbers"),
    "an infinite feature": (changed("features", (0, 0, 0), -np.inf), "features: expected finite numbers"),
    "a NaN state": (changed("state", (1, 2), np.nan), "state: expected finite numbers"),
}


@pytest.mark.parametrize("kind", POISON)
def test_a_foreign_or_poisoned_sequence_is_refused_in_one_line_that_says_which_and_why(kind: str) -> None:
    sequences = cut(episode(14, seed=3), CONFIG)
    poison, problem = POISON[kind]
    poison(sequences[1])
    with pytest.raises(
        ForeignSequenceError, match=f"^sequence 1 of the batch is not one of ours: ({problem})"
    ) as caught:
        collated(sequences, CONFIG)
    assert isinstance(caught.value, ValueError)
    assert caught.value.index == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [SequenceConfig(burn_in=1, unroll_length=5, sequence_period=3), SequenceConfig()])
def test_sequences_cut_another_way_are_refused(other: SequenceConfig) -> None:
    with pytest.raises(ForeignSequenceError, match=r"place|rewards"):
        collated(cut(episode(40), other), CONFIG)


def test_a_sequence_with_more_steps_than_are_learned_from_is_refused() -> None:
    long = SequenceConfig(burn_in=2, unroll_length=6, sequence_period=3)
    with pytest.raises(ForeignSequenceError, match="rewards: expected 1 to 5 steps, got 6"):
        collated(cut(episode(9), long), CONFIG)
