"""Tells a migration when the network does not carry its stream any more, and when it does again.

When something in the network has changed, every path that is watched is looked at anew. The looking
is done beside the event loop: the kernel answers when whoever is changing the network is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import msgspec

from postcopyd.daemon.event_log import log_network_unwatched
from postcopyd.incoming.path import StreamPath

if TYPE_CHECKING:
    from postcopyd.kernel.network import Link, Network, NetworkChanges

_PAUSE: Final = 0.05
"""Seconds between two looks: changes come in bursts."""
_ANOTHER_TRY: Final = 5.0
"""Seconds until a look is tried again that the kernel has not let us have."""


class Loss(msgspec.Struct, frozen=True):
    """Why the network does not carry a stream."""

    reason: str
    for_good: bool
    """True when the stream cannot go on, whatever comes."""


class Carrier(msgspec.Struct, frozen=True):
    """What carries a stream, as it was when it last was seen to work."""

    link: Link
    has_address: bool
    """True if our address belongs to it. If not, another link may carry the stream as well."""


def look(
    network: Network, path: StreamPath, carrier: Carrier | None
) -> tuple[Carrier | None, Loss | None]:
    """See how a path stands; return what carries it now, and what is wrong.

    A path that cannot be followed at the beginning, with its stream just there, is not judged: the
    kernel decides by more than can be asked here.

    :param carrier: what carried it before; None at the beginning.
    :raise OSError: if the kernel does not tell.
    """
    home = network.link_with(path.here, path.scope)
    route = network.route(path.there, path.here, path.scope)
    if carrier is None:
        link = network.link(route) if route is not None and home is not None else None
        if link is None or not (link.up and link.carrier):
            return None, None
        return Carrier(link, home == route), None
    # An address that has moved to another link takes its streams along. A route that has moved does
    # so only for an address that does not depend on the link: the other way may lead elsewhere.
    index = home if carrier.has_address else route
    link = network.link(carrier.link.index if index is None else index)
    if link is None:
        return carrier, Loss(f"link {carrier.link.name} has been removed", True)
    carrier = msgspec.structs.replace(carrier, link=link)
    if not link.up:
        # Such a link loses its routes, and its IPv6 addresses; that is not told beside.
        return carrier, Loss(f"link {link.name} is down", False)
    if home is None:
        return carrier, Loss(f"address {path.here} has been removed from this host", True)
    if not link.carrier:
        return carrier, Loss(f"link {link.name} has no carrier", False)
    if route is None:
        return carrier, Loss(f"there is no route to {path.there}", False)
    return carrier, None


class PathWatch:
    """The watch over one path; made by `NetworkWatch.watch`."""

    def __init__(
        self,
        path: StreamPath,
        lost: Callable[[str, bool], None],
        back: Callable[[], None],
        closed: Callable[[PathWatch], None],
    ) -> None:
        self.path = path
        self.carrier: Carrier | None = None
        self._loss: Loss | None = None
        self._lost = lost
        self._back = back
        self._closed = closed

    def seen(self, carrier: Carrier | None, loss: Loss | None) -> None:
        """Tell what a look has found, if it is news."""
        self.carrier = carrier
        before, self._loss = self._loss, loss
        if loss is None and before is not None:
            self._back()
        elif loss is not None and loss != before:
            self._lost(loss.reason, loss.for_good)

    def close(self) -> None:
        """Watch no more. Idempotent."""
        self._closed(self)


class NetworkWatch:
    """Watches the paths of all streams of a daemon, as long as there are any.

    Where that is not possible it is logged once, and nothing is told.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._watches: set[PathWatch] = set()
        self._changes: NetworkChanges | None = None
        self._stirred = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._works = True
        self._warned = False

    def prepare(self) -> None:
        """See whether watching works here.

        What is imported for it takes a tenth of a second: better now than while a guest waits.
        """
        try:
            self._open().close()
        except OSError as error:
            self._warn(error)
        except Exception as error:
            self._give_up(error)

    def watch(
        self, path: StreamPath, lost: Callable[[str, bool], None], back: Callable[[], None]
    ) -> PathWatch:
        """Watch `path` until the watch is closed.

        :param lost: called with the reason when the network does not carry the path any more, and
            with whether that is for good; again if the reason becomes another one.
        :param back: called when it carries the path again.
        """
        watch = PathWatch(path, lost, back, self._forget)
        if self._works:
            self._watches.add(watch)
            self._look_soon()
            if self._task is None:
                self._task = asyncio.create_task(self._run())
        return watch

    def _forget(self, watch: PathWatch) -> None:
        self._watches.discard(watch)
        if not self._watches and self._task is not None:
            self._task.cancel()
            self._task = None
            self._stop_listening()

    # -- looking ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        while self._works:
            await self._stirred.wait()
            try:
                await self._look()
            except OSError as error:
                self._warn(error)
                await asyncio.sleep(_ANOTHER_TRY)
                self._look_soon()
            except Exception as error:
                self._give_up(error)
            else:
                await asyncio.sleep(_PAUSE)

    async def _look(self) -> None:
        await asyncio.to_thread(load)
        self._listen()
        watches = tuple(self._watches)
        seen = await asyncio.to_thread(_look_at, [(watch.path, watch.carrier) for watch in watches])
        for watch, (carrier, loss) in zip(watches, seen, strict=True):
            if watch in self._watches:
                watch.seen(carrier, loss)

    def _look_soon(self) -> None:
        if self._changes is not None:
            asyncio.get_running_loop().remove_reader(self._changes.fileno())
        self._stirred.set()

    def _listen(self) -> None:
        """Hear of what changes from now on. What has changed is about to be looked at."""
        self._stirred.clear()
        if self._changes is None:
            self._changes = self._open()
        self._changes.forget()
        asyncio.get_running_loop().add_reader(self._changes.fileno(), self._look_soon)

    def _stop_listening(self) -> None:
        if self._changes is not None:
            asyncio.get_running_loop().remove_reader(self._changes.fileno())
            self._changes.close()
            self._changes = None

    @staticmethod
    def _open() -> NetworkChanges:
        from postcopyd.kernel.network import NetworkChanges

        return NetworkChanges()

    def _give_up(self, error: Exception) -> None:
        self._works = False
        self._watches.clear()
        self._stop_listening()
        self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            log_network_unwatched(f"{type(error).__name__}: {error}")


def load() -> None:
    """Import what watching takes: a tenth of a second. A fault in it may raise anything."""
    # Imported here: it must not keep the daemon from its work.
    from postcopyd.kernel import network  # noqa: F401


def _look_at(
    paths: Iterable[tuple[StreamPath, Carrier | None]],
) -> list[tuple[Carrier | None, Loss | None]]:
    from postcopyd.kernel.network import Network

    with Network() as network:
        return [look(network, path, carrier) for path, carrier in paths]
