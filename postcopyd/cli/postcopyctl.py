"""postcopyctl: asks a running daemon, checks this host, sends a memory image."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from postcopyd import __version__
from postcopyd.cli.control_client import ControlError
from postcopyd.cli.output import print_error
from postcopyd.daemon import paths

_PROGRAM: Final = "postcopyctl"

# Where each command lives. Only the module of the one that is asked for is imported: most commands
# are to answer at once, and some need much.
MODULES: Final = {
    "check": "postcopyd.cli.check",
    "list": "postcopyd.cli.migrations",
    "show": "postcopyd.cli.migrations",
    "create": "postcopyd.cli.migrations",
    "wait": "postcopyd.cli.migrations",
    "cancel": "postcopyd.cli.migrations",
    "abandon": "postcopyd.cli.migrations",
    "receive-qemu": "postcopyd.cli.receive_qemu",
    "retry": "postcopyd.cli.receive_qemu",
    "send": "postcopyd.cli.send",
    "demo": "postcopyd.cli.demo",
}

FAILED: Final = 1
REFUSED: Final = 3
UNREACHABLE: Final = 4
INTERRUPTED: Final = 130

_EPILOG: Final = """\
exit status: 0 done, 1 failed, 2 wrong usage, 3 no such migration or refused, 4 the daemon cannot be
reached. See postcopyctl(1)."""

_STATUSES: Final = {
    "unreachable": UNREACHABLE,
    "internal-error": FAILED,
    "check-failed": FAILED,
    "out-of-resources": FAILED,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status.

    :param words: the command line behind the program's name; None for that of this process.
    """
    arguments = _parse(sys.argv[1:] if words is None else words)
    try:
        status: int = arguments.func(arguments)
        sys.stdout.flush()
        return status
    except ControlError as error:
        print_error(_PROGRAM, error.message, error.hint)
        return _STATUSES.get(error.code, REFUSED)
    except BrokenPipeError:
        # Who read our output has enough of it. What Python flushes at the end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        print_error(_PROGRAM, str(error))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _parse(words: Sequence[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(prog=_PROGRAM, add_help=False, allow_abbrev=False)
    common.add_argument(
        "--control",
        default=os.environ.get("POSTCOPYD_CONTROL") or paths.CONTROL,
        metavar="PATH",
        help="the daemon's control socket (default: $POSTCOPYD_CONTROL, or %(default)s)",
    )
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Ask and direct postcopyd, the post-copy destination.",
        epilog=_EPILOG,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in _modules_for(words, common):
        importlib.import_module(module).register(subparsers)
    return parser.parse_args(words)


def _modules_for(words: Sequence[str], common: argparse.ArgumentParser) -> Sequence[str]:
    """Return the module of the command that is asked for, or all if it is not known which."""
    _, rest = common.parse_known_args(words)
    command = rest[0] if rest else ""
    if command in MODULES:
        return (MODULES[command],)
    return tuple(dict.fromkeys(MODULES.values()))


if __name__ == "__main__":
    sys.exit(main())
