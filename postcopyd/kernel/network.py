"""rtnetlink(7): the links, addresses and routes of this process's network namespace.

A change is only heard of here, never read: whoever wants to know how things stand asks. So nothing
depends on messages that the kernel may drop, and a storm of them costs little.
"""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

import msgspec
from pyroute2.netlink import NLM_F_REQUEST
from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_GETROUTE
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.marshal import MarshalRtnl
from pyroute2.netlink.rtnl.rtmsg import rtmsg

IpAddress = IPv4Address | IPv6Address

# linux/netlink.h
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1

# linux/rtnetlink.h: enum rtnetlink_groups
_GROUPS: Final = {
    "LINK": 1,
    "IPV4_IFADDR": 5,
    "IPV4_ROUTE": 7,
    "IPV4_RULE": 8,
    "IPV6_IFADDR": 9,
    "IPV6_ROUTE": 11,
    "IPV6_RULE": 19,
    "NEXTHOP": 32,
}
_RTM_F_FIB_MATCH: Final = 0x2000
_RTN_LOCAL: Final = 2

# linux/if.h, linux/if_link.h
_IFF_UP: Final = 1 << 0
_IFF_LOWER_UP: Final = 1 << 16
_RTEXT_FILTER_SKIP_STATS: Final = 1 << 3

_NO_ROUTE: Final = frozenset(
    {
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.EACCES,  # a route that prohibits
        errno.EINVAL,  # a route that drops, or a source address that is not ours
        errno.EAGAIN,  # a route that throws
        errno.ENODEV,
    }
)

_WAITING: Final = 8192
"""Bytes of changes that are kept (the kernel doubles it); more than one says no more than one."""
_ANSWER: Final = 1 << 16
_ANSWER_LIMIT: Final = 10.0  # seconds; the kernel answers while it is asked


class Link(msgspec.Struct, frozen=True):
    """A network interface."""

    index: int
    name: str
    up: bool
    """False when it was set down."""
    carrier: bool
    """False when what is below it, such as a cable, does not work."""


class NetworkChanges:
    """Becomes readable when a link, an address, a route or a rule has changed."""

    def __init__(self) -> None:
        """Hear of changes from now on.

        :raise OSError: if that is not allowed.
        """
        self._socket = _open(socket.SOCK_NONBLOCK)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WAITING)
            self._socket.bind((0, 0))
            for group in _GROUPS.values():
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, to wait for."""
        return self._socket.fileno()

    def forget(self) -> None:
        """Take note of the changes so far: it is readable again with the next one."""
        for _ in range(_WAITING):  # each has more than a byte, so that is all that was there
            try:
                self._socket.recv(1)  # the rest of a message goes with its first byte
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # some did not fit: no matter
                    raise

    def close(self) -> None:
        """Hear of nothing more. Idempotent."""
        self._socket.close()


class Network:
    """Answers what the kernel knows. An answer may take as long as others change the network."""

    def __init__(self) -> None:
        """Be ready to ask.

        :raise OSError: if that is not allowed.
        """
        self._socket = _open()
        self._socket.settimeout(_ANSWER_LIMIT)
        self._marshal = MarshalRtnl()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def link(self, index: int) -> Link | None:
        """Return the link of that number; None if there is none.

        :raise OSError: if the kernel does not tell.
        """
        question = ifinfmsg()
        question["index"] = index
        question["attrs"] = [("IFLA_EXT_MASK", _RTEXT_FILTER_SKIP_STATS)]
        answer = self._ask(question, RTM_GETLINK, frozenset({errno.ENODEV}))
        if answer is None:
            return None
        flags = answer["flags"]
        name = answer.get_attr("IFLA_IFNAME")
        return Link(index, name, bool(flags & _IFF_UP), bool(flags & _IFF_LOWER_UP))

    def link_with(self, address: IpAddress, scope: int = 0) -> int | None:
        """Return the number of the link that has `address`; None if this host does not have it.

        :param scope: the link that a link-local address is about, by its number.
        :raise OSError: if the kernel does not tell.
        """
        answer = self._route(address, None, scope, _RTM_F_FIB_MATCH)
        if answer is None or answer["type"] != _RTN_LOCAL:
            return None
        return _link_of(answer)

    def route(self, to: IpAddress, source: IpAddress, scope: int = 0) -> int | None:
        """Return the number of the link over which `source` reaches `to`; None without a route.

        :param scope: as of `link_with`.
        :raise OSError: if the kernel does not tell.
        """
        answer = self._route(to, source, scope, 0)
        return None if answer is None else _link_of(answer)

    def _route(self, to: IpAddress, source: IpAddress | None, scope: int, flags: int) -> Any:
        question = rtmsg()
        question["family"] = socket.AF_INET if to.version == 4 else socket.AF_INET6
        question["dst_len"] = to.max_prefixlen
        question["flags"] = flags
        attributes: list[tuple[str, str | int]] = [("RTA_DST", _text(to))]
        if source is not None:
            question["src_len"] = source.max_prefixlen
            attributes.append(("RTA_SRC", _text(source)))
        if scope:
            attributes.append(("RTA_OIF", scope))
        question["attrs"] = attributes
        return self._ask(question, RTM_GETROUTE, _NO_ROUTE)

    def _ask(self, question: Any, kind: int, none: frozenset[int]) -> Any:
        """Return the kernel's answer; None if it is one of the errors in `none`."""
        question["header"]["type"] = kind
        question["header"]["flags"] = NLM_F_REQUEST
        question.encode()
        self._socket.send(question.data)
        answer = next(iter(self._marshal.parse(self._socket.recv(_ANSWER))))
        error = answer["header"]["error"]
        if error is None:
            return answer
        if getattr(error, "code", None) in none:
            return None
        raise OSError(getattr(error, "code", errno.EIO), f"netlink: {error}")


def _open(flags: int = 0) -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | flags
    try:
        return socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    except OSError as error:
        raise OSError(
            error.errno, f"no netlink socket can be opened: {os.strerror(error.errno or 0)}"
        ) from error


def _text(address: IpAddress) -> str:
    """Return the address without the link that it is about."""
    return str(address).partition("%")[0]


def _link_of(answer: Any) -> int | None:
    index: int | None = answer.get_attr("RTA_OIF")
    return index
