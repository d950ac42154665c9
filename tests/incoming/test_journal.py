"""The journal: what was written last is found, whatever happened while it was written."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.incoming.journal import (
    VERSION,
    BlockRecord,
    FedBlockRecord,
    Journal,
    JournalUnreadable,
    MigrationRecord,
    SourceBlockRecord,
    SourceRecord,
    VmmRecord,
)
from postcopyd.incoming.report import Counters

DATA = Path(__file__).parent.parent / "data"
SIZE = 8192 + 2 * (4 << 20)
SLOTS = (8192, 8192 + (4 << 20))

numbers = st.integers(0, (1 << 63) - 1)
times = st.none() | st.floats(allow_nan=False, allow_infinity=False)
texts = st.none() | st.text()
blocks = st.builds(BlockRecord, st.text(), numbers, numbers, numbers, texts, numbers)
vmms = st.builds(
    VmmRecord,
    kind=st.text(),
    facts=st.dictionaries(st.text(), numbers).map(
        lambda facts: msgspec.Raw(msgspec.json.encode(facts))
    ),
    blocks=st.tuples(blocks),
    fed=st.tuples(st.builds(FedBlockRecord, st.text(), numbers, numbers)),
    registered=st.booleans(),
)
sources = st.builds(
    SourceRecord,
    configuration=st.binary(),
    blocks=st.tuples(st.builds(SourceBlockRecord, st.text(), numbers, numbers)),
    section_id=numbers,
    target_page_size=numbers,
    package_length=numbers,
)
records = st.builds(
    MigrationRecord,
    state=st.text(),
    failure=texts,
    peer=texts,
    preempt=texts,
    vmm=st.none() | vmms,
    waits_for_vmm=st.booleans(),
    may_run=st.booleans(),
    source=st.none() | sources,
    switchover_at=times,
    loaded_at=times,
    all_came=st.booleans(),
    bytes_received=numbers,
    counters=st.builds(Counters, faults=numbers),
)


@pytest.fixture
def journal() -> Iterator[Journal]:
    journal = Journal(Journal.create())
    yield journal
    journal.close()


def successor(journal: Journal) -> Journal:
    """The journal as another process finds it."""
    return Journal(os.dup(journal._descriptor))


def damage(journal: Journal, place: int, data: bytes) -> None:
    os.pwrite(journal._descriptor, data, place)


def test_a_new_journal_says_nothing(journal: Journal) -> None:
    assert journal.read() is None


@given(st.lists(records, min_size=1, max_size=4))
def test_a_successor_reads_what_was_written_last(written: list[MigrationRecord]) -> None:
    journal = Journal(Journal.create())
    for record in written:
        journal.write(record)
    heir = successor(journal)
    assert heir.read() == written[-1]
    heir.write(written[0])  # and writes on behind it
    assert journal.read() == written[0]
    heir.close()
    journal.close()


@given(st.integers(0, 200), st.binary(min_size=1, max_size=40))
def test_a_write_that_was_cut_short_leaves_the_one_before(place: int, garbage: bytes) -> None:
    journal = Journal(Journal.create())
    first, second = MigrationRecord(state="listening"), MigrationRecord(state="running")
    journal.write(first)  # into the second slot, as its number is odd
    journal.write(second)
    before = os.pread(journal._descriptor, len(garbage), SLOTS[0] + place)
    damage(journal, SLOTS[0] + place, garbage)
    heir = successor(journal)
    length = 16 + len(msgspec.json.encode(second))
    harmless = before == garbage or place >= length
    assert heir.read() == (second if harmless else first)
    heir.close()
    journal.close()


@given(st.dictionaries(st.integers(0, SIZE - 1), st.binary(max_size=60), max_size=4))
def test_whatever_is_in_it_is_a_record_or_refused(garbage: dict[int, bytes]) -> None:
    journal = Journal(Journal.create())
    journal.write(MigrationRecord(state="running"))
    for place, data in garbage.items():
        damage(journal, place, data[: SIZE - place])
    try:
        heir = successor(journal)
    except JournalUnreadable:
        pass
    else:
        with contextlib.suppress(JournalUnreadable):
            assert isinstance(heir.read(), MigrationRecord | None)
        heir.close()
    journal.close()


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_what_a_daemon_of_this_or_an_earlier_version_has_left_is_read(version: int) -> None:
    left = gzip.decompress((DATA / f"journal-version-{version}.gz").read_bytes())
    assert left[20:24] == version.to_bytes(4, "little")
    descriptor = os.memfd_create("left")
    os.write(descriptor, left)
    heir = Journal(descriptor)
    record = heir.read()
    heir.close()
    assert record is not None and record.vmm is not None and record.source is not None
    assert (record.state, record.peer) == ("paused", "127.0.0.1:59782")
    assert record.vmm.kind == "native"
    assert [(block.name, block.length) for block in record.vmm.blocks] == [("pc.ram", 0x10000)]
    assert record.source.configuration.endswith(b"test")
    assert (record.source.section_id, record.source.package_length) == (2, 19)
    assert record.bytes_received == 163


def test_another_version_is_refused_by_its_number(journal: Journal) -> None:
    damage(journal, 20, (VERSION + 1).to_bytes(4, "little"))
    with pytest.raises(JournalUnreadable, match=f"version {VERSION + 1}.*start the version"):
        successor(journal)


@pytest.mark.parametrize("size", [0, 100, SIZE + 4096])
def test_what_is_no_journal_is_refused(size: int) -> None:
    descriptor = os.memfd_create("something")
    os.ftruncate(descriptor, size)
    with pytest.raises(JournalUnreadable):
        Journal(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_record_that_is_too_long_leaves_the_one_before(journal: Journal) -> None:
    record = MigrationRecord(state="running")
    journal.write(record)
    with pytest.raises(OSError, match="does not fit into the journal"):
        journal.write(MigrationRecord(state="x" * (5 << 20)))
    assert journal.read() == record


def test_a_record_that_is_written_in_part_leaves_the_one_before(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = MigrationRecord(state="running")
    journal.write(record)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, data[:-1], place))
    for _ in range(2):
        with pytest.raises(OSError, match="bytes were written"):
            journal.write(MigrationRecord(state="paused"))
        assert journal.read() == record


def test_events_are_found_by_a_successor(journal: Journal) -> None:
    journal.events[:4] = b"read"
    heir = successor(journal)
    assert bytes(heir.events[:4]) == b"read"
    heir.close()
