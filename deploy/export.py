"""Export: the chosen networks as files that others can load, each read back and compared before it takes its name.

For each point of result.json: a safetensors file, an ONNX file, a `torch.export` program (.pt2) that loads without our
code, and a JSON description beside them, which says how images are fed in and what became of each layer. The same
description, less the list of files, is inside each file. Called at a campaign's end and by `zeroout export`.
"""

import base64
import binascii
import contextlib
import copy
import hashlib
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy.config import CampaignConfig, load
from deploy.folder import CampaignFolder, read_json, versions, write_atomic
from env.channels import ChannelPlan
from env.compact_file import (
    NetworkForm,
    describe_layers,
    describe_modules,
    form_of_file,
    network_from_file,
    network_to_bytes,
)
from env.data import DataConfig, Dataset, load_dataset
from env.errors import UserError, ZerooutError
from env.files import replace_file

__all__ = ["FORMATS", "Source", "export", "load_exported", "points_of"]

FORMATS = ("safetensors", "onnx", "pt2")
#: Of the largest logit (at least 1), float32: onnxruntime fuses batch-norm into convolutions, which rounds differently.
_TOLERANCE = 1e-4
_BATCHES = (3, 1)  # images; an odd number, so that a fixed batch size cannot hide, and the one often special-cased
_LOG = logging.getLogger(__name__)

Record = dict[str, Any]
Warn = Callable[[ZerooutError], object]


def export(
    folder: CampaignFolder,
    *,
    compression: float | None = None,
    formats: Sequence[str] = FORMATS,
    dataset: Dataset | None = None,
    warn: Warn = _LOG.warning,
) -> list[Path]:
    """Write the networks of result.json into `export/`; returns the files written, without the descriptions.

    A format that a network cannot be written in costs nothing but that file: it is told to `warn`, and the rest is
    written.

    Args:
        folder: a finished campaign.
        compression: only the point nearest to it, which must lie within 0.01; all points by default.
        formats: of FORMATS.
        dataset: the campaign's images, where they are loaded already; else an earlier description, or the images that
            the configuration names, say how they are normalised.
        warn: called with each failure; logs a warning by default.

    Raises:
        UserError: the campaign is not finished or lacks a file, there is no such point, an unknown format, or a disk
            that is full or cannot be written.

    """
    for name in formats:
        if name not in FORMATS:
            raise UserError("--format", expected=" | ".join(FORMATS), got=repr(name), remedy="choose one of them")
    points, written = points_of(folder, compression), []
    config = load(folder.campaign_toml)
    with _disk_trouble_named(folder.export):
        folder.export.mkdir(exist_ok=True)
    origin = _origin(folder, config, _task(folder, config.data, dataset, warn))
    for point in points:
        model = str(_there(folder, folder.path / str(point["model"])))
        form, network = form_of_file(model), network_from_file(model)
        description = _describe(origin, point, form, network)
        source = Source(network, form, origin.image_shape, description)
        files = {}
        for name in formats:
            path = folder.export / f"{point['target']}.{name}"
            try:
                files[path.name] = _write_verified(path, name, source)
            except _NotExportedError as failure:
                warn(failure.reason)
            else:
                written.append(path)
        _write_description(folder.export / f"{point['target']}.json", description, files)
    return written


def points_of(folder: CampaignFolder, compression: float | None = None) -> list[Record]:
    """The points of result.json, or the one nearest to `compression`; UserError as `export`."""
    if not folder.result_json.is_file():
        raise UserError(
            f"campaign {folder.path}",
            expected="a finished campaign (it holds a result.json)",
            got="none yet",
            remedy=f"zeroout resume {folder.path}",
        )
    result = read_json(folder.result_json)
    points: list[Record] = result.get("points") or [] if isinstance(result, dict) else []
    if not points or not all({"target", "model"} <= set(point) for point in points):
        raise UserError(
            str(folder.result_json),
            expected="points, each with its target and model",
            got="none" if not points else "one without them",
            remedy=f"move it away, then zeroout resume {folder.path} makes it anew",
        )
    if compression is None:
        return points
    nearest = min(points, key=lambda point: abs(point["target"] - compression))
    if not abs(nearest["target"] - compression) <= 0.01:  # also where it is NaN
        raise UserError(
            "--compression",
            expected=f"one of {', '.join(str(point['target']) for point in points)}",
            got=str(compression),
            remedy="choose one of them",
        )
    return [nearest]


