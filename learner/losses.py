"""The mathematics of R2D2: pure functions of tensors.

Kapturowski et al., "Recurrent Experience Replay in Distributed Reinforcement Learning", ICLR 2019 (R2D2), with the
value rescaling of Pohlen et al. 2018. Axes: T time, B batch. Called by learner/learner.py.
"""

import torch
from torch import Tensor

__all__ = [
    "n_step_targets",
    "q_discrepancy",
    "r2d2_loss",
    "rescale",
    "sequence_priorities",
    "unrescale",
]

_RESCALING_EPSILON = 1e-3  # R2D2, section 2.3


def rescale(x: Tensor, epsilon: float = _RESCALING_EPSILON) -> Tensor:
    """Invertible value rescaling h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x."""
    return x.sign() * ((x.abs() + 1.0).sqrt() - 1.0) + epsilon * x


def unrescale(x: Tensor, epsilon: float = _RESCALING_EPSILON) -> Tensor:
    """The inverse of `rescale` (Pohlen et al. 2018, proposition A.2)."""
    shifted = x.abs() + 1.0 + epsilon
    # (sqrt(1 + 4 epsilon s) - 1) / (2 epsilon) of the paper, without the difference that costs float32 its digits
    root = 2.0 * shifted / ((1.0 + 4.0 * epsilon * shifted).sqrt() + 1.0)
    return x.sign() * (root - 1.0) * (root + 1.0)


def n_step_targets(
    rewards: Tensor, values: Tensor, terminated: Tensor, length: Tensor, *, n_step: int, discount: float
) -> Tensor:
    """Returns over n steps, then the value of the state reached; shorter where the sequence ends.

        G_t = sum_{k < m} discount^k r_{t+k} + discount^m V_{t+m},   m = min(n, length - t)

    and V is 0 after termination.

    Args:
        rewards: float [T, B].
        values: float [T + 1, B], unrescaled value of the state before each step and after the last.
        terminated: bool [T, B], whether the episode terminated with this step.
        length: int64 [B], how many steps of each sequence are real.
        n_step: at least 1.
        discount: in (0, 1].

    Returns:
        float [T, B]; meaningless at padded steps.

    """
    steps, batch = rewards.shape
    if values.shape != (steps + 1, batch) or terminated.shape != rewards.shape or length.shape != (batch,):
        raise ValueError(
            f"expected values [{steps + 1}, {batch}], terminated [{steps}, {batch}], length [{batch}]; got "
            f"{list(values.shape)}, {list(terminated.shape)}, {list(length.shape)}"
        )
    real = torch.arange(steps, device=rewards.device)[:, None] < length
    reward = torch.where(real, rewards, 0.0)
    # Padding hands on the last real state's value untouched, which is what shortens n at the end of a sequence.
    gamma = torch.where(real, discount * (~terminated).to(rewards.dtype), 1.0)
    last = values.gather(0, length[None])
    value = torch.where(torch.arange(steps + 1, device=rewards.device)[:, None] <= length, values, last)
    padded_reward = torch.cat([reward, torch.zeros_like(reward[:1]).expand(n_step, -1)])
    padded_gamma = torch.cat([gamma, torch.ones_like(gamma[:1]).expand(n_step, -1)])
    padded_value = torch.cat([value, last.expand(n_step, -1)])
    target = padded_value[n_step : n_step + steps]
    for k in reversed(range(n_step)):
        target = padded_reward[k : k + steps] + padded_gamma[k : k + steps] * target
    return target


def sequence_priorities(td_error: Tensor, valid: Tensor, *, eta: float) -> Tensor:
    """Priority of each sequence: eta max |delta| + (1 - eta) mean |delta| over its real steps (R2D2, section 2.3).

    Args:
        td_error: float [T, B], in rescaled units.
        valid: bool [T, B].
        eta: in [0, 1].

    """
    error = td_error.abs() * valid
    mean = error.sum(0) / valid.sum(0).clamp(min=1)
    return eta * error.amax(0) + (1.0 - eta) * mean


def r2d2_loss(q_taken: Tensor, targets: Tensor, valid: Tensor, weights: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, summed over a sequence's real steps, weighted, averaged over the batch.

    Args:
        q_taken: float [T, B], rescaled Q of the actions taken; carries the gradient.
        targets: float [T, B], rescaled; no gradient flows into it.
        valid: bool [T, B].
        weights: float [B], importance-sampling weights.
        eta: of the priorities.

    Returns:
        The loss [] and the new priorities [B].

    """
    error = torch.where(valid, targets.detach() - q_taken, 0.0)
    loss = (weights * 0.5 * error.square().sum(0)).mean()
    return loss, sequence_priorities(error.detach(), valid, eta=eta)


def q_discrepancy(q_trained: Tensor, q_stored: Tensor) -> Tensor:
    """How much Q differs where a network starts from the state it is trained from and from the one an actor had.

        Delta Q = || q(h_trained) - q(h_stored) ||_2 / | max_a q(h_trained)_a |

    R2D2, section 3: the measure of representational drift and of recurrent states gone stale. Where the largest Q is
    nearly 0 the quotient says nothing, so the divisor is at least 1e-3.

    Args:
        q_trained: float [..., A], from the state after burn-in and unroll by today's weights.
        q_stored: float [..., A], by the same weights from the state the actor had there.

    Returns:
        float [...].

    """
    if q_trained.shape != q_stored.shape:
        raise ValueError(f"expected equal shapes, got {list(q_trained.shape)} and {list(q_stored.shape)}")
    distance = (q_trained - q_stored).square().sum(-1).sqrt()
    return distance / q_trained.amax(-1).abs().clamp(min=1e-3)
