"""Policies: whoever ranks the filters. All of them read the same observation and leave the cut to the ladder.

`Policy` is the interface; the heuristics are not learned, `ControllerPolicy` plays a Controller with exploration, and
`Climber` makes actions of rankings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.balance import balanced
from agents.controller import Controller, Observations
from agents.ladder import Ladder
from agents.network import RecurrentState
from agents.ranking import places, places_in_layers
from env.channels import ChannelPlan
from env.importance import FEATURES
from env.measure import log_freed

__all__ = [
    "ALLOCATIONS",
    "HEURISTICS",
    "SCORING",
    "Climber",
    "ControllerPolicy",
    "LayerOffsets",
    "Policy",
    "Shadowed",
    "heuristic",
    "importance_of",
    "observe",
]

Observation = Mapping[str, Any]  # as Compression-v0 gives it: numpy arrays, one state


class Policy(Protocol):
    """Ranks filters; one object plays one episode."""

    def rank(self, observation: Observation) -> Tensor:
        """float32 [F]; the highest goes first. Values of filters that are gone do not matter."""

    @property
    def recurrent_state(self) -> RecurrentState | None:
        """The state that the next `rank` starts from, [1, H] each, or None where there is no memory."""

    def state_dict(self) -> dict[str, Tensor]:
        """What changes while it plays, on the CPU; the rest is made again from what it was made from."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` of one made alike; ValueError for anything else."""


class _Memoryless:
    """A policy that is a function of the observation, and of what it draws."""

    recurrent_state = None

    def __init__(self, rank: Callable[[Observation], Tensor], generator: torch.Generator) -> None:
        self.rank, self._random = rank, generator

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state."""
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Policy`."""
        _require_alike(state, self.state_dict())
        self._random.set_state(state["random"])


@dataclass(frozen=True)
class _Given:
    """What a heuristic is made from."""

    plan: ChannelPlan
    generator: torch.Generator
    measure: str

    def normal(self, sigma: float) -> Tensor:
        """A number for each layer, float32 [L]."""
        return sigma * torch.randn(len(self.plan.layers), generator=self.generator)


def heuristic(
    name: str,
    plan: ChannelPlan,
    *,
    seed: int,
    measure: str = "parameters",
    allocation: str = "",
    like: Tensor | None = None,
) -> Policy:
    """One of `HEURISTICS`, by name.

    `seed` matters to the random ones alone, `measure` (one of `env.channels.MEASURES`) to what weighs costs. With
    `allocation`, one of `ALLOCATIONS`, a rule that scores filters decides within layers alone; so it does with `like`
    (int64 [L]), towards whose widths all layers go in step.
    """
    given = _Given(plan, torch.Generator().manual_seed(seed), measure)
    if name in _SCORED:
        score, own = _SCORED[name]
        rank = ALLOCATIONS[allocation or own](given, score) if like is None else _in_step(plan, score, like)
    elif allocation or like is not None:
        raise ValueError(f"{name} has an allocation of its own, got {allocation or 'widths'}")
    else:
        rank = _DRAWN[name](given)
    return _Memoryless(rank, given.generator)


def importance_of(name: str) -> str:
    """Which of `env.importance.IMPORTANCES` a heuristic wants to see beside the features; "" for none."""
    return _IMPORTANCE.get(name, "")


_Score = Callable[[Observation], Tensor]  # of each filter, float32 [F]: the lowest of a layer goes first
_Rank = Callable[[Observation], Tensor]


def _column(name: str) -> _Score:
    index = FEATURES.index(name)
    return lambda observation: torch.as_tensor(observation["features"][:, index])


def _importance(observation: Observation) -> Tensor:
    return torch.as_tensor(observation["importance"])


def _alive(observation: Observation) -> Tensor:
    return torch.as_tensor(observation["keep_mask"]).bool()


def _global(_given: _Given, score: _Score) -> _Rank:
    """The lowest score of all layers first."""
    return lambda observation: -score(observation)


def _balanced(given: _Given, score: _Score) -> _Rank:
    """Across layers, whoever does the least harm by leaving a layer narrow."""

    def rank(observation: Observation) -> Tensor:
        alike = torch.zeros(1, len(given.plan.layers))
        quality, alive = score(observation)[None], _alive(observation)[None]
        freed = log_freed(given.measure, given.plan, given.plan.kept_per_layer(alive))
        return balanced(quality, alive, alike, freed, given.plan)[0]

    return rank


def _shares(given: _Given, score: _Score, offsets: Tensor) -> _Rank:
    """Equal shares of each layer's width; a layer with a higher offset, float32 [L], gives up more of itself."""
    plan = given.plan

    def rank(observation: Observation) -> Tensor:
        share = _gone_before(plan, score, observation) / plan.widths[plan.layer_of]
        return offsets[plan.layer_of] - share

    return rank


