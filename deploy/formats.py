"""The formats a network is exported in: how each is written, and loaded back as its user would.

A safetensors file for Zeroout itself, a `torch.export` program (.pt2) for torch alone, an ONNX file for the rest.
Called by `deploy/export.py` and `deploy/latency.py`; `deploy/quantize.py` makes an ONNX file in int8 of that in float.
"""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from env.compact_file import NetworkForm, network_from_file, network_to_bytes

__all__ = ["FORMATS", "INT8", "FixedBatchError", "Source", "format_of", "load_exported", "network_of", "quiet"]

FORMATS = ("safetensors", "onnx", "pt2")
INT8 = "int8.onnx"  # made of the ONNX file and of images, so that it is asked for apart
_ERRORS = 3  # of onnxruntime's levels
_TRACED_BATCH = 3  # images; torch takes 0 and 1 for fixed sizes


class FixedBatchError(Exception):
    """The network can be traced for one batch size only, and a file of that is of little use: none is made."""


@dataclass(frozen=True)
class Source:
    """A network on its way into files: in eval mode on the CPU, with `image_shape` (C, H, W) of its input."""

    network: nn.Module
    form: NetworkForm
    image_shape: tuple[int, int, int]
    description: dict[str, Any] | None = None

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
            program = self._trace_plain(network.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # paths of this machine, in a file that is given away
        return program

    def _trace_plain(self, network: nn.Module) -> torch.export.ExportedProgram:
        """The program; FixedBatchError where it is only the free batch size that makes tracing fail."""
        try:
            return self._trace(network)
        except Exception:
            try:
                self._trace(network, any_batch=False)
            except Exception:  # it is something else: what the first try said stands
                fixed = False
            else:
                fixed = True
            if not fixed:
                raise
        raise FixedBatchError

    def _trace(self, network: nn.Module, *, any_batch: bool = True) -> torch.export.ExportedProgram:
        shapes = ({0: torch.export.Dim("batch", min=1)},) if any_batch else None
        with torch.no_grad():
            return torch.export.export(network, (self.images(_TRACED_BATCH),), dynamic_shapes=shapes)

    def encode(self, name: str) -> bytes:
        """The network as a file of this format; any error of torch's exporters passes through."""
        if name == "safetensors":
            form = replace(self.form, network=replace(self.form.network, weights=""))  # a path of this machine
            return network_to_bytes(self.network, form, description=self.description)
        text = json.dumps(self.description)
        with quiet():
            return _pt2(self.program, text) if name == "pt2" else _onnx(self.program, text)


def format_of(path: Path) -> str:
    """The format of an exported file: one of FORMATS, or INT8."""
    return INT8 if path.name.endswith(f".{INT8}") else path.suffix.removeprefix(".")


def network_of(path: Path) -> str:
    """The network of an exported file, as its name says: a target, or the baseline."""
    return path.name.removesuffix(f".{format_of(path)}")


def load_exported(path: Path, name: str, *, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """Load a file of format `name` as its user would: images float32 [B, C, H, W] -> logits float32 [B, classes].

    `threads` is onnxruntime's, 0 = as it likes; torch's are set for the whole process.
    """
    if name in ("onnx", INT8):
        return _onnx_session(path, threads)
    if name == "safetensors":
        network = network_from_file(str(path))
    else:
        with quiet():
            network = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(images)
        return logits

    return run


def _onnx_session(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS  # what it merely warns of is its own business
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters chatter on every channel; what matters comes as an exception."""
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
