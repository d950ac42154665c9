"""A migration whose process dies, and its heir: in between there is nothing but descriptors."""

from __future__ import annotations

import asyncio
import os

from postcopyd.incoming.ending import ListMissing, list_nowhere
from postcopyd.incoming.estate import Estate
from postcopyd.incoming.inheriting import InheritedVmm
from postcopyd.incoming.migration import IncomingMigration
from postcopyd.incoming.settings import Settings
from postcopyd.incoming.vmm import GuestMemory, VmmFailure
from tests.incoming.engine import Engine, InProcessVmm
from tests.incoming.guest import Guest


class Holder:
    """Holds copies, as a supervisor does."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.may_settle = asyncio.Event()
        self.may_settle.set()

    def keep(self, name: str, descriptor: int) -> None:
        self.release(name)
        self.held[name] = os.dup(descriptor)

    def release(self, name: str) -> None:
        if name in self.held:
            os.close(self.held.pop(name))

    def forget(self) -> None:
        for name in list(self.held):
            self.release(name)

    async def settled(self) -> None:
        await self.may_settle.wait()

    def copies(self) -> dict[str, int]:
        """What a successor is handed."""
        return {name: os.dup(descriptor) for name, descriptor in self.held.items()}


class InheritedInProcessVmm(InProcessVmm):
    """A VMM of this process, with descriptors that were inherited."""

    def __init__(self, guest: Guest, inherited: InheritedVmm) -> None:
        super().__init__(guest)
        self._inherited = inherited

    @property
    def memory(self) -> GuestMemory:
        return self._inherited.memory

    def close(self) -> None:
        super().close()
        self._inherited.resources.close()


def succeed(
    engine: Engine,
    holder: Holder,
    settings: Settings | None = None,
    *,
    vmm_gone: bool = False,
    list_missing: ListMissing = list_nowhere,
) -> None:
    """Have `engine` go on as a process that has nothing but what `holder` has.

    Its predecessor lets go of everything, in the middle of whatever it was about.

    :param vmm_gone: the VMM has exited meanwhile.
    """
    engine.migration.let_go()
    engine.events.clear()
    estate = Estate(holder, holder.copies())
    engine.migration = IncomingMigration(
        "vm0", settings or Settings(), engine._trace, estate, list_missing
    )

    def restore_vmm(inherited: InheritedVmm) -> InProcessVmm:
        assert inherited.kind == InProcessVmm.kind
        if vmm_gone:
            raise VmmFailure("it has exited")
        engine.vmm = InheritedInProcessVmm(engine.guest, inherited)
        return engine.vmm

    engine.migration.restore(restore_vmm)
