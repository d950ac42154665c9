"""A VMM on its way into the place of one that has not loaded its devices.

Its descriptors are kept aside, by names of their own, until it has everything. So whoever is killed
meanwhile leaves either VMM whole, and no guest of either goes on with zeros:

1. The journal names the VMM before, whose memory files and staging are all here.
2. When everything is copied it names the new memory files, by the names that they have aside.
3. The descriptors take their place, the journal says so, and what was aside or the other's goes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from postcopyd.incoming import inheriting
from postcopyd.incoming.aside import Aside
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.filling import MemoryFilling
from postcopyd.incoming.journal import VmmRecord
from postcopyd.incoming.moving import Move
from postcopyd.incoming.vmm import Vmm


class Replacement:
    """Has one VMM take the place of another, once."""

    def __init__(self, vmm: Vmm, estate: Estate) -> None:
        """Keep its descriptors aside."""
        self._vmm = vmm
        self._estate = estate
        # What a predecessor has kept aside may be what the journal names now.
        self._aside = next(
            aside
            for aside in (f"{number}-" for number in count(1))
            if not estate.left(inheriting.PREFIX + aside)
        )
        inheriting.leave(vmm, estate, self._aside)
        self._journal_names_it = False
        self.in_place = False
        """True when it has everything."""

    @property
    def record(self) -> VmmRecord | None:
        """What the journal is to say of it; None while it says that of the VMM before."""
        if self.in_place:
            return inheriting.record_of(self._vmm)
        return inheriting.record_of(self._vmm, self._aside) if self._journal_names_it else None

    async def move(self, filling: MemoryFilling, aside: Aside, record: Callable[[], None]) -> None:
        """Give what is here to its memory.

        :param record: tells a successor how it stands, or raises OSError.
        :raise VmmFailure: if it does not do its part.
        :raise OSError: if its memory cannot be written. Everything is as before then.
        """
        await self._vmm.advise()
        await self._vmm.discard()
        move = Move(filling.holdings, self._vmm.memory)
        try:
            await aside.do(move.copy)
            # The journal, which is memory, must never be ahead of the descriptors that it names.
            await self._estate.settled()
            move.prepare()
            self._journal_names_it = True
            try:
                record()
            except OSError:
                self._journal_names_it = False
                raise
            filling.move_to(self._vmm.memory, move)
            inheriting.leave(self._vmm, self._estate, replaces=True)
            await self._estate.settled()
            self.in_place = True
            record()
        except BaseException:
            aside.then(move.close)
            raise
        inheriting.release_others(self._vmm, self._estate)
        filling.holdings.release_staging()
        aside.begin(move.close)

    def give_up(self) -> None:
        """Keep nothing of it: it has gone, or has not done its part."""
        if not self._journal_names_it:
            for name in self._estate.left(inheriting.PREFIX + self._aside):
                self._estate.release(name)
