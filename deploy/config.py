"""One tree of frozen, validated dataclasses from TOML. Each room owns its own part; this file only composes them."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from actors.schedule import TAUGHT_SIGMA, ScheduleConfig
from agents.controller import TAUGHT, ControllerConfig
from deploy.frontier import PEERS
from env.compression import EpisodeConfig
from env.data import DataConfig
from env.errors import UserError
from env.networks import NetworkConfig
from env.replacement import ReplacementConfig
from env.training import RecoveryConfig, TrainConfig
from env.transfer import TransferConfig
from learner.learner import LearnerConfig
from learner.replay.replay import ReplayConfig
from learner.sequence import SequenceConfig

__all__ = ["CampaignConfig", "ClusterConfig", "dump", "from_tree", "load", "parse", "resolved"]

#: So many episodes, a quarter of all at most, are played before learning starts, where the configuration says nothing.
_FIRST_EPISODES = 6


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the campaign runs. Redis's URL is not here: it may hold a password, and this is written to disk."""

    ray_address: str = ""  # "" starts a local Ray; else the address of a running cluster, or "auto"
    # -1: one where the cluster has any, none where it has none; of a local Ray's, fewer than actors are shared
    gpus_per_actor: float = -1.0
    cpus_per_actor: float = 1.0
    threads_per_actor: int = 1  # of torch; 0 leaves torch's own choice
    dashboard: bool = True  # of a local Ray
    lease_s: float = 300.0  # an episode whose actor says nothing for so long is given to another

    def __post_init__(self) -> None:
        """Check every value; raises UserError."""
        if not (self.gpus_per_actor == -1 or 0 <= self.gpus_per_actor < math.inf):
            raise UserError(
                "cluster.gpus_per_actor",
                expected="at least 0, and finite, or -1 for one where there are any",
                got=repr(self.gpus_per_actor),
                remedy="give the GPUs of one actor, or a part of one",
            )
        for name, least in {"cpus_per_actor": 0, "threads_per_actor": 0, "lease_s": 1}.items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(
                    f"cluster.{name}",
                    expected=f"at least {least}, and finite",
                    got=repr(getattr(self, name)),
                    remedy="raise it",
                )