def _gone_before(plan: ChannelPlan, score: _Score, observation: Observation) -> Tensor:
    """How many of its layer go before each filter, those that are gone among them: int64 [F]."""
    alive = _alive(observation)[None]
    kept = plan.kept_per_layer(alive)
    before = places_in_layers(places(-score(observation)[None], alive), alive, kept, plan)[0]
    return (plan.widths - kept)[0, plan.layer_of] + before


def _in_step(plan: ChannelPlan, score: _Score, like: Tensor) -> _Rank:
    """All layers arrive together at the widths int64 [L] of `like`; one that is to stay as wide as it is goes last."""
    way = (plan.widths - like).clamp(min=_NO_WAY)[plan.layer_of]
    return lambda observation: -(_gone_before(plan, score, observation) + 1) / way


def _uniform(given: _Given, score: _Score) -> _Rank:
    return _shares(given, score, torch.zeros(len(given.plan.layers)))


#: How scores within layers become a ranking over all of them, by name.
ALLOCATIONS: dict[str, Callable[[_Given, _Score], _Rank]] = {
    "global": _global,
    "uniform": _uniform,
    "balanced": _balanced,
}

#: Filters; what a layer is divided by that is not to become narrower.
_NO_WAY = 1e-3

#: Spread of the random allocation: shares of a layer's width, so that layers end between nearly full and nearly empty.
_ALLOCATION_SIGMA = 0.3

#: Spread of random layer offsets on the log Taylor score: where the cross-entropy method starts too.
_OFFSET_SIGMA = 0.4

#: Rules that score filters, by name: the score, and the allocation that is usual with it.
_SCORED: dict[str, tuple[_Score, str]] = {
    "uniform-l1": (_column("log_l1"), "uniform"),
    "gamma": (_column("log_gamma"), "global"),
    "taylor": (_column("log_taylor"), "global"),
    "balanced": (_column("log_taylor"), "balanced"),
    "balanced-l1": (_column("log_l1"), "balanced"),
    "hrank": (_importance, "uniform"),
    "fpgm": (_importance, "uniform"),
    "l2": (_importance, "uniform"),
}
_IMPORTANCE = {"hrank": "rank", "fpgm": "fpgm", "l2": "l2"}

#: Rules that draw, by name.
_DRAWN: dict[str, Callable[[_Given], _Rank]] = {
    "random-filters": lambda given: lambda _observation: torch.rand(given.plan.units, generator=given.generator),
    "random-allocation": lambda given: _shares(given, _column("log_l1"), given.normal(_ALLOCATION_SIGMA)),
    "taylor-offsets": lambda given: LayerOffsets(given.plan, given.normal(_OFFSET_SIGMA)).rank,
}

#: Policies that score filters, so that how much of each layer goes may be decided otherwise.
SCORING = tuple(_SCORED)

#: Policies that are not learned, by name.
HEURISTICS = (*SCORING, *_DRAWN)


class LayerOffsets:
    """Taylor with one offset per layer on the log score: what the cross-entropy method evolves."""

    recurrent_state = None

    def __init__(self, plan: ChannelPlan, offsets: Tensor) -> None:
        self._offset = offsets.float()[plan.layer_of]

    def rank(self, observation: Observation) -> Tensor:
        """A layer with a higher offset keeps more."""
        return -_column("log_taylor")(observation) - self._offset

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Policy`."""
        _require_alike(state, {})


class ControllerPolicy:
    """Plays a Controller for one episode.

    Args:
        controller: in eval mode; not changed.
        epsilon: chance, per step, of an exploratory action: a random allocation between the layers for the
            features Controller, a random ranking of the filters for the mask one.
        sigma: about the standard deviation of this episode's offsets of layers, in natural-log units of the advantage;
            the features Controller's filters are judged by another taste in each episode, too.
        seed: of the exploration.

    """

    def __init__(self, controller: Controller, *, epsilon: float = 0.0, sigma: float = 0.0, seed: int = 0) -> None:
        self._controller, self._epsilon = controller, epsilon
        self._random = torch.Generator().manual_seed(seed)
        self._plan = controller.plan
        self._offsets = self._draw(sigma)
        self._taste = sigma * _TASTE * torch.randn(len(FEATURES), generator=self._random)
        self._state = controller.initial_state()

    @property
    def recurrent_state(self) -> RecurrentState:
        """The state before the next step, float32 [1, H] each."""
        return self._state

    def state_dict(self) -> dict[str, Tensor]:
        """Recurrent state, this episode's offsets and taste, the generator's state; not the Controller's weights."""
        h, c = (part.cpu() for part in self._state)
        own = {"offsets": self._offsets, "taste": self._taste, "random": self._random.get_state()}
        return {"h": h, "c": c, **own}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Policy`."""
        _require_alike(state, self.state_dict())
        device = self._state[0].device
        self._random.set_state(state["random"])
        self._state = state["h"].to(device), state["c"].to(device)
        self._offsets, self._taste = state["offsets"], state["taste"]

    @torch.inference_mode()
    def rank(self, observation: Observation) -> Tensor:
        """Advantages plus this episode's offsets, or an exploratory ranking."""
        seen = observe(observation)
        judgement, self._state = self._controller(seen, self._state)
        taste = self._taste.to(self._state[0].device) if bool(self._taste.any()) else None
        advantage = self._controller.advantages(judgement, seen, taste)[0, 0]
        # The mask Controller's advantages have no natural unit; their own spread serves.
        natural = self._controller.config.observation == "features"
        unit = 1.0 if natural else float(advantage[seen.keep_mask[0, 0]].std(correction=0))
        if float(torch.rand((), generator=self._random)) < self._epsilon:
            if not natural:
                return torch.rand(self._plan.units, generator=self._random)
            return advantage + self._draw(_EXPLORATORY_SIGMA)
        return advantage + unit * self._offsets

    def _draw(self, sigma: float) -> Tensor:
        """Offsets of the layers, spread over their filters: float32 [F].

        One part is each layer's own. The other is a parabola over depth: what a campaign can learn in a few dozen
        episodes is whether early or late layers matter more, and layers that move one by one would hardly show it.
        """
        layers = len(self._plan.layers)
        depth = torch.linspace(-1.0, 1.0, layers)
        slope, bend = torch.randn(2, generator=self._random)
        over_depth = slope * depth + bend * (depth.square() - depth.square().mean())
        own = torch.randn(layers, generator=self._random)
        offsets: Tensor = sigma * (_OVER_DEPTH * over_depth + _OWN * own)
        return offsets[self._plan.layer_of]


