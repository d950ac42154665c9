"""A real QEMU as the source or as the destination: started, told what to do over QMP, and ended.

Every wait has a deadline, and fails with what QEMU and its guest have printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from qemu.qmp import EventListener, Message, QMPClient

from postcopyd.kernel.procfs import open_descriptors
from tests.interop import heartbeat, qemu_versions
from tests.interop.heartbeat import Heartbeat, HeartbeatMonitor
from tests.interop.linux_guest import DEBUG_CONSOLE
from tests.interop.processes import thread_states
from tests.interop.qemu_machine import Machine

T = TypeVar("T")

DEADLINE: Final = 30.0
"""Seconds for any one thing that QEMU is waited for."""
_BOOTS: Final = 2
"""How often a guest is started that does not boot."""
_OPERATOR_WAITS: Final = 1.0
"""Seconds before a source is told to resume."""

PRECOPY_BANDWIDTH: Final = 128 << 20
"""Bytes a second; more than 20 MiB go in the first round."""
POSTCOPY_BANDWIDTH: Final = 64 << 20
"""Bytes a second; more than 20 MiB are missing at the switchover."""

_EVENTS: Final = ("MIGRATION", "MIGRATION_PASS", "STOP", "RESUME", "SHUTDOWN")


class QemuFailure(AssertionError):
    """QEMU did not do in time what was waited for."""


@dataclass
class Qemu:
    """One running QEMU."""

    machine: Machine
    process: asyncio.subprocess.Process
    name: str
    directory: Path
    qmp: QMPClient
    heartbeat: HeartbeatMonitor
    """What the checker of the Linux guest tells; nothing with the other guest."""
    _events: EventListener
    _past_events: list[Message] = field(default_factory=list)
    _sockets_before: int = 0
    _pauses: int = 0

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    @property
    def qmp_path(self) -> Path:
        """A second monitor, which nobody here uses."""
        return qmp_path(self.directory, self.name)

    @property
    def statuses(self) -> list[str]:
        """The states that the migration has had, oldest first."""
        return [_data(event)["status"] for event in self.events("MIGRATION")]

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run a QMP command; its name and its arguments are written with dashes on the wire."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.within_deadline(
            self.qmp.execute(command, named or None), f"{command} answered"
        )

    async def within_deadline(self, awaitable: Awaitable[T], what: str) -> T:
        """Await, or fail with what QEMU and its guest have printed."""
        try:
            return await asyncio.wait_for(awaitable, DEADLINE)
        except TimeoutError:
            raise QemuFailure(
                f"not within {DEADLINE:.0f} s: {what}; {self.name}'s migration states"
                f" {self.statuses}; QEMU printed: {self.stderr() or 'nothing'}; the guest printed:"
                f" {self.console()[-2000:] or 'nothing'}; its checker:"
                f" {self.heartbeat.last_lines()}; its threads: {thread_states(self.pid)}"
            ) from None

    def stderr(self) -> str:
        """What QEMU has printed so far."""
        return (self.directory / f"{self.name}.stderr").read_text()

    def console(self) -> str:
        """What the guest has printed on its serial port so far."""
        file = self.directory / f"{self.name}.console"
        return file.read_text(errors="replace") if file.exists() else ""

    def memory_file(self) -> Path:
        """The file that the machine's memory is, where the backend is a memfd."""
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            if os.readlink(descriptor).startswith("/memfd:memory-backend-memfd"):
                return descriptor
        raise QemuFailure(f"{self.name} has no memory file: its backend is {self.machine.backend}")

    async def kill(self) -> None:
        """End it as if the host had ended it."""
        self.process.kill()
        await self.process.wait()

    # The machine

    async def status(self) -> str:
        """Whether the machine runs, and if not, why."""
        return cast(str, (await self.execute("query-status"))["status"])

    async def ram_blocks(self) -> dict[str, int]:
        """The used length in bytes of every RAM block, by name, in QEMU's order."""
        answer = await self.execute("human-monitor-command", command_line="info ramblock")
        rows = re.findall(r"^ *(\S+) +\d+ [KMG]iB +0x\w+ +0x(\w+)", answer, re.MULTILINE)
        return {name: int(used, 16) for name, used in rows}

    async def read_memory(self, address: int, length: int) -> bytes:
        """Read guest-physical memory."""
        copy = self.directory / f"{self.name}.pmemsave"
        await self.execute("pmemsave", val=address, size=length, filename=str(copy))
        return copy.read_bytes()

    async def guest_goes_on(self) -> None:
        """Return when the guest has done something from now on."""
        await self.within_deadline(self.machine.guest.goes_on(self), "the guest goes on")

    async def heartbeats(self, count: int) -> list[Heartbeat]:
        """The next `count` heartbeats of the Linux guest's checker."""
        return await self.within_deadline(self.heartbeat.next(count), f"{count} heartbeats")

    # The migration

    async def set_capabilities(self, *names: str) -> None:
        """Turn these migration capabilities on."""
        capabilities = [{"capability": name, "state": True} for name in names]
        await self.execute("migrate-set-capabilities", capabilities=capabilities)

    async def listen(self) -> str:
        """Have the destination wait for a source, and return the URI that reaches it."""
        await self.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
        (address,) = (await self.execute("query-migrate"))["socket-address"]
        return f"tcp:{address['host']}:{address['port']}"

    async def migrate(
        self,
        uri: str,
        *,
        bandwidth: int = PRECOPY_BANDWIDTH,
        postcopy_bandwidth: int = POSTCOPY_BANDWIDTH,
    ) -> None:
        """Begin a migration that can become a post-copy one. Bytes a second; 0 is without limit."""
        # A millisecond of downtime is never enough: the guest keeps more dirty, so that the
        # migration stays in pre-copy until it is told to switch over. The bandwidth keeps the first
        # round above 100 ms: a QEMU 7.2 that has sent all before it has measured the bandwidth
        # looks for no dirty pages and completes. In post-copy it keeps memory missing long enough
        # to be waited for, also where the destination is slow to begin.
        await self.execute(
            "migrate-set-parameters",
            downtime_limit=1,
            max_bandwidth=bandwidth,
            max_postcopy_bandwidth=postcopy_bandwidth,
        )
        self._sockets_before = self._sockets()
        await self.execute("migrate", uri=uri)

    async def resume(self, uri: str) -> None:
        """Go on with a post-copy migration whose connection broke, as an operator does.

        After a while: nothing tells when a QEMU is ready, and on a busy machine a 7.2 is not when
        its sockets are closed (docs/reliability.md).
        """
        await asyncio.sleep(_OPERATOR_WAITS)
        await self.execute("migrate", uri=uri, resume=True)

    async def start_postcopy(self) -> None:
        """Have the source switch over as soon as it can."""
        await self.execute("migrate-start-postcopy")

    async def precopy_rounds(self, count: int) -> None:
        """Return when the dirty bitmap has been synchronised `count` times."""
        while not any(_data(event)["pass"] >= count for event in self.events("MIGRATION_PASS")):
            await self._next_event(f"pre-copy round {count}")

    async def migration_status(self, *wanted: str) -> str:
        """Return when the migration is in one of these states, or was since it began."""
        while not (reached := [status for status in self.statuses if status in wanted]):
            await self._next_event(f"migration status {' or '.join(wanted)}")
        return reached[0]

    async def paused(self) -> None:
        """Return when the migration is paused once more, and QEMU's connection is closed.

        It says that it has paused before its return path has. A 7.2 that is told to resume in
        between closes the new connection with the old one, and recovers for ever.
        """
        assert await self.paused_unless_completed()

    async def paused_unless_completed(self) -> bool:
        """As `paused`, but False when the migration has completed instead.

        A source that has nothing urgent to send any more does not notice that its preempt channel
        is broken.
        """
        self._pauses += 1
        while self.statuses.count("postcopy-paused") < self._pauses:
            if "completed" in self.statuses:
                return False
            await self._next_event(f"migration paused {self._pauses} times")
        await self.within_deadline(self._until_disconnected(), "the connection is closed")
        return True

    async def _until_disconnected(self) -> None:
        while self._sockets() > self._sockets_before:
            await asyncio.sleep(0.001)

    def _sockets(self) -> int:
        """How many sockets the process has."""
        descriptors = open_descriptors(self.pid)
        return sum(descriptor.target.startswith("socket:") for descriptor in descriptors)

    async def migration(self) -> dict[str, Any]:
        """What query-migrate tells: status, downtime and total time in ms, figures of the RAM."""
        return cast(dict[str, Any], await self.execute("query-migrate"))

    async def event(self, name: str) -> Message:
        """The first event of this name, waited for if it has not come yet."""
        while not (events := self.events(name)):
            await self._next_event(f"event {name}")
        return events[0]

    def events(self, name: str) -> list[Message]:
        """The events of this name that have come so far, oldest first."""
        self._past_events += self._events.clear()
        return [event for event in self._past_events if event["event"] == name]

    def forget_events(self) -> None:
        """Begin anew, before another migration."""
        self._events.clear()
        self._past_events.clear()

    async def _next_event(self, what: str) -> None:
        self._past_events.append(await self.within_deadline(self._events.get(), what))


