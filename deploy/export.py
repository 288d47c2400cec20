"""Export: the chosen networks as files that others can load, each read back and compared before it takes its name.

For each point of result.json: a file of each format (deploy/formats.py), and a description beside them
(deploy/description.py), which is inside each file too. Called at a campaign's end and by `zeroout export`.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from deploy.config import load
from deploy.description import Origin, describe, task_of, write_description
from deploy.folder import CampaignFolder, read_json
from deploy.formats import FORMATS, INT8, FixedBatchError, Source, load_exported
from env.compact_file import form_of_file, network_from_file
from env.data import Dataset
from env.errors import UserError, ZerooutError, first_line
from env.files import replace_file

__all__ = [
    "NotExportedError",
    "cannot_write",
    "chosen_points",
    "disk_trouble_named",
    "export",
    "model_of",
    "points_of",
    "root_cause",
]

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
    points = chosen_points(folder, compression)
    config = load(folder.campaign_toml)
    with disk_trouble_named(folder.export):
        folder.export.mkdir(exist_ok=True)
    targets = [point["target"] for point in points_of(folder)]
    task = task_of(folder, targets, config.data, dataset, warn)
    origin = Origin.read(folder, config, task, model_of(folder, folder.baseline / "model.safetensors"))
    written: list[Path] = []
    for point in points:
        written += _export_point(folder, origin, point, formats, warn)
    return written


def points_of(folder: CampaignFolder) -> list[Record]:
    """The points of result.json, each with its target and model; UserError as `export`."""
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
    return points


def chosen_points(folder: CampaignFolder, compression: float | None) -> list[Record]:
    """The points of result.json, or the one that lies within 0.01 of `compression`; UserError as `export`."""
    points = points_of(folder)
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


def _export_point(
    folder: CampaignFolder, origin: Origin, point: Record, formats: Sequence[str], warn: Warn
) -> list[Path]:
    """Write one network and its description; returns the files of `formats` that were written."""
    model = str(model_of(folder, folder.path / str(point["model"])))
    form, network = form_of_file(model), network_from_file(model)
    description = describe(origin, point, form, network)
    source = Source(network, form, origin.image_shape, description)
    written, files = [], {}
    for name in formats:
        path = folder.export / f"{point['target']}.{name}"
        try:
            files[path.name] = _write_verified(path, name, source)
        except NotExportedError as failure:
            warn(failure.reason)
        else:
            written.append(path)
    write_description(folder.export / f"{point['target']}.json", description, files)
    return written


class NotExportedError(Exception):
    """A file that was not written of this network; the others go on."""

    def __init__(self, reason: ZerooutError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _write_verified(path: Path, name: str, source: Source) -> Record:
    """Write one file; it takes its name after it was loaded back and compared. Returns facts about it."""
    try:
        data = source.encode(name)
    except Exception as error:  # a user's own network makes torch's exporters raise nearly anything
        raise NotExportedError(cannot_write(path, name, error)) from error
    with disk_trouble_named(path), replace_file(path) as pending:
        pending.write_bytes(data)
        difference = _compare(pending, path, name, source)
    return {
        "format": name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "largest_difference": difference,
        "tolerance": f"{_TOLERANCE:g} of the largest logit, at least {_TOLERANCE:g}",
    }


def cannot_write(path: Path, name: str, error: Exception) -> UserError:
    """What torch's exporters made of a network, and what mends it."""
    got, remedy = root_cause(error), "change what its forward does there"
    writer = "torch.onnx" if name in ("onnx", INT8) else "torch.export"
    without = "leave --int8 out" if name == INT8 else "do without this format: --format safetensors"
    if isinstance(error, FixedBatchError):
        got = "a forward that fixes how many there are"
        remedy = "let it take their number from x.shape[0], not from len(x) or a number written out"
    return UserError(
        f"export {path}",
        expected=f"a network that {writer} can write for any batch of images",
        got=got,
        remedy=f"{remedy}, or {without}",
    )


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
            raise NotExportedError(
                ZerooutError(f"export {path}: not written, it cannot be loaded back ({root_cause(error)})")
            ) from error
        difference = float((expected - got).abs().max())
        allowed = _TOLERANCE * max(1.0, float(expected.abs().max()))
        if not difference <= allowed:  # also where it is NaN
            raise NotExportedError(
                ZerooutError(
                    f"export {path}: not written, its logits differ by {difference:.2g} from the network's "
                    f"({allowed:.2g} is allowed)"
                )
            )
        largest = max(largest, difference)
    return largest


def model_of(folder: CampaignFolder, model: Path) -> Path:
    """The file of a network of this campaign; UserError where it is not there."""
    if not model.is_file():
        raise UserError(
            f"model {model}",
            expected="the file of this finished campaign",
            got="no such file",
            remedy=f"zeroout resume {folder.path} makes it anew",
        )
    return model


def root_cause(error: BaseException) -> str:
    """The kind and first line of the error at the root: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)[:200].strip()}"


@contextlib.contextmanager
def disk_trouble_named(path: Path) -> Iterator[None]:
    """UserError for whatever the operating system says while `path` is written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"writing {path}",
            expected="a disk that takes it",
            got=error.strerror or str(error),
            remedy="make room (or allow writing) and export again: what is written stays",
        ) from error
