"""`Compression-v0`: compressing a Recognizer as a Gymnasium environment.

Observation: accuracy, compression, keep_mask (and, on request, the filters' log scores). Action: the bits to zero.
After each action the compact network is retrained for a few minibatches and measured on the validation split
(the source's method 2). Called by actors/rollout.py.

Common random numbers: the minibatches and the augmentation of step t depend on the campaign's seed and t alone, so
two episodes differ by their masks and by nothing else.

`gymnasium.make("Compression-v0")` gives one with a Recognizer of its own, `make_compression`.
"""

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from env.channels import MEASURES, ChannelPlan
from env.data import DataConfig, load_dataset
from env.errors import NonFiniteError, UserError
from env.importance import FEATURES, LIMIT
from env.measure import Measure
from env.networks import NetworkConfig, build_network
from env.recognizer import Body, Recognizer, Retraining
from env.retraining import Metrics
from env.seeds import derive_seed
from env.training import TrainConfig, train

__all__ = ["CompressionEnv", "EpisodeConfig", "TargetReached", "make_compression", "unreachable"]

_WHY = "zeroout doctor --model"  # what shows why a layer cannot be pruned
_REWARDS = ("terminal", "accuracy", "difference")


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """One episode: from the full network to the highest target."""

    targets: tuple[float, ...] = (0.9,)  # shares to remove, rising
    measure: str = "parameters"  # what they are shares of: "parameters", "macs" or "bytes" (as stored)
    waypoints: int = 16  # equal shares up to the last target, one a step
    min_width: int = 2  # filters that every layer keeps
    reward: str = "terminal"  # "terminal" | "accuracy" (the source's) | "difference"
    batch_size: int = 64
    step_minibatches: int = 4  # retraining inside a step
    step_learning_rate: float = 0.02
    recovery_minibatches: int = 40  # the short recovery that the terminal reward is measured after
    recovery_learning_rate: float = 0.04
    step_images: int = 500  # validation images behind a step's accuracy; rewards use all of them
    score_images: int = 256  # training images behind the Taylor score
    rank_images: int = 640  # training images behind the rank of feature maps, where a rule asks for it (HRank's number)
    precision: str = "float32"  # or "bfloat16"; of retraining and evaluation inside the episode
    max_steps: int = 64  # then the episode is truncated; a ladder of waypoints never needs them

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: names the key, the value and what it should be.

        """
        ordered = tuple(sorted(set(self.targets)))
        if not self.targets or ordered != tuple(self.targets):
            raise UserError(
                "episode.targets",
                expected="one or more rising targets",
                got=repr(list(self.targets)),
                remedy="give e.g. [0.9] or [0.8, 0.9]",
            )
        for target in self.targets:
            if not 0.0 < target < 1.0:
                raise UserError(
                    "episode.targets",
                    expected="shares inside (0, 1)",
                    got=repr(target),
                    remedy="0.9 removes 90 %",
                )
        if self.measure not in MEASURES:
            raise UserError(
                "episode.measure", expected=" | ".join(MEASURES), got=repr(self.measure), remedy="choose one of them"
            )
        if self.waypoints < len(self.targets):
            raise UserError(
                "episode.waypoints",
                expected=f"at least {len(self.targets)}, one for each target",
                got=repr(self.waypoints),
                remedy="raise it",
            )
        if self.reward not in _REWARDS:
            raise UserError(
                "episode.reward", expected=" | ".join(_REWARDS), got=repr(self.reward), remedy="choose one of them"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise UserError(
                "episode.precision", expected="float32 | bfloat16", got=repr(self.precision), remedy="choose one"
            )
        least = {"waypoints": 1, "min_width": 1, "batch_size": 2, "step_minibatches": 1, "recovery_minibatches": 1}
        for name, floor in {**least, "step_images": 1, "score_images": 1, "rank_images": 1, "max_steps": 1}.items():
            if getattr(self, name) < floor:
                raise UserError(
                    f"episode.{name}", expected=f"at least {floor}", got=repr(getattr(self, name)), remedy="raise it"
                )
        for name in ("step_learning_rate", "recovery_learning_rate"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UserError(
                    f"episode.{name}",
                    expected="a number above 0",
                    got=repr(getattr(self, name)),
                    remedy="give e.g. 0.02",
                )

    @property
    def step_retraining(self) -> Retraining:
        """The retraining inside a step."""
        return Retraining(
            minibatches=self.step_minibatches, batch_size=self.batch_size, learning_rate=self.step_learning_rate
        )

    @property
    def short_recovery(self) -> Retraining:
        """The retraining that comes before a target's reward is measured."""
        return Retraining(
            minibatches=self.recovery_minibatches,
            batch_size=self.batch_size,
            learning_rate=self.recovery_learning_rate,
            decay=True,
        )

    def retrained_images(self, reached: int) -> int:
        """Images, each as often as it is seen, that a step retrains on which reaches so many targets."""
        return self.batch_size * (self.step_minibatches + reached * self.recovery_minibatches)


