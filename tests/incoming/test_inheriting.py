"""The VMM in the journal: what is written down of it is true for a successor, too."""

from __future__ import annotations

import os

import msgspec
import pytest

from postcopyd.incoming.estate import Estate
from postcopyd.incoming.inheriting import inherit
from postcopyd.incoming.journal import BlockRecord, JournalUnreadable, VmmRecord
from postcopyd.incoming.vmm import GuestMemory, HandedBlock
from postcopyd.kernel.userfaultfd import Userfaultfd
from tests.incoming.guest import PAGE
from tests.support import belongings


def memory_with(userfaultfd: Userfaultfd, *files: int | None) -> GuestMemory:
    blocks = (
        HandedBlock(f"block{place}", (place + 1) << 20, PAGE, PAGE, file, 0)
        for place, file in enumerate(files)
    )
    return GuestMemory(tuple(blocks), userfaultfd, registered=False)


def test_a_memory_file_keeps_its_name_whatever_number_a_successor_gets_for_it() -> None:
    """Else a second successor would take one file for another, and fill the wrong memory."""
    first, second = os.memfd_create("first"), os.memfd_create("second")
    with Userfaultfd.open() as userfaultfd:
        before = memory_with(userfaultfd, first, None, second, first)
        after = memory_with(userfaultfd, second, None, first, second)
        names = ["memory-file-0", "memory-file-1"]
        assert [before.descriptors[name] for name in names] == [first, second]
        assert [after.descriptors[name] for name in names] == [second, first]
        assert len(before.descriptors) == 3
    os.close(first)
    os.close(second)


RECORD = VmmRecord(
    kind="native",
    facts=msgspec.Raw(b"{}"),
    blocks=(BlockRecord("pc.ram", 1 << 20, PAGE, PAGE, "memory-file-0", 0),),
    fed=(),
    registered=False,
)


def refusal(record: VmmRecord, userfaultfd: int) -> str:
    """Why what was left is not gone on from; everything that was taken is closed then."""
    before = belongings()
    left = {"vmm-userfaultfd": os.dup(userfaultfd), "vmm-memory-file-0": os.memfd_create("file")}
    estate = Estate(None, left)
    with pytest.raises(JournalUnreadable) as refused:
        inherit(record, estate)
    estate.close()
    assert belongings() == before
    return str(refused.value)


def test_what_does_not_fit_together_is_refused() -> None:
    (block,) = RECORD.blocks
    with Userfaultfd.open() as userfaultfd:
        number = userfaultfd.fileno()
        for name, why in (
            ("userfaultfd", "takes the userfaultfd for a memory file"),
            ("memory-file-1", "memory-file-1 was not kept"),
        ):
            other = msgspec.structs.replace(block, memory_file=name)
            record = msgspec.structs.replace(RECORD, blocks=(block, other))
            assert why in refusal(record, number)
    with open("/dev/null") as null:
        assert "is none" in refusal(RECORD, null.fileno())
