import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from agents.controller import Controller, ControllerConfig, Observations
from agents.ladder import Ladder
from agents.network import DuelingJudgement, Judgement, RecurrentState
from env.channels import ChannelPlan
from env.errors import NonFiniteError, UserError
from env.measure import Measure
from env.networks import small
from learner import checkpoint
from learner.learner import Learner, LearnerConfig, first_priorities
from learner.packing import MaskPacking
from learner.sequence import Batch, EpisodeTrace, SequenceConfig, collate
from learner.sequence import cut as cut_with

HIDDEN, KINDS = 7, 3
SEQUENCES = SequenceConfig(burn_in=2, unroll_length=5, sequence_period=3)
Arrays = dict[str, np.ndarray]


@dataclass
class Sample:
    keys: list[str]
    weights: np.ndarray
    arrays: list[Arrays]


@dataclass
class MemoryReplay:
    """Draws by a counter, so that what is drawn does not depend on who asks; remembers the priorities."""

    sequences: list[Arrays]
    draws: int = 0
    whole: bool = False  # always everything, in order
    priorities: list[tuple[list[str], list[float]]] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)

    def sample(self, batch_size: int) -> Sample | None:
        if not self.sequences:
            return None
        random = np.random.default_rng(self.draws)
        self.draws += 1
        drawn = random.integers(len(self.sequences), size=batch_size)
        chosen = range(len(self.sequences)) if self.whole else drawn.tolist()
        weights = np.ones(len(chosen)) if self.whole else random.uniform(0.2, 1.0, batch_size)
        return Sample([f"7:{i}" for i in chosen], weights, [self.sequences[i] for i in chosen])

    def update(self, keys: list[str], priorities: np.ndarray) -> int:
        self.priorities.append((keys, priorities.tolist()))
        return len(keys)

    def reject(self, keys: list[str]) -> int:
        self.rejected += keys
        return len(keys)


@functools.cache
def plan() -> ChannelPlan:
    return ChannelPlan(small(width=0.1), torch.zeros(1, 1, 8, 8))


@functools.cache
def ladder() -> Ladder:
    given = int(plan().parameters(plan().widths))
    return Ladder(plan(), measure=Measure("parameters", given), targets=(0.8,), waypoints=9, min_width=1)


def packing(kinds: int = KINDS) -> MaskPacking:
    return MaskPacking(plan().units, kinds)


def cut(trace: EpisodeTrace, config: SequenceConfig) -> list[Arrays]:
    return cut_with(trace, config, packing())


