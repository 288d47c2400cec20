"""Spread, and paired differences, as the pages of benchmarks give them."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.stats import ttest_rel

__all__ = ["SURE", "Difference", "difference", "spread"]

_LEAST_P = 0.001  # below it, its digits say nothing
SURE = 0.05  # p of a paired t test, two-sided, below which a difference is said to be one


@dataclass(frozen=True)
class Difference:
    """Of one arm from another over the same seeds; `mean` in the units of the values, p of a paired t test."""

    mean: float
    p: float  # NaN where there are too few seeds, or all pairs differ alike
    wins: int
    n: int

    @property
    def sure(self) -> bool:
        """Whether it is one, at `SURE`."""
        return self.p < SURE

    @property
    def p_text(self) -> str:
        """Its p, "< 0.001" where it is that small; "" where there is none."""
        if math.isnan(self.p):
            return ""
        return f"{self.p:.3f}" if self.p >= _LEAST_P else f"< {_LEAST_P}"

    def __str__(self) -> str:
        p = f", p {self.p_text}" if self.p_text else ""
        return f"{self.mean:+.2f} ({self.wins} of {self.n}{p})"


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours less theirs by seed; None where they share none."""
    common = sorted(set(ours) & set(theirs))
    if not common:
        return None
    pairs = [(ours[seed], theirs[seed]) for seed in common]
    apart = [one - other for one, other in pairs]
    varies = len(pairs) > 1 and statistics.pstdev(apart) > 0
    p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue) if varies else math.nan
    return Difference(statistics.fmean(apart), p, sum(value > 0 for value in apart), len(pairs))


def spread(values: Mapping[int, float], digits: int = 2) -> str:
    """Mean (standard deviation) over seeds."""
    deviation = f" ({statistics.stdev(values.values()):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.{digits}f}{deviation}"
