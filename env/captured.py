"""An update recorded once as a CUDA graph, and replayed: a GPU then does not wait for Python between two kernels.

Called by env/training.py and env/retraining.py, where enough updates of one shape follow each other. An update of VGG16
is some 400 kernels, most of them shorter than it takes to ask for them one by one.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from env.errors import first_line

__all__ = ["WORTH", "captured"]

_LOG = logging.getLogger(__name__)
#: From so many updates on, recording (some tenths of a second) is cheaper than asking for the kernels each time.
WORTH = 64
_WARM = 3  # updates before it: momentum, cuDNN's choices and its handles come to be outside the recording


def captured(update: Callable[[Tensor, Tensor], Tensor], network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The same `update` of (images, labels), recorded if its `network` is on a GPU and can be.

    All calls take tensors of one shape. What it returns is overwritten by the next call. Anything that changes from
    call to call must be in a tensor on the GPU (see `set_rate`); so a network with modules or hooks of the user's own,
    whose Python may decide anew each time, is recorded only if it says `static = True` of itself.
    """
    static = getattr(network, "static", False) is True or all(map(_is_known, network.modules()))
    return _Captured(update) if static and any(p.is_cuda for p in network.parameters()) else update


def _is_known(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module).__module__.startswith(("torch.nn.", "env.")) and not any(hooks)


class _Captured:
    """Plays an update as it is, records it, replays it."""

    def __init__(self, update: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._update = update
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._output: Tensor | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self._calls += 1
        if self._calls <= _WARM:
            return self._aside(images, labels)
        if self._calls == _WARM + 1:
            self._record(images, labels)
        if self._graph is None or self._inputs is None or self._output is None:
            return self._update(images, labels)
        for mine, given in zip(self._inputs, (images, labels), strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._output

    def _aside(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update on the stream that is recorded later: what it allocates lazily is then there."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            output = self._update(images, labels)
        torch.cuda.current_stream().wait_stream(self._stream)
        return output

    def _record(self, images: Tensor, labels: Tensor) -> None:
        """Write down what an update does, without doing it; where that fails, updates go on unrecorded."""
        inputs, graph = (images.clone(), labels.clone()), torch.cuda.CUDAGraph()
        try:
            # thread_local: another thread may use the GPU meanwhile
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                output = self._update(*inputs)
        except RuntimeError as error:
            _LOG.warning("the GPU goes on kernel by kernel, as an update cannot be recorded: %s", first_line(error))
            return
        self._graph, self._inputs, self._output = graph, inputs, output
