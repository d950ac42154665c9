"""postcopyctl list, show, create, wait, cancel, abandon: the migrations of a running daemon."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from postcopyd.cli.control_client import ControlClient
from postcopyd.cli.output import console, print_error, print_json
from postcopyd.cli.sizes import format_size
from postcopyd.daemon.printable import printable

_PROGRAM = "postcopyctl"
_UNREADABLE = "unreadable"
_SECURITY = {"unix": "by user", "plain": "none: plain TCP", "tls": "TLS"}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    _add(subparsers, "list", _list, "list the migrations")
    show = _add(subparsers, "show", _show, "show a migration in full")
    create = _add(subparsers, "create", _create, "create a migration, to wait for VMM and source")
    wait = _add(subparsers, "wait", _wait, "wait until a migration has ended")
    cancel = _add(subparsers, "cancel", _cancel, "end a migration, or forget one that has ended")
    abandon = _add(
        *(subparsers, "abandon", _abandon),
        "give up what has not come: the guest gets memory errors there, and keeps the rest",
    )
    for parser in (show, create, wait, cancel, abandon):
        parser.add_argument("name", metavar="NAME", help="the migration")
    create.add_argument(
        "--listen",
        default="",
        metavar="ADDRESS",
        help="where to wait for the source: tcp:IP:PORT, tcp:[IPV6]:PORT or unix:PATH "
        "(default: what the daemon is configured to)",
    )
    create.add_argument(
        "--handoff",
        default="",
        metavar="PATH",
        help="a handoff socket of its own, for a VMM that cannot name its migration",
    )
    add_allow_source(create)
    wait.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="how long to wait (default: for ever)"
    )
    cancel.add_argument(
        "--force",
        action="store_true",
        help="even if the source cannot take the guest back: the guest is lost",
    )
    abandon.add_argument(
        "--force", action="store_true", help="even if its source is connected, and may send more"
    )


def add_allow_source(parser: argparse.ArgumentParser) -> None:
    """Add the option that says whose certificates are taken; it may be given several times."""
    parser.add_argument(
        "--allow-source",
        action="append",
        default=[],
        metavar="NAME",
        help="a name in the source's TLS certificate, node7.example.org or CN=node7,O=Example, "
        "where * stands for any part; may be given more than once (default: all that the daemon "
        "is configured to allow)",
    )


def _add(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], help: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=run)
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0 to 86400")
    return seconds


def _client(arguments: argparse.Namespace) -> ControlClient:
    return ControlClient(arguments.control)


# -- the commands ----------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> int:
    migrations = _client(arguments).list()
    if arguments.json:
        print_json(migrations)
    elif not migrations:
        print("There is no migration. A VMM that hands over its memory begins one, or:")
        print("  postcopyctl create NAME")
    else:
        _print_list(migrations)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    _print_one(_client(arguments).show(arguments.name), arguments.json)
    return 0


def _create(arguments: argparse.Namespace) -> int:
    client = _client(arguments)
    migration = client.create(
        arguments.name, arguments.listen, arguments.handoff, arguments.allow_source
    )
    if arguments.json:
        print_json(migration)
    else:
        print(f"{migration['name']} waits for its source at {_listed(migration['listen'])}")
        if migration["security"] == "tls":
            print("and asks it for a certificate (TLS)")
        if migration["handoff"]:
            print(f"and for its VMM at {migration['handoff']}")
    return 0


def _wait(arguments: argparse.Namespace) -> int:
    migration = _client(arguments).wait(arguments.name, arguments.timeout)
    if arguments.json:
        print_json(migration)
    state = migration["state"]
    if state == "end":
        if not arguments.json:
            print(f"{arguments.name}: all memory is here")
        return 0
    reason = f": {migration['failure']}" if migration["failure"] else ""
    if state == "failed":
        print_error(_PROGRAM, f"{arguments.name} has failed{reason}")
    elif state == "abandoned":
        print_error(_PROGRAM, f"{arguments.name} was abandoned: {_describe_missing(migration)}")
        _tell_that_there_is_no_list(migration)
    else:
        print_error(_PROGRAM, f"{arguments.name} is still under way, in state {state}{reason}")
    return 1


def _cancel(arguments: argparse.Namespace) -> int:
    migration = _client(arguments).cancel(arguments.name, arguments.force)
    if arguments.json:
        print_json(migration)
    else:
        print(f"{arguments.name} has ended, in state {migration['state']}")
    return 0


def _abandon(arguments: argparse.Namespace) -> int:
    migration = _client(arguments).abandon(arguments.name, arguments.force)
    if arguments.json:
        print_json(migration)
    if migration["state"] != "abandoned":
        print_error(_PROGRAM, f"{arguments.name} has failed: {migration['failure']}")
        return 1
    if not arguments.json:
        print(f"{arguments.name} is abandoned: {_describe_missing(migration)}")
        if migration["missing_list"]:
            print(f"They are listed in {migration['missing_list']}")
    return _tell_that_there_is_no_list(migration)


def _tell_that_there_is_no_list(migration: dict[str, Any]) -> int:
    """Tell why a list of what is missing is not there, if so; return the exit status."""
    if not migration["missing_list_failure"]:
        return 0
    print_error(
        _PROGRAM,
        f"the list of what is missing is not written: {migration['missing_list_failure']}",
        f"the guest does not wait for it; postcopyctl show {migration['name']} tells how it stands",
    )
    return 1


# -- tables ----------------------------------------------------------------------------------


def _print_list(migrations: Iterable[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("NAME", "STATE", "RECEIVED", "FAULTS", "VMM", "SOURCE"):
        right = title in ("RECEIVED", "FAULTS")
        table.add_column(title, justify="right" if right else "left", no_wrap=title == "NAME")
    for migration in migrations:
        if migration["state"] == _UNREADABLE:
            table.add_row(printable(migration["name"]), _UNREADABLE)
            continue
        source = migration["peer"] or f"(waited for at {_listed(migration['listen'])})"
        cells = (
            migration["name"],
            migration["state"],
            f"{format_size(migration['received'])} of {format_size(migration['length'])}",
            str(migration["counters"]["faults"]),
            migration["vmm"] or "(waited for)",
            source,
        )
        table.add_row(*map(printable, cells))
    console().print(table, markup=False)


def _print_one(migration: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(migration)
        return
    from rich.table import Table

    facts = Table(box=None, pad_edge=False, show_header=False)
    for title, value in _facts(migration):
        facts.add_row(title, printable(value))
    out = console()
    out.print(facts, markup=False)
    if migration["blocks"]:
        blocks = Table(box=None, pad_edge=False)
        for title in ("BLOCK", "LENGTH", "PAGE SIZE", "PAGES", "RECEIVED"):
            blocks.add_column(title, justify="left" if title == "BLOCK" else "right")
        for block in migration["blocks"]:
            sizes = (format_size(block["length"]), format_size(block["page_size"]))
            blocks.add_row(
                printable(block["name"]), *sizes, str(block["pages"]), str(block["received"])
            )
        out.print()
        out.print(blocks, markup=False)


def _facts(migration: dict[str, Any]) -> Iterable[tuple[str, str]]:
    counters, latency = migration["counters"], migration["fault_latency"]
    yield "name", migration["name"]
    yield "state", migration["state"]
    if migration["failure"]:
        yield "reason", migration["failure"]
    if migration["state"] == _UNREADABLE:
        yield "guest", "waits, until a version is started that can read what was left of it"
        return
    if migration["network"]:
        yield "network", migration["network"]
    yield "VMM", migration["vmm"] or "waited for"
    if migration["handoff"]:
        yield "handoff", migration["handoff"]
    yield "source", migration["peer"] or "waited for"
    yield "listens on", _listed(migration["listen"])
    yield "security", _SECURITY[migration["security"]]
    if migration["allowed_sources"]:
        yield "may be source", "  ".join(migration["allowed_sources"])
    if migration["refused"]:
        yield "refused last", migration["refused"]
    if migration["machine"]:
        yield "machine", migration["machine"]
    if migration["state"] == "abandoned":
        yield "missing", _describe_missing(migration)
    if migration["missing_list"]:
        yield "listed in", migration["missing_list"]
    if migration["missing_list_failure"]:
        yield "not listed", migration["missing_list_failure"]
    yield "received", f"{format_size(migration['received'])} of {format_size(migration['length'])}"
    yield "stream", format_size(migration["bytes_received"])
    yield (
        "faults",
        f"{counters['faults']}, {counters['requests']} pages asked for, "
        f"{migration['outstanding']} waited for now",
    )
    if latency["count"]:
        yield (
            "fault latency",
            f"p50 {latency['p50']:.0f} us, p99 {latency['p99']:.0f} us, "
            f"longest {latency['maximum']:.0f} us",
        )
    yield (
        "pages placed",
        f"{counters['pages_by_fault']} by fault, {counters['pages_by_background']} by background, "
        f"{counters['pages_zero']} of them zero",
    )
    if migration["downtime_seconds"] is not None:
        yield "downtime", f"{migration['downtime_seconds'] * 1e3:.1f} ms from switchover to running"
    if migration["window_seconds"] is not None:
        yield "all memory", f"{migration['window_seconds']:.3f} s after the switchover"


def _describe_missing(migration: dict[str, Any]) -> str:
    size, ranges = format_size(migration["missing_length"]), migration["missing_ranges"]
    return f"{size} in {ranges} range{'' if ranges == 1 else 's'} never came, and are memory errors"


def _listed(addresses: Iterable[str]) -> str:
    return ", ".join(addresses)
