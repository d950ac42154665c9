"""The front's way to the other workers: each request and each VMM gets to whom it is for.

A connection goes to another worker as a descriptor, by way of the supervisor, so nobody else can
reach it. A worker that has died is waited for: its successor has the same number.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any, Final, Protocol

import msgspec
from aiohttp import web

from postcopyd.daemon import forwarding
from postcopyd.daemon.channel import Passed, There
from postcopyd.daemon.forwarding import Answer
from postcopyd.daemon.registry_error import RegistryError
from postcopyd.daemon.routing import Placements, check_only_one_waits
from postcopyd.vmm.checks import HandoffRefused
from postcopyd.vmm.first_message import FirstMessage

_SUCCESSION: Final = 10.0
"""Seconds within which a worker that has died has a successor."""
_LOOK: Final = 0.05
"""Seconds between two looks whether it has."""
_QUICK: Final = 1.0
"""Seconds: a worker that dies of a request sooner may have died of that request."""
_ANSWER: Final = 20.0
"""Seconds for an answer that nothing has to be waited for."""


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Switchboard(Protocol):
    """The supervisor, as far as it connects workers."""

    async def where(self, name: str | None) -> There:
        """Ask who has a migration; None asks for those that wait for a VMM.

        :raise RegistryError: unavailable.
        """

    def pass_on(self, worker: int, what: Passed, connection: socket.socket) -> None:
        """Have another worker take a copy of a connection. It is closed if that cannot be."""


class _Named(msgspec.Struct):
    """As much of a wish to create a migration as must be known here."""

    name: str = ""


class Exchange:
    """Finds out whose something is, and brings it there."""

    def __init__(self, switchboard: Switchboard, own: int, workers: int) -> None:
        """Know of nobody.

        :param own: our own number among the `workers`.
        """
        self._switchboard = switchboard
        self._own = own
        self._workers = workers
        self._placements = Placements()

    # -- requests of the control API -----------------------------------------------------------

    async def answer(self, request: web.Request, own: Handler) -> web.StreamResponse:
        """Return what the worker of the migration says to a request.

        :param own: answers it if that is this worker.
        :raise RegistryError: unavailable.
        """
        name = request.match_info.get("name")
        if name is not None:
            return await self._answer_for(name, request, own)
        if request.method == "POST" and request.match_info.http_exception is None:
            return await self._answer_to_wish(request, own)
        return await own(request)

    async def lists(self) -> list[dict[str, Any]]:
        """Return the migrations of all other workers.

        :raise RegistryError: unavailable.
        """
        others = [number for number in range(self._workers) if number != self._own]
        answers = await asyncio.gather(
            *(self._ask(number, "GET", "/v1/migrations", b"", _ANSWER) for number in others)
        )
        return [
            migration
            for answer in answers
            for migration in msgspec.json.decode(answer.body)["migrations"]
        ]

    async def _answer_for(
        self, name: str, request: web.Request, own: Handler
    ) -> web.StreamResponse:
        there = await self._switchboard.where(name)
        worker = self._placements.worker_for(name, there.worker, {})
        if worker is None or worker == self._own:
            return await own(request)
        at_once = request.method == "GET" and not request.path.endswith("/wait")
        return await self._forward(worker, request, _ANSWER if at_once else None)

    async def _answer_to_wish(self, request: web.Request, own: Handler) -> web.StreamResponse:
        try:
            name = msgspec.json.decode(await request.read(), type=_Named).name
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return await own(request)  # which says what is wrong
        there = await self._switchboard.where(name)
        worker = self._placements.worker_for(name, there.owner, there.ready)
        if worker is None:
            worker = self._own
        # One without a name is told apart from others without one: no name has a '/'.
        with self._placements.placed(name or f"/{id(request)}", worker):
            if worker == self._own:
                return await own(request)
            return await self._forward(worker, request, None)

    async def _forward(
        self, worker: int, request: web.Request, within: float | None
    ) -> web.Response:
        answer = await self._ask(
            worker, request.method, request.raw_path, await request.read(), within
        )
        return web.Response(
            body=answer.body,
            status=HTTPStatus(answer.status),
            content_type="application/json",
        )

    async def _ask(
        self, worker: int, method: str, target: str, body: bytes, within: float | None
    ) -> Answer:
        """Ask a worker, and its successor if it dies: a question may be asked twice, a deed not.

        :raise RegistryError: unavailable.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _SUCCESSION
        while True:
            await self._until_ready(worker, deadline)
            asked = loop.time()
            ours, theirs = socket.socketpair()
            with theirs:
                self._switchboard.pass_on(worker, "request", theirs)
            try:
                async with asyncio.timeout(within):
                    return await forwarding.ask(ours, method, target, body)
            except TimeoutError:
                raise _unavailable(worker, "does not answer") from None
            except forwarding.NotTaken:
                if loop.time() > deadline:
                    raise _unavailable(
                        worker, "takes no request: it may have too many files open"
                    ) from None
            except ConnectionResetError:
                if method != "GET":
                    raise RegistryError(
                        "unavailable",
                        f"worker {worker} has died before it answered",
                        "postcopyctl list tells what has come of it",
                    ) from None
            if loop.time() - asked >= _QUICK:
                deadline = loop.time() + _SUCCESSION
            await asyncio.sleep(_LOOK)

    async def _until_ready(self, worker: int, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        while worker not in (await self._switchboard.where(None)).ready:
            if loop.time() > deadline:
                raise _unavailable(worker, "is being replaced by another process")
            await asyncio.sleep(_LOOK)

    # -- VMMs ----------------------------------------------------------------------------------

    async def pass_on(self, name: str | None, message: FirstMessage, meanwhile: ExitStack) -> bool:
        """Bring a VMM to its worker (`postcopyd.vmm.handoff.PassOn`).

        :raise HandoffRefused: if it is for nobody, or for a worker that is not there.
        """
        try:
            if name is None:
                name = await self._only_one_that_waits()
            there = await self._switchboard.where(name)
            worker = self._placements.worker_for(name, there.owner, there.ready)
            if worker is None:
                worker = self._own
            meanwhile.enter_context(self._placements.placed(name, worker))
            if worker == self._own:
                return False
            await self._until_ready(worker, asyncio.get_running_loop().time() + _SUCCESSION)
        except RegistryError as error:
            raise HandoffRefused(error.message) from error
        await self._hand_over(worker, message)
        return True

    async def _hand_over(self, worker: int, message: FirstMessage) -> None:
        ours, theirs = socket.socketpair()

        def announce() -> None:
            self._switchboard.pass_on(worker, "vmm", theirs)
            theirs.close()  # or we would not notice that the worker has gone

        with ours, theirs:
            ours.setblocking(False)
            try:
                await message.pass_on(ours, announce)
            except OSError:
                if theirs.fileno() >= 0:
                    raise
                # The worker has gone, or has refused the VMM and told it so: closing says the rest.
            message.connection.close()
            message.close()
            await _closed(ours)  # the VMM was answered

    async def _only_one_that_waits(self) -> str:
        there = await self._switchboard.where(None)
        check_only_one_waits(there.waiting, there.number_waiting)
        return there.waiting[0]


def _unavailable(worker: int, what: str) -> RegistryError:
    return RegistryError("unavailable", f"worker {worker} {what}", "try again")


async def _closed(connection: socket.socket) -> None:
    """Return when the other end was closed, or not in time."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_SUCCESSION):
            await loop.sock_recv(connection, 1)
    except (TimeoutError, OSError):
        return