@dataclass(frozen=True)
class Source:
    """A network on its way into files: in eval mode on the CPU, with `image_shape` (C, H, W) of its input."""

    network: nn.Module
    form: NetworkForm
    image_shape: tuple[int, int, int]
    description: Record | None = None

    def images(self, count: int) -> Tensor:
        """Random images, float32 [count, C, H, W], the same in each call."""
        return torch.randn(count, *self.image_shape, generator=torch.Generator().manual_seed(0))

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The network traced for any batch size; both .pt2 and ONNX are made of it."""
        # without gradients, or the loaded program would remember activations at each call
        network = copy.deepcopy(self.network).eval().requires_grad_(False)
        try:
            # weights with channels innermost in memory are quicker on a CPU, whatever layout images come in
            program = self._trace(network.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        except Exception:  # a forward with a `view` cannot have it; the second try says what else is wrong
            program = self._trace(network.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # paths of this machine, in a file that is given away
        return program

    def _trace(self, network: nn.Module) -> torch.export.ExportedProgram:
        batch = torch.export.Dim("batch", min=1)
        with torch.no_grad():
            return torch.export.export(network, (self.images(_BATCHES[0]),), dynamic_shapes=({0: batch},))

    def encode(self, name: str) -> bytes:
        """The network as a file of this format; any error of torch's exporters passes through."""
        if name == "safetensors":
            form = replace(self.form, network=replace(self.form.network, weights=""))  # a path of this machine
            return network_to_bytes(self.network, form, description=self.description)
        text = json.dumps(self.description)
        with _quiet():
            return _pt2(self.program, text) if name == "pt2" else _onnx(self.program, text)


def load_exported(path: Path, name: str, *, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """Load a file of format `name` as its user would: images float32 [B, C, H, W] -> logits float32 [B, classes].

    `threads` is onnxruntime's, 0 = as it likes; torch's are set for the whole process.
    """
    if name == "onnx":
        return _onnx_session(path, threads)
    if name == "safetensors":
        network = network_from_file(str(path))
    else:
        with _quiet():
            network = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(images)
        return logits

    return run


def _onnx_session(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _pt2(program: torch.export.ExportedProgram, description: str) -> bytes:
    program.example_inputs = None  # random images, which would only make the file larger
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"description.json": description})
    return file.getvalue()


def _onnx(program: torch.export.ExportedProgram, description: str) -> bytes:
    made = torch.onnx.export(program, (), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False)
    assert made is not None
    model = made.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]  # how torch came to it, with paths of this machine
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    entry = model.metadata_props.add()
    entry.key, entry.value = "description", description
    data = model.SerializeToString(deterministic=True)
    assert isinstance(data, bytes)
    return data


