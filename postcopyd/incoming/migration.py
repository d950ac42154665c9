"""One incoming migration: a stream on one side, a VMM on the other, the state machine between.

The parts live in their own files: the stream (`stream.py`), the return path (`return_path.py`),
the memory (`filling.py`), the states (`states.py`). Here is what happens in which order.
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
from postcopyd.incoming.filling import MemoryFilling
from postcopyd.incoming.placing import VmmGone
from postcopyd.incoming.report import Counters, Histogram, LatencyReport, Report
from postcopyd.incoming.return_path import ReturnPath
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State, check_message, check_step
from postcopyd.incoming.stream import StreamConnection
from postcopyd.incoming.vmm import Vmm, VmmFailure
from postcopyd.ram.block import RamBlock
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import (
    Advise,
    BlockList,
    Configuration,
    Discard,
    EndOfStream,
    Message,
    OpenReturnPath,
    Package,
    Pages,
    Ping,
    RamSectionEnd,
    SwitchoverStart,
    ZeroPages,
)
from postcopyd.wire.package import PackageContents, parse_package
from postcopyd.wire.stream_reader import StreamLimits, StreamReader

_READ_AHEAD_IDLE = 128
_READ_AHEAD_FAULTS = 16
"""Pages that one receive may bring while no fault waits, and while one does."""


class Refused(Exception):
    """The migration does not take what was offered, or does not do what was asked; says why."""


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
        self._vmm: Vmm | None = None
        self._vmm_attached = asyncio.Event()
        self._filling: MemoryFilling | None = None
        self._stream: StreamConnection | None = None
        self._connection: socket.socket | None = None
        self._return_path: ReturnPath | None = None
        self._return_path_open = False
        self.peer: str | None = None
        """Where the source is, None before one has connected."""
        self._bytes_received = 0
        self._machine: str | None = None
        self._target_page_size = 0
        self._block_list: BlockList | None = None
        self._package: Package | None = None
        self._discard_asked = False
        self._loaded = False
        self._end_of_stream = False
        self._never_sent: int | None = None
        self._removed_before = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._emptying: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished = asyncio.Event()
        self._final_report: Report | None = None
        self._package_at: float | None = None
        self._loaded_at: float | None = None
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
        """True once a VMM has handed over its memory."""
        return self._vmm is not None

    @property
    def package(self) -> bytes | None:
        """The device package as it was received, None before it has come."""
        return self._package.data if self._package else None

    def attach_vmm(self, vmm: Vmm) -> None:
        """Fill the memory of `vmm`, which is taken over.

        :raise Refused: if there is a VMM already, the migration has ended, or its memory cannot
            be accounted for. `vmm` then still is the caller's.
        """
        if self.state.ended:
            raise Refused(f"migration {self.name!r} has ended")
        if self._vmm is not None:
            raise Refused(f"migration {self.name!r} already has a VMM: {self._vmm.description}")
        try:
            self._filling = MemoryFilling(
                vmm.memory,
                self._counters,
                self._latency,
                request=self._request_pages,
                removed=self._memory_removed,
                caught_up=self._caught_up,
                broken=self._filling_broken,
            )
        except (OSError, ValueError) as error:
            raise Refused(f"the memory of the VMM cannot be used: {error}") from error
        self._vmm = vmm
        self._trace(
            events.VmmAttached(
                vmm.description, len(self._filling.blocks), self._filling.blocks.length
            )
        )
        self._spawn(self._watch_vmm(vmm))
        self._vmm_attached.set()

    def attach_stream(self, connection: socket.socket, peer: str) -> None:
        """Receive the migration from `connection`, which is taken over.

        :raise Refused: if there is a stream already, or it is too late for one. `connection` then
            still is the caller's.
        """
        if self._stream is not None:
            raise Refused(f"migration {self.name!r} already has a source: {self.peer}")
        if self.state is not State.NONE:
            raise Refused(f"migration {self.name!r} is {self.state.value}: it takes no stream")
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self.peer = peer
        self._stream = StreamConnection(
            self._loop,
            connection,
            StreamReader(StreamLimits(package=self._settings.package_limit)),
            deliver=self._deliver,
            faults_first=self._faults_first,
            lost=self._stream_lost,
            fault_window=self._settings.fault_window,
        )
        self._return_path = ReturnPath(self._loop, connection, self._stream_lost)
        self._trace(events.StreamAttached(peer))
        self._watch_idle(self._settings.first_byte_timeout)
        self._stream.resume()

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
        """Act on one message of the stream.

        :raise ProtocolError: if it is not legal here or contradicts the VMM.
        :raise OSError: if there is no memory to keep it.
        """
        assert self._stream is not None
        if self.state is State.RUNNING and type(message) is Pages:
            self._place_pages(message)  # the hot path
            return
        check_message(self.state, message, self._stream.reader.position)
        match message:
            case Pages():
                self._stage_pages(message)
            case ZeroPages():
                self._take_zeros(message)
            case RamSectionEnd() | SwitchoverStart():
                pass
            case Configuration():
                self._machine = message.machine
            case OpenReturnPath():
                self._return_path_open = True
            case Ping():
                self._pong(message.value)
            case Advise():
                self._target_page_size = message.target_page_size
                self._aside(self._prepare(message))
            case BlockList():
                assert self._filling is not None
                handshake.check_block_list(message, self._filling.blocks)
                self._block_list = message
            case Discard():
                self._take_discard(message)
            case Package():
                self._take_package(message)
            case EndOfStream():
                self._take_end_of_stream()
            case _:
                raise ProtocolError(f"{type(message).__name__} is not supported", None)

    def _place_pages(self, message: Pages) -> None:
        assert self._filling is not None and self._stream is not None
        if not self._filling.place_pages(message, self._target_page_size):
            self._stream.pause()
        self._stream.reader.read_ahead_pages = (
            _READ_AHEAD_FAULTS if self._filling.waiting else _READ_AHEAD_IDLE
        )

    def _stage_pages(self, message: Pages) -> None:
        assert self._filling is not None
        self._filling.stage_pages(message, self._target_page_size)

    def _take_zeros(self, message: ZeroPages) -> None:
        assert self._filling is not None and self._stream is not None
        if self.state is not State.RUNNING:
            self._filling.stage_zeros(message, self._target_page_size)
        elif not self._filling.place_zeros(message, self._target_page_size):
            self._stream.pause()

    def _pong(self, value: int) -> None:
        assert self._return_path is not None
        if not self._return_path_open:
            raise ProtocolError(f"PING {value} came before a return path was opened", None)
        self._return_path.send(self._return_path.writer.pong(value))

    async def _prepare(self, message: Advise) -> None:
        """Wait for the VMM, agree on page sizes, empty all memory."""
        try:
            async with asyncio.timeout(self._settings.vmm_timeout):
                await self._vmm_attached.wait()
        except TimeoutError:
            raise ProtocolError(
                f"no VMM has handed over its memory within {self._settings.vmm_timeout:g} s", None
            ) from None
        assert self._vmm is not None and self._filling is not None
        handshake.check_advise(message, self._filling.blocks, self._return_path_open)
        await self._vmm.advise()
        self._emptying = self._loop.run_in_executor(None, self._filling.empty)
        await asyncio.shield(self._emptying)
        self._step(State.ADVISE)

    def _take_discard(self, message: Discard) -> None:
        assert self._filling is not None
        if self.state is State.ADVISE:
            self._require_block_list("a discard")
            self._aside(self._first_discard(message))
        else:
            self._filling.discard(message)

    async def _first_discard(self, message: Discard) -> None:
        assert self._vmm is not None and self._filling is not None
        self._discard_asked = True
        await self._vmm.discard()
        self._step(State.DISCARD)
        self._filling.discard(message)

    def _require_block_list(self, before: str) -> None:
        if self._block_list is None:
            raise ProtocolError(f"{before} came before the list of RAM blocks", None)

    def _take_package(self, message: Package) -> None:
        self._require_block_list("the device package")
        contents = parse_package(message.data)
        # From here on the source cannot take the guest back: every error is a pause.
        self._package = message
        self._package_at = perf_counter()
        self._step(State.LISTENING)
        self._trace(events.PackageReceived(len(message.data)))
        self._aside(self._listen(contents))

    async def _listen(self, contents: PackageContents) -> None:
        """Serve faults from now on, let the VMM load its devices, then take the pages."""
        assert self._vmm is not None and self._filling is not None
        if not self._discard_asked:
            await self._vmm.discard()
        self._filling.listen(self._loop)
        self._vmm.listening()
        self._step(State.RUNNING)
        self._spawn(self._run(contents))

    async def _run(self, contents: PackageContents) -> None:
        """Hand the device state to the VMM; it runs from its answer on."""
        assert self._vmm is not None
        started = perf_counter()
        await self._vmm.run(contents.device_state)
        self._loaded = True
        self._loaded_at = perf_counter()
        self._trace(events.DeviceStateLoaded(self._loaded_at - started))
        for value in contents.pings:
            # They report that the device state is loaded (qemu-wire, 4.1).
            if self._return_path is not None:
                self._return_path.send(self._return_path.writer.pong(value))
        self._complete_if_all_is_here()

    def _take_end_of_stream(self) -> None:
        assert self._filling is not None and self._stream is not None
        if self._filling.unfinished_host_page:
            raise ProtocolError("the stream ends in the middle of a host page", None)
        self._end_of_stream = True
        self._stream.pause()
        self._complete_if_all_is_here()

    # -- faults ------------------------------------------------------------------------------

    def _faults_first(self) -> None:
        if self._filling is not None:
            self._filling.read_faults()

    def _request_pages(self, pages: list[tuple[RamBlock, int]]) -> None:
        return_path = self._return_path
        if return_path is None or self.state not in (State.LISTENING, State.RUNNING):
            return
        request_page = return_path.writer.request_page
        message = b""
        for block, page in pages:
            size = block.page_size
            message += request_page(block.name, page * size, size)
        return_path.send(message)

    def _memory_removed(self, block: RamBlock, offset: int, length: int) -> None:
        if not self._removed_before:
            self._removed_before = True
            self._trace(events.MemoryRemoved(block.name, offset, length))

    def _caught_up(self) -> None:
        assert self._filling is not None
        if self._filling.stalled:
            return
        if self._stream is not None and not self._end_of_stream:
            self._stream.resume()
        self._complete_if_all_is_here()

    # -- the end -----------------------------------------------------------------------------

    def _complete_if_all_is_here(self) -> None:
        if (
            self.state is not State.RUNNING
            or not self._end_of_stream
            or not self._loaded
            or self._filling is None
            or self._filling.staged
        ):
            return
        assert self._vmm is not None
        try:
            self._never_sent = self._filling.finish()
        except OSError as error:
            self._lose(f"the memory of the VMM cannot be released: {error}")
            return
        self._resident_at = perf_counter()
        self._vmm.complete()
        self._step(State.END)
        assert self._package_at is not None
        pages = sum(block.pages for block in self._filling.blocks)
        self._trace(
            events.Completed(
                pages - self._never_sent, self._never_sent, self._resident_at - self._package_at
            )
        )
        self._final_report = self._make_report()
        self._spawn(self._say_goodbye())

    async def _say_goodbye(self) -> None:
        """Tell the source that all is well, and let it close the connection."""
        if self._return_path is not None and self._connection is not None:
            self._return_path.send(self._return_path.writer.shut(0))
            await handshake.wait_for_close(
                self._loop, self._connection, self._settings.close_timeout
            )
        self._release()

    def _stream_lost(self, error: Exception) -> None:
        """React to a stream that stopped or is wrong."""
        assert self._stream is not None
        if self.state.ended or self._end_of_stream:
            return
        wrong = isinstance(error, ProtocolError)
        reason = str(error) if wrong else f"the stream from {self.peer} broke: {error}"
        if self.state is State.NONE and not self._stream.bytes_received:
            self._drop_stream()
            self._trace(events.StreamDropped(self.peer or ""))
        else:
            self._error(reason)

    def _drop_stream(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._return_path is not None:
            self._return_path.close()
        if self._stream is not None:
            self._bytes_received += self._stream.bytes_received
            self._stream.close()
        self._stream = self._return_path = self._connection = None

    def _filling_broken(self, error: Exception) -> None:
        if isinstance(error, VmmGone):
            self._lose(str(error))
        elif isinstance(error, UnexpectedEvent | ProtocolError):
            self._error(str(error))
        else:
            self._error(f"filling the memory failed: {error}")

    async def _watch_vmm(self, vmm: Vmm) -> None:
        await vmm.gone()
        self._lose(f"the VMM has gone ({vmm.description})")

    def _watch_idle(self, seconds: float, received: int = 0) -> None:
        self._idle_timer = self._loop.call_later(seconds, self._check_idle, seconds, received)

    def _check_idle(self, seconds: float, received: int) -> None:
        """End a migration whose source says nothing; after the package time does not matter."""
        stream = self._stream
        if stream is None or not self.before_package:
            return
        if stream.bytes_received == received and not stream.paused:
            self._error(f"the source at {self.peer} has sent nothing for {seconds:g} s")
            return
        self._watch_idle(self._settings.idle_timeout, stream.bytes_received)

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
        elif self.state is not State.PAUSED:
            self.failure = reason
            self._drop_stream()
            self._step(State.PAUSED)
            self._trace(events.Paused(reason))

    def _lose(self, reason: str) -> None:
        """End it because there is nothing left that could be filled."""
        if not self.state.ended:
            self._end(reason)

    def _end(self, reason: str) -> None:
        """End without all memory."""
        before_package = self.before_package
        self.failure = reason
        if before_package and self._return_path is not None and self._return_path_open:
            # In pre-copy SHUT 1 lets the source fail at once and go on (qemu-wire, 5.2).
            self._return_path.send(self._return_path.writer.shut(1))
        if self._vmm is not None:
            self._vmm.failed(reason)
        self._step(State.FAILED)
        self._trace(events.Failed(reason, before_package))
        self._final_report = self._make_report()
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
        if self._emptying is not None and not self._emptying.done():
            # A thread is at work on the memory files: closing one under it would let it loose on
            # whatever gets the descriptor's number next.
            self._emptying.add_done_callback(self._release_memory)
        else:
            self._release_memory()

    def _release_memory(self, emptied: asyncio.Future[None] | None = None) -> None:
        if emptied is not None and not emptied.cancelled():
            emptied.exception()  # it has ended anyway: why does not matter any more
        if self._filling is not None:
            self._filling.close()
        if self._vmm is not None:
            self._vmm.close()
        self._finished.set()

    # -- helpers -----------------------------------------------------------------------------

    def _step(self, new: State) -> None:
        old = self.state
        check_step(old, new)
        self.state = new
        self._trace(events.StateChanged(old, new))

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work` while the stream stands still, then go on with it."""
        stream = self._stream
        assert stream is not None
        stream.pause()

        async def work_and_resume() -> None:
            await work
            if self._stream is stream:
                stream.resume()

        self._spawn(work_and_resume())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except VmmFailure as error:
                self._error(f"the VMM failed: {error}")
            except (ProtocolError, OSError) as error:
                self._error(str(error))

        task = self._loop.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _make_report(self) -> Report:
        filling, stream = self._filling, self._stream
        blocks = filling.block_reports() if filling else []
        return Report(
            name=self.name,
            state=self.state.value,
            failure=self.failure,
            vmm=self._vmm.description if self._vmm else None,
            peer=self.peer,
            machine=self._machine,
            blocks=blocks,
            length=sum(block.length for block in blocks),
            received=sum(block.received * block.page_size for block in blocks),
            package_length=len(self._package.data) if self._package else None,
            counters=replace(self._counters),
            bytes_received=self._bytes_received + (stream.bytes_received if stream else 0),
            outstanding=len(filling.waiting) if filling else 0,
            never_sent=self._never_sent,
            fault_latency=LatencyReport.of(self._latency),
            seconds_to_run=_between(self._package_at, self._loaded_at),
            seconds_resident=_between(self._package_at, self._resident_at),
        )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
