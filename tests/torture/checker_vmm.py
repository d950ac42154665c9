"""A VMM whose guest uses all its memory at once, checks it, and measures how long it had to wait.

Run as ``python -m tests.torture.checker_vmm SECONDS HANDOFF NAME anonymous|memory-file DIRECTORY
BLOCK=LENGTH...``; SECONDS from one access to the next have the guest live through what happens,
until all its memory is there. Whoever starts a VMM would start it again if the daemon was killed
before it had said that it takes it; this one hands over again by itself.

From the moment at which the guest runs, its threads go through all pages in random order. Of each
the first bytes are written, of half of them before anything is read, and the rest is copied away.
When all memory is there nothing may have changed since. The blocks are left, numbered in the order
given, as files in DIRECTORY, and its device state. It tells its parent on standard output, one JSON
object a line.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Final

from postcopyd.vmm.client import Block, Destination, MigrationFailed

PAGE: Final = 4096
THREADS: Final = 3
STAMP: Final = 8
"""Bytes of each page that the guest writes."""
_HANDOFFS: Final = 20
_PAUSE: Final = 0.1
"""Seconds between two of them."""


def stamp(page: int) -> bytes:
    """What the guest writes to a page, by the page's number in all its memory."""
    return (page + 1).to_bytes(STAMP, "little")


class Processor(threading.Thread):
    """Writes to and reads from pages, as fast as they come."""

    def __init__(
        self, pages: list[tuple[int, int]], work: float, all_here: threading.Event
    ) -> None:
        """Take numbers and addresses of pages, and seconds from one access to the next."""
        super().__init__(daemon=True)
        self.pages = pages
        self._work = work
        self._all_here = all_here
        self.copies = ctypes.create_string_buffer(len(pages) * PAGE)
        self.longest = 0.0
        """Seconds that the longest access took."""

    def run(self) -> None:
        # Called through ctypes, so the interpreter lock is free while a page is on its way.
        copy = ctypes.CDLL(None).memcpy
        copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        target = ctypes.addressof(self.copies)
        for place, (number, address) in enumerate(self.pages):
            kept = target + place * PAGE
            begin = time.perf_counter()
            if number % 2:
                copy(address, stamp(number), STAMP)
            else:
                copy(kept, address, STAMP)
            self.longest = max(self.longest, time.perf_counter() - begin)
            copy(address, stamp(number), STAMP)
            copy(kept, address, PAGE)
            self._all_here.wait(self._work)

    def pages_that_changed(self) -> int:
        """How many pages differ now from what they were."""
        copies = memoryview(self.copies).cast("B")
        return sum(
            ctypes.string_at(address, PAGE) != copies[place * PAGE : (place + 1) * PAGE]
            for place, (_, address) in enumerate(self.pages)
        )


def say(**members: object) -> None:
    """Tell the parent."""
    print(json.dumps(members), flush=True)


def hand_over(path: str, name: str, blocks: list[Block]) -> Destination:
    """Hand over, again if the daemon was killed before it had taken it."""
    for _ in range(_HANDOFFS):
        try:
            return Destination(path, name, blocks)
        except (MigrationFailed, OSError) as error:
            failure = error
            time.sleep(_PAUSE)
    raise failure


def main() -> None:
    work, handoff, name, kind, directory_name, *descriptions = sys.argv[1:]
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
    pages = list(enumerate(addresses))
    random.shuffle(pages)
    all_here = threading.Event()
    processors = [
        Processor(pages[place::THREADS], float(work), all_here) for place in range(THREADS)
    ]
    with hand_over(handoff, name, blocks) as destination:
        say(listen=destination.listen)
        try:
            device_state = destination.wait_for_device_state()
            for processor in processors:
                processor.start()
            say(began=time.monotonic())
            (directory / "device-state").write_bytes(device_state)
            destination.loaded()
            destination.wait_for_completion()
            say(ended=time.monotonic())
            all_here.set()
        except MigrationFailed as error:
            say(failed=str(error))
            return
    for processor in processors:
        processor.join()
    for index, block in enumerate(blocks):
        memory = ctypes.string_at(block.address, block.length)
        (directory / f"block-{index}").write_bytes(memory)
    changed = sum(processor.pages_that_changed() for processor in processors)
    say(complete=True, changed=changed, longest=max(each.longest for each in processors))


if __name__ == "__main__":
    main()
