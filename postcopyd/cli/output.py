"""How the commands print: tables for people, JSON for programs, errors that say what to do."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

from postcopyd.daemon.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

_WIDE: Final = 1000


def print_json(value: Any) -> None:
    """Print one JSON value, indented."""
    print(json.dumps(value, indent=2))


def print_error(program: str, message: str, hint: str = "") -> None:
    """Print what is wrong, and beneath it what to do, on standard error."""
    print(f"{program}: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"  {printable(hint)}", file=sys.stderr)


def console() -> Console:
    """Return where tables are printed. Only a terminal has an edge at which to wrap."""
    # Imported here, because JSON and errors do without it and it takes its time.
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
