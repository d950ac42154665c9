"""The VMM in the journal: how it is written down, and what a successor makes of that."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from postcopyd.incoming.estate import Estate
from postcopyd.incoming.journal import BlockRecord, FedBlockRecord, JournalUnreadable, VmmRecord
from postcopyd.incoming.vmm import FedBlock, GuestMemory, HandedBlock, Vmm
from postcopyd.kernel.userfaultfd import Userfaultfd, is_userfaultfd

PREFIX = "vmm-"
"""What the names of a VMM's descriptors begin with in an estate."""
USERFAULTFD = "userfaultfd"
"""The name among a VMM's descriptors that every one has."""
WATCHES_MEMORY = PREFIX + USERFAULTFD
"""The name in an estate that is there if a VMM was: its guest waits as long as that is held."""


class InheritedVmm(msgspec.Struct, frozen=True):
    """What a predecessor has left of its VMM."""

    kind: str
    facts: bytes
    """JSON: what the VMM of that kind gave for them."""
    memory: GuestMemory
    fed_blocks: tuple[FedBlock, ...]
    descriptors: dict[str, int]
    """Those beside the userfaultfd and the memory files, by the VMM's names. Whoever takes one out
    owns it."""
    resources: ExitStack
    """Closes the userfaultfd and the memory files, and what is left in `descriptors`."""


RestoreVmm = Callable[[InheritedVmm], Vmm]
"""Makes a VMM of what was left of it, in the running event loop, and takes that over.

Raises `VmmFailure` if nobody can go on with it, and leaves it alone then."""


def leave(vmm: Vmm, estate: Estate, aside: str = "", *, replaces: bool = False) -> None:
    """Leave the VMM's descriptors to a successor.

    :param aside: what is to stand before their names.
    :param replaces: in the place of those of another one.
    """
    for name, descriptor in vmm.descriptors.items():
        kept_as = PREFIX + aside + name
        if replaces or not estate.leaves(kept_as):
            estate.keep(kept_as, descriptor)


def release_others(vmm: Vmm, estate: Estate) -> None:
    """Leave nothing of any other VMM, and nothing aside."""
    its_own = {PREFIX + name for name in vmm.descriptors}
    for name in estate.left(PREFIX):
        if name not in its_own:
            estate.release(name)


def record_of(vmm: Vmm, aside: str = "") -> VmmRecord:
    """Return what the journal is to say of a VMM.

    :param aside: what stands before the names of its descriptors in the estate.
    """
    names = {descriptor: aside + name for name, descriptor in vmm.descriptors.items()}
    return VmmRecord(
        kind=vmm.kind,
        facts=msgspec.Raw(msgspec.json.encode(vmm.facts())),
        blocks=tuple(
            BlockRecord(
                name=block.name,
                address=block.address,
                length=block.length,
                page_size=block.page_size,
                memory_file=None if block.memory_file is None else names[block.memory_file],
                file_offset=block.file_offset,
            )
            for block in vmm.memory.blocks
        ),
        fed=tuple(
            FedBlockRecord(block.name, block.length, block.maximum) for block in vmm.fed_blocks
        ),
        registered=vmm.memory.registered,
    )


def inherit(record: VmmRecord, estate: Estate) -> InheritedVmm:
    """Take what a predecessor has left of its VMM.

    :raise JournalUnreadable: if a descriptor that must be there is not, or is of something else.
    """
    descriptors = {
        name.removeprefix(PREFIX): estate.take(name)
        for name in list(estate.inherited)
        if name.startswith(PREFIX)
    }
    taken = {name: number for name, number in descriptors.items() if number is not None}
    with ExitStack() as resources:

        def close_the_rest() -> None:
            while taken:
                os.close(taken.popitem()[1])

        resources.callback(close_the_rest)
        needed = {USERFAULTFD, *(block.memory_file for block in record.blocks)} - {None}
        if any(block.memory_file == USERFAULTFD for block in record.blocks):
            raise JournalUnreadable("it takes the userfaultfd for a memory file")
        if missing := needed - set(taken):
            raise JournalUnreadable(f"its {', '.join(sorted(map(str, missing)))} was not kept")
        if not is_userfaultfd(taken[USERFAULTFD]):
            raise JournalUnreadable("what was kept as its userfaultfd is none")
        userfaultfd = Userfaultfd(taken.pop(USERFAULTFD))
        resources.callback(userfaultfd.close)
        files: dict[str, int] = {}
        for block in record.blocks:
            if block.memory_file is not None and block.memory_file not in files:
                files[block.memory_file] = taken.pop(block.memory_file)
                resources.callback(os.close, files[block.memory_file])
        blocks = tuple(
            HandedBlock(
                name=block.name,
                address=block.address,
                length=block.length,
                page_size=block.page_size,
                memory_file=None if block.memory_file is None else files[block.memory_file],
                file_offset=block.file_offset,
            )
            for block in record.blocks
        )
        return InheritedVmm(
            kind=record.kind,
            facts=bytes(record.facts),
            memory=GuestMemory(blocks, userfaultfd, record.registered),
            fed_blocks=tuple(
                FedBlock(block.name, block.length, block.maximum) for block in record.fed
            ),
            descriptors=taken,
            resources=resources.pop_all(),
        )
