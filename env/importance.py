"""How much each filter seems to matter: scores per unit, larger = more important.

Heuristic policies rank by one of them, the features Controller starts from the first of `FEATURES`, and filters are
replaced by one (env/replacement.py). Each is computed on the network as it is (compact), and returned for all units of
the plan, 0 for those that are gone. Channels that live or die together are one unit, with one score.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from env.channels import ChannelPlan
from env.feature_rank import feature_rank
from env.groups import NORMS, PRODUCERS, TRANSPOSED

__all__ = [
    "FEATURES",
    "IMPORTANCES",
    "LIMIT",
    "fpgm",
    "gamma",
    "importance",
    "l1",
    "l2",
    "log_scores",
    "rank",
    "taylor",
]

Batches = Iterable[tuple[Tensor, Tensor]]

#: The columns of `log_scores`, in order.
FEATURES = ("log_taylor", "log_gamma", "log_l1")

#: Scores below this are all the same to a logarithm: a filter that does nothing at all.
_SMALLEST, _LARGEST = 1e-10, 1e10
#: No log score is further from 0.
LIMIT = 24.0


def importance(name: str, network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, batches: Batches) -> Tensor:
    """The score of every unit by one of `IMPORTANCES`: float32 [F]; the arguments are those of `taylor`."""
    return IMPORTANCES[name](network, plan, keep_mask, batches)


def rank(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, batches: Batches) -> Tensor:
    """Mean rank of each unit's feature maps (HRank, see env/feature_rank.py): float32 [F]; arguments as `taylor`.

    Deep maps are small, so that many filters of a layer share a rank. The second key among those is `l1`: it adds less
    than half of the least difference that two mean ranks can have.
    """
    ranks, maps = feature_rank(network, plan, keep_mask, batches)
    second = l1(network, plan, keep_mask)
    place = torch.zeros(plan.units, dtype=torch.float64)
    for layer in plan.layers:
        mine = slice(layer.first, layer.first + layer.units)
        # places among the equals, not the norms themselves, whose differences float32 would lose beside the rank
        for value in torch.unique(ranks[mine]):
            equals = layer.first + (ranks[mine] == value).nonzero().flatten()
            order = equals[second[equals].argsort(descending=True, stable=True)]
            place[order] = torch.linspace(1.0, 0.0, len(equals), dtype=place.dtype)
    tie = 0.49 * place / maps.clamp(min=1)
    return (ranks + torch.where(keep_mask, tie, 0.0)).float()


def taylor(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, batches: Batches) -> Tensor:
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
    return _mean_of_weights(network, plan, keep_mask, torch.abs)


def l2(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> Tensor:
    """Root of the mean squared weight of each unit's kernels (He et al., IJCAI 2018, per weight): float32 [F]."""
    return _mean_of_weights(network, plan, keep_mask, torch.square).sqrt()


def _mean_of_weights(
    network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, size: Callable[[Tensor], Tensor]
) -> Tensor:
    """The mean of `size` over the weights of each unit's kernels: float32 [F]."""
    scores, seen = torch.zeros(plan.units), torch.zeros(plan.units)
    for name, axis, owner in _outputs(network, plan, keep_mask, PRODUCERS, ("weight",)):
        weight = size(network.get_parameter(name).detach()).float().cpu()
        _add_per_unit(scores, weight, axis, owner)
        _add_per_unit(seen, torch.full((len(owner),), weight.numel() / len(owner)), 0, owner)
    return scores / seen.clamp(min=1)


def fpgm(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor) -> Tensor:
    """How far each unit's kernels are from the other kernels of their layers (FPGM; He et al., CVPR 2019): float32 [F].

    The filter with the least sum of distances is the one nearest to their geometric median, which the others can stand
    for. Here the mean Euclidean distance to the others, per root of the weights of a kernel, and over all kernels of
    the unit, so that layers of different sizes can be compared. A kernel that is alone in its layer has distance 0.
    """
    scores, seen = torch.zeros(plan.units), torch.zeros(plan.units)
    for name, axis, owner in _outputs(network, plan, keep_mask, PRODUCERS, ("weight",)):
        kernels = network.get_parameter(name).detach().transpose(0, axis).flatten(1).double()
        others = max(1, len(kernels) - 1)
        # by matrix products, a tenth of the time for wide layers; in double precision equal kernels stay at about 0
        apart = torch.cdist(kernels, kernels, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(0.0).sum(1) / others
        _add_per_unit(scores, (apart / kernels.shape[1] ** 0.5).float().cpu(), 0, owner)
        _add_per_unit(seen, torch.ones(len(owner)), 0, owner)
    return scores / seen.clamp(min=1)


def log_scores(network: nn.Module, plan: ChannelPlan, keep_mask: Tensor, batches: Batches) -> Tensor:
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


#: What can say how much a filter matters, by name; all of them take the arguments of `taylor`.
IMPORTANCES: dict[str, Callable[[nn.Module, ChannelPlan, Tensor, Batches], Tensor]] = {
    "rank": rank,
    "taylor": taylor,
    "gamma": lambda network, plan, keep_mask, _batches: gamma(network, plan, keep_mask),
    "l1": lambda network, plan, keep_mask, _batches: l1(network, plan, keep_mask),
    "l2": lambda network, plan, keep_mask, _batches: l2(network, plan, keep_mask),
    "fpgm": lambda network, plan, keep_mask, _batches: fpgm(network, plan, keep_mask),
}
