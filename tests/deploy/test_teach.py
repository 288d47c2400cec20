"""Campaigns are folders made by hand: a network, a Redis of their own, and episodes whose reward we know."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents.controller import Controller, Observations
from agents.ladder import Ladder
from agents.network import RecurrentState
from deploy.config import CampaignConfig, dump, parse
from deploy.folder import CampaignFolder
from deploy.redis_server import EmbeddedServer
from deploy.teach import teach
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, network_to_bytes
from env.errors import UserError
from env.importance import FEATURES
from env.measure import Measure
from learner.packing import MaskPacking
from learner.replay.codec import encode
from learner.replay.connection import connect
from learner.replay.replay import Item
from learner.replay.shards import open_replay
from learner.sequence import EpisodeTrace, cut

L1, GAMMA = FEATURES.index("log_l1"), FEATURES.index("log_gamma")
SETTINGS = """
network.name = "small"
network.width = 0.5
[episode]
waypoints = 4
[controller]
hidden_size = 16
[learner]
learning_rate = 0.01
adam_epsilon = 1e-5
discount = 1.0
[sequence]
unroll_length = 4
burn_in = 1
sequence_period = 4
"""


def settings(*overrides: str) -> CampaignConfig:
    return parse(SETTINGS, overrides)


def made(config: CampaignConfig) -> tuple[NetworkForm, ChannelPlan, Ladder]:
    form = NetworkForm(network=config.network, channels=1, classes=10, image_size=8)
    plan = ChannelPlan(form.build(), torch.zeros(1, 1, 8, 8))
    measure = Measure("parameters", plan.costs(plan.widths)["parameters"])
    episode = config.episode
    ladder = Ladder(
        plan, measure=measure, targets=episode.targets, waypoints=episode.waypoints, min_width=episode.min_width
    )
    return form, plan, ladder


def episode(config: CampaignConfig, plan: ChannelPlan, ladder: Ladder, seed: int, pays: int = L1) -> EpisodeTrace:
    """Filters by chance and a taste of the day; a deviation more of one score in what goes costs half a nat."""
    random = torch.Generator().manual_seed(seed)
    steps = len(ladder)
    alive, actions, rewards = [torch.ones(plan.units, dtype=torch.bool)], [], []
    features = torch.randn(steps + 1, plan.units, len(FEATURES), generator=random)
    for step in range(steps):
        scores = torch.randn(plan.units, generator=random) + features[step] @ torch.randn(
            len(FEATURES), generator=random
        )
        actions.append(ladder.cut(scores[None], alive[-1][None], torch.tensor([step]))[0])
        rewards.append(-0.5 * float(features[step, actions[-1], pays].mean()))
        alive.append(alive[-1] & ~actions[-1])
    keep_mask = torch.stack(alive)
    return EpisodeTrace(
        observations={
            "accuracy": torch.full((steps + 1,), 0.5).numpy(),
            "compression": ladder.compression(keep_mask).float().numpy(),
            "keep_mask": keep_mask.numpy(),
            "features": features.half().numpy(),
        },
        actions=torch.stack(actions).numpy(),
        rewards=np.array(rewards, np.float32),
        states=np.zeros((steps, 2, config.controller.hidden_size), np.float32),
        terminated=True,
    )


def campaign(path: Path, *overrides: str, seeds: range = range(30), pays: int = L1) -> CampaignFolder:
    """A campaign's folder, with the sequences of these episodes in its replay."""
    config = settings(*overrides)
    form, plan, ladder = made(config)
    folder = CampaignFolder.create(path, dump(config))
    folder.baseline.mkdir()
    (folder.baseline / "model.safetensors").write_bytes(network_to_bytes(form.build(), form))
    packing = MaskPacking(plan.units, len(FEATURES))
    traces = [episode(config, plan, ladder, seed, pays) for seed in seeds]
    sequences = [sequence for trace in traces for sequence in cut(trace, config.sequence, packing)]
    with EmbeddedServer(folder.redis) as server:
        client = connect(server.url)
        replay = open_replay([client], folder.make_redis_prefix(), config.replay, np.random.default_rng(0))
        replay.insert(Item(f"s{place}", encode(sequence), 1.0) for place, sequence in enumerate(sequences))
        client.close()
    return folder


def weights_of_scores(file: Path) -> list[float]:
    """What the Controller in `file` weighs the scores by, in the full network."""
    config = settings()
    _, plan, _ = made(config)
    controller = Controller(config.controller, plan)
    assert controller.adopt(load_file(file)) == []
    found: list[torch.Tensor] = []
    controller.filter_weights.register_forward_hook(lambda _module, _given, out: found.append(out))
    seen = Observations(
        accuracy=torch.full((1, 1), 0.5),
        compression=torch.zeros(1, 1),
        keep_mask=torch.ones(1, 1, plan.units, dtype=torch.bool),
        features=torch.zeros(1, 1, plan.units, len(FEATURES)),
    )
    state: RecurrentState = controller.initial_state()
    with torch.no_grad():
        controller(seen, state)
    return found[0][0, 0].tolist()


