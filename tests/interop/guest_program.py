"""The guest of the interop tests: what guest/memory_writer.s leaves where, and how it is built.

Beside keeping memory dirty, the guest makes every byte of every RAM block readable by its
guest-physical address, so that QMP's ``pmemsave`` can tell what the source holds:

- It maps RAM over the legacy area below 1 MiB, which else hides 384 KiB of pc.ram, and copies what
  was visible there before, the block pc.rom, to `ROM_COPY`.
- It reads every fw_cfg file to `FILES`. The blocks /rom@etc/... are mapped nowhere: they are what
  QEMU answers with when a guest reads the fw_cfg file of that name.
"""

from __future__ import annotations

import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.interop.qemu_machine import Accelerator, Machine

if TYPE_CHECKING:
    from tests.interop.qemu import Qemu

MEMORY: Final = 64 << 20
"""Bytes of RAM that the machine has to have."""

FIRMWARE_LENGTH: Final = 0x10000
FIRMWARE_ADDRESS: Final = (1 << 32) - FIRMWARE_LENGTH

PASSES: Final = 0x1000
DIRECTORY: Final = 0x10000
ROM_COPY: Final = 0x80000
ROM_LENGTH: Final = 0x20000
FILES: Final = 0x100000

_LAYOUT: Final = {
    "PASSES": PASSES,
    "DIRECTORY": DIRECTORY,
    "ROM_COPY": ROM_COPY,
    "FILES": FILES,
    "ONCE": 2 << 20,
    "ONCE_END": 4 << 20,
    "SPARSE": 4 << 20,
    "SPARSE_END": 12 << 20,
    "EVERY": 12 << 20,
    "EVERY_END": 28 << 20,
    "TOGGLE": 28 << 20,
    "TOGGLE_END": 32 << 20,
    "WAVE": 32 << 20,
    "WAVE_END": 36 << 20,
}

_DIRECTORY_ENTRY: Final = struct.Struct(">IHH56s")
"""Of fw_cfg: size, key, reserved, name padded with NULs (QEMU's docs/specs/fw_cfg)."""


@dataclass(frozen=True)
class FirmwareGuest:
    """The guest as QEMU runs it."""

    firmware: Path

    def arguments(self) -> list[str]:
        """The words of QEMU's command line that boot it."""
        return ["-bios", str(self.firmware)]

    async def ready(self, qemu: Qemu) -> None:
        """Return when it has gone over its memory twice."""
        await self.goes_on(qemu)

    async def goes_on(self, qemu: Qemu) -> None:
        """Return when it has gone over its memory twice from now on."""
        start = await _passes(qemu)
        while await _passes(qemu) < start + 2:
            pass


def firmware_machine(firmware: Path, accelerator: Accelerator) -> Machine:
    """The machine that the guest is written for."""
    return Machine(FirmwareGuest(firmware), accelerator=accelerator, memory=MEMORY)


def build_firmware(directory: Path) -> Path:
    """Assemble the guest and return the firmware image for QEMU's ``-bios``."""
    source = Path(__file__).parent / "guest" / "memory_writer.s"
    object_file = directory / "memory_writer.o"
    firmware = directory / "memory_writer.rom"
    symbols = [word for name, value in _LAYOUT.items() for word in ("--defsym", f"{name}={value}")]
    subprocess.run(
        ["as", "--32", "--fatal-warnings", *symbols, "-o", object_file, source], check=True
    )
    place = ["-m", "elf_i386", f"-Ttext={FIRMWARE_ADDRESS:#x}", "--oformat=binary"]
    subprocess.run(["ld", "--fatal-warnings", *place, "-o", firmware, object_file], check=True)
    return firmware


async def read_blocks(qemu: Qemu) -> dict[str, bytes]:
    """The contents of every RAM block of the stopped machine, by name.

    pc.ram, and pc.bios at the top of 4 GiB, are read where they are mapped. pc.rom cannot change
    and is read from the copy that the guest has made; the blocks /rom@NAME are what the guest has
    read as fw_cfg file NAME, with zeros after it.
    """
    lengths = await qemu.ram_blocks()
    ram = await qemu.read_memory(0, MEMORY)
    contents = {
        "pc.ram": ram,
        "pc.bios": await qemu.read_memory(FIRMWARE_ADDRESS, FIRMWARE_LENGTH),
        "pc.rom": ram[ROM_COPY : ROM_COPY + ROM_LENGTH],
    }
    files = _fw_cfg_files(ram)
    for name in lengths.keys() - contents.keys():
        contents[name] = files[name.removeprefix("/rom@")].ljust(lengths[name], b"\0")
    assert {name: len(data) for name, data in contents.items()} == lengths
    return contents


async def _passes(qemu: Qemu) -> int:
    """How often the guest has gone over its memory."""
    return int.from_bytes(await qemu.read_memory(PASSES, 4), "little")


def _fw_cfg_files(ram: bytes) -> dict[str, bytes]:
    """The fw_cfg files that the guest has copied into its RAM, by name."""
    (count,) = struct.unpack_from(">I", ram, DIRECTORY)
    files: dict[str, bytes] = {}
    address = FILES
    for index in range(count):
        size, _, _, name = _DIRECTORY_ENTRY.unpack_from(
            ram, DIRECTORY + 4 + index * _DIRECTORY_ENTRY.size
        )
        files[name.rstrip(b"\0").decode()] = ram[address : address + size]
        address += -(-size // 0x1000) * 0x1000
    return files
