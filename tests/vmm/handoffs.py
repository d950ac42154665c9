"""A handoff listener in the test's own event loop, and peers that talk to it by hand."""

from __future__ import annotations

import array
import asyncio
import json
import os
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd
from postcopyd.vmm.firecracker import FirecrackerVmm
from postcopyd.vmm.handoff import HandoffListener, Registration
from postcopyd.vmm.native import NativeVmm
from postcopyd.vmm.peer import AllowedPeers, Peer

LIMIT = 10.0
"""Seconds after which a wait is a failure."""
PAGE = 4096
FEATURES = Feature.THREAD_ID | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP | Feature.EXACT_ADDRESS


def open_descriptors() -> list[str]:
    """Return what each descriptor of this process refers to, but for those of the event loop.

    Without numbers: an event loop makes its own sockets anew whenever it runs.
    """
    targets = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            targets.append(re.sub(r":\[\d+\]$", "", os.readlink(f"/proc/self/fd/{entry}")))
        except FileNotFoundError:  # the one that lists the directory
            continue
    return sorted(target for target in targets if target != "/dev/null")


class Handoffs:
    """Takes every VMM over that is offered, unless told not to, and keeps it for the test."""

    def __init__(self, path: Path, users: Sequence[int], timeout: float) -> None:
        self.path = path
        self.refusal_by_callback: Exception | None = None
        self.before_registration: Callable[[NativeVmm], Awaitable[None]] | None = None
        self._vmms: asyncio.Queue[tuple[str | None, NativeVmm | FirecrackerVmm, str | None]]
        self._vmms = asyncio.Queue()
        self._refusals: asyncio.Queue[tuple[Peer, str]] = asyncio.Queue()
        self._taken: list[NativeVmm | FirecrackerVmm] = []
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(str(path))
        path.chmod(0o666)
        listening.listen()
        self.listener = HandoffListener(
            listening,
            AllowedPeers(users),
            self._on_vmm,
            lambda peer, reason: self._refusals.put_nowait((peer, reason)),
            first_message_timeout=timeout,
        )

    async def _on_vmm(
        self, name: str | None, vmm: NativeVmm | FirecrackerVmm, wanted_listen: str | None
    ) -> Registration:
        if self.before_registration is not None:
            assert isinstance(vmm, NativeVmm)
            await self.before_registration(vmm)
        if self.refusal_by_callback is not None:
            raise self.refusal_by_callback
        self._taken.append(vmm)
        self._vmms.put_nowait((name, vmm, wanted_listen))
        return Registration(name or "unnamed", ("tcp:127.0.0.1:40123",))

    async def offered(self) -> tuple[str | None, NativeVmm | FirecrackerVmm, str | None]:
        """Return what the next handoff that was accepted said: name, VMM, wanted address."""
        return await asyncio.wait_for(self._vmms.get(), LIMIT)

    async def native_vmm(self) -> NativeVmm:
        """Return the next VMM, which must be a native one."""
        _, vmm, _ = await self.offered()
        assert isinstance(vmm, NativeVmm)
        return vmm

    async def firecracker_vmm(self) -> FirecrackerVmm:
        """Return the next VMM, which must be Firecracker."""
        _, vmm, _ = await self.offered()
        assert isinstance(vmm, FirecrackerVmm)
        return vmm

    async def refusal(self) -> str:
        """Return why the next handoff that was refused was."""
        return (await self.refused_peer())[1]

    async def refused_peer(self) -> tuple[Peer, str]:
        """Return who was refused next, and why."""
        return await asyncio.wait_for(self._refusals.get(), LIMIT)

    async def close(self) -> None:
        await self.listener.close()
        for vmm in self._taken:
            vmm.close()


@asynccontextmanager
async def listening(
    path: Path, users: Sequence[int] = (os.geteuid(),), timeout: float = LIMIT
) -> AsyncIterator[Handoffs]:
    """Listen at `path`; at the end no descriptor may be left that was not there before."""
    before = open_descriptors()
    handoffs = Handoffs(path, users, timeout)
    handoffs.listener.start()
    try:
        yield handoffs
    finally:
        await handoffs.close()
    left = Counter(open_descriptors()) - Counter(before)
    assert not left, f"left open: {left}"


class RawPeer:
    """A VMM by hand: sends what it is told to, reads lines."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.setblocking(False)
        self._received = b""
        self.descriptors: list[int] = []

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send, in one message, what fits into the socket's buffer."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        assert self.socket.sendmsg([data], rights if descriptors else []) == len(data)

    def say(self, event: str, **fields: str) -> None:
        """Send a line."""
        self.send(json.dumps({"event": event} | fields).encode() + b"\n")

    async def line(self) -> dict[str, Any] | None:
        """Return the next line that comes, None at the end."""
        while b"\n" not in self._received:
            data = await asyncio.wait_for(self._receive(), LIMIT)
            if not data:
                assert not self._received
                return None
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    async def _receive(self) -> bytes:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.socket, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self.socket)
        try:
            data, ancillary, _, _ = self.socket.recvmsg(65536, socket.CMSG_SPACE(16))
        except ConnectionResetError:
            return b""
        for _, _, content in ancillary:
            self.descriptors += array.array("i", content)
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


class Offer:
    """A native handoff that is right in everything: two private blocks and their userfaultfd."""

    def __init__(self, features: Feature = FEATURES) -> None:
        self.mappings = [Mapping.anonymous(16 * PAGE), Mapping.anonymous(4 * PAGE)]
        self.userfaultfd = Userfaultfd.open()
        self.userfaultfd.handshake(features)
        self.descriptors = [self.userfaultfd.fileno()]
        self.message: dict[str, Any] = {
            "postcopyd": 1,
            "name": "vm0",
            "blocks": [
                {
                    "name": name,
                    "address": mapping.address,
                    "length": mapping.length,
                    "page_size": PAGE,
                }
                for name, mapping in zip(("pc.ram", "pc.bios"), self.mappings, strict=True)
            ],
        }

    @property
    def ram(self) -> dict[str, Any]:
        """The first block of the message."""
        block: dict[str, Any] = self.message["blocks"][0]
        return block

    @property
    def text(self) -> bytes:
        """The message as a line."""
        return json.dumps(self.message).encode() + b"\n"

    def send(self, peer: RawPeer) -> None:
        """Send message and descriptors."""
        peer.send(self.text, self.descriptors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.userfaultfd.close()
        for mapping in self.mappings:
            mapping.close()


async def why_refused(handoffs: Handoffs, data: bytes, descriptors: Sequence[int]) -> str:
    """Send a native handoff that must be refused; return the reason.

    The peer must be told the same reason as the daemon, and nothing of what was sent may stay.
    """
    with RawPeer(handoffs.path) as peer:
        before = open_descriptors()
        peer.send(data, descriptors)
        reason = await handoffs.refusal()
        assert await peer.line() == {"event": "failed", "reason": reason}
        assert await peer.line() is None
        left = set(open_descriptors()) - set(before)
        assert not left, f"left open: {left}"
    return reason
