"""An average of the weights over a training, which is judged and kept in their place. Called by `env/training.py`."""

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["averaged"]


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential average of weights and batch-norm statistics that soon forgets where the training started.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage with
    `num_updates`: with a constant decay of 0.999 the random start would still weigh a third after 1,000 updates.
    """

    def update(average: Any, current: Any, count: Any) -> None:
        if average[0].is_floating_point():
            n = int(count)  # on the CPU, wherever the network is: no GPU waits for it
            blend = get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))  # type: ignore[no-untyped-call]
            blend(average, current, count)
        else:  # batch-norm's counts of minibatches
            for mine, theirs in zip(average, current, strict=True):
                mine.copy_(theirs)

    return AveragedModel(network, multi_avg_fn=update, use_buffers=True)
