"""Which QEMU with which machine: the words of its command line."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

from tests.interop.qemu_versions import QemuVersion

if TYPE_CHECKING:
    from tests.interop.qemu import Qemu

Accelerator = Literal["kvm", "tcg"]
Backend = Literal["anonymous", "memfd", "hugetlb", "private-file"]

MEMORY_BLOCK: Final = "pc.ram"
"""The RAM block of the machine's memory, whichever backend it has."""

_KVM_CREATE_VM: Final = 0xAE01  # linux/kvm.h


class Guest(Protocol):
    """What runs in the machine."""

    def arguments(self) -> list[str]:
        """The words of QEMU's command line that boot it."""

    async def ready(self, qemu: Qemu) -> None:
        """Return when it uses its memory."""

    async def goes_on(self, qemu: Qemu) -> None:
        """Return when it has done something from now on."""


@dataclass(frozen=True)
class Machine:
    """A machine; the source's and the destination's differ in the version and the backend only."""

    guest: Guest
    version: QemuVersion = "7.2"
    accelerator: Accelerator = "tcg"
    memory: int = 512 << 20
    """Bytes."""
    processors: int = 1
    type: str = "q35"
    """`qemu_versions.COMMON_MACHINE` where the versions of source and destination differ."""
    backend: Backend = "anonymous"
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say what tells one machine from another, for the names of tests."""
        return f"{self.version}-{self.accelerator}-{self.backend}"

    def on(self, version: QemuVersion, backend: Backend) -> Machine:
        """The same machine in another QEMU."""
        return replace(self, version=version, backend=backend)

    def arguments(self, directory: Path) -> list[str]:
        """The words that make it; a private file goes into `directory`."""
        memory = {
            "anonymous": None,
            "memfd": "memory-backend-memfd,share=on",
            "hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
            "private-file": f"memory-backend-file,share=off,mem-path={directory}/memory",
        }[self.backend]
        machine = f"{self.type},accel={self.accelerator}"
        words = ["-no-user-config", "-nodefaults", "-no-reboot", "-display", "none"]
        words += ["-m", f"{self.memory >> 20}M", "-smp", str(self.processors)]
        if memory is not None:
            machine += f",memory-backend={MEMORY_BLOCK}"
            words += ["-object", f"{memory},id={MEMORY_BLOCK},size={self.memory}"]
        return [*words, "-machine", machine, *self.guest.arguments(), *self.extra]


def accelerators() -> list[Accelerator]:
    """The accelerators that work on this machine: always TCG, and KVM where it makes a VM."""
    try:
        with open("/dev/kvm", "rb+", buffering=0) as kvm:
            os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
    except OSError:
        return ["tcg"]
    return ["kvm", "tcg"]
