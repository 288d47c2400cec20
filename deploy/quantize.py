"""Int8: the ONNX networks quantized after training, each judged beside the float one it came from.

Called by `zeroout export --int8`, for the networks of result.json and for the baseline, so that pruned-and-quantized
stands beside each alone. Weights become int8 with a scale for each output channel, activations uint8 with the range
they had on training images. The file is plain ONNX (QuantizeLinear, DequantizeLinear), and runs where the float one
does.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from numpy import float32
from numpy.typing import NDArray
from torch import Tensor

from deploy.config import load
from deploy.description import Origin, Task, describe, task_of, write_description
from deploy.export import (
    NotExportedError,
    cannot_write,
    chosen_points,
    disk_trouble_named,
    model_of,
    points_of,
    root_cause,
)
from deploy.folder import CampaignFolder
from deploy.formats import INT8, Source, load_exported, quiet
from env.augment import normalise
from env.compact_file import form_of_file, network_from_file
from env.data import DataConfig, Dataset, load_dataset
from env.errors import UserError, ZerooutError
from env.files import replace_file
from env.seeds import derive_seed
from env.splits import Split

__all__ = ["BASELINE", "CALIBRATION_IMAGES", "accuracy", "calibration_images", "export_int8", "quantize"]

BASELINE = "baseline"  # stands for a target in the names of its files
CALIBRATION_IMAGES = 512
_CALIBRATED, _JUDGED = 64, 100  # images at a time
_BATCHES = (3, 1)  # images a file must run with before it takes its name
_ERRORS, _WARNINGS = 3, 2  # of onnxruntime's levels

Record = dict[str, Any]
Run = Callable[[Tensor], Tensor]


def export_int8(
    folder: CampaignFolder,
    *,
    compression: float | None = None,
    dataset: Dataset | None = None,
    warn: Callable[[ZerooutError], object],
) -> list[Path]:
    """Write `baseline.int8.onnx` and an int8 file for each network of result.json; returns the files written.

    Each is described in the `.json` beside it, with its accuracy on validation and on test. What cannot be written
    costs nothing but that file: it is told to `warn`.

    Args:
        folder: a finished campaign.
        compression: besides the baseline only the point nearest to it; all by default.
        dataset: the campaign's images, where they are loaded already.
        warn: called with each failure; also where the images are gone, without which there is no file at all.

    Raises:
        UserError: as `deploy.export.export`.

    """
    points, config = chosen_points(folder, compression), load(folder.campaign_toml)
    targets = [point["target"] for point in points_of(folder)]
    try:
        images = dataset or _loaded(config.data)
        task = task_of(folder, targets, config.data, None, warn)
        _require_same(images, task)
    except UserError as error:
        warn(error)
        return []
    origin = Origin.read(folder, config, task, model_of(folder, folder.baseline / "model.safetensors"))
    with disk_trouble_named(folder.export):
        folder.export.mkdir(exist_ok=True)
    baseline = {**origin.result.get("baseline", {}), "compression": 0.0, "model": "baseline/model.safetensors"}
    written = []
    # All that were exported are quantized, whatever their accuracies: nothing is chosen by what is judged here, and the
    # test split only says how the networks fared that validation had chosen.
    for point in (baseline, *points):
        try:
            written.append(_export_one(folder, origin, point, images))
        except NotExportedError as failure:
            warn(failure.reason)
    return written


def calibration_images(dataset: Dataset, seed: int) -> Tensor:
    """Training images as a network is fed with them, not augmented: float32 [N, C, H, W].

    N is CALIBRATION_IMAGES, or all there are; `seed`, the campaign's, says which.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "int8 calibration"))
    drawn = torch.randperm(len(dataset.train), generator=generator)[:CALIBRATION_IMAGES]
    return normalise(dataset.train.images[drawn], dataset.mean, dataset.std)


