"""The control API: HTTP with JSON on a Unix socket.

============================================  ===================================================
GET /v1/check                                 what this host can do, as the daemon sees it
GET /v1/migrations                            {"migrations": [...]}
POST /v1/migrations                           {"name", "listen"?, "handoff"?, ...}: create one; 201
POST /v1/qemu                                 {"qmp", "listen"?, "name"?, ...}: one for a QEMU; 201
GET /v1/migrations/NAME                       one migration
DELETE /v1/migrations/NAME?force=1            cancel it, or forget it if it has ended
POST /v1/migrations/NAME/retry                {"qmp", "force"?}: another QEMU takes a VMM's place
POST /v1/migrations/NAME/abandon              {"force"?}: what has not come is given up
GET /v1/migrations/NAME/wait?timeout=SECONDS  the migration when it has ended or the time is up
============================================  ===================================================

Both that create one take "allowed_sources"? too. A migration is the engine's report
(`postcopyd.incoming.report.Report`) and, beside it, `listen`, `security`, `allowed_sources`,
`handoff`, `missing_list`, `missing_list_failure`, `refused` and `worker`; the list leaves `missing`
out. Every error is {"error": {"code", "message", "hint"}}.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeVar, cast

import msgspec
from aiohttp import web

from postcopyd.daemon import host_check_process
from postcopyd.daemon.acceptor import Acceptor
from postcopyd.daemon.entry import Entry
from postcopyd.daemon.event_log import INTERNAL_ERROR_ID, log_client_refused
from postcopyd.daemon.exchange import Exchange, Handler
from postcopyd.daemon.left_behind import HeldMigration
from postcopyd.daemon.logging import get_logger
from postcopyd.daemon.qemus import Qemus
from postcopyd.daemon.registry import Registry
from postcopyd.daemon.registry_error import RegistryError
from postcopyd.vmm.peer import AllowedPeers, peer_of

_BODY_LIMIT: Final = 64 << 10  # bytes
_LONGEST_WAIT: Final = 86400.0  # seconds
_GRACE: Final = 1.0  # seconds for answers that are under way when the daemon stops

ERROR_STATUSES: Final[dict[str, HTTPStatus]] = {
    "invalid-name": HTTPStatus.BAD_REQUEST,
    "invalid-address": HTTPStatus.BAD_REQUEST,
    "invalid-source": HTTPStatus.BAD_REQUEST,
    "invalid-request": HTTPStatus.BAD_REQUEST,
    "not-allowed": HTTPStatus.FORBIDDEN,
    "no-such-migration": HTTPStatus.NOT_FOUND,
    "name-taken": HTTPStatus.CONFLICT,
    "past-the-package": HTTPStatus.CONFLICT,
    "vmm-refused": HTTPStatus.CONFLICT,
    "waits-for-no-vmm": HTTPStatus.CONFLICT,
    "guest-may-have-run": HTTPStatus.CONFLICT,
    "cannot-abandon": HTTPStatus.CONFLICT,
    "unreadable": HTTPStatus.CONFLICT,
    "address-unusable": HTTPStatus.CONFLICT,
    "not-secure": HTTPStatus.CONFLICT,
    "too-many-migrations": HTTPStatus.CONFLICT,
    "out-of-resources": HTTPStatus.SERVICE_UNAVAILABLE,
    "stopping": HTTPStatus.SERVICE_UNAVAILABLE,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "check-failed": HTTPStatus.INTERNAL_SERVER_ERROR,
    "internal-error": HTTPStatus.INTERNAL_SERVER_ERROR,
}

_Query = TypeVar("_Query", bound=msgspec.Struct)


class _CreateRequest(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    listen: str = ""
    handoff: str = ""
    allowed_sources: tuple[str, ...] = ()


class _QemuRequest(msgspec.Struct, forbid_unknown_fields=True):
    qmp: str
    listen: str = ""
    name: str = ""
    allowed_sources: tuple[str, ...] = ()


class _RetryRequest(msgspec.Struct, forbid_unknown_fields=True):
    qmp: str
    force: bool = False


class _AbandonRequest(msgspec.Struct, forbid_unknown_fields=True):
    force: bool = False


class _RemoveQuery(msgspec.Struct, forbid_unknown_fields=True):
    force: bool = False


class _WaitQuery(msgspec.Struct, forbid_unknown_fields=True):
    timeout: Annotated[float, msgspec.Meta(ge=0, le=_LONGEST_WAIT)] | None = None


class ControlApi:
    """Serves the control API on a socket, and on connections that another worker passes on."""

    def __init__(
        self,
        listener: socket.socket | None,
        registry: Registry,
        allowed: AllowedPeers,
        number: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        """Take over `listener`: a Unix socket, listening and non-blocking.

        :param listener: None for a worker that is not the front.
        :param allowed: who may use it.
        :param number: of this worker.
        :param exchange: the way to other workers; None if there are none, or this is one of them.
        """
        self._registry = registry
        self._qemus = Qemus(registry)
        self._allowed = allowed
        self._number = number
        self._exchange = exchange
        self._acceptor = None if listener is None else Acceptor(listener, self.take)
        self._connecting: set[asyncio.Task[None]] = set()
        self._working: set[asyncio.Task[Entry]] = set()
        application = web.Application(middlewares=[self._guard], client_max_size=_BODY_LIMIT)
        application.router.add_get("/v1/check", self._check_host)
        application.router.add_get("/v1/migrations", self._list)
        application.router.add_post("/v1/migrations", self._create)
        application.router.add_post("/v1/qemu", self._receive_qemu)
        application.router.add_get("/v1/migrations/{name}", self._show)
        application.router.add_post("/v1/migrations/{name}/retry", self._retry)
        application.router.add_post("/v1/migrations/{name}/abandon", self._abandon)
        application.router.add_delete("/v1/migrations/{name}", self._remove)
        application.router.add_get("/v1/migrations/{name}/wait", self._wait)
        # Without cancellation the wait of a client that has gone would go on.
        self._runner = web.AppRunner(
            application, handler_cancellation=True, shutdown_timeout=_GRACE
        )

    async def start(self) -> None:
        """Serve from now on."""
        await self._runner.setup()
        if self._acceptor is not None:
            self._acceptor.start()

    async def close(self) -> None:
        """Serve no more and close the socket; answers under way have a second."""
        if self._acceptor is not None:
            self._acceptor.close()
        await asyncio.gather(*self._connecting, *self._working, return_exceptions=True)
        await self._runner.cleanup()

    # -- connections -------------------------------------------------------------------------

    def take(self, connection: socket.socket) -> None:
        """Take over a connection; non-blocking."""
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        try:
            await loop.connect_accepted_socket(lambda: _Connection(server, loop=loop), connection)
        except OSError:  # it has gone again
            connection.close()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let only those in who may be, and give every error the one form."""
        try:
            self._check_peer(request)
            if self._exchange is not None:
                return await self._exchange.answer(request, handler)
            return await handler(request)
        except RegistryError as error:
            return _error(error.code, error.message, error.hint)
        except _NotAllowed as error:
            return _error("not-allowed", str(error), _NOT_ALLOWED_HINT)
        except msgspec.MsgspecError as error:
            return _error("invalid-request", f"the request is wrong: {error}", _SEE)
        except UnicodeDecodeError:
            return _error("invalid-request", "the request is wrong: not UTF-8", _SEE)
        except (host_check_process.HostCheckFailed, OSError) as error:
            return _error("check-failed", str(error), "run postcopyctl check on this host")
        except web.HTTPException as error:
            code = (error.reason or "error").lower().replace(" ", "-")
            return _error(code, f"{request.method} {request.path}: {error.reason}", _SEE, error)
        except Exception:
            get_logger().exception(
                "a request of the control API failed",
                request=f"{request.method} {request.path}",
                message_id=INTERNAL_ERROR_ID,
            )
            return _error("internal-error", "postcopyd failed", "its log says how")

    def _check_peer(self, request: web.Request) -> None:
        transport = request.transport
        if transport is None:
            raise _NotAllowed("the connection is closed")
        peer = peer_of(cast(socket.socket, transport.get_extra_info("socket")))
        if (reason := self._allowed.refusal(peer, "control postcopyd")) is not None:
            log_client_refused(str(peer), reason)
            raise _NotAllowed(f"user {peer.uid} is not allowed to control postcopyd")

    # -- what can be asked -------------------------------------------------------------------

    async def _check_host(self, request: web.Request) -> web.Response:
        return _raw(await host_check_process.run())

    async def _list(self, request: web.Request) -> web.Response:
        migrations = [self._view(entry) for entry in (*self._registry, *self._registry.held)]
        for migration in migrations:
            del migration["missing"]  # it may be long
        if self._exchange is not None:
            migrations += await self._exchange.lists()
        return _json({"migrations": migrations})

    async def _create(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=_CreateRequest)
        entry = await self._registry.open(
            wish.name, wish.listen, wish.handoff, wish.allowed_sources
        )
        await self._registry.settled()
        return _json(self._view(entry), HTTPStatus.CREATED)

    async def _receive_qemu(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=_QemuRequest)
        entry = await self._finish(
            self._qemus.receive(wish.name, wish.listen, wish.qmp, wish.allowed_sources)
        )
        return _json(self._view(entry), HTTPStatus.CREATED)

    async def _retry(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=_RetryRequest)
        name = request.match_info["name"]
        entry = await self._finish(self._qemus.retry(name, wish.qmp, wish.force))
        return _json(self._view(entry))

    async def _abandon(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=_AbandonRequest)
        entry = await self._finish(self._registry.abandon(request.match_info["name"], wish.force))
        return _json(self._view(entry))

    async def _finish(self, work: Coroutine[Any, Any, Entry]) -> Entry:
        """Carry out what must not stop half way because its client has gone."""
        task = asyncio.get_running_loop().create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return await asyncio.shield(task)

    def _view(self, entry: Entry | HeldMigration) -> dict[str, Any]:
        return entry.view() | {"worker": self._number}

    async def _show(self, request: web.Request) -> web.Response:
        return _json(self._view(self._registry.find(request.match_info["name"])))

    async def _remove(self, request: web.Request) -> web.Response:
        query = _query(request, _RemoveQuery)
        entry = self._registry.find(request.match_info["name"])
        if isinstance(entry, HeldMigration):
            self._registry.release(entry, query.force)
        else:
            await self._registry.remove(entry.name, query.force)
        return _json(self._view(entry))

    async def _wait(self, request: web.Request) -> web.Response:
        query = _query(request, _WaitQuery)
        entry = self._registry.find(request.match_info["name"])
        await entry.wait(query.timeout)
        return _json(self._view(entry))


