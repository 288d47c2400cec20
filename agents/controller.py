"""The Controller: a recurrent Q-network over (accuracy, compression, keep_mask).

An action is a *set* of filters, and the greedy one is a ranking, cut at the next waypoint (agents/ladder.py). There are
two Controllers, one config.

`mask` is the source's: (accuracy, compression, keep_mask) in, one advantage a filter out, and Q is built of a state
value and the mean advantage of the set (a dueling head, Wang et al. 2016, carried over to sets):

    Q(s, A) = V(s) + scale * (mean of the advantages over A - mean over all that live)

`features`, the default, judges what a set leaves of the network's shape: w_l filters of layer l after A, beside the u_l
that the rule `balanced` usually leaves where as much is gone (agents/balance.py). How much harm a layer does by being
narrow is learned, and so is what makes a filter of a layer better than another:

    Q(s, A) = V(s) - sum_l n_l c_l(s) (1 / w_l - 1 / u_l) - scale * mean over A of r(s, filter)

where n_l is how many ways lead through layer l: several in a residual network, one in a plain one.
Its ranking is that Q's own: the filter goes first that does the least harm for each parameter it frees. Before it has
learned anything all c are alike and r is the Taylor score: it plays `balanced`. No weight belongs to one network: a
layer is judged by its own numbers and not by its place, so that what some networks teach fits all.

The u_l make no difference between actions that remove as much. They are there for learning: a shape's own part in Q is
then about 0 in the mean of all episodes and at every step, so that V alone takes up the mean return, and few updates
tell the layers apart (trial 12 of the log).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from agents.balance import NARROWEST, UsualShapes, balanced
from agents.network import DuelingJudgement, Judgement, OverTime, QNetwork, RecurrentState
from env.channels import ChannelPlan
from env.errors import UserError
from env.importance import FEATURES
from env.measure import and_narrower, log_share_freed

__all__ = ["TAUGHT", "Controller", "ControllerConfig", "Observations", "ShapeJudgement", "set_value"]

#: By network, what its Controller begins with: 60 episodes on quarter-width VGG16 have taught the first, those and 48
#: on ResNet18 the second (trials 31 and 37 of the search log).
TAUGHT = {name: Path(__file__).with_name(f"taught-{name}.safetensors") for name in ("vgg16", "resnet18")}

_HARM = 0.5  # c of a layer on the first day, the geometric mean; nats of cross-entropy, in the learner's rescaled units
_LEAST_DEVIATION = 1e-4  # natural-log units; filters that differ by less are alike
_SOFT_LIMIT = 5.0  # natural-log units; filters that do nothing at all would otherwise dominate every mean


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """The Q-network."""

    observation: str = "features"  # "features" | "mask" (the source's)
    hidden_size: int = 64  # of the LSTM
    layer_size: int = 32  # of the head that all layers share
    # Reward for each unit of a set's mean advantage (mask) or worth (features): about what one standard deviation of
    # a good score is worth (trial 20 of the search log).
    advantage_scale: float = 0.02
    # What it starts from: "taught", the file that comes with Zeroout for this network and these sizes, or nothing where
    # there is none; the controller.safetensors of an earlier campaign, as far as it fits; "" for nothing.
    weights: str = "taught"

    def __post_init__(self) -> None:
        """Check every value; raises UserError."""
        if self.observation not in ("features", "mask"):
            raise UserError(
                "controller.observation",
                expected="features | mask",
                got=repr(self.observation),
                remedy="choose one of them",
            )
        for name in ("hidden_size", "layer_size"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"controller.{name}", expected="at least 1", got=repr(getattr(self, name)), remedy="raise it"
                )


@dataclass(frozen=True, kw_only=True)
class Observations(OverTime):
    """What the Controller reads."""

    accuracy: Tensor  # float32 [T, B], in [0, 1]
    compression: Tensor  # float32 [T, B], in [-1, 1]
    keep_mask: Tensor  # bool [T, B, F]
    features: Tensor  # float32 [T, B, F, 3], log scores in the order of env.importance.FEATURES; 0 where gone

    def to(self, device: torch.device | str) -> "Observations":
        """The same on another device."""
        return Observations(
            accuracy=self.accuracy.to(device),
            compression=self.compression.to(device),
            keep_mask=self.keep_mask.to(device),
            features=self.features.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class ShapeJudgement(Judgement):
    """What the features Controller says; its advantages follow from it."""

    log_harm: Tensor  # float32 [T, B, L], log c
    worth: Tensor  # float32 [T, B, F], r: of a filter within its layer; 0 where gone
    scores: Tensor  # float32 [T, B, F, 3], log scores in standard deviations from their layer's mean; 0 where gone
    freed: Tensor  # float32 [T, B, L], `env.measure.log_freed`


class Controller(QNetwork):
    """LSTM Q-network over sets of filters; one class for both observations.

    Its advantages are float32 [T, B, F] in natural-log units; the highest goes first.

    Args:
        config: sizes and kind of observation.
        plan: the Recognizer's units.
        measure: what compression is counted in, one of `env.channels.MEASURES`.

    """

    layer_of: Tensor
    paths: Tensor  # int64 [L], ways through each layer
    by_depth: Tensor  # float32 [L, D], from values of the layers to values at D depths

    def __init__(self, config: ControllerConfig, plan: ChannelPlan, measure: str = "parameters") -> None:
        super().__init__()
        self.config, self.plan, self.measure, self.hidden_size = config, plan, measure, config.hidden_size
        hidden = config.hidden_size
        self.register_buffer("layer_of", plan.layer_of, persistent=False)
        picture = plan.units if config.observation == "mask" else _DEPTHS
        self.torso = nn.Sequential(nn.Linear(2 + picture, hidden), nn.ReLU())
        self.lstm = nn.LSTM(hidden, hidden)
        self.value = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        if config.observation == "mask":
            self.advantage = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, plan.units))
        else:
            self.usual = UsualShapes(plan, measure)
            self.register_buffer("paths", plan.paths, persistent=False)
            self.register_buffer("by_depth", _interpolation(len(plan.layers), _DEPTHS), persistent=False)
            self.layer_input = nn.Linear(_LAYER_INPUTS, config.layer_size)
            self.state_input = nn.Linear(hidden, config.layer_size, bias=False)
            self.layer_output = nn.Linear(config.layer_size + _LAYER_INPUTS, 1, bias=False)
            self.filter_weights = nn.Linear(hidden, len(FEATURES))
            for head in (self.layer_output, self.filter_weights):
                _zero(head)
            with torch.no_grad():
                self.filter_weights.bias[FEATURES.index("log_taylor")] = 1.0
        _zero(self.value[-1])

    def forward(self, seen: Observations, state: RecurrentState) -> tuple[Judgement, RecurrentState]:
        """Judge T x B states in a row, starting from `state`."""
        kept, share = self._shape(seen)
        memory, after = self._read(seen, share, state)
        value = self.value(memory).squeeze(-1)
        if self.config.observation == "mask":
            return DuelingJudgement(value=value, advantage=self.advantage(memory)), after
        return self._judge_shape(seen, memory, value, kept, share), after

    def remember(self, seen: Observations, state: RecurrentState) -> RecurrentState:
        """The state after T x B states in a row, of which the filters need not be looked at."""
        _, share = self._shape(seen)
        _, after = self._read(seen, share, state)
        return after

    def _shape(self, seen: Observations) -> tuple[Tensor, Tensor]:
        """Filters that are left in each layer, int64 [T, B, L], and as a share of its width, float32."""
        kept = self.plan.kept_per_layer(seen.keep_mask)
        return kept, kept / self.plan.widths.to(kept.device)

    def _read(self, seen: Observations, share: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """What the LSTM makes of the states: float32 [T, B, H]."""
        picture = seen.keep_mask.float() if self.config.observation == "mask" else share @ self.by_depth
        inputs = torch.cat([seen.accuracy[..., None], seen.compression[..., None], picture], dim=-1)
        read = self.torso(inputs)
        if len(read) == 1:  # an actor's: the layer would put its weights into order for many steps first
            h, c = torch.lstm_cell(read[0], state, *self.lstm.all_weights[0])
            return h[None], (h, c)
        memory, (h, c) = self.lstm(read, (state[0][None], state[1][None]))
        return memory, (h[0], c[0])

    def on(self, plan: ChannelPlan, measure: str = "parameters") -> "Controller":
        """This very Controller for another network: what one of the two learns, the other has learned.

        ValueError for the mask's, whose layers are made for one network.
        """
        if self.config.observation == "mask":
            raise ValueError("a Controller that reads the mask alone is made for one network")
        other = Controller(self.config, plan, measure)
        for name, part in self.named_children():
            if next(part.parameters(), None) is not None:
                setattr(other, name, part)
        return other.train(self.training)

    @torch.no_grad()
    def adopt(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Take over every parameter that `weights` has in the same shape; returns the names of the others.

        The features Controller's fit every network; the mask's own, the first layer and the last, only theirs.
        """
        left = []
        for name, mine in self.state_dict().items():
            given = weights.get(name)
            if given is not None and given.shape == mine.shape and bool(given.isfinite().all()):
                mine.copy_(given)
            else:
                left.append(name)
        return left

    @torch.no_grad()
    def advantages(
        self, judgement: DuelingJudgement | ShapeJudgement, seen: Observations, taste: Tensor | None = None
    ) -> Tensor:
        """What ranks the filters: float32 [T, B, F].

        With a `taste` (float32 [3]) the features Controller ranks as if a filter's scores within its layer weighed so
        much more.
        """
        if isinstance(judgement, DuelingJudgement):
            return judgement.advantage.detach()
        worth = judgement.worth if taste is None else judgement.worth + judgement.scores @ taste
        by_filter = worth.flatten(0, 1), seen.keep_mask.flatten(0, 1)
        by_layer = judgement.log_harm.flatten(0, 1), judgement.freed.flatten(0, 1)
        return balanced(*by_filter, *by_layer, self.plan).view(worth.shape)

    def q_of(self, judgement: DuelingJudgement | ShapeJudgement, action: Tensor, seen: Observations) -> Tensor:
        """Q(s, A) for sets of filters: bool [T, B, F] -> float32 [T, B]."""
        scale = self.config.advantage_scale
        if isinstance(judgement, DuelingJudgement):
            return set_value(judgement, action, seen.keep_mask, scale=scale)
        harm = self._harm(judgement.log_harm, self.plan.kept_per_layer(seen.keep_mask & ~action))
        return judgement.value - harm - scale * _masked_mean(judgement.worth, action)

    def q_all(self, judgement: DuelingJudgement | ShapeJudgement, seen: Observations) -> Tensor:
        """Q of removing each filter alone, float32 [T, B, F]; that of removing none where it is gone."""
        scale = self.config.advantage_scale
        if isinstance(judgement, DuelingJudgement):
            everyone = _masked_mean(judgement.advantage, seen.keep_mask)[..., None]
            alone = torch.where(seen.keep_mask, judgement.advantage - everyone, 0.0)
            return judgement.value[..., None] + scale * alone
        kept = self.plan.kept_per_layer(seen.keep_mask)
        harm = self._harm(judgement.log_harm[..., None, :], and_narrower(kept)[..., 1:, :])[..., self.layer_of]
        alone = harm + scale * judgement.worth
        nothing = self._harm(judgement.log_harm, kept)[..., None]
        return judgement.value[..., None] - torch.where(seen.keep_mask, alone, nothing)

    def _harm(self, log_harm: Tensor, left: Tensor) -> Tensor:
        """What a shape does to the return, beside the usual one: log c [..., L], int64 [..., L] left -> [...]."""
        usual: Tensor = self.usual(left)
        return (self.paths * log_harm.exp() * (1.0 / left.clamp(min=NARROWEST) - 1.0 / usual)).sum(-1)

    def _judge_shape(
        self, seen: Observations, memory: Tensor, value: Tensor, kept: Tensor, share: Tensor
    ) -> ShapeJudgement:
        scores, means = self._scores(seen, kept)
        inputs, freed = self._layer_inputs(seen, kept, share, means)
        joined = torch.relu(self.layer_input(inputs) + self.state_input(memory)[..., None, :])
        log_harm = math.log(_HARM) + self.layer_output(torch.cat([joined, inputs], dim=-1)).squeeze(-1)
        worth = (scores * self.filter_weights(memory)[..., None, :]).sum(-1)
        return ShapeJudgement(value=value, log_harm=log_harm, worth=worth, scores=scores, freed=freed)

    def _scores(self, seen: Observations, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Log scores in standard deviations from their layer's mean, [T, B, F, 3], and those means, [T, B, L, 3]."""
        alive = seen.keep_mask[..., None]
        scores = _soft_limit(_centred(seen.features, alive))
        means = _layer_means(scores, self.layer_of, kept)
        apart = (scores - means[..., self.layer_of, :]) * alive
        deviations = _layer_means(apart.square(), self.layer_of, kept).sqrt().clamp(min=_LEAST_DEVIATION)
        return apart / deviations[..., self.layer_of, :], means

    def _layer_inputs(self, seen: Observations, kept: Tensor, share: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """What the shared head reads of each layer, float32 [T, B, L, _LAYER_INPUTS]; and `env.measure.log_freed`."""
        shapes = and_narrower(kept)
        costs = {name: self.plan.cost(name, shapes) for name in {self.measure, "macs", "parameters"}}
        freed = {name: log_share_freed(cost) for name, cost in costs.items()}
        whole = (costs["macs"] / costs["parameters"])[..., :1].log()
        positions = freed["macs"] - freed["parameters"] + whole
        logs = torch.stack([kept.clamp(min=1).log(), freed[self.measure], positions], dim=-1)
        own = torch.stack([share, seen.compression[..., None].expand(kept.shape)], dim=-1)
        return torch.cat([own, logs / _LOG_SCALE, means / _LOG_SCALE], dim=-1), freed[self.measure]


#: Depths at which a network is looked at, however many layers it has, so that what is learned fits every network.
_DEPTHS = 16

_LOG_SCALE = 5.0  # brings logarithms of widths, costs and scores to about [-2, 2]
#: of a layer: the share that is left, the network's compression; logs of what is left, of what a filter costs and of at
#: how many positions its parameters are used; mean log scores
_LAYER_INPUTS = 5 + len(FEATURES)


def set_value(judgement: DuelingJudgement, action: Tensor, alive: Tensor, *, scale: float) -> Tensor:
    """Q(s, A) = V + scale * (mean advantage over A - mean over the living): bool [T, B, F] x2 -> float32 [T, B].

    An empty set is worth V.
    """
    chosen = _masked_mean(judgement.advantage, action)
    everyone = _masked_mean(judgement.advantage, alive)
    return judgement.value + scale * torch.where(action.any(-1), chosen - everyone, 0.0)


def _interpolation(given: int, wanted: int) -> Tensor:
    """From values at `given` depths, evenly from the first to the last, to `wanted` ones: float32 [given, wanted]."""
    at = torch.linspace(0.0, given - 1.0, wanted)
    return (1.0 - (at - torch.arange(given)[:, None]).abs()).clamp(min=0.0)


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


def _layer_means(values: Tensor, layer_of: Tensor, kept: Tensor) -> Tensor:
    """Mean over the living filters of each layer: [T, B, F, K], 0 for the dead -> [T, B, L, K]."""
    total = torch.zeros(*kept.shape, values.shape[-1], dtype=values.dtype, device=values.device)
    index = layer_of[:, None].expand(values.shape)
    return total.scatter_add(-2, index, values) / kept.clamp(min=1)[..., None]
