import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.controller import Observations
from learner.packing import Arrays, MaskPacking, Packing, VectorPacking
from learner.replay.codec import decode, encode
from learner.sequence import EpisodeTrace, ForeignSequenceError, SequenceConfig, collate, cut

HIDDEN = 3
CONFIG = SequenceConfig(burn_in=1, unroll_length=3, sequence_period=2)


def vectors(steps: int, *, inputs: int = 2, actions: int = 3, seed: int = 0) -> EpisodeTrace:
    random = np.random.default_rng(seed)
    return EpisodeTrace(
        observations={"vector": random.standard_normal((steps + 1, inputs)).astype(np.float32)},
        actions=random.integers(actions, size=steps),
        rewards=np.arange(steps, dtype=np.float32),
        states=random.standard_normal((steps, 2, HIDDEN)).astype(np.float32),
        terminated=True,
    )


def test_a_mask_travels_as_its_first_bits_and_the_indices_of_each_action() -> None:
    keep_mask = np.array(
        [[1, 1, 1, 0, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1, 0]], np.int8
    )
    actions = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0, 1]], np.int8)
    seen = {
        "accuracy": np.array([[0.5], [0.25], [0.125]], np.float32),
        "compression": np.zeros((3, 1), np.float32),
        "keep_mask": keep_mask,
        "features": np.zeros((3, 9, 2), np.float32),
    }
    packing = MaskPacking(9, 2)
    packed = packing.pack(seen, actions)
    assert packed["first_mask"].tolist() == [0b11110111, 0b1]
    assert packed["zeroed"].tolist() == [1, 2, 8]
    assert packed["zeroed_per_step"].tolist() == [1, 2]
    assert packed["accuracy"].tolist() == [0.5, 0.25, 0.125]
    assert packed["features"].dtype == np.float16
    observations, taken = packing.unpack(packed)
    np.testing.assert_array_equal(observations["keep_mask"], keep_mask.astype(bool))
    np.testing.assert_array_equal(taken, actions.astype(bool))


def test_a_controller_without_features_has_none_in_its_sequences() -> None:
    seen = {name: np.zeros((3, 1), np.float32) for name in ("accuracy", "compression")}
    seen |= {"keep_mask": np.ones((3, 4), np.int8), "features": np.ones((3, 4, 3), np.float32)}
    actions = np.eye(4, dtype=np.int8)[:2]
    assert MaskPacking(4, 0).pack(seen, actions)["features"].shape == (3, 4, 0)
    del seen["features"]  # nor has an environment that does not show them
    assert MaskPacking(4, 0).pack(seen, actions)["features"].shape == (3, 4, 0)


@given(st.integers(1, 11), st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**32))
def test_vectors_and_actions_come_back_through_the_codec(steps: int, inputs: int, actions: int, seed: int) -> None:
    trace, packing = vectors(steps, inputs=inputs, actions=actions, seed=seed), VectorPacking(inputs, actions)
    sequences = [decode(encode(sequence)) for sequence in cut(trace, CONFIG, packing)]
    batch = collate(sequences, CONFIG, packing, hidden=HIDDEN)
    for b, sequence in enumerate(sequences):
        start, burnt, _ = sequence["place"].tolist()
        length = int(batch.length[b])
        seen = batch.observations[CONFIG.burn_in - burnt :, b][: burnt + length + 1]
        np.testing.assert_array_equal(seen, trace.observations["vector"][start - burnt : start + length + 1])
        assert batch.actions[:length, b].tolist() == trace.actions[start : start + length].tolist()
    assert batch.actions.dtype == torch.int64


def test_the_states_before_the_first_and_the_last_learned_step_travel_along() -> None:
    trace, packing = vectors(5), VectorPacking(2, 3)
    batch = collate(cut(trace, CONFIG, packing), CONFIG, packing, hidden=HIDDEN)
    assert batch.step[0].tolist() == [0, 2]
    assert batch.length.tolist() == [3, 3]
    for states, steps in zip(batch.later_states, ((0, 2), (2, 4)), strict=True):
        np.testing.assert_array_equal(torch.stack(states, dim=1), trace.states[list(steps)])


def test_an_action_that_there_is_not_is_refused() -> None:
    packing = VectorPacking(2, 3)
    (sequence,) = cut(vectors(2), CONFIG, packing)
    sequence["action"] = np.array([3, 0], np.int32)
    with pytest.raises(ForeignSequenceError, match="action: expected 0 to 2, got 0 to 3"):
        collate([sequence], CONFIG, packing, hidden=HIDDEN)


@pytest.mark.parametrize("packing", [MaskPacking(5, 2), VectorPacking(2, 3)], ids=["masks", "vectors"])
def test_sequences_of_another_kind_are_refused(packing: Packing) -> None:
    other: Packing = VectorPacking(4, 3)
    (sequence,) = cut(vectors(2, inputs=4), CONFIG, other)
    with pytest.raises(ForeignSequenceError, match="expected"):
        collate([sequence], CONFIG, packing, hidden=HIDDEN)


def test_padding_keeps_every_filter_and_is_otherwise_zero() -> None:
    blank: Arrays = MaskPacking(5, 2).blank_observations(2, 3)
    seen = MaskPacking(5, 2).tensors(blank)
    assert isinstance(seen, Observations)
    assert seen.keep_mask.all()
    assert not any(tensor.any() for tensor in (seen.accuracy, seen.compression, seen.features))
