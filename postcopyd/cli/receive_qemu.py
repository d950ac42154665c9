"""postcopyctl receive-qemu, retry: a QEMU of this host gets its memory from a QEMU elsewhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from postcopyd.cli.control_client import ControlClient
from postcopyd.cli.migrations import add_allow_source
from postcopyd.cli.output import console, print_error, print_json
from postcopyd.cli.receive_progress import ReceiveProgress
from postcopyd.cli.sizes import format_size
from postcopyd.daemon.printable import printable

_PROGRAM: Final = "postcopyctl"
_EPILOG: Final = """\
The QEMU waits for its migration with -incoming defer, has its memory in a memory-backend-memfd with
share=on, and a QMP socket of its own: -qmp unix:PATH,server=on,wait=off. See postcopyctl(1)."""
_LOOK: Final = 0.5
"""Seconds between two looks at how it stands."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    receive = subparsers.add_parser(
        "receive-qemu",
        help="receive a VM into a QEMU on this host",
        description="Receive a VM into a QEMU on this host, whose memory the daemon fills while it "
        "runs.",
        epilog=_EPILOG,
    )
    receive.add_argument(
        "--listen",
        default="",
        metavar="ADDRESS",
        help="where to wait for the source: tcp:IP:PORT, tcp:[IPV6]:PORT or unix:PATH "
        "(default: what the daemon is configured to)",
    )
    receive.add_argument(
        "--name", default="", help="name of the migration (default: made of the process id)"
    )
    add_allow_source(receive)
    receive.set_defaults(func=_receive)
    retry = subparsers.add_parser(
        "retry",
        help="have another QEMU take the place of one that did not load",
        description="Have another QEMU take the place of one that did not load its devices. "
        "Everything that has come is moved over.",
        epilog=_EPILOG,
    )
    retry.add_argument("name", metavar="NAME", help="the migration")
    retry.add_argument(
        "--force",
        action="store_true",
        help="also where the guest may have run in the one before, and written to its disks",
    )
    retry.set_defaults(func=_retry)
    for parser in (receive, retry):
        parser.add_argument(
            "--qmp", required=True, metavar="PATH", help="the QMP socket of the QEMU"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")


def _receive(arguments: argparse.Namespace) -> int:
    client = ControlClient(arguments.control)
    # The daemon may run elsewhere in the file system than we do.
    monitor = str(Path(arguments.qmp).absolute())
    migration = client.receive_qemu(
        monitor, arguments.listen, arguments.name, arguments.allow_source
    )
    name = migration["name"]
    for address in migration["listen"]:
        print(f"{name} waits for its source at {address}", file=sys.stderr)
    if migration["security"] == "tls":
        print(f"{name} asks it for a certificate: it needs tls-creds", file=sys.stderr)
    return _see_it_through(client, migration, arguments.json)


def _retry(arguments: argparse.Namespace) -> int:
    client = ControlClient(arguments.control)
    monitor = str(Path(arguments.qmp).absolute())
    migration = client.retry(arguments.name, monitor, arguments.force)
    return _see_it_through(client, migration, arguments.json)


def _see_it_through(client: ControlClient, migration: dict[str, Any], as_json: bool) -> int:
    """Show how it goes on until it has ended; return the exit status."""
    name = migration["name"]
    with ReceiveProgress(sys.stderr) as progress:
        while True:
            progress.show(migration)
            if migration["state"] in ("end", "failed", "abandoned", "unreadable"):
                break
            migration = client.wait(name, _LOOK)
    if as_json:
        print_json(migration)
    if migration["state"] == "failed":
        print_error(_PROGRAM, f"{name} has failed: {migration['failure']}", _what_now(migration))
        return 1
    if migration["state"] == "unreadable":
        print_error(
            *(_PROGRAM, f"{name} cannot be gone on with: {migration['failure']}"),
            "its guest waits, and nothing of it is lost, until a daemon is started that can",
        )
        return 1
    if migration["state"] == "abandoned":
        print_error(
            *(_PROGRAM, f"{name} was abandoned: a part of its memory never came"),
            f"postcopyctl show {name} tells what is missing",
        )
        return 1
    if not as_json:
        _print_result(migration)
    return 0


def _what_now(migration: dict[str, Any]) -> str:
    if migration["guest_lost"]:
        return (
            "the guest is lost: it is not here whole, and its source, which has sent its devices, "
            "cannot take it back"
        )
    if migration["peer"] is None:
        return "the guest has not left its source"
    return (
        "the guest goes on at its source, and the QEMU here waits as before if it is still there: "
        "mend what is wrong and begin again"
    )


def _print_result(migration: dict[str, Any]) -> None:
    from rich.table import Table

    from postcopyd.cli.latencies import quantiles, show_histogram

    counters, latency = migration["counters"], migration["fault_latency"]
    table = Table(show_header=False, title=f"{printable(migration['name'])} runs here")
    table.add_row("memory", format_size(migration["length"]))
    # A daemon that was started when it had ended already knows neither.
    if (downtime := migration["downtime_seconds"]) is not None:
        table.add_row("downtime", f"{downtime * 1e3:.1f} ms")
    if (window := migration["window_seconds"]) is not None:
        table.add_row("window", f"{window:.3f} s from switchover to last page")
    asked = f"{counters['requests']} pages asked for, {counters['pages_around']} more around them"
    table.add_row("faults", f"{counters['faults']} ({asked})")
    if latency["count"]:
        table.add_row("fault latency", quantiles(latency))
        table.add_row("longest stall", f"{latency['maximum'] / 1e3:.1f} ms")
    for thread in migration["threads"]:
        table.add_row(
            f"{printable(thread['name'])} blocked",
            f"{thread['seconds'] * 1e3:.1f} ms in {thread['faults']} faults",
        )
    table.add_row("pages by fault", str(counters["pages_by_fault"]))
    table.add_row("pages by background", str(counters["pages_by_background"]))
    out = console()
    out.print(table)
    if latency["count"]:
        show_histogram(latency["buckets"], out)