def event_time(event: Message) -> float:
    """When it happened, in seconds of the clock that `time.time` reads."""
    stamp = cast(dict[str, int], event["timestamp"])
    return stamp["seconds"] + stamp["microseconds"] / 1e6


def qmp_path(directory: Path, name: str) -> Path:
    """Where a QEMU of this name has its second monitor."""
    return directory / f"{name}.qmp"


@contextlib.asynccontextmanager
async def running_qemu(
    directory: Path, machine: Machine, *, name: str = "source"
) -> AsyncIterator[Qemu]:
    """Start the machine, wait until its guest uses its memory, and end it at the end."""
    async with contextlib.AsyncExitStack() as running:
        qemu = await _booted(running, directory, machine, name)
        yield qemu


async def _booted(
    running: contextlib.AsyncExitStack, directory: Path, machine: Machine, name: str
) -> Qemu:
    """Start the machine and wait for its guest; `running` ends it.

    A guest of four processors under TCG was seen to hang while it boots. Nothing of ours has come
    near it by then, so it is started again; where it hung is printed.
    """
    for tries_left in reversed(range(_BOOTS)):
        async with contextlib.AsyncExitStack() as trying:
            qemu = await trying.enter_async_context(_started(directory, machine, name))
            await qemu.set_capabilities("postcopy-ram", "events")
            try:
                await qemu.within_deadline(machine.guest.ready(qemu), "the guest is ready")
            except QemuFailure as failure:
                registers = await qemu.execute(
                    "human-monitor-command", command_line="info registers -a"
                )
                where = re.findall(r"RIP=\w+", registers)
                if qemu.heartbeat.is_ready or not tries_left:
                    raise
                print(f"{failure}; {where}; it is started again", file=sys.stderr)
                continue
            running.push_async_exit(trying.pop_all())
            return qemu
    raise AssertionError("the last try raises or returns")


