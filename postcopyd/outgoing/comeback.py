"""Another connection after a break: tried again and again, for as long as it makes sense."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final

from postcopyd.outgoing.backoff import Backoff
from postcopyd.outgoing.connecting import NobodyListens
from postcopyd.outgoing.connection import ConnectionLost, Stream
from postcopyd.outgoing.report import Account, Phase
from postcopyd.outgoing.standing import Standing
from postcopyd.outgoing.tls import NotTrusted

Reconnect = Callable[[], Awaitable[socket.socket]]
Secure = Callable[[socket.socket], Awaitable[Stream]]

_SECONDS: Final = 60.0
"""How long to try where giving up does not lose the guest."""
_STEADY_SECONDS: Final = 5.0
"""A connection that lasted for so long did not break because of what broke the one before."""


class Comeback:
    """Makes the further connections of one migration."""

    def __init__(
        self,
        reconnect: Reconnect,
        secure: Secure | None,
        retry_for: float | None,
        jitter: random.Random,
        standing: Standing,
        account: Account,
        enter: Callable[[Phase, int], None],
    ) -> None:
        """Connect with `reconnect`, and make a TLS handshake with `secure` if that is given.

        :param retry_for: seconds that an outage may last; None for ever once the destination may
            have the guest, and for a minute before that. A minute too if everything was sent and
            nobody listens any more: a destination that has completed does not.
        :param account: told why there is no connection, and when the next try comes.
        :param enter: called whenever that has changed.
        """
        self._reconnect = reconnect
        self._secure = secure
        self._retry_for = retry_for
        self._backoff = Backoff(jitter)
        self._standing = standing
        self._account = account
        self._enter = enter

    async def connection(self, broken: str, lasted: float, progressed: bool) -> Stream:
        """Return another connection.

        :param broken: what happened to the one before.
        :param lasted: seconds that it lasted, 0.0 if the destination never said anything on it.
        :param progressed: it has brought the migration on.
        :raise ConnectionLost: if the time to come back is over; with what happened at last.
        """
        account, backoff = self._account, self._backoff
        # Where the guest stands still and could go on, all tries together have their time.
        stands_still = self._standing.guest_stopped and not self._standing.package_sent
        if progressed or (lasted >= _STEADY_SECONDS and not stands_still):
            backoff.over()
        backoff.broke(time.monotonic())
        why, nobody_since = broken, None
        while True:
            now = time.monotonic()
            left = self._left(now, nobody_since)
            if left is not None and left <= 0:
                raise ConnectionLost(self._last_words(broken, why, now))
            wait = backoff.wait(now)
            account.broke(why, wait if left is None else min(wait, left))
            self._enter(Phase.RECONNECTING, 0)
            await asyncio.sleep(account.retry_seconds or 0.0)
            try:
                connection = await self._connect()
            except ConnectionLost as error:
                why = str(error)
                if isinstance(error, NotTrusted) and not self._standing.package_sent:
                    raise ConnectionLost(f"{broken}; no way back: {why}") from None
                if not isinstance(error, NobodyListens):
                    nobody_since = None
                elif nobody_since is None:
                    nobody_since = time.monotonic()
            else:
                account.counts.reconnects += 1
                account.retry_seconds = None
                self._enter(Phase.RECONNECTING, 0)
                return connection

    async def _connect(self) -> Stream:
        connection = await self._reconnect()
        return connection if self._secure is None else await self._secure(connection)

    def _last_words(self, broken: str, why: str, now: float) -> str:
        words = broken
        if self._retry_for != 0:
            words += f"; no way back in {self._backoff.lasts(now):.1f} s"
        return words if why == broken else f"{words}: {why}"

    def _left(self, now: float, nobody_since: float | None) -> float | None:
        """Return for how many seconds to go on, None for ever.

        :param nobody_since: since when nobody listens there; None if somebody may.
        """
        lasts = self._backoff.lasts(now)
        if self._retry_for is not None:
            return self._retry_for - lasts
        if not self._standing.package_sent:
            return _SECONDS - lasts
        if self._standing.all_sent and nobody_since is not None:
            return _SECONDS - (now - nobody_since)
        return None
