"""A VMM that speaks the native handoff: events go out, answers come in, over its connection."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack

import msgspec

from postcopyd.incoming.vmm import DeviceLoad, FedBlock, GuestMemory, VmmFailure
from postcopyd.kernel import memory_file
from postcopyd.vmm.peer import Peer
from postcopyd.wire import handoff as wire
from postcopyd.wire.errors import ProtocolError

KIND = "native"
_RECEIVE = 4096
_MOST_SAID = 4
"""Times `_RECEIVE` bytes: its answers are short, and few."""


class NativeFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the VMM has done of what it is asked."""

    advised: bool = False
    discarded: bool = False
    loaded: bool = False


class NativeVmm:
    """`postcopyd.incoming.vmm.Vmm` over a connection on which the handoff has come.

    Made within a running event loop. Nothing is asked of the VMM before `registered`.
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: Peer,
        pidfd: int | None,
        memory: GuestMemory,
        resources: ExitStack,
        before: NativeFacts | None = None,
    ) -> None:
        """Take over `resources`, which close everything else when they are closed.

        :param connection: non-blocking.
        :param pidfd: of the VMM; None if it cannot be watched: then only its socket tells its end.
        :param before: how far a predecessor of this process has come with it. What it has asked
            last is asked again, so an answer may come once more than it is asked for.
        """
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._peer = peer
        self._pidfd = pidfd
        self._memory = memory
        self._resources = resources
        self._inherited = before is not None
        self._answers = wire.answer_reader(in_a_line=self._inherited)
        self._answer: asyncio.Future[wire.Answer] | None = None
        self._wanted: type[wire.Answer] = wire.Refused
        self._one_question = asyncio.Lock()
        self._accepted = asyncio.Event()
        self._gone = asyncio.Event()
        self._watching = True
        self._broken: str | None = None
        before = before or NativeFacts()
        self._advised, self._discarded = before.advised, before.discarded
        self._loaded = before.loaded
        self._ended = self._closed = False
        self._loop.add_reader(connection.fileno(), self._readable)
        if pidfd is not None:
            self._loop.add_reader(pidfd, self._exited)

    @property
    def memory(self) -> GuestMemory:
        """The blocks and the userfaultfd, unchanged until `close`."""
        return self._memory

    @property
    def process_id(self) -> int:
        """Of the VMM, as this process sees it; 0 when it is in a namespace we do not see."""
        return self._peer.pid

    @property
    def description(self) -> str:
        """For logs and reports, such as ``pid 4711, uid 0``."""
        return str(self._peer)

    @property
    def fed_blocks(self) -> tuple[FedBlock, ...]:
        """None: all memory that it hands over is watched."""
        return ()

    @property
    def thread_names(self) -> Mapping[int, str]:
        """None are known."""
        return {}

    @property
    def has_run(self) -> bool:
        """True when it has said that it has loaded its devices."""
        self._receive_all()
        return self._loaded

    @property
    def kind(self) -> str:
        """``native``."""
        return KIND

    def facts(self) -> NativeFacts:
        """Return how far it is."""
        return NativeFacts(self._advised, self._discarded, self._loaded)

    @property
    def descriptors(self) -> Mapping[str, int]:
        """Its memory, its connection, and the process itself."""
        own = {"connection": self._connection.fileno()}
        if self._pidfd is not None:
            own["pidfd"] = self._pidfd
        return self._memory.descriptors | own

    def check_machine(self, machine: str) -> None:
        """Take any: what the VMM makes of its device state is its own affair."""

    # -- what the VMM is told and asked -------------------------------------------------------

    def registered(self, name: str, listen: tuple[str, ...]) -> None:
        """Tell the VMM that its memory was accepted, and where its source may connect."""
        self._send(wire.Registered(name, listen))
        self._accepted.set()

    async def advise(self, *, within: float = 60.0) -> None:
        """Have the balloon inhibited, memory locks put aside and private memory emptied.

        :param within: seconds that the VMM has for its answer.
        :raise VmmFailure: if it refuses, breaks the protocol, is too slow or goes away.
        """
        if not self._advised:
            await self._accepted.wait()
            self._send(wire.InhibitBalloon())
            await self._ask(wire.Advise(), wire.Advised, within)
            self._advised = True

    async def discard(self, *, within: float = 60.0) -> None:
        """Have huge pages forbidden. As `advise`."""
        if not self._discarded:
            await self._ask(wire.Discard(), wire.Discarded, within)
            self._discarded = True

    def listening(self) -> None:
        """Tell that faults are served from now on."""
        self._send(wire.Listening())

    async def run(self, load: DeviceLoad) -> None:
        """Hand over the device state in a sealed memory file; return when it is loaded.

        Loading touches memory that has yet to come, so it may take as long as the migration.

        :raise VmmFailure: if the VMM refuses, breaks the protocol or goes away.
        :raise OSError: if there is no memory for the memory file.
        """
        if self._inherited:
            # It may have said so to a predecessor, and have gone since.
            self._receive_all()
        if self._loaded:
            return
        device_state = load.device_state
        descriptor = memory_file.create("postcopyd-device-state", len(device_state))
        try:
            rest = memoryview(device_state)
            while rest:
                rest = rest[os.pwrite(descriptor, rest, len(device_state) - len(rest)) :]
            memory_file.seal(descriptor)
            await self._ask(wire.Run(len(device_state)), wire.Loaded, None, descriptor)
        finally:
            os.close(descriptor)

    async def run_converged(self, load: DeviceLoad, rest: AsyncIterator[bytes]) -> None:
        """Refuse: without a package only a QEMU can tell where its device state ends.

        :raise VmmFailure: always.
        """
        raise VmmFailure(
            "the source finished its pre-copy without a switchover to post-copy: start post-copy "
            "(migrate-start-postcopy) while pages are still to come"
        )

    async def complete(self, missing: int) -> None:
        """Tell that no more memory comes: balloon, huge pages and locks may come back."""
        if not self._ended:
            self._ended = True
            self._send(wire.AllowBalloon())
            self._send(wire.Complete(missing))

    async def failed(self, reason: str) -> None:
        """Tell that the handoff is refused, or the migration has ended without all memory."""
        if not self._ended and not self._closed:
            self._ended = True
            self._transmit(wire.Failed(reason), None)  # also to a VMM that broke the protocol

    async def gone(self) -> None:
        """Return when the VMM has exited or has closed its socket; after `close`, never."""
        await self._gone.wait()

    def close(self) -> None:
        """Release every descriptor. What waits for an answer gets `VmmFailure`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._stop_watching()
        self._break("its connection was closed by postcopyd")
        self._resources.close()

    # -- the connection ----------------------------------------------------------------------

    async def _ask(
        self,
        event: wire.Event,
        wanted: type[wire.Answer],
        within: float | None,
        descriptor: int | None = None,
    ) -> None:
        await self._accepted.wait()
        question = _name_of(event)
        async with self._one_question:
            self._send(event, descriptor)
            if self._broken is not None:
                raise VmmFailure(self._broken)
            self._answer = self._loop.create_future()
            self._wanted = wanted
            try:
                async with asyncio.timeout(within):
                    answer = await self._answer
            except TimeoutError:
                raise self._break(f"it has not answered {question} within {within:g} s") from None
            finally:
                self._answer = None
        if isinstance(answer, wire.Refused):
            raise VmmFailure(f"it refused {question}: {answer.reason}")
        if not isinstance(answer, wanted):
            raise self._break(f"it answered {_name_of(answer)} to {question}")

    def _send(self, event: wire.Event, descriptor: int | None = None) -> None:
        """Send a line; a VMM that does not take it is broken, which the next question tells.

        All that is ever sent fits many times into the socket's buffer, so it is not waited for.
        """
        if self._broken is None:
            self._transmit(event, descriptor)

    def _transmit(self, event: wire.Event, descriptor: int | None) -> None:
        line = wire.encode(event)
        rights = []
        if descriptor is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        try:
            sent = self._connection.sendmsg([line], rights, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._receive_all()  # what it has said before it went
            self._break(f"nothing can be sent to it: {error}")
            return
        if sent < len(line):
            self._break("it does not read what it is sent")

    def _readable(self) -> None:
        if self._receive():
            # libuv tells of a reset once, and it may have been now.
            self._loop.call_soon(self._look_again)

    def _look_again(self) -> None:
        if self._watching:
            self._readable()

    def _receive_all(self) -> None:
        """Take what it has said so far: more than it can say in good order is left there."""
        for _ in range(_MOST_SAID):
            if not (self._watching and self._receive()):
                return

    def _receive(self) -> bool:
        """Take what it says; False if that is nothing now, or nothing ever more."""
        try:
            data = self._connection.recv(_RECEIVE)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        if not data:
            self._lose("it has closed its socket")
            return False
        if self._broken is None:
            self._take(data)
        return True

    def _take(self, data: bytes) -> None:
        try:
            for answer in self._answers.feed(data):
                waited_for = self._answer is not None and not self._answer.done()
                if self._inherited and not (
                    waited_for and isinstance(answer, self._wanted | wire.Refused)
                ):
                    # To what a predecessor has asked, who asks nothing more after this.
                    self._loaded |= self._discarded and isinstance(answer, wire.Loaded)
                    continue
                if self._answer is None or not waited_for:
                    self._break(f"it said {_name_of(answer)} without being asked")
                    return
                self._loaded |= isinstance(answer, wire.Loaded) and self._wanted is wire.Loaded
                self._answer.set_result(answer)
        except ProtocolError as error:
            self._break(f"it sent a wrong answer: {error}")

    def _exited(self) -> None:
        self._receive_all()  # whether it runs may be its last word
        if self._watching:
            self._lose("it has exited")

    def _lose(self, why: str) -> None:
        self._stop_watching()
        self._break(why)
        self._gone.set()

    def _stop_watching(self) -> None:
        self._watching = False
        self._loop.remove_reader(self._connection.fileno())
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)

    def _break(self, why: str) -> VmmFailure:
        """Have every question fail from here on; return with what. The first reason counts."""
        if self._broken is None:
            self._broken = why
        failure = VmmFailure(self._broken)
        self._accepted.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(failure)
        return failure


def _name_of(message: wire.Event | wire.Answer) -> str:
    return repr(message.__struct_config__.tag)
