"""The description of an exported network: how images are fed in, what became of each layer, where it came from.

`deploy/export.py` puts it inside each file, and beside them as JSON with the list of the files.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deploy.agreement import unpacked_mask
from deploy.config import CampaignConfig
from deploy.folder import CampaignFolder, read_json, versions, write_atomic
from deploy.formats import INT8
from env.channels import ChannelPlan
from env.compact_file import NetworkForm, describe_layers, describe_modules, form_of_file, network_from_file
from env.data import DataConfig, Dataset, load_dataset
from env.errors import UserError, ZerooutError

__all__ = ["Origin", "Task", "describe", "image_shape", "task_of", "write_description"]

_COMPRESSED = "a convolutional network compressed by zeroout: whole filters were removed, the rest was retrained"
_BASELINE = "a convolutional network before zeroout removed anything, to stand beside what it has made of it"
_FIGURES = ("parameters", "macs", "val_accuracy", "test_accuracy")

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The images a campaign was for; None where nobody knows any more."""

    image_shape: tuple[int, int, int] | None = None  # C, H, W
    classes: Sequence[str] | None = None
    mean: Sequence[float] | None = None  # of pixels / 255, for each channel
    std: Sequence[float] | None = None


def task_of(
    folder: CampaignFolder,
    targets: Iterable[object],
    config: DataConfig,
    dataset: Dataset | None,
    warn: Callable[[ZerooutError], object],
) -> Task:
    """What the images say: those given, else an earlier description of one of `targets`, else those on disk.

    Where there are none of these, `warn` is told what mends it.
    """
    known = None if dataset is not None else _described_before(folder, targets)
    if known is not None:
        return known
    try:
        data = dataset or load_dataset(config)
    except (UserError, OSError) as error:
        warn(
            UserError(
                "description of the images",
                expected="the campaign's images, for their mean and standard deviation",
                got=str(error),
                remedy="the networks are written without; put the images back and export again",
            )
        )
        return Task()
    return Task(image_shape=data.image_shape, classes=data.classes, mean=data.mean, std=data.std)


def _described_before(folder: CampaignFolder, targets: Iterable[object]) -> Task | None:
    """What an earlier export knew: nearer to the training than images that may have changed since."""
    for target in targets:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            there = json.loads((folder.export / f"{target}.json").read_bytes())
            fed = there["input"]
            if fed["mean"] is not None:
                return Task(
                    image_shape=image_shape(there), classes=there["output"]["classes"], mean=fed["mean"], std=fed["std"]
                )
    return None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What all networks of a campaign have in common; the plan is the baseline's."""

    config: CampaignConfig
    result: Record
    frontier: list[Record]
    task: Task
    baseline: nn.Module
    plan: ChannelPlan
    image_shape: tuple[int, int, int]  # C, H, W

    @classmethod
    def read(cls, folder: CampaignFolder, config: CampaignConfig, task: Task, baseline: Path) -> "Origin":
        """Read a finished campaign, whose uncompressed network is in `baseline`; UserError for a broken file."""
        network, form = network_from_file(str(baseline)), form_of_file(str(baseline))
        shape = task.image_shape or (form.channels, form.image_size, form.image_width or form.image_size)
        return cls(
            config=config,
            result=read_json(folder.result_json),
            frontier=_frontier(folder),
            task=task,
            baseline=network,
            plan=ChannelPlan(network, torch.zeros(1, *shape)),
            image_shape=shape,
        )


def _frontier(folder: CampaignFolder) -> list[Record]:
    """The best network of each group at each target, as in frontier.json; empty without that file."""
    if not folder.frontier_json.is_file():
        return []
    targets = read_json(folder.frontier_json).get("targets", [])
    return [best for target in targets for best in target["groups"].values() if best]


def describe(origin: Origin, point: Record, form: NetworkForm, network: nn.Module) -> Record:
    """All that a stranger needs to know about one network, in the order in which it is read.

    Args:
        origin: the campaign.
        point: of its result.json; or the baseline, which has no target.
        form: of the network.
        network: the compact one.

    """
    shape, task = origin.image_shape, origin.task
    return {
        "what": _COMPRESSED if "target" in point else _BASELINE,
        "input": {
            "name": "images",
            "shape": ["batch", *shape],
            "dtype": "float32",
            "channels": "RGB" if shape[0] == 3 else "gray" if shape[0] == 1 else "as the network takes them",
            "normalisation": "(pixel / 255 - mean) / std, for each channel, pixels from 0 to 255",
            "mean": task.mean,
            "std": task.std,
        },
        "output": {"name": "logits", "shape": ["batch", form.classes], "dtype": "float32", "classes": task.classes},
        "load": {
            "safetensors": "env.compact_file.network_from_file(path)(images), with zeroout installed",
            "onnx": "onnxruntime.InferenceSession(path).run(['logits'], {'images': images.numpy()})",
            INT8: "as onnx: images and logits are float32, weights and activations inside are 8 bits",
            "pt2": "torch.export.load(path).module()(images), with torch alone; it is in eval mode already",
        },
        "compact": {key: point.get(key) for key in ("compression", *_FIGURES)},
        "original": {key: origin.result.get("baseline", {}).get(key) for key in _FIGURES},
        "layers": describe_layers(origin.plan, origin.baseline, network, _keep_mask(origin, point)),
        "modules": describe_modules(network),
        "network": {**asdict(form.network), "weights": "", "classes": form.classes},
        "origin": {
            **{key: point.get(key) for key in ("target", "group", "policy", "episode")},
            "campaign_seed": origin.config.seed,
            "data": {key: value for key, value in asdict(origin.config.data).items() if key not in ("path", "cache")},
        },
        "versions": versions(),
    }


def _keep_mask(origin: Origin, point: Record) -> Tensor | None:
    """The mask in frontier.json of the episode that this network came from, bool [units], where it is known."""
    episode = ("target", "group", "episode")
    found = [best for best in origin.frontier if all(best.get(key) == point.get(key) for key in episode)]
    return unpacked_mask(found[0].get("keep_bits", ""), origin.plan.units) if found else None


def image_shape(description: Record) -> tuple[int, int, int]:
    """Channels, height and width of the images that a described network takes."""
    channels, height, width = description["input"]["shape"][1:]
    return channels, height, width


def write_description(path: Path, description: Record, files: Record) -> None:
    """Write the description beside the files, with what is known of those that earlier exports wrote.

    Args:
        path: where to; what is there already is replaced, and UserError where the disk does not take it.
        description: what `describe` returned.
        files: facts about each file written now, by its name.

    """
    earlier: Record = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        earlier = {
            name: facts
            for name, facts in json.loads(path.read_bytes())["files"].items()
            if (path.parent / name).is_file()
        }
    text = json.dumps({**description, "files": earlier | files}, indent=2)
    # lists of numbers on one line each: hundreds of filters would hide the rest (no string holds a bare newline)
    write_atomic(path, re.sub(r"\[\n[^\[\]{}\"]*\]", lambda found: " ".join(found[0].split()), text) + "\n")
