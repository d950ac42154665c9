"""An unmodified QEMU as the VMM: found through its monitor, adopted, and fed its device state."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import ExitStack
from typing import Any, Final, TypeVar

import msgspec

from postcopyd.incoming.inheriting import InheritedVmm
from postcopyd.incoming.vmm import DeviceLoad, FedBlock, GuestMemory, VmmFailure
from postcopyd.kernel.userfaultfd import Feature
from postcopyd.vmm import qemu_facts
from postcopyd.vmm.adoption import AdoptedProcess, AdoptionRefused, adopt
from postcopyd.vmm.checks import HandoffRefused, check_blocks, prove_mapped
from postcopyd.vmm.qemu_facts import QemuFacts
from postcopyd.vmm.qemu_feed import Feed, FeedFailure, FeedRefused, offer_feed, withdraw_feed
from postcopyd.vmm.qemu_memory import FoundMemory, find_memory
from postcopyd.vmm.qemu_monitor import MonitorFailure, QemuMonitor

_KEEPS_PROCESS: Final = (9, 1, 0)
"""Since when migrate-incoming has exit-on-error."""
_LOADS: Final = ("setup", "active")
"""States of a migration that may still be loaded."""
_LAST_WORDS: Final = 5.0
"""Seconds for QEMU to say why it has rejected what it was fed, or to exit."""
_LOOK: Final = 0.001
_LONGEST_LOOK: Final = 0.1
"""Seconds between two looks at whether QEMU runs: from the first to the last."""
_TOLD_AFTER: Final = 1.0
"""Seconds for which no look has an answer before that is told: one that exits has none either."""

KIND: Final = "qemu"

T = TypeVar("T")


class QemuRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a successor of this process must know of a QEMU."""

    facts: QemuFacts
    monitor: str
    """Path of its QMP socket."""
    descriptor: int
    """Its own copy of the userfaultfd."""
    huge_page_ranges: tuple[tuple[int, int], ...]


