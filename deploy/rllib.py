"""R2D2 as an RLlib algorithm, for those who tune and log with Ray: a thin shell over a campaign's second stage.

    R2D2Config().environment(env_config={"episode": {"targets": [0.9]}}).build_algo().train()

`train()` returns when at least one more episode is played; actors, learner, replay, ledger and folder are a campaign's
own (deploy/search.py), so `zeroout status`, `report` and `resume` also read `algo.campaign_folder`. RLlib's runners,
learners and buffers are not used, and its settings that would ask for them are refused. Imported by users only.

A checkpoint holds the learner's state, the episodes so far and their frontier, and names the replay by its server and
prefix: the sequences stay where they are. The server is $ZEROOUT_REDIS_URL, else one of the campaign's own.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
import ray.exceptions
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.utils import force_list
from ray.rllib.utils.checkpoints import Checkpointable
from rich.console import Console

from actors.schedule import ScheduleConfig
from deploy.config import CampaignConfig, ClusterConfig, dump, from_tree
from deploy.folder import CampaignFolder, write_atomic, write_json
from deploy.frontier import frontier
from deploy.prepare import preflight, prepare
from deploy.process_list import REDIS_VARIABLE
from deploy.progress import PlainProgress
from deploy.redis_server import EmbeddedServer
from deploy.search import POLL_S, Watch, open_services, open_telemetry, server_name
from env.errors import UserError
from learner import checkpoint
from learner.learner import LearnerConfig
from learner.replay.connection import check_server, connect
from learner.replay.shards import open_replay

__all__ = ["R2D2", "R2D2Config"]

_log = logging.getLogger(__name__)

_ENVIRONMENT = "Compression-v0"
_ENV_SECTIONS = ("network", "data", "baseline", "episode")
_SECTIONS = ("controller", "sequence", "replay", "learner", "search", "cluster")
#: Our keys that RLlib has a setting of its own for.
_RLLIB_NAMES = {
    "learner.learning_rate": "lr",
    "learner.discount": "gamma",
    "learner.gradient_clip": "grad_clip",
    "search.actors": "num_env_runners",
    "cluster.cpus_per_actor": "num_cpus_per_env_runner",
    "cluster.gpus_per_actor": "num_gpus_per_env_runner",
}
#: Our keys that mean nothing here.
_NOT_HERE = {
    "search.method": "use `zeroout prune` or `zeroout run` for other deciders",
    "search.controls": "use `zeroout run --controls` to compare the Controller",
    "cluster.ray_address": "use ray.init(address=...)",
    "cluster.dashboard": "use ray.init(include_dashboard=...)",
}
#: RLlib's settings that are honoured, as attributes of its configuration; every other one has to keep its default.
_HONOURED = {
    *_RLLIB_NAMES.values(),
    *_SECTIONS,
    "env",
    "env_config",
    "seed",
    "metrics_num_episodes_for_smoothing",
    "callbacks_class",
    "callbacks_on_algorithm_init",
    "callbacks_on_train_result",
    "callbacks_on_checkpoint_loaded",
    "num_cpus_for_main_process",
    "custom_resources_for_main_process",
    "placement_strategy",
    "log_level",
    "logger_creator",
    "logger_config",
    "log_sys_usage",
    # what RLlib itself sets
    "algo_class",
    "class",
    "policies",
    "_is_frozen",
}


def _refused(key: str, got: object, remedy: str) -> UserError:
    return UserError(key, expected="nothing here", got=repr(got), remedy=remedy)


def _unknown(what: str, name: str, known: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "remove it"
    return UserError(what, expected=f"one of {', '.join(known)}", got=repr(name), remedy=remedy)


class R2D2Config(AlgorithmConfig):
    """The settings of R2D2, by RLlib's methods.

    | method | takes |
    |---|---|
    | `environment(env_config=...)` | tables `network`, `data`, `baseline` and `episode` of a campaign's file |
    | `training(...)` | `lr`, `gamma`, `grad_clip`; tables `controller`, `sequence`, `replay`, `learner`, `search` |
    | `env_runners(...)` | `num_env_runners` (the actors), `num_cpus_per_env_runner`, `num_gpus_per_env_runner` |
    | `resources(...)` | table `cluster` (`threads_per_actor`, `lease_s`), and RLlib's for the main process |
    | `debugging(seed=...)` | the campaign's seed; 0 where it is None |

    What is wrong raises UserError, in one line, from `build_algo()` or Tune. Tune runs trials in folders of their own:
    paths in `env_config` must be absolute there.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or R2D2)
        learner, cluster = LearnerConfig(), ClusterConfig()
        super().environment(_ENVIRONMENT)
        super().training(lr=learner.learning_rate, gamma=learner.discount, grad_clip=learner.gradient_clip)
        super().env_runners(
            num_env_runners=ScheduleConfig().actors,
            num_cpus_per_env_runner=cluster.cpus_per_actor,  # type: ignore[arg-type]  # Ray takes parts of one, too
            num_gpus_per_env_runner=0.0,  # as RLlib: none but what is asked for
        )
        for section in _SECTIONS:
            setattr(self, section, {})

    def training(
        self,
        *,
        controller: Mapping[str, Any] | None = None,
        sequence: Mapping[str, Any] | None = None,
        replay: Mapping[str, Any] | None = None,
        learner: Mapping[str, Any] | None = None,
        search: Mapping[str, Any] | None = None,
        **rllib: Any,
    ) -> Self:
        """Set values of our sections, each a table as in a campaign's file; others keep what they have."""
        super().training(**rllib)
        return self._update(controller=controller, sequence=sequence, replay=replay, learner=learner, search=search)

    def resources(self, *, cluster: Mapping[str, Any] | None = None, **rllib: Any) -> Self:
        """Set values of `cluster`, and RLlib's own."""
        super().resources(**rllib)
        return self._update(cluster=cluster)

    def validate(self) -> None:
        """Check everything; UserError for what is wrong, or asked for and not honoured."""
        super().validate()
        if not self.in_evaluation:  # RLlib also asks about a copy for evaluation runners, which are not used
            self._check_names()
            self.campaign()

    def get_state(self) -> dict[str, Any]:
        """Return all settings; RLlib's own method leaves out those of -1, its sign for deprecated ones."""
        return super().get_state() | {name: getattr(self, name) for name in ("seed", *_RLLIB_NAMES.values())}

    def campaign(self) -> CampaignConfig:
        """The campaign that these settings mean; UserError where they mean none."""
        tree: dict[str, Any] = {"seed": 0 if self.seed is None else self.seed}
        tree |= self._table("env_config", self.env_config)
        tree |= {name: dict(self._table(name, getattr(self, name))) for name in _SECTIONS}
        for key, name in _RLLIB_NAMES.items():
            section, field = key.split(".")
            if field in tree[section]:
                raise _refused(key, tree[section][field], f"use RLlib's own setting, {name}")
            tree[section][field] = getattr(self, name)
        try:
            return from_tree(tree)
        except UserError as error:
            key = error.what.removeprefix("key ")
            raise UserError(
                _RLLIB_NAMES.get(key, error.what), expected=error.expected, got=error.got, remedy=error.remedy
            ) from None

    def _update(self, **sections: Any) -> Self:
        for name, values in sections.items():
            if values is not None:
                setattr(self, name, {**getattr(self, name), **self._table(name, values)})
        return self

    def _check_names(self) -> None:
        """UserError for settings that nobody reads."""
        settings = vars(self)
        if settings["env"] != _ENVIRONMENT:
            raise UserError("env", expected=_ENVIRONMENT, got=repr(settings["env"]), remedy="leave it out")
        foreign = [name for name in self._table("env_config", self.env_config) if name not in _ENV_SECTIONS]
        for name in foreign:
            raise _unknown(f"env_config key {name}", name, _ENV_SECTIONS)
        for key, remedy in _NOT_HERE.items():
            section, field = key.split(".")
            if field in getattr(self, section):
                raise _refused(key, getattr(self, section)[field], remedy)
        defaults = type(self)()
        AlgorithmConfig.validate(defaults)  # which changes some settings
        for name, value in settings.items():
            if name in _HONOURED or name.startswith("__"):  # Tune's own
                continue
            if not hasattr(defaults, name):
                raise _unknown(f"setting {name}", name, _SECTIONS)
            if value != getattr(defaults, name):
                raise UserError(
                    f"setting {name}",
                    expected=f"RLlib's default {getattr(defaults, name)!r}, since R2D2 does not use it",
                    got=repr(value),
                    remedy="leave it out",
                )

    @staticmethod
    def _table(name: str, value: object) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        raise UserError(name, expected="a table of settings (a dict)", got=repr(value), remedy="give a dict")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Replay:
    """A checkpoint's reference to its replay."""

    server: str  # as `server_name` gives it, without a password
    data: str  # the folder of an embedded server's data, absolute; "" for a server that others run
    prefix: str
    inserted: int  # sequences, when the checkpoint was made: what is there now holds as many or more


