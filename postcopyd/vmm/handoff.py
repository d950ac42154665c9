"""Where VMMs hand over their memory: one Unix socket for native VMMs and for Firecracker.

The first byte tells them apart: `[` begins Firecracker's array, `{` a native handoff. Whatever is
refused is refused with one reason, and every descriptor that came with it is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial

import msgspec

from postcopyd.incoming.vmm import GuestMemory, HandedBlock
from postcopyd.kernel import open_files
from postcopyd.kernel.userfaultfd import Userfaultfd
from postcopyd.vmm import checks
from postcopyd.vmm.checks import HandoffRefused
from postcopyd.vmm.firecracker import FirecrackerVmm
from postcopyd.vmm.first_message import FirstContent, FirstMessage, take_connection
from postcopyd.vmm.native import NativeVmm
from postcopyd.vmm.peer import AllowedPeers, Peer, peer_of, peer_pidfd
from postcopyd.wire.firecracker import Region
from postcopyd.wire.handoff import Failed, Handoff, encode

__all__ = ["HandoffListener", "HandoffRefused", "OnRefused", "OnVmm", "PassOn", "Registration"]

_MOST_UNANSWERED = 64  # connections that are looked at together; others wait in the backlog
_OFTEN_OPENED = 8  # open files of one memory file in a handoff at most
_ACCEPT_PAUSE = 1.0  # seconds, when there is no descriptor to accept with


class Registration(msgspec.Struct, frozen=True):
    """What a VMM whose memory was accepted is told."""

    name: str
    """The migration that it belongs to."""
    listen: tuple[str, ...]
    """Addresses to which its source may connect."""


OnVmm = Callable[[str | None, NativeVmm | FirecrackerVmm, str | None], Awaitable[Registration]]
"""Takes a VMM over by returning: the name it gave (None: it names nobody), the VMM, the address on
which it wants its source to be waited for (None: no wish). Raises `HandoffRefused` not to take it:
the VMM is told, and closed."""

PassOn = Callable[[str | None, FirstMessage, ExitStack], Awaitable[bool]]
"""Asked, with the name that a VMM gave and its whole message, whether the VMM is for another
process; if so it has been passed on (`FirstMessage.pass_on`) when this returns True. What it puts
on the stack is closed when the VMM was answered. Raises `HandoffRefused` if it is for nobody."""

OnRefused = Callable[[Peer, str], None]
"""Told who was refused, and why."""


class HandoffListener:
    """Accepts VMMs on a listening Unix socket and hands each to `on_vmm`."""

    def __init__(
        self,
        listener: socket.socket | None,
        allowed: AllowedPeers,
        on_vmm: OnVmm,
        on_refused: OnRefused,
        *,
        first_message_timeout: float = 10.0,
        pass_on: PassOn | None = None,
    ) -> None:
        """Take over `listener`, bound and listening (AF_UNIX, SOCK_STREAM).

        :param listener: None to take only VMMs that another process passes on.
        :param first_message_timeout: seconds in which a VMM must have sent its whole message.
        :param pass_on: None where all VMMs are ours.
        """
        if listener is not None:
            listener.setblocking(False)
        self._listener = listener
        self._pass_on = pass_on
        self._allowed = allowed
        self._on_vmm = on_vmm
        self._on_refused = on_refused
        self._first_message_timeout = first_message_timeout
        self._unanswered: set[asyncio.Task[None]] = set()
        self._accepting = False
        self._started = False
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept from now on, in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._started = True
        self._accept_again()

    async def close(self) -> None:
        """Accept no more, refuse who has not been answered, close the socket. Idempotent.

        VMMs that `on_vmm` has taken over are not touched.
        """
        self._started = False
        self._stop_accepting()
        unanswered = tuple(self._unanswered)
        for task in unanswered:
            task.cancel()
        await asyncio.gather(*unanswered, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def take(self, source: socket.socket) -> None:
        """Take over a VMM that another process has passed on (`FirstMessage.pass_on`)."""
        with ExitStack() as resources:
            resources.callback(source.close)
            if not self._started:
                return
            try:
                connection = take_connection(source)
            except OSError:
                return  # who passed it on has gone, and the VMM is told by its closing
            resources.pop_all()
            self._begin(connection, source, ExitStack())

    # -- accepting ---------------------------------------------------------------------------

    def _accept_again(self) -> None:
        self._pause = None
        if self._started and not self._accepting and self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)
            self._accepting = True

    def _stop_accepting(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._accepting and self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._accepting = False

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors or memory. The connection stays readable in the backlog: wait, or
            # the event loop does nothing but fail to accept it.
            self._stop_accepting()
            self._pause = self._loop.call_later(_ACCEPT_PAUSE, self._accept_again)
            self._loop.call_exception_handler(
                {"message": "no handoff can be accepted at the moment", "exception": error}
            )
            return
        connection.setblocking(False)
        self._begin(connection, connection, ExitStack())

    def _begin(
        self, connection: socket.socket, source: socket.socket, resources: ExitStack
    ) -> None:
        resources.callback(connection.close)
        message = FirstMessage(connection, source)
        resources.callback(message.close)
        task = self._loop.create_task(self._answer(message, resources))
        self._unanswered.add(task)
        task.add_done_callback(partial(self._answered, message, resources))
        if len(self._unanswered) >= _MOST_UNANSWERED:
            self._stop_accepting()

    def _answered(
        self, message: FirstMessage, resources: ExitStack, task: asyncio.Task[None]
    ) -> None:
        """Clean up, also behind a task that was cancelled before it began."""
        self._unanswered.discard(task)
        if task.cancelled():
            _tell(message.connection, _STOPPED)
        elif (error := task.exception()) is not None:
            self._loop.call_exception_handler(
                {"message": "a handoff could not be answered", "exception": error}
            )
        resources.close()
        if message.source is not message.connection:
            message.source.close()
        if self._pause is None:
            self._accept_again()

    # -- one connection ----------------------------------------------------------------------

    async def _answer(self, message: FirstMessage, resources: ExitStack) -> None:
        with ExitStack() as meanwhile:
            await self._answer_meanwhile(message, resources, meanwhile)

    async def _answer_meanwhile(
        self, message: FirstMessage, resources: ExitStack, meanwhile: ExitStack
    ) -> None:
        peer = peer_of(message.connection)
        try:
            accepted = await self._accept_memory(message, peer, resources, meanwhile)
        except (HandoffRefused, OSError) as error:
            reason = _reason(error)
            if not message.of_firecracker:
                _tell(message.connection, reason)
            self._on_refused(peer, reason)
        else:
            if accepted is not None:
                await self._offer(*accepted, peer)

    async def _accept_memory(
        self, message: FirstMessage, peer: Peer, resources: ExitStack, meanwhile: ExitStack
    ) -> tuple[FirstContent, NativeVmm | FirecrackerVmm] | None:
        """Receive a handoff and check all of it, then move `resources` into the VMM.

        None if it was passed on.

        :raise HandoffRefused: with the reason.
        :raise OSError: if there is no descriptor or memory to spare.
        """
        reason = self._allowed.refusal(peer)
        if reason is not None:
            raise HandoffRefused(reason)
        try:
            pidfd = peer_pidfd(message.connection, peer)
        except ProcessLookupError as error:
            raise HandoffRefused(f"the VMM has gone: {error.strerror}") from error
        if pidfd is not None:
            resources.callback(os.close, pidfd)
        content = await self._receive(message)
        name = content.name if isinstance(content, Handoff) else None
        if self._pass_on is not None and await self._pass_on(name, message, meanwhile):
            return None
        message.received.clear()
        descriptors = message.descriptors
        if not descriptors:
            raise HandoffRefused(
                "no descriptor came with the message: the userfaultfd must be sent along "
                "(SCM_RIGHTS)"
            )
        checks.check_userfaultfd(descriptors[0])
        checks.check_no_other_userfaultfd(descriptors[1:])
        native = isinstance(content, Handoff)
        if isinstance(content, Handoff):
            checks.check_name("the migration", content.name)
            blocks = _native_blocks(content, descriptors)
        else:
            blocks = _firecracker_blocks(content)
        checks.check_blocks(blocks)
        checks.check_memory_files(blocks)
        userfaultfd = Userfaultfd(descriptors.pop(0))
        resources.callback(userfaultfd.close)
        checks.prove_mapped(userfaultfd, blocks, registered=not native)
        memory = GuestMemory(blocks, userfaultfd, registered=not native)
        if native:
            return content, NativeVmm(message.connection, peer, pidfd, memory, resources.pop_all())
        if pidfd is None:
            raise HandoffRefused(
                "the VMM is in a pid namespace that postcopyd does not see: its end would go "
                "unnoticed. Run postcopyd in the namespace of the host, or on Linux 6.5 or newer"
            )
        # Forks of Firecracker send memory files of their own along, and none of them reads on.
        message.close()
        message.connection.close()
        return content, FirecrackerVmm(peer, pidfd, memory, resources.pop_all())

    async def _receive(self, message: FirstMessage) -> FirstContent:
        try:
            async with asyncio.timeout(self._first_message_timeout):
                while True:
                    await _readable(self._loop, message.source)
                    content = message.receive()
                    if content is not None:
                        return content
        except TimeoutError:
            raise HandoffRefused(
                f"no whole message came within {self._first_message_timeout:g} s, only "
                f"{len(message.received)} bytes"
            ) from None

    async def _offer(
        self, content: FirstContent, vmm: NativeVmm | FirecrackerVmm, peer: Peer
    ) -> None:
        """Offer a checked VMM to `on_vmm`, and tell the VMM what came of it."""
        name, listen = None, None
        if isinstance(content, Handoff):
            name, listen = content.name, content.listen
        try:
            registration = await self._on_vmm(name, vmm, listen)
        except BaseException as error:
            # Whatever it is: nobody has taken the VMM over, so it is ours to close.
            reason = _reason(error)
            await vmm.failed(reason)
            vmm.close()
            if isinstance(error, asyncio.CancelledError):
                raise
            self._on_refused(peer, reason)
            if not isinstance(error, HandoffRefused):
                raise
        else:
            if isinstance(vmm, NativeVmm):
                vmm.registered(registration.name, registration.listen)


_STOPPED = "postcopyd is being stopped"


def _reason(error: BaseException) -> str:
    if isinstance(error, HandoffRefused):
        return error.reason
    if isinstance(error, asyncio.CancelledError):
        return _STOPPED
    return f"postcopyd failed: {error}"


def _tell(connection: socket.socket, reason: str) -> None:
    """Tell a peer that is refused why, if it still listens."""
    with contextlib.suppress(OSError):
        connection.sendmsg([encode(Failed(reason))], [], socket.MSG_NOSIGNAL)


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    """Return when something can be received."""
    ready = asyncio.Event()
    loop.add_reader(connection.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection.fileno())


def _first_of_each(descriptors: Sequence[int]) -> list[int]:
    """Return for each descriptor the first memory file that is one open file with it.

    It is left to a successor once: a service manager keeps no open file by two names.

    :raise HandoffRefused: if one file was opened very often, each of which is compared with all.
    """
    different: dict[tuple[int, int], list[int]] = {}
    firsts = [descriptors[0]]
    for descriptor in descriptors[1:]:
        status = os.fstat(descriptor)
        others = different.setdefault((status.st_dev, status.st_ino), [])
        first = next((one for one in others if open_files.is_same(one, descriptor)), None)
        if first is None:
            if len(others) == _OFTEN_OPENED:
                raise HandoffRefused(
                    f"{checks.link_target(descriptor)} is handed over as more than {_OFTEN_OPENED} "
                    "open files: open it once"
                )
            first = descriptor
            others.append(descriptor)
        firsts.append(first)
    return firsts


def _native_blocks(content: Handoff, descriptors: Sequence[int]) -> tuple[HandedBlock, ...]:
    named = {0}
    blocks = []
    firsts = _first_of_each(descriptors)
    for place, block in enumerate(content.blocks):
        checks.check_name(f"block {place}", block.name)
        number = block.memory_file
        if number == 0:
            raise HandoffRefused(
                f"block {block.name!r}: memory_file is 0, but descriptor 0 is the userfaultfd"
            )
        if number is not None and number >= len(descriptors):
            raise HandoffRefused(
                f"block {block.name!r}: memory_file is {number}, "
                f"but only {len(descriptors)} descriptors came"
            )
        if number is not None:
            named.add(number)
        blocks.append(
            HandedBlock(
                name=block.name,
                address=block.address,
                length=block.length,
                page_size=block.page_size,
                memory_file=None if number is None else firsts[number],
                file_offset=block.file_offset,
            )
        )
    for number, descriptor in enumerate(descriptors):
        if number not in named:
            raise HandoffRefused(
                f"descriptor {number} ({checks.link_target(descriptor)}) is the memory file of "
                "no block"
            )
    return tuple(blocks)


def _firecracker_blocks(regions: Sequence[Region]) -> tuple[HandedBlock, ...]:
    return tuple(
        HandedBlock(
            name=f"region{number}",
            address=region.address,
            length=region.length,
            page_size=region.page_size,
            memory_file=None,
            file_offset=region.offset,
        )
        for number, region in enumerate(regions)
    )
