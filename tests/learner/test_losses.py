import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.losses import n_step_targets, q_discrepancy, r2d2_loss, rescale, sequence_priorities, unrescale


def targets(
    rewards: list[float], values: list[float], *, ended: int | None = None, length: int | None = None, n: int, d: float
) -> list[float]:
    """The targets of one sequence; `ended` is the step with which its episode terminated."""
    terminated = torch.tensor([[t == ended] for t in range(len(rewards))])
    result = n_step_targets(
        torch.tensor(rewards)[:, None],
        torch.tensor(values)[:, None],
        terminated,
        torch.tensor([len(rewards) if length is None else length]),
        n_step=n,
        discount=d,
    )
    assert result.shape == (len(rewards), 1)
    return list(result[:, 0].tolist())


def one_by_one(
    rewards: Tensor, values: Tensor, terminated: Tensor, length: Tensor, *, n_step: int, discount: float
) -> Tensor:
    """The definition, element by element; 0 at padded steps."""
    result = torch.zeros_like(rewards)
    for b in range(rewards.shape[1]):
        for t in range(int(length[b])):
            end = min(t + n_step, int(length[b]))
            total, factor = 0.0, 1.0
            for k in range(t, end):
                total += factor * float(rewards[k, b])
                factor *= 0.0 if terminated[k, b] else discount
            result[t, b] = total + factor * float(values[end, b])
    return result


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    steps, batch = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return {
        "rewards": torch.randn(steps, batch, generator=random, dtype=torch.float64),
        "values": torch.randn(steps + 1, batch, generator=random, dtype=torch.float64),
        "terminated": torch.rand(steps, batch, generator=random) < 0.2,
        "length": torch.randint(1, steps + 1, (batch,), generator=random),
        "n_step": draw(st.integers(1, 9)),
        "discount": draw(st.sampled_from([0.5, 0.997, 1.0])),
    }


def test_rescaling_is_the_papers_formula() -> None:
    x = torch.tensor([-8.0, -3.0, 0.0, 3.0, 99.0])
    by_hand = [-(3 - 1) - 0.008, -(2 - 1) - 0.003, 0.0, (2 - 1) + 0.003, (10 - 1) + 0.099]
    torch.testing.assert_close(rescale(x), torch.tensor(by_hand))
    torch.testing.assert_close(rescale(x, epsilon=0.5), x.sign() * torch.tensor([2.0, 1.0, 0.0, 1.0, 9.0]) + 0.5 * x)


def test_unrescaling_by_hand() -> None:
    torch.testing.assert_close(
        unrescale(torch.tensor([0.0, 1.003, -2.008, 9.099])), torch.tensor([0.0, 3.0, -8.0, 99.0])
    )


@given(st.floats(-1e4, 1e4, width=32))
def test_unrescaling_undoes_rescaling_to_float32s_last_digits(x: float) -> None:
    there_and_back = unrescale(rescale(torch.tensor(x))).item()
    # the paper's own form of the inverse is off by 1e-4 around 0.01
    assert there_and_back == pytest.approx(x, rel=2e-5, abs=2e-6)


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_rescaling_keeps_the_order(x: float, y: float) -> None:
    low, high = sorted([x, y])
    a, b = rescale(torch.tensor([low, high], dtype=torch.float64)).tolist()
    assert a <= b
    assert a < b or high - low < 1e-9


def test_inside_a_sequence_the_target_is_n_rewards_and_the_value_behind_them() -> None:
    got = targets([1.0, 2.0, 3.0, 4.0], [9.0, 9.0, 10.0, 20.0, 30.0], n=2, d=0.5)
    # r0 + r1/2 + V2/4, and so on; the last step has only its own reward and the value after it
    assert got == [1 + 1 + 2.5, 2 + 1.5 + 5, 3 + 2 + 7.5, 4 + 15]


def test_at_a_sequences_end_fewer_steps_are_used_and_the_last_value_is_discounted_by_as_many() -> None:
    assert targets([1.0, 2.0, 3.0], [9.0, 9.0, 9.0, 8.0], n=5, d=0.5) == [
        1 + 1 + 0.75 + 1,
        2 + 1.5 + 2,
        3 + 4,
    ]


def test_nothing_counts_after_termination() -> None:
    got = targets([1.0, 2.0, 4.0], [9.0, 9.0, 9.0, 1000.0], ended=2, n=2, d=0.5)
    assert got == [1 + 1 + 9 / 4, 2 + 2, 4]


def test_termination_in_the_middle_cuts_what_lies_behind_it() -> None:
    assert targets([1.0, 2.0, 4.0], [9.0, 9.0, 9.0, 8.0], ended=0, n=3, d=0.5) == [1, 2 + 2 + 2, 4 + 4]


def test_one_step_targets_are_a_reward_and_the_next_value() -> None:
    assert targets([1.0, 2.0], [9.0, 4.0, 6.0], n=1, d=0.5) == [3, 5]


def test_padding_shortens_n_as_the_sequences_end_does() -> None:
    whole = targets([1.0, 2.0, 3.0], [9.0, 9.0, 9.0, 8.0], n=2, d=0.5)
    padded = targets([1.0, 2.0, 3.0, 70.0, 80.0], [9.0, 9.0, 9.0, 8.0, 50.0, 60.0], length=3, n=2, d=0.5)
    assert padded[:3] == whole


