"""What `postcopyctl receive-qemu` shows while it waits: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from postcopyd.cli.sizes import format_size
from postcopyd.daemon.printable import printable

_STEPS: Final = 4
"""Lines of a state, for each equal share of the memory."""
_DOING: Final = {
    "none": "waiting for the source",
    "advise": "pre-copy",
    "discard": "switchover",
    "listening": "loading the devices",
    "running": "running, memory comes",
    "converged": "all memory is here, loading the devices",
    "paused": "paused",
    "recover": "the source is back",
    "end": "all memory is here",
    "abandoning": "abandoned: what is missing becomes a memory error",
    "abandoned": "abandoned: a part of the memory never came",
    "failed": "failed",
    "unreadable": "held as a process that was killed has left it",
}


def describe(migration: dict[str, Any]) -> str:
    """Return how it stands in one line."""
    what = _DOING[migration["state"]]
    if migration["state"] in ("advise", "running", "end"):
        what += f": {format_size(migration['received'])} of {format_size(migration['length'])}"
    if migration["counters"]["faults"]:
        what += f", {migration['counters']['faults']} faults"
    if migration["failure"] and migration["state"] == "paused":
        what += f": {migration['failure']}"
    return printable(what)


class ReceiveProgress:
    """Shows how a migration stands, for the time of a `with` block."""

    def __init__(self, output: TextIO) -> None:
        """Write to `output`."""
        self._output = output
        self._last: tuple[object, ...] = ()
        self._advised = False
        self._refused: str | None = None
        self._bar: Progress | None = None
        if output.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                console=Console(file=output),
                auto_refresh=False,
            )
            self._task = self._bar.add_task("")

    def show(self, migration: dict[str, Any]) -> None:
        """Show how it stands now."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=describe(migration),
                total=migration["length"] or 1,
                completed=migration["received"],
            )
            self._bar.refresh()
        else:
            self._write_line(migration)
        self._tell_of_refused(migration)
        self._advise(migration)

    def _write_line(self, migration: dict[str, Any]) -> None:
        step = migration["received"] * _STEPS // (migration["length"] or 1)
        now = (migration["state"], migration["failure"], step)
        if now != self._last:
            self._last = now
            print(describe(migration), file=self._output, flush=True)

    def _advise(self, migration: dict[str, Any]) -> None:
        """Say once what to do about a migration that needs somebody."""
        waits = bool(migration["waits_for_vmm"])
        if waits and not self._advised:
            kept = "the device state and all memory that has come are kept"
            retry = f"postcopyctl retry {printable(migration['name'])} --qmp OTHER"
            if migration["guest_may_have_run"]:
                self._print(
                    "The guest may have run: its QEMU had everything, and has exited without "
                    "having said so. Look at what that QEMU and the guest's disks tell: begun once "
                    f"more as it was then, it would spoil what it has written since. Here {kept}. "
                    f"If it has not run, start another QEMU for it, then:\n  {retry} --force"
                )
            else:
                self._print(f"Nothing is lost: {kept}. Start another QEMU for it, then:\n  {retry}")
        self._advised = waits

    def _tell_of_refused(self, migration: dict[str, Any]) -> None:
        """Say once who was refused: it may be the source, and its operator waits."""
        refused = migration["refused"]
        if refused and refused != self._refused:
            self._print(f"refused: {printable(refused)}")
        self._refused = refused

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            print(text, file=self._output, flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