@dataclass(frozen=True, kw_only=True)
class TargetReached:
    """What an episode delivers at a target: the network after the short recovery, measured on all of validation."""

    target: float
    compression: float
    parameters: int
    macs: int
    metrics: Metrics
    body: Body = field(compare=False)


class _Clock:
    """Seconds by phase, from its making on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def phase(self, name: str) -> None:
        """Count what passed since the last phase as `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class CompressionEnv(gym.Env[dict[str, Any], np.ndarray]):
    """A Recognizer whose filters are zeroed by actions.

    Observation space: Dict(accuracy float32 [1] in [0, 1], compression float32 [1] in [-1, 1] (added skip
    convolutions count against it), keep_mask int8 [F]; with `features`, also features float32 [F, 3], see
    `env.importance.FEATURES`; with `importance`, also importance float32 [F], 0 where gone). Action space:
    MultiBinary(F), the bits to zero; bits already zero are ignored, and where an action would leave a layer under
    `min_width`, its last filters stay (`info["refused"]`).

    Where retraining makes the network's loss, weights or scores infinite or NaN, the episode terminates
    (`info["collapsed"]`): no accuracy is left, and the reward says so.

    Args:
        recognizer: the baseline, its plan and its images.
        config: the episode.
        features: whether observations carry the filters' log scores.
        importance: one of `env.importance.IMPORTANCES` that observations carry as well; "" = none. The rank of feature
            maps is that of the full network all through an episode, as HRank takes it, and costs what it costs once.
        seed: the campaign's seed, from which the minibatches of every step follow.

    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's own class attribute

    def __init__(
        self,
        recognizer: Recognizer,
        config: EpisodeConfig | None = None,
        *,
        features: bool = True,
        importance: str = "",
        seed: int = 0,
    ) -> None:
        self.recognizer, self.config, self._importance_name = recognizer, config or EpisodeConfig(), importance
        self.plan, self.features, self.seed = recognizer.plan, features, seed
        units = self.plan.units
        parts: dict[str, spaces.Space[Any]] = {
            "accuracy": spaces.Box(0.0, 1.0, (1,), np.float32),
            "compression": spaces.Box(-1.0, 1.0, (1,), np.float32),
            "keep_mask": spaces.MultiBinary(units),
        }
        if features:
            parts["features"] = spaces.Box(-LIMIT, LIMIT, (units, len(FEATURES)), np.float32)
        if importance:
            parts["importance"] = spaces.Box(0.0, np.inf, (units,), np.float32)
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.MultiBinary(units)
        problem = unreachable(self.plan, recognizer.measure, self.config)
        if problem is not None:
            raise problem
        everything = recognizer.dataset.validation
        few = min(self.config.step_images, len(everything))
        chosen = torch.randperm(
            len(everything), generator=torch.Generator().manual_seed(derive_seed(seed, "step-validation"))
        )[:few].to(recognizer.device)
        self._step_split = type(everything)(everything.images[chosen], everything.labels[chosen])
        self._baseline = recognizer.evaluate(recognizer.full(), everything)
        self._worst = 2 * math.log(len(recognizer.dataset.classes))
        self._start: tuple[float, Tensor, Tensor] | None = None
        self._clock = _Clock()

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Wall time of the last step by phase; not in `info`, which is the same for the same actions."""
        return self._clock.seconds

    @property
    def baseline(self) -> Metrics:
        """The uncompressed network on the whole validation split."""
        return self._baseline

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin again with the full network; `seed`, if given, is the campaign's seed from here on."""
        super().reset(seed=seed)
        if seed is not None and seed != self.seed:
            self.seed, self._start = seed, None
        self._set_body(self.recognizer.full())
        self._step = 0
        if self._start is None:
            accuracy = self.recognizer.evaluate(self._body, self._step_split).accuracy
            self._start = accuracy, self._scores(), self._importance()
        self._accuracy, self._filter_scores, self._filter_importance = self._start
        return self._observation(), {"step": 0, "reached": []}

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of an episode depends on beside the configuration: numbers, and tensors (not copies).

        Minibatches and augmentation need no generator's state: they follow from the seed and the step.
        """
        return {
            "seed": self.seed,
            "step": self._step,
            "accuracy": self._accuracy,
            "scores": self._filter_scores,
            "importance": self._filter_importance,
            **self.recognizer.state_of(self._body),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state_dict` of an environment made alike instead of a `reset`; ValueError for another's."""
        body, units = self.recognizer.restored(state), self.plan.units
        shapes = {
            "scores": (units, len(FEATURES)) if self.features else (0,),
            "importance": (units,) if self._importance_name else (0,),
        }
        for name, shape in shapes.items():
            if state[name].dtype != torch.float32 or state[name].shape != shape:
                got = f"{state[name].dtype} {list(state[name].shape)}"
                raise ValueError(f"{name}: expected float32 {list(shape)}, got {got}")
        seed, step, accuracy = int(state["seed"]), int(state["step"]), float(state["accuracy"])
        if seed != self.seed:
            self.seed, self._start = seed, None
        self._set_body(body)
        self._step, self._accuracy = step, accuracy
        self._filter_scores, self._filter_importance = state["scores"], state["importance"]

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Zero the filters of `action` (int [F]), retrain, measure."""
        self._clock = _Clock()
        keep_mask, refused = self._allowed(torch.as_tensor(action).bool())
        before, accuracy_before = self._compression, self._accuracy
        self._set_body(self.recognizer.zero(self._body, keep_mask))
        self._clock.phase("compact")
        after = self._compression
        terminated, collapsed = after >= self.config.targets[-1], False
        reached: list[TargetReached] = []
        try:
            self._retrain(terminated=terminated)
            for target in self.config.targets:
                if before < target <= after:
                    reached.append(self._reach(target))
            self._clock.phase("recover")
        except NonFiniteError:
            terminated, collapsed, self._accuracy = True, True, 0.0
        self._step += 1
        truncated = not terminated and self._step >= self.config.max_steps
        reward = self._reward(reached, accuracy_before, terminated=terminated, collapsed=collapsed)
        info = {"step": self._step, "refused": refused, "reached": reached, "collapsed": collapsed}
        return self._observation(), reward, terminated, truncated, info

    def _set_body(self, body: Body) -> None:
        self._body, self._compression = body, self.recognizer.compression(body.keep_mask)

    def _retrain(self, *, terminated: bool) -> None:
        """Retrain the present network and measure it; the scores only where another decision follows."""
        retraining, step_seed = self.config.step_retraining, derive_seed(self.seed, "retrain", self._step)
        self.recognizer.retrain(self._body, retraining, seed=step_seed)
        self._clock.phase("retrain")
        self._accuracy = self.recognizer.evaluate(self._body, self._step_split).accuracy
        self._clock.phase("evaluate")
        if not terminated:
            self._filter_scores = self._scores()
            if self._importance_name != "rank":
                self._filter_importance = self._importance()
            self._clock.phase("score")

    def _allowed(self, action: Tensor) -> tuple[Tensor, int]:
        """The mask after `action` with at least `min_width` filters in every layer, and how many were refused."""
        alive = self._body.keep_mask
        asked = alive & action
        kept = self.plan.kept_per_layer(alive & ~action)
        short = (torch.minimum(self.plan.widths, torch.tensor(self.config.min_width)) - kept).clamp(min=0)
        for layer in short.nonzero().flatten().tolist():
            mine = (asked & (self.plan.layer_of == layer)).nonzero().flatten()
            asked[mine[-int(short[layer]) :]] = False
        return alive & ~asked, int(short.sum())

    def _reach(self, target: float) -> TargetReached:
        """Recover a copy of the present network for a little and measure it on all of validation."""
        body = self.recognizer.recovered(
            self._body, self.config.short_recovery, seed=derive_seed(self.seed, "recovery", str(target))
        )
        kept = self.plan.kept_per_layer(body.keep_mask)
        return TargetReached(
            target=target,
            compression=self.recognizer.compression(body.keep_mask),
            parameters=int(self.plan.parameters(kept)),
            macs=int(self.plan.macs(kept)),
            metrics=self.recognizer.evaluate(body, self.recognizer.dataset.validation),
            body=body,
        )

    def _reward(
        self, reached: list[TargetReached], accuracy_before: float, *, terminated: bool, collapsed: bool
    ) -> float:
        if collapsed:
            return -self._worst if self.config.reward == "terminal" else -accuracy_before
        if self.config.reward == "difference":
            return self._accuracy - accuracy_before
        if self.config.reward == "accuracy":
            return reached[-1].metrics.accuracy if terminated else 0.0
        return -sum(map(self._lost, reached)) / len(self.config.targets)

    def _lost(self, point: TargetReached) -> float:
        """Nats above the baseline; at most twice those of a blind guess, which NaN counts as too."""
        lost = point.metrics.cross_entropy - self._baseline.cross_entropy
        return lost if lost < self._worst else self._worst

    def _scores(self) -> Tensor:
        """The log scores of the filters, where the observation carries them; NonFiniteError as retraining."""
        if not self.features:
            return torch.zeros(0)
        config = self.config
        scores = self.recognizer.log_scores(
            self._body, images=config.score_images, batch_size=config.batch_size, seed=self.seed
        )
        if not bool(scores.isfinite().all()):
            raise NonFiniteError("scores of the filters are not finite; try a lower episode.step_learning_rate")
        return scores

    def _importance(self) -> Tensor:
        """The importance of the filters, where the observation carries it; NonFiniteError as retraining."""
        name, config = self._importance_name, self.config
        if not name:
            return torch.zeros(0)
        images = config.rank_images if name == "rank" else config.score_images
        found = self.recognizer.importance(
            name, self._body, images=images, batch_size=config.batch_size, seed=self.seed
        )
        if not bool(found.isfinite().all()):
            raise NonFiniteError(f"{name} of the filters is not finite; try a lower episode.step_learning_rate")
        return found

    def _observation(self) -> dict[str, Any]:
        observation = {
            "accuracy": np.array([self._accuracy], np.float32),
            "compression": np.array([self._compression], np.float32),
            "keep_mask": self._body.keep_mask.numpy().astype(np.int8),
        }
        if self.features:  # the last scores, where an episode ends without new ones
            observation["features"] = (self._filter_scores * self._body.keep_mask[:, None]).numpy()
        if self._importance_name:
            observation["importance"] = (self._filter_importance * self._body.keep_mask).numpy()
        return observation


def make_compression(
    recognizer: Recognizer | None = None, config: EpisodeConfig | None = None, **kwargs: Any
) -> CompressionEnv:
    """Compression-v0, as `gymnasium.make` calls it.

    Args:
        recognizer: by default a small network that recognizes the embedded digits, trained here in seconds.
        config: the episode.
        kwargs: `features`, `importance` and `seed` of `CompressionEnv`.

    """
    return CompressionEnv(recognizer or _default_recognizer(), config, **kwargs)


@functools.cache
def _default_recognizer() -> Recognizer:
    data_config = DataConfig(validation_share=0.2)
    dataset = load_dataset(data_config)
    network = build_network(NetworkConfig(name="small", width=0.5), channels=1, classes=len(dataset.classes))
    train(network, dataset, data_config, TrainConfig(epochs=4, batch_size=64), seed=0)
    given = sum(parameter.numel() for parameter in network.parameters())
    return Recognizer(network, dataset, data_config, measure=Measure("parameters", given))


def unreachable(plan: ChannelPlan, measure: Measure, config: EpisodeConfig) -> UserError | None:
    """The error to raise when nothing can be pruned, or less than the highest target asks for; else None."""
    if not plan.units:
        return UserError(
            "the network",
            expected="at least one layer whose filters can be taken out",
            got="none, whatever the target",
            remedy=f"{_WHY} says why for each layer",
        )
    least = torch.minimum(plan.widths, torch.tensor(config.min_width))
    most = float(measure.compression(plan, least))
    if config.targets[-1] <= most:
        return None
    return UserError(
        "episode.targets",
        expected=f"at most {most:.4f}, which is what min_width = {config.min_width} leaves to remove",
        got=repr(config.targets[-1]),
        remedy=f"lower the target or episode.min_width; {_WHY} lists the layers and what is left out",
    )