class _NotExportedError(Exception):
    """A format that this network was not written in; the others go on."""

    def __init__(self, reason: ZerooutError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _write_verified(path: Path, name: str, source: Source) -> Record:
    """Write one file; it takes its name after it was loaded back and compared. Returns facts about it."""
    try:
        data = source.encode(name)
    except Exception as error:  # a user's own network makes torch's exporters raise nearly anything
        raise _NotExportedError(
            UserError(
                f"export {path}",
                expected=f"a network that {'torch.onnx' if name == 'onnx' else 'torch.export'} can write",
                got=_first_line(error),
                remedy="change what its forward does there, or do without this format: --format safetensors",
            )
        ) from error
    with _disk_trouble_named(path), replace_file(path) as pending:
        pending.write_bytes(data)
        difference = _compare(pending, path, name, source)
    return {
        "format": name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "largest_difference": difference,
        "tolerance": f"{_TOLERANCE:g} of the largest logit, at least {_TOLERANCE:g}",
    }


def _compare(pending: Path, path: Path, name: str, source: Source) -> float:
    """The largest difference between the logits of the file and of its network, which must be in tolerance."""
    largest = 0.0
    for batch in _BATCHES:
        images = source.images(batch)
        with torch.inference_mode():
            expected = source.network.eval()(images)
        try:
            got = load_exported(pending, name)(images)
        except Exception as error:  # whatever a runtime raises for what it cannot run
            raise _NotExportedError(
                ZerooutError(f"export {path}: not written, it cannot be loaded back ({_first_line(error)})")
            ) from error
        difference = float((expected - got).abs().max())
        allowed = _TOLERANCE * max(1.0, float(expected.abs().max()))
        if not difference <= allowed:  # also where it is NaN
            raise _NotExportedError(
                ZerooutError(
                    f"export {path}: not written, its logits differ by {difference:.2g} from the network's "
                    f"({allowed:.2g} is allowed)"
                )
            )
        largest = max(largest, difference)
    return largest


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What all networks of a campaign have in common; the plan is the baseline's."""

    folder: CampaignFolder
    config: CampaignConfig
    result: Record
    task: Record
    baseline: nn.Module
    plan: ChannelPlan
    image_shape: tuple[int, int, int]


def _origin(folder: CampaignFolder, config: CampaignConfig, task: Record) -> _Origin:
    model = str(_there(folder, folder.baseline / "model.safetensors"))
    baseline, form = network_from_file(model), form_of_file(model)
    shape = task["image_shape"] or (form.channels, form.image_size, form.image_width or form.image_size)
    return _Origin(
        folder=folder,
        config=config,
        result=read_json(folder.result_json),
        task=task,
        baseline=baseline,
        plan=ChannelPlan(baseline, torch.zeros(1, *shape)),
        image_shape=shape,
    )


def _describe(origin: _Origin, point: Record, form: NetworkForm, network: nn.Module) -> Record:
    """All that a stranger needs to know about one network, in the order in which it is read."""
    shape, task = origin.image_shape, origin.task
    known = asdict(origin.config.data)
    return {
        "what": "a convolutional network compressed by zeroout: whole filters were removed, the rest was retrained",
        "input": {
            "name": "images",
            "shape": ["batch", *shape],
            "dtype": "float32",
            "channels": "RGB" if shape[0] == 3 else "gray" if shape[0] == 1 else "as the network takes them",
            "normalisation": "(pixel / 255 - mean) / std, for each channel, pixels from 0 to 255",
            "mean": task["mean"],
            "std": task["std"],
        },
        "output": {"name": "logits", "shape": ["batch", form.classes], "dtype": "float32", "classes": task["classes"]},
        "load": {
            "safetensors": "env.compact_file.network_from_file(path)(images), with zeroout installed",
            "onnx": "onnxruntime.InferenceSession(path).run(['logits'], {'images': images.numpy()})",
            "pt2": "torch.export.load(path).module()(images), with torch alone; it is in eval mode already",
        },
        "compact": {key: point.get(key) for key in ("compression", "parameters", "macs", *_ACCURACIES)},
        "original": {key: origin.result.get("baseline", {}).get(key) for key in ("parameters", "macs", *_ACCURACIES)},
        "layers": describe_layers(
            origin.plan, origin.baseline, network, _keep_mask(origin.folder, point, origin.plan.units)
        ),
        "modules": describe_modules(network),
        "network": {**asdict(form.network), "weights": "", "classes": form.classes},
        "origin": {
            **{key: point.get(key) for key in ("target", "group", "policy", "episode")},
            "campaign_seed": origin.config.seed,
            "data": {key: value for key, value in known.items() if key not in ("path", "cache")},
        },
        "versions": versions(),
    }


_ACCURACIES = ("val_accuracy", "test_accuracy")


def _image_shape(description: Record) -> tuple[int, int, int]:
    channels, height, width = description["input"]["shape"][1:]
    return channels, height, width


def _keep_mask(folder: CampaignFolder, point: Record, units: int) -> Tensor | None:
    """The mask in frontier.json of the episode that this network came from, bool [units], where it is known."""
    if not folder.frontier_json.is_file():
        return None
    groups = [target["groups"] for target in read_json(folder.frontier_json).get("targets", [])]
    found = [best for group in groups for best in group.values() if best and _same_episode(best, point)]
    try:
        packed = base64.b64decode(found[0]["keep_bits"], validate=True) if found else b""
    except (KeyError, binascii.Error):
        return None
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    return torch.from_numpy(bits[:units].astype(bool)) if len(packed) == (units + 7) // 8 else None


def _same_episode(best: Record, point: Record) -> bool:
    return all(best.get(key) == point.get(key) for key in ("target", "group", "episode"))


def _task(folder: CampaignFolder, config: DataConfig, dataset: Dataset | None, warn: Warn) -> Record:
    """Image shape, classes and normalisation: from the images given, an earlier description, or the images on disk."""
    known = None if dataset is not None else _described_before(folder)
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
        return {"image_shape": None, "classes": None, "mean": None, "std": None}
    return {"image_shape": data.image_shape, "classes": data.classes, "mean": data.mean, "std": data.std}


def _described_before(folder: CampaignFolder) -> Record | None:
    """What an earlier export knew: nearer to the training than images that may have changed since."""
    for point in points_of(folder):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            there = json.loads((folder.export / f"{point['target']}.json").read_bytes())
            if there["input"]["mean"] is not None:
                return {
                    "image_shape": _image_shape(there),
                    "classes": there["output"]["classes"],
                    "mean": there["input"]["mean"],
                    "std": there["input"]["std"],
                }
    return None


def _write_description(path: Path, description: Record, files: Record) -> None:
    """Write the description beside the files, with what is known of those that earlier exports wrote."""
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


def _there(folder: CampaignFolder, model: Path) -> Path:
    if not model.is_file():
        raise UserError(
            f"model {model}",
            expected="the file of this finished campaign",
            got="no such file",
            remedy=f"zeroout resume {folder.path} makes it anew",
        )
    return model


def _first_line(error: BaseException) -> str:
    """The kind and first line of the error at the root: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {(plain.splitlines() or [''])[0][:200].strip()}"


@contextlib.contextmanager
def _disk_trouble_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"writing {path}",
            expected="a disk that takes it",
            got=error.strerror or str(error),
            remedy="make room (or allow writing) and export again: what is written stays",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporters chatter on every channel; what matters comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