#: How far a score within a layer may come to weigh more or less, beside the Taylor score's 1, in units of sigma.
_TASTE = 1.25

#: How far the ends of a network are moved against each other, and a layer against its neighbours, in units of sigma.
_OVER_DEPTH, _OWN = 1.5, 0.7

#: An exploratory action shifts whole layers by this much, in natural-log units: well beyond an episode's own offsets.
_EXPLORATORY_SIGMA = 1.0


class Shadowed:
    """A policy that decides, with a Controller that only watches and lends its recurrent state.

    So the sequences of a teacher start with a state that the Controller would really have had there.
    """

    def __init__(self, policy: Policy, controller: Controller) -> None:
        self._policy, self._shadow = policy, ControllerPolicy(controller)

    @property
    def recurrent_state(self) -> RecurrentState:
        """The watching Controller's state."""
        return self._shadow.recurrent_state

    def rank(self, observation: Observation) -> Tensor:
        """The policy's own ranking."""
        self._shadow.rank(observation)
        return self._policy.rank(observation)

    def state_dict(self) -> dict[str, Tensor]:
        """Those of both, each name behind whose it is."""
        both = {"policy": self._policy, "shadow": self._shadow}
        return {f"{whose}.{name}": value for whose, one in both.items() for name, value in one.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Policy`."""
        _require_alike(state, self.state_dict())
        for whose, one in {"policy.": self._policy, "shadow.": self._shadow}.items():
            one.load_state_dict({name.removeprefix(whose): state[name] for name in state if name.startswith(whose)})


class Climber:
    """Takes an episode up the ladder, from `step` on: a policy's ranking, cut at each waypoint."""

    def __init__(self, policy: Policy, ladder: Ladder, *, step: int = 0) -> None:
        self._policy, self._ladder, self._step = policy, ladder, step

    @property
    def recurrent_state(self) -> RecurrentState | None:
        """The policy's own."""
        return self._policy.recurrent_state

    @torch.inference_mode()
    def act(self, observation: Observation) -> np.ndarray:
        """The filters to zero, int8 [F]."""
        scores = self._policy.rank(observation)
        alive = torch.as_tensor(observation["keep_mask"]).bool()
        action = self._ladder.cut(scores[None], alive[None], torch.tensor([self._step]))
        self._step += 1
        return action[0].numpy().astype(np.int8)


def observe(observation: Observation) -> Observations:
    """One observation of the environment as the Controller's tensors, T = B = 1."""
    keep_mask = torch.as_tensor(observation["keep_mask"]).bool()
    features = observation.get("features")
    if features is None:
        features = np.zeros((len(keep_mask), len(FEATURES)), np.float32)
    return Observations(
        accuracy=torch.as_tensor(observation["accuracy"]).view(1, 1),
        compression=torch.as_tensor(observation["compression"]).view(1, 1),
        keep_mask=keep_mask[None, None],
        features=torch.as_tensor(features)[None, None],
    )


def _require_alike(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """ValueError unless `state` has the names, shapes and dtypes of `own`."""
    expected, got = (
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in part.items()} for part in (own, state)
    )
    if got != expected:
        raise ValueError(f"a policy's state: expected {expected}, got {got}")
