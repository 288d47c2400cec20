import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from agents.discrete import Argmax, DiscreteConfig, DiscreteNetwork, EpsilonGreedy
from agents.network import DuelingJudgement


def network(*, memory: bool = True, seed: int = 0, actions: int = 3) -> DiscreteNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DiscreteNetwork(DiscreteConfig(inputs=2, actions=actions, hidden_size=5, memory=memory))


def test_q_is_value_plus_advantage_less_its_mean() -> None:
    judgement = DuelingJudgement(value=torch.tensor([[2.0]]), advantage=torch.tensor([[[1.0, 3.0, 5.0]]]))
    made, seen = network(), torch.zeros(1, 1, 2)
    assert made.q_all(judgement, seen).tolist() == [[[0.0, 2.0, 4.0]]]
    assert made.q_of(judgement, torch.tensor([[2]]), seen).tolist() == [[4.0]]
    assert Argmax().greedy(made.advantages(judgement, seen), seen, torch.zeros(1, 1)).tolist() == [[2]]


def test_steps_in_a_row_are_judged_as_one_after_the_other() -> None:
    made, seen = network(), torch.randn(7, 3, 2)
    together, last = made(seen, made.initial_state(3))
    state, apart = made.initial_state(3), []
    for t in range(7):
        judgement, state = made(seen[t : t + 1], state)
        apart.append(judgement.advantage)
    torch.testing.assert_close(together.advantage, torch.cat(apart))
    torch.testing.assert_close(last, state)
    assert together[2:4].value.shape == (2, 3)


def test_with_memory_the_past_matters_and_without_it_does_not() -> None:
    seen = torch.randn(4, 1, 2)
    other = torch.cat([torch.randn(3, 1, 2), seen[3:]])
    for memory in (True, False):
        made = network(memory=memory)
        one, _ = made(seen, made.initial_state())
        two, state = made(other, made.initial_state())
        assert torch.equal(one.advantage[3], two.advantage[3]) is not memory
        assert bool(state[0].any()) is memory


def test_epsilon_is_the_share_of_drawn_actions_and_the_state_goes_on_either_way() -> None:
    made, seen = network(), {"vector": np.array([1.0, -1.0], np.float32)}
    greedy = EpsilonGreedy(made)
    best = Counter(int(EpsilonGreedy(made).act(seen)) for _ in range(5))
    assert len(best) == 1
    greedy.act(seen)
    explorer = EpsilonGreedy(made, epsilon=1.0, seed=3)
    counts = Counter(int(explorer.act(seen)) for _ in range(3000))
    assert set(counts) == {0, 1, 2}
    assert all(abs(count - 1000) < 130 for count in counts.values())  # 5 standard deviations of 26
    one, same = (EpsilonGreedy(made, epsilon=1.0, seed=3) for _ in range(2))
    assert [int(one.act(seen)) for _ in range(20)] == [int(same.act(seen)) for _ in range(20)]
    torch.testing.assert_close(EpsilonGreedy(made).recurrent_state, made.initial_state())
    assert bool(greedy.recurrent_state[0].any())


def test_drawn_actions_are_repeated_with_the_square_law_up_to_the_longest() -> None:
    seen = {"vector": np.array([1.0, -1.0], np.float32)}
    explorer = EpsilonGreedy(network(actions=50), epsilon=1.0, seed=5, longest_repeat=4)
    runs = [len(list(run)) for _, run in itertools.groupby(int(explorer.act(seen)) for _ in range(8000))]
    # Two draws in a row fall on the same of 50 actions in 2 % of cases: the tolerance allows for that.
    shares = [runs.count(length) / len(runs) for length in (1, 2, 3, 4)]
    law = [1.0 / n**2 / (np.pi**2 / 6) for n in (1, 2, 3)]
    assert shares == pytest.approx([*law, 1.0 - sum(law)], abs=0.035)
    assert EpsilonGreedy(network(), longest_repeat=4).act(seen) == EpsilonGreedy(network()).act(seen)
