"""How much may be kept of what pre-copies bring for private memory: of one, and of all together.

All together are the migrations of one event loop: a worker knows of no other one's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

from postcopyd.incoming.settings import Settings
from postcopyd.wire.errors import ProtocolError

_EVERY: Final = 256
"""Pages after which all together are looked at: the kernel is asked for each of their files."""

_all: WeakKeyDictionary[asyncio.AbstractEventLoop, list[StagingLimits]] = WeakKeyDictionary()


class StagingLimits:
    """Looks at what one migration has staged, and at what all have."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, settings: Settings, staged: Callable[[], int]
    ) -> None:
        """Join the others.

        :param staged: returns how many bytes the staging of this migration takes.
        """
        self._settings = settings
        self._staged = staged
        self._together = _all.setdefault(loop, [])
        self._together.append(self)
        self._pages = 0

    def check(self, pages: int) -> None:
        """See whether there may be more, after `pages` have been staged.

        :raise ProtocolError: if there may not; the text says what to do.
        """
        limit = self._settings.staging_limit
        if limit and self._staged() > limit:
            raise _too_much("the pre-copy has", limit, "staging_mib")
        limit = self._settings.staging_limit_together
        self._pages += pages
        if limit and self._pages >= _EVERY:
            self._pages = 0
            # Who takes nothing of it, because its VMM shares the memory, cannot be too much.
            if self._staged() and sum(other._staged() for other in self._together) > limit:
                raise _too_much("all pre-copies have", limit, "worker_staging_mib")

    def leave(self) -> None:
        """Be gone. Idempotent."""
        if self in self._together:
            self._together.remove(self)


def _too_much(who: str, limit: int, setting: str) -> ProtocolError:
    return ProtocolError(
        f"{who} brought more than {limit >> 20} MiB for private memory: switch over earlier, share "
        f"the VMM's memory, or raise {setting}",
        None,
    )
