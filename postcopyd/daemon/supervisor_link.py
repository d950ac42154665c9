"""The worker's end of the channel to the supervisor: what it tells, and what it leaves there."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn, TypeAlias, TypeVar

import msgspec

from postcopyd.daemon import channel
from postcopyd.daemon.channel import Channel
from postcopyd.daemon.logging import get_logger
from postcopyd.daemon.outbox import Outbox
from postcopyd.daemon.registry_error import RegistryError

_T = TypeVar("_T")

Inheritance: TypeAlias = dict[str, dict[str, int]]
"""What predecessors have left: name of the migration -> name there -> descriptor."""

_FAILED: Final = 1
_ALIVE: Final = 5.0  # seconds
_ANSWER: Final = 10.0
"""Seconds within which the supervisor answers: it never has much to do."""
_PATIENCE: Final = 5.0
"""Seconds for the service manager to take what it is to keep: guests wait meanwhile."""


class Orders(msgspec.Struct, frozen=True):
    """What a worker does when the supervisor says so."""

    stop: Callable[[], None]
    leave: Callable[[], None]
    reload: Callable[[], None]
    forget: Callable[[str], None]
    take_request: Callable[[socket.socket], None]
    """Takes over a connection with a request of the control API."""
    take_vmm: Callable[[socket.socket], None]
    """Takes over a connection that brings a VMM's handoff."""


