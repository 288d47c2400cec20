"""What `zeroout doctor --model` says of a network: its size, what can be pruned, and what cannot and why."""

from dataclasses import dataclass

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from env.channels import ChannelPlan
from env.compression import EpisodeConfig
from env.errors import UserError
from env.networks import NetworkConfig, build_network

__all__ = ["NetworkReport", "look_at"]


@dataclass(frozen=True)
class NetworkReport:
    """A network and its plan."""

    network: nn.Module
    plan: ChannelPlan

    @property
    def summary(self) -> str:
        """One line: sizes, filters, and how much can go at most."""
        costs = self.plan.costs(self.plan.widths)
        sizes = f"{costs['parameters']:,} parameters, {costs['macs']:,} MACs, {costs['bytes']:,} bytes"
        if self.plan.uncounted:
            sizes += f"; {self.plan.uncounted}"
        if not self.plan.units:
            return f"{sizes}; nothing can be pruned"
        min_width = EpisodeConfig().min_width
        least = torch.minimum(self.plan.widths, torch.tensor(min_width))
        most = 1 - int(self.plan.parameters(least)) / costs["parameters"]
        return (
            f"{sizes}; {self.plan.units:,} filters in {len(self.plan.layers)} layers; at most {most:.2%} of the "
            f"parameters can go (min_width {min_width})"
        )

    def render(self) -> RenderableType:
        """The layers that can be pruned, and below them everything that is left out, with the reason."""
        table = Table("layer", "filters", "parameters", "goes with it")
        for index, layer in enumerate(self.plan.layers):
            with_it = ", ".join(name for name in layer.modules if name != layer.name)
            table.add_row(layer.name, str(layer.units), f"{self._share(index):.2%}", with_it or "-")
        lines = [Text(f"left out: {name}: {reason}") for name, reason in self._left_out()]
        return Group(table, *lines)

    def _share(self, layer: int) -> float:
        """Share of the parameters that this layer's filters hold, with what reads them."""
        without = self.plan.widths.clone()
        without[layer] = 0
        full = int(self.plan.parameters(self.plan.widths))
        return 1 - int(self.plan.parameters(without)) / full

    def _left_out(self) -> list[tuple[str, str]]:
        order = [name for name, _ in self.network.named_modules()]
        return sorted(self.plan.left_out.items(), key=lambda item: order.index(item[0]))


def look_at(config: NetworkConfig, *, channels: int, classes: int, image_size: int) -> NetworkReport:
    """Build the network (with its weights, if any are named) and plan it.

    Raises:
        UserError: it cannot be built, its weights do not fit, or it cannot be traced with images of this size.

    """
    network = build_network(config, channels=channels, classes=classes)
    plan = ChannelPlan(network, torch.zeros(1, channels, image_size, image_size))
    if plan.outputs != classes:
        raise UserError(
            "the network's logits",
            expected=f"{classes} for an image, one for each class",
            got=str(plan.outputs),
            remedy="let the factory use classes=, or give --classes",
        )
    return NetworkReport(network, plan)
