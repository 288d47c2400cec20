"""One Controller from many campaigns: what their replays hold, learned from together. Called by `zeroout teach`.

A campaign that begins with what another has learned forgets of it what its own few episodes happen to speak against
(trial 23 of the search log). Sampled side by side they are one experience, and agree where there is something to find.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from actors.player import fresh_controller, ladder_of, packing_of
from agents.controller import Controller
from deploy.config import CampaignConfig, load
from deploy.folder import CampaignFolder, write_atomic
from deploy.redis_server import EmbeddedServer, running_url
from deploy.replay_info import recorded_url
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, form_of_file
from env.errors import UserError
from env.measure import Measure
from env.networks import NetworkConfig
from env.seeds import derive_seed
from learner.learner import Learner
from learner.replay.connection import connect
from learner.replay.replay import Item, Replay
from learner.replay.shards import ShardedReplay, open_replay

__all__ = ["Taught", "teach"]

_SAY_PERIOD = 50  # updates
_NEW = 1.0  # priority of a sequence before its first update: above what errors come to, so that each is seen once


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a Controller was made of."""

    sequences: int
    updates: int


def teach(
    folders: Sequence[CampaignFolder],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    redis_url: str = "",
    say: Callable[[str], object] = lambda _line: None,
) -> Taught:
    """Learn from nothing, from the replays of `folders` together, and write the Controller to `out` (safetensors).

    The settings are the first campaign's with `overrides`; each sequence is sampled `replay.replay_ratio` times in the
    mean. Campaigns may be of different networks. With equal campaigns and settings equal weights come out. `redis_url`
    is asked for the replay of a campaign that has none of its own.

    Raises:
        UserError: a folder has no replay, or its campaign has another Controller or measure than the first's.
        NonFiniteError: too many updates in a row were skipped.

    """
    config = load(folders[0].campaign_toml, overrides)
    if config.cluster.threads_per_actor:  # as in a campaign: a Controller is small, and threads would only wait
        torch.set_num_threads(config.cluster.threads_per_actor)
    _check_alike(folders, overrides)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        client = connect(stack.enter_context(EmbeddedServer(Path(scratch))).url)
        stack.callback(client.close)
        settings = replace(config.replay, min_sequences=0, shards=1)
        lessons: list[_Lesson] = []
        for number, of_one in enumerate(_by_ladder(folders, overrides)):
            random = np.random.default_rng(derive_seed(config.seed, "teach", str(number)))
            replay = open_replay([client], f"zeroout:teach:{number}", settings, random)
            sequences = _fill(replay, of_one, redis_url, say)
            controller, learner = _learner(of_one[0], config, overrides, replay, lessons)
            lessons.append(_Lesson(controller, learner, replay, sequences))
        _learn(lessons, say)
    learned = lessons[0].controller.state_dict()
    write_atomic(out, save_tensors({name: tensor.contiguous() for name, tensor in learned.items()}))
    return Taught(
        sequences=sum(lesson.sequences for lesson in lessons),
        updates=sum(lesson.learner.updates for lesson in lessons),
    )


@dataclass(frozen=True)
class _Lesson:
    """The campaigns with one network and ladder: a learner of the one Controller, and the replay it learns from."""

    controller: Controller
    learner: Learner
    replay: Replay | ShardedReplay
    sequences: int

    @property
    def share_done(self) -> float:
        """In sequences sampled for each that there is."""
        return self.learner.updates / self.sequences


def _fill(
    replay: Replay | ShardedReplay, folders: Sequence[CampaignFolder], redis_url: str, say: Callable[[str], object]
) -> int:
    """Put what the replays of these campaigns hold into one; returns how many sequences that are."""
    sequences = 0
    for number, folder in enumerate(folders):
        held = replay.insert(Item(f"{number}/{name}", data, _NEW) for name, data in _held(folder, redis_url))
        if not held:
            raise _no_replay(folder, "an empty one")
        sequences += held
        say(f"{folder.path}: {held} sequences")
    return sequences


def _learner(
    folder: CampaignFolder,
    config: CampaignConfig,
    overrides: Sequence[str],
    replay: Replay | ShardedReplay,
    before: Sequence[_Lesson],
) -> tuple[Controller, Learner]:
    """A Controller for the network of `folder` and its learner; what is learned is that of those `before` it, too."""
    own = load(folder.campaign_toml, overrides)
    plan, measure = _plan_of(folder, own)
    if before:
        controller, optimizer = before[0].controller.on(plan, measure.name), before[0].learner.optimizer
    else:
        controller = fresh_controller(config.controller, plan, measure.name, start=b"", seed=config.seed)
        optimizer = None
    ladder, packing = ladder_of(own.episode, plan, measure), packing_of(config.controller, plan)
    return controller, Learner(controller, ladder, replay, config.learner, config.sequence, packing, optimizer)


