"""A guest that knows what its memory has to hold, and how long it had to wait for it.

Run as ``python -m tests.torture.checked_guest HANDOFF NAME anonymous|memory-file IMAGE SEED
BLOCK=LENGTH...``. IMAGE is the directory with the source's files: one of each block's name, and
``state``. From the moment at which the guest could run its threads visit every page once, in random
order: what is read is compared with the image, half of the pages are written to, and pages that
were visited before are looked at again. When all memory is there it is compared once more, as a
whole. The process tells on standard output, one JSON object a line, where its source is to connect
and how it has ended.
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
_WRITTEN: Final = 64
"""Bytes that a write changes."""

_copy = ctypes.CDLL(None).memcpy
"""Called through ctypes, so the interpreter lock is free while a page is on its way."""
_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Memory:
    """One block, and what it has to hold."""

    def __init__(self, block: Block, image: Path) -> None:
        self.block = block
        self.expected = bytearray((image / block.name).read_bytes())

    def is_right(self) -> bool:
        """Compare all of it."""
        return ctypes.string_at(self.block.address, self.block.length) == bytes(self.expected)


class Visitor(threading.Thread):
    """Visits pages that no other thread visits."""

    def __init__(self, pages: list[tuple[Memory, int]], seed: str) -> None:
        super().__init__(daemon=True)
        self._pages = pages
        self._numbers = random.Random(seed)
        self._seen = ctypes.create_string_buffer(PAGE)
        self.wrong: list[str] = []
        self.longest_wait = 0.0
        """Seconds."""

    def run(self) -> None:
        for place, (memory, offset) in enumerate(self._pages):
            self._compare(memory, offset)
            if self._numbers.random() < 0.5:
                self._write(memory, offset)
            self._compare(*self._pages[self._numbers.randrange(place + 1)])

    def _compare(self, memory: Memory, offset: int) -> None:
        begin = time.perf_counter()
        _copy(ctypes.addressof(self._seen), memory.block.address + offset, PAGE)
        self.longest_wait = max(self.longest_wait, time.perf_counter() - begin)
        if self._seen.raw != memory.expected[offset : offset + PAGE]:
            zeros = " reads as zeros" if self._seen.raw == bytes(PAGE) else ""
            self.wrong.append(f"{memory.block.name} {offset:#x}{zeros}")

    def _write(self, memory: Memory, offset: int) -> None:
        offset += self._numbers.randrange(PAGE - _WRITTEN)
        data = self._numbers.randbytes(_WRITTEN)
        ctypes.memmove(memory.block.address + offset, data, _WRITTEN)
        memory.expected[offset : offset + _WRITTEN] = data


def say(**members: object) -> None:
    """Tell the parent."""
    print(json.dumps(members), flush=True)


def main() -> None:
    handoff, name, kind, image_name, seed, *descriptions = sys.argv[1:]
    image = Path(image_name)
    make_block = {"anonymous": Block.anonymous, "memory-file": Block.memory_file}[kind]
    blocks = [
        make_block(block_name, int(length))
        for block_name, length in (description.split("=") for description in descriptions)
    ]
    memories = [Memory(block, image) for block in blocks]
    pages = [
        (memory, offset) for memory in memories for offset in range(0, memory.block.length, PAGE)
    ]
    random.Random(seed).shuffle(pages)
    visitors = [Visitor(pages[place::THREADS], f"{seed} {place}") for place in range(THREADS)]
    with Destination(handoff, name, blocks) as destination:
        say(listen=destination.listen)
        runs = False
        try:
            device_state = destination.wait_for_device_state()
            runs = True
            for visitor in visitors:
                visitor.start()
            destination.loaded()
            destination.wait_for_completion()
        except MigrationFailed as error:
            say(failed=str(error), runs=runs)
            return
    for visitor in visitors:
        visitor.join()
    wrong = [place for visitor in visitors for place in visitor.wrong]
    wrong += [f"{memory.block.name} at the end" for memory in memories if not memory.is_right()]
    if device_state != (image / "state").read_bytes():
        wrong.append("the device state")
    say(wrong=wrong[:10], longest_wait=max(visitor.longest_wait for visitor in visitors))


if __name__ == "__main__":
    main()
