"""A Linux guest that checks its memory: Debian's kernel and guest/checker.c, and nothing else.

It needs no disk and no network, and boots under TCG: in about three seconds the checker has filled
its 300 MiB. What it tells comes from QEMU's debug console, and heartbeat.py reads it; the kernel's
own console is the serial port.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.interop.qemu_versions import CACHE

if TYPE_CHECKING:
    from tests.interop.qemu import Qemu

KERNEL_DIRECTORY: Final = CACHE / "guest-kernel"
"""Where tests/interop/fetch.py unpacks the kernel."""

DEBUG_CONSOLE: Final = 0xE9
"""The port that the checker prints to."""

_CHECKER: Final = Path(__file__).parent / "guest" / "checker.c"
_FLAGS: Final = ["-std=gnu11", "-static", "-O2", "-Wall", "-Wextra"]

# - The time stamp counter is the clock and stays it: the kernel would find out that it stood still
#   while the machine was stopped, and change to a clock that is slow to read.
# - QEMU 7.2 under TCG, when it collects the dirty pages, leaves writable entries in the processor's
#   TLB, and what is written through them afterwards goes unseen: a kernel whose pages stay in the
#   TLB is broken on the destination after two rounds. With pti=on every interrupt empties the TLB.
# - A kernel that is lost ends the machine, and so the test.
_COMMAND_LINE: Final = (
    "console=ttyS0 quiet loglevel=2 panic=-1 pti=on mitigations=off tsc=reliable no_timer_check"
    " random.trust_cpu=on"
)


@dataclass(frozen=True)
class LinuxGuest:
    """What the checker is told: guest/checker.c says what each one means."""

    checked_mib: int = 300
    zero_mib: int = 0
    writes_of_thousand: int = 500
    beat_ms: int = 100

    def command_line(self) -> str:
        """The kernel's command line."""
        return (
            f"{_COMMAND_LINE} checker_mib={self.checked_mib} checker_zero_mib={self.zero_mib}"
            f" checker_write={self.writes_of_thousand} checker_beat_ms={self.beat_ms}"
        )

    def arguments(self) -> list[str]:
        """The words of QEMU's command line that boot it."""
        boot = ["-kernel", str(kernel()), "-initrd", str(initramfs())]
        return [*boot, "-append", self.command_line()]

    async def ready(self, qemu: Qemu) -> None:
        """Return when the checker has filled its memory and goes over it."""
        await qemu.heartbeat.ready()
        await qemu.heartbeat.next(1)

    async def goes_on(self, qemu: Qemu) -> None:
        """Return when the checker has got further from now on."""
        first, second = await qemu.heartbeat.next(2)
        assert second.iterations > first.iterations


def has_kernel() -> bool:
    """Whether the kernel has been fetched."""
    return any(KERNEL_DIRECTORY.glob("boot/vmlinuz-*"))


def kernel() -> Path:
    """The kernel's file."""
    assert has_kernel(), f"no kernel in {KERNEL_DIRECTORY}: `make test` fetches it"
    (path,) = KERNEL_DIRECTORY.glob("boot/vmlinuz-*")
    return path


def initramfs() -> Path:
    """The initial root file system, built when the checker has changed: it holds /init only.

    :raise subprocess.CalledProcessError: if the checker does not compile.
    """
    digest = hashlib.sha256(" ".join(_FLAGS).encode() + _CHECKER.read_bytes()).hexdigest()
    image = CACHE / "guest" / f"{digest[:16]}.cpio"
    if not image.exists():
        image.parent.mkdir(parents=True, exist_ok=True)
        program = image.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", *_FLAGS, "-o", str(program), str(_CHECKER)], check=True)
        init = _cpio_entry("init", stat.S_IFREG | 0o755, program.read_bytes())
        program.write_bytes(init + _cpio_entry("TRAILER!!!", 0, b""))
        program.rename(image)
    return image


def _cpio_entry(name: str, mode: int, data: bytes) -> bytes:
    """One file in the "newc" format (Linux: driver-api/early-userspace/buffer-format)."""
    named = name.encode() + b"\0"
    # inode, mode, user, group, links, time, size, device (2), node's device (2), name, checksum
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(named), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + named
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 4) * 4, b"\0")
