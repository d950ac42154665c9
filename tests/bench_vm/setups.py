"""What is compared: who receives, with or without a preempt channel, for which QEMU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from tests.interop.linux_guest import LinuxGuest
from tests.interop.qemu_machine import Machine
from tests.interop.qemu_versions import QemuVersion

Receiver = Literal["QEMU", "postcopyd"]

VERSIONS: Final[tuple[QemuVersion, ...]] = ("7.2", "10.0")
BEAT_MS: Final = 20
"""Between two heartbeats: how precisely waits and iterations can be told to be in the window."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One way for the guest to get to its destination."""

    version: QemuVersion
    receiver: Receiver
    preempt: bool

    @property
    def name(self) -> str:
        """How it is called in tables."""
        return f"{self.receiver}{', preempt' if self.preempt else ''}"


def setups(version: QemuVersion) -> list[Setup]:
    """All setups of a version, QEMU's own first."""
    return [
        Setup(version, receiver, preempt)
        for receiver in ("QEMU", "postcopyd")
        for preempt in (False, True)
    ]


def machine(version: QemuVersion, quick: bool) -> Machine:
    """The machine that is migrated; a `quick` one only shows that everything works."""
    guest = LinuxGuest(checked_mib=32 if quick else 300, beat_ms=BEAT_MS)
    memory = (128 if quick else 512) << 20
    return Machine(guest, version=version, memory=memory, backend="memfd")
