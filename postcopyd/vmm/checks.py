"""What must hold of the memory that a VMM hands over. Each check raises `HandoffRefused`."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from postcopyd.incoming.vmm import HandedBlock
from postcopyd.kernel import memory_file
from postcopyd.kernel.userfaultfd import (
    Feature,
    Operation,
    RegisterMode,
    Userfaultfd,
    features_of,
    is_userfaultfd,
)

NAME_LIMIT = 255
"""Longest name of a migration or a block, bytes: a block's name has one length byte in a stream."""

# What breaks post-copy when the VMM has enabled it, and why.
_UNWANTED = {
    Feature.EVENT_FORK: "the memory of a forked child could not be kept from reading zeros",
    Feature.EVENT_REMAP: "memory that moves could not be told from memory that is missing",
    Feature.SIGBUS: "a fault would kill the VMM instead of waiting for its page",
}


class HandoffRefused(Exception):
    """The handoff is not accepted; the text tells the VMM why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_name(what: str, name: str) -> None:
    """Check the name of a migration or a block."""
    size = len(name.encode())
    if size == 0:
        raise HandoffRefused(f"the name of {what} is empty")
    if size > NAME_LIMIT:
        raise HandoffRefused(f"the name of {what} has {size} bytes, at most {NAME_LIMIT} are legal")
    if "\0" in name:
        raise HandoffRefused(f"the name of {what} has a NUL: {name!r}")


def check_blocks(blocks: Sequence[HandedBlock]) -> None:
    """Check alignment, and that no two blocks share name or memory. Names are checked already."""
    if not blocks:
        raise HandoffRefused("there are no blocks")
    names: set[str] = set()
    for block in blocks:
        if block.name in names:
            raise HandoffRefused(f"two blocks have the name {block.name!r}")
        names.add(block.name)
        _check_alignment(block)
    in_order = sorted(blocks, key=lambda block: block.address)
    for before, after in pairwise(in_order):
        if before.address + before.length > after.address:
            raise HandoffRefused(f"blocks {before.name!r} and {after.name!r} overlap")


def _check_alignment(block: HandedBlock) -> None:
    size = block.page_size
    if size < mmap.PAGESIZE or size & (size - 1):
        raise HandoffRefused(
            f"block {block.name!r}: page size {size} is not a power of two "
            f"of at least {mmap.PAGESIZE}"
        )
    for what, value, lowest in (
        ("length", block.length, 1),
        ("address", block.address, 1),
        ("file_offset", block.file_offset, 0),
    ):
        if value < lowest or value % size:
            raise HandoffRefused(
                f"block {block.name!r}: {what} {value:#x} is not a positive multiple of the page "
                f"size {size:#x}"
            )


def check_userfaultfd(descriptor: int) -> None:
    """Check that it is a userfaultfd that is fit for post-copy, and make it non-blocking."""
    if not is_userfaultfd(descriptor):
        raise HandoffRefused(
            f"descriptor 0 is {link_target(descriptor)}, it must be the userfaultfd"
        )
    # A blocking one polls as an error for ever, and so does one without its handshake:
    # fs/userfaultfd.c, userfaultfd_poll().
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(descriptor, 0)
    if any(events & select.POLLERR for _, events in poll.poll(0)):
        raise HandoffRefused(
            "the userfaultfd came without its handshake: the VMM must call UFFDIO_API first"
        )
    features = features_of(descriptor) or Feature(0)
    for unwanted, why in _UNWANTED.items():
        if unwanted in features:
            raise HandoffRefused(
                f"the userfaultfd has the feature {unwanted.name} enabled: {why}; "
                "open it without that feature"
            )


def check_no_other_userfaultfd(descriptors: Iterable[int]) -> None:
    """Check that there is none among the descriptors behind the first."""
    for number, descriptor in enumerate(descriptors, start=1):
        if is_userfaultfd(descriptor):
            raise HandoffRefused(
                f"descriptor {number} is a second userfaultfd; one must cover all blocks"
            )


def check_memory_files(blocks: Iterable[HandedBlock]) -> None:
    """Check each block's memory file, and that no two blocks share a piece of one."""
    pieces: list[tuple[tuple[int, int], int, HandedBlock]] = []
    for block in blocks:
        if block.memory_file is not None:
            status = _check_memory_file(block, block.memory_file)
            pieces.append(((status.st_dev, status.st_ino), block.file_offset, block))
    pieces.sort(key=lambda piece: piece[:2])
    for (file, offset, block), (next_file, next_offset, following) in pairwise(pieces):
        if file == next_file and offset + block.length > next_offset:
            raise HandoffRefused(
                f"blocks {block.name!r} and {following.name!r} share a piece of one memory file"
            )


def _check_memory_file(block: HandedBlock, descriptor: int) -> os.stat_result:
    if not memory_file.is_memory_file(descriptor):
        raise HandoffRefused(
            f"block {block.name!r}: its memory file is {link_target(descriptor)}, "
            "it must be one of memfd_create"
        )
    status = os.fstat(descriptor)
    end = block.file_offset + block.length
    if status.st_size < end:
        raise HandoffRefused(
            f"block {block.name!r} ends at byte {end} of its memory file, "
            f"which has only {status.st_size}"
        )
    page_size = memory_file.huge_page_size_of(descriptor) or mmap.PAGESIZE
    if page_size != block.page_size:
        raise HandoffRefused(
            f"block {block.name!r}: its memory file has pages of {page_size} bytes, "
            f"not {block.page_size}"
        )
    return status


def prove_mapped(
    userfaultfd: Userfaultfd, blocks: Iterable[HandedBlock], *, registered: bool
) -> None:
    """Check that each block is mapped with pages of its size, by registering it for a moment.

    :param registered: the VMM has registered the blocks itself. Registering again changes nothing
        then; unregistering would let threads that wait for a page read zeros.
    """
    for block in blocks:
        last = block.address + block.length - block.page_size
        # The kernel registers a range that is mapped only in part. So each end is tried by
        # itself: a length that goes beyond the mapping shows.
        for address, length in (
            (block.address, block.page_size),
            (last, block.page_size),
            (block.address, block.length),
        ):
            _try_register(userfaultfd, block, address, length, keep=registered)


def _try_register(
    userfaultfd: Userfaultfd, block: HandedBlock, address: int, length: int, *, keep: bool
) -> None:
    try:
        operations = userfaultfd.register(
            address, length, RegisterMode.MISSING, Operation.COPY | Operation.WAKE
        )
        if not keep:
            userfaultfd.unregister(address, length)
    except OSError as error:
        raise HandoffRefused(
            f"block {block.name!r}: {address:#x} to {address + length:#x} is not mapped with pages "
            f"of {block.page_size} bytes, or is registered elsewhere: {error}"
        ) from error
    # Zero pages are placed in ordinary memory only: the kernel offers that nowhere else.
    if (Operation.ZEROPAGE in operations) != (block.page_size == mmap.PAGESIZE):
        actual = f"{mmap.PAGESIZE} bytes" if Operation.ZEROPAGE in operations else "a larger size"
        raise HandoffRefused(
            f"block {block.name!r} is mapped with pages of {actual}, not of {block.page_size}"
        )


def link_target(descriptor: int) -> str:
    """Return what the kernel calls the file behind a descriptor, such as ``/dev/null``."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())