def controller(seed: int = 0, observation: str = "features") -> Controller:
    """A Controller whose every weight matters (a fresh one judges by its prior alone)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Controller(ControllerConfig(observation=observation, hidden_size=HIDDEN, layer_size=5), plan())
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
    return made


def learner(
    sequences: list[Arrays] | None = None,
    *,
    seed: int = 0,
    config: SequenceConfig = SEQUENCES,
    whole: bool = False,
    **changes: Any,
) -> Learner:
    settings = LearnerConfig(**{"batch_size": 5, "n_step": 2, "discount": 0.9, **changes})
    replay = MemoryReplay(sequences or [], whole=whole)
    return Learner(controller(seed), ladder(), replay, settings, config, packing())


def episode(steps: int = 9, *, seed: int = 0) -> EpisodeTrace:
    """A random episode on the tiny network that climbs the ladder; its recurrent states are zero."""
    random = torch.Generator().manual_seed(seed)
    keep_mask, actions = [torch.ones(plan().units, dtype=torch.bool)], []
    for t in range(steps):
        scores = torch.randn(1, plan().units, generator=random)
        actions.append(ladder().cut(scores, keep_mask[-1][None], torch.tensor([t]))[0])
        keep_mask.append(keep_mask[-1] & ~actions[-1])
    return EpisodeTrace(
        observations={
            "accuracy": torch.rand(steps + 1, generator=random).numpy(),
            "compression": ladder().compression(torch.stack(keep_mask)).float().numpy(),
            "keep_mask": torch.stack(keep_mask).numpy(),
            "features": torch.randn(steps + 1, plan().units, KINDS, generator=random).half().numpy(),
        },
        actions=torch.stack(actions).numpy(),
        rewards=-torch.rand(steps, generator=random).numpy(),
        states=np.zeros((steps, 2, HIDDEN), np.float32),
        terminated=True,
    )


def lived(trace: EpisodeTrace, network: Controller) -> EpisodeTrace:
    """The episode with the recurrent states that `network` would have had in it."""
    state, states = network.initial_state(), []
    for t in range(len(trace)):
        states.append(torch.cat(state).numpy())
        now = {name: torch.from_numpy(array[t : t + 1])[None] for name, array in trace.observations.items()}
        seen = Observations(**{**now, "features": now["features"].float()})
        with torch.no_grad():
            _, state = network(seen, state)
    return replace(trace, states=np.stack(states))


def batch_of(sequences: list[Arrays], config: SequenceConfig = SEQUENCES) -> Batch:
    return collate(sequences, config, packing(), hidden=HIDDEN)


def weights_of(network: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in network.state_dict().values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "learner.batch_size: expected at least 1, got 0"),
        ({"n_step": 0}, "learner.n_step: expected at least 1, got 0"),
        ({"target_update_period": 0}, "learner.target_update_period: expected at least 1, got 0"),
        ({"max_bad_updates": 0}, "learner.max_bad_updates: expected at least 1, got 0"),
        ({"learning_rate": math.nan}, "learner.learning_rate: expected above 0, got nan"),
        ({"gradient_clip": 0.0}, "learner.gradient_clip: expected above 0, got 0.0"),
        ({"discount": 1.01}, r"learner.discount: expected in \(0, 1\], got 1.01"),
        ({"delta_q_period": -1}, "learner.delta_q_period: expected at least 0, got -1"),
        ({"precision": "float16"}, r"learner.precision: expected float32 \| bfloat16, got 'float16'"),
        ({"priority_eta": -0.1}, r"learner.priority_eta: expected in \[0, 1\], got -0.1"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        LearnerConfig(**changes)


def test_an_empty_replay_means_no_update() -> None:
    idle = learner()
    assert idle.update() is None
    assert (idle.updates, idle.skipped) == (0, 0)


# -- burn-in


def test_the_burn_in_matters_and_carries_no_gradient_in_either_network() -> None:
    learning = learner()
    batch = batch_of(cut(episode(), SEQUENCES)[1:])
    assert batch.burnt.all()

    def loss_of(accuracy: torch.Tensor) -> torch.Tensor:
        seen = replace(batch.observations, accuracy=accuracy)
        return learning.loss(replace(batch, observations=seen), torch.ones(len(batch.length)))[0]

    leaf = batch.observations.accuracy.clone().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert leaf.grad[: SEQUENCES.burn_in].eq(0).all()
    assert leaf.grad[SEQUENCES.burn_in].ne(0).all()
    assert all(parameter.grad is None for parameter in learning.target.parameters())
    warmed_otherwise = batch.observations.accuracy.clone()
    warmed_otherwise[: SEQUENCES.burn_in] += 1.0
    assert loss_of(warmed_otherwise).item() != pytest.approx(loss.item(), rel=1e-6)


def test_the_warmed_state_requires_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    learning, starts = learner(), list[RecurrentState]()
    for network in (learning.controller, learning.target):

        def spy(
            seen: Observations, state: RecurrentState, forward: Callable[..., Any] = network.forward
        ) -> tuple[Judgement, RecurrentState]:
            starts.append(state)
            result: tuple[Judgement, RecurrentState] = forward(seen, state)
            return result

        monkeypatch.setattr(network, "forward", spy)
    batch = batch_of(cut(episode(), SEQUENCES))
    learning.loss(batch, torch.ones(len(batch.length)))
    assert len(starts) == 2  # the learned part, by both networks
    assert not any(tensor.requires_grad for state in starts for tensor in state)
    warmed = starts[0][0]
    assert torch.equal(warmed[0], batch.state[0][0])  # the first sequence has no burn-in: its state is the stored one
    assert not torch.equal(warmed[1], batch.state[0][1])


def test_a_sequence_without_burn_in_ignores_what_stands_before_it() -> None:
    learning = learner()
    batch = batch_of(cut(episode(), SEQUENCES)[:1])
    noisy = batch.observations.accuracy.clone()
    noisy[: SEQUENCES.burn_in] = 100.0
    other = replace(batch, observations=replace(batch.observations, accuracy=noisy))
    assert torch.equal(learning.loss(batch, torch.ones(1))[0], learning.loss(other, torch.ones(1))[0])


def test_a_stored_state_does_what_recomputing_the_whole_episode_does_and_a_zeroed_one_does_not() -> None:
    trace = lived(episode(9), controller())
    stored = SequenceConfig(burn_in=2, unroll_length=4, sequence_period=4)
    recomputed = SequenceConfig(burn_in=4, unroll_length=4, sequence_period=4)  # from the episode's start on

    def priorities(config: SequenceConfig, played: EpisodeTrace) -> torch.Tensor:
        batch = batch_of([cut(played, config)[1]], config)
        return learner(config=config).loss(batch, torch.ones(1))[1]

    zeroed = replace(trace, states=np.zeros_like(trace.states))
    right = priorities(recomputed, trace)
    torch.testing.assert_close(priorities(stored, trace), right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(priorities(recomputed, zeroed), right, rtol=0, atol=0)
    assert (priorities(stored, zeroed) - right).abs().item() > 1e-4


# -- stale states


def test_delta_q_is_zero_for_states_of_todays_weights_and_not_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SequenceConfig(burn_in=3, unroll_length=3, sequence_period=3)

    def measured(trace: EpisodeTrace) -> tuple[float, float] | None:
        sequences = cut(trace, config)
        learning = learner(sequences, config=config, whole=True, delta_q_period=1)
        monkeypatch.setattr(learning.optimizer, "step", lambda: None)  # the weights stay today's
        report = learning.update()
        assert report is not None
        return report.delta_q

    fresh = measured(lived(episode(9), controller()))
    stale = measured(lived(episode(9), controller(seed=1)))
    assert fresh == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5))
    assert stale is not None
    assert min(stale) > 1e-3


def test_delta_q_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = learner(delta_q_period=1)
    batch = batch_of(cut(episode(4), SEQUENCES))  # one sequence of 4 steps
    units = plan().units
    q = torch.zeros(SEQUENCES.unroll_length + 1, 1, units)
    q[0, 0, 0], q[3, 0, :2] = 2.0, torch.tensor([5.0, -1.0])

    def forward(seen: Observations, state: RecurrentState) -> tuple[Judgement, RecurrentState]:
        return Judgement(value=torch.zeros(len(seen.accuracy), 1)), state

    def q_all(judgement: Judgement, seen: Observations) -> torch.Tensor:
        return q if len(judgement.value) > 1 else torch.ones(1, 1, units)

    monkeypatch.setattr(learning.controller, "forward", forward)
    monkeypatch.setattr(learning.controller, "q_all", q_all)
    first, last = learning._delta_q(batch) or (0.0, 0.0)
    # first: one difference of 1 and the rest of 1 each; last: (5 - 1)^2 + (-1 - 1)^2 and the rest of 1 each
    assert first == pytest.approx(math.sqrt(units) / 2)
    assert last == pytest.approx(math.sqrt(16 + 4 + units - 2) / 5)


def test_delta_q_is_measured_every_delta_q_period_and_never_at_0() -> None:
    for period, expected in ((3, [False, False, True, False, False, True]), (0, [False] * 6)):
        learning = learner(cut(episode(), SEQUENCES), delta_q_period=period)
        reports = [learning.update() for _ in range(6)]
        assert [report is not None and report.delta_q is not None for report in reports] == expected


# -- an actor's first priorities


def test_first_priorities_are_the_learners_own_while_its_networks_are_the_actors() -> None:
    sequences, settings = cut(episode(), SEQUENCES), LearnerConfig(n_step=2, discount=0.9)
    learning = learner(sequences)  # whose target network is still a copy
    _, expected = learning.loss(batch_of(sequences), torch.ones(len(sequences)))
    found = first_priorities(controller(), ladder(), sequences, settings, SEQUENCES, packing())
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_bfloat16_learns_too() -> None:
    changes: dict[str, Any] = {"whole": True, "learning_rate": 3e-3, "precision": "bfloat16"}
    learning = learner(cut(episode(), SEQUENCES), **changes)
    losses = [report.loss for report in (learning.update() for _ in range(120)) if report is not None]
    assert len(losses) == 120
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in learning.controller.parameters())


# -- double Q


def test_the_set_is_chosen_by_the_online_network_and_valued_by_the_target_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # four filters, each worth 11 of 46 parameters: the waypoints 0.225 and 0.45 ask for one more each
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    four = ChannelPlan(network, torch.zeros(1, 1, 8, 8))
    assert four.units == 4
    steps = Ladder(four, measure=Measure("parameters", 46), targets=(0.45,), waypoints=2, min_width=1)
    config = SequenceConfig(burn_in=0, unroll_length=2, sequence_period=2)
    settings = LearnerConfig(n_step=1, discount=0.5, priority_eta=0.75)
    judge = Controller(ControllerConfig(hidden_size=HIDDEN, advantage_scale=0.1), four)
    learning = Learner(judge, steps, MemoryReplay([]), settings, config, MaskPacking(4, KINDS))
    actions = np.array([[1, 0, 0, 0], [0, 1, 0, 0]], bool)
    trace = EpisodeTrace(
        observations={
            "accuracy": np.zeros(3, np.float32),
            "compression": np.zeros(3, np.float32),
            "keep_mask": np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]], bool),
            "features": np.zeros((3, 4, KINDS), np.float16),
        },
        actions=actions,
        rewards=np.array([-1, -2], np.float32),
        states=np.zeros((2, 2, HIDDEN), np.float32),
        terminated=True,
    )
    online = DuelingJudgement(
        value=torch.tensor([[0.7], [0.3], [99.0]], requires_grad=True),
        advantage=torch.tensor([[4.0, 0, 0, 0], [9, 0, 3, 6], [0, 0, 0, 0]])[:, None],
    )
    target = DuelingJudgement(
        value=torch.tensor([[99.0], [1.303], [99.0]]),
        advantage=torch.tensor([[0.0, 0, 0, 0], [50, 5, 2, -1], [0, 0, 0, 0]])[:, None],
    )
    monkeypatch.setattr(learning.controller, "forward", lambda seen, state: (online, state))
    monkeypatch.setattr(learning.target, "forward", lambda seen, state: (target, state))
    four_wide = MaskPacking(4, KINDS)
    batch = collate(cut_with(trace, config, four_wide), config, four_wide, hidden=HIDDEN)
    loss, priorities = learning.loss(batch, torch.ones(1))
    # Q of what was done: 0.7 + 0.1 (4 - 1) = 1 and 0.3 + 0.1 (0 - 3) = 0.
    # After step 0 the online network would remove filter 3 (0 is gone), the target network filter 1. The target
    # network gives {3} the value 1.303 + 0.1 (-1 - 2) = 1.003 = h(3), so the first target is h(-1 + 0.5 * 3).
    # The second ends the episode: h(-2).
    first = math.sqrt(1.5) - 1 + 0.0005 - 1.0
    second = -(math.sqrt(3.0) - 1) - 0.002 - 0.0
    assert loss.item() == pytest.approx((first**2 + second**2) / 2, rel=1e-5)
    larger, mean = max(abs(first), abs(second)), (abs(first) + abs(second)) / 2
    assert priorities.item() == pytest.approx(0.75 * larger + 0.25 * mean, rel=1e-5)


# -- updates


def test_the_target_network_is_copied_every_target_update_period() -> None:
    learning = learner(cut(episode(), SEQUENCES), target_update_period=3)
    copied, equalities = weights_of(learning.target), []
    for _ in range(7):
        assert learning.update() is not None
        equalities.append(equal(weights_of(learning.target), weights_of(learning.controller)))
        if learning.updates == 2:
            assert equal(weights_of(learning.target), copied)
    assert equalities == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("number", [0, 1])
def test_more_padding_changes_neither_loss_nor_priority(number: int) -> None:
    sequence = cut(episode(8, seed=3), SEQUENCES)[number]
    results = [
        learner(config=config).loss(batch_of([sequence], config), torch.tensor([0.7]))
        for config in (SEQUENCES, replace(SEQUENCES, unroll_length=11))
    ]
    for tight, loose in zip(*results, strict=True):
        torch.testing.assert_close(tight, loose, rtol=1e-6, atol=1e-7)


def test_neighbours_in_a_batch_do_not_change_each_others_priorities() -> None:
    learning, sequences = learner(), cut(episode(10), SEQUENCES) + cut(episode(4, seed=1), SEQUENCES)
    together = learning.loss(batch_of(sequences), torch.ones(len(sequences)))[1]
    alone = [learning.loss(batch_of([sequence]), torch.ones(1))[1] for sequence in sequences]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_the_loss_falls_on_a_fixed_batch() -> None:
    learning = learner(cut(episode(), SEQUENCES), whole=True, learning_rate=3e-3, target_update_period=1000)
    reports = [learning.update() for _ in range(200)]
    losses = [report.loss for report in reports if report is not None]
    assert len(losses) == 200
    assert losses[-1] < 0.3 * losses[0]


def test_a_report_tells_what_was_done_and_the_priorities_go_back_under_their_keys() -> None:
    learning = learner(cut(episode(), SEQUENCES), whole=True)
    batch = batch_of(cut(episode(), SEQUENCES))
    loss, expected = learning.loss(batch, torch.ones(len(batch.length)))
    report = learning.update()
    assert report is not None
    assert isinstance(learning.replay, MemoryReplay)
    ((keys, priorities),) = learning.replay.priorities
    assert keys == [f"7:{i}" for i in range(len(batch.length))]
    assert priorities == pytest.approx(expected.tolist())
    assert report.loss == pytest.approx(loss.item())
    assert report.mean_priority == pytest.approx(expected.mean().item())
    assert report.gradient_norm > 0
    assert report.updates == 1


def test_a_mask_controller_learns_from_sequences_without_features() -> None:
    sequences = cut_with(episode(), SEQUENCES, packing(kinds=0))
    replay, settings = MemoryReplay(sequences, whole=True), LearnerConfig(learning_rate=3e-3)
    learning = Learner(controller(observation="mask"), ladder(), replay, settings, SEQUENCES, packing(kinds=0))
    losses = [report.loss for report in (learning.update() for _ in range(30)) if report is not None]
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]


# -- what is not finite, or not ours


def poisoned() -> list[Arrays]:
    sequences = cut(episode(), SEQUENCES)
    rewards = sequences[1]["rewards"].copy()  # neighbours are views of the same episode
    rewards[2] = np.nan
    sequences[1]["rewards"] = rewards
    return sequences


def test_a_poisoned_sequence_is_removed_and_the_rest_of_its_batch_learned_from(
    caplog: pytest.LogCaptureFixture,
) -> None:
    learning, clean = learner(poisoned(), whole=True), learner(whole=True)
    assert isinstance(learning.replay, MemoryReplay)
    assert isinstance(clean.replay, MemoryReplay)
    clean.replay.sequences = [sequence for i, sequence in enumerate(poisoned()) if i != 1]
    assert learning.update() is not None
    assert clean.update() is not None
    assert equal(weights_of(learning.controller), weights_of(clean.controller))
    assert learning.replay.rejected == ["7:1"]
    assert "7:1 (rewards: expected finite numbers, got NaN or infinity)" in caplog.text
    ((keys, priorities),) = learning.replay.priorities
    assert keys == [f"7:{i}" for i in range(len(poisoned())) if i != 1]
    assert priorities == clean.replay.priorities[0][1]
    assert (learning.updates, learning.skipped) == (1, 0)


def test_a_sample_that_was_prepared_ahead_is_learned_from_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, plain = learner(poisoned(), whole=True), learner(poisoned(), whole=True)
    assert isinstance(ahead.replay, MemoryReplay)
    assert isinstance(plain.replay, MemoryReplay)
    ready = ahead.prepare(ahead.replay.sample(0))
    assert ahead.replay.rejected == []  # to prepare changes nothing
    monkeypatch.setattr(ahead.replay, "sample", lambda _: ready)
    assert ahead.update() == plain.update()
    assert equal(weights_of(ahead.controller), weights_of(plain.controller))
    assert ahead.replay.rejected == plain.replay.rejected == ["7:1"]
    assert ahead.replay.priorities == plain.replay.priorities


def test_a_batch_of_foreign_sequences_alone_is_removed_and_the_next_one_asked_for() -> None:
    foreign = [{"rewards": np.zeros(3, np.float32)} for _ in range(5)]
    learning = learner(foreign, whole=True, max_bad_updates=1)
    before = weights_of(learning.controller)
    assert learning.update() is None
    assert isinstance(learning.replay, MemoryReplay)
    assert sorted(learning.replay.rejected) == [f"7:{i}" for i in range(5)]
    assert equal(weights_of(learning.controller), before)
    assert not learning.optimizer.state_dict()["state"]
    learning.replay.sequences = cut(episode(), SEQUENCES)
    assert learning.update() is not None


def test_after_max_bad_updates_in_a_row_an_error_names_the_sequences_and_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    learning = learner(cut(episode(), SEQUENCES), whole=True, max_bad_updates=3)
    next(learning.controller.parameters()).register_hook(lambda gradient: gradient * math.nan)
    before = weights_of(learning.controller)
    assert [learning.update() for _ in range(2)] == [None, None]
    assert "update skipped on sequences 7:0, 7:1, 7:2: the loss or a gradient is not finite" in caplog.text
    with pytest.raises(NonFiniteError, match=r"3 updates in a row .* on sequences 7:0, 7:1, 7:2: .*lower") as caught:
        learning.update()
    assert "\n" not in str(caught.value)
    assert learning.skipped == 3
    assert isinstance(learning.replay, MemoryReplay)
    assert learning.replay.rejected == []  # no sequence alone is to blame
    assert equal(weights_of(learning.controller), before)


def test_a_good_update_ends_the_row_of_bad_ones() -> None:
    learning = learner(overflowing(), whole=True, max_bad_updates=2)
    assert isinstance(learning.replay, MemoryReplay)
    for _ in range(3):
        learning.replay.sequences = overflowing()
        assert learning.update() is None
        learning.replay.sequences = cut(episode(), SEQUENCES)
        assert learning.update() is not None
    assert (learning.updates, learning.skipped) == (3, 3)


def overflowing() -> list[Arrays]:
    sequences = cut(episode(), SEQUENCES)
    rewards = sequences[0]["rewards"].copy()
    rewards[0] = 1e38  # its step is that sequence's alone
    sequences[0]["rewards"] = rewards
    return sequences


def test_a_sequence_whose_loss_overflows_is_named_and_removed_and_nothing_is_written_back() -> None:
    learning = learner(overflowing(), whole=True, max_bad_updates=2, priority_eta=1.0)
    before = weights_of(learning.controller)
    assert learning.update() is None
    with pytest.raises(NonFiniteError, match=r"on sequences 7:0: .*not finite; lower learner.learning_rate"):
        learning.update()
    assert isinstance(learning.replay, MemoryReplay)
    assert learning.replay.rejected == ["7:0", "7:0"]
    assert learning.replay.priorities == []
    assert equal(weights_of(learning.controller), before)


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    learning = learner(cut(episode(), SEQUENCES))
    next(learning.controller.parameters()).register_hook(lambda gradient: gradient * math.nan)
    before = weights_of(learning.controller)
    assert learning.update() is None
    assert learning.skipped == 1
    assert equal(weights_of(learning.controller), before)


# -- resume


@pytest.mark.parametrize("interrupted_after", [1, 5, 6])
def test_a_resumed_learner_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, interrupted_after: int) -> None:
    sequences = cut(episode(), SEQUENCES) + cut(episode(5, seed=1), SEQUENCES)
    whole, first = (learner(sequences, target_update_period=3) for _ in range(2))
    for _ in range(11):
        whole.update()
    for _ in range(interrupted_after):
        first.update()
    first.skipped = 2
    checkpoint.save(tmp_path, first.state_dict(), first.updates)
    second = learner(sequences, seed=1, target_update_period=3)
    assert isinstance(second.replay, MemoryReplay)
    second.replay.draws = interrupted_after
    state = checkpoint.load_newest(tmp_path)
    assert state is not None
    second.load_state_dict(state)
    assert (second.updates, second.skipped) == (interrupted_after, 2)
    while second.updates < whole.updates:
        second.update()
    assert equal(weights_of(second.controller), weights_of(whole.controller))
    assert equal(weights_of(second.target), weights_of(whole.target))
    for mine, theirs in zip(
        second.optimizer.state_dict()["state"].values(), whole.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert equal(list(mine.values()), list(theirs.values()))
