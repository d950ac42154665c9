"""What the demo found, for people and for machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from postcopyd.cli.latencies import quantiles, show_histogram
from postcopyd.cli.sizes import format_size


@dataclass(frozen=True, slots=True)
class DemoResult:
    """One run of the demo."""

    report: dict[str, Any]
    """The migration's report, as the control API gives it."""
    guest: dict[str, Any]
    """What the VMM saw."""
    source: dict[str, Any]
    """What the source says that it sent."""
    seconds: float
    """From the start of the VMM to the end of its walk."""
    expected: dict[str, str]
    """SHA-256 of each block as the source holds it."""
    device_state: str
    """SHA-256 of the device state as the source holds it."""

    @property
    def verified(self) -> bool:
        """True if every block and the device state agree and no byte was ever read wrong."""
        return (
            self.report["state"] == "end"
            and not self.guest["wrong"]
            and self.guest["sha256"] == self.expected
            and self.guest["device_state"] == self.device_state
        )

    @property
    def throughput(self) -> float:
        """Bytes of memory a second, from the package to the last page."""
        resident = self.report["window_seconds"] or 0.0
        return self.report["length"] / resident if resident else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "verified": self.verified,
            "seconds": self.seconds,
            "throughput": self.throughput,
            "report": self.report,
            "guest": self.guest,
            "source": self.source,
            "sha256": self.expected,
        }


def show(result: DemoResult, console: Console) -> None:
    """Print the result as a table, a histogram and a verdict."""
    report, guest = result.report, result.guest
    counters, latency = report["counters"], report["fault_latency"]
    table = Table(show_header=False, title="A guest that ran before its memory")
    table.add_row("memory", f"{format_size(report['length'])} in {len(report['blocks'])} blocks")
    table.add_row("switchover", f"{report['downtime_seconds'] * 1e3:.1f} ms until it ran")
    window = report["window_seconds"] * 1e3
    table.add_row("all memory here", f"{window:.0f} ms after the switchover")
    table.add_row("throughput", f"{result.throughput / 1e6:.0f} MB/s")
    table.add_row("faults", f"{counters['faults']} ({counters['requests']} pages asked for)")
    table.add_row("fault latency", quantiles(latency))
    waits = guest["waits"]
    table.add_row("the guest waited", f"{quantiles(waits)} ({waits['count']} times)")
    table.add_row("pages by fault", str(counters["pages_by_fault"]))
    table.add_row("pages by background", str(counters["pages_by_background"]))
    table.add_row("pages checked", f"{guest['checked']}, wrong: {len(guest['wrong'])}")
    console.print(table)
    if latency["count"]:
        show_histogram(latency["buckets"], console)
    if result.verified:
        console.print("[bold green]memory verified[/]: SHA-256 of every block agrees")
    else:
        console.print("[bold red]memory NOT verified[/]")
        for page in guest["wrong"][:10]:
            console.print(f"  wrong page: {page}")
        for name, digest in result.expected.items():
            if guest["sha256"].get(name) != digest:
                console.print(f"  block {name} differs from the source's")
