import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

from actors.player import Brief, Player
from actors.rollout import StepReport, Underway, rollout
from actors.schedule import order
from actors.snapshot import _MAGIC, Snapshot, _with_tensors, _without_tensors, snapshot_from_bytes, snapshot_to_bytes
from agents.policies import heuristic
from env.data import Dataset
from learner.replay.codec import PayloadError, seal
from learner.replay.ledger import Ledger

FINGERPRINT = "the right one"


@pytest.fixture
def player(brief: Brief, dataset: Dataset, ledger: Ledger) -> Player:
    return Player("actor-0", brief, dataset)


def made(player: Player, *, steps: int, offsets: np.ndarray | None = None) -> Snapshot:
    """Of an episode after so many of its three steps; the second reaches the first target."""
    policy, kept = heuristic("random-filters", player.plan, seed=4), list[Snapshot]()

    def keep(now: StepReport) -> None:
        if now.step == steps:
            found = Snapshot(
                begun_by="actor-7",
                steps_again=5,
                seconds=2.5,
                weights_version=3,
                weights=player._fresh.state_dict(),
                offsets=offsets,
                policy=policy.state_dict(),
                env=player.env.state_dict(),
                underway=now.underway,
            )
            data = snapshot_to_bytes(found, fingerprint=FINGERPRINT, recognizer=player.env.recognizer)
            kept.append(snapshot_from_bytes(data, fingerprint=FINGERPRINT, recognizer=player.env.recognizer))

    rollout(player.env, policy, player.ladder, seed=1, on_step=keep)
    return kept[0]


def written(snapshot: Snapshot, player: Player) -> bytes:
    return snapshot_to_bytes(snapshot, fingerprint=FINGERPRINT, recognizer=player.env.recognizer)


def read(data: bytes, player: Player, fingerprint: str = FINGERPRINT) -> Snapshot:
    return snapshot_from_bytes(data, fingerprint=fingerprint, recognizer=player.env.recognizer)


def test_what_is_written_is_read_back_bit_for_bit(player: Player) -> None:
    offsets = np.random.default_rng(0).standard_normal(6)
    first = made(player, steps=2, offsets=offsets)
    again = read(written(first, player), player)
    assert (again.begun_by, again.steps_again, again.seconds, again.weights_version) == ("actor-7", 5, 2.5, 3)
    assert again.offsets is not None
    assert again.offsets.tolist() == offsets.tolist()
    for mine, theirs in ((first.weights, again.weights), (first.policy, again.policy)):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert_same(first.underway, again.underway)


def assert_same(one: Underway, other: Underway) -> None:
    mine, theirs = one.course.trace(), other.course.trace()
    assert mine.observations.keys() == theirs.observations.keys()
    pairs = [(mine.observations[name], theirs.observations[name]) for name in mine.observations]
    pairs += [(mine.actions, theirs.actions), (mine.rewards, theirs.rewards), (mine.states, theirs.states)]
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert one.course.over is other.course.over is False
    assert (one.seconds, one.collapsed) == (other.seconds, other.collapsed)
    assert one.reached == other.reached
    assert len(one.reached) == 1
    for a, b in zip(one.reached, other.reached, strict=True):
        assert torch.equal(a.body.keep_mask, b.body.keep_mask)
        tensors, others = a.body.network.state_dict(), b.body.network.state_dict()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors | others)


def test_a_tensor_that_is_called_as_its_place_is_found_again() -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = {"network": {"tensor": torch.tensor([1.0])}, "list": [np.arange(3), None, "text", {"tensor": 7}]}
    again = _with_tensors(json.loads(json.dumps(_without_tensors(tree, tensors))), tensors)
    assert again["network"]["tensor"].tolist() == [1.0]
    assert again["list"][0].tolist() == [0, 1, 2]
    assert again["list"][1:] == [None, "text", {"tensor": 7}]


def test_another_campaign_or_episode_is_refused(player: Player) -> None:
    data = written(made(player, steps=1), player)
    with pytest.raises(PayloadError, match="snapshot's fingerprint: expected another one, got the right one"):
        read(data, player, "another one")


def test_another_format_is_refused(player: Player) -> None:
    text = json.dumps({"format": 2, "fingerprint": FINGERPRINT}).encode()
    with pytest.raises(PayloadError, match="snapshot's format: expected 1, got 2"):
        read(seal(_MAGIC, len(text), text + save_tensors({})), player)
    with pytest.raises(PayloadError, match="payload's first bytes"):
        read(seal(b"ZOWT", len(text), text), player)


def test_a_byte_that_has_changed_anywhere_is_found(player: Player) -> None:
    data = written(made(player, steps=1), player)
    for place in np.random.default_rng(0).integers(len(data), size=30):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises(PayloadError):
            read(bytes(broken), player)
    with pytest.raises(PayloadError):
        read(data[:-1], player)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"keep_mask": torch.ones(3, dtype=torch.bool)}, r"keep_mask: expected bool \[\d+\], got bool \[3\]"),
        ({"network": {}}, r"network: expected \d+ tensors by name, got 0"),
        ({"scores": torch.zeros(2, 3)}, r"scores: expected float32 \[\d+, 3\], got torch.float32 \[2, 3\]"),
    ],
)
def test_an_environment_takes_no_state_that_is_not_its_own(player: Player, part: dict[str, Any], message: str) -> None:
    env = made(player, steps=1).env
    with pytest.raises(ValueError, match=message):
        player.env.load_state_dict({**env, **part})


def test_a_network_that_does_not_fit_its_mask_is_refused(player: Player) -> None:
    env = made(player, steps=1).env
    name, tensor = next(iter(env["network"].items()))
    wider = {**env["network"], name: torch.cat([tensor, tensor])}
    with pytest.raises(ValueError, match=f"network's {name}: expected float32"):
        player.env.load_state_dict({**env, "network": wider})


def test_the_fingerprint_tells_episodes_campaigns_and_settings_apart(brief: Brief) -> None:
    first, second = (order(brief.schedule, episode, seed=brief.seed) for episode in (0, 1))
    others = [
        replace(brief, prefix="another"),
        replace(brief, seed=brief.seed + 1),
        replace(brief, baseline=b"another"),
        replace(brief, episode=replace(brief.episode, step_minibatches=2)),
        replace(brief, controller_start=b"another"),
    ]
    prints = [brief.fingerprint(first), brief.fingerprint(second), *(other.fingerprint(first) for other in others)]
    assert len(set(prints)) == len(prints)
    moved = replace(brief, redis_url="redis://elsewhere", campaign="renamed", lease_s=1.0)
    assert moved.fingerprint(first) == brief.fingerprint(first)
