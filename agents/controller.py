"""The Controller: a recurrent Q-network over (accuracy, compression, keep_mask).

An action is a *set* of filters, so Q is built from a state value and one advantage per filter (a dueling head, Wang
et al. 2016, carried over to sets):

    Q(s, A) = V(s) + scale * (mean of the advantages over A - mean over all that live)

and the greedy action is the ranking by advantage, cut at the next waypoint (agents/ladder.py).

Two Controllers, one config. `mask` is the source's: (accuracy, compression, keep_mask) in, one advantage a filter
out. `features`, the default, judges every filter with one shared head; its advantage is a prior plus a residual that
starts at zero. The prior is minus the log of the filter's Taylor score for each parameter (or MAC, or byte) that goes
with it, so that on its first day the Controller plays that rule.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from agents.network import Judgement, QNetwork, RecurrentState
from env.channels import ChannelPlan
from env.errors import UserError
from env.importance import FEATURES
from env.measure import log_freed

__all__ = ["Controller", "ControllerConfig", "Observations", "set_value"]

_LOG_FREED_SCALE = 5.0  # brings it to about [-2, 0]
_SOFT_LIMIT = 5.0  # natural-log units; filters that do nothing at all would otherwise dominate every mean


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """The Q-network."""

    observation: str = "features"  # "features" | "mask" (the source's)
    hidden_size: int = 64  # of the LSTM
    filter_size: int = 32  # of the head that all filters share
    advantage_scale: float = 0.1  # natural-log units of score to units of reward
    cost_exponent: float = 1.0  # of what a filter frees, in the prior: 1 is Taylor per parameter, 0 Taylor alone

    def __post_init__(self) -> None:
        """Check every value; raises UserError."""
        if self.observation not in ("features", "mask"):
            raise UserError(
                "controller.observation",
                expected="features | mask",
                got=repr(self.observation),
                remedy="choose one of them",
            )
        if not 0.0 <= self.cost_exponent < math.inf:
            raise UserError(
                "controller.cost_exponent", expected="at least 0", got=repr(self.cost_exponent), remedy="1 is usual"
            )
        for name in ("hidden_size", "filter_size"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"controller.{name}", expected="at least 1", got=repr(getattr(self, name)), remedy="raise it"
                )


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What the Controller reads, time first."""

    accuracy: Tensor  # float32 [T, B], in [0, 1]
    compression: Tensor  # float32 [T, B], in [-1, 1]
    keep_mask: Tensor  # bool [T, B, F]
    features: Tensor  # float32 [T, B, F, 3], log scores in the order of env.importance.FEATURES; 0 where gone

    def __getitem__(self, time: slice) -> "Observations":
        """A stretch of time."""
        return Observations(
            accuracy=self.accuracy[time],
            compression=self.compression[time],
            keep_mask=self.keep_mask[time],
            features=self.features[time],
        )

    def to(self, device: torch.device | str) -> "Observations":
        """The same on another device."""
        return Observations(
            accuracy=self.accuracy.to(device),
            compression=self.compression.to(device),
            keep_mask=self.keep_mask.to(device),
            features=self.features.to(device),
        )