def test_what_the_campaigns_say_together_is_learned_and_twice_alike(tmp_path: Path) -> None:
    folders = [campaign(tmp_path / "a"), campaign(tmp_path / "b", "seed=1", seeds=range(30, 60))]
    said: list[str] = []
    taught = teach(folders, tmp_path / "one.safetensors", overrides=("replay.replay_ratio=50",), say=said.append)
    assert taught.sequences == 60
    assert taught.updates == (60 * 50 + 256) // 16
    assert said[:2] == [f"{folder.path}: 30 sequences" for folder in folders]
    taylor, gamma, l1 = weights_of_scores(tmp_path / "one.safetensors")
    assert l1 > 3.0  # it began at 0, and nothing else pays
    assert l1 > 2.0 * max(abs(taylor), abs(gamma))
    teach(folders, tmp_path / "two.safetensors", overrides=("replay.replay_ratio=50",))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_given_redis_is_not_asked_for_the_replay_of_a_campaign_with_its_own(tmp_path: Path) -> None:
    folders = [campaign(tmp_path / "a", seeds=range(2)), campaign(tmp_path / "b", "seed=1", seeds=range(2))]
    nowhere, out = "redis://127.0.0.1:1/0", tmp_path / "one.safetensors"
    with EmbeddedServer(folders[0].redis):  # one runs, the other is started
        taught = teach(folders, out, overrides=("replay.replay_ratio=1",), redis_url=nowhere)
    assert taught.sequences == 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("controller.hidden_size=8",), "expected controller"),
        (("sequence.unroll_length=8",), "expected sequence"),
        (('episode.measure="macs"',), "expected episode.measure as in .* parameters, got macs"),
    ],
)
def test_campaigns_of_another_kind_are_not_mixed_in(tmp_path: Path, overrides: tuple[str, ...], expected: str) -> None:
    folders = [campaign(tmp_path / "a", seeds=range(1)), campaign(tmp_path / "b", *overrides, seeds=range(1))]
    with pytest.raises(UserError, match=expected):
        teach(folders, tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


def emptied(folder: CampaignFolder) -> None:
    for file in sorted(folder.redis.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()


@pytest.mark.parametrize(
    ("harm", "got"),
    [
        (emptied, "an empty one"),
        (lambda folder: (folder.path / "id").unlink(), "its method learns nothing"),
        (lambda folder: (folder.baseline / "model.safetensors").unlink(), "no baseline yet"),
    ],
)
def test_a_campaign_without_a_replay_is_one_line(tmp_path: Path, harm: Any, got: str) -> None:
    folder = campaign(tmp_path / "a", seeds=range(1))
    harm(folder)
    with pytest.raises(UserError, match=f"campaign .*a; expected one in which .* got .*{got}".replace("; ", ".*")):
        teach([folder], tmp_path / "one.safetensors")


def test_campaigns_of_two_networks_teach_one_controller(tmp_path: Path) -> None:
    """In one network it is L1 that pays, in the other gamma."""
    folders = [
        campaign(tmp_path / "a", seeds=range(20)),
        campaign(tmp_path / "b", "network.width=0.25", "episode.waypoints=5", seeds=range(20, 50), pays=GAMMA),
        campaign(tmp_path / "c", "seed=1", seeds=range(50, 60)),
    ]
    said: list[str] = []
    taught = teach(folders, tmp_path / "one.safetensors", overrides=("replay.replay_ratio=50",), say=said.append)
    assert [line.rpartition(": ")[2] for line in said[:3]] == ["20 sequences", "10 sequences", "60 sequences"]
    assert taught.sequences == 90
    assert taught.updates == (30 * 50 + 256) // 16 + (60 * 50 + 256) // 16
    taylor, gamma, l1 = weights_of_scores(tmp_path / "one.safetensors")
    assert min(l1, gamma) > 1.5 * abs(taylor)


def test_a_controller_that_reads_the_mask_alone_is_taught_by_one_network(tmp_path: Path) -> None:
    mask = 'controller.observation="mask"'
    folders = [campaign(tmp_path / "a", mask, seeds=range(1)), campaign(tmp_path / "b", mask, "network.width=0.25")]
    with pytest.raises(UserError, match=r"expected network .* as in"):
        teach(folders, tmp_path / "one.safetensors")
