"""What post-copy does to memory, done once each on real memory of this process.

A trial returns what was seen. It raises `Missing` when this host lacks something, and OSError when
the kernel refuses; both are findings of the host check.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform

from postcopyd.incoming.trial_memory import (
    CONTENT,
    Missing,
    expect_placed,
    open_any,
    trial_memory,
    unexpected,
)
from postcopyd.kernel import memory, memory_lock
from postcopyd.kernel.huge_pages import free_huge_pages, huge_page_sizes
from postcopyd.kernel.memory import HOST_PAGE_SIZE, Mapping
from postcopyd.kernel.system_calls import libc
from postcopyd.kernel.userfaultfd import (
    EVENT_REMOVE,
    EVENT_UNMAP,
    MODE_DONT_WAKE,
    PAGEFAULT_MINOR,
    PAGEFAULT_WRITE_PROTECT,
    Feature,
    Operation,
    RegisterMode,
    Userfaultfd,
)

_NOTHING = bytes(len(CONTENT))


# -- the userfaultfd itself ----------------------------------------------------------------------


def opening() -> str:
    """Open a userfaultfd, in whichever way."""
    open_any().close()
    return "a userfaultfd can be opened"


def kernel_faults() -> str:
    """Have a system call wait for a page."""
    Userfaultfd.open().close()
    with trial_memory() as trial:
        mapping = trial.private()
        trial.register(mapping)
        reading, writing = os.pipe()
        try:
            call = trial.call(libc.write, writing, mapping.address, len(CONTENT))
            trial.event()
            trial.copy(mapping)
            if not call.returned():
                raise unexpected("the page was placed, but the system call still waits for it")
            if (content := os.read(reading, len(CONTENT))) != CONTENT:
                raise unexpected(f"{CONTENT!r} was placed, but the system call saw {content!r}")
        finally:
            os.close(reading)
            os.close(writing)
    return "a write(2) from a missing page waited for it"


def interface() -> str:
    """Do the handshake, version 0xAA."""
    with open_any() as userfaultfd:
        offered = userfaultfd.handshake(Feature(0))
    names = ", ".join(feature.name or "" for feature in Feature if feature in offered)
    return f"Linux {platform.release()} offers {names or 'no features'}"


def registering() -> str:
    """Register memory and unregister it."""
    with trial_memory() as trial:
        mapping = trial.private()
        operations = trial.register(mapping)
        trial.userfaultfd.unregister(mapping.address, mapping.length)
        trial.read(mapping.address).expect(_NOTHING)
    names = ", ".join(operation.name or "" for operation in Operation if operation in operations)
    return f"private memory allows {names}"


# -- placing -------------------------------------------------------------------------------------


def copying() -> str:
    """Answer a fault with a page."""
    return _missing_page(huge=False, shared=False)


def zero_pages() -> str:
    """Answer a fault with a zero page."""
    with trial_memory() as trial:
        mapping = trial.private()
        trial.register(mapping, needed=Operation.ZEROPAGE)
        read, _ = trial.faulting_read(mapping.address)
        result = trial.userfaultfd.zeropage(mapping.address, mapping.length)
        expect_placed("UFFDIO_ZEROPAGE", result, mapping.length)
        read.expect(_NOTHING)
    return "a thread that waited for a page has read zeros"


def waking() -> str:
    """Place a page without waking, and wake afterwards."""
    with trial_memory() as trial:
        mapping = trial.private()
        trial.register(mapping)
        read, _ = trial.faulting_read(mapping.address)
        trial.copy(mapping, MODE_DONT_WAKE)
        if not read.waits:
            raise unexpected("the thread went on before it was woken")
        trial.userfaultfd.wake(mapping.address, mapping.length)
        read.expect(CONTENT)
    return "a thread that waited for a page went on when it was woken"


def shared_memory() -> str:
    """Answer a fault in a memory file with a page."""
    return _missing_page(huge=False, shared=True)


def huge_pages() -> str:
    """Answer a fault in huge pages with a page."""
    return _missing_page(huge=True, shared=True)


def _missing_page(*, huge: bool, shared: bool) -> str:
    features = Feature(0)
    if shared:
        features = Feature.MISSING_HUGETLBFS if huge else Feature.MISSING_SHMEM
    page_size = _free_huge_page_size() if huge else HOST_PAGE_SIZE
    with trial_memory(features) as trial:
        mapping = trial.shared(page_size)[0] if shared else trial.private()
        trial.register(mapping)
        read, _ = trial.faulting_read(mapping.address)
        trial.copy(mapping)
        read.expect(CONTENT)
    return f"a thread that waited for a page of {page_size >> 10} KiB has read it"


def _free_huge_page_size() -> int:
    """Return the size of the smallest huge pages of which one can be had."""
    sizes = huge_page_sizes()
    if not sizes:
        raise Missing(
            "this kernel has no huge pages", "Use a kernel that is built with CONFIG_HUGETLBFS"
        )
    for size in sizes:
        if free_huge_pages(size):
            return size
    names = ", ".join(f"{size >> 10} KiB" for size in sizes)
    raise Missing(
        f"no huge page is free (sizes: {names})",
        "Reserve as many as the guests need: sysctl vm.nr_hugepages=N, or hugepages=N at boot",
    )


def minor_faults_shared() -> str:
    """Map a page that is in a memory file already."""
    return _minor_fault(HOST_PAGE_SIZE, Feature.MINOR_SHMEM | Feature.MISSING_SHMEM)


def minor_faults_huge() -> str:
    """Map a huge page that is in a memory file already."""
    return _minor_fault(_free_huge_page_size(), Feature.MINOR_HUGETLBFS | Feature.MISSING_HUGETLBFS)


def _minor_fault(page_size: int, features: Feature) -> str:
    with trial_memory(features) as trial:
        mapping, other = trial.shared(page_size)
        trial.register(other)
        trial.copy(other)
        trial.register(mapping, RegisterMode.MINOR, Operation.CONTINUE)
        read, (flags, _, _) = trial.faulting_read(mapping.address)
        if not flags & PAGEFAULT_MINOR:
            raise unexpected(f"the fault is not marked as minor: flags {flags:#x}")
        result = trial.userfaultfd.continue_range(mapping.address, page_size)
        expect_placed("UFFDIO_CONTINUE", result, page_size)
        read.expect(CONTENT)
    return f"a thread has read a page of {page_size >> 10} KiB that was in the file already"


# -- what today's kernels add --------------------------------------------------------------------


def removals() -> str:
    """Give memory back, and unmap memory."""
    with trial_memory(Feature.EVENT_REMOVE | Feature.EVENT_UNMAP) as trial:
        mapping = trial.private()
        trial.register(mapping)
        end = mapping.address + mapping.length
        for event, function, arguments in (
            (EVENT_REMOVE, libc.madvise, (mmap.MADV_DONTNEED,)),
            (EVENT_UNMAP, libc.munmap, ()),
        ):
            call = trial.call(function, mapping.address, mapping.length, *arguments)
            start_and_end = trial.event(event)[:2]
            if start_and_end != (mapping.address, end):
                raise unexpected(f"event {event:#x} told of another range")
            if not call.returned():
                raise unexpected(f"event {event:#x} was read, but who caused it still waits")
    return "memory given back and memory unmapped were reported"


def write_protection() -> str:
    """Catch a write to a page of private memory."""
    return _write_protection(Feature.PAGEFAULT_FLAG_WP, shared=False)


def write_protection_shared() -> str:
    """Catch a write to a page of a memory file."""
    return _write_protection(
        Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.MISSING_SHMEM, shared=True
    )


def _write_protection(features: Feature, *, shared: bool) -> str:
    with trial_memory(features) as trial:
        mapping = trial.shared()[0] if shared else trial.private()
        trial.register(
            mapping, RegisterMode.MISSING | RegisterMode.WRITE_PROTECT, Operation.WRITEPROTECT
        )
        trial.copy(mapping)
        trial.userfaultfd.writeprotect(mapping.address, mapping.length, True)
        call = trial.call(libc.memset, mapping.address, CONTENT[0] + 1, len(CONTENT))
        flags, _, _ = trial.event()
        if not flags & PAGEFAULT_WRITE_PROTECT:
            raise unexpected(f"the fault is not marked as one of protection: flags {flags:#x}")
        trial.read(mapping.address).expect(CONTENT)
        trial.userfaultfd.writeprotect(mapping.address, mapping.length, False)
        if not call.returned():
            raise unexpected("the protection was lifted, but the thread that writes still waits")
        trial.read(mapping.address).expect(bytes([CONTENT[0] + 1]) * len(CONTENT))
    return "a write to a protected page waited until that was lifted"


def poison() -> str:
    """Make a page a memory error."""
    with trial_memory(Feature.POISON) as trial:
        mapping = trial.private()
        trial.register(mapping, needed=Operation.POISON)
        result = trial.userfaultfd.poison(mapping.address, mapping.length)
        expect_placed("UFFDIO_POISON", result, mapping.length)
        reading, writing = os.pipe()
        try:
            # By a system call: a plain access would end this process with SIGBUS.
            os.write(writing, mapping.view[:1])
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
        else:
            raise unexpected("the page was poisoned, but it can be read")
        finally:
            os.close(reading)
            os.close(writing)
    return "a poisoned page could not be read"


def moving() -> str:
    """Answer a fault with a page taken from elsewhere in the process."""
    with trial_memory(Feature.MOVE) as trial:
        mapping = trial.private()
        source = trial.private()
        trial.register(mapping, needed=Operation.MOVE)
        source.view[: len(CONTENT)] = CONTENT
        read, _ = trial.faulting_read(mapping.address)
        result = trial.userfaultfd.move(mapping.address, source.address, mapping.length)
        expect_placed("UFFDIO_MOVE", result, mapping.length)
        read.expect(CONTENT)
        if source.view[: len(CONTENT)] != _NOTHING:
            raise unexpected("the page was moved, but it is still where it came from")
    return "a page was moved to where a thread waited for it"


def exact_address() -> str:
    """Fault in the middle of a page."""
    with trial_memory(Feature.EXACT_ADDRESS) as trial:
        mapping = trial.private()
        trial.register(mapping)
        touched = mapping.address + 0x123
        read, (_, address, _) = trial.faulting_read(touched)
        trial.copy(mapping)
        read.expect(_NOTHING)
    if address != touched:
        raise unexpected(f"a fault at {touched:#x} was reported at {address:#x}")
    return "a fault was reported at its very byte"


def thread_id() -> str:
    """Fault in a thread that is known."""
    with trial_memory(Feature.THREAD_ID) as trial:
        mapping = trial.private()
        trial.register(mapping)
        read, (_, _, thread) = trial.faulting_read(mapping.address)
        trial.copy(mapping)
        read.expect(CONTENT)
    if thread != read.thread_id:
        raise unexpected(f"a fault of thread {read.thread_id} was reported of {thread}")
    return "a fault was reported with the thread that waits"


def memory_locks() -> str:
    """Lock all memory, put that aside to empty some, and lock it again.

    What this process had locked before is locked again, but what it locked at once is then
    locked when it is touched.
    """
    before = memory_lock.locked_bytes()
    with Mapping.anonymous(HOST_PAGE_SIZE) as mapping:
        try:
            memory_lock.lock_all(on_fault=True)
            if _can_be_emptied(mapping.address, mapping.length):
                raise unexpected("memory was locked, but could be emptied")
            memory_lock.unlock_all()
            if not _can_be_emptied(mapping.address, mapping.length):
                raise unexpected("memory was unlocked, but could not be emptied")
            memory_lock.lock_all(on_fault=True)
            locked = memory_lock.locked_bytes()
        finally:
            memory_lock.unlock_all()
            if before:
                memory_lock.lock_all(on_fault=True)
    if not locked:
        raise unexpected("memory was locked, but the kernel counts none")
    return f"{locked >> 20} MiB were locked, let go and locked again"


def _can_be_emptied(address: int, length: int) -> bool:
    try:
        memory.advise(address, length, mmap.MADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True
