"""Whether the destination's host still answers, from what the kernel tells of a TCP connection.

TCP_USER_TIMEOUT would be simpler, but it also ends a connection whose other end lives and does not
read for that long (measured; tcp(7) does not say it), and a destination that waits for its VMM does
not read. What tells a dead network is that *nothing comes back*: neither acknowledgements of data
that is on its way, nor answers to probes, be they of a full window or, while nothing is to be sent,
keepalive's.
"""

from __future__ import annotations

import struct
from typing import Final

INFO_LENGTH: Final = 104
"""Bytes of struct tcp_info (linux/tcp.h) up to and with tcpi_total_retrans: what is needed lies in
there, on every kernel."""
_PROBES: Final = 3
"""Offset of tcpi_probes, u8: probes that were not answered yet."""
_UNACKED: Final = 24
"""Offset of tcpi_unacked, u32: segments that were not acknowledged yet."""
_LAST_ACK_RECEIVED: Final = 56
"""Offset of tcpi_last_ack_recv, u32: milliseconds since anything was acknowledged."""


class Liveness:
    """Looks at one connection again and again."""

    def __init__(self) -> None:
        self._since: float | None = None

    def unanswered(self, info: bytes, now: float) -> float:
        """Return for how many seconds the other end's kernel owes an answer; 0.0 if it owes none.

        :param info: TCP_INFO, at least `INFO_LENGTH` bytes.
        :param now: seconds on a clock that never goes back.
        """
        (unacknowledged,) = struct.unpack_from("=I", info, _UNACKED)
        (acknowledged_ago,) = struct.unpack_from("=I", info, _LAST_ACK_RECEIVED)
        if not unacknowledged and not info[_PROBES]:
            self._since = None
            return 0.0
        if self._since is None:
            self._since = now
        # An idle connection has had no answer for long, because nothing was asked.
        return min(now - self._since, float(acknowledged_ago) / 1000)