def _learn(lessons: Sequence[_Lesson], say: Callable[[str], object]) -> None:
    """Update until every replay has been sampled as often as it allows; at each turn from the one that is behind."""
    updates = 0
    while unfinished := [lesson for lesson in lessons if not lesson.replay.stats().learner_waiting]:
        report = min(unfinished, key=lambda lesson: lesson.share_done).learner.update()
        updates += report is not None
        if report is not None and updates % _SAY_PERIOD == 0:
            say(f"{updates} updates: loss {report.loss:.4g}, mean priority {report.mean_priority:.4g}")


def _plan_of(folder: CampaignFolder, config: CampaignConfig) -> tuple[ChannelPlan, Measure]:
    """The units of a campaign's network, and what its compression is counted against."""
    form = _form_of(folder)
    example = torch.zeros(1, form.channels, form.image_size, form.image_width or form.image_size)
    as_given = ChannelPlan(replace(form, network=replace(form.network, skips="coupled")).build(), example)
    name = config.episode.measure
    plan = ChannelPlan(form.build(), example) if form.network.skips == "convolution" else as_given
    return plan, Measure(name, as_given.costs(as_given.widths)[name])


def _form_of(folder: CampaignFolder) -> NetworkForm:
    file = folder.baseline / "model.safetensors"
    if not file.is_file():
        raise _no_replay(folder, "none: it has no baseline yet")
    return form_of_file(str(file))


def _check_alike(folders: Sequence[CampaignFolder], overrides: Sequence[str]) -> None:
    """UserError where the sequences of a folder are not those of the first campaign's Controller."""
    first = _kind(folders[0], overrides)
    for folder in folders[1:]:
        for name, value in _kind(folder, overrides).items():
            if value != first[name]:
                raise UserError(
                    f"campaign {folder.path}",
                    expected=f"{name} as in {folders[0].path}, {first[name]}",
                    got=str(value),
                    remedy="teach from campaigns that measure alike, with one Controller",
                )


def _kind(folder: CampaignFolder, overrides: Sequence[str]) -> dict[str, object]:
    """What campaigns must have in common to be learned from together, by name."""
    config = load(folder.campaign_toml, overrides)
    kind: dict[str, object] = {
        "episode.measure": config.episode.measure,
        "controller (its sizes)": replace(config.controller, weights=""),
        "sequence": config.sequence,
    }
    if config.controller.observation == "mask":  # whose layers are made for one network
        kind["network (of a Controller that reads the mask alone)"] = _network_of(folder)
    return kind


def _by_ladder(folders: Sequence[CampaignFolder], overrides: Sequence[str]) -> list[list[CampaignFolder]]:
    """The folders whose network and ladder are alike together, in the order in which they come first."""
    found: dict[object, list[CampaignFolder]] = {}
    for folder in folders:
        episode = load(folder.campaign_toml, overrides).episode
        ladder = episode.targets, episode.waypoints, episode.min_width
        found.setdefault((_network_of(folder), ladder), []).append(folder)
    return list(found.values())


def _network_of(folder: CampaignFolder) -> tuple[NetworkConfig, int, int, int]:
    """A network without its weights, and the images it is for; equal ones have equal units."""
    form = _form_of(folder)
    return replace(form.network, weights=""), form.channels, form.image_size, form.image_width


def _held(folder: CampaignFolder, redis_url: str) -> Iterator[tuple[str, bytes]]:
    """The sequences in a campaign's replay: (id, payload), oldest first."""
    prefix = folder.redis_prefix()
    if prefix is None:
        raise _no_replay(folder, "none: its method learns nothing, or its search has not begun")
    config = load(folder.campaign_toml).replay
    with _server_of(folder, redis_url) as url, contextlib.closing(connect(url)) as client:
        yield from open_replay([client], prefix, config, np.random.default_rng(0)).held()  # nothing is drawn


@contextlib.contextmanager
def _server_of(folder: CampaignFolder, redis_url: str) -> Iterator[str]:
    """The URL of the server that holds a campaign's replay; its own is started where it does not run."""
    if not folder.redis.is_dir():
        yield redis_url or recorded_url(folder)
    elif running := running_url(folder.redis):
        yield running
    else:
        with EmbeddedServer(folder.redis) as server:
            yield server.url


def _no_replay(folder: CampaignFolder, got: str) -> UserError:
    return UserError(
        f"campaign {folder.path}",
        expected="one in which a Controller has learned, with its replay",
        got=got,
        remedy="leave it out, or give the --redis it was played with",
    )
