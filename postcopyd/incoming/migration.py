"""One incoming migration: a stream on one side, a VMM on the other, the state machine between.

The parts live in their own files: the source's side (`source_link.py`), the VMM's side
(`recipient.py`), the states (`states.py`). Here is what happens in which order.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from dataclasses import replace
from time import perf_counter
from typing import Any

from postcopyd.incoming import events, handshake
from postcopyd.incoming.faults import UnexpectedEvent
from postcopyd.incoming.placing import VmmGone
from postcopyd.incoming.recipient import MAIN, PREEMPT, Recipient, Refused
from postcopyd.incoming.report import Counters, Histogram, LatencyReport, Report
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.source_link import SourceLink
from postcopyd.incoming.states import State, check_message, check_step
from postcopyd.incoming.vmm import Vmm, VmmFailure
from postcopyd.ram.block import RamBlock
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import (
    Advise,
    BlockList,
    Configuration,
    DeviceState,
    Discard,
    EndOfStream,
    Message,
    Opaque,
    OpenReturnPath,
    Package,
    Pages,
    Ping,
    PreemptEnd,
    RamSectionEnd,
    SwitchoverStart,
    ZeroPages,
)

_LAST_WORDS = 0.5
"""Seconds in which a VMM that has exited may be seen to, by who knows more than that it has."""

_AFTER_SWITCHOVER = (State.LISTENING, State.RUNNING)


class IncomingMigration:
    """One VMM's memory on its way in.

    Give it a VMM (`attach_vmm`) and a stream (`attach_stream`), in either order, from within a
    running event loop. From then on it runs by itself; `wait` returns when it has ended and every
    descriptor is released. After an error it is in a known state: FAILED when the source still is
    the VM or the guest is lost, PAUSED when everything that is here is kept.
    """

    def __init__(
        self, name: str, settings: Settings, trace: Callable[[events.Event], None]
    ) -> None:
        """Make a migration that waits for its VMM and its stream.

        :param trace: told of everything that happens once (`events.py`); must not raise.
        :raise OSError: if the kernel has no eventfd to give.
        """
        self.name = name
        self.state = State.NONE
        self.failure: str | None = None
        """Why it failed, or why it is paused."""
        self._settings = settings
        self._trace = trace
        self._counters = Counters()
        self._latency = Histogram()
        self._recipient = Recipient(
            self._counters,
            self._latency,
            request=self._request_pages,
            removed=self._memory_removed,
            caught_up=self._caught_up,
            broken=self._filling_broken,
        )
        self._link: SourceLink | None = None
        self.peer: str | None = None
        """Where the source is, None before one has connected."""
        self._preempt_peer: str | None = None
        self._return_path_open = False
        self._bytes_received = 0
        self._end_of_stream = False
        self._never_sent: int | None = None
        self._guest_lost = False
        self._removed_before = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._vmm_tasks: list[asyncio.Task[None]] = []
        self._finished = asyncio.Event()
        self._final_report: Report | None = None
        self._switchover_at: float | None = None
        self._resident_at: float | None = None
        self._cancels: list[tuple[str, bool, asyncio.Future[None]]] = []
        self._loop = asyncio.get_running_loop()
        self._quit = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop.add_reader(self._quit, self._on_quit)

    # -- what others ask of it ---------------------------------------------------------------

    @property
    def before_package(self) -> bool:
        """True while the source still is the VM, so that an error ends cleanly."""
        return self.state.before_package

    @property
    def has_vmm(self) -> bool:
        """True while there is a VMM whose memory is filled."""
        return self._recipient.vmm is not None

    @property
    def waits_for_vmm(self) -> bool:
        """True when everything is kept for another VMM, because one has not loaded its devices."""
        return self._recipient.vmm is None and self.state is State.PAUSED

    @property
    def package(self) -> bytes | None:
        """The device package as it was received, None before it has come."""
        package = self._recipient.loading.package if self._recipient.begun else None
        return package.data if package is not None else None

    def attach_vmm(self, vmm: Vmm) -> None:
        """Fill the memory of `vmm`, which is taken over.

        When a VMM has not loaded its devices, another one may take its place.

        :raise Refused: if there is a VMM already, the migration has ended, or its memory cannot
            be accounted for. `vmm` then still is the caller's.
        """
        if self.state.ended:
            raise Refused(f"migration {self.name!r} has ended")
        recipient = self._recipient
        if recipient.vmm is not None:
            raise Refused(f"migration {self.name!r} already has a VMM: {recipient.vmm.description}")
        if self.waits_for_vmm:
            recipient.attach_replacement(vmm)
            self._spawn_for_vmm(self._replace())
        else:
            recipient.attach(vmm)
        blocks = vmm.memory.blocks
        self._trace(
            events.VmmAttached(vmm.description, len(blocks), sum(block.length for block in blocks))
        )
        self._spawn_for_vmm(self._watch_vmm(vmm))

    def attach_stream(self, connection: socket.socket, peer: str) -> None:
        """Receive the migration from `connection`, which is taken over.

        While there is a stream a further connection may be its preempt channel; what it is shows
        when it speaks.

        :raise Refused: if it is too late for one. `connection` then still is the caller's.
        """
        if self._link is not None:
            self._link.add(connection, peer)
            return
        if self.state is not State.NONE:
            raise Refused(f"migration {self.name!r} is {self.state.value}: it takes no stream")
        self.peer = peer
        name = self.name
        self._link = SourceLink(
            self._loop,
            self._settings,
            connection,
            peer,
            deliver=self._deliver,
            deliver_urgent=self._deliver_urgent,
            faults_first=self._faults_first,
            lost=self._stream_lost,
            preempt_attached=self._preempt_attached,
            refused=lambda why: self._trace(events.ConnectionRefused(f"migration {name!r} {why}")),
        )
        self._trace(events.StreamAttached(peer))
        self._watch_idle(self._settings.first_byte_timeout)
        self._link.resume()

    def cancel(self, reason: str, force: bool = False) -> asyncio.Future[None]:
        """End it. Before the package the source goes on; after it the guest is lost.

        It is carried out by the event loop, like everything that happens to a migration. The
        future ends with `Refused` if the package was faster.

        :raise Refused: after the package, unless `force`; or when it has ended.
        """
        if self.state.ended:
            raise Refused(f"migration {self.name!r} has ended")
        self._check_may_end(force)
        done: asyncio.Future[None] = self._loop.create_future()
        self._cancels.append((reason, force, done))
        os.eventfd_write(self._quit, 1)
        return done

    def _check_may_end(self, force: bool) -> None:
        if not self.before_package and not force:
            raise Refused(
                f"migration {self.name!r} is {self.state.value}: its source cannot take the guest "
                f"back, so cancelling loses the guest"
            )

    async def wait(self) -> None:
        """Return when the migration has ended and holds no descriptor any more."""
        await self._finished.wait()

    def report(self) -> Report:
        """Tell how it stands."""
        return self._final_report or self._make_report()

    # -- the stream --------------------------------------------------------------------------

    def _deliver(self, message: Message) -> None:
        """Act on one message of the main stream.

        :raise ProtocolError: if it is not legal here or contradicts the VMM.
        :raise OSError: if there is no memory to keep it.
        """
        if self.state is State.RUNNING and type(message) is Pages:
            self._place(message, MAIN)  # the hot path
            return
        assert self._link is not None
        check_message(self.state, message, self._link.main.reader.position)
        match message:
            case Pages() | ZeroPages():
                if self.state in _AFTER_SWITCHOVER:
                    self._place(message, MAIN)
                else:
                    self._recipient.keep(message)
            case RamSectionEnd() | SwitchoverStart():
                pass
            case Configuration():
                self._recipient.configure(message)
            case OpenReturnPath():
                self._return_path_open = True
            case Ping():
                self._pong(message.value)
            case Advise():
                self._aside(self._prepare(message))
            case BlockList():
                self._recipient.take_block_list(message)
                self._link.blocks_known(message.blocks)
            case Discard():
                self._take_discard(message)
            case Package():
                self._take_package(message)
            case DeviceState():
                self._converge()
            case Opaque():
                self._aside(self._recipient.loading.feed(bytes(message.data)))
            case EndOfStream():
                self._take_end_of_stream()
            case _:
                raise ProtocolError(f"{type(message).__name__} is not supported", None)

    def _deliver_urgent(self, message: Message) -> None:
        """Act on one message of the preempt channel. As `_deliver`."""
        if self.state not in _AFTER_SWITCHOVER:
            raise ProtocolError(
                f"the preempt channel brings pages in state {self.state.value}", None
            )
        match message:
            case Pages() | ZeroPages():
                self._place(message, PREEMPT)
            case PreemptEnd():
                pass
            case _:
                raise ProtocolError(f"{type(message).__name__} on the preempt channel", None)
        if self._end_of_stream:
            self._complete_if_all_is_here()

    def _place(self, message: Pages | ZeroPages, channel: int) -> None:
        link = self._link
        assert link is not None
        if not self._recipient.place(message, channel):
            link.pause()
        if self._recipient.waiting:
            link.main.go_carefully()

    def _pong(self, value: int) -> None:
        assert self._link is not None
        if not self._return_path_open:
            raise ProtocolError(f"PING {value} came before a return path was opened", None)
        self._link.send(self._link.writer.pong(value))

    async def _prepare(self, message: Advise) -> None:
        """Wait for the VMM and make it ready."""
        try:
            async with asyncio.timeout(self._settings.vmm_timeout):
                await self._recipient.attached.wait()
        except TimeoutError:
            raise ProtocolError(
                f"no VMM has handed over its memory within {self._settings.vmm_timeout:g} s", None
            ) from None
        await self._recipient.prepare(message, self._return_path_open)
        self._step(State.ADVISE)

    def _take_discard(self, message: Discard) -> None:
        if self.state is State.ADVISE:
            self._require_block_list("a discard")
            self._switchover_at = perf_counter()
            self._aside(self._first_discard(message))
        else:
            self._recipient.discard(message)

    async def _first_discard(self, message: Discard) -> None:
        await self._recipient.allow_discards()
        self._step(State.DISCARD)
        self._recipient.discard(message)

    def _require_block_list(self, before: str) -> None:
        if not self._recipient.has_block_list:
            raise ProtocolError(f"{before} came before the list of RAM blocks", None)

    def _take_package(self, message: Package) -> None:
        self._require_block_list("the device package")
        self._recipient.take_package(message)
        # From here on the source cannot take the guest back: every error is a pause.
        self._switchover_at = self._switchover_at or perf_counter()
        self._step(State.LISTENING)
        self._trace(events.PackageReceived(len(message.data)))
        self._aside(self._listen())

    def _take_end_of_stream(self) -> None:
        assert self._link is not None
        if self._recipient.in_a_host_page:
            raise ProtocolError("the stream ends in the middle of a host page", None)
        self._link.main.pause()
        self._link.urgent_first()  # what came before the end is not to be forgotten behind it
        self._end_of_stream = True
        if self._link.preempt is None:
            self._recipient.loading.all_came()
        self._complete_if_all_is_here()

    # -- the VMM becomes the guest -------------------------------------------------------------

    async def _listen(self) -> None:
        """Serve faults from now on, and have the VMM load its devices while pages come."""
        vmm = self._recipient.vmm
        await self._recipient.allow_discards()
        if vmm is not None and self._recipient.vmm is vmm:
            self._begin_load()

    def _begin_load(self) -> None:
        self._recipient.listen()
        link = self._link
        if link is not None:
            # QEMU loads its devices with the event loop's help: each of its steps takes a turn.
            link.main.go_gently(True)
            link.send(
                b"".join(
                    link.writer.request_pages(name, offset, length)
                    for name, offset, length in self._recipient.loading.missing()
                )
            )
        self._spawn_for_vmm(self._load())

    async def _load(self) -> None:
        pings = await self._recipient.load()
        self._tell_that_it_runs()
        if self.state is State.LISTENING:
            self._step(State.RUNNING)
        link = self._link
        if link is not None:
            link.main.go_gently(False)
            for value in pings:
                # They report that the device state is loaded (qemu-wire, 4.1).
                link.send(link.writer.pong(value))
        self._complete_if_all_is_here()

    def _tell_that_it_runs(self) -> None:
        seconds = _between(self._switchover_at, self._recipient.loaded_at)
        self._trace(events.DeviceStateLoaded(seconds or 0.0))

    def _converge(self) -> None:
        """Go on with a pre-copy that ends without a switchover: everything has come."""
        self._require_block_list("the device state")
        self._switchover_at = perf_counter()
        self._step(State.CONVERGED)
        self._trace(events.Converged())
        self._recipient.converge()
        self._spawn_for_vmm(self._load_converged())

    async def _load_converged(self) -> None:
        await self._recipient.load_converged()
        self._tell_that_it_runs()
        self._complete_if_all_is_here()

    # -- another VMM in the place of one that has not loaded --------------------------------------

    async def _replace(self) -> None:
        """Go on with another VMM where the one before has ended."""
        await self._recipient.move()
        if self._link is not None:
            self._step(State.LISTENING)
            self.failure = None
        self._begin_load()
        self._resume_stream()

    def _vmm_lost(self, reason: str) -> None:
        """Go on without the VMM, which has gone or does not load its devices."""
        recipient = self._recipient
        if self.state.ended or recipient.vmm is None:
            return
        if self.before_package or recipient.loaded_at is not None:
            self._end(reason)
            return
        self._end_vmm_tasks()
        if self._link is not None:
            self._link.pause()
        vmm = recipient.vmm
        try:
            recipient.let_go()
        except OSError as error:
            reason += f"; pages that had just come are lost until they are asked again: {error}"
        self._spawn(self._dismiss(vmm, reason))
        self.failure = reason
        if self.state is not State.PAUSED:
            self._step(State.PAUSED)
        self._trace(events.VmmLost(reason))

    async def _lose_vmm_soon(self, reason: str) -> None:
        """Go on without the VMM, whose memory has gone; unless it says why first."""
        await asyncio.sleep(_LAST_WORDS)
        self._vmm_lost(reason)

    async def _dismiss(self, vmm: Vmm, reason: str) -> None:
        try:
            await vmm.failed(reason)
        finally:
            vmm.close()

    # -- faults ------------------------------------------------------------------------------

    def _faults_first(self) -> None:
        self._recipient.read_faults()

    def _request_pages(self, requests: list[tuple[RamBlock, range]]) -> None:
        link = self._link
        if link is None or self.state not in _AFTER_SWITCHOVER:
            return
        request_pages = link.writer.request_pages
        message = b""
        for block, pages in requests:
            size = block.page_size
            message += request_pages(block.name, pages.start * size, len(pages) * size)
        link.send(message)

    def _memory_removed(self, block: RamBlock, offset: int, length: int) -> None:
        if not self._removed_before:
            self._removed_before = True
            self._trace(events.MemoryRemoved(block.name, offset, length))

    def _caught_up(self) -> None:
        self._resume_stream()
        self._complete_if_all_is_here()

    def _resume_stream(self) -> None:
        if self._link is None or self.waits_for_vmm:
            return
        if self._end_of_stream:
            self._link.resume_preempt()
        else:
            self._link.resume()

    def _preempt_attached(self, peer: str) -> None:
        self._preempt_peer = peer
        self._trace(events.PreemptAttached(peer))

    # -- the end -----------------------------------------------------------------------------

    def _complete_if_all_is_here(self) -> None:
        recipient = self._recipient
        if not recipient.may_be_done:
            return
        if self.state is not State.CONVERGED and (
            self.state is not State.RUNNING or not self._all_came()
        ):
            return
        try:
            self._never_sent = recipient.filling.finish()
        except OSError as error:
            self._end(f"the memory of the VMM cannot be released: {error}")
            return
        self._resident_at = perf_counter()
        self._step(State.END)
        pages = sum(block.pages for block in recipient.filling.holdings.blocks)
        seconds = _between(self._switchover_at, self._resident_at) or 0.0
        self._trace(events.Completed(pages - self._never_sent, self._never_sent, seconds))
        self._final_report = self._make_report()
        self._end_vmm_tasks()
        self._spawn(self._say_goodbye())

    def _all_came(self) -> bool:
        """Tell whether the source has sent everything, on both channels.

        The end of the main stream says nothing of the preempt channel, whose end a QEMU 10.0 does
        not mark: there every page that was asked for has to be here (qemu-wire, 5.2).
        """
        link = self._link
        if not self._end_of_stream or link is None:
            return False
        return (
            link.preempt is None
            or link.preempt.reader.ended
            or not self._recipient.filling.holdings.outstanding_pages()
        )

    async def _say_goodbye(self) -> None:
        """Tell both sides that all is well, and let the source close its connection."""
        link = self._link
        if link is not None:
            link.send(link.writer.shut(0))
        if self._recipient.vmm is not None:
            await self._recipient.vmm.complete()
        if link is not None:
            await handshake.wait_for_close(
                self._loop, link.connection, self._settings.close_timeout
            )
        self._release()

    def _stream_lost(self, error: Exception) -> None:
        """React to a stream that stopped or is wrong."""
        assert self._link is not None
        if self.state.ended or (self._end_of_stream and self._all_came()):
            return
        wrong = isinstance(error, ProtocolError)
        reason = str(error) if wrong else f"the stream from {self.peer} broke: {error}"
        if self.state is State.NONE and not self._link.bytes_received:
            self._drop_stream()
            self._trace(events.StreamDropped(self.peer or ""))
        else:
            self._error(reason)

    def _drop_stream(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._link is not None:
            self._bytes_received += self._link.bytes_received
            self._link.close()
        self._link = None

    def _filling_broken(self, error: Exception) -> None:
        if isinstance(error, VmmGone):
            self._spawn_for_vmm(self._lose_vmm_soon(str(error)))
        elif isinstance(error, UnexpectedEvent | ProtocolError):
            self._error(str(error))
        else:
            self._error(f"filling the memory failed: {error}")

    async def _watch_vmm(self, vmm: Vmm) -> None:
        await vmm.gone()
        self._vmm_lost(f"the VMM has gone ({vmm.description})")

    def _watch_idle(self, seconds: float, received: int = 0) -> None:
        self._idle_timer = self._loop.call_later(seconds, self._check_idle, seconds, received)

    def _check_idle(self, seconds: float, received: int) -> None:
        """End a migration whose source says nothing; after the package time does not matter."""
        link = self._link
        if link is None or not self.before_package:
            return
        # A source whose pre-copy has converged waits for us.
        waits = link.main.paused or self.state is State.CONVERGED
        if link.bytes_received == received and not waits:
            self._error(f"the source at {self.peer} has sent nothing for {seconds:g} s")
            return
        self._watch_idle(self._settings.idle_timeout, link.bytes_received)

    def _on_quit(self) -> None:
        os.eventfd_read(self._quit)
        cancels, self._cancels = self._cancels, []
        for reason, force, done in cancels:
            try:
                if not self.state.ended:
                    self._check_may_end(force)
                    self._end(reason)
            except Refused as error:
                done.set_exception(error)
                done.exception()  # whoever does not look at it did not want to know
            else:
                done.set_result(None)

    def _error(self, reason: str) -> None:
        """End it before the package, pause it after."""
        if self.state.ended:
            return
        if self.before_package:
            self._end(reason)
            return
        self.failure = reason
        self._drop_stream()
        if self.state is not State.PAUSED:
            self._step(State.PAUSED)
        self._trace(events.Paused(reason))

    def _end(self, reason: str) -> None:
        """End without all memory."""
        before_package, link = self.before_package, self._link
        self._guest_lost = not before_package or (link is not None and link.package_begun)
        self.failure = reason
        self._step(State.FAILED)
        self._trace(events.Failed(reason, self._guest_lost))
        if before_package and link is not None and self._return_path_open:
            # In pre-copy SHUT 1 lets the source fail at once and go on (qemu-wire, 5.2).
            link.send(link.writer.shut(1))
        self._final_report = self._make_report()
        self._end_vmm_tasks()
        self._recipient.stop()
        self._drop_stream()
        if self._recipient.vmm is None:
            self._release()
        else:
            self._spawn(self._say_that_it_failed(self._recipient.vmm, reason))

    async def _say_that_it_failed(self, vmm: Vmm, reason: str) -> None:
        await vmm.failed(reason)
        self._release()

    def _release(self) -> None:
        """Give back every descriptor and end every task; the report stays."""
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._drop_stream()
        self._loop.remove_reader(self._quit)
        os.close(self._quit)
        for _, _, done in self._cancels:
            done.set_result(None)
        self._cancels.clear()
        self._recipient.close(self._finished.set)

    # -- helpers -----------------------------------------------------------------------------

    def _step(self, new: State) -> None:
        old = self.state
        check_step(old, new)
        self.state = new
        self._trace(events.StateChanged(old, new))

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` while the stream stands still, then go on with it."""
        link = self._link
        assert link is not None
        link.pause()

        async def work_and_resume() -> None:
            await work
            if self._link is link:
                self._resume_stream()

        self._spawn(work_and_resume())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except VmmFailure as error:
                self._vmm_lost(f"the VMM failed: {error}")
            except (ProtocolError, OSError) as error:
                self._error(str(error))

        task = self._loop.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _spawn_for_vmm(self, work: Coroutine[Any, Any, None]) -> None:
        """As `_spawn`, for work that ends with the VMM."""
        self._vmm_tasks.append(self._spawn(work))

    def _end_vmm_tasks(self) -> None:
        current = asyncio.current_task()
        for task in self._vmm_tasks:
            if task is not current:
                task.cancel()
        self._vmm_tasks.clear()

    def _make_report(self) -> Report:
        recipient, link = self._recipient, self._link
        blocks = recipient.blocks()
        package = self.package
        return Report(
            name=self.name,
            state=self.state.value,
            failure=self.failure,
            vmm=recipient.vmm.description if recipient.vmm else None,
            peer=self.peer,
            machine=recipient.loading.configuration.machine if recipient.begun else None,
            blocks=blocks,
            length=sum(block.length for block in blocks),
            received=sum(block.received * block.page_size for block in blocks),
            package_length=len(package) if package is not None else None,
            counters=replace(self._counters),
            bytes_received=self._bytes_received + (link.bytes_received if link else 0),
            outstanding=recipient.waiting,
            never_sent=self._never_sent,
            fault_latency=LatencyReport.of(self._latency),
            preempt=self._preempt_peer,
            threads=recipient.threads(),
            downtime_seconds=_between(self._switchover_at, recipient.loaded_at),
            window_seconds=_between(self._switchover_at, self._resident_at),
            guest_lost=self._guest_lost,
            waits_for_vmm=self.waits_for_vmm,
        )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
