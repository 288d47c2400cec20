"""A snapshot: an episode in flight as bytes, from which any player goes on bit for bit as the one before would have.

Sealed as by learner/replay/codec.py: magic b"ZOSN", tag = bytes of the JSON; the body is the JSON, then a safetensors
file with the tensors that the JSON names by number. Never pickle. A value in a shared server may be anything: what is
damaged, of another format, or of another campaign or episode is refused by name.

Its size: the network in work, the network of each target reached so far, the Controller's weights, and for each step
about 14 bytes a filter. The ledger takes none above `MAX_SNAPSHOT_BYTES`. Called by actors/player.py.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from actors.play import Course
from actors.rollout import Underway
from env.compression import TargetReached
from env.recognizer import Recognizer
from env.retraining import Metrics
from learner.replay.codec import PayloadError, seal, unseal
from learner.replay.ledger import MAX_SNAPSHOT_BYTES
from learner.sequence import EpisodeTrace

__all__ = ["Snapshot", "snapshot_from_bytes", "snapshot_to_bytes"]

_MAGIC = b"ZOSN"
_FORMAT = 1  # of what the JSON says; the frame has a version of its own
_PLACE = "tensor"  # {"tensor": "3"} stands in the JSON where the tensor "3" was


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An episode after one of its steps: all that the rest of it and its record depend on."""

    begun_by: str  # the player that played its first step
    steps_again: int  # steps played again up to here
    seconds: float  # wall time up to here, of those whose steps count
    weights_version: int
    weights: Mapping[str, Tensor]  # of the Controller that plays or watches; the newest ones may be others by now
    offsets: np.ndarray | None  # float64 [L], what the cross-entropy method tries
    policy: Mapping[str, Tensor]  # agents.policies.Policy.state_dict
    env: Mapping[str, Any]  # env.compression.CompressionEnv.state_dict
    underway: Underway  # at least one step


def snapshot_to_bytes(snapshot: Snapshot, *, fingerprint: str, recognizer: Recognizer) -> bytes:
    """The snapshot of the episode and campaign that `fingerprint` names."""
    tensors: dict[str, Tensor] = {}
    tree = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "begun_by": snapshot.begun_by,
        "steps_again": snapshot.steps_again,
        "seconds": snapshot.seconds,
        "weights_version": snapshot.weights_version,
        "weights": snapshot.weights,
        "offsets": snapshot.offsets,
        "policy": snapshot.policy,
        "env": snapshot.env,
        "underway": _tree_of(snapshot.underway, recognizer),
    }
    text = json.dumps(_without_tensors(tree, tensors)).encode()
    return seal(_MAGIC, len(text), text + save_tensors(tensors))


def snapshot_from_bytes(data: bytes, *, fingerprint: str, recognizer: Recognizer) -> Snapshot:
    """The snapshot back.

    PayloadError for what is damaged, of another format, or not of the episode and campaign that `fingerprint` names;
    what was forged behind a right checksum may raise anything.
    """
    text_bytes, body = unseal(_MAGIC, data, max_bytes=MAX_SNAPSHOT_BYTES)
    tree = json.loads(bytes(body[:text_bytes]))
    for name, expected in {"format": _FORMAT, "fingerprint": fingerprint}.items():
        if tree[name] != expected:
            raise PayloadError(f"snapshot's {name}", expected=str(expected), got=str(tree[name]))
    tree = _with_tensors(tree, load_tensors(bytes(body[text_bytes:])))
    offsets = tree["offsets"]
    return Snapshot(
        begun_by=str(tree["begun_by"]),
        steps_again=int(tree["steps_again"]),
        seconds=float(tree["seconds"]),
        weights_version=int(tree["weights_version"]),
        weights=tree["weights"],
        offsets=None if offsets is None else offsets.numpy(),
        policy=tree["policy"],
        env=tree["env"],
        underway=_underway(tree["underway"], recognizer),
    )


def _tree_of(underway: Underway, recognizer: Recognizer) -> dict[str, Any]:
    trace = underway.course.trace()
    return {
        "observations": trace.observations,
        "actions": trace.actions,
        "rewards": trace.rewards,
        "states": trace.states,
        "terminated": trace.terminated,
        "truncated": underway.course.truncated,
        "reached": [_tree_of_target(point, recognizer) for point in underway.reached],
        "seconds": underway.seconds,
        "collapsed": underway.collapsed,
    }


def _underway(tree: Mapping[str, Any], recognizer: Recognizer) -> Underway:
    trace = EpisodeTrace(
        observations={name: tensor.numpy() for name, tensor in tree["observations"].items()},
        actions=tree["actions"].numpy(),
        rewards=tree["rewards"].numpy(),
        states=tree["states"].numpy(),
        terminated=bool(tree["terminated"]),
    )
    return Underway(
        course=Course.of(trace, truncated=bool(tree["truncated"])),
        reached=[_target(point, recognizer) for point in tree["reached"]],
        seconds={phase: float(spent) for phase, spent in tree["seconds"].items()},
        collapsed=bool(tree["collapsed"]),
    )


def _tree_of_target(point: TargetReached, recognizer: Recognizer) -> dict[str, Any]:
    return {
        "target": point.target,
        "compression": point.compression,
        "parameters": point.parameters,
        "macs": point.macs,
        "metrics": asdict(point.metrics),
        "body": recognizer.state_of(point.body),
    }


def _target(tree: Mapping[str, Any], recognizer: Recognizer) -> TargetReached:
    measured = tree["metrics"]
    return TargetReached(
        target=float(tree["target"]),
        compression=float(tree["compression"]),
        parameters=int(tree["parameters"]),
        macs=int(tree["macs"]),
        metrics=Metrics(accuracy=float(measured["accuracy"]), cross_entropy=float(measured["cross_entropy"])),
        body=recognizer.restored(tree["body"]),
    )


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON has it; its tensors and arrays go into `tensors`."""
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_tensors(item, tensors) for item in value]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        return value
    name = str(len(tensors))
    # a copy: two may share their memory, which safetensors refuses
    tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return {_PLACE: name}


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_without_tensors` was given; arrays come as tensors."""
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_PLACE} and isinstance(value[_PLACE], str):  # a tensor of a network may have that name too
        return tensors[value[_PLACE]].clone()  # to where torch aligns it: products may differ in their last bit
    return {key: _with_tensors(item, tensors) for key, item in value.items()}
