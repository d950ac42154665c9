"""Requests to end a migration, which its event loop carries out like all that happens to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from postcopyd.incoming.recipient import Refused


class Cancelling:
    """The requests to cancel one migration that are still to be looked at."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, cancel: Callable[[str, bool], None]
    ) -> None:
        """Watch for requests.

        :param cancel: carries one out: why, and whether it is forced; raises `Refused` if it may
            not be.
        :raise OSError: if the kernel has no eventfd to give.
        """
        self._loop = loop
        self._cancel = cancel
        self._requests: list[tuple[str, bool, asyncio.Future[None]]] = []
        self._asked = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.add_reader(self._asked, self._carry_out)

    def ask(self, reason: str, force: bool) -> asyncio.Future[None]:
        """Ask for the end of the migration.

        :return: done when that is carried out; `Refused` if it may not be any more.
        """
        done: asyncio.Future[None] = self._loop.create_future()
        self._requests.append((reason, force, done))
        os.eventfd_write(self._asked, 1)
        return done

    def _carry_out(self) -> None:
        os.eventfd_read(self._asked)
        requests, self._requests = self._requests, []
        for reason, force, done in requests:
            refused = None
            try:
                self._cancel(reason, force)
            except Refused as error:
                refused = error
            _answer(done, refused)

    def close(self) -> None:
        """Watch no more: it has ended, as whoever still asks has wanted. To be called once."""
        self._loop.remove_reader(self._asked)
        os.close(self._asked)
        for _, _, done in self._requests:
            _answer(done, None)
        self._requests.clear()


def _answer(done: asyncio.Future[None], refused: Refused | None) -> None:
    if done.done():
        return  # cancelled: who has asked has gone
    if refused is None:
        done.set_result(None)
    else:
        done.set_exception(refused)
        done.exception()  # whoever does not look at it did not want to know
