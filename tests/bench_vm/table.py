"""The figures as tables for a terminal, one for each version of QEMU."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console
from rich.table import Table

_BUSY: Final = 0.5
"""A load from which on somebody else takes part of the machine."""


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures, the goals beside them, and what they are multiples of."""
    console.print(f"{result['machine']}; medians of {result['runs']} runs (least to most)")
    if result["load"] > _BUSY:
        console.print(
            f"The machine was busy before (load {result['load']:.1f}): trust these figures less."
        )
    if result["quick"]:
        console.print("A quick run shows that everything works; its figures tell nothing.")
    trip = result["round_trip"]
    console.print(
        f"round trip over loopback: p50 {trip['bare']:.3f} ms bare, {trip['placed']:.3f} ms for a "
        "missing page with its placing"
    )
    for version in result["versions"]:
        console.print(_table(version, [x for x in result["figures"] if x["version"] == version]))
    console.print("Ratios are postcopyd's to the better of QEMU's own two.")


def _table(version: str, figures: list[dict[str, Any]]) -> Table:
    setups = list(figures[0]["medians"])
    compared = list(figures[0]["ratios"])
    table = Table(title=f"QEMU {version}")
    table.add_column("figure", no_wrap=True)
    for setup in setups:
        table.add_column(setup, justify="right")
    for setup in compared:
        table.add_column(f"ratio{setup.removeprefix('postcopyd')}", justify="right")
    table.add_column("goal", justify="right")
    for figure in figures:
        ratios = figure["ratios"]
        table.add_row(
            f"{figure['figure']}, {figure['unit']}",
            *(_with_range(figure["medians"][setup], figure["ranges"][setup]) for setup in setups),
            *(f"{ratios[setup]:.2f}" if setup in ratios else "" for setup in compared),
            f"<= {figure['goal']:.2g}" if figure["goal"] else "",
        )
        if trips := figure["round_trips"]:
            table.add_row("  in round trips", *(f"{trips[setup]:.1f}" for setup in setups))
    return table


def _with_range(middle: float, extremes: tuple[float, float]) -> str:
    digits = 2 if middle < 10 else 0
    if extremes[0] == extremes[1]:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({extremes[0]:.{digits}f} to {extremes[1]:.{digits}f})"
