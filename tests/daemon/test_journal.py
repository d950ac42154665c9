"""The journal's native protocol, against a datagram socket that takes journald's place."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.daemon.journal import Journal, encode_entry, field_name, is_journal
from tests.daemon.journald import decode_entry
from tests.support import belongings

ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.settimeout(10)
        yield listener


@pytest.fixture
def journal(journald: socket.socket) -> Iterator[Journal]:
    journal = Journal(journald.getsockname())
    yield journal
    journal.close()


def test_an_entry_is_one_datagram_of_fields(journald: socket.socket, journal: Journal) -> None:
    journal.send([("MESSAGE", "all is well"), ("PRIORITY", "6")])
    assert journald.recv(4096) == b"MESSAGE=all is well\nPRIORITY=6\n"


def test_a_value_with_a_newline_goes_with_its_length(
    journald: socket.socket, journal: Journal
) -> None:
    journal.send([("MESSAGE", "two\nlines"), ("A", "b")])
    assert journald.recv(4096) == b"MESSAGE\n\x09\0\0\0\0\0\0\0two\nlines\nA=b\n"


@given(
    st.lists(st.tuples(st.text(max_size=80).map(field_name), st.text(st.characters(codec="utf-8"))))
)
def test_what_is_encoded_can_be_read_back(fields: list[tuple[str, str]]) -> None:
    expected = [(name, value.encode()) for name, value in fields]
    assert decode_entry(encode_entry(fields)) == expected


@given(st.text())
def test_every_name_becomes_one_that_journald_takes(name: str) -> None:
    changed = field_name(name)
    assert 1 <= len(changed) <= 64
    assert changed[0] in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert set(changed) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


def test_an_entry_too_large_for_a_datagram_comes_in_a_sealed_file(
    journald: socket.socket, journal: Journal
) -> None:
    before = belongings()
    text = "x" * (4 << 20)
    journal.send([("MESSAGE", text)])
    assert journal.lost == 0
    data, ancillary, _, _ = journald.recvmsg(4096, socket.CMSG_SPACE(4))
    assert data == b""
    ((_, _, rights),) = ancillary
    (descriptor,) = array.array("i", rights)
    try:
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & ALL_SEALS == ALL_SEALS
        assert os.pread(descriptor, 5 << 20, 0) == f"MESSAGE={text}\n".encode()
    finally:
        os.close(descriptor)
    assert belongings() == before


def test_a_journald_that_does_not_read_holds_nobody_up(
    journald: socket.socket, journal: Journal
) -> None:
    sent = 0
    while journal.lost == 0:
        journal.send([("NUMBER", str(sent))])
        sent += 1
        assert sent < 100_000
    for number in range(sent - 1):
        assert journald.recv(4096) == f"NUMBER={number}\n".encode()


def test_a_journald_that_was_started_anew_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as first:
        first.bind(str(path))
        journal = Journal(str(path))
    path.unlink()
    journal.send([("A", "lost")])
    assert journal.lost == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
        second.bind(str(path))
        second.settimeout(10)
        journal.send([("A", "found")])
        assert second.recv(4096) == b"A=found\nPOSTCOPYD_ENTRIES_LOST=1\n"
    assert journal.lost == 0
    journal.close()


def test_no_journald_is_an_error_that_says_so(tmp_path: Path) -> None:
    before = belongings()
    with pytest.raises(FileNotFoundError, match="no journald listens here"):
        Journal(str(tmp_path / "nothing"))
    assert belongings() == before


def test_a_stream_is_the_journals_if_device_and_inode_agree(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as stream:
        status = os.fstat(stream.fileno())
        assert is_journal(stream, f"{status.st_dev}:{status.st_ino}")
        assert not is_journal(stream, f"{status.st_dev}:{status.st_ino + 1}")
        assert not is_journal(stream, "")
        assert not is_journal(stream, "nonsense")
    assert not is_journal(stream, f"{status.st_dev}:{status.st_ino}"), "it is closed"
    assert not is_journal(sys.stderr, "0:0")
