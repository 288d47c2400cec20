"""Numbers as a report's readers see them; what is not known is an empty text.

Called by what writes the report's sections.
"""

__all__ = ["change", "count", "fixed", "percent", "spread"]


def percent(value: float | None, decimals: int = 2) -> str:
    """Return a fraction as percent."""
    return "" if value is None else f"{100 * value:.{decimals}f} %"


def change(value: float | None, baseline: float | None) -> str:
    """Return how many points a fraction lies above (+) or below (-) the baseline's."""
    return "" if value is None or baseline is None else f"{100 * (value - baseline):+.2f}"


def count(value: int | None) -> str:
    """Return a whole number with its thousands apart."""
    return "" if value is None else f"{value:,}"


def fixed(value: float | None) -> str:
    """Return a number with three decimals."""
    return "" if value is None else f"{value:.3f}"


def spread(mean: str, deviation: str) -> str:
    """Return a mean with its standard deviation, both texts already."""
    return f"{mean} ± {deviation}" if mean and deviation else mean
