"""An update recorded once as a CUDA graph, and replayed: a GPU then does not wait for Python between two kernels.

Called by env/training.py and env/retraining.py, where enough updates of one shape follow each other. An update of VGG16
is some 400 kernels, most of them shorter than it takes to ask for them one by one.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from env.errors import UserError, first_line

__all__ = ["WORTH", "captured", "is_static"]

_Update = Callable[[Tensor, Tensor], Tensor]
_Recording = tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor], Tensor]  # what it reads from, and writes to
#: From so many updates on, recording (some tenths of a second) is cheaper than asking for the kernels each time.
WORTH = 64
_WARM = 3  # updates before it: momentum, cuDNN's choices and its handles come to be outside the recording


def captured(update: _Update, *networks: nn.Module) -> _Update:
    """The same `update` of (images, labels), recorded if all the `networks` it runs are on a GPU and static.

    All calls take tensors of one shape. What it returns is overwritten by the next call. Anything that changes from
    call to call must be in a tensor on the GPU (see `set_rate`); so a network with modules or hooks of the user's own,
    whose Python may decide anew each time, is recorded only if it says `static = True` of itself.

    Raises:
        UserError: by the call that records: a network that calls itself static reads numbers from the GPU, or does
            something else that cannot be recorded.

    """
    devices = {parameter.device for network in networks for parameter in network.parameters()}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    return _Captured(update, device) if device.type == "cuda" and all(map(is_static, networks)) else update


def is_static(network: nn.Module) -> bool:
    """Whether it says of itself that it does the same operations each time, or is made of modules that do."""
    return getattr(network, "static", False) is True or all(map(_is_known, network.modules()))


def _is_known(module: nn.Module) -> bool:
    """Whether a module is torch's or ours, as it was made, and does the same each time."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    of_parameters = (parameter._backward_hooks for parameter in module.parameters(recurse=False))
    counts = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None  # it reads its count
    ours = type(module).__module__.startswith(("torch.nn.", "env."))
    return ours and "forward" not in vars(module) and not any((*hooks, *of_parameters)) and not counts


@lru_cache  # torch keeps memory for each stream that it has met, so there is one
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Captured:
    """Plays an update as it is, records it, replays it."""

    def __init__(self, update: _Update, device: torch.device) -> None:
        self._update, self._stream = update, _stream(device)
        self._calls = 0
        self._recorded: _Recording | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self._calls += 1
        if self._calls <= _WARM:
            return self._aside(images, labels)
        if self._recorded is None:
            self._recorded = self._record(images, labels)
        graph, inputs, output = self._recorded
        for mine, given in zip(inputs, (images, labels), strict=True):
            mine.copy_(given)
        graph.replay()
        return output

    def _aside(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update on the stream that is recorded later: what it allocates lazily is then there."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            output = self._update(images, labels)
        torch.cuda.current_stream().wait_stream(self._stream)
        return output

    def _record(self, images: Tensor, labels: Tensor) -> _Recording:
        """Write down what an update does, without doing it."""
        inputs, graph = (images.clone(), labels.clone()), torch.cuda.CUDAGraph()
        try:
            # thread_local: another thread may use the GPU meanwhile
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                output = self._update(*inputs)
        except RuntimeError as error:  # torch goes on in no known state, so we do not
            cause = error.__context__ or error  # what ends a recording complains of what went wrong in it
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise UserError(
                "the network",
                expected="one whose updates can be recorded as a CUDA graph, as it says static = True",
                got=first_line(cause),
                remedy="take static = True out of it, or what reads the GPU's numbers in its forward",
            ) from error
        return graph, inputs, output
