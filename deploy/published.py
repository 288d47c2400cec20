"""What others have published, for the one picture where it can stand beside a campaign's own points.

Called by the report. A published point is comparable where network, images and what is counted are the same: our
networks at full width on the official CIFAR-10. On anything else its accuracy says nothing, and none is marked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PUBLISHED", "Published", "published_beside"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published network: test accuracy on CIFAR-10, and what was removed.

    `accuracy` and `compression` are fractions, `change` is in points from the authors' own baseline; what they do not
    give is None.
    """

    who: str
    compression: float
    accuracy: float | None = None
    change: float | None = None
    note: str = ""

    @property
    def is_source(self) -> bool:
        """Whether it is from the research report whose method this is (README, "Where it comes from")."""
        return self.who == _SOURCE

    def height(self, baseline: float | None) -> float | None:
        """Return the test accuracy to draw it at: its own, else its change from `baseline`, else None."""
        if self.accuracy is not None or self.change is None or baseline is None:
            return self.accuracy
        return baseline + self.change / 100


_SOURCE = "the source (2022)"
_FILTERS_ONLY = "counts filters, not the next layer's inputs"
#: By network, and by what compression counts; ResNet56's are given as factors of fewer MACs, 2.1 and 2.55.
PUBLISHED: Mapping[tuple[str, str], tuple[Published, ...]] = {
    ("vgg16", "parameters"): (
        Published(who=_SOURCE, compression=0.7002, accuracy=0.9291, change=-0.61),
        Published(who=_SOURCE, compression=0.9200, accuracy=0.9245, change=-1.07),
        Published(who=_SOURCE, compression=0.9301, accuracy=0.9214, change=-1.38),
        Published(who=_SOURCE, compression=0.9752, accuracy=0.9132, change=-2.20),
        Published(who="CACP", compression=0.7010, accuracy=0.9289, change=-0.13),
        Published(who="HRank", compression=0.9200, accuracy=0.9123, change=-2.73, note=_FILTERS_ONLY),
        Published(who="LPF", compression=0.9280, accuracy=0.8934, change=-3.43),
        Published(who="CORING", compression=0.816, accuracy=0.9442, change=0.46),
        Published(who="CORING", compression=0.833, accuracy=0.9420, change=0.24),
        Published(who="CORING", compression=0.873, accuracy=0.9383, change=-0.13),
        Published(who="DECORE", compression=0.890, accuracy=0.9356),
        Published(who="DECORE", compression=0.966, accuracy=0.9244),
        Published(who="DECORE", compression=0.983, accuracy=0.9168),
        Published(who="CLR-RNF", compression=0.9495, accuracy=0.9332, change=0.30),
    ),
    ("resnet18", "parameters"): (
        Published(who=_SOURCE, compression=0.87, change=-0.75),
        Published(who=_SOURCE, compression=0.90, change=-1.0, note="no more than this, at about this size"),
        Published(who="OTO/HESSO", compression=0.919, accuracy=0.928),
    ),
    ("resnet34", "parameters"): (
        Published(who=_SOURCE, compression=0.94, change=-2.0, note="no more than this, at about this size"),
    ),
    ("resnet56", "macs"): (
        Published(who="DepGraph", compression=1 - 1 / 2.1, accuracy=0.9377, change=0.24),
        Published(who="DepGraph", compression=1 - 1 / 2.55, accuracy=0.9364, change=0.11),
    ),
}


def published_beside(config: Mapping[str, Any]) -> tuple[Published, ...]:
    """Return the points comparable with the campaign of this configuration (the tree in campaign.toml); often none."""
    network, data = config.get("network", {}), config.get("data", {})
    brought = network.get("factory") or config.get("transfer", {}).get("classes")  # with what others did not have
    same_network = not brought and network.get("width", 1.0) == 1.0
    fewer = any(data.get(key) for key in ("train_limit", "classes", "train_per_class"))
    same_images = data.get("source") == "cifar10" and not fewer and data.get("image_size", 0) in (0, 32)
    measure = config.get("episode", {}).get("measure", "parameters")
    return PUBLISHED.get((str(network.get("name")), measure), ()) if same_network and same_images else ()
