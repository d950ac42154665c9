"""postcopyctl check: can post-copy run on this host, and what to do if not."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from postcopyd.cli.output import console, print_json


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
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
        print_json(asdict(report))
    else:
        _print(report)
    return 0 if report.can_postcopy else 1
