"""Host pages that are larger than the pages on the wire: from records to pages that can be placed.

Each connection has an assembler of its own, because it may be in the middle of a host page while
another one brings the next (qemu-wire, 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

from postcopyd.ram.block import RamBlock
from postcopyd.ram.host_page import HostPageAssembly, HostPageInterrupted
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Pages, ZeroPages

PlaceHostPage = Callable[[RamBlock, int, memoryview, int], bool]
"""Places the host page at an offset of a block. Its content is given as a view and, for the kernel,
as an address here, which is 0 when the page is all zero: the view then has anything. Returns False
when it was put off; the content stays as it is until the next page is assembled."""


class Assembler:
    """Assembles the host pages of one connection and has them placed."""

    def __init__(self, place: PlaceHostPage) -> None:
        self._place = place
        self._assemblies: dict[int, HostPageAssembly] = {}
        self._rest: tuple[RamBlock, Pages | ZeroPages, int, int] | None = None

    @property
    def unfinished(self) -> bool:
        """True in the middle of a host page."""
        return any(assembly.unfinished for assembly in self._assemblies.values())

    @property
    def filled(self) -> int:
        """How many bytes of an unfinished host page are here."""
        return sum(assembly.filled for assembly in self._assemblies.values())

    @property
    def waiting(self) -> bool:
        """True while a part of a message was put off: call `go_on` before anything else."""
        return self._rest is not None

    def take(self, block: RamBlock, message: Pages | ZeroPages, target_page_size: int) -> bool:
        """Assemble the pages of `message`.

        :return: False when something was put off; the message's views must stay valid.
        :raise ProtocolError: if a host page is interrupted.
        """
        return self._take(block, message, target_page_size, 0)

    def go_on(self) -> bool:
        """Go on with a message of which a part was put off. As `take`."""
        if self._rest is None:
            return True
        block, message, target_page_size, place = self._rest
        self._rest = None
        return self._take(block, message, target_page_size, place)

    def _take(
        self, block: RamBlock, message: Pages | ZeroPages, target_page_size: int, place: int
    ) -> bool:
        assembly = self._assemblies.get(block.page_size)
        if assembly is None:
            assembly = self._assemblies[block.page_size] = HostPageAssembly(block.page_size)
        offsets = message.offsets
        in_one_piece = contiguous(message, target_page_size)
        while place < len(offsets):
            offset = offsets[place]
            count = 1
            if in_one_piece:
                to_border = block.page_size - offset % block.page_size
                count = min(len(offsets) - place, to_border // target_page_size)
            length = count * target_page_size
            payload = None
            if isinstance(message, Pages):
                start = place * message.stride
                payload = message.data[start : start + length]
            try:
                zero = assembly.add(block.name, offset, length, payload)
            except HostPageInterrupted as error:
                raise ProtocolError(str(error), None) from error
            place += count
            if zero is not None:
                # Before it is placed: whatever happens there, the rest is not lost.
                self._rest = (block, message, target_page_size, place)
                host_page = offset - offset % block.page_size
                address = 0 if zero else assembly.address
                if not self._place(block, host_page, assembly.view, address):
                    return False
                self._rest = None
        return True

    def drop(self) -> None:
        """Forget what is unfinished: after a break the source sends it whole again."""
        self._rest = None
        for assembly in self._assemblies.values():
            assembly.drop()

    def close(self) -> None:
        """Release the buffers. Idempotent."""
        self._rest = None
        for assembly in self._assemblies.values():
            assembly.close()
        self._assemblies.clear()


def contiguous(message: Pages | ZeroPages, target_page_size: int) -> bool:
    """Tell whether the pages are neighbours in the block and, unless zero, in our memory."""
    offsets = message.offsets
    if isinstance(message, Pages) and message.stride != target_page_size:
        return False
    return type(offsets) is range and offsets.step == target_page_size
