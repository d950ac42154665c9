"""A machine with a systemd of its own: the image of `tests.system.image`, booted in a container.

It has its own processes, network and control groups, and a memory of its own for what it writes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from tests.daemon.daemon_process import FakeManager
from tests.support import LIMIT, ROOT, wait_until
from tests.system.image import IMAGE, wheels

INSIDE: Final = Path("/project")
"""Where the machine has the project's tree, read-only."""
WHEELS: Final = Path("/wheels")

_INTO_GROUPS: Final = """
while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done
shift
exec "$@"
"""


class Machine:
    """A booted machine."""

    def __init__(self, leader: int) -> None:
        self.leader = leader
        """Its process 1, as we see it."""

    @property
    def root(self) -> Path:
        """Its files."""
        return Path(f"/proc/{self.leader}/root")

    @property
    def beside(self) -> tuple[str, ...]:
        """A command that starts another one among its processes and in its network.

        With our files, so that it may be one of this machine; it ends when we end it.
        """
        enter = ("nsenter", f"--target={self.leader}", "--pid", "--net", "--")
        return (*enter, "setpriv", "--pdeathsig", "KILL")

    def try_to_run(self, *command: str, within: float = LIMIT) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as root there."""
        return subprocess.run(
            ["nsenter", f"--target={self.leader}", "--all", "--", *command],
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within,
            check=False,
        )

    def run(self, *command: str, within: float = LIMIT) -> str:
        """As `try_to_run`, of one that must not fail; return what it prints."""
        done = self.try_to_run(*command, within=within)
        assert done.returncode == 0, f"{command}: {done.returncode} {done.stdout}{done.stderr}"
        return done.stdout


@contextmanager
def booted_machine(directory: Path) -> Iterator[Machine]:
    """Boot a machine, and end it and all that is in it at the end.

    :param directory: where what it writes to its console is left.
    """
    with ExitStack() as stack:
        groups = stack.enter_context(_control_groups())
        notify = directory / "notify.sock"
        manager = stack.enter_context(FakeManager(notify))
        console = stack.enter_context((directory / "console").open("wb"))
        process = stack.enter_context(
            subprocess.Popen(
                [
                    # Should we be killed, it ends itself and the machine.
                    *("setpriv", "--pdeathsig", "TERM"),
                    *("sh", "-c", _INTO_GROUPS, "sh", *map(str, groups), "--"),
                    *("systemd-nspawn", "--quiet", "--boot", "--console=pipe"),
                    *("--register=no", "--keep-unit", "--notify-ready=yes", "--link-journal=no"),
                    *(f"--directory={IMAGE}", "--volatile=overlay", "--private-network"),
                    "--machine=postcopyd-test",
                    # What a container forbids and a machine does not: to lock memory and unlock
                    # it, and to take a copy of another process's descriptor.
                    "--capability=CAP_IPC_LOCK",
                    "--system-call-filter=pidfd_getfd",
                    "--kill-signal=SIGKILL",
                    *(f"--bind-ro={ROOT}:{INSIDE}", f"--bind-ro={wheels()}:{WHEELS}"),
                ],
                env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(notify)},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        )
        stack.callback(process.terminate)
        yield Machine(_leader(manager, process, directory / "console"))


def _leader(manager: FakeManager, process: subprocess.Popen[bytes], console: Path) -> int:
    """Return the machine's process 1, once it is up."""
    leader = ""
    ready = False
    while not (leader and ready):
        try:
            told = manager.notification()
        except queue.Empty:
            raise AssertionError(
                f"it does not boot: {process.poll()} {console.read_text()}"
            ) from None
        leader = told.get("X_NSPAWN_LEADER_PID", leader)
        ready = ready or "READY" in told
    return int(leader)


@contextmanager
def _control_groups() -> Iterator[list[Path]]:
    """Make control groups for a machine: two in the same one would be in each other's way."""
    mounts = Path("/proc/self/mountinfo").read_text()
    roots = re.findall(r"^(?:\S+ ){4}(\S+) .* - cgroup2 ", mounts, re.MULTILINE)
    roots += re.findall(r"^(?:\S+ ){4}(\S+) .* - cgroup .*\bname=systemd\b", mounts, re.MULTILINE)
    groups = [Path(root) / f"postcopyd-test-{os.getpid()}" for root in roots]
    try:
        for group in groups:
            group.mkdir()
        yield groups
    finally:
        for group in groups:
            wait_until(lambda group=group: _remove(group))  # type: ignore[misc]


def _remove(group: Path) -> bool:
    """Remove a control group and those in it; False if there still is a process."""
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return not group.exists()
