"""postcopyctl receive-qemu and retry, run as an operator runs them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support import ROOT

_LIMIT: Final = 60.0
"""Seconds for any one thing that the command is waited for."""


@dataclass
class Command:
    """A running postcopyctl that prints its report as JSON when it ends."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    """What it has told on its standard error so far."""

    async def address(self) -> str:
        """Where it says that it waits for the source."""
        line = await self.line_with(" waits for its source at ")
        return line.rsplit(" ", 1)[1]

    async def line_with(self, text: str) -> str:
        """The first line of its standard error with this text, from the beginning on."""
        while not (found := [line for line in self.lines if text in line]):
            assert self.process.stderr is not None
            line = await asyncio.wait_for(self.process.stderr.readline(), _LIMIT)
            assert line, f"postcopyctl has ended without {text!r}: {self.lines}"
            self.lines.append(line.decode().rstrip())
        return found[0]

    async def report(self) -> dict[str, Any]:
        """The report of a migration that has ended well."""
        status, report = await self.ended()
        assert status == 0, (report, self.lines)
        assert report is not None
        assert report["state"] == "end"
        return report

    async def ended(self) -> tuple[int, dict[str, Any] | None]:
        """Its exit status, and the report if it has printed one."""
        printed, told = await asyncio.wait_for(self.process.communicate(), _LIMIT)
        self.lines += told.decode().splitlines()
        assert self.process.returncode is not None
        return self.process.returncode, json.loads(printed) if printed else None


@contextlib.asynccontextmanager
async def postcopyctl(control: Path, *arguments: str) -> AsyncIterator[Command]:
    """Run a command of postcopyctl that takes --json, and end it at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "postcopyd.cli.postcopyctl", "--control", str(control)),
        *(*arguments, "--json"),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Command(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
