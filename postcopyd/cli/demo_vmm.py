"""The VMM of the demo: a process of its own whose threads walk memory that is still arriving.

Run as ``python -m postcopyd.cli.demo_vmm HANDOFF NAME BLOCK=FILE...``. It hands its memory over,
and from the moment at which it may run its threads visit every page in random order and compare it
with the file. It tells its parent on standard output, one JSON object a line.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns

import msgspec

from postcopyd.cli.demo_image import PAGE
from postcopyd.incoming.report import Histogram, LatencyReport
from postcopyd.vmm.client import Block, Destination, MigrationFailed

_WALKERS = 2
_WAITED = 20_000
"""Nanoseconds from which on an access counts as one that waited for its page."""

# Called through ctypes, so the interpreter lock is free while a page is on its way.
_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_compare.restype = ctypes.c_int


@dataclass(slots=True)
class Walk:
    """What one thread saw."""

    checked: int = 0
    wrong: list[str] = field(default_factory=list)
    waits: Histogram = field(default_factory=Histogram)


def say(**members: object) -> None:
    """Tell the parent."""
    print(json.dumps(members), flush=True)


def walk(pages: list[tuple[str, int, int]], result: Walk) -> None:
    """Visit `pages` (name, address here, address of what it must be) in the order given."""
    for name, address, expected in pages:
        started = perf_counter_ns()
        different = _compare(address, expected, PAGE)
        waited = perf_counter_ns() - started
        if waited >= _WAITED:
            result.waits.record(waited)
        if different:
            result.wrong.append(name)
        result.checked += 1


def main() -> int:
    """Be the VMM. Exit status 0 if every byte was right."""
    handoff, name, *images = sys.argv[1:]
    blocks, pages = [], []
    originals: dict[str, mmap.mmap] = {}
    for image in images:
        block_name, _, path = image.partition("=")
        with Path(path).open("rb") as file:
            original = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        originals[block_name] = original
        block = Block.anonymous(block_name, len(original))
        blocks.append(block)
        expected = ctypes.addressof(ctypes.c_char.from_buffer(original))
        pages += [
            (f"{block_name}+{offset:#x}", block.address + offset, expected + offset)
            for offset in range(0, len(original), PAGE)
        ]
    random.Random(1).shuffle(pages)  # noqa: S311 - a walk, not a secret
    results = [Walk() for _ in range(_WALKERS)]
    with Destination(handoff, name, blocks) as destination:
        say(listen=destination.listen)
        device_state = destination.wait_for_device_state()
        walkers = [
            threading.Thread(target=walk, args=(pages[place::_WALKERS], results[place]))
            for place in range(_WALKERS)
        ]
        for walker in walkers:
            walker.start()
        destination.loaded()
        try:
            destination.wait_for_completion()
        except MigrationFailed as error:
            # The walkers hang on missing memory, as they should: nothing could end them.
            say(failed=str(error))
            os._exit(1)
        for walker in walkers:
            walker.join()
        waits = Histogram()
        for result in results:
            waits.merge(result.waits)
        wrong = [page for result in results for page in result.wrong]
        say(
            checked=sum(result.checked for result in results),
            wrong=wrong,
            waits=msgspec.to_builtins(LatencyReport.of(waits)),
            device_state=hashlib.sha256(device_state).hexdigest(),
            sha256={block.name: hashlib.sha256(block.view).hexdigest() for block in blocks},
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
