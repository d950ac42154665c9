"""What supervisor and worker say to each other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from postcopyd.daemon import channel
from postcopyd.daemon.channel import Channel
from tests.support import LIMIT, ROOT

_SENDS_AND_DIES = """
import os, signal, socket, sys
from postcopyd.daemon.channel import Channel, Forgotten, Held
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
descriptor = os.memfd_create("left")
os.write(descriptor, b"what is left")
channel.send(Held("vm0", "file"), descriptor)
channel.send(Forgotten("vm1"))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = map(Channel, Channel.pair())
    yield ours, theirs
    ours.close()
    theirs.close()


def test_what_was_sent_arrives_although_its_sender_was_killed() -> None:
    ours, theirs = Channel.pair()
    with theirs:
        done = subprocess.run(
            [sys.executable, "-c", _SENDS_AND_DIES, str(theirs.fileno())],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
            timeout=LIMIT,
            check=False,
        )
    assert done.returncode == -signal.SIGKILL
    end = Channel(ours)
    received = end.received()
    message, descriptor = next(received)
    assert message == channel.Held("vm0", "file") and descriptor is not None
    assert os.pread(descriptor, 100, 0) == b"what is left"
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    assert next(received) == (channel.Forgotten("vm1"), None)
    with pytest.raises(EOFError):
        next(received)
    end.close()


def test_what_was_sent_arrives_although_its_sender_had_not_read_everything(
    ends: tuple[Channel, Channel],
) -> None:
    ends[0].send(channel.Settled())
    ends[1].send(channel.Forgotten("vm0"))
    ends[1].send(channel.Forgotten("vm1"))
    ends[1].close()
    received = ends[0].received()
    assert [next(received) for _ in range(2)] == [
        (channel.Forgotten("vm0"), None),
        (channel.Forgotten("vm1"), None),
    ]
    with pytest.raises(EOFError):
        next(received)


def test_nothing_is_waited_for(ends: tuple[Channel, Channel]) -> None:
    assert list(ends[0].received()) == []


def test_what_is_no_message_is_refused_and_its_descriptor_closed(
    ends: tuple[Channel, Channel],
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    reading, writing = os.pipe()
    ends[0]._connection.sendmsg([b'{"message":"no such"}'])
    with pytest.raises(ValueError, match="no such"):
        list(ends[1].received())
    os.close(reading)
    os.close(writing)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("raw", "descriptors"),
    [
        (b'{"message":"held","owner":"vm0","name":"file"}', 0),
        (b'{"message":"held","owner":"vm0","name":"file"}', 2),
        (b'{"message":"pass-on","worker":1,"what":"vmm"}', 0),
        (b'{"message":"handed","what":"request"}', 2),
        (b'{"message":"alive"}', 1),
        (b'{"message":"no such"}', 1),
        (b"", 1),
    ],
)
def test_a_descriptor_without_a_message_that_has_one_is_closed(
    ends: tuple[Channel, Channel], raw: bytes, descriptors: int
) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    spare = os.memfd_create("spare")
    socket.send_fds(ends[0]._connection, [raw], [spare] * descriptors)
    os.close(spare)
    with pytest.raises((ValueError, EOFError)):
        list(ends[1].received())
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_connection_that_got_lost_on_its_way_is_told_of(ends: tuple[Channel, Channel]) -> None:
    """This process had no descriptor to spare: that is no reason to hear nothing any more."""
    ends[0].send(channel.Handed("request"))
    ends[0].send(channel.Stop())
    assert list(ends[1].received()) == [(channel.Handed("request"), None), (channel.Stop(), None)]


@pytest.mark.parametrize(
    "packet",
    [
        b'{"message":"held","owner":"vm0","name":"a\\nMAINPID=1"}',
        b'{"message":"listed","name":"vm0","state":"up\\nMAINPID=1","standing":"running"}',
        b'{"message":"listed","name":"a\\nMAINPID=1","state":"none","standing":"running"}',
        b'{"message":"forgotten","owner":"a/b"}',
        b'{"message":"begin","manager_keeps":true,"configuration":' + b"[" * 100_000,
        b"",
    ],
)
def test_what_would_be_an_order_to_the_service_manager_or_no_end_of_brackets_is_no_message(
    ends: tuple[Channel, Channel], packet: bytes
) -> None:
    ends[0]._connection.send(packet)
    with pytest.raises((ValueError, EOFError)):
        list(ends[1].received())


def test_who_does_not_read_does_not_hold_us_up_for_ever(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(BlockingIOError):
        for _ in range(100_000):
            ends[0].send(channel.CannotStart("x" * 1000))


def test_an_end_that_has_gone_is_told(ends: tuple[Channel, Channel]) -> None:
    ends[1].close()
    with pytest.raises(BrokenPipeError):
        ends[0].send(channel.Alive())
    with pytest.raises(EOFError):
        list(ends[0].received())
