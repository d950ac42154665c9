"""Fault latencies for people: a few numbers, and a picture."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console

_BAR: Final = 40


def quantiles(latency: dict[str, Any]) -> str:
    """Return a few numbers of a `postcopyd.incoming.report.LatencyReport`."""
    return (
        f"p50 {latency['p50']:.0f} us, p99 {latency['p99']:.0f} us, max {latency['maximum']:.0f} us"
    )


def show_histogram(buckets: list[list[float]], console: Console) -> None:
    """Draw the fault latencies, a row for each doubling."""
    rows: dict[int, int] = {}
    for edge, count in buckets:
        doubling = max(0, int(edge - 1).bit_length())
        rows[doubling] = rows.get(doubling, 0) + int(count)
    highest = max(rows.values())
    console.print("Fault latency, microseconds:")
    for doubling in range(min(rows), max(rows) + 1):
        count = rows.get(doubling, 0)
        bar = "█" * -(-count * _BAR // highest)
        console.print(f"  up to {1 << doubling:>8} {count:>7} [cyan]{bar}[/]", highlight=False)