def quantize(model: bytes, images: Tensor) -> bytes:
    """An ONNX network in int8.

    Any error of onnxruntime's tools passes through.

    Args:
        model: an ONNX file whose input is called "images".
        images: float32 [N, C, H, W], on which the ranges of its activations are seen.

    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as scratch, _silent():
        given, folded, made = (Path(scratch) / f"{name}.onnx" for name in ("given", "folded", "made"))
        given.write_bytes(model)
        # batch-norm goes into the convolution before it; shapes are known already, torch has written them
        quant_pre_process(given, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            made,
            _Batches(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Weights in 7 bits: an x86 without VNNI adds two products in 16 bits, which two of 8 bits can exceed, and
            # the accuracies told here must hold there too.
            reduce_range=True,
        )
        quantized = onnx.load(made)
    # what the tools note about themselves; the description stays
    kept = [entry for entry in quantized.metadata_props if entry.key == "description"]
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(kept)
    data = quantized.SerializeToString(deterministic=True)
    assert isinstance(data, bytes)
    return data


def accuracy(run: Run, split: Split, dataset: Dataset) -> float:
    """Share of the images of `split` whose highest logit is right; `run` is what `load_exported` returns."""
    right = 0
    for start in range(0, len(split), _JUDGED):
        images = normalise(split.images[start : start + _JUDGED], dataset.mean, dataset.std)
        right += int((run(images).argmax(1) == split.labels[start : start + _JUDGED]).sum())
    return right / len(split)


class _Batches:
    """Images [N, C, H, W] as onnxruntime's calibration asks for them: a batch for each call, None at the end."""

    def __init__(self, images: Tensor) -> None:
        self._batches = (images[start : start + _CALIBRATED] for start in range(0, len(images), _CALIBRATED))

    def get_next(self) -> dict[str, NDArray[float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


def _loaded(config: DataConfig) -> Dataset:
    """The images that the configuration names; UserError where they are gone."""
    try:
        return load_dataset(config)
    except (UserError, OSError) as error:
        raise UserError(
            "export --int8",
            expected="the campaign's images, to calibrate and to judge with",
            got=str(error),
            remedy="no int8 file is written; put the images back and export again",
        ) from error


def _require_same(dataset: Dataset, task: Task) -> None:
    """UserError where the images have changed since the campaign: accuracies would not stand beside its own."""
    if task.mean is not None and list(task.mean) != list(dataset.mean):
        raise UserError(
            "export --int8",
            expected=f"the images that the campaign was trained with (mean {list(task.mean)})",
            got=f"others (mean {list(dataset.mean)})",
            remedy="no int8 file is written; put the images back and export again",
        )


def _export_one(folder: CampaignFolder, origin: Origin, point: Record, dataset: Dataset) -> Path:
    """Write the int8 file of one network, and its facts into the description beside it."""
    name = str(point.get("target", BASELINE))
    path = folder.export / f"{name}.{INT8}"
    model = str(model_of(folder, folder.path / str(point["model"])))
    form, network = form_of_file(model), network_from_file(model)
    description = describe(origin, point, form, network)
    images = calibration_images(dataset, origin.config.seed)
    data = _encode(path, Source(network, form, origin.image_shape, description), images)
    with disk_trouble_named(path), replace_file(path) as pending:
        pending.write_bytes(data)
        run = _read_back(pending, path, images, classes=form.classes)
        facts = {
            "format": INT8,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "weights": "int8 within 7 bits, a scale for each output channel",
            "activations": "uint8, from the smallest to the largest value seen in calibration",
            "calibration_images": len(images),
            "val_accuracy": accuracy(run, dataset.validation, dataset),
            "test_accuracy": accuracy(run, dataset.test, dataset),
        }
    write_description(folder.export / f"{name}.json", description, {path.name: facts})
    return path


def _encode(path: Path, source: Source, images: Tensor) -> bytes:
    """The network as an int8 file; NotExportedError where it cannot be one."""
    try:
        model = source.encode("onnx")
    except Exception as error:  # a user's own network makes torch's exporters raise nearly anything
        raise NotExportedError(cannot_write(path, INT8, error)) from error
    try:
        return quantize(model, images)
    except Exception as error:  # and so it does onnxruntime's tools
        raise NotExportedError(
            UserError(
                f"export {path}",
                expected="a network that onnxruntime can quantize",
                got=root_cause(error),
                remedy="change what its forward does there, or leave --int8 out: the float files are there",
            )
        ) from error


def _read_back(pending: Path, path: Path, images: Tensor, *, classes: int) -> Run:
    """The file loaded as its user would, once it has run at every batch size of `_BATCHES`."""
    try:
        run = load_exported(pending, INT8)
        logits = [run(images[:1].expand(batch, -1, -1, -1)) for batch in _BATCHES]
    except Exception as error:  # whatever a runtime raises for what it cannot run
        raise NotExportedError(
            ZerooutError(f"export {path}: not written, it cannot be run ({root_cause(error)})")
        ) from error
    for batch, part in zip(_BATCHES, logits, strict=True):
        if part.shape != (batch, classes) or not bool(part.isfinite().all()):
            raise NotExportedError(
                ZerooutError(
                    f"export {path}: not written, its logits for {batch} image(s) are no {classes} numbers each"
                )
            )
    return run


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Quantization chatters in Python, and onnxruntime past it, on the terminal itself."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(_ERRORS)
    try:
        with quiet():
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)
