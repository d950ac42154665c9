"""postcopyctl check: can post-copy run on this host, and what to do if not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import msgspec

from postcopyd.cli.output import console, print_json

if TYPE_CHECKING:
    from postcopyd.incoming.host_check import HostReport


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "check",
        help="tell whether post-copy can run on this host, and what to do if not",
        description=(
            "Try on real memory, as the user who runs this, everything that post-copy needs of "
            "this host. Exit status 0 if post-copy can run."
        ),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the host, without a daemon."""
    from postcopyd.incoming.host_check import check_host

    report = check_host()
    if arguments.json:
        print_json(msgspec.to_builtins(report))
    else:
        print_report(report)
    return 0 if report.can_postcopy else 1


def print_report(report: HostReport) -> None:
    """Print what was found as a table, then what to do, then the verdict."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("", "CHECK", "WHY IT MATTERS", "FOUND"):
        table.add_column(title, no_wrap=title in ("", "CHECK"))
    for finding in report.findings:
        style = "green" if finding.available else "bold red" if finding.required else "yellow"
        answer = Text("yes" if finding.available else "no", style)
        table.add_row(answer, finding.title, finding.why, finding.detail)
    out = console()
    out.print(table, markup=False)
    for finding in report.findings:
        if not finding.available:
            need = "needed" if finding.required else "not needed by every guest"
            out.print()
            out.print(f"{finding.title} ({need}): no", style="bold", markup=False)
            out.print(f"  {finding.remedy}", markup=False)
    missing = sum(finding.required and not finding.available for finding in report.findings)
    out.print()
    if report.can_postcopy:
        out.print("Post-copy can run on this host.", style="bold green")
    else:
        things = "1 thing that it needs is" if missing == 1 else f"{missing} things it needs are"
        out.print(f"Post-copy cannot run on this host: {things} missing.", style="bold red")
