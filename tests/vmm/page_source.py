"""The least that an engine must do for a VMM: answer its faults with what the source holds."""

from __future__ import annotations

import asyncio

from postcopyd.incoming.vmm import HandedBlock, Vmm
from postcopyd.kernel import userfaultfd as kernel
from postcopyd.kernel.memory import Mapping
from postcopyd.kernel.userfaultfd import Operation, RegisterMode
from tests.vmm.content import PAGE, content_of


class PageSource:
    """Places pages in the memory of `vmm`: those it waits for, and all of them when told to."""

    def __init__(self, vmm: Vmm) -> None:
        self._blocks = vmm.memory.blocks
        self._registered = vmm.memory.registered
        self._userfaultfd = vmm.memory.userfaultfd
        self._loop = asyncio.get_running_loop()
        self._staging = Mapping.anonymous(max(block.page_size for block in self._blocks))
        self._put_off: set[int] = set()
        self._removed: set[int] = set()
        self.faults = 0

    def listen(self) -> None:
        """Register what is not registered, answer faults from now on."""
        if not self._registered:
            for block in self._blocks:
                self._userfaultfd.register(
                    block.address, block.length, RegisterMode.MISSING, Operation.COPY
                )
        self._loop.add_reader(self._userfaultfd.fileno(), self._read)

    def place_everything(self) -> None:
        """Place what nobody has waited for yet."""
        for block in self._blocks:
            for address in range(block.address, block.address + block.length, block.page_size):
                if address not in self._removed:
                    self._place(block, address)

    def finish(self) -> None:
        """Let the memory be like any other: every page must have been placed."""
        self.stop()
        for block in self._blocks:
            self._userfaultfd.unregister(block.address, block.length)

    def stop(self) -> None:
        """Answer no more."""
        if not self._staging.closed:
            self._loop.remove_reader(self._userfaultfd.fileno())
            self._staging.close()

    def _read(self) -> None:
        for event, first, second, _ in self._userfaultfd.read_events():
            if event == kernel.EVENT_REMOVE:
                self._removed.update(range(first, second, PAGE))
            elif event == kernel.EVENT_PAGEFAULT:
                self.faults += 1
                self._answer(second)
        self._retry()

    def _answer(self, address: int) -> None:
        for block in self._blocks:
            if block.address <= address < block.address + block.length:
                self._place(block, address - address % block.page_size)

    def _place(self, block: HandedBlock, address: int) -> None:
        content = bytes(block.page_size)
        if address not in self._removed:
            first = (address - block.address) // PAGE
            pages = range(first, first + block.page_size // PAGE)
            content = b"".join(content_of(block.name, page) for page in pages)
        self._staging.view[: len(content)] = content
        result = self._userfaultfd.copy(address, self._staging.address, block.page_size)
        if result == kernel.PRESENT:
            self._userfaultfd.wake(address, block.page_size)
        elif result == kernel.CHANGING:
            if not self._put_off:
                self._loop.call_later(0.001, self._retry)
            self._put_off.add(address)
        elif result not in kernel.GONE:
            assert result == block.page_size, result

    def _retry(self) -> None:
        if not self._staging.closed:
            put_off, self._put_off = self._put_off, set()
            for address in put_off:
                self._answer(address)
