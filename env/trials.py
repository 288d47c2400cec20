"""Trying a plan out: which layers cannot be pruned after all, though the graph of groups allows it.

The graph does not see everything (a reshape that mixes channels, a mean over them, a function that is not 0 at 0, a
branch for training alone). So random filters are taken out and silenced, and the two networks must agree. Called by
env/channels.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from env.copies import duplicate
from env.errors import UserError, first_line
from env.zero_out import attach_zero_out

if TYPE_CHECKING:  # which tries itself out
    from env.channels import ChannelPlan

__all__ = ["find_broken"]

#: Masked and compact may differ by this share of what the mask changes, or by so many roundings of the largest logit.
_TOLERANCE, _ROUNDING = 1e-4, 100.0
_TRIALS = 6  # each of other weights, images and masks: behind a ReLU that happens to be silent nothing shows


def find_broken(plan: "ChannelPlan", model: nn.Module, example: Tensor) -> dict[int, str]:
    """Layers of the plan that cannot be pruned after all: index -> why.

    Args:
        plan: which is to be tried.
        model: its network in eval mode; it is not changed.
        example: float32 [1, C, H, W].

    Raises:
        UserError: the network answers otherwise each time, so that nothing can be compared.

    """
    with torch.random.fork_rng(devices=[example.device] if example.device.type == "cuda" else []), torch.no_grad():
        dtype = torch.float64
        try:
            _check_steady(*_trial(model, example, 0, dtype))
        except UserError:
            raise
        except Exception:  # a forward that insists on float32
            dtype = torch.float32
            _check_steady(*_trial(model, example, 0, dtype))
        layers = range(len(plan.layers))
        if _disagreement(plan, model, example, dtype, layers) is None:
            return {}
        sound: list[int] = []
        broken: dict[int, str] = {}
        for layer in layers:
            reason = _disagreement(plan, model, example, dtype, [*sound, layer])
            if reason is None:
                sound.append(layer)
            else:
                broken[layer] = reason
    return broken


def _trial(model: nn.Module, example: Tensor, number: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The network with other weights, and random images [2, C, H, W]; `number` decides both, and what is drawn next."""
    torch.manual_seed(number)
    perturbed = _perturbed(model).to(dtype)  # double, so that little differences are not taken for rounding
    return perturbed, torch.randn(2, *example.shape[1:], device=example.device, dtype=torch.float64).to(dtype)


def _check_steady(model: nn.Module, images: Tensor) -> None:
    first, second = model(images), model(images)
    if not bool((first - second).abs().max() > _rounding(first)):
        return
    raise UserError(
        f"network {type(model).__name__} in eval mode",
        expected="the same logits each time for the same images",
        got="others each time",
        remedy="let it draw at random in training mode only: F.dropout(x, p, training=self.training), or nn.Dropout",
    )


def _disagreement(
    plan: "ChannelPlan", network: nn.Module, example: Tensor, dtype: torch.dtype, layers: Sequence[int]
) -> str | None:
    """How masked and compact differ where random shares of these layers are taken out, or None.

    Each layer loses a share of its own: layers that must stay alike would not show otherwise.
    """
    for number in range(_TRIALS):
        model, images = _trial(network, example, number, dtype)
        full = model(images)
        keep_mask = torch.ones(plan.units, dtype=torch.bool)
        for layer in (plan.layers[index] for index in layers):
            going = torch.randperm(layer.units)[: int(torch.randint(1, max(layer.units, 2), ()))]
            keep_mask[layer.first + going[: layer.units - 1]] = False
        try:
            compact = plan.compact(model, keep_mask)
            attach_zero_out(model, plan, keep_mask)  # masked from here on
            silenced = model(images)
            answer = compact(images)
        except Exception as error:  # whatever a forward raises that counts on its channels
            return f"the network does not run without some of its channels ({first_line(error)})"
        if answer.shape != silenced.shape or not _alike(answer, silenced, full):
            return "taking its channels out is not the same as silencing them: something past it mixes them otherwise"
        reason = _untrainable(compact, model, images)
        if reason is not None:
            return reason
    return None


def _untrainable(compact: nn.Module, masked: nn.Module, images: Tensor) -> str | None:
    """Why `compact` does not do in training mode what `masked` does there, or None. Only shapes are compared.

    What is drawn at random differs, and batch-norm sees other channels.
    """
    try:
        wanted = masked.train()(images)
    except Exception:  # the network's own fault, not the missing channels'
        return None
    try:
        got = compact.train()(images)
    except Exception as error:
        return f"in training mode the network does not run without some of its channels ({first_line(error)})"
    if isinstance(wanted, Tensor) and got.shape != wanted.shape:
        return f"in training mode the network returns {list(got.shape)} without some of its channels"
    return None


def _alike(compact: Tensor, silenced: Tensor, full: Tensor) -> bool:
    """Whether they differ by no more than rounding, which is small beside what silencing changes."""
    allowed = torch.maximum(_TOLERANCE * (silenced - full).abs().max(), _rounding(full))
    return bool((compact - silenced).abs().max() <= allowed)


def _rounding(logits: Tensor) -> Tensor:
    return _ROUNDING * torch.finfo(logits.dtype).eps * logits.abs().max()


def _perturbed(model: nn.Module) -> nn.Module:
    """A copy in which nothing is exactly 0 or 1, so that no shift or scale of a fresh network hides a mistake."""
    model = duplicate(model)  # in its own precision, in which numbers are drawn in a fifth of a double's time
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.numel():
            tensor.mul_(torch.rand_like(tensor) + 0.5)
            if not name.endswith("running_var"):  # which stays positive
                scale = tensor.square().mean().sqrt()
                tensor.add_(torch.randn_like(tensor), alpha=0.1 * float(scale or 1.0))
    return model