class R2D2(Algorithm):
    """The campaign behind RLlib's interface; made by `R2D2Config().build_algo()` or by Tune.

    Images and settings are checked when it is made. The baseline is prepared and the workers are started by the first
    `train()`, so that an algorithm that is restored from a checkpoint trains no baseline for nothing. When all episodes
    of `search.episodes` are played, the result's `done` is true.
    """

    @classmethod
    def get_default_config(cls) -> R2D2Config:
        """Return the settings to start from."""
        return R2D2Config()

    def __repr__(self) -> str:
        return "R2D2"  # RLlib's own needs settings, which there are none of when they are what is wrong

    def setup(self, config: Any) -> None:
        """Check images and network; UserError for what is wrong with them."""
        self._settings: R2D2Config = config
        self._campaign = self._settings.campaign()
        self._dataset = preflight(self._campaign, warn=_log.warning)
        self._progress = PlainProgress(Console(stderr=True))
        self._redis_url = os.environ.get(REDIS_VARIABLE, "")
        self._folder: CampaignFolder | None = None  # from the first `train()` or a checkpoint on
        self._watch: Watch | None = None  # while workers run
        self._opened = contextlib.ExitStack()  # closes what `train()` opened
        self._replay: _Replay | None = None  # a restored checkpoint's
        self._reported = 0  # the first so many of the folder's episodes were in results
        self.callbacks = [kind() for kind in force_list(self._settings.callbacks_class)]
        self._set_up_metrics()  # type: ignore[no-untyped-call]
        self._call("on_algorithm_init", metrics_logger=self.metrics)

    @property
    def campaign_folder(self) -> Path | None:
        """Where the campaign is kept; None before the first `train()`."""
        return self._folder.path if self._folder is not None else None

    def step(self) -> dict[str, Any]:
        """Wait for the next finished episodes, at least one; what `train()` adds RLlib's usual keys to.

        Raises UserError when there are none to play, Redis has lost them, or another algorithm plays them.
        """
        if self._reported >= self._campaign.search.total:
            raise UserError(
                "train()",
                expected=f"at most the {self._campaign.search.total} episodes of this search",
                got="a call after the last one (its result said done)",
                remedy="raise search.episodes",
            )
        watch = self._watch or self._start()
        while len(watch.records) <= self._reported:
            time.sleep(POLL_S)
            watch.look()
        fresh = len(watch.records) - self._reported
        self._reported += fresh
        if watch.over:
            watch.keep()
        return {**self._results(watch, fresh), "done": watch.over}

    def evaluate(self, *_: Any, **__: Any) -> dict[str, Any]:
        """There is no evaluation beside training; UserError."""
        raise UserError(
            "evaluate()",
            expected="train() alone, since every episode is measured on the validation images",
            got="a call",
            remedy="read `frontier` in the result of train(), or zeroout resume campaign_folder for the test images",
        )

    def cleanup(self) -> None:
        """End the workers and the server; the learner writes its last checkpoint first."""
        self._watch = None
        self._opened.close()

    def _start(self) -> Watch:
        """Prepare the baseline where there is none yet, and set the workers to work."""
        if self._folder is None:
            self._folder = CampaignFolder.create(_free(Path(self.logdir)), dump(self._campaign))
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._folder.held())
            baseline = prepare(self._folder, self._campaign, self._dataset, self._progress)
            services = stack.enter_context(
                open_services(
                    self._folder,
                    self._campaign,
                    self._dataset,
                    baseline,
                    redis_url=self._redis_url,
                    progress=self._progress,
                )
            )
            _require_alone(services.brief.prefix)
            if self._replay is not None:  # the server may have seen later weights than the checkpoint's
                services.weights.clear()
                services.ledger.beat("learner", "{}")
            telemetry = stack.enter_context(open_telemetry(self._folder, services))
            watch = Watch(self._folder, self._campaign, services, self._dataset, self._progress, telemetry)
            stack.callback(watch.kill)
            stack.callback(watch.stop)
            watch.start()
            self._opened = stack.pop_all()
        self._watch = watch
        return watch

    def _results(self, watch: Watch, fresh: int) -> dict[str, Any]:
        """What RLlib reports of runners and learners; the last `fresh` episodes are new."""
        records = watch.records[: self._reported]
        recent = records[-self._settings.metrics_num_episodes_for_smoothing :]
        lifetime = sum(record["steps"] for record in records)
        learner = json.loads(watch.ledger.beats().get("learner", "{}"))
        return {
            "env_runners": {
                **_statistics("episode_return", [record["return"] for record in recent]),
                **_statistics("episode_len", [record["steps"] for record in recent]),
                "episode_duration_sec_mean": statistics.fmean(record["seconds"] for record in recent),
                "num_episodes": fresh,
                "num_episodes_lifetime": len(records),
                "num_env_steps_sampled": sum(record["steps"] for record in records[-fresh:]),
                "num_env_steps_sampled_lifetime": lifetime,
            },
            # NaN before the first update: loggers to CSV keep to the keys of the first result
            "learners": {
                "default_policy": {
                    "total_loss": learner.get("loss", math.nan),
                    "mean_priority": learner.get("mean_priority", math.nan),
                    "num_grad_updates_lifetime": learner.get("updates", 0),
                    "num_skipped_updates_lifetime": learner.get("skipped", 0),
                }
            },
            "replay_buffer": {"num_sequences": learner.get("replay", 0)},
            "num_env_steps_sampled_lifetime": lifetime,
            "num_episodes_lifetime": len(records),
            "frontier": _best(records, self._campaign.episode.targets),
        }

    # ---- checkpoints: RLlib writes what `get_state` returns ----

    def get_state(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return everything that a checkpoint holds; a running learner writes a checkpoint of its own for it."""
        state = {"training_iteration": self.training_iteration, "time_total_s": self._time_total}
        return state if self._folder is None else {**state, "campaign": self._saved(self._folder)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `get_state`; what this algorithm did before is left in its folder.

        Raises UserError when the replay is not there or another one, or the settings are not the checkpoint's.
        """
        self.cleanup()
        saved = state.get("campaign")
        folder = None if saved is None else self._adopt(saved)
        self._folder = folder
        self._replay = None if saved is None else _Replay(**saved["replay"])
        self._reported = 0 if saved is None else len(saved["episodes"])
        self._iteration, self._time_total = state["training_iteration"], state["time_total_s"]

    def get_checkpointable_components(self) -> list[tuple[str, Checkpointable]]:
        """Return none: there are no runners and learners of RLlib's."""
        return []

    def restore_from_path(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Load a checkpoint; RLlib's own method goes on to its runners."""
        Checkpointable.restore_from_path(self, path, *args, **kwargs)

    def _saved(self, folder: CampaignFolder) -> dict[str, Any]:
        """A campaign as it stands, apart from its replay."""
        if self._watch is not None:
            try:
                ray.get(self._watch.workers["learner"].handle.save.remote())
            except ray.exceptions.RayActorError:
                _log.warning("the learner has just died: its newest checkpoint is taken")
        episodes = folder.read_episodes()[: self._reported]
        return {
            "campaign_toml": folder.campaign_toml.read_text(encoding="utf-8"),
            "baseline": {path.name: path.read_bytes() for path in folder.baseline.iterdir() if path.is_file()},
            "learner": checkpoint.load_newest(folder.checkpoints),
            "episodes": episodes,
            "frontier": frontier(episodes, self._campaign.episode.targets),
            "replay": dataclasses.asdict(self._reference(folder)),
        }

    def _reference(self, folder: CampaignFolder) -> _Replay:
        if self._watch is None:
            assert self._replay is not None
            return self._replay
        brief = self._watch.brief
        return _Replay(
            server=server_name(self._redis_url),
            data="" if self._redis_url else str(folder.redis.resolve()),
            prefix=brief.prefix,
            inserted=_inserted(brief.redis_url, brief.prefix, self._campaign),
        )

    def _adopt(self, saved: Mapping[str, Any]) -> CampaignFolder:
        """A new folder with what a checkpoint holds, whose Redis is the checkpoint's."""
        if saved["campaign_toml"] != dump(self._campaign):
            raise UserError(
                "this checkpoint",
                expected="an algorithm with the settings that it was saved with",
                got="other settings",
                remedy="use R2D2.from_checkpoint(path), or the same R2D2Config",
            )
        replay = _Replay(**saved["replay"])
        _require_replay(replay, self._redis_url, self._campaign)
        folder = CampaignFolder.create(_free(Path(self.logdir)), saved["campaign_toml"])
        folder.baseline.mkdir()
        for name, content in saved["baseline"].items():
            write_atomic(folder.baseline / name, content)
        if saved["learner"] is not None:
            checkpoint.save(folder.checkpoints, saved["learner"], saved["learner"]["updates"])
        folder.append_episode(saved["episodes"])
        write_json(folder.frontier_json, {"episodes_total": self._campaign.search.total, "targets": saved["frontier"]})
        folder.adopt_redis_prefix(replay.prefix)
        if replay.data:
            folder.redis.symlink_to(replay.data)
        return folder

    def _call(self, event: str, **arguments: Any) -> None:
        functions = getattr(self._settings, f"callbacks_{event}")
        make_callback(event, self.callbacks, functions, kwargs={"algorithm": self, **arguments})


def _free(folder: Path) -> Path:
    """The first of campaign, campaign.1, campaign.2, ... that is not there."""
    number = 0
    while (path := folder / (f"campaign.{number}" if number else "campaign")).exists():
        number += 1
    return path


def _statistics(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_mean": statistics.fmean(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def _best(records: Sequence[dict[str, Any]], targets: Sequence[float]) -> dict[str, dict[str, float]]:
    """The best network so far at each target, NaN where none got there."""
    kept = ("compression", "accuracy", "cross_entropy")
    return {
        f"{row['target']}": {name: row["best"][name] if row["best"] else math.nan for name in kept}
        for row in frontier(records, targets)
    }


def _require_alone(prefix: str) -> None:
    """UserError when another algorithm runs on this replay in the same cluster: each would undo the other's work."""
    with contextlib.suppress(ValueError):  # what Ray raises when there is none
        ray.get_actor("learner", namespace=prefix)
        raise UserError(
            f"the replay {prefix}",
            expected="no other algorithm that uses it",
            got="one that is running",
            remedy="call its stop() first",
        )


def _require_replay(replay: _Replay, redis_url: str, campaign: CampaignConfig) -> None:
    """UserError unless the replay that a checkpoint names is there, and has what it had then."""
    what = f"the replay {replay.prefix} of this checkpoint"
    if server_name(redis_url) != replay.server:
        raise UserError(
            what,
            expected=f"the Redis it began with ({replay.server})",
            got=server_name(redis_url),
            remedy="set (or unset) ZEROOUT_REDIS_URL as it was",
        )
    if replay.data and not Path(replay.data).is_dir():
        raise UserError(
            what,
            expected=f"its data in {replay.data}",
            got="no such folder on this host",
            remedy="bring the folder back, or start a new algorithm",
        )
    with EmbeddedServer(Path(replay.data)) if replay.data else contextlib.nullcontext() as server:
        found = _inserted(server.url if server else redis_url, replay.prefix, campaign)
    if found < replay.inserted:
        raise UserError(
            what,
            expected=f"at least the {replay.inserted} sequences that were inserted when it was saved",
            got=f"{found} at {replay.server}",
            remedy="its data were deleted or replaced: start a new algorithm",
        )


def _inserted(url: str, prefix: str, campaign: CampaignConfig) -> int:
    """How many sequences the replay has ever taken; 0 for one that is not there."""
    with contextlib.closing(connect(url)) as client:
        check_server(client, url)
        return open_replay([client], prefix, campaign.replay_in_search, np.random.default_rng(0)).stats().inserted
