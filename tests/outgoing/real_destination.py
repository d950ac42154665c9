"""A real destination with real memory, which begins anew when it has failed before the package."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from postcopyd.incoming.migration import IncomingMigration
from postcopyd.incoming.recipient import Refused
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.states import State
from tests.accepting import accept
from tests.incoming.engine import InProcessVmm
from tests.incoming.guest import LIMIT, PAGE, Guest


class RealDestination:
    """A listener, and behind it one migration after the other, each with a guest of its own.

    As a daemon does: one that has completed takes nobody any more, and its listener closes. Unlike
    a daemon another migration, with another VMM, waits where one has failed before the package.
    """

    def __init__(self, pages: int, page_size: int = PAGE, settings: Settings | None = None) -> None:
        self._pages, self._page_size = pages, page_size
        self._settings = settings or Settings()
        self.vmms: list[InProcessVmm] = []
        self.migration: IncomingMigration
        self.refusals: list[str] = []
        """Why connections were closed."""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]

    @property
    def vmm(self) -> InProcessVmm:
        """The VMM of the last migration."""
        return self.vmms[-1]

    @property
    def guests_that_ran(self) -> int:
        """How many VMMs were ever told to run their guest."""
        return sum("run" in vmm.told for vmm in self.vmms)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[RealDestination]:
        """Take sources on `self.port`."""
        self.begin()
        accepting = asyncio.ensure_future(self._accept())
        try:
            yield self
        finally:
            accepting.cancel()
            self.listener.close()
            if not self.migration.state.ended:
                self.migration.cancel("the test is over", force=True)
            async with asyncio.timeout(LIMIT):
                await asyncio.gather(accepting, self.migration.wait(), return_exceptions=True)
            for vmm in self.vmms:
                vmm.guest.close()

    def begin(self) -> None:
        """Have a new migration wait."""
        self.vmms.append(InProcessVmm(Guest(self._pages, self._page_size, register=False)))
        self.migration = IncomingMigration("vm0", self._settings, lambda _: None)
        self.migration.attach_vmm(self.vmm)

    async def _accept(self) -> None:
        while True:
            accepted = asyncio.ensure_future(accept(self.listener))
            ended = asyncio.ensure_future(self.migration.wait())
            over = False
            try:
                await asyncio.wait((accepted, ended), return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                over = True
            accepted.cancel()
            ended.cancel()
            await asyncio.gather(accepted, ended, return_exceptions=True)
            if not accepted.cancelled():
                connection = accepted.result()
                if over:
                    connection.close()
                else:
                    self._take(connection)
            if over:
                return
            if not ended.cancelled():
                if self.migration.state is State.END or self.guests_that_ran:
                    self.listener.close()
                    return
                self.begin()

    def _take(self, connection: socket.socket) -> None:
        try:
            self.migration.attach_stream(connection, "the source")
        except Refused as error:
            self.refusals.append(str(error))
            connection.close()
