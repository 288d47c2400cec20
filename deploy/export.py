"""Export: the chosen networks as files that others can load, each read back and compared before it is called done."""

import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deploy.folder import CampaignFolder, read_json, write_atomic
from env.compact_file import form_of_file, network_from_file
from env.errors import UserError, ZerooutError

__all__ = ["FORMATS", "export"]

FORMATS = ("safetensors", "onnx")
_TOLERANCE = 1e-4  # logits, float32: onnxruntime fuses batch-norm into convolutions, which rounds differently
_PROBES = 3  # images; an odd number, so that a fixed batch size cannot hide


def export(folder: CampaignFolder, *, compression: float | None = None, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write the networks of result.json into `export/`.

    Args:
        folder: a finished campaign.
        compression: only the point nearest to it, which must lie within 0.01; all points by default.
        formats: of FORMATS.

    Raises:
        UserError: the campaign is not finished, there is no such point, or an unknown format.

    """
    for name in formats:
        if name not in FORMATS:
            raise UserError("--format", expected=" | ".join(FORMATS), got=repr(name), remedy="choose one of them")
    points, written = _points(folder, compression), []
    folder.export.mkdir(exist_ok=True)
    for point in points:
        model = folder.path / point["model"]
        for name in formats:
            path = folder.export / f"{point['target']}.{name}"
            if name == "safetensors":
                write_atomic(path, model.read_bytes())
            else:
                network = network_from_file(str(model))
                write_atomic(path, onnx_bytes(network, _example(model)))
            _verify(path, model)
            written.append(path)
    return written


def _points(folder: CampaignFolder, compression: float | None) -> list[dict[str, Any]]:
    if not folder.result_json.is_file():
        raise UserError(
            f"campaign {folder.path}",
            expected="a finished campaign (it holds a result.json)",
            got="none yet",
            remedy=f"zeroout resume {folder.path}",
        )
    points: list[dict[str, Any]] = read_json(folder.result_json)["points"]
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


def onnx_bytes(network: nn.Module, example: Tensor) -> bytes:
    """The network as an ONNX program for any batch size; inputs `images` float32 [N, C, H, W], outputs `logits`."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # the exporter chatters
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(),
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    data = program.model_proto.SerializeToString()
    assert isinstance(data, bytes)
    return data


def _example(model: Path) -> Tensor:
    """A random batch of the size that this model takes, float32 [3, C, H, W]."""
    form = form_of_file(str(model))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_PROBES, form.channels, form.image_size, form.image_size, generator=generator)


def _verify(path: Path, model: Path) -> None:
    """Load the file as a user would and compare its logits with the network it came from."""
    images = _example(model)
    with torch.inference_mode():
        expected = network_from_file(str(model))(images)
    got = _run_onnx(path, images) if path.suffix == ".onnx" else _run_safetensors(path, images)
    difference = float((expected - got).abs().max())
    if not difference <= _TOLERANCE:
        path.unlink()
        raise ZerooutError(f"export {path}: its logits differ by {difference:.2g} from the network's; it was removed")


def _run_safetensors(path: Path, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = network_from_file(str(path))(images)
    return logits


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