@contextlib.asynccontextmanager
async def waiting_qemu(
    directory: Path,
    machine: Machine,
    *,
    name: str = "destination",
    beside: tuple[str, ...] = (),
) -> AsyncIterator[Qemu]:
    """Start a destination that waits to be told where its state comes from; end it at the end.

    Of the capabilities only the events are on.

    :param beside: a command that starts another one elsewhere, as a child of its own.
    """
    async with _started(directory, machine, name, "-incoming", "defer", beside=beside) as qemu:
        await qemu.set_capabilities("events")
        yield qemu


@contextlib.asynccontextmanager
async def _started(
    directory: Path, machine: Machine, name: str, *arguments: str, beside: tuple[str, ...] = ()
) -> AsyncIterator[Qemu]:
    program = qemu_versions.PROGRAMS[machine.version]
    assert qemu_versions.works(machine.version), f"no QEMU {machine.version}: `make test` gets it"
    monitor, qemus_monitor = socket.socketpair()
    console, qemus_console = socket.socketpair()
    command = [
        program.path,
        *program.arguments,
        "-name",
        f"{name},debug-threads=on",
        *machine.arguments(directory),
    ]
    command += ["-chardev", f"socket,id=qmp,fd={qemus_monitor.fileno()}"]
    command += ["-mon", "qmp,mode=control"]
    command += ["-chardev", f"socket,id=qmp2,path={qmp_path(directory, name)},server=on,wait=off"]
    command += ["-mon", "qmp2,mode=control"]
    command += ["-chardev", f"socket,id=checker,fd={qemus_console.fileno()}"]
    command += ["-device", f"isa-debugcon,iobase={DEBUG_CONSOLE},chardev=checker"]
    command += ["-serial", f"file:{directory}/{name}.console", *arguments]
    with open(directory / f"{name}.stderr", "wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            # A test run that is killed takes its QEMUs along.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *beside,
            *command,
            env=os.environ | program.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=[qemus_monitor.fileno(), qemus_console.fileno()],
        )
    qemus_monitor.close()
    qemus_console.close()
    qmp = QMPClient()
    events = EventListener(names=_EVENTS)
    qmp.register_listener(events)
    try:
        async with heartbeat.reading(console) as heartbeats:
            qemu = Qemu(machine, process, name, directory, qmp, heartbeats, events)
            try:
                await qemu.within_deadline(qmp.connect(monitor), "QMP is up")
            except EOFError:
                raise QemuFailure(f"QEMU ended at once: {qemu.stderr()}") from None
            yield qemu
    finally:
        with contextlib.suppress(EOFError, OSError):  # QEMU may have gone already
            await qmp.disconnect()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _data(event: Message) -> dict[str, Any]:
    return cast(dict[str, Any], event["data"])
