"""What a whole migration takes beside the daemon: a guest that runs, an image that is sent."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from postcopyd.wire import stream_writer
from tests.support import LIMIT, ROOT

PAGE = 4096
LENGTHS = {"pc.ram": 8 << 20, "pc.rom": 64 << 10}
DEVICE_STATE = stream_writer.device_section(7, "timer", b"device state")


class Daemon(Protocol):
    """One that VMMs come to."""

    directory: Path
    """Where a VMM may leave what it has to tell."""
    handoff: Path

    @property
    def beside(self) -> tuple[str, ...]:
        """A command that starts another one where VMMs of the daemon run."""


class Guest:
    """A VMM in a process of its own whose threads read all its memory while it arrives."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process = process
        self.directory = directory

    def says(self) -> dict[str, Any]:
        """The next thing that it tells."""
        assert self.process.stdout is not None
        word: dict[str, Any] = json.loads(self.process.stdout.readline())
        return word

    def memory(self) -> dict[str, bytes]:
        """What its blocks hold at the end."""
        return {
            name: (self.directory / f"block-{number}").read_bytes()
            for number, name in enumerate(LENGTHS)
        }

    def device_state(self) -> bytes:
        """What it was given to load."""
        return (self.directory / "device-state").read_bytes()


@contextmanager
def running_guest(
    daemon: Daemon,
    name: str,
    kind: str,
    program: str = "tests.interop.stand_in_vmm",
    *options: str,
) -> Iterator[Guest]:
    """Start a VMM, which hands over by itself; `options` are those of its program."""
    directory = daemon.directory / f"guest-{name}"
    directory.mkdir()
    with subprocess.Popen(
        [
            *(*daemon.beside, sys.executable, "-m", program, *options),
            *(str(daemon.handoff), name, kind, str(directory)),
            *(f"{block}={length}" for block, length in LENGTHS.items()),
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Guest(process, directory)
        finally:
            process.kill()


class Image:
    """A memory image: random pages, every fourth a hole, and a device state."""

    def __init__(self, directory: Path, seed: int) -> None:
        directory.mkdir()
        self.directory = directory
        """With one file of each block's name, and ``state``."""
        numbers = random.Random(seed)
        self.memory: dict[str, bytes] = {}
        self._options = ["--device-state", str(directory / "state")]
        (directory / "state").write_bytes(DEVICE_STATE)
        for name, length in LENGTHS.items():
            content = b"".join(
                bytes(PAGE) if page % 4 == 3 else numbers.randbytes(PAGE)
                for page in range(length // PAGE)
            )
            (directory / name).write_bytes(content)
            self.memory[name] = content
            self._options += ["--block", f"{name}={directory / name}"]

    def start_sending(
        self, address: str, *options: str, wrapper: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        """Run ``postcopyctl send``; `wrapper` is a command that is to start it."""
        return subprocess.Popen(
            [
                *wrapper,
                *(sys.executable, "-m", "postcopyd.cli.postcopyctl", "send", "--json", "--quiet"),
                *("--to", address, *self._options, *options),
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def assert_sent(source: subprocess.Popen[str], within: float = LIMIT) -> None:
    output, errors = source.communicate(timeout=within)
    assert source.returncode == 0, errors
    assert json.loads(output)["completed"]
