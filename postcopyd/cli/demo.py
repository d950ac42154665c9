"""postcopyctl demo: the main job, with three real processes, in one command.

A daemon, a source (`postcopyctl send`) and a VMM (`demo_vmm.py`) are started; the VMM runs before
its memory has come and compares every page with what the source holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import uvloop
from rich.console import Console

from postcopyd.cli import demo_result
from postcopyd.cli.control_client import ControlClient, ControlError
from postcopyd.cli.demo_image import make_image
from postcopyd.cli.progress import Progress
from postcopyd.cli.sizes import parse_size

_NAME = "demo"
_STARTS_WITHIN = 30.0
_ENDS_WITHIN = 600.0
_POLL = 0.1
_SMALL_BLOCK = 256 << 10

_CONFIGURATION = """\
control = "{directory}/control.sock"
handoff = "{directory}/handoff.sock"
"""


class DemoFailed(Exception):
    """A process of the demo did not do its part; the text says which and why."""


@dataclass(slots=True)
class Child:
    """A process of the demo."""

    name: str
    process: asyncio.subprocess.Process
    errors: Path

    async def line(self) -> dict[str, Any]:
        """Return the next object that it tells.

        :raise DemoFailed: if it ends instead.
        """
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            await self.process.wait()
            raise DemoFailed(
                f"the {self.name} ended with status {self.process.returncode}:\n"
                f"{self.errors.read_text(errors='replace').strip()}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="migrate a small guest on this machine, and check every byte of it",
        description=(
            "Start a daemon, a source and a VMM, migrate the VMM's memory while it walks it at "
            "random, and check every page of it."
        ),
    )
    parser.add_argument(
        "--size", type=parse_size, default=256 << 20, help="size of the guest (default: 256M)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo. Exit status 0 only if all memory was verified."""
    if arguments.size < 1 << 20 or arguments.size % 4096:
        print("postcopyctl demo: --size must be at least 1M and whole pages", file=sys.stderr)
        return 2
    try:
        result = uvloop.run(_demo(arguments.size))
    except (DemoFailed, OSError, TimeoutError, ControlError) as error:
        print(f"postcopyctl demo: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result.as_json()))
    else:
        demo_result.show(result, Console())
    return 0 if result.verified else 1


async def _demo(size: int) -> demo_result.DemoResult:
    with tempfile.TemporaryDirectory(prefix="postcopyd-demo-") as name:
        directory = Path(name)
        images = {"pc.ram": directory / "pc.ram", "pc.rom": directory / "pc.rom"}
        state = directory / "device-state"
        state.write_bytes(hashlib.sha256(b"device state").digest() * 64)
        with Progress("Preparing the source's memory", size) as progress:
            make_image(images["pc.ram"], size, progress.update)
            make_image(images["pc.rom"], _SMALL_BLOCK)
        async with asyncio.timeout(_ENDS_WITHIN), _daemon(directory) as client:
            return await _migrate(directory, images, state, client)


@contextlib.asynccontextmanager
async def _daemon(directory: Path) -> AsyncIterator[ControlClient]:
    """Run a daemon until the block is left; it is up when the block is entered."""
    configuration = directory / "postcopyd.toml"
    configuration.write_text(_CONFIGURATION.format(directory=directory))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.setblocking(False)
        notify.bind(str(directory / "notify.sock"))
        child = await _start(
            directory,
            "daemon",
            ["postcopyd.cli.postcopyd", "serve", "--config", str(configuration)],
            NOTIFY_SOCKET=str(directory / "notify.sock"),
        )
        async with _ended(child, "TERM"):
            await _wait_until_ready(notify, child)
            notify.close()  # what it says from here on is not waited for
            yield ControlClient(str(directory / "control.sock"))


async def _wait_until_ready(notify: socket.socket, daemon: Child) -> None:
    loop = asyncio.get_running_loop()
    exits = asyncio.ensure_future(daemon.line())
    try:
        async with asyncio.timeout(_STARTS_WITHIN):
            while True:
                told = asyncio.ensure_future(loop.sock_recv(notify, 4096))
                await asyncio.wait({told, exits}, return_when=asyncio.FIRST_COMPLETED)
                if exits.done():
                    told.cancel()
                    exits.result()
                if b"READY=1" in told.result().split(b"\n"):
                    return
    finally:
        exits.cancel()
        with contextlib.suppress(asyncio.CancelledError, DemoFailed):
            await exits


async def _start(directory: Path, name: str, module: list[str], **environment: str) -> Child:
    errors = directory / f"{name}.log"
    with errors.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *module,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, **environment},
        )
    return Child(name, process, errors)


@contextlib.asynccontextmanager
async def _ended(child: Child, signal_name: str = "KILL") -> AsyncIterator[Child]:
    """See to it that `child` has ended when the block is left."""
    try:
        yield child
    finally:
        if child.process.returncode is None:
            if signal_name == "TERM":
                child.process.terminate()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STARTS_WITHIN):
                        await child.process.wait()
            if child.process.returncode is None:
                child.process.kill()
                await child.process.wait()


async def _migrate(
    directory: Path, images: dict[str, Path], state: Path, client: ControlClient
) -> demo_result.DemoResult:
    started = perf_counter()
    blocks = [f"{name}={path}" for name, path in images.items()]
    vmm = await _start(
        directory,
        "VMM",
        ["postcopyd.cli.demo_vmm", str(directory / "handoff.sock"), _NAME, *blocks],
    )
    async with _ended(vmm):
        listen = (await vmm.line())["listen"][0]
        source = await _start(
            directory,
            "source",
            [
                "postcopyd.cli.postcopyctl",
                "send",
                "--json",
                "--quiet",
                "--to",
                listen,
                "--device-state",
                str(state),
                *(word for block in blocks for word in ("--block", block)),
            ],
        )
        async with _ended(source):
            told = asyncio.ensure_future(vmm.line())
            sent = asyncio.ensure_future(source.line())
            length = sum(path.stat().st_size for path in images.values())
            with Progress("Migrating", length) as progress:
                while not told.done():
                    await asyncio.wait({told, sent}, timeout=_POLL)
                    if sent.done():
                        sent.result()  # a source that could not send is the end of it
                    report = await asyncio.to_thread(client.show, _NAME)
                    progress.update(report["received"], f"{report['counters']['faults']} faults")
            guest, source_told = await told, await sent
            seconds = perf_counter() - started
            if "failed" in guest:
                raise DemoFailed(f"the migration failed: {guest['failed']}")
            report = await asyncio.to_thread(client.show, _NAME)
    return demo_result.DemoResult(
        report=report,
        guest=guest,
        source=source_told,
        seconds=seconds,
        expected={name: _sha256(path) for name, path in images.items()},
        device_state=_sha256(state),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
