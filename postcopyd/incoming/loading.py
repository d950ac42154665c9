"""From the device state to a VMM that runs: what it is given, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

from postcopyd.incoming.collecting import Collection
from postcopyd.incoming.vmm import DeviceLoad, Vmm
from postcopyd.wire.messages import BlockList, Configuration, Discard, Package, Pages, ZeroPages
from postcopyd.wire.package import PackageContents, parse_package

_AHEAD = 16
"""Pieces of a device state without a package that may wait for the VMM, 64 KiB each at most."""


class Loading:
    """Keeps what a VMM needs to become the guest, for as many tries as it takes.

    The device state comes as one package when the source switches over, or piece by piece
    (`feed`) when its pre-copy has converged.
    """

    def __init__(
        self,
        configuration: Configuration,
        unheard: Callable[[str | None], None],
        given: Callable[[], None],
    ) -> None:
        """Begin with the source's configuration; the others are those of `DeviceLoad`."""
        self.configuration = configuration
        self._unheard = unheard
        self._given = given
        self.collection = Collection(())
        """The blocks that are not watched; to be set when the VMM is known."""
        self.package: Package | None = None
        self._contents: PackageContents | None = None
        self._collected = asyncio.Event()
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue(_AHEAD)

    # -- what comes from the source ------------------------------------------------------------

    def begin(self, message: BlockList) -> None:
        """Take the lengths of the unwatched blocks.

        :raise OSError: if there is no memory for them.
        """
        for entry in message.blocks:
            if entry.name in self.collection:
                self.collection.begin(entry.name, entry.length)

    def take(self, message: Pages | ZeroPages | Discard) -> bool:
        """Keep what is about an unwatched block, or forget it; False if it is about another."""
        if message.block not in self.collection:
            return False
        if isinstance(message, Discard):
            self.collection.discard(message)
        else:
            self.collection.take(message)
            if self._contents is not None and self.collection.complete:
                self._collected.set()
        return True

    def take_package(self, message: Package) -> None:
        """Take the device package.

        :raise ProtocolError: if it is malformed.
        """
        self._contents = parse_package(message.data)
        self.package = message
        self.look_whether_all_is_here()

    def look_whether_all_is_here(self) -> None:
        """Let the VMM load if nothing is missing for it."""
        if self.collection.complete:
            self._collected.set()

    def missing(self) -> Iterator[tuple[str, int, int]]:
        """Iterate over what must come before the VMM can load: block, offset, length in bytes."""
        return self.collection.missing()

    def received_bitmap(self, name: str) -> bytes | None:
        """Return the RECV_BITMAP payload of an unwatched block; None for any other."""
        return self.collection.received_bitmap(name) if name in self.collection else None

    def all_came(self) -> None:
        """Say that no page follows: what has not come is zero at the source, too."""
        self._collected.set()

    async def feed(self, data: bytes) -> None:
        """Take a piece of a device state that comes without a package."""
        await self._pieces.put(data)

    # -- what goes to the VMM ------------------------------------------------------------------

    async def run(self, vmm: Vmm) -> tuple[int, ...]:
        """Have the package loaded, while what is missing of the unwatched blocks may still come.

        :return: the values of the PINGs that report it.
        :raise VmmFailure: if the VMM does not load it; another one may.
        """
        assert self._contents is not None
        await vmm.run(self._load(self._contents.device_state))
        return self._contents.pings

    async def run_converged(self, vmm: Vmm) -> None:
        """Have the pieces loaded as they come.

        :raise VmmFailure: if the VMM does not load them.
        """
        self.all_came()
        await vmm.run_converged(self._load(b""), self._rest())

    def _load(self, device_state: bytes) -> DeviceLoad:
        blocks = self.collection.contents()
        return DeviceLoad(
            configuration=self.configuration.raw,
            device_state=device_state,
            blocks=blocks,
            collected=self._collected,
            unheard=self._unheard,
            given=self._given,
        )

    async def _rest(self) -> AsyncIterator[bytes]:
        while True:
            yield await self._pieces.get()