@dataclass(frozen=True, kw_only=True)
class CampaignConfig:
    """Everything that a campaign is, section by section."""

    seed: int = 0
    # Points of validation accuracy that may be lost; -1 = off. Where given, one network comes back, the smallest that
    # holds: episode.targets are the first guesses, and the gap between them is halved until it is found.
    max_drop: float = -1.0
    peers: tuple[str, ...] = ()  # of PEERS; at each target the network of each is recovered beside the search's
    network: NetworkConfig = field(default_factory=NetworkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transfer: TransferConfig = field(
        default_factory=TransferConfig
    )  # of network.weights to other classes, at the start
    # training from scratch, where no weights are given, or on the new classes, where there is a transfer
    baseline: TrainConfig = field(default_factory=TrainConfig)
    replacement: ReplacementConfig = field(default_factory=ReplacementConfig)  # of filters, before anything is pruned
    replacement_training: TrainConfig = field(default_factory=TrainConfig)  # after it, where there is any
    episode: EpisodeConfig = field(default_factory=EpisodeConfig)
    search: ScheduleConfig = field(default_factory=ScheduleConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)  # of the chosen networks, at the end
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        """Check what belongs to no section; raises UserError."""
        if not (0.0 <= self.max_drop < 100.0 or self.max_drop == -1.0):
            raise UserError(
                "max_drop",
                expected="points in [0, 100), or -1 for none",
                got=repr(self.max_drop),
                remedy="1.0 allows one point",
            )
        if self.has_limit and self.search.like:
            raise UserError(
                "search.like",
                expected="no max_drop beside it, as its widths are of one size",
                got=f"{self.search.like} and max_drop = {self.max_drop:g}",
                remedy="leave one of the two out",
            )
        if not set(self.peers) <= set(PEERS) or len(set(self.peers)) < len(self.peers):
            raise UserError(
                "peers",
                expected=f"different ones of {', '.join(PEERS)}",
                got=repr(list(self.peers)),
                remedy="leave out what is not among them",
            )
        if self.transfer.how == "prune" and self.replacement.how == "reinit":
            raise UserError(
                "replacement.how",
                expected="another after transfer.how = prune: fresh weights of a whole network do not fit there",
                got="'reinit'",
                remedy="set transfer.how = reinit instead, or choose another replacement",
            )

    @property
    def has_limit(self) -> bool:
        """Whether the smallest network within `max_drop` is looked for."""
        return self.max_drop >= 0.0

    @property
    def groups(self) -> tuple[str, ...]:
        """Whose networks are recovered: the groups that play, and the peers."""
        return (*self.search.groups, *self.peers)

    @property
    def controller_start(self) -> Path | None:
        """The file that the Controller begins with; None for nothing."""
        weights, sizes = self.controller.weights, dataclasses.replace(self.controller, weights="taught")
        if weights != "taught":
            return Path(weights) if weights else None
        return TAUGHT.get(self.network.name) if sizes == ControllerConfig() else None

    @property
    def schedule(self) -> ScheduleConfig:
        """`search`, with how far is explored where it does not say."""
        taught = self.search.sigma < 0 and self.controller_start is not None
        return dataclasses.replace(self.search, sigma=TAUGHT_SIGMA) if taught else self.search

    @property
    def replay_in_search(self) -> ReplayConfig:
        """The replay's configuration; learning starts when the teachers have played, or some episodes of its own."""
        some = min(_FIRST_EPISODES, self.search.per_group // 4)
        first = self.replay.min_sequences or max(1, self.search.teachers, some)
        return dataclasses.replace(self.replay, min_sequences=min(first, self.search.per_group))


def load(path: Path, overrides: Sequence[str] = ()) -> CampaignConfig:
    """Read a TOML file and apply `a.b=c` overrides.

    Raises:
        UserError: the file is missing or no TOML; a key is unknown or a value ill-typed or out of range.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise UserError(f"config {path}", expected="a TOML file", got=str(got), remedy="check the path") from error
    return parse(text, overrides, name=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, name: str = "config") -> CampaignConfig:
    """The configuration in TOML text; see `load`."""
    try:
        tree: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(name, expected="TOML", got=str(error), remedy="mend that line") from error
    for override in overrides:
        _override(tree, override)
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> CampaignConfig:
    """The configuration in a table of sections, as TOML gives it; see `load`."""
    config = _build(CampaignConfig, _plain(tree), "")
    assert isinstance(config, CampaignConfig)
    return config


def dump(config: CampaignConfig) -> str:
    """The configuration as TOML, every value written out; `parse` gives it back."""
    return tomli_w.dumps(_plain(dataclasses.asdict(config)))


def resolved(text: str) -> str:
    """The same configuration with every value written out: a file of an older version did not know every key."""
    return dump(parse(text, name="campaign.toml"))


def _plain(value: Any) -> Any:
    """Tuples as lists and NumPy's numbers as Python's, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _override(tree: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`; c is TOML, or a plain string where it is not."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError("--set", expected="section.key=value", got=repr(override), remedy="e.g. --set search.actors=4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {path}", expected="a section before the dot", got=key, remedy="check the key")
    tree[keys[-1]] = value


def _build(kind: type, tree: Mapping[str, Any], path: str) -> Any:
    """A dataclass from a TOML table; unknown keys are errors."""
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise UserError(
                f"key {path}{key}",
                expected=f"one of {', '.join(hints)}",
                got=repr(key),
                remedy=f"did you mean {path}{near[0]}?" if near else "remove it",
            )
    values = {key: _value(hints[key], value, f"{path}{key}") for key, value in tree.items()}
    try:
        return kind(**values)
    except ValueError as error:  # the replay's own configuration knows nothing of users
        raise UserError(
            f"section [{path.rstrip('.')}]", expected="values in range", got=str(error), remedy="change that value"
        ) from None
    except UserError as error:  # a TrainConfig does not know whether it is the baseline's or the recovery's
        section = path.rstrip(".")
        what = (
            f"{section}.{error.what.partition('.')[2]}" if error.what.startswith("train.") and section else error.what
        )
        remedy = error.remedy.replace(error.what, what)
        raise UserError(what, expected=error.expected, got=error.got, remedy=remedy) from None


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise UserError(f"key {path}", expected="a section", got=repr(value), remedy=f"write [{path}]")
        return _build(hint, value, f"{path}.")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise UserError(f"key {path}", expected="a list", got=repr(value), remedy=f"write {path} = [...]")
        return tuple(_value(typing.get_args(hint)[0], item, path) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, types.UnionType) or type(value) is not hint:
        name = getattr(hint, "__name__", str(hint))
        raise UserError(
            f"key {path}",
            expected=_NAMES.get(name, name),
            got=f"{value!r}",
            remedy=f"give it as {_NAMES.get(name, name)}",
        )
    return value


_NAMES = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}
