"""Firecracker as the VMM: it hands its memory over and says nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack

import msgspec

from postcopyd.incoming.vmm import DeviceLoad, FedBlock, GuestMemory, VmmFailure
from postcopyd.vmm.peer import Peer

KIND = "firecracker"


class FirecrackerFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who handed the memory over."""

    peer: Peer


class FirecrackerVmm:
    """`postcopyd.incoming.vmm.Vmm` for Firecracker. Made within a running event loop.

    There is nobody to ask or tell: its memory is fresh, it restores its device state from its own
    snapshot file, and up to 1.11 it closes its socket at once. Only its process tells its end.
    """

    def __init__(self, peer: Peer, pidfd: int, memory: GuestMemory, resources: ExitStack) -> None:
        """Take over `resources`, which close the pidfd and the userfaultfd when they are closed."""
        self._loop = asyncio.get_running_loop()
        self._peer = peer
        self._pidfd = pidfd
        self._memory = memory
        self._resources = resources
        self._gone = asyncio.Event()
        self._closed = False
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
        """For logs and reports, such as ``Firecracker, pid 4711, uid 0``."""
        return f"Firecracker, {self._peer}"

    @property
    def fed_blocks(self) -> tuple[FedBlock, ...]:
        """None: all its memory is watched."""
        return ()

    @property
    def thread_names(self) -> Mapping[int, str]:
        """None are known."""
        return {}

    @property
    def has_run(self) -> bool:
        """False: it says nothing."""
        return False

    @property
    def kind(self) -> str:
        """``firecracker``."""
        return KIND

    def facts(self) -> FirecrackerFacts:
        """Return who it is: its socket is closed."""
        return FirecrackerFacts(self._peer)

    @property
    def descriptors(self) -> Mapping[str, int]:
        """Its memory, and the process itself."""
        return self._memory.descriptors | {"pidfd": self._pidfd}

    def check_machine(self, machine: str) -> None:
        """Take any: it has restored its own devices."""

    async def advise(self) -> None:
        """Do nothing: its memory was mapped for the restore and is empty."""

    async def discard(self) -> None:
        """Do nothing: no huge pages form in memory that is registered since before the handoff."""

    def listening(self) -> None:
        """Do nothing: it runs already, and waits at the first missing page."""

    async def run(self, load: DeviceLoad) -> None:
        """Return at once: it runs already.

        :raise VmmFailure: if there is a device state, which nobody would load.
        """
        if load.device_state:
            raise VmmFailure(
                "Firecracker restores its own device state, from its snapshot file: the "
                f"{len(load.device_state)} bytes that the source sent cannot be loaded"
            )

    async def run_converged(self, load: DeviceLoad, rest: AsyncIterator[bytes]) -> None:
        """Refuse: there is a device state, which nobody would load.

        :raise VmmFailure: always.
        """
        raise VmmFailure(
            "Firecracker restores its own device state, from its snapshot file: the source must "
            "send none, and switch over to post-copy"
        )

    async def complete(self, missing: int) -> None:
        """Do nothing: it does not listen."""

    async def failed(self, reason: str) -> None:
        """Do nothing: it does not listen."""

    async def gone(self) -> None:
        """Return when the VMM has exited; after `close`, never."""
        await self._gone.wait()

    def close(self) -> None:
        """Release every descriptor. Idempotent."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._pidfd)
            self._resources.close()

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._gone.set()