class QemuVmm:
    """`postcopyd.incoming.vmm.Vmm` for a QEMU that waits with ``-incoming defer``.

    Made within a running event loop, by `adopt_qemu`.
    """

    def __init__(
        self,
        facts: QemuFacts,
        monitor: QemuMonitor | str,
        within: float,
        process: AdoptedProcess,
        found: FoundMemory,
        resources: ExitStack,
    ) -> None:
        """Take over `resources`, which close the memory files, and all the others.

        :param monitor: its session; or the path of its socket, if a predecessor of this process
            had the session. QEMU may have been fed by that one, then.
        :param within: seconds for each of QEMU's answers.
        """
        self._facts = facts
        self._session = monitor if isinstance(monitor, QemuMonitor) else None
        self._monitor_path = monitor if isinstance(monitor, str) else monitor.path
        self._within = within
        self._process = process
        self._found = found
        self._resources = resources
        self._memory = GuestMemory(found.blocks, process.userfaultfd, registered=False)
        self._advised = self._listening = self._ended = self._closed = False
        self._feed: Feed | None = None
        self._gone = asyncio.Event()
        self._loading = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(process.pidfd, self._exited)

    @property
    def memory(self) -> GuestMemory:
        """The blocks of its memory backends and the userfaultfd, unchanged until `close`."""
        return self._memory

    @property
    def fed_blocks(self) -> tuple[FedBlock, ...]:
        """All other blocks: ROMs, video memory."""
        return self._facts.fed

    @property
    def process_id(self) -> int:
        """Of QEMU, as this process sees it."""
        return self._process.pid

    @property
    def description(self) -> str:
        """For logs and reports, such as ``QEMU 7.2.22, pid 4711``."""
        return f"QEMU {'.'.join(map(str, self._facts.version))}, pid {self._process.pid}"

    @property
    def thread_names(self) -> Mapping[int, str]:
        """Its processors' threads."""
        return self._facts.thread_names

    @property
    def has_run(self) -> bool:
        """False: `run` asks it, and nobody keeps what it has said before."""
        return False

    @property
    def kind(self) -> str:
        """``qemu``."""
        return KIND

    def facts(self) -> QemuRecord:
        """Return who it is, and where to find it."""
        return QemuRecord(
            self._facts, self._monitor_path, self._process.descriptor, self._found.huge_page_ranges
        )

    @property
    def descriptors(self) -> Mapping[str, int]:
        """Its memory, and the process itself."""
        return self._memory.descriptors | {"pidfd": self._process.pidfd}

    def check_machine(self, machine: str) -> None:
        """Check that the machine types are the same.

        :raise VmmFailure: if they are not.
        """
        if machine != self._facts.machine:
            raise VmmFailure(
                f"the source's machine type is {machine!r}, this QEMU's {self._facts.machine!r}: "
                f"start it with -machine {machine}"
            )

    async def advise(self) -> None:
        """Empty private memory, and forbid huge pages, from inside the process.

        Long before the switchover, because QEMU stands still meanwhile; so what else can be done
        beforehand is done here as well. The balloon stays: what it takes is told by the
        userfaultfd.

        :raise VmmFailure: if QEMU has exited or the kernel refuses.
        """
        if self._advised:
            return
        try:
            await self._inside(self._found.huge_page_ranges, mmap.MADV_NOHUGEPAGE)
            await self._inside(self._found.private_ranges, mmap.MADV_DONTNEED)
            self._feed = await offer_feed(await self._monitor(), self._within)
        except OSError as error:
            raise VmmFailure(f"its memory cannot be prepared: {error}") from error
        except MonitorFailure as error:
            raise VmmFailure(f"it cannot be fed: {error}") from error
        self._advised = True

    async def discard(self) -> None:
        """Do nothing: `advise` has forbidden huge pages."""

    def listening(self) -> None:
        """Keep the process's own copy of the userfaultfd from now on: it must never read zeros."""
        self._listening = True

    async def run(self, load: DeviceLoad) -> None:
        """Feed QEMU; return when it has loaded its devices and left the state in which it waits.

        :raise VmmFailure: if it rejects them, or goes away. Its memory is of no use then.
        """
        await self._load(load, None)

    async def run_converged(self, load: DeviceLoad, rest: AsyncIterator[bytes]) -> None:
        """As `run`, with a device state that QEMU finds the end of."""
        await self._load(load, rest)

    async def _load(self, load: DeviceLoad, rest: AsyncIterator[bytes] | None) -> None:
        async with self._loading:
            if self._feed is not None:
                await self._be_fed(self._feed, load, rest)
            if await self._becomes_the_guest(load):
                return
            exited = self._gone.is_set()
            reason = f"it has not said that it runs; {await self._last_words()}"
            if self._feed is None:
                reason = f"postcopyd was killed while it fed QEMU; {reason}"
            raise VmmFailure(reason, may_have_run=exited)

    async def _be_fed(
        self, feed: Feed, load: DeviceLoad, rest: AsyncIterator[bytes] | None
    ) -> None:
        keep_process = self._facts.version >= _KEEPS_PROCESS
        try:
            await feed.load(load, rest, keep_process=keep_process)
        except FeedRefused as error:
            raise VmmFailure(f"it cannot be fed: {error}") from error
        except FeedFailure as error:
            last_words = await self._last_words()
            raise VmmFailure(
                f"{error}; {last_words}",
                may_have_run=self._session is not None and self._session.has_resumed,
            ) from error
        finally:
            feed.close()

    async def _becomes_the_guest(self, load: DeviceLoad) -> bool:
        """Return True when a QEMU that may have been fed everything runs, or is paused.

        It may wait for its memory meanwhile, and not answer, until the source is back; or its
        monitor is somebody else's, or broken. So nothing bounds its answer, and False, that it is
        lost, means that it says that it cannot load any more, as one whose feed has ended in the
        middle with a process that was killed; or that it has exited.
        """
        pause = _LOOK
        heard_at = self._loop.time()
        told = False
        while not self._gone.is_set():
            try:
                answers = await self._unless_it_exits(self._ask_how_it_stands())
            except MonitorFailure as error:
                await self._close_monitor()
                self._session = None
                if not told and self._loop.time() - heard_at >= _TOLD_AFTER:
                    told = True
                    load.unheard(str(error))
            else:
                if told and answers is not None:
                    told = False
                    load.unheard(None)
                heard_at = self._loop.time()
                match answers:
                    case migration, "inmigrate":
                        if migration not in _LOADS:
                            return False
                    case _, _:
                        return True
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_LOOK)
        return False

    async def _ask_how_it_stands(self) -> tuple[str, str]:
        """Return the status of the incoming migration and then that of the machine."""
        monitor = await self._monitor()
        incoming = await monitor.execute("query-migrate", within=None)
        machine = await monitor.execute("query-status", within=None)
        return _status_of(incoming, _Incoming), _status_of(machine, _Machine)

    async def _unless_it_exits(self, asking: Coroutine[Any, Any, T]) -> T | None:
        """Return what comes of it; None if QEMU has exited before."""
        asked = asyncio.create_task(asking)
        exited = asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait({asked, exited}, return_when=asyncio.FIRST_COMPLETED)
            return asked.result() if asked.done() else None
        finally:
            for task in (asked, exited):
                task.cancel()

    async def _monitor(self) -> QemuMonitor:
        if self._session is None:
            path, process = self._monitor_path, self._process.pid
            self._session = await QemuMonitor.connect(path, self._within, process)
        return self._session

    async def _close_monitor(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _last_words(self) -> str:
        """Find out why QEMU has not become the guest."""
        said = await self._unless_it_exits(self._reason())
        if said is not None:
            return f"QEMU says: {said}; the end of its standard error may say more"
        # One that exits closes its monitor shortly before.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS):
                await self._gone.wait()
        if self._gone.is_set():
            return "it has exited, the end of its standard error says why"
        return "it does not say why"

    async def _reason(self) -> str | None:
        try:
            monitor = await self._monitor()
            told = await monitor.execute("query-migrate", within=_LAST_WORDS)
        except MonitorFailure:
            return None
        reason = told.get("error-desc")
        return str(reason) if reason else None

    async def complete(self, missing: int) -> None:
        """Allow huge pages again, and close the process's own copy of the userfaultfd."""
        if not self._ended:
            self._ended = True
            await self._leave()

    async def failed(self, reason: str) -> None:
        """Leave QEMU as it was, if no fault was ever served; otherwise leave it waiting.

        A thread that waits for a page that never comes must not go on with zeros.
        """
        if not self._ended and not self._closed:
            self._ended = True
            if self._listening:
                await self._close_monitor()
            else:
                await self._leave()

    async def _leave(self) -> None:
        # What was done to it may have been done by a predecessor of this process.
        if not self._listening:
            with contextlib.suppress(MonitorFailure):
                await withdraw_feed(await self._monitor(), self._within)
        with contextlib.suppress(OSError):  # it has exited, or is stopped by somebody else
            await self._inside(self._found.huge_page_ranges, mmap.MADV_HUGEPAGE)
            await asyncio.to_thread(self._process.release)
        await self._close_monitor()

    async def _inside(self, ranges: tuple[tuple[int, int], ...], advice: int) -> None:
        if ranges:
            await asyncio.to_thread(self._process.advise, ranges, advice)

    async def gone(self) -> None:
        """Return when QEMU has exited; after `close`, never."""
        await self._gone.wait()
        async with self._loading:  # a load that fails because of it says more
            pass

    def close(self) -> None:
        """Release every descriptor. Idempotent."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._process.pidfd)
            if self._feed is not None:
                self._feed.close()
            self._process.close()
            self._resources.close()

    def _exited(self) -> None:
        self._loop.remove_reader(self._process.pidfd)
        self._gone.set()


class _Incoming(msgspec.Struct):
    status: str = ""
    """A 7.2 leaves it out before it has begun."""


class _Machine(msgspec.Struct):
    status: str


def _status_of(answer: object, kind: type[_Incoming | _Machine]) -> str:
    try:
        return msgspec.convert(answer, kind).status
    except msgspec.ValidationError as error:
        raise MonitorFailure(f"QEMU answers what it never does: {error}") from error


def restore_qemu(inherited: InheritedVmm, *, within: float = 10.0) -> QemuVmm:
    """Go on with a QEMU that a predecessor of this process has adopted; takes over `inherited`.

    :param within: seconds for each of QEMU's answers.
    :raise msgspec.MsgspecError: if the facts are not such.
    :raise KeyError: if its pidfd was not left.
    """
    record = msgspec.json.decode(inherited.facts, type=QemuRecord)
    memory = inherited.memory
    process = AdoptedProcess(
        record.facts.process_id,
        inherited.descriptors.pop("pidfd"),
        memory.userfaultfd,
        record.descriptor,
    )
    found = FoundMemory(memory.blocks, record.huge_page_ranges)
    resources = inherited.resources.pop_all()
    return QemuVmm(record.facts, record.monitor, within, process, found, resources)


async def adopt_qemu(monitor: str, *, within: float = 10.0) -> QemuVmm:
    """Make the QEMU behind a monitor the VMM of a migration.

    :param monitor: path of its QMP socket.
    :param within: seconds for each of its answers.
    :raise AdoptionRefused: if it cannot be filled, saying why and what to change. QEMU is as
        before then.
    """
    try:
        session = await QemuMonitor.connect(monitor, within)
    except MonitorFailure as error:
        raise AdoptionRefused(str(error)) from error
    with ExitStack() as resources:
        try:
            facts = await qemu_facts.ask(session, within)
            found, process = await asyncio.to_thread(_adopt, facts, resources)
        except MonitorFailure as error:
            await session.close()
            raise AdoptionRefused(str(error)) from error
        except BaseException:
            await session.close()
            raise
        return QemuVmm(facts, session, within, process, found, resources.pop_all())


def _adopt(facts: QemuFacts, resources: ExitStack) -> tuple[FoundMemory, AdoptedProcess]:
    """Find the memory, and get a userfaultfd that can watch all of it."""
    found = find_memory(facts.process_id, facts.backed, resources)
    wanted = Feature.THREAD_ID | Feature.EVENT_REMOVE
    if found.has_files:
        wanted |= Feature.MISSING_SHMEM
    if found.has_huge_blocks:
        wanted |= Feature.MISSING_HUGETLBFS
    try:
        check_blocks(found.blocks)
        process = adopt(facts.process_id, wanted)
        try:
            prove_mapped(process.userfaultfd, found.blocks, registered=False)
        except BaseException:
            process.release()
            process.close()
            raise
    except HandoffRefused as error:
        raise AdoptionRefused(error.reason) from error
    return found, process
