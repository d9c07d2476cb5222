"""Measured times, in words."""

from __future__ import annotations

from collections.abc import Iterable


def spread(seconds: Iterable[float]) -> str:
    """Median, 99th percentile and maximum."""
    values = sorted(seconds)
    if not values:
        return "nothing measured"
    median, p99 = values[(len(values) - 1) // 2], values[len(values) * 99 // 100]
    return f"median {median * 1e3:.2f}, p99 {p99 * 1e3:.2f}, max {values[-1] * 1e3:.2f} ms"
