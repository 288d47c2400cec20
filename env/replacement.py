"""Filter replacement: before anything is pruned, the least important filters become copies of the most important ones.

The source's first method. Important filters are fragile; copied and retrained, the copies drift apart and the network
holds what it knows more than once. What a filter *is* is copied (its kernel, bias and batch-norm entries); what is done
with it (the weights of the next layer that read it) stays, and so the copies are not alike to training.

Nothing may be ranked again before that training: copies tie exactly. Called by deploy/replace.py, and by
deploy/transfer.py, for a network that moves to other classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from env.channels import ChannelPlan
from env.data import check_fields
from env.errors import UserError
from env.groups import PRODUCERS, TRANSPOSED, module_tensors
from env.importance import IMPORTANCES
from env.recognizer import Recognizer
from env.seeds import derive_seed

__all__ = [
    "COPIES",
    "RULES",
    "TREATMENTS",
    "ReplacementConfig",
    "Treatment",
    "check_copies",
    "replace_filters",
    "require_filters",
    "sources",
    "treat",
    "weakest",
    "without_weakest",
]

#: "1": the k highest, once each, over the k lowest. "2": the single highest over all of them. "3": as often as needed,
#: in proportion to how far a filter's importance is above those that are overwritten.
COPIES = ("1", "2", "3")
#: What may become of the weakest filters. "none": nothing, "reinit": fresh weights, "noise": their own with noise.
TREATMENTS = (*COPIES, "none", "reinit", "noise")
_HALF = 0.5
_BATCH = 128  # images that importance is computed on at once


class Treatment(Protocol):
    """What becomes of a share of each layer's filters, and by which importance they are found."""

    @property
    def how(self) -> str:
        """One of `TREATMENTS`; "prune" for `without_weakest`."""

    @property
    def share(self) -> float:
        """Of each layer's filters."""

    @property
    def importance(self) -> str:
        """One of `env.importance.IMPORTANCES`."""

    @property
    def images(self) -> int:
        """Training images behind it, at most."""


@dataclass(frozen=True, kw_only=True)
class ReplacementConfig:
    """Filter replacement of a campaign. UserError, naming the field, for a value out of range."""

    how: str = ""  # of TREATMENTS; "" leaves the whole stage out, its training too
    share: float = 0.1  # of each layer's filters
    importance: str = "rank"  # of env.importance.IMPORTANCES: what weak and strong is
    images: int = 640  # training images behind it, augmented (HRank's number)

    def __post_init__(self) -> None:
        check_fields("replacement", self, {**RULES, "how": _HOW})
        check_copies("replacement", self)


_HOW = (lambda how: how in ("", *TREATMENTS), f"one of {', '.join(TREATMENTS)}, or nothing")
#: Of the fields of any `Treatment` but `how`, for `env.data.check_fields`.
RULES: Mapping[str, tuple[Callable[..., bool], str]] = {
    "share": (lambda share: 0 < share < 1, "a share above 0 and below 1"),
    "importance": (lambda name: name in IMPORTANCES, f"one of {', '.join(IMPORTANCES)}"),
    "images": (lambda n: n >= 1, "a whole number of at least 1"),
}


def check_copies(section: str, config: Treatment) -> None:
    """UserError, which calls the configuration `section`, where there are not enough filters to be copied once each."""
    if config.how == "1" and config.share > _HALF:
        raise UserError(
            f"{section}.share",
            expected="at most 0.5 for replacement 1, where each of the strongest is copied once",
            got=repr(config.share),
            remedy=f"lower it, or set {section}.how = 3",
        )


def require_filters(plan: ChannelPlan, share: float, section: str = "replacement") -> None:
    """UserError, which calls the configuration `section`, where `share` of the widest layer is no filter at all."""
    widest = int(plan.widths.max())
    if _count(share, widest) < 1:
        raise UserError(
            f"{section}.share",
            expected=f"at least {math.ceil(1000 / widest) / 1000:.3f}, one filter of the widest layer",
            got=repr(share),
            remedy="raise it",
        )


def _count(share: float, filters: int) -> int:
    """How many filters that is, rounded down; 0.29 of 100 are 29, whatever binary fractions say."""
    return int(share * filters + 1e-9)


def treat(
    recognizer: Recognizer, config: Treatment, *, fresh: nn.Module, seed: int, section: str = "replacement"
) -> None:
    """Find the weakest filters of the recognizer's network by `config.importance`, and treat them, in place.

    `fresh` is the same network newly initialised; `seed` draws the images behind importance, and noise. UserError as
    `require_filters`.
    """
    plan = recognizer.plan
    require_filters(plan, config.share, section)
    replace_filters(
        recognizer.network,
        plan,
        _scores(recognizer, config, seed),
        how=config.how,
        share=config.share,
        fresh=fresh.state_dict(),
        generator=torch.Generator().manual_seed(derive_seed(seed, "noise")),
    )


def without_weakest(recognizer: Recognizer, config: Treatment, *, seed: int, section: str) -> nn.Module:
    """A compact copy of the recognizer's network without the filters that `treat` would treat; UserError as there."""
    plan = recognizer.plan
    require_filters(plan, config.share, section)
    kept = torch.ones(plan.units, dtype=torch.bool)
    kept[torch.cat(weakest(plan, _scores(recognizer, config, seed), config.share))] = False
    return plan.compact(recognizer.network, kept)


