"""The VMM of the bench: hands its memory to postcopyd and lets the C guest walk it.

``python -m tests.bench.vmm LIBRARY HANDOFF NAME PAGES HOST_PAGE FAULTS EXPECT_ZERO VERIFY``
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading

from postcopyd.kernel.memory import advise
from postcopyd.vmm.client import Block, Destination

PAGE = 4096
_MADV_NOHUGEPAGE = 15


def main() -> None:
    """Run one migration; print where the source shall connect, then one line of JSON."""
    library, handoff, name, *numbers = sys.argv[1:]
    pages, host_page, fault_count, expect_zero, verify = map(int, numbers)
    guest = ctypes.CDLL(library)
    guest.walk.restype = guest.verify.restype = ctypes.c_uint64
    block = Block.anonymous("pc.ram", pages * PAGE, host_page)
    if host_page == PAGE:
        advise(block.address, block.length, _MADV_NOHUGEPAGE)
    latencies = (ctypes.c_uint64 * (min(fault_count, pages) + 1))()
    wrong = ctypes.c_uint64()
    faults = 0

    def walk() -> None:
        nonlocal faults
        faults = guest.walk(
            ctypes.c_void_p(block.address),
            ctypes.c_uint64(pages * PAGE // host_page),
            ctypes.c_uint64(host_page),
            ctypes.c_uint64(fault_count),
            ctypes.c_int(expect_zero),
            latencies,
            ctypes.byref(wrong),
        )

    with Destination(handoff, name, [block]) as destination:
        print(destination.listen[0].rpartition(":")[2], flush=True)
        destination.wait_for_device_state()
        walker = threading.Thread(target=walk)
        destination.loaded()
        walker.start()
        destination.wait_for_completion()
        walker.join()
    errors = wrong.value
    if verify:
        errors += guest.verify(
            ctypes.c_void_p(block.address), ctypes.c_uint64(pages), ctypes.c_int(expect_zero)
        )
    told = {"wrong": errors, "verified": pages if verify else 0, "latencies": latencies[:faults]}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
