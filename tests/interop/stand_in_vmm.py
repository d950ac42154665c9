"""A VMM that has memory and device state but no processor: threads of it use the memory instead.

Run as ``python -m tests.interop.stand_in_vmm HANDOFF NAME anonymous|memory-file DIRECTORY
BLOCK=LENGTH...``. From the moment at which the guest could run, its threads read every page once,
in random order. When all memory is there it checks that no page has changed since it was read, and
leaves its device state and its blocks, numbered in the order given, as files in DIRECTORY. It tells
its parent on standard output, one JSON object a line.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import threading
from pathlib import Path
from typing import Final

from postcopyd.vmm.client import Block, Destination, MigrationFailed

PAGE: Final = 4096
THREADS: Final = 3


class Reader(threading.Thread):
    """Copies pages away in the order given, as a guest that reads them would."""

    def __init__(self, addresses: list[int]) -> None:
        super().__init__(daemon=True)
        self.addresses = addresses
        self.copies = ctypes.create_string_buffer(len(addresses) * PAGE)

    def run(self) -> None:
        # Called through ctypes, so the interpreter lock is free while a page is on its way.
        copy = ctypes.CDLL(None).memcpy
        copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        target = ctypes.addressof(self.copies)
        for index, address in enumerate(self.addresses):
            copy(target + index * PAGE, address, PAGE)

    def pages_that_changed(self) -> int:
        """How many pages differ now from what was read."""
        copies = memoryview(self.copies).cast("B")
        return sum(
            ctypes.string_at(address, PAGE) != copies[index * PAGE : (index + 1) * PAGE]
            for index, address in enumerate(self.addresses)
        )


def say(**members: object) -> None:
    """Tell the parent."""
    print(json.dumps(members), flush=True)


def main() -> None:
    handoff, name, kind, directory_name, *descriptions = sys.argv[1:]
    directory = Path(directory_name)
    make_block = {"anonymous": Block.anonymous, "memory-file": Block.memory_file}[kind]
    blocks = [
        make_block(block_name, int(length))
        for block_name, length in (description.split("=") for description in descriptions)
    ]
    addresses = [
        address
        for block in blocks
        for address in range(block.address, block.address + block.length, PAGE)
    ]
    random.shuffle(addresses)
    readers = [Reader(addresses[place::THREADS]) for place in range(THREADS)]
    with Destination(handoff, name, blocks) as destination:
        say(listen=destination.listen)
        try:
            device_state = destination.wait_for_device_state()
            for reader in readers:
                reader.start()
            (directory / "device-state").write_bytes(device_state)
            destination.loaded()
            destination.wait_for_completion()
        except MigrationFailed as error:
            say(failed=str(error))
            return
    for reader in readers:
        reader.join()
    for index, block in enumerate(blocks):
        memory = ctypes.string_at(block.address, block.length)
        (directory / f"block-{index}").write_bytes(memory)
    say(complete=True, changed=sum(reader.pages_that_changed() for reader in readers))


if __name__ == "__main__":
    main()