class _NotAllowed(Exception):
    """Who asks may not."""


class _Connection(web.RequestHandler):
    """A connection of aiohttp's whose answers to what is not HTTP have the one form, too."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = HTTPStatus.INTERNAL_SERVER_ERROR,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that could not be read, and close the connection."""
        answer = _error("invalid-request", f"the request is not HTTP: {message or exc}", _SEE)
        answer.force_close()
        return answer


_SEE: Final = "postcopyd(8) lists what can be asked"
_NOT_ALLOWED_HINT: Final = (
    "add the user to control_users, or to the group of control_group, in the configuration"
)


def _query(request: web.Request, kind: type[_Query]) -> _Query:
    """Return the query as a `kind`.

    :raise msgspec.ValidationError: if it is none.
    """
    return msgspec.convert(dict(request.query), kind, strict=False)


def _json(values: Any, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return _raw(msgspec.json.encode(values), status)


def _raw(body: bytes, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def _error(
    code: str, message: str, hint: str, as_http: web.HTTPException | None = None
) -> web.Response:
    status = ERROR_STATUSES[code] if as_http is None else HTTPStatus(as_http.status)
    response = _json({"error": {"code": code, "message": message, "hint": hint}}, status)
    if as_http is not None and "Allow" in as_http.headers:
        response.headers["Allow"] = as_http.headers["Allow"]
    return response
