"""tcp(7): when a connection counts as dead, and whether its peer still answers.

With TCP_USER_TIMEOUT the kernel does not count keepalive probes (net/ipv4/tcp_timer.c): a silent
connection ends at the first probe that finds it silent for that long, with one unanswered. Time is
kept in whole seconds there, so the last probe is made to fall on the end of it.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

import msgspec

SHORTEST: Final = 2
"""Seconds after which a silent connection can be dead at the soonest: one for an answer to come."""

_PROBES: Final = 5
_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)

# struct tcp_info (linux/tcp.h): tcpi_state, _, tcpi_retransmits, tcpi_probes, four more bytes;
# then 32-bit words, of which tcpi_last_data_recv is the 12th and tcpi_last_ack_recv the 13th.
_INFO: Final = struct.Struct("=BxBB4x44xII")
_TCP_CLOSE: Final = 7


class Standing(msgspec.Struct, frozen=True):
    """How the kernel sees a connection."""

    closed: bool
    """True when it has ended: it timed out, or was reset."""
    silent: float
    """Seconds since the peer's host sent anything, an acknowledgement included."""
    unanswered: int
    """Probes, or repetitions of what was sent, since then."""


def notice_break(connection: socket.socket, within: int) -> None:
    """Have a TCP connection end when its peer's host is silent, or takes nothing, for that long.

    Another kind of connection is left as it is.

    :param within: seconds, `SHORTEST` or more.
    """
    if connection.family not in _INTERNET:
        return
    interval = max(1, within // (2 * _PROBES))
    idle = max(1, within - _PROBES * interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, within * 1000)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def probe_each_second(connection: socket.socket) -> None:
    """Have the peer's host asked at once, and after each second of silence, whether it is there.

    A host that knows nothing of the connection any more answers with a reset.
    """
    if connection.family not in _INTERNET:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)


def standing(connection: socket.socket) -> Standing | None:
    """Tell how a TCP connection stands; None for another kind of connection."""
    if connection.family not in _INTERNET:
        return None
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    state, repeated, probes, since_data, since_answer = _INFO.unpack(info)
    return Standing(
        state == _TCP_CLOSE, min(since_data, since_answer) / 1000, max(repeated, probes)
    )
