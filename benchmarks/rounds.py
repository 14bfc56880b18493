"""What rounds of a measurement come to: the median, and beside it the least and the most."""

import statistics
from collections.abc import Iterable, Mapping

Spread = dict[str, float]


def spread(values: Iterable[float], digits: int = 2) -> Spread:
    """Return the median of one figure over all rounds, with its extremes."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), digits),
        "min": round(ordered[0], digits),
        "max": round(ordered[-1], digits),
    }


def spreads(rounds: list[Mapping[str, float]]) -> dict[str, Spread]:
    """Return the spread of each figure that the rounds have in common."""
    return {key: spread(one[key] for one in rounds) for key in rounds[0]}


def percentiles(milliseconds: Iterable[float]) -> dict[str, float]:
    """Return p50 and p99 of single observations."""
    ordered = sorted(milliseconds)
    return {"p50_ms": statistics.median(ordered), "p99_ms": ordered[max(0, len(ordered) * 99 // 100 - 1)]}
