"""Who may hand memory over: users and groups by name or number, as the kernel vouches for them."""

from __future__ import annotations

import grp
import multiprocessing
import os
import pwd
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from postcopyd.vmm.peer import AllowedPeers, Peer, peer_of, peer_pidfd

NO_SUCH_OPTION = 0x7FFF
ALICE = Peer(pid=4711, uid=1001, gid=1002, groups=(1003, 1004))


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """A connection whose peer is this very process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        yield ours


def test_the_kernel_tells_who_connected(connection: socket.socket) -> None:
    peer = peer_of(connection)
    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert set(peer.groups) == set(os.getgroups())
    assert str(peer) == f"pid {os.getpid()}, uid {os.geteuid()}"


def test_what_is_no_unix_socket_has_no_peer() -> None:
    with (
        socket.socket(socket.AF_INET) as inet,
        pytest.raises(OSError, match="No data available"),
    ):
        peer_of(inet)


@pytest.mark.parametrize(
    ("users", "groups"),
    [([1001], []), (["1001"], []), ([5, 1001], []), ([], [1002]), ([], ["1004"]), ([5], [1003])],
)
def test_one_user_or_group_that_matches_is_enough(
    users: list[str | int], groups: list[str | int]
) -> None:
    assert AllowedPeers(users, groups).refusal(ALICE) is None


@pytest.mark.parametrize(
    ("users", "groups"), [([], []), ([1002], []), ([], [1001]), ([4711, 0], [0])]
)
def test_who_matches_nothing_is_refused_by_name_and_number(
    users: list[str | int], groups: list[str | int]
) -> None:
    refusal = AllowedPeers(users, groups).refusal(ALICE)
    assert refusal is not None
    assert "1001" in refusal


def test_root_is_allowed_only_when_named() -> None:
    root = Peer(pid=1, uid=0, gid=0, groups=())
    assert "root (0)" in (AllowedPeers([1001]).refusal(root) or "")
    assert AllowedPeers(["root"]).refusal(root) is None


def test_names_are_looked_up() -> None:
    user = pwd.getpwuid(os.geteuid())
    group = grp.getgrgid(os.getegid())
    me = Peer(pid=1, uid=user.pw_uid, gid=group.gr_gid, groups=())
    assert AllowedPeers([user.pw_name]).refusal(me) is None
    assert AllowedPeers([], [group.gr_name]).refusal(me) is None


def test_a_name_that_nobody_has_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="no user 'nobody-has-this'"):
        AllowedPeers(["nobody-has-this"])
    with pytest.raises(ValueError, match="no group 'nobody-has-this'"):
        AllowedPeers([], ["nobody-has-this"])


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening socket in the abstract namespace, so that it leaves no file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")
        listener.listen()
        yield listener


@contextmanager
def peer_process(target: Callable[..., None], listener: socket.socket) -> Iterator[int]:
    """Run `target` in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(
        target=target, args=(listener.getsockname(),)
    )
    process.start()
    try:
        assert process.pid is not None
        yield process.pid
        process.join(10)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join(10)
        process.close()


def connect_and_stay(address: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)
        connection.recv(4)


def connect_and_exit(address: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(address)


def connect_in_many_groups(address: bytes) -> None:
    os.setgroups(range(1000, 1300))
    connect_and_stay(address)


@pytest.mark.parametrize("kernel", ["this one", "one without SO_PEERPIDFD"])
def test_the_pidfd_tells_when_the_process_has_exited(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    if kernel != "this one":
        monkeypatch.setattr("postcopyd.vmm.peer._SO_PEERPIDFD", NO_SUCH_OPTION)
    with peer_process(connect_and_stay, listener) as pid:
        connection, _ = listener.accept()
        with connection:
            peer = peer_of(connection)
            assert peer.pid == pid
            pidfd = peer_pidfd(connection, peer)
            assert pidfd is not None
            try:
                assert not os.get_inheritable(pidfd)
                assert not select.select([pidfd], [], [], 0)[0]
                connection.sendall(b"exit")
                assert select.select([pidfd], [], [], 10)[0]
            finally:
                os.close(pidfd)


@pytest.mark.parametrize("kernel", ["this one", "one without SO_PEERPIDFD"])
def test_a_process_that_has_exited_before_is_known_to_have(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    if kernel != "this one":
        monkeypatch.setattr("postcopyd.vmm.peer._SO_PEERPIDFD", NO_SUCH_OPTION)
    with peer_process(connect_and_exit, listener):
        pass
    connection, _ = listener.accept()
    with connection:
        try:
            pidfd = peer_pidfd(connection, peer_of(connection))
        except ProcessLookupError:
            return
        # Kernels from 6.16 on give a pidfd of it all the same: it is readable at once.
        assert pidfd is not None
        assert select.select([pidfd], [], [], 0)[0]
        os.close(pidfd)


def test_a_process_that_we_do_not_see_cannot_be_watched_by_number(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("postcopyd.vmm.peer._SO_PEERPIDFD", NO_SUCH_OPTION)
    assert peer_pidfd(connection, Peer(pid=0, uid=0, gid=0, groups=())) is None


def test_a_peer_in_very_many_groups_counts_by_its_first(listener: socket.socket) -> None:
    with peer_process(connect_in_many_groups, listener):
        connection, _ = listener.accept()
        with connection:
            peer = peer_of(connection)
            connection.sendall(b"exit")
    assert (peer.gid, peer.groups) == (os.getegid(), ())
