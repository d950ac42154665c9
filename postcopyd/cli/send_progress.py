"""What `postcopyctl send` shows while it runs: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from typing import Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from postcopyd.cli.sizes import format_size
from postcopyd.outgoing.report import Phase, Report

_STEPS: Final = 4
"""Lines of a phase, for each equal share of its memory."""
_DOING: Final = {
    Phase.SETUP: "connected",
    Phase.PRECOPY: "pre-copy",
    Phase.SWITCHOVER: "switchover",
    Phase.POSTCOPY: "post-copy",
    Phase.CLOSING: "waiting for the destination",
    Phase.RECONNECTING: "connected again, asking what has arrived",
    Phase.COMPLETED: "completed",
    Phase.FAILED: "failed",
}


def describe(report: Report) -> str:
    """Return where a migration stands, in one line."""
    if report.retry_seconds is not None:
        return f"{report.broken}; trying to come back {_when(report.retry_seconds)}"
    what = _DOING[report.phase]
    if report.phase is Phase.PRECOPY:
        what += f" pass {report.precopy_passes + 1}"
    if report.phase_total:
        what += f": {format_size(report.phase_bytes)} of {format_size(report.phase_total)}"
    if report.phase in (Phase.POSTCOPY, Phase.CLOSING, Phase.COMPLETED):
        what += f", {report.requests_answered} requests answered"
    return what


def _when(seconds: float) -> str:
    return f"in {seconds:.2f} s" if seconds else "at once"


class ProgressLines:
    """Writes a line for each phase and a few in between. Call it with each report."""

    def __init__(self, output: TextIO) -> None:
        """Write to `output`."""
        self._output = output
        self._last: tuple[object, ...] = ()

    def __call__(self, report: Report) -> None:
        """Write a line if enough has changed since the last one."""
        step = report.phase_bytes * _STEPS // report.phase_total if report.phase_total else 0
        # Many tries may meet the same: one line tells of them all.
        trying = report.retry_seconds is not None
        now = (report.phase, report.precopy_passes, step, report.broken, trying)
        if now != self._last:
            self._last = now
            print(describe(report), file=self._output, flush=True)

    def close(self) -> None:
        """Nothing is left to be done."""


class ProgressBar:
    """Draws one bar that starts anew with each phase. Call it with each report."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        # Redrawn with each report and not by rich's thread, which would compete for the
        # interpreter with the answers to page requests.
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), console=console, auto_refresh=False
        )
        self._task: TaskID | None = None

    def __call__(self, report: Report) -> None:
        """Redraw."""
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("")
        self._progress.update(
            self._task,
            description=describe(report),
            total=report.phase_total or 1,
            completed=report.phase_bytes if report.phase_total else 1,
        )
        self._progress.refresh()

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()
