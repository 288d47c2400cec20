"""How much each filter seems to matter: scores per unit, larger = more important.

Heuristic policies rank by one of them, and the features Controller starts from the first. Each is computed on the
network as it is (compact), and returned for all units of the plan, 0 for those that are gone.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from env.channels import ChannelPlan
from env.groups import NORMS, PRODUCERS, TRANSPOSED

__all__ = ["FEATURES", "LIMIT", "gamma", "l1", "log_scores", "taylor"]

#: The columns of `log_scores`, in order.
FEATURES = ("log_taylor", "log_gamma", "log_l1")

#: Scores below this are all the same to a logarithm: a filter that does nothing at all.
_SMALLEST, _LARGEST = 1e-10, 1e10
#: No log score is further from 0.
LIMIT = 24.0


def taylor(
    network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """First-order Taylor score (Molchanov et al., CVPR 2019, eq. 8, at the batch-norm gate): float32 [F].

    The root of the mean over minibatches of (sum over a unit's gate parameters of gradient x value) squared;
    the gate is the unit's batch-norm entries, or its weights where it has no batch-norm.

    Args:
        network: compact for `keep_mask`; evaluated in eval mode, its gradients are cleared.
        plan: its units.
        keep_mask: bool [F].
        batches: normalised images float32 [B, C, H, W] with labels int64 [B].

    """
    was_training = network.training
    network.eval()
    parameters = dict(network.named_parameters())
    gates = list(_gates(network, plan, keep_mask))
    total = torch.zeros(plan.units)
    count = 0
    for images, labels in batches:
        loss = F.cross_entropy(network(images).float(), labels)
        gradients = torch.autograd.grad(loss, [parameters[name] for name, _, _ in gates])
        score = torch.zeros(plan.units)
        for (name, axis, owner), gradient in zip(gates, gradients, strict=True):
            product = (gradient * parameters[name].detach()).float().cpu()
            _add_per_unit(score, product, axis, owner)
        total += score.square()
        count += 1
    network.train(was_training)
    return (total / max(count, 1)).sqrt()


def gamma(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> Tensor:
    """Mean absolute batch-norm scale of each unit (Liu et al., Network Slimming, 2017): float32 [F].

    Units without a batch-norm get their `l1` score instead.
    """
    scores, seen = torch.zeros(plan.units), torch.zeros(plan.units)
    for name, axis, owner in _outputs(network, plan, keep_mask, NORMS, ("weight",)):
        _add_per_unit(scores, network.get_parameter(name).detach().abs().float().cpu(), axis, owner)
        _add_per_unit(seen, torch.ones(len(owner)), 0, owner)
    return torch.where(seen > 0, scores / seen.clamp(min=1), l1(network, plan, keep_mask))


def l1(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> Tensor:
    """Mean absolute weight of each unit's kernels (Li et al., ICLR 2017, per weight): float32 [F]."""
    scores, seen = torch.zeros(plan.units), torch.zeros(plan.units)
    for name, axis, owner in _outputs(network, plan, keep_mask, PRODUCERS, ("weight",)):
        weight = network.get_parameter(name).detach().abs().float().cpu()
        _add_per_unit(scores, weight, axis, owner)
        _add_per_unit(seen, torch.full((len(owner),), weight.numel() / len(owner)), 0, owner)
    return scores / seen.clamp(min=1)


def log_scores(
    network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, batches: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """The features of every filter, in the order of `FEATURES`: float32 [F, 3], 0 where a filter is gone."""
    columns = [
        taylor(network, plan, keep_mask, batches),
        gamma(network, plan, keep_mask),
        l1(network, plan, keep_mask),
    ]
    scores = torch.stack(columns, dim=1).clamp(_SMALLEST, _LARGEST).log()
    return torch.where(keep_mask[:, None], scores, torch.zeros(()))


def _outputs(
    network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, kinds: tuple[type, ...], keys: tuple[str, ...]
) -> Iterator[tuple[str, int, Tensor]]:
    """(tensor name, output axis, owner of each index) of the tensors that produce units."""
    for path in dict.fromkeys(path for layer in plan.layers for path in layer.modules):
        module = network.get_submodule(path)
        if not isinstance(module, kinds):
            continue
        for key in keys:
            name = f"{path}.{key}"
            output_axis = int(isinstance(module, TRANSPOSED) and key == "weight")
            for axis, owner in plan.axes(name, keep_mask):
                if axis == output_axis and getattr(module, key) is not None:
                    yield name, axis, owner


def _gates(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """The tensors whose gradient tells what silencing a unit would do: norms where there are any."""
    gated = torch.zeros(plan.units, dtype=torch.bool)
    for entry in _outputs(network, plan, keep_mask, NORMS, ("weight", "bias")):
        gated[entry[2][entry[2] >= 0]] = True
        yield entry
    for name, axis, owner in _outputs(network, plan, keep_mask, PRODUCERS, ("weight", "bias")):
        bare = torch.where((owner >= 0) & ~gated[owner.clamp(min=0)], owner, -1)
        if (bare >= 0).any():
            yield name, axis, bare


def _add_per_unit(scores: Tensor, values: Tensor, axis: int, owner: Tensor) -> None:
    """Add the sum of `values` over all axes but `axis` to the owners' scores, in place."""
    per_channel = values.transpose(0, axis).flatten(1).sum(1) if values.dim() > 1 else values
    owned = owner >= 0
    scores.index_add_(0, owner[owned], per_channel[owned])