class Controller(QNetwork):
    """LSTM Q-network over sets of filters; one class for both observations.

    Its advantages are float32 [T, B, F] in natural-log units; the highest goes first.

    Args:
        config: sizes and kind of observation.
        plan: the Recognizer's units.
        measure: what compression is counted in, one of `env.channels.MEASURES`.

    """

    layer_of: Tensor

    def __init__(self, config: ControllerConfig, plan: ChannelPlan, measure: str = "parameters") -> None:
        super().__init__()
        self.config, self.plan, self.measure, self.hidden_size = config, plan, measure, config.hidden_size
        layers, hidden = len(plan.layers), config.hidden_size
        self.register_buffer("layer_of", plan.layer_of, persistent=False)
        picture = plan.units if config.observation == "mask" else layers
        self.torso = nn.Sequential(nn.Linear(2 + picture, hidden), nn.ReLU())
        self.lstm = nn.LSTM(hidden, hidden)
        self.value = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        if config.observation == "mask":
            self.advantage = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, plan.units))
        else:
            self.filter_input = nn.Linear(_FILTER_INPUTS, config.filter_size)
            self.state_input = nn.Linear(hidden, config.filter_size, bias=False)
            # no bias: what all filters share cancels in Q
            self.filter_output = nn.Linear(config.filter_size, 1, bias=False)
            self.layer_term = nn.Linear(hidden, layers)
            # the residual starts at zero
            _zero(self.filter_output)
            _zero(self.layer_term)
        _zero(self.value[-1])

    def forward(self, seen: Observations, state: RecurrentState) -> tuple[Judgement, RecurrentState]:
        """Judge T x B states in a row, starting from `state`."""
        kept = self.plan.kept_per_layer(seen.keep_mask)
        alive_share = kept / self.plan.widths.to(kept.device)
        picture = seen.keep_mask.float() if self.config.observation == "mask" else alive_share.float()
        inputs = torch.cat([seen.accuracy[..., None], seen.compression[..., None], picture], dim=-1)
        memory, (h, c) = self.lstm(self.torso(inputs), (state[0][None], state[1][None]))
        if self.config.observation == "mask":
            advantage = self.advantage(memory)
        else:
            advantage = self._judge_filters(seen, memory, kept, alive_share.float())
        return Judgement(value=self.value(memory).squeeze(-1), advantage=advantage), (h[0], c[0])

    def q_of(self, judgement: Judgement, action: Tensor, seen: Observations) -> Tensor:
        """Q(s, A) for sets of filters: bool [T, B, F] -> float32 [T, B]."""
        return set_value(judgement, action, seen.keep_mask, scale=self.config.advantage_scale)

    def q_all(self, judgement: Judgement, seen: Observations) -> Tensor:
        """Q of removing each filter alone, float32 [T, B, F]; V where it is gone."""
        everyone = _masked_mean(judgement.advantage, seen.keep_mask)[..., None]
        return judgement.value[..., None] + self.config.advantage_scale * torch.where(
            seen.keep_mask, judgement.advantage - everyone, 0.0
        )

    def _judge_filters(self, seen: Observations, memory: Tensor, kept: Tensor, alive_share: Tensor) -> Tensor:
        prior, inputs = self._filter_inputs(seen, kept, alive_share)
        joined = torch.relu(self.filter_input(inputs) + self.state_input(memory)[..., None, :])
        residual = self.filter_output(joined).squeeze(-1)
        return cast(Tensor, prior + residual + self.layer_term(memory)[..., self.layer_of])

    def _filter_inputs(self, seen: Observations, kept: Tensor, alive_share: Tensor) -> tuple[Tensor, Tensor]:
        """The prior float32 [T, B, F] and the inputs of the shared head float32 [T, B, F, _FILTER_INPUTS]."""
        alive = seen.keep_mask
        within_network = _soft_limit(_centred(seen.features, alive[..., None]))
        taylor = within_network[..., 0]
        layer_mean = _layer_mean(taylor * alive, self.layer_of, kept)[..., self.layer_of]
        within_layer = (taylor - layer_mean) * alive
        freed = log_freed(self.measure, self.plan, kept)
        per_layer = torch.stack([alive_share, freed / _LOG_FREED_SCALE, self._depth(kept)], dim=-1)
        shared = [per_layer[..., self.layer_of, :], seen.compression[..., None, None].expand(*alive.shape, 1)]
        inputs = torch.cat([within_network, within_layer[..., None], *shared], dim=-1)
        return self.config.cost_exponent * freed[..., self.layer_of] - taylor, inputs

    def _depth(self, kept: Tensor) -> Tensor:
        layers = kept.shape[-1]
        return torch.linspace(0.0, 1.0, layers, device=kept.device).expand(kept.shape)


#: three log scores within the network, one within the layer, three facts of the layer, the compression
_FILTER_INPUTS = len(FEATURES) + 1 + 3 + 1


def set_value(judgement: Judgement, action: Tensor, alive: Tensor, *, scale: float) -> Tensor:
    """Q(s, A) = V + scale * (mean advantage over A - mean over the living): bool [T, B, F] x2 -> float32 [T, B].

    An empty set is worth V.
    """
    chosen = _masked_mean(judgement.advantage, action)
    everyone = _masked_mean(judgement.advantage, alive)
    return judgement.value + scale * torch.where(action.any(-1), chosen - everyone, 0.0)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _centred(values: Tensor, alive: Tensor) -> Tensor:
    """Less the mean over the living filters; 0 for the dead: [T, B, F, K] -> the same."""
    mean = (values * alive).sum(-2, keepdim=True) / alive.sum(-2, keepdim=True).clamp(min=1)
    return (values - mean) * alive


def _soft_limit(values: Tensor) -> Tensor:
    """The identity up to `_SOFT_LIMIT`, logarithmic beyond it; strictly monotone, so rankings stay."""
    beyond = (values.abs() - _SOFT_LIMIT).clamp(min=0)
    return values.clamp(-_SOFT_LIMIT, _SOFT_LIMIT) + values.sign() * beyond.log1p()


def _layer_mean(values: Tensor, layer_of: Tensor, kept: Tensor) -> Tensor:
    """Mean over the living filters of each layer: [T, B, F] -> [T, B, L]."""
    total = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    return total.scatter_add(-1, layer_of.expand(values.shape), values) / kept.clamp(min=1)
