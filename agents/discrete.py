"""A recurrent Q-network for ordinary Gymnasium tasks: a vector in, one of A actions out.

Beside the Controller it shows that learner, replay and rollout are R2D2 and nothing else: the tasks of
benchmarks/memory_tasks.py are learned by it. The network is R2D2's less the convolutions (Kapturowski et al. 2019,
section 2.3): LSTM, dueling heads.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.network import DuelingJudgement, QNetwork, RecurrentState

__all__ = ["Argmax", "DiscreteConfig", "DiscreteNetwork", "EpsilonGreedy"]


@dataclass(frozen=True, kw_only=True)
class DiscreteConfig:
    """The network."""

    inputs: int  # D, numbers in an observation
    actions: int  # A
    hidden_size: int = 64  # of the LSTM and the layers around it
    memory: bool = True  # False: the recurrent state is zeroed before every step, in playing and learning alike


class DiscreteNetwork(QNetwork):
    """LSTM Q-network over A actions; sees float32 [T, B, D]."""

    def __init__(self, config: DiscreteConfig) -> None:
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        hidden = config.hidden_size
        self.torso = nn.Sequential(nn.Linear(config.inputs, hidden), nn.ReLU())
        self.lstm = nn.LSTM(hidden, hidden)
        self.value = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.advantage = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, config.actions))

    def forward(self, seen: Tensor, state: RecurrentState) -> tuple[DuelingJudgement, RecurrentState]:
        """Judge T x B states in a row, starting from `state`."""
        inputs = self.torso(seen)
        if self.config.memory:
            memory, (h, c) = self.lstm(inputs, (state[0][None], state[1][None]))
        else:  # every step is the first of a row of its own
            memory, _ = self.lstm(inputs.flatten(0, 1)[None])
            memory, (h, c) = memory.view(*seen.shape[:2], -1), (state[0][None], state[1][None])
        judgement = DuelingJudgement(value=self.value(memory).squeeze(-1), advantage=self.advantage(memory))
        return judgement, (h[0], c[0])

    def advantages(self, judgement: DuelingJudgement, seen: Tensor) -> Tensor:
        """As they were judged."""
        return judgement.advantage.detach()

    def q_of(self, judgement: DuelingJudgement, action: Tensor, seen: Tensor) -> Tensor:
        """Q(s, a): int64 [T, B] -> float32 [T, B]."""
        return self.q_all(judgement, seen).gather(-1, action[..., None]).squeeze(-1)

    def q_all(self, judgement: DuelingJudgement, seen: Tensor) -> Tensor:
        """Q of every action, V + A - mean A (Wang et al. 2016, equation 9): float32 [T, B, A]."""
        return judgement.value[..., None] + judgement.advantage - judgement.advantage.mean(-1, keepdim=True)


class Argmax:
    """The greedy action is the one of the highest advantage."""

    def greedy(self, advantages: Tensor, seen: Tensor, step: Tensor) -> Tensor:
        """int64 [T, B]."""
        return advantages.argmax(-1)


class EpsilonGreedy:
    """Plays a network for one episode; with probability `epsilon` an action drawn uniformly.

    Where `longest_repeat` is above 1, a drawn action is repeated: n times with a probability proportional to n ** -2,
    at most so often (Dabney et al. 2021, "Temporally-Extended epsilon-Greedy Exploration"). So it walks where drawing
    anew each time would only tremble.
    """

    def __init__(
        self, network: DiscreteNetwork, *, epsilon: float = 0.0, seed: int = 0, longest_repeat: int = 1
    ) -> None:
        self._network, self._epsilon, self._longest_repeat = network, epsilon, longest_repeat
        self._random = np.random.default_rng(seed)
        self._state = network.initial_state()
        self._drawn, self._left = np.int64(0), 0  # an action, and how often it is still to be repeated

    @property
    def recurrent_state(self) -> RecurrentState:
        """The state before the next action, float32 [1, H] each."""
        return self._state

    @torch.inference_mode()
    def act(self, observation: dict[str, Any]) -> np.int64:
        """The action for an observation whose "vector" is float32 [D]."""
        seen = torch.as_tensor(observation["vector"]).view(1, 1, -1)
        judgement, self._state = self._network(seen, self._state)
        if self._left == 0 and self._random.random() < self._epsilon:
            self._drawn = np.int64(self._random.integers(self._network.config.actions))
            self._left = min(int(self._random.zipf(2.0)), self._longest_repeat) if self._longest_repeat > 1 else 1
        if self._left > 0:
            self._left -= 1
            return self._drawn
        return np.int64(judgement.advantage.argmax())
