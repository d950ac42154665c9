"""The README's way to move a QEMU VM, followed to the letter; only paths and ports are others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

from tests.daemon.daemon_process import RunningDaemon
from tests.support import LIMIT, ROOT

PIPE = asyncio.subprocess.PIPE


def blocks(title: str) -> list[str]:
    """The code blocks of a section of the README."""
    section = (ROOT / "README.md").read_text().partition(f"\n### {title}\n")[2]
    section = section.partition("\n### ")[0]
    return [
        textwrap.dedent(block)
        for block in re.findall(r"^ *```\w*\n(.*?)^ *```$", section, re.MULTILINE | re.DOTALL)
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.asynccontextmanager
async def shell(command: str, daemon: RunningDaemon) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a command as a reader pastes it; end it at the end."""
    process = await asyncio.create_subprocess_shell(
        f"exec {command}",
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "POSTCOPYD_CONTROL": str(daemon.control),
        },
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_moving_a_qemu_vm_works_as_the_readme_says(
    daemon: RunningDaemon, tmp_path: Path
) -> None:
    port = str(free_port())
    source_command, destination_command, receive_command, monitor = (
        block.replace("/tmp/vm0.qmp", f"{tmp_path}/vm0.qmp").replace("7601", port)
        for block in blocks("Move a QEMU VM")
    )
    async with (
        shell(source_command, daemon) as source,
        shell(destination_command, daemon) as destination,
    ):
        async with asyncio.timeout(LIMIT):
            while not (tmp_path / "vm0.qmp").exists():
                assert destination.returncode is None
                await asyncio.sleep(0)
        async with shell(receive_command, daemon) as receiving, asyncio.timeout(3 * LIMIT):
            assert receiving.stderr is not None
            assert b"waits for its source" in await receiving.stderr.readline()
            assert source.stdin is not None
            source.stdin.write(monitor.encode())
            printed, told = await receiving.communicate()
            assert receiving.returncode == 0, told.decode()
            assert "vm0 runs here" in printed.decode()
        assert destination.returncode is None
