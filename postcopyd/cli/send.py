"""`postcopyctl send`: serve a memory image to a destination as a QEMU source would."""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop
from rich.console import Console

from postcopyd.cli import send_tls
from postcopyd.cli.send_progress import ProgressBar, ProgressLines
from postcopyd.cli.sizes import format_size, parse_size
from postcopyd.outgoing.connecting import connect, way_back
from postcopyd.outgoing.connection import LONGEST_BREAK, SHORTEST_BREAK, ConnectionLost
from postcopyd.outgoing.image import BlockFile, ImageError, MemoryImage
from postcopyd.outgoing.report import Report
from postcopyd.outgoing.source import MigrationFailed, OutgoingMigration, Settings
from postcopyd.outgoing.tls import Tls
from postcopyd.wire.address import Address
from postcopyd.wire.device_state import wrap_device_state
from postcopyd.wire.stream_format import SMALLEST_HOST_PAGE

_DONE: Final = 0
_FAILED: Final = 1
_WRONG_USAGE: Final = 2
_BLOCK_OPTIONS: Final = ("offset", "length", "page-size")
_T = TypeVar("_T")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `send`; its `func` takes the namespace and returns the exit status."""
    parser = subparsers.add_parser(
        "send",
        help="send a memory image as a QEMU source would",
        description="Send a memory image to a post-copy destination, as a QEMU source would. "
        "Sizes take K, M, G and T. Exit status: 0 done, 1 failed, 2 wrong usage.",
    )
    parser.set_defaults(func=run)
    parser.add_argument(
        "--to",
        required=True,
        type=_argument(Address.parse),
        metavar="ADDRESS",
        help="where the destination listens: tcp:HOST:PORT or unix:PATH",
    )
    send_tls.register(parser)
    parser.add_argument(
        "--block",
        required=True,
        action="append",
        type=_argument(parse_block),
        metavar="NAME=FILE[,offset=N][,length=N][,page-size=N]",
        help="a RAM block and the file with its contents (a comma in FILE is written twice); "
        "may be given more than once",
    )
    parser.add_argument(
        "--device-state",
        type=Path,
        metavar="FILE",
        help="what the VMM is given when it is to run: QEMU device sections, or bytes of its own",
    )
    parser.add_argument(
        "--machine",
        default=Settings().machine,
        metavar="NAME",
        help="machine type name in the stream (default: %(default)s)",
    )
    parser.add_argument(
        "--precopy-passes",
        type=_argument(_count),
        default=0,
        metavar="N",
        help="passes over the memory before the switchover (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bandwidth",
        type=_argument(_bandwidth),
        metavar="SIZE",
        help="bytes a second; pages that the destination asks for are not held back",
    )
    parser.add_argument(
        "--break-after",
        type=_argument(_break_after),
        default=Settings().break_after,
        metavar="SECONDS",
        help="without an answer from the destination's host, before the connection counts as "
        "broken (default: %(default)g)",
    )
    parser.add_argument(
        "--retry-for",
        type=_argument(_seconds),
        metavar="SECONDS",
        help="how long to try to come back after a break, 0 not to (default: for ever once the "
        "destination may have the guest, 60 before that)",
    )
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def parse_block(text: str) -> BlockFile:
    """Return the block that an argument of --block describes.

    :raise ValueError: if it does not describe one.
    """
    name, equals, rest = text.partition("=")
    path, *options = (part.replace("\0", ",") for part in rest.replace(",,", "\0").split(","))
    if not (name and equals and path):
        raise ValueError(f"{text!r} is not a block: write NAME=FILE")
    sizes: dict[str, int] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in _BLOCK_OPTIONS or key in sizes:
            how = "given twice" if key in sizes else "not one of " + ", ".join(_BLOCK_OPTIONS)
            raise ValueError(f"option {key!r} of block {name!r} is {how}")
        try:
            sizes[key] = parse_size(value)
        except ValueError as error:
            raise ValueError(f"{key} of block {name!r}: {error}") from None
    return BlockFile(
        name,
        Path(path),
        offset=sizes.get("offset", 0),
        length=sizes.get("length"),
        page_size=sizes.get("page-size", SMALLEST_HOST_PAGE),
    )


def run(arguments: argparse.Namespace) -> int:
    """Migrate; return the exit status. Progress and errors go to stderr, the summary to stdout."""
    migration: OutgoingMigration | None = None
    progress = _progress(quiet=arguments.quiet)
    failure: str | None = None
    try:
        tls = send_tls.from_arguments(arguments)
        with MemoryImage(arguments.block) as image:
            state = arguments.device_state
            migration = OutgoingMigration(
                image,
                wrap_device_state(state.read_bytes()) if state else b"",
                Settings(
                    arguments.machine,
                    arguments.precopy_passes,
                    arguments.max_bandwidth,
                    arguments.break_after,
                    arguments.retry_for,
                ),
                progress=progress,
            )
            gc.collect()
            gc.freeze()  # no collection of what stays anyway while a page is waited for
            uvloop.run(_migrate(migration, arguments.to, tls))
    except send_tls.WrongUsage as error:
        print(f"postcopyctl send: {error}", file=sys.stderr)
        return _WRONG_USAGE
    except (ImageError, MigrationFailed, ConnectionLost, ValueError) as error:
        failure = str(error)
    except OSError as error:
        failure = migration.report().failure if migration is not None else None
        failure = failure or f"{error.filename or 'the memory image'}: {error.strerror or error}"
    except KeyboardInterrupt:
        failure = "interrupted"
    finally:
        if progress is not None:
            with suppress(OSError):  # who looked at it may have gone
                progress.close()
    report = migration.report() if migration is not None else None
    if failure == "interrupted" and report is not None and report.failure is not None:
        failure = f"interrupted: {report.failure}"
    if arguments.json:
        print(json.dumps(_summary(report, failure)))
    if failure is not None:
        with suppress(OSError):
            print(f"postcopyctl send: {failure}", file=sys.stderr)
        return _FAILED
    if not arguments.json and not arguments.quiet and report is not None:
        print(_last_words(report))
    return _DONE


async def _migrate(migration: OutgoingMigration, address: Address, tls: Tls | None) -> None:
    connection = await connect(address)
    secure = tls.secure if tls is not None else None
    await migration.run(connection, way_back(connection, address), secure)


def _progress(*, quiet: bool) -> ProgressBar | ProgressLines | None:
    if quiet:
        return None
    console = Console(stderr=True)
    return ProgressBar(console) if console.is_terminal else ProgressLines(sys.stderr)


def _summary(report: Report | None, failure: str | None) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "completed": failure is None,
        "failure": failure,
    }
    if report is not None:
        summary |= {
            "seconds": report.seconds,
            "switchover_seconds": report.switchover_seconds,
            "bytes": report.bytes_sent,
            "pages": report.pages,
            "zero_pages": report.zero_pages,
            "precopy_passes": report.precopy_passes,
            "postcopy_bytes": report.postcopy_bytes,
            "requests": report.requests,
            "requests_answered": report.requests_answered,
            "reconnects": report.reconnects,
            "pages_again": report.pages_again,
        }
    return summary


def _last_words(report: Report) -> str:
    rate = format_size(report.bytes_sent / max(report.seconds, 1e-9))
    breaks = ""
    if report.reconnects:
        breaks = f", {report.reconnects} reconnects, {report.pages_again} pages again"
    return (
        f"sent {format_size(report.bytes_sent)} in {report.seconds:.2f} s ({rate}/s): "
        f"{report.pages} pages, {report.zero_pages} zero pages, "
        f"{report.requests_answered} requests answered, "
        f"switchover {report.switchover_seconds or 0.0:.3f} s{breaks}"
    )


# -- arguments -----------------------------------------------------------------------------------


def _argument(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """Have argparse print what a ValueError says, and not only that there was one."""

    def checked(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{text!r} is not a number of seconds")
    return seconds


def _break_after(text: str) -> float:
    seconds = _seconds(text)
    if not SHORTEST_BREAK <= seconds <= LONGEST_BREAK:
        raise ValueError(
            f"a break after {text} s: {SHORTEST_BREAK:g} to {LONGEST_BREAK:g} are possible"
        )
    return seconds


def _bandwidth(text: str) -> int:
    rate = parse_size(text)
    if rate < 1:
        raise ValueError(f"a bandwidth of {text} sends nothing")
    return rate
