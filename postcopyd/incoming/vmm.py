"""What the engine asks of a VMM, whichever VMM it is.

The rooms below (`postcopyd.vmm`) implement `Vmm` for the native handoff, for Firecracker and for
the others; the engine never learns which one it talks to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from postcopyd.kernel.userfaultfd import Userfaultfd


@dataclass(frozen=True, slots=True)
class HandedBlock:
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


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """The memory of one VMM and the userfaultfd that watches it. The `Vmm` owns the descriptors."""

    blocks: tuple[HandedBlock, ...]
    userfaultfd: Userfaultfd
    registered: bool
    """True when the VMM registered its memory before the handoff, as Firecracker does."""


class VmmFailure(Exception):
    """The VMM could not do what was asked; the text says why."""


class Vmm(Protocol):
    """A VMM whose memory is being filled. Every call but the awaited ones returns at once.

    The awaited calls raise `VmmFailure` when the VMM refuses, breaks the protocol or goes away.
    """

    @property
    def memory(self) -> GuestMemory:
        """The blocks and the userfaultfd, unchanged until `close`."""

    @property
    def process_id(self) -> int:
        """Of the VMM, as this process sees it; 0 when it is in a namespace we do not see."""

    @property
    def description(self) -> str:
        """For logs and reports, such as ``pid 4711, uid 0``."""

    async def advise(self) -> None:
        """Inhibit the balloon, put memory locks aside and empty all blocks of private memory."""

    async def discard(self) -> None:
        """Forbid huge pages from forming: asked once, before the first discard is applied."""

    def listening(self) -> None:
        """Tell that faults are served from now on."""

    async def run(self, device_state: bytes) -> None:
        """Hand over the device state; return when the VMM has loaded it."""

    def complete(self) -> None:
        """Tell that all memory is there: balloon, huge pages and locks may come back."""

    def failed(self, reason: str) -> None:
        """Tell that the migration has ended without all memory."""

    async def gone(self) -> None:
        """Return when the VMM has exited or, where it keeps its socket, has closed it."""

    def close(self) -> None:
        """Release every descriptor. Idempotent."""