@given(batches())
def test_targets_are_those_of_the_definition_element_by_element(batch: dict[str, Any]) -> None:
    real = torch.arange(len(batch["rewards"]))[:, None] < batch["length"]
    torch.testing.assert_close(torch.where(real, n_step_targets(**batch), 0.0), one_by_one(**batch))


@given(batches(), st.sampled_from([1e6, math.inf, math.nan]))
def test_what_stands_at_padded_steps_changes_no_target_of_a_real_one(batch: dict[str, Any], rubbish: float) -> None:
    steps, length = len(batch["rewards"]), batch["length"]
    real = torch.arange(steps)[:, None] < length
    reached = torch.arange(steps + 1)[:, None] <= length
    other = batch | {
        "rewards": torch.where(real, batch["rewards"], rubbish),
        "values": torch.where(reached, batch["values"], rubbish),
        "terminated": batch["terminated"] | ~real,
    }
    assert torch.equal(n_step_targets(**batch)[real], n_step_targets(**other)[real])


def test_arrays_that_do_not_fit_are_refused_with_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected values \[6, 3\].*got \[5, 3\], \[5, 3\], \[3\]"):
        n_step_targets(
            torch.zeros(5, 3),
            torch.zeros(5, 3),
            torch.zeros(5, 3, dtype=torch.bool),
            torch.ones(3, dtype=torch.int64),
            n_step=1,
            discount=1.0,
        )


def test_a_priority_is_eta_of_the_largest_error_and_the_rest_of_the_mean_over_real_steps() -> None:
    errors = torch.tensor([[1.0, 4.0], [-3.0, 100.0], [2.0, 100.0]])
    valid = torch.tensor([[True, True], [True, False], [True, False]])
    got = sequence_priorities(errors, valid, eta=0.75)
    assert got.tolist() == [0.75 * 3 + 0.25 * 2, 4.0]
    assert sequence_priorities(errors, valid, eta=1.0).tolist() == [3.0, 4.0]
    assert sequence_priorities(errors, valid, eta=0.0).tolist() == [2.0, 4.0]


def test_the_loss_by_hand() -> None:
    q = torch.tensor([[1.0, 0.0], [5.0, 7.0]])
    aims = torch.tensor([[3.0, 1.0], [4.0, 7.0]])
    valid = torch.tensor([[True, True], [True, False]])
    loss, priorities = r2d2_loss(q, aims, valid, torch.tensor([0.5, 2.0]), eta=0.5)
    # sequence 0: (2^2 + 1^2) / 2 * 0.5; sequence 1: 1^2 / 2 * 2; their mean
    assert loss.item() == (1.25 + 1.0) / 2
    assert priorities.tolist() == [0.5 * 2 + 0.5 * 1.5, 1.0]


@given(st.sampled_from([1e6, math.inf, math.nan]))
def test_padding_is_never_in_the_loss_the_priorities_or_the_gradient(rubbish: float) -> None:
    valid = torch.tensor([[True, True, True], [True, False, True], [False, False, True]])
    results = []
    for padding in (0.0, rubbish):
        q = torch.where(valid, torch.arange(9.0).view(3, 3), padding).requires_grad_()
        loss, priorities = r2d2_loss(q, torch.full((3, 3), padding).where(~valid, 2.0), valid, torch.ones(3), eta=0.9)
        loss.backward()  # type: ignore[no-untyped-call]
        results.append((loss.detach(), priorities, q.grad))
    for calm, wild in zip(*results, strict=True):
        assert torch.equal(calm, wild)
    assert results[0][2] is not None
    assert (results[0][2][~valid] == 0).all()


def test_weights_scale_each_sequences_gradient() -> None:
    q = torch.zeros(5, 3, requires_grad=True)
    loss, _ = r2d2_loss(q, torch.ones(5, 3), torch.ones(5, 3, dtype=torch.bool), torch.tensor([1.0, 0.5, 0.0]), eta=0.9)
    loss.backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None
    torch.testing.assert_close(q.grad, torch.tensor([-1 / 3, -0.5 / 3, 0.0]).expand(5, 3))


def test_no_gradient_flows_into_targets_or_priorities() -> None:
    q, aims = torch.zeros(5, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    loss, priorities = r2d2_loss(q, aims, torch.ones(5, 3, dtype=torch.bool), torch.ones(3), eta=0.9)
    loss.backward()  # type: ignore[no-untyped-call]
    assert aims.grad is None
    assert not priorities.requires_grad


# -- stale recurrent states


def test_the_q_discrepancy_by_hand() -> None:
    trained, stored = torch.tensor([[3.0, -8.0], [0.0, 0.0]]), torch.tensor([[0.0, -4.0], [0.0, 0.0]])
    assert q_discrepancy(trained, stored).tolist() == [pytest.approx(5 / 3), 0.0]


def test_the_q_discrepancy_of_a_q_near_zero_stays_finite() -> None:
    assert q_discrepancy(torch.zeros(2), torch.tensor([3e-3, 4e-3])).item() == pytest.approx(5.0)


def test_qs_of_different_shapes_have_no_discrepancy() -> None:
    with pytest.raises(ValueError, match=r"expected equal shapes, got \[2\] and \[3\]"):
        q_discrepancy(torch.zeros(2), torch.zeros(3))
