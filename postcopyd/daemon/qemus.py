"""QEMUs that wait for a migration, and whose memory is adopted for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from postcopyd.daemon.entry import Entry
from postcopyd.daemon.registry import Registry
from postcopyd.daemon.registry_error import RegistryError
from postcopyd.incoming.recipient import Refused
from postcopyd.vmm.adoption import AdoptionRefused

if TYPE_CHECKING:
    from postcopyd.vmm.qemu import QemuVmm


class Qemus:
    """Brings QEMUs to their migrations."""

    def __init__(self, registry: Registry) -> None:
        """Have `registry` keep the migrations."""
        self._registry = registry

    async def receive(
        self, name: str, listen: str, monitor: str, allowed: tuple[str, ...] = ()
    ) -> Entry:
        """Adopt a QEMU that waits for a migration, and create the migration that fills it.

        :param name: empty for one that is made of its process id.
        :param listen: as `create`, and `allowed`.
        :param monitor: path of its QMP socket.
        :raise RegistryError: vmm-refused, and those of `open`. The QEMU is as before then.
        """
        if name:
            self._registry.check_may_create(name)
        vmm = await _adopt(monitor)
        try:
            entry = await self._registry.open(
                name or f"qemu-{vmm.process_id}", listen, allowed=allowed
            )
        except BaseException as error:
            await _give_back(vmm, str(error))
            raise
        await self._attach(entry, vmm)
        return entry

    async def retry(self, name: str, monitor: str, force: bool) -> Entry:
        """Have another QEMU take the place of a VMM that has not loaded its devices.

        :param monitor: path of its QMP socket.
        :param force: also where the guest may have run in that VMM.
        :raise RegistryError: no-such-migration, waits-for-no-vmm, guest-may-have-run, vmm-refused.
            Everything that is here is kept then.
        """
        entry = self._registry.get(name)
        if entry.migration is None or not entry.migration.waits_for_vmm:
            raise RegistryError(
                "waits-for-no-vmm",
                f"migration {name!r} is in state {entry.state.value} and needs no other VMM",
                f"postcopyctl show {name} tells how it stands",
            )
        if entry.migration.guest_may_have_run and not force:
            raise RegistryError(
                "guest-may-have-run",
                f"the guest of migration {name!r} may have run in the QEMU before, which had "
                "everything and has exited without a word",
                "look at what that QEMU and its disks tell; if the guest has not run: --force",
            )
        await self._attach(entry, await _adopt(monitor), force)
        return entry

    async def _attach(self, entry: Entry, vmm: QemuVmm, force: bool = False) -> None:
        try:
            if entry.migration is None:
                raise Refused(f"migration {entry.name!r} has ended")
            entry.migration.attach_vmm(vmm, force=force)
        except Refused as error:
            await _give_back(vmm, str(error))
            raise RegistryError("vmm-refused", str(error)) from error
        self._registry.changed()
        await self._registry.settled()


async def _adopt(monitor: str) -> QemuVmm:
    # Imported here: most daemons never meet a QEMU, and it takes memory.
    from postcopyd.vmm.qemu import adopt_qemu

    try:
        return await adopt_qemu(monitor)
    except AdoptionRefused as error:
        hint = "postcopyctl(1) tells what receive-qemu takes"
        raise RegistryError("vmm-refused", str(error), hint) from error


async def _give_back(vmm: QemuVmm, reason: str) -> None:
    await vmm.failed(reason)
    vmm.close()
