"""The side of a Python VMM: hands its memory to postcopyd and lives through a migration.

    memory = Block.anonymous("pc.ram", 64 << 20)
    with Destination("/run/postcopyd/handoff.sock", "vm0", [memory]) as destination:
        state = destination.wait_for_device_state()
        destination.loaded()  # it runs from here on; touching missing memory waits
        destination.wait_for_completion()

It blocks, and it is for one thread. Memory that is missing blocks the thread that touches it with
the interpreter's lock held, so postcopyd must be another process.
"""

from __future__ import annotations

import array
import contextlib
import errno
import mmap
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NoReturn, Self

from postcopyd.kernel import memory, memory_lock
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd, UserfaultfdUnavailable
from postcopyd.vmm.client_block import Block
from postcopyd.wire import handoff as wire
from postcopyd.wire.device_state import unwrap_device_state
from postcopyd.wire.errors import ProtocolError

__all__ = ["Block", "Destination", "MigrationFailed"]

_HELPFUL = Feature.THREAD_ID | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EXACT_ADDRESS
_RECEIVE = 64 << 10
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds before a handoff is tried again that was cut off."""
_ROOM = socket.CMSG_SPACE(4 * array.array("i").itemsize)


class MigrationFailed(Exception):
    """The handoff was refused, or the migration has ended without all memory; says why."""


class Destination:
    """One migration into this process, from the handoff on.

    When the `with` block is left before all memory has come, but after the device state has, the
    userfaultfd stays open: what touches missing memory then hangs, which is better than reading
    zeros. Only `close` gives that up.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str,
        blocks: Sequence[Block],
        *,
        listen: str | None = None,
        locked: bool = False,
        on_balloon: Callable[[bool], None] | None = None,
        timeout: float | None = 30.0,
    ) -> None:
        """Hand `blocks` to the postcopyd that listens at `path`; return when they are accepted.

        The blocks are not inherited by child processes from here on.

        :param name: the migration that this process is for.
        :param listen: address on which to wait for the source, such as ``tcp:127.0.0.1:0``.
        :param locked: all memory of this process is locked (mlockall): let go at the beginning,
            locked again when all memory has come.
        :param on_balloon: called with True when no memory must be given back to the host any
            more, with False when it may be again.
        :param timeout: seconds for all of this; None waits for ever.
        :raise MigrationFailed: if postcopyd refuses.
        :raise TimeoutError: if it does not answer in time.
        :raise UserfaultfdUnavailable: if this process may not have a userfaultfd.
        :raise OSError: if postcopyd cannot be reached, or a block is not mapped.
        """
        self._blocks = tuple(blocks)
        self._locked = locked
        self._on_balloon = on_balloon
        self._reader = wire.event_reader()
        self._events: deque[wire.Event] = deque()
        self._descriptors: deque[int] = deque()
        self._failure: str | None = None
        self._hung_up = False
        self._huge_pages_off = self._at_stake = False
        self._verdict: wire.Answer | None = None
        self.completed = False
        """True when no more memory comes."""
        self.missing = 0
        """Bytes that never came, because an operator has given them up: an access to them is a
        SIGBUS, with BUS_MCEERR_AR where the kernel has CONFIG_MEMORY_FAILURE. Known when it is
        completed."""
        self.user_mode_only: bool
        """True where this process has no right to more: what the kernel itself does with missing
        memory, such as a read(2) into it, fails with EFAULT instead of waiting."""
        deadline = _deadline(timeout)
        with ExitStack() as on_error:
            self._userfaultfd, self.user_mode_only = _open_userfaultfd()
            on_error.callback(self._userfaultfd.close)
            self._userfaultfd.handshake(_features(self._blocks))
            for block in self._blocks:
                memory.advise(block.address, block.length, mmap.MADV_DONTFORK)
            event = self._hand_over_until_accepted(os.fspath(path), name, listen, deadline)
            self.name = event.name
            """What postcopyd calls the migration."""
            self.listen = event.listen
            """Addresses to which the source may connect, such as ``tcp:127.0.0.1:40123``."""
            on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._at_stake:
            self._close_connection()  # the userfaultfd stays open, and does not close by itself
        else:
            self.close()

    # -- what the VMM calls, in this order -----------------------------------------------------

    def wait_for_device_state(self, timeout: float | None = None) -> bytes:
        """Serve postcopyd until the device state comes; return what the source was given.

        The blocks are emptied on the way: nothing may rely on what is in them.

        :param timeout: seconds; None waits for ever.
        :raise MigrationFailed: if the migration has ended.
        :raise TimeoutError: if it has not come yet; call again.
        """
        deadline = _deadline(timeout)
        while True:
            event = self._next_event(deadline)
            if isinstance(event, wire.Run):
                return self._take_device_state(event)
            self._serve(event)

    def loaded(self) -> None:
        """Tell that the device state is loaded: the VMM runs from here on.

        :raise MigrationFailed: if the migration has ended.
        """
        self._verdict = wire.Loaded()
        self._answer(self._verdict)

    def refuse(self, reason: str) -> None:
        """Tell, instead of `loaded`, that the device state cannot be loaded.

        :raise MigrationFailed: if the migration has ended.
        """
        self._verdict = wire.Refused(reason[: wire.REASON_LIMIT])
        self._answer(self._verdict)

    def wait_for_completion(self, timeout: float | None = None) -> None:
        """Return when no more memory comes; huge pages and locks are back then.

        That is all memory, unless `missing` says otherwise.

        :param timeout: seconds; None waits for ever.
        :raise MigrationFailed: if the migration has ended without all memory. What touches
            missing memory hangs from then on.
        :raise TimeoutError: if it has not ended yet; call again.
        :raise OSError: if memory cannot be locked again.
        """
        deadline = _deadline(timeout)
        while not self.completed:
            event = self._next_event(deadline)
            if isinstance(event, wire.Complete):
                self.missing = event.missing
                self._complete()
            else:
                self._serve(event)

    def close(self) -> None:
        """Close connection and userfaultfd. Idempotent.

        Before all memory has come this ends the migration, and missing memory reads as zeros.
        """
        self._close_connection()
        self._userfaultfd.close()

    # -- the handoff -------------------------------------------------------------------------

    def _hand_over_until_accepted(
        self, path: str, name: str, listen: str | None, deadline: float | None
    ) -> wire.Registered:
        """Hand over; again when postcopyd is killed before it has said what it makes of it."""
        for pause in _PAUSES:
            try:
                return self._hand_over_once(path, name, listen, deadline)
            except MigrationFailed:
                if not self._hung_up:
                    raise
            self._failure, self._hung_up = None, False
            self._reader = wire.event_reader()
            time.sleep(pause)
        return self._hand_over_once(path, name, listen, deadline)

    def _hand_over_once(
        self, path: str, name: str, listen: str | None, deadline: float | None
    ) -> wire.Registered:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(path, deadline)
            self._hand_over(name, listen, deadline)
            event = self._next_event(deadline)
            if not isinstance(event, wire.Registered):
                self._out_of_order(event)
        except BaseException:
            self._close_connection()
            raise
        return event

    def _connect(self, path: str, deadline: float | None) -> None:
        # A full backlog makes a non-blocking connect(2) of a Unix socket fail at once, and
        # Python's timeouts are non-blocking sockets: so the kernel's own timeout.
        seconds = _remaining(deadline) or 0.0
        timeout = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        try:
            self._socket.connect(path)
        except BlockingIOError:
            raise TimeoutError(f"postcopyd at {path} accepts no connection: it is busy") from None
        except OSError as error:
            raise OSError(
                error.errno, f"postcopyd cannot be reached ({error.strerror}): is it running?", path
            ) from error

    def _hand_over(self, name: str, listen: str | None, deadline: float | None) -> None:
        descriptors = array.array("i", [self._userfaultfd.fileno()])
        blocks = []
        for block in self._blocks:
            number = None
            if block.descriptor is not None:
                if block.descriptor not in descriptors:
                    descriptors.append(block.descriptor)
                number = descriptors.index(block.descriptor)
            blocks.append(
                wire.BlockDescription(
                    name=block.name,
                    address=block.address,
                    length=block.length,
                    page_size=block.page_size,
                    memory_file=number,
                    file_offset=block.file_offset,
                )
            )
        text = wire.encode(wire.Handoff(wire.VERSION, name, tuple(blocks), listen))
        self._socket.settimeout(_remaining(deadline))
        # Who is refused at once finds the connection closed; the reason is still to be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = self._socket.sendmsg(
                [text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            )
            self._socket.sendall(memoryview(text)[sent:])

    # -- events ------------------------------------------------------------------------------

    def _next_event(self, deadline: float | None) -> wire.Event:
        while not self._events:
            if self._failure is not None:
                raise MigrationFailed(self._failure)
            self._receive(deadline)
        event = self._events.popleft()
        if isinstance(event, wire.Failed):
            self._fail(event.reason)
        return event

    def _receive(self, deadline: float | None) -> None:
        self._socket.settimeout(_remaining(deadline))
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_RECEIVE, _ROOM, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise TimeoutError("postcopyd has not said in time what was waited for") from None
        except ConnectionResetError:
            data, ancillary = b"", []
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._descriptors.extend(array.array("i", content))
        if not data:
            self._hung_up = True
            self._failure = "postcopyd closed the connection before all memory had come"
        try:
            self._events.extend(self._reader.feed(data))
        except ProtocolError as error:  # what came before it is in the queue and comes first
            self._failure = f"postcopyd sent what is no event: {error}"

    def _serve(self, event: wire.Event) -> None:
        """Do what `event` asks, answer if it asks for an answer."""
        match event:
            case wire.InhibitBalloon():
                self._tell_balloon(True)
            case wire.AllowBalloon():
                self._tell_balloon(False)
            case wire.Advise() if not self._at_stake:
                self._do(self._empty_memory)
                self._answer(wire.Advised())
            case wire.Discard() if not self._at_stake:
                self._do(self._forbid_huge_pages)
                self._answer(wire.Discarded())
            case wire.Listening() | wire.Registered():
                pass  # the latter once more: postcopyd was killed, and goes on
            case wire.Run() if self._verdict is not None:
                self._take_device_state(event)  # once more, likewise
                self._answer(self._verdict)
            case _:
                self._out_of_order(event)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self._answer(wire.Refused(str(error)[: wire.REASON_LIMIT]))
            self._fail(f"this process could not do its part: {error}")

    def _answer(self, answer: wire.Answer) -> None:
        if self._failure is not None:
            raise MigrationFailed(self._failure)
        self._socket.settimeout(None)
        # Where postcopyd has gone, what it said before it went counts: the next wait reads that.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(wire.encode(answer))

    def _fail(self, reason: str) -> NoReturn:
        self._failure = reason
        raise MigrationFailed(reason)

    def _out_of_order(self, event: wire.Event) -> NoReturn:
        self._fail(f"postcopyd sent {event.__struct_config__.tag!r} out of order")

    # -- memory ------------------------------------------------------------------------------

    def _tell_balloon(self, inhibited: bool) -> None:
        if self._on_balloon is not None:
            self._on_balloon(inhibited)

    def _empty_memory(self) -> None:
        if self._locked:
            memory_lock.unlock_all()
        for block in self._blocks:
            # postcopyd empties memory files itself: dropping this mapping of one drops nothing.
            if block.descriptor is None:
                memory.advise(block.address, block.length, mmap.MADV_DONTNEED)

    def _forbid_huge_pages(self) -> None:
        self._huge_pages_off = True
        self._advise_huge_pages(mmap.MADV_NOHUGEPAGE)

    def _advise_huge_pages(self, advice: int) -> None:
        for block in self._blocks:
            if block.page_size == mmap.PAGESIZE:
                try:
                    memory.advise(block.address, block.length, advice)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # this kernel has none: nothing to forbid
                        raise

    def _take_device_state(self, event: wire.Run) -> bytes:
        if not self._descriptors:
            self._fail("postcopyd sent 'run' without its device state")
        descriptor = self._descriptors.popleft()
        try:
            size = os.fstat(descriptor).st_size
            if size != event.length:
                self._fail(f"postcopyd sent {size} bytes of device state for {event.length}")
            device_state = os.pread(descriptor, size, 0)
        finally:
            os.close(descriptor)
        self._at_stake = True
        return unwrap_device_state(device_state)

    def _complete(self) -> None:
        self.completed = True
        self._at_stake = False
        if self._huge_pages_off:
            self._advise_huge_pages(mmap.MADV_HUGEPAGE)
        if self._locked:
            memory_lock.lock_all(on_fault=False)

    def _close_connection(self) -> None:
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())


def _open_userfaultfd() -> tuple[Userfaultfd, bool]:
    """Open one, for the kernel's faults too where that is allowed; tell if it is not."""
    try:
        return Userfaultfd.open(), False
    except UserfaultfdUnavailable:
        return Userfaultfd.open(user_mode_only=True), True


def _features(blocks: Sequence[Block]) -> Feature:
    """Return what must be there for these blocks, and what helps where it is there."""
    wanted = _HELPFUL & Userfaultfd.offered()
    if any(block.page_size > mmap.PAGESIZE for block in blocks):
        wanted |= Feature.MISSING_HUGETLBFS
    if any(block.descriptor is not None for block in blocks):
        wanted |= Feature.MISSING_SHMEM
    return wanted


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _remaining(deadline: float | None) -> float | None:
    """Seconds for a socket's timeout, where 0 would mean something else."""
    return None if deadline is None else max(deadline - time.monotonic(), 0.001)