def _scores(recognizer: Recognizer, config: Treatment, seed: int) -> Tensor:
    """The importance of every filter: float32 [F]."""
    return recognizer.importance(
        config.importance, recognizer.full(), images=config.images, batch_size=_BATCH, seed=seed
    )


def weakest(plan: ChannelPlan, scores: Tensor, share: float) -> list[Tensor]:
    """The least important `share` of each layer, the weakest last: a list of int64 [k], units; at least one stays.

    `scores` is float [F]; of equal ones that with the higher number is the weaker.
    """
    found = []
    for order in _strongest_first(plan, scores):
        count = min(_count(share, len(order)), len(order) - 1)
        found.append(order[len(order) - count :])
    return found


def sources(plan: ChannelPlan, scores: Tensor, share: float, how: str) -> dict[int, int]:
    """Which unit is copied over which, by the unit that is overwritten; `how` is one of `COPIES`.

    Replacement 3 gives the free places one after the other to the filter whose importance is highest above the best
    that is overwritten, per copy of it that there would then be (the divisor method of D'Hondt). In proportion to the
    importance itself it would be replacement 1: the ranks of a layer's better filters never differ by a factor of two.
    """
    pairs: dict[int, int] = {}
    for order, weak in zip(_strongest_first(plan, scores), weakest(plan, scores, share), strict=True):
        if not len(weak):
            continue
        strong = order[: len(order) - len(weak)]
        if how == "2":
            chosen = strong[:1].expand(len(weak))
        elif how == "3":
            chosen = _in_proportion(strong, scores[strong] - scores[weak].max(), len(weak))
        else:
            chosen = strong[: len(weak)]
        pairs.update(zip(weak.flip(0).tolist(), chosen.tolist(), strict=True))  # the strongest over the weakest
    return pairs


def replace_filters(
    network: nn.Module,
    plan: ChannelPlan,
    scores: Tensor,
    *,
    how: str,
    share: float,
    fresh: Mapping[str, Tensor],
    generator: torch.Generator,
) -> None:
    """Treat the weakest filters of each layer of the full `network`, in place.

    Args:
        network: the network that `plan` was made for, nothing removed.
        plan: its units.
        scores: float [F], larger = more important.
        how: one of `TREATMENTS`.
        share: of each layer's filters.
        fresh: tensors by name of the same network, newly initialised; read by "reinit" alone.
        generator: of the noise, on the CPU.

    """
    if how == "none":
        return
    pairs = sources(plan, scores, share, how) if how in COPIES else {}
    weak = torch.cat(weakest(plan, scores, share)) if not pairs else torch.tensor(list(pairs))
    if not len(weak):  # layers too narrow for so small a share
        return
    with torch.no_grad():
        for name, tensor, axis, owner in _outputs(network, plan):
            places = [(owner == unit).nonzero().flatten() for unit in weak.tolist()]
            at = torch.cat(places).to(tensor.device)
            if how == "reinit":
                values = fresh[name].to(tensor.device).index_select(axis, at)
            elif how == "noise":
                values = _noisy(network, name, tensor, axis, at, generator)
            else:
                origin = torch.cat([(owner == pairs[unit]).nonzero().flatten() for unit in weak.tolist()])
                values = tensor.index_select(axis, origin.to(tensor.device))
            tensor.index_copy_(axis, at, values)


def _strongest_first(plan: ChannelPlan, scores: Tensor) -> Iterator[Tensor]:
    """The units of each layer in falling order of their scores, int64; ties go by number."""
    for layer in plan.layers:
        yield layer.first + scores[layer.first : layer.first + layer.units].argsort(descending=True, stable=True)


def _in_proportion(units: Tensor, scores: Tensor, places: int) -> Tensor:
    """Which of the `units` get `places` further copies, in the order in which they are given: int64 [places].

    `scores` are at least 0; where all are, the units take turns.
    """
    copies, chosen = torch.ones(len(units), dtype=torch.float64), []
    weights = scores.double().clamp(min=torch.finfo(torch.float64).tiny)
    for _ in range(places):
        best = int((weights / (copies + 1)).argmax())
        copies[best] += 1
        chosen.append(int(units[best]))
    return torch.tensor(chosen, dtype=torch.int64)


def _outputs(network: nn.Module, plan: ChannelPlan) -> Iterator[tuple[str, Tensor, int, Tensor]]:
    """(name, tensor, axis, owner of each index) of everything that makes a filter what it is."""
    for path in dict.fromkeys(path for layer in plan.layers for path in layer.modules):
        module = network.get_submodule(path)
        for key, tensor in module_tensors(module).items():
            output = int(isinstance(module, TRANSPOSED) and key == "weight")
            for axis, owner in plan.axes(f"{path}.{key}"):
                if axis == output:
                    yield f"{path}.{key}", tensor, axis, owner


def _noisy(network: nn.Module, name: str, tensor: Tensor, axis: int, at: Tensor, generator: torch.Generator) -> Tensor:
    """The kernels at `at` with noise as large as the layer's own weights vary; batch-norm entries as they are."""
    values = tensor.index_select(axis, at)
    if not (name.endswith(".weight") and isinstance(network.get_submodule(name.rpartition(".")[0]), PRODUCERS)):
        return values
    noise = torch.randn(values.shape, generator=generator).to(values)
    return values + noise * tensor.std(correction=0)
