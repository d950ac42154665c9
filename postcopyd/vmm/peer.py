"""Who is at the other end of a Unix socket, and whether they may do what it is for.

The kernel vouches for it: SO_PEERCRED, SO_PEERGROUPS and SO_PEERPIDFD (unix(7), socket(7)) tell
of the process that called connect(2), as seen from our own namespaces.
"""

from __future__ import annotations

import array
import errno
import grp
import pwd
import socket
import struct
from collections.abc import Iterable

import msgspec

from postcopyd.kernel import processes

# asm-generic/socket.h; not in the socket module of Python 3.11.
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77  # since Linux 6.5

_UCRED = struct.Struct("iII")
_MOST_GROUPS = 256  # as many as fit what socket.getsockopt can return


class Peer(msgspec.Struct, frozen=True):
    """The process that connected."""

    pid: int
    """0 when it is in a pid namespace that we do not see."""
    uid: int
    gid: int
    groups: tuple[int, ...]
    """Supplementary groups."""

    def __str__(self) -> str:
        return f"pid {self.pid}, uid {self.uid}"


def peer_of(connection: socket.socket) -> Peer:
    """Tell who connected to us over this Unix socket.

    :raise OSError: if it is no Unix socket.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(credentials)
    groups = array.array("I")
    try:
        groups.frombytes(
            connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * groups.itemsize)
        )
    except OSError as error:
        if error.errno != errno.ERANGE:  # a peer in more groups than that has its first one only
            raise
    return Peer(pid, uid, gid, tuple(groups))


def peer_pidfd(connection: socket.socket, peer: Peer) -> int | None:
    """Return a pidfd of the process that connected; the caller closes it.

    None if the process cannot be watched: it is in a pid namespace that we do not see and the
    kernel is older than 6.5.

    :raise ProcessLookupError: if the process has exited.
    :raise OSError: if there is no descriptor to spare.
    """
    try:
        option = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
        return int.from_bytes(option, "little")
    except OSError as error:
        # EINVAL: the kernels before 6.16 say so of a process that is no more.
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise ProcessLookupError(errno.ESRCH, f"the process ({peer}) has exited") from error
        if error.errno != errno.ENOPROTOOPT:
            raise
    return processes.pidfd_open(peer.pid) if peer.pid else None


class AllowedPeers:
    """The users and groups who may use a socket: one that matches is enough."""

    def __init__(self, users: Iterable[str | int], groups: Iterable[str | int] = ()) -> None:
        """Allow these, each a name or a number. With neither, nobody is allowed.

        :raise ValueError: if this host knows no user or group of that name.
        """
        self._users = frozenset(_user_number(user) for user in users)
        self._groups = frozenset(_group_number(group) for group in groups)

    def refusal(self, peer: Peer, deed: str = "hand memory over") -> str | None:
        """Return why `peer` may not do what the socket is for; None if it may."""
        if peer.uid in self._users or not self._groups.isdisjoint((peer.gid, *peer.groups)):
            return None
        return (
            f"user {_name_of(peer.uid)} is not allowed to {deed} here: allow the user, "
            "or one of its groups, in the configuration of postcopyd"
        )


def _user_number(user: str | int) -> int:
    if isinstance(user, int) or user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ValueError(f"there is no user {user!r} on this host") from None


def _group_number(group: str | int) -> int:
    if isinstance(group, int) or group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {group!r} on this host") from None


def _name_of(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)
