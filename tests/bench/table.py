"""The figures as a table for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_BUSY = 0.5
"""A load from which on somebody else takes part of the machine."""


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures, the goals beside them, and what they do not tell."""
    trip = result["round_trip"]
    console.print(f"{result['machine']}; medians of {result['runs']} runs (least to most)")
    if result["load"] > _BUSY:
        console.print(
            f"The machine was busy before (load {result['load']:.1f}): trust these figures less."
        )
    console.print(
        f"bare round trip: p50 {trip['p50']:.1f} us, p99 {trip['p99']:.1f} us, "
        f"p99.9 {trip['p99.9']:.1f} us"
    )
    table = Table()
    table.add_column("figure", no_wrap=True)
    for column in ("floor in C", "postcopyd", "ratio", "goal", "round trips"):
        table.add_column(column, justify="right")
    previous = ""
    for figure in result["figures"]:
        if figure["case"] != previous:
            previous = figure["case"]
            table.add_section()
            table.add_row(previous, style="bold")
        trips = figure["round_trips"]
        table.add_row(
            f"  {figure['figure']}, {figure['unit']}",
            _with_range(figure["floor"], figure["floor_range"]),
            _with_range(figure["postcopyd"], figure["postcopyd_range"]),
            f"{figure['ratio']:.2f}",
            figure["goal"],
            f"{trips[0]:.1f} and {trips[1]:.1f}" if trips else "",
        )
    for name in result["no_huge_pages_for"]:
        table.add_section()
        table.add_row(name, "no huge pages to be had", "try as root")
    console.print(table)
    resident = result["resident_mib"]
    console.print(
        f"resident memory of the daemon: {resident['idle']:.1f} MiB idle (goal <= 60), "
        f"{resident['per_migration']:.2f} MiB more for each migration that waits with 256 MiB, "
        f"{resident['most']:.1f} MiB at most"
    )


def _with_range(middle: float, extremes: list[float]) -> str:
    digits = 2 if middle < 10 else 0
    return f"{middle:.{digits}f} ({extremes[0]:.{digits}f} to {extremes[1]:.{digits}f})"
