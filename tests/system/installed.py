"""postcopyd on a machine with systemd, installed there as the README tells an operator to."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from postcopyd.cli.control_client import ControlClient
from tests.interop.test_readme import blocks
from tests.support import wait_until
from tests.system.machine import INSIDE, WHEELS, Machine

UNIT: Final = "postcopyd.service"
PACKAGE: Final = Path("/opt/postcopyd/lib/python3.11/site-packages/postcopyd")
_INSTALL_LIMIT: Final = 100.0
"""Seconds: pip builds the project and unpacks what it needs."""


def install(machine: Machine) -> Installed:
    """Install it, but for the drop-in that is not for everybody."""
    commands, _ = blocks("Install")
    wanted = [line for line in commands.splitlines() if "adopt-qemu.conf" not in line]
    _carry_out(machine, "\n".join(wanted))
    return Installed(machine)


def upgrade(machine: Machine) -> None:
    """Install it beside itself, and have the service go on with that."""
    _, commands = blocks("Install")
    _carry_out(machine, commands)


def _carry_out(machine: Machine, commands: str) -> None:
    """Do what the README says, without a network."""
    script = f"set -eu\ncd {INSIDE}\n{commands}"
    environment = ("env", "PIP_NO_INDEX=1", f"PIP_FIND_LINKS={WHEELS}")
    machine.run(*environment, "sh", "-c", script, within=_INSTALL_LIMIT)


class Installed:
    """The service. Its sockets are reached from outside, through the machine's files."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.directory = Path()
        """Where VMMs may leave what they have to tell."""
        self.handoff = machine.root / "run/postcopyd/handoff.sock"
        self.client = ControlClient(str(machine.root / "run/postcopyd/control.sock"))

    def wait_for_source(self, name: str) -> str:
        """Create a migration; return the address at which a source comes to it from outside."""
        path = f"run/postcopyd/{name}.sock"
        self.client.create(name, f"unix:/{path}")
        return f"unix:{self.machine.root / path}"

    def directory_of_qemu(self) -> Path:
        """Make a directory in which the service finds QMP sockets, and return it from outside."""
        directory = self.machine.root / "run/postcopyd/qemu"
        directory.mkdir(exist_ok=True)
        return directory

    def may_ask(self, monitor: Path) -> str:
        """Let the service's user use a QMP socket; return its path there."""
        there = f"/{monitor.relative_to(self.machine.root)}"
        self.machine.run("chown", "postcopyd", there)
        return there

    @property
    def beside(self) -> tuple[str, ...]:
        return self.machine.beside

    def systemctl(self, *words: str) -> str:
        """Run systemctl; it must not fail."""
        return self.machine.run("systemctl", *words)

    def told(self, name: str) -> str:
        """What systemd knows of the service by that name (systemctl(1), show)."""
        return self.systemctl("show", "--value", f"--property={name}", UNIT).strip()

    @property
    def supervisor(self) -> int:
        """Its main process, as the machine numbers it, once there is one."""
        wait_until(lambda: self.told("MainPID") != "0")
        return int(self.told("MainPID"))

    @property
    def processes(self) -> list[int]:
        """All its processes, as the machine numbers them."""
        group = self.told("ControlGroup")
        listed = self.machine.run("systemd-cgls", "--no-pager", "--unit", UNIT)
        return [int(number) for number in re.findall(r"[─-](\d+) ", listed)] if group else []

    @property
    def worker(self) -> int:
        """The worker that takes connections, as the machine numbers it."""
        found: list[int] = []

        def look() -> bool:
            looking = "for p; do grep -qx postcopyd-0 /proc/$p/comm && echo $p; done"
            others = [str(process) for process in self.processes if process != self.supervisor]
            printed = self.machine.try_to_run("sh", "-c", looking, "sh", *others).stdout
            found[:] = [int(word) for word in printed.split()]
            return len(found) == 1

        wait_until(look)
        return found[0]

    @property
    def stored(self) -> int:
        """How many descriptors systemd keeps for it."""
        return int(self.told("NFileDescriptorStore"))

    def kill(self, process: int, signal: str = "KILL") -> None:
        """Send a signal to one of its processes: by default end it as the kernel would."""
        self.machine.run("sh", "-c", f"kill -{signal} {process}")

    def log(self, *matches: str) -> list[dict[str, Any]]:
        """Its entries in the journal, of those that match (journalctl(1))."""
        self.machine.run("journalctl", "--sync")
        lines = self.machine.run("journalctl", "--output=json", f"--unit={UNIT}", *matches)
        return [json.loads(line) for line in lines.splitlines()]

    def edit(self, file: Path, before: str, after: str) -> None:
        """Change a file of the installed package."""
        there = self.machine.root / PACKAGE.relative_to("/") / file
        text = there.read_text()
        assert before in text, shlex.quote(before)
        there.write_text(text.replace(before, after))

    @contextmanager
    def set_to(self, *settings: str) -> Iterator[None]:
        """Have it run with other settings in the section [Service] of its unit."""
        directory = self.machine.root / f"run/systemd/system/{UNIT}.d"
        directory.mkdir(parents=True)
        (directory / "set.conf").write_text("\n".join(["[Service]", *settings, ""]))
        try:
            self._take_settings()
            yield
        finally:
            shutil.rmtree(directory)
            self._take_settings()

    def _take_settings(self) -> None:
        self.systemctl("daemon-reload")
        self.systemctl("restart", UNIT)

    def wait_until_active(self) -> None:
        """Return when it does its work."""
        wait_until(lambda: self.told("ActiveState") == "active")
