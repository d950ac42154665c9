"""What the engine asks of a VMM, whichever VMM it is.

The rooms below (`postcopyd.vmm`) implement `Vmm` for the native handoff, for Firecracker and for
the others; the engine never learns which one it talks to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

import msgspec

from postcopyd.kernel.userfaultfd import Userfaultfd


class HandedBlock(msgspec.Struct, frozen=True):
    """One RAM block as the VMM handed it over."""

    name: str
    """The name by which the source calls the block."""
    address: int
    """Where the block is mapped in the VMM, bytes."""
    length: int
    """Bytes, a multiple of `page_size`."""
    page_size: int
    """Host page size that backs the block: 4096, 2 MiB or 1 GiB."""
    memory_file: int | None
    """Descriptor of the shared memory file behind the block; None for private memory."""
    file_offset: int
    """Where in `memory_file` the block begins, bytes."""


class GuestMemory(msgspec.Struct, frozen=True):
    """The memory of one VMM and the userfaultfd that watches it. The `Vmm` owns the descriptors."""

    blocks: tuple[HandedBlock, ...]
    userfaultfd: Userfaultfd
    registered: bool
    """True when the VMM registered its memory before the handoff, as Firecracker does."""

    @property
    def descriptors(self) -> dict[str, int]:
        """The userfaultfd and each memory file once, by names of their own.

        The names follow the order of the blocks: in a successor, which gets other numbers for the
        same descriptors, each file has the same name again.
        """
        files = dict.fromkeys(block.memory_file for block in self.blocks)
        files.pop(None, None)
        return {"userfaultfd": self.userfaultfd.fileno()} | {
            f"memory-file-{number}": file for number, file in enumerate(files) if file is not None
        }


class FedBlock(msgspec.Struct, frozen=True):
    """A RAM block that is not watched: its pages are collected and come with the device state."""

    name: str
    length: int
    """Bytes that the VMM has in use."""
    maximum: int
    """The longest that it can become: the source's length may be anything up to it."""


class CollectedBlock(msgspec.Struct, frozen=True):
    """The content of a block that is not watched."""

    name: str
    length: int
    """Bytes, as the source says."""
    content: memoryview
    """All of it, `length` bytes; valid until the load is done."""


class DeviceLoad(msgspec.Struct, frozen=True):
    """What a VMM needs to become the guest."""

    configuration: bytes
    """Stream header and configuration, as they were received."""
    device_state: bytes
    """The device sections, one behind the other. In a pre-copy that converged only those bytes that
    came with the first of them: the others follow."""
    blocks: tuple[CollectedBlock, ...]
    """One for each `FedBlock`."""
    collected: asyncio.Event
    """Set when the content of these blocks is whole."""
    unheard: Callable[[str | None], None]
    """Told why it cannot be found out whether a VMM that has all of this runs; None when it can be
    again."""
    given: Callable[[], None]
    """Told that the VMM is about to have everything, where it runs then before it says so: until
    `Vmm.run` returns or fails nobody knows whether the guest has run."""


class VmmFailure(Exception):
    """The VMM could not do what was asked; the text says why."""

    def __init__(self, reason: str, *, may_have_run: bool = False) -> None:
        """Say why, and whether the guest may have run in it all the same."""
        super().__init__(reason)
        self.may_have_run = may_have_run


class Vmm(Protocol):
    """A VMM whose memory is being filled. Every call but the awaited ones returns at once.

    The awaited calls raise `VmmFailure` when the VMM refuses, breaks the protocol or goes away, but
    for `complete` and `failed`, which do what they can.
    """

    @property
    def memory(self) -> GuestMemory:
        """The blocks and the userfaultfd, unchanged until `close`."""

    @property
    def fed_blocks(self) -> tuple[FedBlock, ...]:
        """The blocks that it has beside those of `memory`."""

    @property
    def process_id(self) -> int:
        """Of the VMM, as this process sees it; 0 when it is in a namespace we do not see."""

    @property
    def description(self) -> str:
        """For logs and reports, such as ``pid 4711, uid 0``."""

    @property
    def thread_names(self) -> Mapping[int, str]:
        """Thread id -> name, such as ``vcpu0``, of the threads whose waiting is told one by one."""

    @property
    def has_run(self) -> bool:
        """True when it is known to have run, also from what it has said to a predecessor."""

    @property
    def kind(self) -> str:
        """By which a successor of this process finds who can go on with `facts`."""

    def facts(self) -> object:
        """Return what a successor must know of it, as values of JSON; it may change."""

    @property
    def descriptors(self) -> Mapping[str, int]:
        """All that a successor needs, the userfaultfd and memory files too, by names of its own."""

    def check_machine(self, machine: str) -> None:
        """Check that the VMM is a machine of the source's type.

        :raise VmmFailure: if it is not.
        """

    async def advise(self) -> None:
        """Inhibit the balloon, put memory locks aside and empty all blocks of private memory."""

    async def discard(self) -> None:
        """Forbid huge pages from forming: asked once, before the first discard is applied."""

    def listening(self) -> None:
        """Tell that faults are served from now on."""

    async def run(self, load: DeviceLoad) -> None:
        """Have the device state loaded; return when the VMM runs.

        A failure means that the guest has not run, unless it says otherwise: another VMM may take
        its place.
        """

    async def run_converged(self, load: DeviceLoad, rest: AsyncIterator[bytes]) -> None:
        """As `run`, for a pre-copy that ended without a switchover.

        :param rest: what follows `load.device_state` in the stream, without an end: only the VMM
            knows where it is.
        """

    async def complete(self, missing: int) -> None:
        """Tell that no more memory comes: balloon, huge pages and locks may come back.

        :param missing: bytes that never came and are memory errors; 0 when all memory is there.
        """

    async def failed(self, reason: str) -> None:
        """Tell that the migration has ended without all memory."""

    async def gone(self) -> None:
        """Return when the VMM has exited or, where it keeps its socket, has closed it."""

    def close(self) -> None:
        """Release every descriptor. Idempotent."""