class SupervisorLink:
    """Speaks to the supervisor. One that has gone is no error: the worker goes on without."""

    def __init__(self, to_supervisor: Channel, *, makes_room: bool) -> None:
        """Take over the channel.

        :param makes_room: end at once when the supervisor has gone, because its successor gets
            everything that we have from the service manager.
        """
        self._channel = to_supervisor
        self._outbox = Outbox(to_supervisor, self._could_not_say)
        self._makes_room = makes_room
        self._orders: Orders | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._claims: dict[str, asyncio.Future[channel.Refusal | None]] = {}
        self._questions: dict[int, asyncio.Future[channel.There]] = {}
        self._tokens = itertools.count()
        self._told_to_end: asyncio.Event = asyncio.Event()
        self._settling: deque[asyncio.Future[None]] = deque()

    # -- in the event loop -----------------------------------------------------------------------

    def start(self, orders: Orders) -> None:
        """Listen to the supervisor from now on, and tell that the event loop goes round."""
        self._orders = orders
        asyncio.get_running_loop().add_reader(self._channel.fileno(), self._hear)
        self._tell_that_it_lives()

    def ready(self) -> None:
        """Tell that the work is done from now on."""
        self._send(channel.Ready())

    def listed(self, name: str, state: str, standing: channel.Standing) -> None:
        """Tell how a migration stands."""
        self._send(channel.Listed(name, state, standing))

    def unlisted(self, name: str) -> None:
        """Tell that there is none of that name here any more."""
        self._send(channel.Unlisted(name))

    def reloaded(self) -> None:
        """Tell that what may change was read anew."""
        self._send(channel.Reloaded())

    def cannot_start(self, reason: str) -> None:
        """Tell that the daemon cannot do its work here."""
        self._send(channel.CannotStart(reason[:4096]))

    @staticmethod
    def leave(status: int = 0) -> NoReturn:
        """End as if killed: whatever was done now would be in the successor's way."""
        os._exit(status)

    async def ended(self) -> None:
        """Tell that all migrations have ended, and return when those of all others have.

        Also when there is no supervisor any more: then nobody waits for us.
        """
        self._send(channel.Ended())
        if self._channel.fileno() >= 0:
            await self._told_to_end.wait()

    async def claim(self, name: str) -> None:
        """Let a name be this worker's, until what is kept of it is forgotten. One at a time.

        :raise RegistryError: name-taken, too-many-migrations, out-of-resources, unavailable.
        """
        answer = self._claims[name] = asyncio.get_running_loop().create_future()
        self._send(channel.Claim(name))
        try:
            refusal = await self._answered(answer)
        except BaseException:
            if answer.done() and not answer.cancelled() and answer.result() is None:
                self.give_up(name)  # it was granted to somebody who has gone meanwhile
            raise
        finally:
            del self._claims[name]
        if refusal == "name-taken":
            raise RegistryError(
                refusal,
                f"there is a migration {name!r} already",
                f"choose another name, or cancel it: postcopyctl cancel {name}",
            )
        if refusal == "out-of-resources":
            raise RegistryError(
                refusal,
                "the supervisor of postcopyd has too few descriptors left",
                "raise 'descriptors' under [limits] (and LimitNOFILE= in the unit), or wait for a "
                "migration to end",
            )
        if refusal is not None:
            raise RegistryError(
                refusal,
                "as many migrations are under way as the configuration allows",
                "raise 'migrations' under [limits], or wait for one to end",
            )

    def give_up(self, name: str) -> None:
        """Let a name that was claimed be nobody's."""
        self._send(channel.Forgotten(name))

    async def where(self, name: str | None) -> channel.There:
        """Ask who has a migration; None asks for those that wait for a VMM.

        :raise RegistryError: unavailable.
        """
        token = next(self._tokens)
        answer = self._questions[token] = asyncio.get_running_loop().create_future()
        self._send(channel.Where(token, name))
        try:
            return await self._answered(answer)
        finally:
            del self._questions[token]

    def pass_on(self, worker: int, what: channel.Passed, connection: socket.socket) -> None:
        """Have another worker take a copy of a connection. It is closed if that cannot be."""
        self._send(channel.PassOn(worker, what), connection.fileno())

    async def _answered(self, answer: asyncio.Future[_T]) -> _T:
        try:
            if self._channel.fileno() < 0:
                raise TimeoutError
            async with asyncio.timeout(_ANSWER):
                return await answer
        except TimeoutError:
            raise RegistryError(
                "unavailable", "the supervisor of postcopyd does not answer", "try again"
            ) from None

    def close(self) -> None:
        """Tell and hear nothing more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._forget_channel()

    def _hear(self) -> None:
        try:
            for message, descriptor in self._channel.received():
                self._take(message, descriptor)
        except (EOFError, ValueError):
            self._lose()

    def _take(self, message: channel.Message, descriptor: int | None) -> None:
        orders = self._orders
        assert orders is not None
        match message:
            case channel.Stop():
                orders.stop()
            case channel.End():
                self._told_to_end.set()
            case channel.Leave():
                orders.leave()
            case channel.Settled():
                self._settled()
            case channel.Reload():
                orders.reload()
            case channel.Forget(name):
                orders.forget(name)
            case channel.Claimed(name, refusal):
                claim = self._claims.get(name)
                if claim is not None and not claim.done():
                    claim.set_result(refusal)
                elif refusal is None:
                    self.give_up(name)  # nobody waits for it any more
            case channel.There(token):
                question = self._questions.get(token)
                if question is not None and not question.done():
                    question.set_result(message)
            case channel.Handed(what) if descriptor is not None:
                connection = socket.socket(fileno=descriptor)
                connection.setblocking(False)
                take = orders.take_request if what == "request" else orders.take_vmm
                take(connection)
            case channel.Handed("vmm"):  # of a request that is lost its client is told
                get_logger().warning(
                    "a VMM could not be taken",
                    reason="too many files are open",
                    remedy="raise limits.descriptors, and LimitNOFILE= in the unit",
                )

    def _lose(self) -> None:
        """Go on without a supervisor, or make room for the one that is to come."""
        if self._makes_room:
            self.leave()
        self._forget_channel()
        get_logger().error(
            "the supervisor has gone: this process serves its migrations to their end, then ends"
        )
        self._told_to_end.set()
        if self._orders is not None:
            self._orders.stop()

    def _forget_channel(self) -> None:
        if self._channel.fileno() >= 0:
            self._outbox.close()
            asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
        while self._settling:
            self._settled()

    def _tell_that_it_lives(self) -> None:
        if not self._outbox:
            self._send(channel.Alive())
        self._timer = asyncio.get_running_loop().call_later(_ALIVE, self._tell_that_it_lives)

    def _send(self, message: channel.Message, descriptor: int | None = None) -> None:
        if self._channel.fileno() < 0:
            return
        try:
            if not self._outbox:
                self._channel.send(message, descriptor)
                return
        except BlockingIOError:
            pass  # it has not read for a while: guests do not wait for it any longer
        except OSError as error:
            self._could_not_say(error)
            return
        try:
            self._outbox.say(message, descriptor, copy=True)
        except OSError as error:
            get_logger().error("what must not be lost cannot be left", reason=str(error))
            self.leave(_FAILED)  # the successor goes on with what was left before

    def _could_not_say(self, error: OSError) -> None:
        if self._makes_room and isinstance(error, BrokenPipeError | ConnectionResetError):
            self._lose()  # at once: what nobody keeps must not be promised to anybody

    # -- what is left to a successor -------------------------------------------------------------

    async def settled(self) -> None:
        """Return when all that was left so far outlives this process and the supervisor.

        Before that nobody may be told that he can rely on it. A service manager that does not
        listen is not waited for without end.
        """
        if self._channel.fileno() < 0:
            return
        settled = asyncio.get_running_loop().create_future()
        self._settling.append(settled)
        self._send(channel.Settle())
        try:
            async with asyncio.timeout(_PATIENCE):
                await settled
        except TimeoutError:
            get_logger().warning(
                "the service manager does not take what it is to keep: going on without",
                waited_for=f"{_PATIENCE:g} s",
            )

    def _settled(self) -> None:
        settled = self._settling.popleft()
        if not settled.done():
            settled.set_result(None)

    def keeper(self, owner: str) -> MigrationKeeper:
        """Return who keeps what a migration leaves."""
        return MigrationKeeper(owner, self._send, self.settled)


class MigrationKeeper:
    """`postcopyd.incoming.estate.Keeper` with the supervisor."""

    def __init__(
        self, owner: str, send: Callable[..., None], settled: Callable[[], Awaitable[None]]
    ) -> None:
        """Keep for the migration of that name."""
        self._owner = owner
        self._send = send
        self._settled = settled

    def keep(self, name: str, descriptor: int) -> None:
        """Have the supervisor hold a copy of `descriptor`."""
        self._send(channel.Held(self._owner, name), descriptor)

    def release(self, name: str) -> None:
        """Have it let go of what it holds by that name."""
        self._send(channel.Released(self._owner, name))

    def forget(self) -> None:
        """Have it let go of everything."""
        self._send(channel.Forgotten(self._owner))

    async def settled(self) -> None:
        """Return when the service manager has what was to be kept so far."""
        await self._settled()
